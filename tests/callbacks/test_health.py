"""Health signals against closed forms, and every alarm by its failure."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks.budget import Budget
from callbacks.health import ALARMS, GUIDE, Health, HealthOptions, diversity, saturation, swing
from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys

# ---- signals -------------------------------------------------------------------------------------------------------


def test_saturation_counts_values_at_either_end() -> None:
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0] = 1.0
    images[1, 2, :2] = -1.3
    assert float(saturation(images)) == pytest.approx((16 + 8) / 96)


def test_diversity_is_the_distance_of_independent_pictures() -> None:
    """Two independent normal pictures of deviation s are s sqrt(2) apart; equal ones 0, whatever the prompts."""
    images = 0.3 * Keys(0).normal("x", torch.arange(3), (4, 3, 32, 32))
    assert float(diversity(images)) == pytest.approx(0.3 * math.sqrt(2), rel=0.01)
    assert float(diversity(images[:, :1].expand(-1, 4, -1, -1, -1))) == 0


def test_swing_is_what_does_not_make_good() -> None:
    assert swing([0.1, -0.1, 0.1, -0.1, 0.1]) == pytest.approx(0.2)
    assert swing([0.0, 0.2, 0.5, 0.6]) == pytest.approx(0)
    assert swing([0.0, 0.5, 0.25]) == pytest.approx((0.75 - 0.25) / 2)


# ---- in a run ------------------------------------------------------------------------------------------------------


def watched(
    studio: Any, *, method: Any = None, steps: int = 4, clock: Any = None, **options: Any
) -> tuple[Health, Any]:
    callback = Health(HealthOptions(enabled=True, every=1, **options), *([clock] if clock else [lambda: 0.0]))
    notebook = studio.Notebook()
    studio.trainer(callback, steps=steps, logger=notebook).fit(method or studio.Painter(), studio.Easel())
    return callback, notebook


def alarms(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "callbacks.health"]


def test_signals_are_logged_and_a_healthy_run_is_silent(studio, caplog: pytest.LogCaptureFixture) -> None:
    method = studio.Painter()
    callback, notebook = watched(studio, method=method, steps=3)
    assert sorted(notebook.values("health/saturation")) == [1, 2, 3]
    assert sorted(notebook.values("health/swing")) == [3]  # of two measurements there is no back and forth
    assert callback.values["diversity"] == pytest.approx(0.1 * math.sqrt(2), rel=0.05)
    assert callback.values["brightness"] == pytest.approx(sum(map(len, studio.prompts)) / 4 / 32, abs=0.1)
    assert "gradient_ratio" not in callback.values and "gap" not in callback.values
    assert [positions for step, positions in method.sampled if step == 2] == [
        [0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15],
    ]  # fmt: skip
    assert alarms(caplog) == [] and callback.alarms == set()


def test_each_prompt_has_as_many_pictures_as_it_is_given_noises(studio) -> None:
    method = studio.Painter()
    watched(studio, method=method, steps=1, noises=2)
    assert [positions for _, positions in method.sampled] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_prompts_are_taken_from_as_many_batches_as_they_need(studio) -> None:
    method = studio.Painter()
    watched(studio, method=method, steps=1, noises=2, prompts=6)
    assert [positions for _, positions in method.sampled] == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10], [9, 11]]


def painter(studio: Any, paint: Any) -> Any:
    class Sick(studio.Painter):
        def sample(self, cond: Any, keys: Any, positions: Tensor) -> Tensor:
            return paint(super().sample(cond, keys, positions), self.counters.step)

    return Sick()


@pytest.mark.parametrize(
    ("name", "paint"),
    [
        ("saturation", lambda x, step: 20 * (x - x.mean())),
        ("brightness", lambda x, step: 0.2 * x - 0.98),
        ("swing", lambda x, step: 0.3 * x + (0.5 if step % 2 else -0.5)),
        ("diversity", lambda x, step: x.mean((1, 2, 3), keepdim=True).round(decimals=1).expand_as(x)),
    ],
)
def test_pictures_that_fail_raise_their_alarm(studio, caplog, name: str, paint: Any) -> None:
    callback, _ = watched(studio, method=painter(studio, paint), steps=6)
    assert callback.alarms == {name}
    (line,) = alarms(caplog)  # one line, although the failure lasts
    value = callback.values[name]
    limit = getattr(HealthOptions(), name)
    assert f": {name} is " in line and f" its limit of {limit:g} (health.{name})" in line
    assert line.endswith(f"{GUIDE}#{name}")
    assert abs(value) > limit if ALARMS[name] == "above" else value < limit


def test_pictures_that_are_no_numbers_raise_alarms(studio, caplog) -> None:
    callback, _ = watched(studio, method=painter(studio, lambda x, step: x * math.nan), steps=1)
    assert {"brightness", "diversity"} <= callback.alarms and len(alarms(caplog)) == len(callback.alarms)


def test_an_alarm_that_was_off_between_warns_again(studio, caplog) -> None:
    method = painter(studio, lambda x, step: 0.01 * x + (0.95 if step in (2, 3, 5) else 0))
    callback, _ = watched(studio, method=method, steps=6, swing=None)
    assert [line.split(":")[0] for line in alarms(caplog) if "brightness" in line] == [
        "Health alarm at step 2", "Health alarm at step 5",
    ]  # fmt: skip
    assert "brightness" not in callback.alarms


def two_groups(studio: Any, scale: float, gap: float = 0.0) -> Any:
    """A second group whose gradient is `scale` times the first one's."""

    class Pair(studio.Painter):
        def configure_model(self) -> None:
            self.add_group("brush", torch.nn.Linear(4, 4), self.options)
            self.add_group("other", torch.nn.Linear(4, 4), self.options)
            self.other.load_state_dict(self.brush.state_dict())

        def training_step(self, batch: Any, batch_idx: int) -> None:
            x = self.keys.normal("noise", batch["main"].position, (4,))
            self.backward("brush", self.brush(x).mean(), gap=torch.tensor(gap))
            self.backward("other", scale * self.other(x).mean())

        def sample(self, cond: Any, keys: Any, positions: Tensor) -> Tensor:
            return 0.1 * keys.normal("z", positions, (3, 8, 8))

    return Pair(dropout=0.0)


