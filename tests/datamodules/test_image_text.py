"""Pictures and captions: read at the right place, chosen by position, replaced when bad."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.bad_samples import Reads
from datamodules.image_text import ImageText
from datamodules.pictures import square
from datamodules.records import sample_id
from lightning_t2i.errors import UserError


def begun(stream: ImageText, seed: int = 0, shuffle: bool = True) -> ImageText:
    stream.prepare()
    stream.setup()
    stream.begin(seed, "main", shuffle)
    return stream


def expected(i: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    return torch.stack([torch.full((8, 8), float(i)), rows, columns]) / 127.5 - 1


@pytest.mark.parametrize("in_memory", [False, True])
def test_each_sample_has_its_own_picture_caption_label_scene_and_id(make_data_set, in_memory):
    stream = begun(ImageText(str(make_data_set()), size=8, in_memory=in_memory))
    records = stream.load(np.arange(50), 3)
    rows = stream.order.rows(np.arange(50))
    assert sorted(records.label.tolist()) == list(range(50))
    assert records.label.tolist() == rows.tolist()
    for i, row in enumerate(rows):
        torch.testing.assert_close(records.image[i], expected(row))
        assert records.caption[i] in {f"{row} a", f"{row} b"}
        assert records.scene[i] == {"row": row}
        assert records.id[i] == sample_id("toy", "train", f"k{row:04d}")
    assert records.cursor == 4
    assert records.position.tolist() == list(range(50))
    assert records.image.dtype == torch.float32


def test_ids_are_the_first_eight_bytes_of_blake2b():
    # python -c "import hashlib; print(hashlib.blake2b(b'toy/train/k0000').hexdigest()[:16])"
    assert sample_id("toy", "train", "k0000").to_bytes(8, "little", signed=True).hex() == "292567f3b4e5ab97"


def test_draws_depend_on_seed_and_position_only(make_data_set):
    folder = str(make_data_set(width=20))
    options = {"size": 8, "crop": "random", "flip": True, "languages": ["en", "zh"]}
    stream = begun(ImageText(folder, **options))
    whole = stream.load(np.arange(40), 0)
    pieces = [stream.load(np.arange(start, start + 8), 0) for start in (32, 0, 24, 8, 16)]
    order = torch.cat([piece.position for piece in pieces]).argsort()
    assert torch.equal(torch.cat([piece.image for piece in pieces])[order], whole.image)
    captions = [caption for piece in pieces for caption in piece.caption]
    assert [captions[i] for i in order] == whole.caption
    assert begun(ImageText(folder, **options), seed=1).load(np.arange(40), 0).caption != whole.caption


def test_a_sample_changes_between_epochs(make_data_set):
    stream = begun(ImageText(str(make_data_set(n=4)), size=8, languages=["en", "zh"]))
    captions = stream.load(np.arange(400), 0).caption
    assert len(set(captions)) == 12  # each of the three captions of each sample turns up
    counts = [sum(c.endswith(end) for c in captions) / 400 for end in ("a", "b", "中")]
    assert all(abs(count - 1 / 3) < 0.08 for count in counts)


def test_languages_choose_captions_and_filter_samples(make_data_set):
    def captions(i):
        return {"en": [f"{i}"]} if i % 2 else {"en": [f"{i}"], "zh": [f"{i} 中"]}

    folder = str(make_data_set(captions=captions))
    stream = begun(ImageText(folder, size=8, languages=["zh"]))
    assert len(stream) == 25
    records = stream.load(np.arange(25), 0)
    assert sorted(records.label.tolist()) == list(range(0, 50, 2))
    assert all(caption.endswith("中") for caption in records.caption)
    english = begun(ImageText(folder, size=8))
    assert english.identity != stream.identity
    assert english.identity["data"] == stream.identity["data"]
    with pytest.raises(UserError, match="languages"):
        begun(ImageText(folder, languages=["fr"]))


def test_limit_keeps_the_first_samples(make_data_set):
    stream = begun(ImageText(str(make_data_set()), size=8, limit=7))
    assert sorted(stream.load(np.arange(7), 0).label.tolist()) == list(range(7))


def test_centre_crop_and_random_crop(make_data_set):
    folder = str(make_data_set(width=20))
    centre = begun(ImageText(folder, size=8)).load(np.arange(10), 0).image
    left = ((centre[:, 2, 0, 0] + 1) * 127.5).round()
    assert left.tolist() == [6.0] * 10
    random = begun(ImageText(folder, size=8, crop="random")).load(np.arange(200), 0).image
    left = ((random[:, 2, 0, 0] + 1) * 127.5).round()
    assert left.min() == 0
    assert left.max() == 12
    torch.testing.assert_close(random[:, 2, 0, 7] - random[:, 2, 0, 0], torch.full((200,), 7 / 127.5))


def test_flip_mirrors_about_half(make_data_set):
    stream = begun(ImageText(str(make_data_set()), size=8, flip=True))
    records = stream.load(np.arange(400), 0)
    mirrored = 0
    for image, row in zip(records.image, records.label.tolist(), strict=True):
        flipped = bool(image[2, 0, 0] > image[2, 0, 7])
        mirrored += flipped
        torch.testing.assert_close(image.flip(-1) if flipped else image, expected(row))
    assert 150 < mirrored < 250


def test_square_resizes_the_shorter_side():
    image = Image.fromarray(np.repeat(np.arange(64, dtype=np.uint8)[None, :, None] * 2, 32, 0).repeat(3, 2))
    pixels = square(image, 16)
    assert pixels.shape == (16, 16, 3)
    # 64 x 32 shrinks to 32 x 16, columns 8 to 24 remain; column c covers columns 2c and 2c + 1, of values 4c and 4c + 2
    assert np.abs(pixels[8, :, 0] - (4.0 * np.arange(8, 24) + 1)).max() <= 1
    assert square(image.resize((9, 9)), 16).shape == (16, 16, 3)


def test_transparent_pixels_become_white(make_data_set, tmp_path):
    stream = begun(ImageText(str(make_data_set(n=1)), size=8))
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    stream.shards._read = lambda *_: (tmp_path / "clear.png").read_bytes()
    assert np.asarray(stream.shards.picture(0)).min() == 255


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_bad_sample_is_replaced_by_the_next_of_its_block(make_data_set, caplog, in_memory):
    good, broken = make_data_set(name="good"), make_data_set(name="broken", bad=(5, 9, 31))
    options = {"size": 8, "block": 10, "max_bad_fraction": 0.1, "in_memory": in_memory}
    stream = begun(ImageText(str(broken), **options))
    reference = begun(ImageText(str(good), **options), shuffle=False).load(np.arange(50), 0).image
    records = stream.load(np.arange(50), 0)
    rows = stream.order.rows(np.arange(50))
    stand_in = {5: 6, 9: 0, 31: 32}  # 9 is the last of its block, the block starts at 0
    assert records.label.tolist() == [stand_in.get(row, row) for row in rows]
    assert torch.equal(records.image, reference[records.label])
    assert records.id.tolist() == [sample_id("broken", "train", f"k{i:04d}") for i in records.label.tolist()]
    assert records.position.tolist() == list(range(50))
    stream.report(stream.take_fresh())
    assert sorted(stream.bad) == ["train-000000.tar:k0005", "train-000000.tar:k0009", "train-000001.tar:k0031"]
    assert "k0031 replaced: picture" in caplog.text
    assert stream.take_fresh() == Reads() and (stream.reads.read, stream.reads.replaced) == (50, 3)


def test_too_many_bad_samples_are_an_error(make_data_set):
    stream = begun(ImageText(str(make_data_set(bad=(1, 2))), size=8, max_bad_fraction=0.02))
    stream.load(np.arange(50), 0)
    with pytest.raises(UserError, match="2 bad of 50"):
        stream.report(stream.take_fresh())


def test_a_block_without_a_good_sample_is_an_error(make_data_set):
    stream = begun(ImageText(str(make_data_set(bad=range(10, 20))), size=8, block=10, max_bad_fraction=1.0))
    with pytest.raises(UserError, match="Every sample of a block is bad"):
        stream.load(np.arange(50), 0)


def test_a_shard_that_was_cut_off_gives_bad_samples(make_data_set):
    folder = make_data_set()
    shard = sorted(folder.glob("train-*.tar"))[-1]
    stream = begun(ImageText(str(folder), size=8, max_bad_fraction=1.0))
    last = int(stream.shards.index["offset"][49])
    os.truncate(shard, last + 10)
    stream.load(np.arange(50), 0)
    assert {name.split(":")[1]: reason[:14] for name, reason in stream.take_fresh().bad.items()} == {
        "k0049": "the shard ends"
    }


def test_opened_shards_do_not_travel_to_another_process(make_data_set):
    stream = begun(ImageText(str(make_data_set()), size=8))
    before = stream.load(np.arange(10), 0)
    assert stream.shards._files
    copy = pickle.loads(pickle.dumps(stream))
    assert not copy.shards._files
    assert torch.equal(copy.load(np.arange(10), 0).image, before.image)


def test_user_errors_name_what_is_wrong(make_data_set, tmp_path):
    folder = make_data_set()
    with pytest.raises(UserError, match=r"train"):
        begun(ImageText(str(folder), split="trian"))
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError, match=r"datamodules\.pack"):
        begun(ImageText(str(tmp_path / "pictures")))
    with pytest.raises(UserError, match="in_memory keeps one crop"):
        ImageText(str(folder), crop="random", in_memory=True)
    for options in (
        {"latents": "vae", "crop": "random"},
        {"latents": "vae", "crops": 2},
        {"crop": "random", "crops": 2},
    ):
        with pytest.raises(UserError, match="so many random crops"):
            ImageText(str(folder), **options)
    Path(sorted(folder.glob("train-*.tar"))[1]).unlink()
    with pytest.raises(UserError, match="train-000001"):
        begun(ImageText(str(folder)))


def test_a_large_jpeg_is_decoded_small_and_hardly_differs(make_data_set):
    stream = begun(ImageText(str(make_data_set(n=1)), size=32))
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((320, 240), Image.Resampling.BICUBIC).save(file, "jpeg", quality=95)
    stream.shards._read = lambda *_: file.getvalue()
    whole, half = stream.shards.picture(0), stream.shards.picture(0, 32)
    assert whole.size == (320, 240)
    assert half.size == (160, 120)
    assert stream.shards.picture(0, 64).size == whole.size  # 240 is less than four times 64
    difference = square(whole, 32).astype(int) - square(half, 32)
    assert np.abs(difference).max() <= 8
    assert np.abs(difference).mean() < 1


def test_resizing_agrees_with_pillow():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    for size in (20, 90):
        theirs = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(square(Image.fromarray(pixels), size) - theirs).max() <= 2
