"""The sharded form: every process writes its part, any mesh and any setting reads it, nothing in it can run code."""

import json
import os
import pickle
import shutil
import sys
import tempfile
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))  # for the processes that `ranks` starts

from kills import optimizer_tensors
from toy import Toy, ToyData, trainer_for

from callbacks.checkpoints import CheckpointOptions, Checkpoints
from lightning_t2i.checkpoints import sharded, snapshots
from lightning_t2i.checkpoints.ranks import ALONE, Ranks
from lightning_t2i.checkpoints.snapshots import SnapshotOptions, averages
from lightning_t2i.checkpoints.staging import Staging
from lightning_t2i.cli.restore import restore
from lightning_t2i.options import MethodOptions
from lightning_t2i.state_io import AtomicCheckpointIO, Stored, load_tensor, newest, read_marker, write_folder

FORMS = ("single", "sharded")


class Losses(L.pytorch.loggers.Logger):
    """The losses of every training step, as they are logged."""

    name = version = None

    def __init__(self):
        super().__init__()
        self.values: dict[int, float] = {}

    def log_metrics(self, metrics, step=None):
        if "critic/loss" in metrics:
            self.values[step] = metrics["critic/loss"]

    def log_hyperparams(self, *args, **kwargs):
        pass


class Restored(L.Callback):
    """What a training begins with, as whole tensors, and how much of it is cut."""

    def on_train_start(self, trainer, module):
        state = {"state_dict": module.state_dict()}
        module.on_save_checkpoint(state)
        self.tensors = tensors(state)
        self.cut = any(isinstance(t, DTensor) for group in module.groups.values() for t in group.parameters)


def tensors(state: dict) -> dict[str, torch.Tensor]:
    """Weights, EMA and optimizer states."""
    return {**state["state_dict"], **dict(optimizer_tensors(state))}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fit(folder: Path, steps: int, mesh: tuple[int, int] = (1, 1), **options) -> tuple[Restored, dict[int, float]]:
    """Trains the toy without dropout up to a step, or goes on; returns what it began with and its losses."""
    start, losses = Restored(), Losses()
    saving = Checkpoints(folder, CheckpointOptions(every=0, keep=99, **options))
    trainer = trainer_for(folder.parent, steps, *mesh, callbacks=[saving, start], logger=losses)
    module = Toy(MethodOptions(log_every=1), dropout=0.0)
    trainer.fit(module, ToyData(), ckpt_path=newest(folder), weights_only=True)
    return start, losses.values


# ---- meshes ----------------------------------------------------------------------------------------------------------


STAGES = [
    (12, (2, 1), "sharded", False),
    (13, (1, 2), "single", True),
    (14, (2, 1), "sharded", True),
    (15, (1, 2), "sharded", True),
]


def two_processes(rank: int, folder: str) -> dict:
    """Goes on from step 9 on two meshes, in both forms, at once and in the background; then a disk is full."""
    folder, found = Path(folder), {"exact": [], "cut": [], "losses": {}}
    for step, mesh, form, asynchronous in STAGES:
        saved = tensors(AtomicCheckpointIO().load_checkpoint(newest(folder)))
        start, losses = fit(folder, step, mesh, form=form, asynchronous=asynchronous)
        found["exact"].append(equal(start.tensors, saved))
        found["cut"].append(start.cut)
        found["losses"] |= losses
        dist.barrier()
    found["files"] = {p.name: read_marker(p)["files"] for p in folder.iterdir()}
    found["part"] = a_part_is_read(folder)
    found["failure"] = one_rank_fails(rank, folder, 1, form="sharded")
    found["single"] = [one_rank_fails(rank, folder, 0, asynchronous=later) for later in (False, True)]
    found["last"] = rank_0_fails_last(rank, folder)
    found["snapshot"] = a_snapshot_fails(rank, folder)
    found["kept"] = what_is_kept(rank)
    found["mapped"] = what_stays_mapped(folder)
    found["group"] = in_one_group(rank)
    return found


