"""Aspect-ratio buckets: sizes, the choice among them, and batches of one size for any ranks and workers."""

import math
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from data_sets import as_rank, write_data_set
from PIL import Image
from range_server import serving
from toy import trainer_for

from datamodules.buckets import BucketOrder, Buckets
from datamodules.image_text import ImageText, cut
from datamodules.index import main
from datamodules.order import GlobalOrder, keyed
from datamodules.rows import OUT
from datamodules.streams import Streams
from lightning_modules.diffusion import Diffusion
from lightning_t2i.errors import UserError

SHAPES = [(9, 8), (8, 9), (20, 10), (10, 20), (11, 11), (7, 30)]  # of pictures; the last is too narrow for its bucket
SIZES = Buckets(sizes=((8, 8), (16, 8), (8, 16)))


@pytest.fixture
def folder(tmp_path) -> str:
    return str(write_data_set(tmp_path / "toy", size=lambda i: SHAPES[i % 6] if i % 7 else (7, 30)))


def pictures(folder: str, **options) -> ImageText:
    return ImageText(folder, **{"buckets": SIZES, "batch_size": 6, "lanes": 8, "block": 10, **options})


def begun(stream: ImageText, shuffle: bool = True) -> ImageText:
    stream.setup()
    stream.begin(0, "main", shuffle)
    return stream


def batches(data: Streams, count: int) -> list:
    iterator = iter(data.train_dataloader())
    return [next(iterator)["main"] for _ in range(count)]


def test_sizes_of_an_area():
    known = {(1024, 1024), (1152, 896), (896, 1152), (1216, 832), (1344, 768), (1536, 640), (512, 2048), (2048, 512)}
    found = Buckets(side=1024, step=64, max_aspect=4.0).all  # SDXL's: 64 divides each, none has more than 1024^2
    assert known < set(found)
    assert all(w % 64 == h % 64 == 0 and (1 - 1 / 8) * 1024**2 < w * h <= 1024**2 for w, h in found)
    assert all(max(w, h) <= 4 * min(w, h) and (h, w) in found for w, h in found)
    assert list(found) == sorted(found, key=lambda size: size[0] / size[1])
    assert Buckets(side=512, max_aspect=1.0).all == ((512, 512),)
    assert Buckets(side=512).square_side == 512 and Buckets(sizes=[[96, 32], [32, 64]]).square_side == 64


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sizes": []}, "buckets.sizes"),
        ({"sizes": [[8]]}, "buckets.sizes"),
        ({"sizes": [[8, 0]]}, "buckets.sizes"),
        ({"sizes": [[8, i] for i in range(1, 256)]}, "buckets.sizes"),
        ({"side": 32, "step": 64}, "area"),
        ({"max_aspect": 0.5}, "area"),
        ({"max_upscale": 0}, "buckets.max_upscale"),
    ],
)
def test_sizes_without_a_meaning_are_refused(options, named):
    with pytest.raises(UserError, match=named):
        Buckets(**options)


@pytest.mark.parametrize(
    "buckets",
    [
        Buckets(side=512),
        Buckets(sizes=((64, 64), (512, 512), (256, 256), (600, 300), (300, 600))),
        Buckets(sizes=((256, 256), (512, 256)), max_upscale=1.5),
    ],
)
def test_the_bucket_of_a_picture(buckets):
    """Spelled out with logarithms."""
    width, height = np.random.default_rng(0).integers(0, 1200, (2, 500)).astype(np.int32)
    width[:2], height[:2] = (0, 700), (700, 0)
    for w, h, found in zip(width.tolist(), height.tolist(), buckets.of(width, height).tolist(), strict=True):
        chosen = None
        if w and h:
            nearest = min({a / b for a, b in buckets.all}, key=lambda aspect: abs(math.log(w / h) - math.log(aspect)))
            same = [(a, b) for a, b in buckets.all if a / b == nearest]
            chosen = max((s for s in same if max(s[0] / w, s[1] / h) <= buckets.max_upscale), default=None)
        assert (None if found == OUT else buckets.all[found]) == chosen


