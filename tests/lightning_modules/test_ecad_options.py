"""ECAD: options that change pictures and what is picked, and those that change how they are made and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import caching
import diffusers
import numpy as np
import pytest
import tiny_networks
import torch
from caching import fit, method, pipeline, random_schedule
from torch import Tensor

from lightning_t2i.caching import Layout, apply
from lightning_t2i.frozen import folder_identity
from lightning_t2i.keys import Keys
from lightning_t2i.networks.load import load_process
from lightning_t2i.processes import DDPM

pytestmark = pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode")


def built(source: str, **options: Any) -> Any:
    module = method(source, **options)
    module.configure_model()
    return module


def drawn(module: Any) -> Tensor:
    return module.sample(module.encode(["red square and a circle", "two"]), Keys(1), torch.arange(2))


def test_parts_are_those_of_another_folder(tmp_path: Path) -> None:
    source = pipeline(tmp_path / "pipeline")
    network = caching.denoiser("pixart").backbone
    torch.nn.init.normal_(network.proj_out.weight, std=0.3)
    network.save_pretrained(tmp_path / "network")
    module = built(str(tmp_path / "network"), parts=source)
    denoiser, parts = folder_identity(tmp_path / "network"), folder_identity(source)
    assert module.frozen_identities == {"denoiser": denoiser, "codec": parts, "text": parts}
    assert not torch.equal(drawn(module), drawn(built(source)))
    network.save_pretrained(tmp_path / "pipeline/transformer")
    assert torch.equal(drawn(module), drawn(built(source)))
    assert module.frozen_identities["denoiser"] == folder_identity(tmp_path / "network")
    assert (
        module.frozen_identities["codec"] == module.frozen_identities["text"] != folder_identity(tmp_path / "network")
    )


def test_a_network_that_is_told_a_guidance_is_told_this_one(tmp_path: Path) -> None:
    flux = str(tiny_networks.pipeline_folder(tmp_path / "flux", "flux", caching._flow()))
    low, high = (built(flux, guidance=1.0, embedded_guidance=scale) for scale in (1.0, 8.0))
    assert low.encode(["red"]).guidance.tolist() == [1.0] and high.encode(["red"]).guidance.tolist() == [8.0]
    assert not torch.equal(drawn(low), drawn(high))
    pixart = pipeline(tmp_path / "pixart")
    assert torch.equal(*(drawn(built(pixart, embedded_guidance=scale)) for scale in (1.0, 8.0)))


def test_captions_are_cut_at_the_text_length(tmp_path: Path) -> None:
    source = pipeline(tmp_path / "pipeline")
    short, usual = built(source, text_length=2), built(source)
    assert short.encode(["red square"]).embeds.shape[1] == 2 < usual.encode(["red square"]).embeds.shape[1]
    assert not torch.equal(drawn(short), drawn(usual))


def test_executors_search_alike(tmp_path: Path) -> None:
    found, source = [], pipeline(tmp_path / "pipeline")
    for kind in ("hooks", "static"):
        module = method(source, executor=kind)
        fit(tmp_path / kind, module, 2)
        assert module.executor.kind == kind
        found.append(module.progress.archive.facts)
    assert found[0] == found[1] and len(found[0]) > 2


def test_micro_batches_change_nothing_but_last_bits(tmp_path: Path) -> None:
    scores, source = [], pipeline(tmp_path / "pipeline")
    for size in (2, 8):
        module = method(source, micro_batch=size)
        fit(tmp_path / str(size), module, 1)
        assert [len(part) for part, _, _ in module.calibration.batches] == [size] * (8 // size)
        scores.append(module.measure([None, module.progress.only_first]))
    torch.testing.assert_close(*map(torch.from_numpy, scores), rtol=1e-4, atol=1e-6)
    assert scores[0].std() > 0


def test_a_speed_picks_another_schedule_of_the_front(tmp_path: Path) -> None:
    layout = Layout.of(caching.denoiser("pixart").backbone)
    schedules = [random_schedule(layout, seed, share, steps=4) for seed, share in enumerate((0.8, 0.5, 0.2))]
    points = zip((1.0, 0.9, 0.2), (0.8, 0.5, 0.3), schedules, strict=True)
    front = [{"quality": q, "relative_macs": m, "schedule": schedule.plain()} for q, m, schedule in points]
    (tmp_path / "front.json").write_text(json.dumps({"front": front}))
    source, pictures = pipeline(tmp_path / "pipeline"), {}
    for speed, index in ((None, 1), (1.2, 0), (3.0, 2)):
        module = built(source, schedule=str(tmp_path / "front.json"), speed=speed)
        pictures[speed] = drawn(module)
        assert module.picked().key == schedules[index].key
    assert not torch.equal(pictures[None], pictures[1.2]) and not torch.equal(pictures[None], pictures[3.0])


def test_a_process_takes_the_place_of_the_schedulers(tmp_path: Path) -> None:
    source = pipeline(tmp_path / "pipeline")
    usual, _ = load_process(source)
    other = DDPM("squaredcos_cap_v2")
    pictures = [drawn(built(source, process=process)) for process in (None, usual, other)]
    assert torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])


def test_products_within_attention_count_where_they_are_asked_for(tmp_path: Path) -> None:
    source = pipeline(tmp_path / "pipeline")
    with_them, without = (built(source, search={"sdpa": sdpa}).open().progress for sdpa in (True, False))
    schedule = random_schedule(with_them.full.layout, 0, steps=4)
    assert 0 < without.macs(schedule) < with_them.macs(schedule)
    assert without.cost.macs(schedule) == with_them.macs(schedule)


def test_a_race_drops_what_is_clearly_beaten(tmp_path: Path) -> None:
    source, dropped = pipeline(tmp_path / "pipeline"), {}
    for race in (True, False):
        module = method(source, micro_batch=2, search={"race": race})
        fit(tmp_path / str(race), module, 3)
        dropped[race] = [facts[2] for facts in module.progress.archive.facts.values()].count(0.0)
    assert dropped[True] > 0 == dropped[False]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
def test_an_exported_pipeline_samples_as_the_search_did(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By two lines and its own scheduler; one of another solver is told, and gives other pictures."""
    module, out = built(pipeline(tmp_path / "pipeline")).open(), tmp_path / "out"
    schedule = random_schedule(module.progress.full.layout, 0, steps=4)
    module.progress.archive.add(schedule, 1.0, module.progress.macs(schedule), 0, np.ones(8))
    module.export(out, [])
    ours = drawn(built(str(out), schedule=str(out / "front.json")))  # weights are those of the folder, in fp16
    stock: Any = diffusers.DiffusionPipeline.from_pretrained(out, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    z = Keys(1).normal("z", torch.arange(2), module.sampler.shape)
    options = {"guidance_scale": 3.0, "num_inference_steps": 4, "use_resolution_binning": False, "clean_caption": False}
    pictures, schedulers = [], (stock.scheduler, diffusers.DDIMScheduler.from_config(stock.scheduler.config))
    for scheduler, file in zip(schedulers, ("front.json", "schedules/knee.json"), strict=True):
        assert "solver" not in caplog.text
        stock.scheduler = scheduler
        with apply(stock, out / file):
            images = stock(
                ["red square and a circle", "two"], latents=z, height=16, width=16, output_type="pt", **options
            )
        pictures.append(images.images * 2 - 1)
    assert "searched with solver dpmpp_2m, and may be worse with DDIMScheduler" in caplog.text
    errors = [float((images - ours).abs().mean()) for images in pictures]
    assert errors[0] < 0.01 < 0.03 < errors[1], errors