def a_part_is_read(folder: Path) -> bool:
    """Whether a process of 1x2 reads its half of a matrix, not all of it."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))["shard"]
    state = AtomicCheckpointIO().load_checkpoint(newest(folder), whole=False)
    name = "generator.inside.weight"
    whole = AtomicCheckpointIO().load_checkpoint(newest(folder))["state_dict"][name]
    target = dist.tensor.distribute_tensor(torch.zeros_like(whole), mesh, [dist.tensor.Shard(0)])
    read = []
    original = torch.Tensor.copy_

    def watched(self, source, *args):
        read.append(source.numel())
        return original(self, source, *args)

    torch.Tensor.copy_ = watched
    try:
        state["state_dict"][name].into(target)
    finally:
        torch.Tensor.copy_ = original
    return (
        isinstance(state["state_dict"][name], Stored)
        and sum(read) == whole.numel() // 2
        and (torch.equal(target.full_tensor(), whole))
    )


def full(*args, **options):
    raise OSError(28, "No space left on device")


def failure_of(call) -> str:
    try:
        call()
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__} {error}"
    return "no failure"


def one_rank_fails(rank: int, folder: Path, which: int, **options) -> str:
    """A rank's disk is full: both ranks hear of it, nothing is left."""
    original = torch.save
    if rank == which:
        torch.save = full
    try:
        return failure_of(lambda: fit(folder.parent / "full", 2, (1, 2), **options))
    finally:
        torch.save = original


def rank_0_fails_last(rank: int, folder: Path) -> str:
    """What rank 0 writes alone does not fit any more: no rank waits for it."""
    original, sharded.write_state = sharded.write_state, full  # rank 1 never calls it
    together, state = Ranks(dist.new_group(backend="gloo")), {"w": torch.arange(6.0)}
    path = folder.parent / "last" / "step-00000003"
    try:
        return failure_of(
            lambda: write_folder(
                path, 3, "sharded", lambda into: sharded.write_sharded(state, into, together), together
            )
        )
    finally:
        sharded.write_state = original


def a_snapshot_fails(rank: int, folder: Path) -> str:
    """Rank 0 alone writes averages, and has no room for them."""
    original, snapshots.save_file = snapshots.save_file, full
    try:
        return failure_of(lambda: fit(folder.parent / "snapshot/checkpoints", 2, (1, 2), ema=SnapshotOptions(every=1)))
    finally:
        snapshots.save_file = original


