"""Faults of disks, data and processes: each is loud and named, loses nothing that was saved, and never hangs."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import programs
import pytest
import torch
import torch.distributed as dist
import yaml
from data_sets import as_rank, write_data_set
from toy import Toy, ToyData, trainer_for

from callbacks.checkpoints import CheckpointOptions, Checkpoints
from datamodules.image_text import ImageText
from datamodules.streams import Streams
from lightning_t2i.cli.main import main
from lightning_t2i.errors import UserError, of_the_disk
from lightning_t2i.state_io import AtomicCheckpointIO, complete_checkpoints, newest
from lightning_t2i.strategies import roll_call

# ---- disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[..., Path]]:
    """`disk(name, *options)`: the folder of a file system of its own, as `mount` makes it; skips where it may not."""
    made: list[Path] = []

    def mount(name: str, *options: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"this process may not mount: {done.stderr.strip()}")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    """A config of the toy method."""
    for name in [n for n in os.environ if n.startswith(("SLURM_", "LIGHTNING_T2I_")) or n in ("RANK", "LOCAL_RANK")]:
        monkeypatch.delenv(name)
    file = tmp_path / "toy.yaml"
    content = {
        "model": {"class_path": "toy.Toy"},
        "data": {"class_path": "toy.ToyData"},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 12},
        "throughput": {"enabled": False},
        "checkpoints": {"every": 2, "keep": 50},
        "tracking": {"wandb": "off"},
    }
    file.write_text(yaml.safe_dump(content))
    return file


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AtomicCheckpointIO().load_checkpoint(newest(folder))["state_dict"]


def trained(folder: Path, steps: int = 12) -> None:
    saver = Checkpoints(folder, CheckpointOptions(every=2, keep=50))
    module = Toy()
    trainer_for(folder, steps, callbacks=[saver]).fit(module, ToyData(), ckpt_path=newest(folder), weights_only=True)


def test_disk_full(disk, tmp_path, config, capsys, monkeypatch):
    small = disk("small", "size=200k")
    with pytest.raises(OSError) as error:
        trained(small / "checkpoints")
    assert error.value.errno == errno.ENOSPC
    failed = 2 + 2 * len(complete_checkpoints(small / "checkpoints"))
    assert 2 < failed <= 12
    assert Path(error.value.filename) == small / f"checkpoints/step-{failed:08d}"
    assert not list((small / "checkpoints").glob(".*"))  # the half-written one is gone
    subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
    trained(small / "checkpoints")
    trained(tmp_path / "whole")
    a, b = weights(small / "checkpoints"), weights(tmp_path / "whole")
    assert all(torch.equal(a[name], b[name]) for name in b)

    runs = disk("runs", "size=256k")
    monkeypatch.setenv("LIGHTNING_T2I_RUNS", str(runs))
    assert main(["fit", "--config", str(config)]) == 2
    said = capsys.readouterr().err
    assert "error: No space left on device" in said and "make room there" in said
    assert f"{runs}/toy/checkpoints/step-" in said
    assert newest(runs / "toy/checkpoints") is not None


def test_read_only_folder(disk, tmp_path, config, capsys, monkeypatch):
    closed = disk("closed", "ro")
    monkeypatch.setenv("LIGHTNING_T2I_RUNS", str(closed / "runs"))
    assert main(["fit", "--config", str(config)]) == 2
    caught = capsys.readouterr()
    assert "error: Read-only file system" in caught.err and "LIGHTNING_T2I_RUNS" in caught.err
    assert str(closed / "runs") in caught.err
    assert "seed" not in caught.out  # no banner, no training

    data = disk("data", "size=4m")  # a data set that may only be read is enough to train on
    stream = ImageText(str(write_data_set(data)), size=8)
    subprocess.run(["mount", "-o", "remount,ro", str(data)], check=True)
    loaded = as_rank(Streams(stream))
    assert len(next(iter(loaded.train_dataloader()))["main"]) == 64


def test_cross_device_temporary_folder(disk, tmp_path, config, monkeypatch):
    """Nothing of a run passes through TMPDIR: it lies on another device, on which nothing can be written."""
    other = disk("temporary", "ro")
    assert other.stat().st_dev != tmp_path.stat().st_dev
    monkeypatch.setenv("LIGHTNING_T2I_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("TMPDIR", str(other))
    monkeypatch.setattr("tempfile.tempdir", str(other))
    assert main(["fit", "--config", str(config)]) == 0
    assert newest(tmp_path / "runs/toy/checkpoints").name == "step-00000012"
    assert (tmp_path / "runs/toy/report.md").is_file()


def test_only_faults_of_the_disk_are_told_as_such():
    assert of_the_disk(OSError(errno.EIO, "Input/output error")) is None
    assert "make room" in str(of_the_disk(OSError(errno.EDQUOT, "Disk quota exceeded", "runs/a")))


# ---- data ------------------------------------------------------------------------------------------------------------


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def test_truncated_shard(tmp_path):
    """What is left of the shard is used; what is lost is bad samples, named and bounded."""
    folder = write_data_set(tmp_path / "toy")
    os.truncate(shards(folder)[-1], 512 * 4 * 9 + 100)  # a sample is four blocks: nine of ten are whole
    stream = ImageText(str(folder), size=8, batch_size=50, max_bad_fraction=0.05)
    data = as_rank(Streams(stream))
    batch = next(iter(data.train_dataloader()))["main"]
    assert list(stream.bad) == ["train-000002.tar:k0049"]
    assert "the shard ends" in stream.bad["train-000002.tar:k0049"]
    assert sorted(set(batch.label.tolist())) == list(range(49))
    os.truncate(shards(folder)[-1], 512 * 4)
    strict = as_rank(Streams(ImageText(str(folder), size=8, batch_size=50, max_bad_fraction=0.05)))
    with pytest.raises(UserError, match=r"Too many bad samples[\s\S]*9 bad of 50"):
        next(iter(strict.train_dataloader()))


def test_zero_byte_shard(tmp_path):
    folder = write_data_set(tmp_path / "toy")
    os.truncate(shards(folder)[1], 0)
    with pytest.raises(UserError, match=r"is empty[\s\S]*train-000001\.tar"):
        as_rank(Streams(ImageText(str(folder), size=8)))


def test_missing_caption(tmp_path, caplog):
    """A sample whose language the index knows but whose text is blank is a bad one; the others go on."""
    folder = write_data_set(tmp_path / "toy", captions=lambda i: {"en": ["  " if i == 7 else str(i)]})
    stream = ImageText(str(folder), size=8, batch_size=50, max_bad_fraction=0.02)
    batch = next(iter(as_rank(Streams(stream)).train_dataloader()))["main"]
    assert stream.bad == {"train-000000.tar:k0007": "no caption in en"}
    assert "k0007 replaced: no caption in en" in caplog.text
    assert len(batch.caption) == 50 and all(text.strip() for text in batch.caption)


def test_fewer_shards_than_lanes_need(tmp_path):
    """Lanes are cut from the samples: one shard serves 1024 lanes, two ranks and two workers, each sample once."""
    folder = write_data_set(tmp_path / "toy", 48, samples_per_shard=48)
    assert len(shards(folder)) == 1
    ids = []
    for rank in range(2):
        data = as_rank(Streams(ImageText(str(folder), size=8, batch_size=8, lanes=1024), workers=2), rank, 2)
        iterator = iter(data.train_dataloader())
        ids += chain.from_iterable(next(iterator)["main"].id.tolist() for _ in range(6))
    assert len(ids) == len(set(ids)) == 48


def test_data_set_changed_between_runs(tmp_path):
    """Same name, same size, same file names; the pictures are others."""
    folder = write_data_set(tmp_path / "toy")
    state = as_rank(Streams(ImageText(str(folder), size=8)), batches=2).state_dict()
    as_rank(Streams(ImageText(str(folder), size=8))).load_state_dict(state)
    write_data_set(folder, first=1)
    with pytest.raises(UserError, match="'sha' of the stream 'main' .* its shards hold other samples"):
        as_rank(Streams(ImageText(str(folder), size=8))).load_state_dict(state)
    write_data_set(folder, captions=lambda i: {"en": [] if i == 3 else [str(i)]})
    with pytest.raises(UserError, match="of the stream 'main' .* other samples"):
        as_rank(Streams(ImageText(str(folder), size=8))).load_state_dict(state)


# ---- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hit", "name"), [(1, "SIGKILL"), (0, "SIGSTOP")])
def test_nan_in_a_batch_and_a_dead_rank(tmp_path, repo, hit, name):
    """Rank 1 alone reads a NaN and both stop; then a rank is killed or stopped and the other says which."""
    environment = {**os.environ, "PYTHONPATH": f"{repo}:{repo / 'tests/helpers'}", "WORLD_SIZE": "2"}
    logs = [tmp_path / f"log-{rank}" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, str(repo / "tests/helpers/faults.py"), str(tmp_path), str(rank), str(hit), name]
        variables = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as stream:
            processes.append(programs.Popen(command, env=variables, stdout=stream, stderr=subprocess.STDOUT))
    try:
        assert processes[1 - hit].wait(150) == 1, logs[1 - hit].read_text()
    finally:
        for process in processes:
            process.kill()
    assert processes[hit].wait() == -signal.SIGKILL

    reports = [json.loads((tmp_path / f"nan-{rank}.json").read_text()) for rank in range(2)]
    assert [report["step"] for report in reports] == [3, 3]  # together, before an update
    assert "'critic', nan" in reports[1]["error"] and "210" in reports[1]["error"]  # the id of the broken point
    assert "loss or gradient norm is not finite at training step 3" in reports[0]["error"]

    timeouts = [json.loads((tmp_path / f"timeouts-{rank}.json").read_text()) for rank in range(2)]
    assert timeouts == [[8] * 4] * 2  # of the world, the mesh's two dimensions and the checkpoints
    assert f"rank {hit} of 2 processes does not answer" in logs[1 - hit].read_text()
    assert [path.name for path in complete_checkpoints(tmp_path / "checkpoints")] == ["step-00000002"]


def test_a_rank_that_ends_by_itself_is_named_with_its_error():
    store = dist.HashStore()
    lost = dist.DistNetworkError("closed")
    assert roll_call.roll_call(UserError("Too many bad samples"), store, 2, 4) == []
    assert roll_call.roll_call(dist.DistNetworkError("closed"), store, 0, 4, wait=0.01)[-1].startswith("rank 3 of 4")
    found = roll_call.roll_call(lost, store, 1, 4, wait=0.01)
    assert found[0] == "rank 2 of 4 processes ended with UserError: Too many bad samples"
    assert found[1].startswith("rank 3 of 4 processes does not answer")
    assert len(found) == 2  # rank 0 lost contact as well, which is nobody's fault
    roll_call.begin(store, 2)
    assert "rank 2 of 4 processes does not answer" in roll_call.roll_call(lost, store, 1, 4, wait=0.01)[0]