def test_batches_follow_the_definition():
    counts, size = [37, 0, 5, 11], 4
    firsts = np.cumsum([0, *counts])
    order = BucketOrder(firsts, size, "sha", 3, lanes=8, block=6)
    positions = np.arange(40 * size)
    found = order.rows(positions).reshape(-1, size)
    expected, turns = [], [0] * 4
    for epoch in range(100):
        shares = [(epoch + 1) * n // size - epoch * n // size for n in counts]
        for b in keyed(f"3\0buckets {epoch}\0sha").permutation(np.repeat(np.arange(4), shares)).tolist():
            own = GlobalOrder(counts[b], "sha", f"3/bucket {b}", max(1, 8 * counts[b] // 53), 6)
            expected.append((firsts[b] + own.rows(turns[b] * size + np.arange(size))).tolist())
            turns[b] += 1
    assert found.tolist() == expected[:40]
    other = BucketOrder(firsts, size, "sha", 3, lanes=8, block=6)  # asked in any grouping
    assert other.rows(positions[::-1]).tolist() == found.reshape(-1)[::-1].tolist()


@pytest.mark.parametrize("size", [4, 16])
def test_no_picture_is_dropped_and_none_is_read_oftener_than_others(size):
    """After any number of batches the readings within a bucket differ by one, between buckets by a batch and one."""
    counts = [37, 5, 1, 11]
    firsts = np.cumsum([0, *counts])
    order = BucketOrder(firsts, size, "sha", 0)
    read = np.zeros(54, int)
    for k in range(54 * 20 // size):
        rows = order.rows(np.arange(k * size, (k + 1) * size))
        np.add.at(read, rows, 1)
        assert len({int(np.searchsorted(firsts, row, "right")) for row in rows}) == 1
    for first, count in zip(firsts, counts, strict=False):
        own = read[first : first + count]
        assert own.max() - own.min() <= 1
        assert abs(own.mean() - 20) <= size / count + 1


def test_each_batch_has_one_size_and_its_pictures_are_cut_not_enlarged(folder, caplog):
    stream = begun(pictures(folder))
    kept = [i for i in range(50) if i % 6 < 5 and i % 7]
    assert f"{50 - len(kept)} pictures are left out" in caplog.text and len(stream) == len(kept)
    seen = Counter()
    for k in range(3 * len(kept) // 6):
        records = stream.load(np.arange(6 * k, 6 * k + 6), k)
        height, width = records.image.shape[2:]
        assert (width, height) in SIZES.all
        for label, image in zip(records.label.tolist(), records.image, strict=True):
            across, down = SHAPES[label % 6]
            assert (width > height, width < height) == (across > 1.4 * down, down > 1.4 * across)
            pixels = (image * 127.5 + 127.5).round()
            assert set(pixels[0].flatten().tolist()) == {label}
            if (across, down) == (9, 8):  # as high as the bucket: cut at the sides and not resized
                assert pixels[2, 0].tolist() == list(range(1, 9))
        seen.update(records.label.tolist())
    assert set(seen) == set(kept)


def test_a_cut_is_the_largest_of_its_shape():
    columns = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 40, 0).repeat(3, 2)
    image = Image.fromarray(columns)  # 64 x 40
    found = cut(image, (20, 20))  # the middle 40 x 40, columns 12 to 51, at half their size
    assert found.shape == (20, 20, 3) and np.abs(found[9, :, 0] - (12.5 + 2 * np.arange(20))).max() <= 1
    assert cut(image, (64, 32))[5, :, 0].tolist() == list(range(64))  # cut above and below
    assert cut(image, (20, 40), (0.0, 0.5))[0, :, 0].tolist() == list(range(20))
    assert cut(image, (20, 40), (1.0, 0.5))[0, :, 0].tolist() == list(range(44, 64))
    assert cut(image, (16, 10)).shape == (10, 16, 3)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 2)])
def test_ids_do_not_depend_on_ranks_or_workers_and_survive_resume(folder, world, workers):
    """tests/datamodules/test_killed_streams.py kills processes; here the cursor alone is looked at."""
    whole = batches(as_rank(Streams(pictures(folder))), 14)
    parts = []
    for rank in range(world):
        first = as_rank(Streams(pictures(folder), workers=workers), rank, world)
        found = batches(first, 7)
        first.trainer.lightning_module.counters.batches = 5
        second = as_rank(Streams(pictures(folder), workers=workers), rank, world, batches=5)
        second.load_state_dict(first.state_dict())
        parts.append(found[:5] + batches(second, 9))
    for k, of_ranks in enumerate(zip(*parts, strict=True)):
        assert list(chain(*(r.id.tolist() for r in of_ranks))) == whole[k].id.tolist()
        assert {r.image.shape[2:] for r in of_ranks} == {whole[k].image.shape[2:]}
    assert len({r.image.shape[2:] for r in whole}) == 3


def test_other_buckets_are_another_order_and_none_is_that_of_before(folder):
    plain, some = begun(pictures(folder, buckets=None)), begun(pictures(folder))
    assert "buckets" not in plain.identity and type(plain.order) is GlobalOrder
    state = as_rank(Streams(pictures(folder)), batches=2).state_dict()
    assert {type(value) for value in state["streams"]["main"].values()} == {str, int}
    others = Buckets(sizes=((8, 8), (16, 8)))
    with pytest.raises(UserError, match="'buckets' of the stream 'main'"):
        as_rank(Streams(pictures(folder, buckets=others))).load_state_dict(state)
    assert some.identity["rows"] != plain.identity["rows"]
    with pytest.raises(UserError, match="cached at one size"):
        pictures(folder, latents="vae")
    everything = begun(pictures(folder, buckets=Buckets(sizes=SIZES.sizes, max_upscale=1.2)))
    assert len(everything) == 50


@pytest.mark.parametrize("world", [1, 2])
def test_a_finite_pass_has_each_picture_once_and_batches_of_one_size(folder, world):
    stream = begun(pictures(folder), shuffle=False)
    passes = [stream.passes(rank, world) for rank in range(world)]
    labels = []
    for k, parts in enumerate(zip(*passes, strict=True)):
        loaded = [stream.load(part, k) for part in parts]
        assert len({r.image.shape[1:] for r in loaded}) == 1
        labels += [label for r in loaded for label in r.label.tolist()]
    assert sorted(labels) == sorted(stream.shards.rows.tolist())
    with pytest.raises(UserError, match=r"fewer pictures than[\s\S]*40 processes"):
        stream.passes(0, 40)


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_bad_picture_is_replaced_by_one_of_its_bucket(tmp_path, in_memory):
    folder = write_data_set(tmp_path / "toy", size=lambda i: (16, 8) if i % 2 else (8, 8))
    stream = begun(pictures(str(folder), in_memory=False))
    target = stream.shards.index["offset"][10]
    shard = stream.shards.index.shards[0]
    data = bytearray(shard.read_bytes())
    data[target : target + 8] = b"no image"
    shard.write_bytes(data)
    stream = begun(pictures(str(folder), in_memory=in_memory, max_bad_fraction=0.1))
    first = stream.shards.rows.tolist().index(10)
    stand_in = next(row for row in stream.order.block_rows(first) if row != first)
    seen = Counter()
    for k in range(40):
        records = stream.load(np.arange(6 * k, 6 * k + 6), k)
        seen.update(records.label.tolist())
        assert {label % 2 for label in records.label.tolist()} == {int(records.image.shape[3] == 16)}
    neighbour = int(stream.shards.rows[stand_in])
    assert seen[10] == 0 and seen[neighbour] > 1.5 * np.median(list(seen.values()))


def test_remote_buckets_read_no_byte_twice(tmp_path):
    local = write_data_set(tmp_path / "toy", size=lambda i: SHAPES[i % 5])
    with serving(local) as server:
        names = [f"{server.url}/{path.name}" for path in sorted(local.glob("*.tar"))]
        assert main([*names, "--out", str(tmp_path / "out"), "--name", "toy"]) == 0
        server.asked.clear()
        stream = begun(pictures(str(tmp_path / "out")))
        labels = [label for k in range(8) for label in stream.load(np.arange(6 * k, 6 * k + 6), k).label.tolist()]
        assert len(set(labels)) > 40 and stream.bad == {}
        ranges = sorted(server.asked)
        assert len(ranges) < len(labels)  # neighbours come together
        assert len(set(ranges)) == len(ranges)


@pytest.mark.parametrize("network", ["assets/tiny/sd", "assets/tiny/pixart"])
def test_a_diffusion_trains_on_buckets(tmp_path, network):
    """A convolutional network and one of patches: a step for each of two sizes."""
    sizes = Buckets(sizes=((32, 32), (64, 32)))
    folder = write_data_set(tmp_path / "toy", 12, size=lambda i: (70, 34) if i % 2 else (36, 36))
    main, val = (pictures(str(folder), buckets=sizes, batch_size=2) for _ in range(2))
    seen = []

    class Watched(Diffusion):
        def training_step(self, batch, index):
            super().training_step(batch, index)
            seen.append((tuple(batch["main"].image.shape[2:]), self.codec.latents(batch["main"]).shape[2:]))

    module = Watched(network)
    trainer_for(tmp_path, 4, max_epochs=-1, limit_val_batches=0).fit(module, Streams(main, val=val), weights_only=True)
    assert {shape for shape, _ in seen} == {(32, 32), (32, 64)} and len(seen) == 4
    assert {tuple(latent) for _, latent in seen} == {(8, 8), (8, 16)}
    assert all(torch.isfinite(p).all() for p in module.denoiser.parameters())