def what_is_kept(rank: int) -> dict:
    """What each rank of 2x1 keeps for a save, in bytes, and the shapes that rank 0 has of the averages."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    placements = [dist.tensor.Replicate(), dist.tensor.Shard(0)]
    tensors = [dist.tensor.distribute_tensor(torch.ones(n), mesh, placements) for n in (8, 5, 4, 1)]
    found = {}
    for asynchronous in (False, True):
        staging = Staging(True, asynchronous, rank == 0)
        staging.begin()
        found[f"parts {asynchronous}"] = [staging.take(t).local.nbytes for t in tensors]
        staging = Staging(False, asynchronous, rank == 0)
        staging.begin()
        taken = [staging.take(t) for t in [*tensors, torch.ones(2)]]
        found[f"whole {asynchronous}"] = [None if t is None else t.nbytes for t in taken]
    module = Toy()
    module.configure_model()
    found["averages"] = len(averages(module.groups.values(), keep=rank == 0))
    return found


def what_stays_mapped(folder: Path) -> list:
    """Whether the one file of a checkpoint is in memory while its tensors are there, and after a training from it."""

    def mapped() -> bool:
        return "step-00000013/state.pt" in Path("/proc/self/maps").read_text()

    state = AtomicCheckpointIO().load_checkpoint(folder / "step-00000013", whole=False)
    before = mapped()
    weight = state["state_dict"]["generator.inside.weight"]
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    copied = load_tensor(weight, dist.tensor.distribute_tensor(weight, mesh, [dist.tensor.Replicate()]))
    shares = copied.to_local().data_ptr() == weight.data_ptr()
    del state, weight
    module = Toy(MethodOptions(log_every=1), dropout=0.0)
    trainer_for(folder.parent, 14, 1, 2).fit(module, ToyData(), ckpt_path=folder / "step-00000013", weights_only=True)
    return [before, shares, mapped()]


def in_one_group(rank: int) -> dict:
    """Results go to rank 0 and each rank gets its part of what rank 0 makes; failures go to both."""
    together, plans = Ranks(dist.new_group(backend="gloo")), []
    original = sharded._SavePlanner.create_global_plan
    sharded._SavePlanner.create_global_plan = lambda self, all_plans: plans.append(1) or original(self, all_plans)
    with tempfile.TemporaryDirectory() as place:
        sharded.write_sharded({"w": torch.arange(6.0)}, Path(together.scatter(lambda: [place] * 2)), together)
        dist.barrier()
    sharded._SavePlanner.create_global_plan = original
    return {
        "gathered": together.gather(lambda: f"of {rank}"),
        "scattered": together.scatter(lambda: ["first", "second"]),
        "failed": failure_of(lambda: together.scatter(full)),
        "plans": len(plans),
    }


def test_a_sharded_checkpoint_moves_between_meshes(tmp_path, ranks):
    """1x1 -> 2x1 -> 1x2 -> 1x1: each begins with the bits that the one before saved and goes on with its losses."""
    _, straight = fit(tmp_path / "straight", 18)
    folder = tmp_path / "checkpoints"
    _, losses = fit(folder, 9, form="sharded")
    first, second = ranks(two_processes, str(folder))
    saved = tensors(AtomicCheckpointIO().load_checkpoint(folder / "step-00000015"))
    start, last = fit(folder, 18)
    assert equal(start.tensors, saved) and not start.cut
    for found in (first, second):
        assert found["exact"] == found["cut"] == [True] * len(STAGES)
        assert found["part"]
    losses |= first["losses"] | last
    assert losses.keys() == straight.keys() == {1, 6, 11, 16}
    assert losses == pytest.approx(straight, rel=1e-4, abs=1e-5)

    sizes = first["files"]["step-00000015"]
    assert sizes.keys() == {".metadata", "__0_0.distcp", "__1_0.distcp", "state.pt"}
    assert 0.5 < sizes["__0_0.distcp"] / sizes["__1_0.distcp"] < 2  # both write their part
    assert first["files"]["step-00000013"].keys() == {"state.pt"}
    assert "rank 1: OSError: [Errno 28]" in first["failure"] and first["failure"].startswith("RuntimeError")
    assert second["failure"].startswith("OSError") and "No space left" in second["failure"]
    assert first["last"].startswith("OSError") and "No space left" in first["last"]
    assert "rank 0: OSError: [Errno 28]" in second["last"] and second["last"].startswith("RuntimeError")
    assert list((tmp_path / "full").iterdir()) == list((tmp_path / "last").iterdir()) == []
    for own, told in zip([*first["single"], first["snapshot"]], [*second["single"], second["snapshot"]], strict=True):
        assert own.startswith("OSError") and "No space left" in own
        assert told.startswith("RuntimeError") and "rank 0: OSError: [Errno 28]" in told

    for step in (12, 14):  # of two copies each writes its share
        sizes = first["files"][f"step-000000{step}"]
        assert 0.5 < sizes["__0_0.distcp"] / sizes["__1_0.distcp"] < 2
    assert first["mapped"] == second["mapped"] == [True, False, False]
    for asynchronous in (False, True):
        assert first["kept"][f"parts {asynchronous}"] == [32, 0, 0, 4]
        assert second["kept"][f"parts {asynchronous}"] == [0, 20, 16, 0]
        assert first["kept"][f"whole {asynchronous}"] == [32, 20, 16, 4, 8]
        assert second["kept"][f"whole {asynchronous}"] == [None] * 5
    assert first["kept"]["averages"] > 0 == second["kept"]["averages"]
    assert (first["group"]["gathered"], second["group"]["gathered"]) == (["of 0", "of 1"], [])
    assert (first["group"]["scattered"], second["group"]["scattered"]) == ("first", "second")
    assert first["group"]["failed"].startswith("OSError") and "rank 0: OSError" in second["group"]["failed"]
    assert (first["group"]["plans"], second["group"]["plans"]) == (1, 0)


@pytest.mark.parametrize("saved", FORMS)
@pytest.mark.parametrize("then", FORMS)
def test_either_form_loads_whatever_the_config_says(tmp_path, saved, then):
    fit(tmp_path / "whole", 8)
    fit(tmp_path / "parts", 4, form=saved)
    fit(tmp_path / "parts", 8, form=then)
    a, b = (AtomicCheckpointIO().load_checkpoint(tmp_path / run / "step-00000008") for run in ("whole", "parts"))
    assert read_marker(tmp_path / "parts/step-00000008")["form"] == then
    assert equal(tensors(a), tensors(b))
    assert a["t2i"]["counters"] == b["t2i"]["counters"] and a["ToyData"] == b["ToyData"]
    assert a["t2i"]["groups"]["generator"]["schedule"] == b["t2i"]["groups"]["generator"]["schedule"]
    assert a["t2i"]["frozen"] == b["t2i"]["frozen"] == {"scale": "toy:1"}


@pytest.mark.parametrize("form", FORMS)
def test_what_needs_the_weights_reads_no_optimizer_states(tmp_path, monkeypatch, form):
    """As an export and a merge do it."""
    fit(tmp_path / "checkpoints", 2, form=form)
    read, original = [], sharded._InFiles.into
    monkeypatch.setattr(sharded._InFiles, "into", lambda self, to: read.append(self.name) or original(self, to))
    method = Toy()
    folder, state = restore(method, tmp_path)
    weights = AtomicCheckpointIO().load_checkpoint(folder, whole=True)["state_dict"]
    kept = state["t2i"]["groups"]["critic"]["states"]["inside.weight"]["exp_avg"]
    assert equal(method.state_dict(), weights)
    assert isinstance(kept, Stored) == (form == "sharded") and state["t2i"]["counters"]["step"] == 2
    assert form == "single" or sum("t2i/" in name for name in read[: len(weights)]) == 0 < len(read)


# ---- what is read ----------------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, trap: Path):
        self.trap = str(trap)

    def __reduce__(self):
        return os.mkdir, (self.trap,)


def checkpoint(folder: Path) -> Path:
    """A sharded checkpoint of one process."""
    state = {"global_step": 3, "state_dict": {"w": torch.arange(6.0)}, "counters": [1, {"a": torch.tensor(2)}]}
    path = folder / "step-00000003"
    write_folder(path, 3, "sharded", lambda into: sharded.write_sharded(state, into, ALONE))
    return path


def mend(path: Path) -> None:
    """Writes the marker again, so that sizes are no protection."""
    marker = read_marker(path)
    marker["files"] = {name: (path / name).stat().st_size for name in marker["files"]}
    (path / "complete.json").write_text(json.dumps(marker))


def test_round_trip(tmp_path):
    found = AtomicCheckpointIO().load_checkpoint(checkpoint(tmp_path))
    assert torch.equal(found["state_dict"]["w"], torch.arange(6.0))
    assert found["counters"] == [1, {"a": torch.tensor(2)}] and found["global_step"] == 3


def metadata_of(path: Path):
    return sharded._Reader(path).read_metadata()


def poison_state(path: Path, trap: Path) -> None:
    torch.save({"global_step": 3, "x": Malicious(trap)}, path / "state.pt")


def poison_metadata(path: Path, trap: Path) -> None:
    metadata = metadata_of(path)
    metadata.planner_data = Malicious(trap)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def poison_payload(path: Path, trap: Path) -> None:
    """The entry of a tensor holds a pickle."""
    _rewrite_payload(path, trap, metadata_of(path))


def poison_bytes(path: Path, trap: Path) -> None:
    """The entry of a tensor is called one of bytes, which DCP unpickles."""
    metadata = metadata_of(path)
    metadata.state_dict_metadata["state_dict/w"] = BytesStorageMetadata()
    metadata.storage_data = {MetadataIndex("state_dict/w"): next(iter(metadata.storage_data.values()))}
    _rewrite_payload(path, trap, metadata)


def poison_marker(path: Path, trap: Path) -> None:
    (path / "complete.json").write_bytes(pickle.dumps(Malicious(trap)))


def _rewrite_payload(path: Path, trap: Path, metadata) -> None:
    file = path / "__0_0.distcp"
    torch.save(Malicious(trap), file)
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, file.stat().st_size
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    "poison", [poison_state, poison_metadata, poison_payload, poison_bytes, poison_marker], ids=lambda f: f.__name__
)
def test_no_file_of_a_sharded_checkpoint_can_run_code(tmp_path, poison):
    path, trap = checkpoint(tmp_path), tmp_path / "trap"
    poison(path, trap)
    if poison is not poison_marker:
        mend(path)
    with pytest.raises((pickle.UnpicklingError, ValueError)):
        AtomicCheckpointIO().load_checkpoint(path)
    assert not trap.exists()


def test_the_poison_works_where_nothing_forbids_it(tmp_path):
    """Else the test above would prove nothing: DCP's own reader falls for both."""
    for poison in (poison_metadata, poison_bytes):
        path, trap = checkpoint(tmp_path / poison.__name__), tmp_path / f"trap-{poison.__name__}"
        poison(path, trap)
        with pytest.warns(UserWarning, match="single process"):
            load({"state_dict/w": torch.empty(6)}, storage_reader=FileSystemReader(path))
        assert trap.exists(), poison.__name__


def test_a_file_outside_of_the_folder_is_not_read(tmp_path):
    path = checkpoint(tmp_path)
    metadata = metadata_of(path)
    for info in metadata.storage_data.values():
        info.relative_path = "../elsewhere.distcp"
    shutil.copy(path / "__0_0.distcp", tmp_path / "elsewhere.distcp")
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    mend(path)
    with pytest.raises(pickle.UnpicklingError, match="outside of its folder"):
        AtomicCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize("name", ["state.pt", ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("left", [0, 0.5])
def test_a_cut_file_makes_a_checkpoint_incomplete(tmp_path, name, left):
    path = checkpoint(tmp_path)
    assert newest(tmp_path) == path
    file = path / name
    file.write_bytes(file.read_bytes()[: int(left * file.stat().st_size)])
    assert newest(tmp_path) is None
    file.unlink()
    assert newest(tmp_path) is None
