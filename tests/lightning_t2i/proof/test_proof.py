"""The proof of exact resume: moments, comparison bit by bit, and that it finds a method that forgets something."""

from __future__ import annotations

import json
import math

import programs
import pytest
import torch
from kills import what_a_kill_changes
from toy import Toy

from lightning_t2i.errors import UserError
from lightning_t2i.proof import runs
from lightning_t2i.proof.__main__ import main
from lightning_t2i.proof.compare import between, differences, equal, logged, trace
from lightning_t2i.proof.runs import EVERY, config_of, moments, start
from lightning_t2i.proof.witness import VARIABLE, Kill, Witness


class Forgetful(Toy):
    """Scales its data by a number that no checkpoint holds: a step that is repeated is another one at once."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = 0

    def training_step(self, batch, batch_idx):
        self.seen += 1
        batch["main"].latent = batch["main"].latent * (1 + 1e-3 * self.seen)
        super().training_step(batch, batch_idx)


@pytest.fixture
def forgetful(tmp_path, repo, monkeypatch):
    """A config whose class is found beside it."""
    monkeypatch.setenv("PYTHONPATH", f"{repo / 'tests/helpers'}:{repo / 'tests/lightning_t2i/proof'}")
    folder = tmp_path / "forgetful"
    folder.mkdir()
    (folder / "forgetful.py").write_text("from test_proof import Forgetful\n__all__ = ['Forgetful']\n")
    (folder / "forgetful.yaml").write_text(
        "model: {class_path: forgetful.Forgetful}\ndata: {class_path: toy.ToyData}\n"
    )
    return folder / "forgetful.yaml"


# ---- moments ---------------------------------------------------------------------------------------------------------


def test_moments_are_decided_by_their_seed_and_some_are_saves() -> None:
    kills = moments(3, 10, 33)
    assert kills == moments(3, 10, 33) != moments(4, 10, 33)
    assert [k.step for k in kills] == sorted({k.step for k in kills}) and len(kills) == 10
    assert all(0 < k.step < 32 and 0 <= k.fraction < 1 for k in kills)
    saves = [k.step for k in kills if k.where == "save"]
    assert len(saves) == 2 and all((step + 1) % EVERY == 0 for step in saves)
    assert {k.where for seed in range(20) for k in moments(seed, 1, 6)} == {"step", "save"}


# (step, where) of each kill that tests of methods draw -> a seed of it
DRAWN = {(k.step, k.where): seed for seed in range(50) for k in moments(seed, 1, 6, every=2, first=2)}


def test_moments_can_be_kept_behind_the_first_checkpoint() -> None:
    assert sorted(DRAWN) == [(2, "step"), (3, "save"), (3, "step"), (4, "step")]
    kills = [k for seed in range(50) for k in moments(seed, 3, 12, every=4, first=5)]
    assert {k.step for k in kills if k.where == "save"} == {7} and {k.step for k in kills} == set(range(5, 11))


def test_a_kill_comes_through_the_environment(monkeypatch) -> None:
    kill = Kill(4, "save", 0.25)
    for name, value in kill.variable().items():
        monkeypatch.setenv(name, value)
    assert Witness().kill == kill
    monkeypatch.delenv(VARIABLE)
    assert Witness().kill is None


def test_configs_are_found_by_method_or_by_file(tmp_path, repo) -> None:
    assert config_of("dmd") == repo / "configs/dmd/tiny.yaml"
    (tmp_path / "mine.yaml").write_text("{}")
    assert config_of(str(tmp_path / "mine.yaml")) == tmp_path / "mine.yaml"
    with pytest.raises(UserError, match="Neither a method"):
        config_of("dmx")
    assert main(["dmx"]) == 2


# ---- comparison ------------------------------------------------------------------------------------------------------


def test_values_are_equal_when_their_bits_are() -> None:
    nan = torch.tensor([math.nan, 1.0])
    assert equal(nan, nan.clone()) and equal(math.nan, math.nan) and equal([], [])
    assert not equal(torch.tensor([0.0]), torch.tensor([-0.0])) and not equal(0.0, -0.0)
    assert not equal(torch.zeros(2), torch.zeros(2, dtype=torch.float64)) and not equal(
        torch.zeros(2), torch.zeros(2, 1)
    )
    assert not equal(torch.zeros(1), 0.0) and not equal(1, True)


def test_differences_are_named_by_their_path() -> None:
    a = {"w": torch.ones(2), "groups": [{"lr": 0.1}, {}], "same": (1, "x")}
    b = {"w": torch.tensor([1.0, 1.0000001]), "groups": [{"lr": 0.1, "new": 2}, {}], "same": (1, "x")}
    assert differences(a, a) == [] and sorted(differences(a, b)) == ["/groups/0/new", "/w"]
    assert differences({"a": {}}, {"a": {"b": 1}}) == ["/a", "/a/b"]
    assert differences([1, 2], [1]) == ["/1"]


def test_logged_values_leave_out_what_the_clock_decides(tmp_path) -> None:
    lines = [
        {"time": 1.0, "step": 1, "samples": 8, "loss": 0.5, "perf/step_ms": 3.0},
        {"time": 2.0, "step": 1, "samples": 8, "checkpoint/seconds": 0.1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert logged(tmp_path) == [{"step": 1, "samples": 8, "loss": 0.5}]


def test_a_step_that_was_another_one_the_second_time_is_noticed(tmp_path) -> None:
    first = [{"step": 1, "micro": 0, "ids": {"main": [7]}}, {"step": 1, "micro": 0, "group": "g", "loss": "0x1p0"}]
    again = [first[0], {**first[1], "loss": "0x1.8p0"}]
    file = tmp_path / "trace-0.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in first * 2))
    found, changed = trace(tmp_path)
    assert found == {"trace-0/1/0/ids": {"main": [7]}, "trace-0/1/0/loss 0": ["g", "0x1p0"]} and changed == []
    file.write_text("".join(json.dumps(line) + "\n" for line in first + again))
    assert trace(tmp_path)[1] == ["trace-0/1/0/loss 0"]


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("draw", DRAWN, ids=str)
def test_a_method_that_forgets_is_found_out_by_every_kill_that_tests_draw(forgetful, tmp_path, draw) -> None:
    wrong = what_a_kill_changes(tmp_path, str(forgetful), "1x1", seed=DRAWN[draw])
    assert any(path.startswith("checkpoint/state_dict/critic.") for path in wrong)


@pytest.mark.slow
def test_a_method_that_forgets_is_found_out_and_the_result_says_where(forgetful, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "subprocess", programs)
    words = [str(forgetful), "--meshes", "1x1", "--kills", "1", "--steps", "6", "--seed", "10", "--out", str(tmp_path)]
    words_for_fit = ["--model.dropout", "0.2"]
    assert main([*words, *words_for_fit]) == 1
    result = json.loads((tmp_path / "forgetful.json").read_text())
    assert result["words"] == words_for_fit
    (proof,) = result["proofs"]
    (kill,) = proof["kills"]
    assert kill["step"] == 4 and kill["left"] == 3 and proof["seed"] == 10  # step 3 was trained, and is once more
    wrong = "\n".join(proof["differences"])
    for part in ("checkpoint/state_dict/generator_ema.", "/states/", "metrics/", "trace", "repeated otherwise"):
        assert part in wrong
    assert f"{len(proof['differences'])} DIFFERENCES" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_ends_by_itself_is_no_kill(tmp_path) -> None:
    with pytest.raises(RuntimeError, match=r"should have been killed .*exit code 0"):
        start(["list"], {}, Kill(1, "step", 0.5))
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        between(tmp_path, tmp_path)
