"""`train.py check`: what it says of a training, for people and for machines, and that it leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from benchmarks.preflight_memory import BAR, measured_peak, predicted_peak
from lightning_t2i.cli.main import main, parse
from lightning_t2i.cli.verbs import opened
from lightning_t2i.errors import UserError
from lightning_t2i.paths import ROOT
from lightning_t2i.preflight.doubts import _guidance
from lightning_t2i.preflight.plan import duration

MESH = {"class_path": "lightning_t2i.strategies.FSDP2", "init_args": {"replicate": None, "shard": None}}
POINTS = {"means": [[0.0, 0.0, 0.0]], "shares": [1.0], "std": 0.1, "batch_size": 16}
CONFIG = {
    "base": [str(ROOT / "configs/trainer/cpu.yaml")],
    "model": {
        "class_path": "lightning_modules.diffusion.Diffusion",
        "init_args": {
            "network": str(ROOT / "configs/networks/toy_mlp.json"),
            "process": {"class_path": "lightning_t2i.processes.EDM"},
            "prediction": "edm",
            "guidance": 1.0,
            "denoiser": {"ema": {"decay": 0.9}},
        },
    },
    "data": {
        "class_path": "datamodules.streams.Streams",
        "init_args": {"main": {"class_path": "datamodules.points.Points", "init_args": POINTS}},
    },
    "trainer": {"max_steps": 1000},
}


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    """A config file in a folder that would hold its runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_T2I_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    file = tmp_path / "toy.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    return file


def check(capsys, *words: str) -> dict:
    assert main(["check", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def warned(found: dict) -> set[str]:
    return {warning["key"] for warning in found["warnings"]}


def test_the_plan_of_a_training(config, capsys, tmp_path):
    found = check(capsys, "--config", str(config), "--tflops", "0.001")
    networks = {network["name"]: network for network in found["networks"]}
    memory = found["memory_per_rank"]
    weights = networks["denoiser"]["parameters"]
    assert networks["denoiser_ema"]["kind"] == "EMA" and memory["EMA"] >= 4 * weights == memory["weights"]
    assert memory["optimizer"] >= 2 * memory["weights"]
    assert memory["peak"] == sum(memory[name] for name in memory.keys() - {"peak", "step"})
    assert found["checkpoint"] >= 4 * memory["weights"], "weights, average and two moments"
    (written,) = found["writes"]
    assert written["bytes"] == 3 * found["checkpoint"] and written["place"] == str(tmp_path / "runs" / "toy")
    assert found["flops_per_step_and_rank"]["total"] > 6 * 15 * weights
    assert found["eta"]["seconds"] == pytest.approx(1000 * found["flops_per_step_and_rank"]["total"] / 1e9)
    assert found["warnings"] == [] and sorted(p.name for p in tmp_path.iterdir()) == ["toy.yaml"]


def test_the_plan_as_text(config, capsys, tmp_path):
    assert main(["check", "--config", str(config), "--trainer.max_steps", "10"]) == 0
    text = capsys.readouterr().out
    for line in (
        "denoiser_ema",
        "a step of one process",
        "peak",
        "1 checkpoint ",
        "computation: ",
        "warnings",
        "fix: ",
    ):
        assert line in text
    assert max(len(line.replace(str(tmp_path), "")) for line in text.splitlines()) <= 120
    assert sorted(p.name for p in tmp_path.iterdir()) == ["toy.yaml"]


def test_processes_share_weights_and_the_batch(config, capsys):
    """Four processes on two nodes: half of the weights and a quarter of the batch each."""
    alone = check(capsys, "--config", str(config))
    config.write_text(yaml.safe_dump({**CONFIG, "trainer": {"max_steps": 1000, "strategy": MESH, "devices": 2}}))
    found = check(capsys, "--config", str(config), "--ranks", "4", "--nodes", "2")
    assert (found["ranks"], found["nodes"], found["mesh"]) == (4, 2, [2, 2])
    assert 0.5 <= found["memory_per_rank"]["weights"] / alone["memory_per_rank"]["weights"] < 0.6
    assert found["memory_per_rank"]["batch"] == alone["memory_per_rank"]["batch"] / 4
    moved = found["collectives_per_step_and_rank"]
    assert moved["_allgather_base_ inside nodes"] > 0 and moved["allreduce_ between nodes"] > 0


def test_values_that_cannot_be_meant(config, capsys):
    CHANGED = {
        "model.denoiser.optimizer": "{class_path: torch.optim.AdamW, init_args: {lr: 10}}",
        "model.denoiser.schedule": "{class_path: lightning_t2i.schedules.Warmup, init_args: {steps: 500, total: 900}}",
        "model.denoiser.ema.decay": "0.9999",
        "model.guidance": "500",
        "trainer.max_steps": "100",
        "checkpoints.every": "1000",
        "model.common.log_every": "200",
    }
    words = [word for key, value in CHANGED.items() for word in (f"--{key}", value)]
    assert warned(check(capsys, "--config", str(config), *words)) == {
        "model.denoiser.optimizer.lr",
        "model.denoiser.ema.decay",
        "model.denoiser.schedule.steps",
        "model.denoiser.schedule.total",
        "model.guidance",
        "checkpoints.every",
        "model.common.log_every",
    }


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, ["model.null_probability"]),
        ({"sampling": {"guidance": 1.0}}, []),
        ({"sampling": {"guidance": 500.0}}, ["model.sampling.guidance", "model.null_probability"]),
        ({"null_probability": 0.1}, []),
    ],
    ids=str,
)
def test_the_guidance_of_fluid_is_its_samplings(config, changes, keys):
    """Its default too: without `sampling` a config does not say it."""
    parts = dict.fromkeys(("network", "codec", "text"), "none/such")
    model = {"class_path": "lightning_modules.fluid.Fluid", "init_args": {**parts, "null_probability": 0.0, **changes}}
    config.write_text(yaml.safe_dump({**CONFIG, "model": model}))
    session, resolved = opened(parse(["check", "--config", str(config)]))
    assert [doubt.key for doubt in _guidance(resolved, session.method)] == keys


