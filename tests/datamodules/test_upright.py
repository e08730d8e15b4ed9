"""Pictures that Pillow gives otherwise than they were meant: turned by EXIF, of 16 bits, of kinds that break oddly."""

import io
import json

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile

from datamodules.buckets import Buckets
from datamodules.image_text import ImageText
from datamodules.pack import pack
from datamodules.pack_shards import read_picture
from datamodules.pictures import BadSample, decode
from datamodules.records import Shards
from datamodules.shards import picture_size


def exif(orientation: int) -> Image.Exif:
    facts = Image.Exif()
    facts[ExifTags.Base.Orientation] = orientation
    return facts


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def corners() -> Image.Image:
    """A picture of 32x16 whose quarters have four colours."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16, 0] = pixels[:8, 16:, 1] = pixels[8:, :16, 2] = 255
    return Image.fromarray(pixels)


# EXIF's number -> how a camera stored what it saw
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "avif"])
@pytest.mark.parametrize("orientation", STORED)
def test_pictures_stand_upright_and_their_sizes_say_so(kind, orientation):
    upright = corners()
    data = encoded(upright.transpose(STORED[orientation]), kind, exif=exif(orientation))
    assert picture_size(data) == decode(data).size == upright.size
    assert np.abs(np.asarray(decode(data), int) - np.asarray(upright, int)).mean() < 20  # of another turn 100
    kept = read_picture(data)
    assert not isinstance(kept, str) and picture_size(kept[0]) == upright.size
    assert np.array_equal(np.asarray(decode(kept[0])), np.asarray(decode(data)))  # turned once, not twice


def test_pictures_without_exif_keep_their_bits():
    data = encoded(corners(), "jpeg")
    assert np.array_equal(np.asarray(decode(data)), np.asarray(Image.open(io.BytesIO(data))))
    for facts in (b"no header of a TIFF", b"MM\0*"):
        broken = encoded(corners(), "png", exif=b"Exif\0\0" + facts)
        assert np.array_equal(np.asarray(decode(broken)), np.asarray(corners())) and picture_size(broken) == (32, 16)


def test_the_header_alone_tells_the_size(monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 400, 3), np.uint8))
    turned = [encoded(noise, kind, exif=exif(6))[:4096] for kind in ("jpeg", "png")]
    plain = encoded(noise, "png")  # without EXIF before the pixels Pillow looks behind them
    monkeypatch.setattr(PngImageFile, "load", lambda *_: pytest.fail("decodes for a size"))
    assert [picture_size(data) for data in turned] == [(200, 400)] * 2 and picture_size(plain) == (400, 200)


def test_buckets_are_those_of_the_upright_pictures(tmp_path):
    source = tmp_path / "set"
    source.mkdir()
    for i in range(4):
        noise = Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 32, 3), np.uint8))
        noise.save(source / f"{i}.jpg", exif=exif(6))
        (source / f"{i}.txt").write_text("tall")
    stream = ImageText(
        str(pack(source, tmp_path / "out", val=0, test=0)), batch_size=2, buckets=Buckets(sizes=[[16, 32], [32, 16]])
    )
    stream.setup()
    stream.begin(0, "main", shuffle=False)
    assert stream.load(range(2), 0).image.shape == (2, 3, 32, 16)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits_become_eight(kind):
    values = np.array([[0, 255, 256, 32768], [40000, 65280, 65534, 65535]], np.uint16)
    data = encoded(Image.fromarray(values), kind)
    assert np.array_equal(np.asarray(decode(data))[..., 0], values >> 8)
    kept = read_picture(data)
    assert kept[1] == "png" and np.array_equal(np.asarray(decode(kept[0]))[..., 1], values >> 8)
    if kind == "png":  # the pixels of one value may be transparent
        clear = encoded(Image.fromarray(values), kind, transparency=40000)
        assert np.asarray(decode(clear))[..., 2].tolist() == [[0, 0, 1, 128], [255, 255, 255, 255]]


def test_numbers_of_no_known_range_are_bad_samples():
    for values in (np.ones((2, 2), np.float32), np.full((2, 2), 1 << 20, np.int32)):
        data = encoded(Image.fromarray(values), "tiff")
        with pytest.raises(BadSample, match="black and white"):
            decode(data)
        assert "black and white" in read_picture(data)


@pytest.mark.filterwarnings("ignore::UserWarning")  # with which Pillow reads on
@pytest.mark.parametrize("kind", ["avif", "webp", "jpeg", "png", "tiff", "gif", "bmp", "jpeg2000", "ico", "tga", "dds"])
def test_bytes_that_are_broken_are_bad_samples_and_nothing_else(kind):
    """Not a RuntimeError as AVIF's decoder raises it, which ended the job."""
    whole, rng = encoded(corners(), kind), np.random.default_rng(0)
    for _ in range(60):
        data = np.frombuffer(whole, np.uint8).copy()
        places = rng.integers(0, len(data), rng.integers(1, 12))
        data[places] = rng.integers(0, 256, len(places))
        broken = data.tobytes()[: rng.integers(1, 2 * len(data))]
        width, height = picture_size(broken)
        assert min(width, height) >= 0
        try:
            assert decode(broken).mode == "RGB"
        except BadSample as reason:
            assert str(reason).startswith("picture: ")
        assert isinstance(read_picture(broken), str | tuple)


def test_phones_pictures_with_others_behind_them_are_kept(tmp_path):
    source = tmp_path / "set"
    source.mkdir()
    frames = [Image.new("RGB", (64, 64), (value, 0, 0)) for value in (200, 50)]
    data = encoded(frames[0], "mpo", save_all=True, append_images=frames[1:])
    (source / "a.jpg").write_bytes(data)
    (source / "a.txt").write_text("x")
    shards = Shards(pack(source, tmp_path / "out", val=0, test=0), "train")
    assert shards.index["ext"][0] == "jpg" and shards.data(0) == data
    for size in (None, 8):  # 8: decoded at a quarter
        assert abs(int(np.asarray(shards.picture(0, size))[0, 0, 0]) - 200) < 4


def test_every_ending_of_a_picture_is_seen(tmp_path):
    source = tmp_path / "set"
    source.mkdir()
    for name, kind in {"a.png": "png", "c.avif": "avif", "d.JFIF": "jpeg", "e.jp2": "jpeg2000"}.items():
        (source / name).write_bytes(encoded(corners(), kind))
    (source / "b.heic").write_bytes(b"of a phone")
    for name in "abcde":
        (source / f"{name}.txt").write_text("x")
    for name in ("lone.txt", "video.mpeg", "table.h5", "paper.pdf"):
        (source / name).write_text("x")
    (source / "folder.png").mkdir()
    with pytest.raises(ValueError, match="1: b.heic: unknown format"):
        pack(source, tmp_path / "out")
    out = pack(source, tmp_path / "out", skip_bad=True, val=0, test=0)
    assert sorted(Shards(out, "train").index["key"]) == ["a", "c", "d", "e"]
    report = json.loads((out / "report.json").read_text())["skipped"]
    assert {reason: of["names"] for reason, of in report.items()} == {
        "cannot be decoded": ["b.heic: unknown format"],
        "text beside no picture": ["lone.txt"],
    }
    (source / "b.heic").unlink()
    (source / "b.txt").unlink()
    pack(source, tmp_path / "again", val=0, test=0)  # a text alone is no reason to stop: it may be a README
