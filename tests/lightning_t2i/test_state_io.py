"""Checkpoint folders: complete or absent, safe to read, never at the cost of an earlier one."""

import errno
import json
import os
import pickle

import pytest
import torch

from lightning_t2i import state_io
from lightning_t2i.errors import UserError
from lightning_t2i.state_io import AtomicCheckpointIO, clean_leftovers, complete_checkpoints, is_complete, newest


def save(folder, step, value=1.0):
    path = folder / f"step-{step:08d}"
    AtomicCheckpointIO().save_checkpoint({"global_step": step, "x": torch.full((3,), value)}, path)
    return path


def test_round_trip_and_order(tmp_path):
    for step in (9, 100, 20):
        save(tmp_path, step, step)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-00000009", "step-00000020", "step-00000100"]
    assert AtomicCheckpointIO().load_checkpoint(newest(tmp_path))["x"].tolist() == [100.0] * 3


def test_newest_of_nothing_is_none(tmp_path):
    assert newest(tmp_path) is None
    assert newest(tmp_path / "absent") is None


def test_a_checkpoint_that_is_pruned_meanwhile_does_not_hide_the_newest(tmp_path, monkeypatch):
    old, new, read = save(tmp_path, 1), save(tmp_path, 2), state_io.read_marker

    def read_before_it_is_gone(path):
        marker = read(path)
        if path == old:
            (old / "complete.json").unlink()  # by the training that writes checkpoints here
        return marker

    monkeypatch.setattr(state_io, "read_marker", read_before_it_is_gone)
    assert newest(tmp_path) == new
    assert not is_complete(old)


@pytest.mark.parametrize("damage", ["no marker", "short state", "bad marker", "no state"])
def test_incomplete_folders_are_passed_over_and_refused(tmp_path, damage):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    if damage == "no marker":
        (bad / "complete.json").unlink()
    elif damage == "short state":
        (bad / "state.pt").write_bytes((bad / "state.pt").read_bytes()[:-1])
    elif damage == "bad marker":
        (bad / "complete.json").write_text("{")
    else:
        (bad / "state.pt").unlink()
    assert not is_complete(bad)
    assert newest(tmp_path) == good
    with pytest.raises(UserError, match="not a complete checkpoint"):
        AtomicCheckpointIO().load_checkpoint(bad)


@pytest.mark.parametrize("failing", ["save", "fsync", "replace"])
def test_a_failing_save_is_loud_and_keeps_the_earlier_checkpoint(tmp_path, monkeypatch, failing):
    good = save(tmp_path, 1)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {"save": (torch, "save"), "fsync": (os, "fsync"), "replace": (state_io.os, "replace")}[failing]
    with monkeypatch.context() as patch:
        patch.setattr(*target, fail)
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, 2)
    assert complete_checkpoints(tmp_path) == [good]
    assert sorted(p.name for p in tmp_path.iterdir()) == [good.name]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1, 1.0)
    path = save(tmp_path, 1, 2.0)
    assert AtomicCheckpointIO().load_checkpoint(path)["x"].tolist() == [2.0] * 3


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    good = save(tmp_path, 1)
    (tmp_path / ".step-00000002.77.tmp").mkdir()
    (tmp_path / ".step-00000002.77.tmp" / "state.pt").write_bytes(b"half")
    (save(tmp_path, 3) / "complete.json").unlink()  # as of a removal that was killed
    (tmp_path / "notes").mkdir()
    clean_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "notes", good]


def test_a_checkpoint_of_the_first_format_is_read(tmp_path):
    """Its marker told the size of state.pt alone."""
    path = save(tmp_path, 4, 3.0)
    size = (path / "state.pt").stat().st_size
    (path / "complete.json").write_text(json.dumps({"step": 4, "bytes": size, "form": "single"}))
    assert newest(tmp_path) == path and AtomicCheckpointIO().load_checkpoint(path)["x"].tolist() == [3.0] * 3
    (path / "complete.json").write_text(json.dumps({"step": 4, "bytes": size + 1, "form": "single"}))
    assert newest(tmp_path) is None


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (self.file,)


def test_a_malicious_checkpoint_runs_no_code(tmp_path):
    path, trap = save(tmp_path, 1), tmp_path / "trap"
    torch.save({"global_step": 1, "x": Malicious(str(trap))}, path / "state.pt")
    files = {"state.pt": (path / "state.pt").stat().st_size}
    (path / "complete.json").write_text(json.dumps({"step": 1, "form": "single", "files": files}))
    with pytest.raises(pickle.UnpicklingError):
        AtomicCheckpointIO().load_checkpoint(path)
    assert not trap.exists()