def test_data_that_are_missing_or_too_few(config, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    prompts = {"class_path": "datamodules.prompts.Prompts", "init_args": {"source": "prompts.txt", "batch_size": 4}}
    nowhere = {"class_path": "datamodules.image_text.ImageText", "init_args": {"source": "data/none", "size": 1}}
    data = {"class_path": "datamodules.streams.Streams", "init_args": {"main": nowhere, "real": prompts, "workers": 4}}
    config.write_text(yaml.safe_dump({**CONFIG, "data": data}))
    found = check(capsys, "--config", str(config))
    assert warned(found) == {"data.main.source", "data.real.batch_size", "data.workers"}
    assert {s["name"]: (s["there"], s["rows"]) for s in found["data"]} == {"main": (False, None), "real": (True, 3)}


def test_a_search_counts_what_it_keeps_and_shares_its_pictures(capsys, monkeypatch, tmp_path):
    """A batch of every prompt with every seed is more than there are prompts, and meant so."""
    monkeypatch.setenv("LIGHTNING_T2I_RUNS", str(tmp_path / "runs"))
    tiny = str(ROOT / "configs/ecad/tiny.yaml")
    found = [check(capsys, "--config", tiny, "--model.micro_batch", str(size)) for size in (5, 10)]
    memory = [plan["memory_per_rank"] for plan in found]
    assert 0 < 2 * memory[0]["kept values"] == memory[1]["kept values"]
    assert memory[1]["peak"] == memory[1]["frozen"] + memory[1]["kept values"]
    assert warned(found[0]) == set()
    words = ["check", "--config", tiny, "--config", str(ROOT / "configs/trainer/cpu_two.yaml"), "--ranks"]
    assert main([*words, "4"]) == 2
    assert "data.main.limit: 14, model.seeds: 2, data.main.batch_size: 28" in capsys.readouterr().err


def test_pictures_of_another_size_than_the_network_takes_are_told(config, capsys):
    pictures = {"class_path": "datamodules.image_text.ImageText", "init_args": {"source": "data/none", "size": 8}}
    data = {"class_path": "datamodules.streams.Streams", "init_args": {"main": pictures}}
    config.write_text(yaml.safe_dump({**CONFIG, "data": data}))
    assert main(["check", "--config", str(config)]) == 2
    said = capsys.readouterr().err
    assert "of the declared shapes" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model.guidence 3", "write guidance instead"),
        ("--ranks 4", "through FSDP2"),
        ("--ranks 3 --nodes 2", "do not divide by the nodes"),
        ("--model.network owner/nothing", "check --fetch"),
    ],
)
def test_mistakes_are_told_without_a_traceback(config, capsys, words, message):
    assert main(["check", "--config", str(config), *words.split()]) == 2
    said = capsys.readouterr()
    assert message in said.err and "Traceback" not in said.err and said.out == ""


def test_only_check_takes_its_options():
    assert parse(["check", "--config", "a.yaml", "--ranks", "8", "--nodes", "2", "--fetch"]).ranks == 8
    for option in ("--ranks 8", "--nodes 2", "--tflops 3", "--json", "--fetch"):
        with pytest.raises(UserError, match="Only check"):
            parse(["fit", "--config", "a.yaml", *option.split()])


@pytest.mark.filterwarnings("ignore:Profiler clears events at the end of each cycle")
@pytest.mark.parametrize("name", ["classifier/tiny", "clip/tiny"])
def test_predicted_memory_is_what_a_training_allocates(name):
    """The fastest of docs/preflight.md's table; without optimizer states or the twin it would be out by more."""
    predicted, (measured, begin) = predicted_peak(name, part=8), measured_peak(name, part=8)
    assert 0 < begin < measured and abs(predicted / measured - 1) <= BAR


@pytest.mark.parametrize(
    ("seconds", "text"), [(7, "7 s"), (61, "1 min 1 s"), (3700, "1 h 1 min"), (90000, "1 d 1 h"), (59.6, "60 s")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_check_of_weights_in_files_of_our_own_says_what_it_cannot_know(capsys) -> None:
    """RepBlend's classifier is read on fake tensors; its step, which depends on values, is refused in words."""
    assert main(["check", "--config", str(ROOT / "configs/repblend/tiny.yaml")]) == 2
    assert "A training step depends on the values of tensors" in capsys.readouterr().err