def test_gradient_norms_that_part_raise_an_alarm(studio, caplog) -> None:
    healthy, _ = watched(studio, method=two_groups(studio, 100.0), steps=2)
    assert healthy.values["gradient_ratio"] == pytest.approx(100, rel=1e-3)  # before clipping
    assert alarms(caplog) == []
    sick, notebook = watched(studio, method=two_groups(studio, 1e-4), steps=2)
    assert sick.values["gradient_ratio"] == pytest.approx(1e4, rel=1e-3)
    assert "gradient_ratio is 1e+04, above its limit of 1000" in alarms(caplog)[0]
    assert sorted(notebook.values("health/gradient_ratio")) == [1, 2]
    assert set(notebook.values("health/alarms").values()) == {1.0}


def test_a_group_at_rest_is_no_part_of_the_ratio(studio, caplog) -> None:
    resting, _ = watched(studio, method=two_groups(studio, 0.0), steps=2)
    assert "gradient_ratio" not in resting.values and alarms(caplog) == []
    broken = Health(HealthOptions(enabled=True))
    broken._norms = {"a": torch.tensor(0.0), "b": torch.tensor(2.0), "c": torch.tensor(float("nan"))}
    assert math.isnan(broken._of_networks(None, None)["gradient_ratio"])


def test_a_noted_gap_is_logged_and_alarms_beyond_its_limit(studio, caplog) -> None:
    callback, _ = watched(studio, method=two_groups(studio, 1.0, gap=-3.0), steps=2)
    assert callback.values["gap"] == -3 and alarms(caplog) == []  # no limit, no alarm
    watched(studio, method=two_groups(studio, 1.0, gap=-3.0), steps=2, gap=2.5)
    assert "gap is -3, above its limit of 2.5" in alarms(caplog)[0]


