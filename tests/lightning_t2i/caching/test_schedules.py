"""Hand-written schedules, first generations, fronts, picks and the two-line helper on stock pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import caching
import numpy as np
import pytest
import torch
from caching import STEPS, denoiser, random_schedule

from lightning_t2i.caching import Cost, Executor, Layout, Schedule, apply
from lightning_t2i.caching.archive import Archive, chosen, hypervolume
from lightning_t2i.caching.front import content, picks, write_picks
from lightning_t2i.caching.heuristics import attention_every, baselines, every, first_generation, initial, spaced, tgate
from lightning_t2i.caching.layout import Stack
from lightning_t2i.caching.search import SearchOptions
from lightning_t2i.errors import UserError

PIXART = Layout("PixArtTransformer2DModel", (Stack("transformer_blocks", "BasicTransformerBlock", 28),))


def test_hand_written_schedules() -> None:
    assert PIXART.width * 20 == 1680
    fora = every(PIXART, 20, 3)
    assert fora.all(1).nonzero()[0].tolist() == [0, 3, 6, 9, 12, 15, 18] and fora.sum() == 7 * 84
    attention = attention_every(PIXART, 20, 2)
    assert attention[:, PIXART.columns("ff")].all() and attention[1].sum() == 28 and attention[2].all()
    gated = tgate(PIXART, 20, 10, 3)
    self_attention, cross = gated[:, PIXART.columns("attn1")[0]], gated[:, PIXART.columns("attn2")[0]]
    assert cross.tolist() == [True] * 10 + [False] * 10
    assert self_attention.nonzero()[0].tolist() == [0, 1, 3, 6, 9, *range(10, 20)]
    middle = spaced(PIXART, 20, 1, 4, 2, middle=True)
    (rows, columns) = (~middle).nonzero()
    assert set(rows) == {10} and [c // 3 for c in columns] == [12, 13, 14, 15] and set(columns % 3) == {2}
    assert (~spaced(PIXART, 20, 3, 5, 0)).sum() == 15


def test_first_generations_spread_over_costs(tmp_path: Path) -> None:
    network = denoiser("pixart")
    cost = Cost.of(network.backbone, (4, 8, 8), 5)
    found = initial(cost, 10, 12)
    assert found.shape == (12, 10, cost.layout.width) and found[:, 0].all()
    schedules = [Schedule(rows, cost.layout) for rows in found]
    assert len({s.key for s in schedules}) == 12
    shares = sorted(cost.macs(s) / cost.full(10) for s in schedules)
    assert shares[0] < 0.4 and shares[-1] > 0.9
    assert np.array_equal(found[0], every(cost.layout, 10, 2))
    genomes = first_generation(SearchOptions(12), cost, 10)
    assert genomes is not None and genomes.shape == (12, 9 * cost.layout.width)
    whole = first_generation(SearchOptions(12, fix_first_step=False), cost, 10)
    assert whole is not None and whole.shape[1] == 10 * cost.layout.width
    assert first_generation(SearchOptions(initial="random"), cost, 10) is None
    with pytest.raises(UserError, match="No such beginning"):
        first_generation(SearchOptions(initial=str(tmp_path / "none.json")), cost, 10)
    file = tmp_path / "front.json"
    file.write_text(json.dumps({"front": [{"schedule": random_schedule(cost.layout, 0, steps=9).plain()}]}))
    with pytest.raises(UserError, match="number of steps"):
        first_generation(SearchOptions(initial=str(file)), cost, 10)


def test_flux_has_no_tgate() -> None:
    assert set(baselines(Layout.of(denoiser("flux").backbone), 10)) == {"FORA 2", "FORA 3", "FORA 4"}
    assert set(baselines(PIXART, 10)) == {"FORA 2", "FORA 3", "FORA 4", "TGATE"}


def test_hypervolume_by_hand() -> None:
    quality, macs = np.array([0.5, 0.8, 0.4, 0.9]), np.array([50.0, 80.0, 60.0, 120.0])
    assert hypervolume(quality, macs, 0.0, 1.0, 100.0) == pytest.approx((0.5 * 50 + 0.3 * 20) / 100)
    assert hypervolume(quality, macs, 0.0, 2.0, 100.0) == pytest.approx((0.5 * 50 + 0.3 * 20) / 200)
    assert hypervolume(quality[:0], macs[:0], 0.0, 1.0, 100.0) == 0.0


def front() -> tuple[Archive, Cost]:
    cost = Cost.of(denoiser("pixart").backbone, (4, 8, 8), 5)
    archive = Archive(Schedule.full(cost.layout, STEPS))
    for i in range(8):
        rows = every(cost.layout, STEPS, 5)
        rows.ravel()[cost.layout.width :: 8 - i] = True  # the more, the dearer
        schedule = Schedule(rows, cost.layout)
        archive.add(schedule, float(np.log(1 + i)), cost.macs(schedule), i, np.full(4, float(i)))
    return archive, cost


def test_archive_keeps_everything_and_its_front(tmp_path: Path) -> None:
    archive, cost = front()
    archive.add(random_schedule(cost.layout, 99), 9.0, 1.0, 0)  # dropped in a race: an estimate
    again = Archive(archive.template)
    again.load(archive.state())
    assert again.facts == archive.facts and again.front() == archive.front()
    assert len(again.front()) == 8 and all(np.array_equal(again.scores[k], archive.scores[k]) for k in archive.front())
    found = content(archive, cost, True, note=1, made_for={"solver": "heun"})
    assert found["note"] == 1 and found["evaluated"] == 9 and len(found["front"]) == 8
    assert found["front"][3]["slot_bytes"] == cost.slot_bytes(archive.schedule(archive.front()[3]))
    names = picks(found["front"])
    for name, speed in (("fast", 1.5), ("faster", 2.0), ("fastest", 2.5)):
        place = names[name]
        fast = [p["relative_macs"] <= 1 / speed for p in found["front"]]
        assert fast[place] and not any(fast[place + 1 :])
    write_picks(tmp_path, found)
    (tmp_path / "front.json").write_text(json.dumps(found))
    assert (
        Schedule.load(tmp_path / "front.json", speed=2.0).key == Schedule.load(tmp_path / "schedules/faster.json").key
    )
    for file in ("front.json", "schedules/faster.json"):
        assert Schedule.load(tmp_path / file).made_for == {"solver": "heun"}
    assert Schedule.load(tmp_path / "front.json").key == archive.schedule(archive.front()[chosen(found["front"])]).key
    with pytest.raises(UserError, match="so fast"):
        Schedule.load(tmp_path / "front.json", speed=1000.0)


@pytest.mark.parametrize("family", caching.FAMILIES)
def test_two_lines_for_a_stock_pipeline(tmp_path: Path, family: str) -> None:
    import diffusers

    folder = f"assets/tiny/{family}"
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    layout = Layout.of(pipeline.transformer)
    schedule = random_schedule(layout, 0, steps=4)
    schedule.save(tmp_path / "s.json")

    def draw(steps: int = 4) -> torch.Tensor:
        options: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "output_type": "pt"}
        if family == "pixart":
            options |= {"use_resolution_binning": False, "clean_caption": False}
        else:
            options |= {"height": 32, "width": 32, "max_sequence_length": 32}
        return pipeline("a red circle", num_inference_steps=steps, **options).images

    before = draw()
    with apply(pipeline, tmp_path / "s.json") as executor:
        cached = draw()
        assert not torch.equal(cached, before)
        executor.use(Schedule.full(layout, 4))
        assert torch.equal(draw(), before)
        with pytest.raises(UserError, match="number of steps"):
            draw(steps=5)
    assert torch.equal(draw(), before)
    with apply(pipeline, schedule, kind="static"):
        assert torch.equal(draw(), cached)
    with pytest.raises(UserError, match="does not know the times"), apply(pipeline.transformer, schedule):
        pass


def test_rows_are_found_by_times_of_a_pipeline_in_bfloat16() -> None:
    """FLUX.1-dev's grid at 1024 px: rounded twice, times are further off than half of the distance of steps."""
    import diffusers

    network, steps = denoiser("flux").backbone, 50
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=1.15)
    pipeline = SimpleNamespace(transformer=network, scheduler=scheduler)
    half, exact = scheduler.timesteps.to(torch.bfloat16) / 1000, scheduler.timesteps.double() / 1000
    assert (half.double() - exact).abs().max() > exact.diff().abs().min() / 2
    with apply(pipeline, random_schedule(Layout.of(network), 0, steps=steps)) as executor:
        for step, time in enumerate(half):
            executor.begin(time, "")
            assert executor.slots.step == step
        with pytest.raises(UserError, match="none of the schedule's steps"):
            executor.begin(half[0] * 1.1, "")
    steps = 200
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=1.15)
    with apply(pipeline, random_schedule(Layout.of(network), 0, steps=steps)) as executor:
        executor.begin(scheduler.timesteps[3] / 1000, "")
        with pytest.raises(UserError, match="told apart"):
            executor.begin(scheduler.timesteps[3].to(torch.bfloat16) / 1000, "")


def test_what_was_never_kept_is_computed_and_said(caplog: pytest.LogCaptureFixture) -> None:
    network = denoiser("pixart")
    schedule = random_schedule(Layout.of(network.backbone), 0, share=0.2)
    x, times = torch.randn(1, 4, 8, 8), caching.times(network)()
    cond = caching.tiny_networks.condition(1)
    goal = network(x, times[2], cond)
    for kind in ("hooks", "static"):
        caplog.clear()
        with Executor(network.backbone, caching.times(network), kind).use(schedule):  # type: ignore[arg-type]
            assert torch.equal(network(x, times[2], cond), goal)  # a sampling that begins in the middle
        assert "nothing is kept of" in caplog.text


def test_times_that_are_none_of_the_grid_are_refused() -> None:
    network = denoiser("pixart")
    schedule = random_schedule(Layout.of(network.backbone), 0, steps=2)
    with (
        Executor(network.backbone, lambda: torch.tensor([900, 800])).use(schedule),
        pytest.raises(UserError, match="none"),
    ):
        network(torch.randn(1, 4, 8, 8), torch.tensor(300), caching.tiny_networks.condition(1))
