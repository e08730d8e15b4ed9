"""Copies elsewhere: the marker last, failures told and made good, and no run on an object store."""

import logging
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from toy import Toy, ToyData, trainer_for

from callbacks.checkpoints import CheckpointOptions, Checkpoints
from lightning_t2i.checkpoints.mirror import Mirror, on_a_disk, refuse_others
from lightning_t2i.cli import runs
from lightning_t2i.errors import UserError
from lightning_t2i.state_io import AtomicCheckpointIO, complete_checkpoints, newest


@pytest.fixture
def memory() -> MemoryFileSystem:
    """fsspec's file system in memory, empty."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    return files


def fit(run: Path, steps: int, **options) -> None:
    saving = Checkpoints(run / "checkpoints", CheckpointOptions(**{"every": 2, "keep": 1, **options}))
    trainer = trainer_for(run, steps, callbacks=[saving])
    trainer.fit(Toy(), ToyData(), ckpt_path=newest(run / "checkpoints"), weights_only=True)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("form", ["single", "sharded"])
def test_finished_checkpoints_are_copied_with_the_marker_last(tmp_path, memory, monkeypatch, form, asynchronous):
    order, put = [], MemoryFileSystem.put_file

    def watched(self, local, remote, *args, **kwargs):
        order.append(remote.removeprefix("/"))
        return put(self, local, remote, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "put_file", watched)
    fit(tmp_path / "a", 4, mirror="memory://project/", form=form, asynchronous=asynchronous)
    names = [[name for name in order if f"step-0000000{step}" in name] for step in (2, 4)]
    for found in names:
        assert found[-1].endswith("/complete.json") and len(found) == len(set(found)) > 1
    assert [p.name for p in complete_checkpoints(tmp_path / "a/checkpoints")] == ["step-00000004"]
    memory.get("/project/a", str(tmp_path / "copy"), recursive=True)
    copies = complete_checkpoints(tmp_path / "copy")
    assert [p.name for p in copies] == ["step-00000002", "step-00000004"]  # nothing is removed there
    assert AtomicCheckpointIO().load_checkpoint(copies[-1])["global_step"] == 4


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failing_copy_is_told_and_loses_nothing(tmp_path, memory, monkeypatch, caplog, asynchronous):
    def refuse(self, *args, **kwargs):
        raise PermissionError("Access Denied")

    options = {"mirror": "memory://project", "keep": 9, "asynchronous": asynchronous}
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(MemoryFileSystem, "put_file", refuse)
        with pytest.raises(RuntimeError, match="could be copied to memory://project: Access Denied"):
            fit(tmp_path / "a", 5, **options)
    told = [r.message for r in caplog.records if "could not be copied" in r.message]
    assert [message.split()[0] for message in told] == ["step-00000002", "step-00000004", "step-00000005"]
    assert len(complete_checkpoints(tmp_path / "a/checkpoints")) == 3
    fit(tmp_path / "a", 6, **options)  # what is missing there is made good
    assert sorted(Path(p).name for p in memory.ls("/project/a", detail=False)) == [
        f"step-0000000{step}" for step in (2, 4, 5, 6)
    ]


def test_a_copy_that_broke_off_has_no_marker(tmp_path, memory, monkeypatch):
    path = tmp_path / "step-00000003"
    AtomicCheckpointIO().save_checkpoint({"global_step": 3}, path)
    mirror, put = Mirror("memory://there"), MemoryFileSystem.put_file

    def breaks(self, local, remote, *args, **kwargs):
        if remote.endswith("state.pt"):
            raise ConnectionError
        return put(self, local, remote, *args, **kwargs)

    mirror.update(tmp_path, path)
    assert memory.exists("/there/step-00000003/complete.json")
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", breaks)
        with pytest.raises(ConnectionError):
            mirror.update(tmp_path, path)  # the same step, saved again
    assert not memory.exists("/there/step-00000003/complete.json")


def test_a_folder_can_be_a_mirror(tmp_path):
    fit(tmp_path / "a", 2, mirror=str(tmp_path / "elsewhere"))
    assert newest(tmp_path / "elsewhere/a").name == "step-00000002"


def test_an_address_that_nothing_can_write_to_is_refused_before_the_training(tmp_path):
    with pytest.raises(UserError, match="checkpoints.mirror"):
        fit(tmp_path / "a", 2, mirror="no-such-store://x")
    assert not (tmp_path / "a/checkpoints").exists()


def test_a_training_from_the_beginning_needs_a_place_without_checkpoints(tmp_path, memory, monkeypatch):
    refuse_others("memory://project", "a")
    memory.pipe("/project/a/step-00000002/state.pt", b"")  # a copy that broke off
    refuse_others("memory://project", "a")
    fit(tmp_path / "a", 2, mirror="memory://project")
    with pytest.raises(UserError, match="memory://project/a"):
        refuse_others("memory://project/", "a")
    refuse_others("memory://project", "b")

    def refuse(self, *args, **kwargs):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "glob", refuse)
    with pytest.raises(UserError, match="Access Denied"):
        refuse_others("memory://project", "b")


@pytest.mark.parametrize("place", ["s3://bucket/runs", "gs://bucket/runs", "hf+x://a", "s3:/bucket"])
def test_runs_on_an_object_store_are_refused_with_the_reason(place, monkeypatch):
    monkeypatch.setenv("LIGHTNING_T2I_RUNS", place)
    with pytest.raises(UserError, match="rename a folder at once") as error:
        runs.runs_root()
    assert "LIGHTNING_T2I_RUNS" in str(error.value) and "checkpoints.mirror" in str(error.value)
    with pytest.raises(UserError, match="needs a disk"):
        Checkpoints(f"{place}/a/checkpoints")
    with pytest.raises(UserError, match="needs a disk"):
        Checkpoints(Path(f"{place}/a/checkpoints"))
    with pytest.raises(UserError, match="needs a disk"):
        runs.run_name(place, [])


def test_folders_on_a_disk_are_not_refused():
    for place in ("runs", "/mnt/x:y", "../a b", "C:/runs", Path("x/y")):
        assert on_a_disk(place, "here") == Path(place)