def test_nothing_of_the_callback_stays_in_the_method(studio) -> None:
    method = two_groups(studio, 1.0)
    watched(studio, method=method, steps=1)
    assert "note" not in vars(method) and all("step" not in vars(g) for g in method.groups.values())


def test_training_is_the_same_with_and_without_health(studio) -> None:
    weights = []
    for enabled in (True, False):
        method = studio.Painter()
        callback = Health(HealthOptions(enabled=enabled, every=1, max_fraction=1.0), clock=lambda: 0.0)
        studio.trainer(callback, steps=4).fit(method, studio.Easel())
        weights.append(method.brush.linear.weight.clone())
        assert bool(method.sampled) is enabled
    assert torch.equal(*weights)


def test_same_pictures_at_every_measurement_of_the_same_weights(studio) -> None:
    class Still(studio.Painter):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

    _, notebook = watched(studio, method=Still(), steps=3)
    assert len(set(notebook.values("health/brightness").values())) == 1


def test_pictures_keep_their_budget(studio, ticking) -> None:
    clock = ticking()

    class Slow(studio.Painter):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            clock.now += 10

        def condition(self, records: Any) -> Any:
            clock.now += 3
            return super().condition(records)

    callback, notebook = watched(studio, method=Slow(), steps=20, clock=clock, max_fraction=0.1)
    # After k measurements of 3 s the next one fits once 3 (k + 1) <= 0.1 * 10 s * steps; the first is always made.
    assert sorted(notebook.values("health/diversity")) == [1, 6, 9, 12, 15, 18]
    assert callback.budget.spent == 18 and callback.budget.skipped == 14


def test_a_budget_starts_anew_with_training(ticking) -> None:
    class One:
        strategy = type("Strategy", (), {"broadcast": staticmethod(lambda value: value)})

    clock = ticking()
    budget = Budget(0.5, clock)
    with budget.spending():
        clock.now += 8
    assert not budget.allows(One)  # type: ignore[arg-type]
    clock.now += 32
    assert budget.allows(One)  # type: ignore[arg-type]
    budget.start()
    assert budget.spent == 0


def watched_by_a_rank(rank: int, folder: str) -> dict[str, float]:
    import importlib.util

    from lightning_t2i.strategies import FSDP2

    spec = importlib.util.spec_from_file_location("studio", Path(__file__).with_name("conftest.py"))
    helper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helper)
    callback = Health(HealthOptions(enabled=True, every=1, prompts=5), clock=lambda: 0.0)
    method = two_groups(helper, 100.0, gap=1.0 + rank)
    trainer = helper.Studio(Path(folder)).trainer(callback, steps=2, strategy=FSDP2(1, 2), devices=2)
    trainer.fit(method, helper.Easel())
    return callback.values


def test_two_ranks_see_the_same_signals(ranks, studio, tmp_path: Path) -> None:
    """Of five prompts, which lie in two batches and on both ranks."""
    first, second = ranks(watched_by_a_rank, str(tmp_path))
    alone = watched(studio, method=two_groups(studio, 100.0, gap=1.0), steps=2, prompts=5)[0].values
    assert first == second and set(first) == {"saturation", "brightness", "diversity", "gradient_ratio", "gap"}
    assert first.pop("gap") == 1.5 and alone.pop("gap") == 1.0  # the mean over ranks
    assert first == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize(("name", "value"), [("every", 0), ("prompts", 0), ("noises", 1), ("max_fraction", 0.0)])
def test_impossible_options_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"health\.{name}"):
        HealthOptions(**{name: value})


def test_every_alarm_has_its_section_and_its_option(repo: Path) -> None:
    headings = {line[3:] for line in (repo / GUIDE).read_text().splitlines() if line.startswith("## ")}
    assert headings == set(ALARMS)
    assert all(hasattr(HealthOptions(), name) for name in ALARMS)


def test_health_is_a_section_of_the_config_and_off_by_default() -> None:
    from lightning_t2i.cli.session import STANDARD

    options, make = STANDARD["health"]
    assert options is HealthOptions and not options().enabled
    assert isinstance(make(Path(), options()), Health)


@pytest.fixture(autouse=True)
def _warnings_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "callbacks.health")
