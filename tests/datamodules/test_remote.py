"""Remote shards: faults are waited out or named, never bad samples; caches keep their limits; ids do not change."""

import errno
import json
import multiprocessing
import os
import shutil
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from data_sets import as_rank, write_data_set
from filelock import FileLock
from range_server import serving

from datamodules import encode, remote
from datamodules.disk_cache import DiskCache
from datamodules.image_text import ImageText
from datamodules.index import main
from datamodules.prompts import Prompts
from datamodules.remote import RemoteOptions, fetch
from datamodules.retrieval import RetrievalDataModule
from datamodules.streams import Streams
from lightning_t2i.errors import UserError
from lightning_t2i.networks.codec import LatentCodec

QUICK = {"wait_s": 0.01}
STALLED = {"timeout_s": 1.0}  # only where the server stalls: elsewhere a slow machine would ask twice


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A server of 50 samples of 20 a shard, and the folder of their index."""
    base = tmp_path_factory.mktemp("remote")
    local = write_data_set(base / "toy", 50)
    with serving(local) as server:
        names = [f"{server.url}/{path.name}" for path in sorted(local.glob("*.tar"))]
        assert main([*names, "--out", str(base / "out"), "--name", "toy"]) == 0
        yield server, base / "out"


@pytest.fixture
def bucket(imported, tmp_path):
    """(server, folder of the index, the same data set locally), which a test may spoil."""
    server, out = imported
    whole = server.folder
    server.folder = Path(shutil.copytree(whole, tmp_path / "toy"))
    server.asked.clear()
    yield server, Path(shutil.copytree(out, tmp_path / "out")), server.folder
    server.folder, server.fault = whole, lambda *_: None


def pictures(folder, **options) -> ImageText:
    given = {**QUICK, **options.pop("remote", {})}
    return ImageText(str(folder), size=8, batch_size=6, lanes=8, block=10, remote=RemoteOptions(**given), **options)


def read(data: Streams, batches: int) -> list:
    iterator = iter(data.train_dataloader())
    return [next(iterator)["main"] for _ in range(batches)]


def same(stream: ImageText, batches: int = 9) -> bool:
    """Whether the pictures are those that their labels name, and no sample was bad."""
    found = read(as_rank(Streams(stream)), batches)
    red = torch.cat([r.image[:, 0, 0, 0] for r in found])
    labels = torch.cat([r.label for r in found])
    return stream.bad == {} and torch.equal((red * 127.5 + 127.5).round().long(), labels)


@pytest.mark.parametrize("fault", ["503", "reset", "stall"])
def test_faults_are_waited_out_and_are_no_bad_samples(bucket, fault):
    server, folder, _ = bucket
    server.fault = lambda path, start, before: fault if before < 2 else None
    assert same(pictures(folder, remote=STALLED if fault == "stall" else {}))
    counts = {server.asked.count(asked) for asked in set(server.asked)}
    assert counts == {3} if fault != "stall" else min(counts) >= 3  # nothing that came is asked for again


@pytest.mark.parametrize(("fault", "says"), [("503", "ClientResponseError"), ("stall", "TimeoutError")])
def test_a_server_that_stays_away_is_named_with_the_attempts(bucket, fault, says):
    server, folder, _ = bucket
    server.fault = lambda path, *_: fault if "000001" in path else None
    with pytest.raises(UserError, match=rf"{server.url}/train-000001.tar[\s\S]*3 attempts[\s\S]*{says}"):
        read(as_rank(Streams(pictures(folder, remote={"retries": 2, **(STALLED if fault == "stall" else {})}))), 9)


def test_a_missing_shard_is_named_at_once(bucket):
    server, folder, local = bucket
    (local / "train-000002.tar").unlink()
    with pytest.raises(UserError, match=r"no such remote file[\s\S]*train-000002.tar"):
        read(as_rank(Streams(pictures(folder))), 9)
    assert sum("000002" in path for path, *_ in server.asked) == 1


def test_cut_shards_and_broken_pictures_are_bad_samples(bucket):
    _, folder, local = bucket
    path = local / "train-000002.tar"
    path.write_bytes(path.read_bytes()[: 9 * 2048 + 100])  # the last of ten samples is cut
    data = (local / "train-000000.tar").read_bytes()
    (local / "train-000000.tar").write_bytes(data[:512] + b"no picture" + data[522:])
    stream = pictures(folder, max_bad_fraction=0.1)
    read(as_rank(Streams(stream)), 9)
    assert sorted(stream.bad) == ["train-000000.tar:k0000", "train-000002.tar:k0049"]


def test_only_the_pieces_that_broke_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PIECE", 1000)
    (tmp_path / "x.tar").write_bytes(bytes(range(250)) * 16)
    with serving(tmp_path) as server:
        server.fault = lambda path, start, before: "reset" if start == 2010 and not before else None
        ranges = [(f"{server.url}/x.tar", 10, 3500), (f"{server.url}/x.tar", 3900, 5000)]
        whole = (tmp_path / "x.tar").read_bytes()
        found = fetch(ranges, RemoteOptions(**QUICK))
        assert found == [whole[10:3500], whole[3900:5000]]  # the second ends with the file
        assert [server.asked.count(("/x.tar", a, a + 1000)) for a in (10, 1010, 2010)] == [1, 1, 2]


def test_a_server_without_ranges_is_refused(bucket):
    server, folder, _ = bucket
    server.fault = lambda *_: "whole"
    with pytest.raises(UserError, match="sends the whole file"):
        read(as_rank(Streams(pictures(folder))), 1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_ids_are_those_of_any_ranks_and_workers_and_survive_resume(bucket, workers, world):
    """As in test_streams.py, with a server that fails now and then; the second run reads what a killed one left."""
    server, folder, _ = bucket
    whole = [r.id.tolist() for r in read(as_rank(Streams(pictures(folder))), 14)]
    server.fault = lambda path, start, before: "503" if before == 0 and start % 3 == 0 else None
    cache = {"cache": str(folder / "cache")}
    parts = []
    for rank in range(world):
        first = as_rank(Streams(pictures(folder, remote=cache), workers=workers), rank, world)
        ids = [r.id.tolist() for r in read(first, 7)]
        first.trainer.lightning_module.counters.batches = 5
        second = as_rank(Streams(pictures(folder, remote=cache), workers=workers), rank, world, batches=5)
        second.load_state_dict(first.state_dict())
        parts.append(ids[:5] + [r.id.tolist() for r in read(second, 9)])
    assert [list(chain(*batch)) for batch in zip(*parts, strict=True)] == whole


def test_neighbours_are_read_together_and_kept(bucket):
    server, folder, local = bucket
    stream = pictures(folder)
    assert same(stream)
    assert len(server.asked) == len(set(server.asked)) == 5  # blocks of 10 rows, each in one shard
    assert 0 < stream.shards.extents.held <= sum(path.stat().st_size for path in local.glob("*.tar"))


def test_each_option_changes_what_is_read(bucket, caplog):
    server, folder, _ = bucket

    def asked(**options) -> int:
        server.asked.clear()
        assert same(pictures(folder, remote=options))
        return len(server.asked)

    assert asked(read_mb=0.005) > asked(read_mb=4) == 5
    assert not caplog.records
    assert asked(memory_mb=0.02) > 50  # a request for each sample of more than an epoch
    assert "each sample is a request of its own" in caplog.text
    assert asked(cache=str(folder / "c")) == 5 and asked(cache=str(folder / "c")) == 0
    assert asked(cache=str(folder / "d"), cache_gb=2e-5) > 50
    assert sum(p.stat().st_size for p in (folder / "d").glob("??/*")) <= 2e4


def begun(stream):
    stream.setup()
    stream.begin(0, "main")
    return stream


def test_prompts_read_captions_alone_and_keep_them(bucket):
    server, folder, local = bucket
    server.fault = lambda path, start, before: "503" if before == 0 else None
    options = {"where": {"label": [10, 39]}, "lanes": 1, "block": 10}
    cache = RemoteOptions(cache=str(folder / "cache"), read_mb=1e-6, **QUICK)  # a member at a time
    stream = begun(Prompts(str(folder), remote=cache, **options))
    records = stream.load(range(60), 0)
    assert set(records.label.tolist()) == set(range(10, 40)) and stream.bad == {}
    index = stream.prompts.index
    ends = dict(zip(index["json_offset"].tolist(), (index["json_offset"] + index["json_size"]).tolist(), strict=True))
    assert {(start, end) for _, start, end in server.asked} <= set(ends.items())  # no byte of a picture
    assert all(c.split()[0] == str(n) for c, n in zip(records.caption, records.label.tolist(), strict=True))
    server.asked.clear()
    again = begun(Prompts(str(folder), remote=cache, **options)).load(range(60), 0)
    assert again.caption == records.caption and server.asked == []
    (local / "train-000001.tar").unlink()
    with pytest.raises(UserError, match="no such remote file"):
        begun(Prompts(str(folder), remote=RemoteOptions(**QUICK))).load(range(50), 0)


def test_too_many_bad_prompts_are_an_error(bucket):
    _, folder, local = bucket
    path = local / "train-000002.tar"
    path.write_bytes(path.read_bytes()[: 9 * 2048 + 100])
    stream = begun(Prompts(str(folder), remote=RemoteOptions(**QUICK)))
    stream.load(range(50), 0)
    with pytest.raises(UserError, match="1 bad of 50"):
        stream.report(stream.take_fresh())


def test_a_retrieval_set_is_read_remotely(bucket):
    server, folder, _ = bucket
    cache = {"cache": str(folder / "cache"), **QUICK}
    options = {"size": 8, "remote": cache, "max_bad_fraction": 0.02}  # as a config says it
    server.fault = lambda path, start, before: "reset" if before == 0 else None
    data = RetrievalDataModule(str(folder), 6, splits=["train"] * 3, options=options)
    batch = next(iter(as_rank(data).train_dataloader()))["main"]
    assert batch.captions == [[f"{label} a", f"{label} b"] for label in batch.label.tolist()]
    assert data.training["main"].max_bad_fraction == 0.02 and list((folder / "cache").glob("??/*"))


def test_latents_of_remote_pictures(bucket, monkeypatch, capsys):
    server, folder, local = bucket
    seen = []

    class Codec(torch.nn.Module):
        vae = SimpleNamespace(config={})

        def encode(self, images):
            seen.append(images)
            return images[:, :1, :2, :2]

    monkeypatch.setattr(LatentCodec, "from_pretrained", lambda *_: Codec())
    server.fault = lambda path, start, before: "503" if before == 0 else None
    arguments = ["encode", "--vae", "assets/tiny/vae", "--source", str(folder), "--size", "8"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--wait_s", "0.01", "--cache", str(folder / "cache")])
    assert encode.main() == 0
    assert len(server.asked) == 2 * 3 and list((folder / "cache").glob("??/*"))  # a shard at a time, each asked twice
    red = torch.cat([images[:, 0, 0, 0] for images in seen])
    assert torch.equal((red * 127.5 + 127.5).round(), torch.arange(50.0))
    (target,) = folder.glob("latents-*")
    shutil.rmtree(target)
    shutil.rmtree(folder / "cache")
    path = local / "train-000002.tar"
    path.write_bytes(path.read_bytes()[: 8 * 2048 + 100])  # the last two of ten samples are cut
    assert encode.main() == 2
    assert "2 bad of 50" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--max_bad_fraction", "0.05"])
    assert encode.main() == 0
    assert capsys.readouterr().out.strip() == str(target)


@pytest.mark.parametrize("option", ["cache_gb", "memory_mb", "read_mb", "wait_s", "timeout_s", "retries"])
def test_options_without_a_meaning_are_refused(option):
    with pytest.raises(UserError, match=f"remote.{option}"):
        RemoteOptions(**{option: -1})


def test_waits_grow_and_have_a_limit(tmp_path, monkeypatch):
    waits = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(remote.asyncio, "sleep", sleep)
    (tmp_path / "x.tar").write_bytes(b"x")
    with serving(tmp_path) as server:
        server.fault = lambda path, start, before: "503" if before < 8 else None
        assert fetch([(f"{server.url}/x.tar", 0, 1)], RemoteOptions(wait_s=1, retries=8)) == [b"x"]
    ours = [w for w in waits if w > 0]
    assert len(ours) == 8
    assert all(0.5 * min(2**k, 30) <= wait <= min(2**k, 30) for k, wait in enumerate(ours))


def test_the_cache_removes_what_was_not_used_for_longest(tmp_path):
    cache = DiskCache(tmp_path, 1000)
    for i, name in enumerate("abc"):
        cache.write(name, bytes(300))
        os.utime(cache._path(name), (i, i))
    assert cache.read("a", 300, 10, 5) == bytes(5)  # used: now the youngest
    cache.write("d", bytes(300))
    assert [cache.has(name, 300) for name in "abcd"] == [True, False, True, True]
    assert sum(path.stat().st_size for path in tmp_path.glob("??/*")) <= 1000
    cache.write("e", bytes(1001))
    assert not cache.has("e", 1001)
    assert cache.read("a", 299, 0, 1) is None  # not the size that was written


def test_a_full_disk_is_done_without(tmp_path, monkeypatch, caplog):
    cache = DiskCache(tmp_path, 1000)

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    cache.write("a", b"x")
    cache.write("b", b"x")
    assert not cache.has("a", 1)
    assert caplog.text.count("takes no more") == 1
    assert [path.name for path in tmp_path.glob("??/*")] == []


def fill(folder: str, start: int) -> None:
    cache = DiskCache(folder, 20_000)
    for i in range(start, start + 60):
        name, data = str(i % 90), bytes([i % 90]) * 1000
        found = cache.read(name, 1000, 0, 1000)
        assert found is None or found == data
        cache.write(name, data)
        with FileLock(cache.lock):
            assert sum(path.stat().st_size for path in Path(folder).glob("??/*")) <= 20_000


def test_several_processes_share_a_cache_and_its_limit(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(str(tmp_path), 30 * i)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]


def test_s3(tmp_path, monkeypatch):
    """Against moto's server, where it is installed; the `test` extra leaves it out, which brings 30 packages."""
    pytest.importorskip("s3fs")
    pytest.importorskip("flask")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", f"http://{host}:{port}")
        import fsspec

        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        fsspec.config.set_conf_env(fsspec.config.conf)
        system = fsspec.filesystem("s3")
        system.mkdir("bucket")
        local = write_data_set(tmp_path / "toy", 50)
        system.put([str(path) for path in local.glob("*.tar")], "bucket/toy/")
        assert main(["s3://bucket/toy/", "--out", str(tmp_path / "out"), "--name", "toy"]) == 0
        names = json.loads((tmp_path / "out" / "report-train.json").read_text())
        assert list(names) == [f"s3://bucket/toy/train-00000{i}.tar" for i in range(3)]
        assert same(pictures(tmp_path / "out"))
    finally:
        server.stop()
