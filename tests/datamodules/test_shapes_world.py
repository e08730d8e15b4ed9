"""The shapes world: its scenes, captions, pictures and splits, checked against independent readings of them."""

import io
import json
import math
import re
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from PIL import Image

from datamodules import worlds
from datamodules.shards import Index
from datamodules.worlds.draws import Draws
from datamodules.worlds.shapes import TRAIN_TASKS, Parameters, label, retrieval_scenes, scene, scenes
from datamodules.worlds.shapes_captions import captions
from datamodules.worlds.shapes_draw import BACKGROUNDS, COLOURS, SHAPES, coverage, png, render
from datamodules.worlds.shapes_scenes import HELD_OUT, SIZES, TASKS, fulfils, relations
from lightning_t2i.errors import UserError

SPLITS = ("train", "val", "test", "retrieval")
SMALL = Parameters(train=1200, val=240, test=240, retrieval=120)


@pytest.fixture(scope="module")
def all_scenes():
    return {split: list(scenes(SMALL, split)) for split in SPLITS}


# ---- draws ---------------------------------------------------------------------------------------------------------


def test_draws_depend_on_their_key_alone_and_stay_as_they_are():
    draws = Draws("a", 1)
    first = [draws.below(1000) for _ in range(5)]
    assert first == [948, 492, 922, 816, 435]
    again = Draws("a", 1)
    Draws("b").below(10)
    assert [again.below(1000) for _ in range(5)] == first
    assert [Draws("a", 2).below(1000) for _ in range(5)] != first


def test_draws_are_uniform():
    draws = Draws("uniform")
    counts = np.bincount([draws.below(7) for _ in range(7000)], minlength=7)
    assert np.square(counts - 1000).sum() / 1000 < 22.5  # chi-square, 6 degrees of freedom, p = 0.001
    assert len({tuple(draws.sample("abc", 3)) for _ in range(200)}) == 6


# ---- scenes --------------------------------------------------------------------------------------------------------


def test_scene_is_the_same_whatever_the_sizes_of_splits(all_scenes):
    assert scene(0, "train", 1000) == all_scenes["train"][1000]
    assert scene(1, "train", 1000) != all_scenes["train"][1000]
    assert scene(0, "val", 3) != scene(0, "test", 3)


def test_objects_lie_apart_in_the_picture_and_in_their_cells(all_scenes):
    for found in chain(*all_scenes.values()):
        assert 1 <= len(found["objects"]) <= 3
        taken = np.zeros((32, 32), int)
        for item in found["objects"]:
            x0, y0, x1, y1 = item["box"]
            assert x1 - x0 == y1 - y0 == SIZES[item["size"]]
            assert min(x0, y0) >= 1 and max(x1, y1) <= 31
            middle = ((y0 + y1) / 2, (x0 + x1) / 2)
            assert [int(np.argmin([abs(m - c) for c in (5.5, 16, 26.5)])) for m in middle] == item["cell"]
            taken[y0 - 1 : y1 + 1, x0 - 1 : x1 + 1] += 1  # a gap of two: the boxes grown by one never overlap
        assert taken.max() == 1


def test_tasks_ask_for_what_geneval_asks(all_scenes):
    for found in chain(*all_scenes.values()):
        asked = Counter({(ask["shape"], ask["colour"]): ask["count"] for ask in found["ask"]})
        kinds = len(found["ask"])
        expected = {
            "single_object": (1, 1), "colors": (1, 1), "two_object": (2, 2), "position": (2, 2), "color_attr": (2, 2),
        }  # fmt: skip
        if found["task"] == "counting":
            assert kinds == 1 and asked.total() in (2, 3)
        else:
            assert (kinds, asked.total()) == expected[found["task"]]
        assert len(found["objects"]) == asked.total()
        assert all((ask["colour"] is not None) == (found["task"] in ("colors", "color_attr")) for ask in found["ask"])
        assert (found["relation"] is not None) == (found["task"] == "position")
        shapes, colours = ({o[name] for o in found["objects"]} for name in ("shape", "colour"))
        assert len(shapes) == len(colours) == kinds  # two things differ in both


def test_every_scene_shows_what_it_asks_for(all_scenes):
    for found in chain(*all_scenes.values()):
        assert fulfils([{**o, "area": 1} for o in found["objects"]], found)


def test_relation_is_that_of_the_axis_with_a_margin(all_scenes):
    steps = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    seen = Counter()
    for found in all_scenes["train"] + all_scenes["test"]:
        if found["relation"]:
            a, b = (np.array(o["box"]).reshape(2, 2).mean(0) for o in found["objects"])
            angle = np.degrees(np.arccos((a - b) @ np.array(steps[found["relation"]]) / np.linalg.norm(a - b)))
            assert angle <= 27 and np.linalg.norm(a - b) >= 9
            seen[found["relation"]] += 1
    assert len(seen) == 4 and min(seen.values()) > 0.15 * seen.total()


def test_held_out_pairs_are_in_test_prompts_alone(all_scenes):
    assert len({shape for shape, _ in HELD_OUT}) == len({colour for _, colour in HELD_OUT}) == len(HELD_OUT) == 4
    for split, found in all_scenes.items():
        shown = {(o["shape"], o["colour"]) for s in found for o in s["objects"]}
        assert shown & set(HELD_OUT) == (set(HELD_OUT) if split == "test" else set())
        if split == "train":
            assert len(shown) == 28
    for found in all_scenes["test"]:
        assert found["held_out"] == any((ask["shape"], ask["colour"]) in HELD_OUT for ask in found["ask"])
    flags = Counter(s["held_out"] for s in all_scenes["test"] if s["task"] in ("colors", "color_attr"))
    assert flags == {True: 20, False: 60}


def test_prompts_are_balanced_and_training_follows_its_weights(all_scenes):
    for split in ("val", "test"):
        assert Counter(s["task"] for s in all_scenes[split][:60]) == dict.fromkeys(TASKS, 10)
    counts = Counter(s["task"] for s in all_scenes["train"])
    for task, weight in TRAIN_TASKS.items():
        share = weight / sum(TRAIN_TASKS.values())
        assert abs(counts[task] / 1200 - share) < 4 * math.sqrt(share * (1 - share) / 1200)


def test_retrieval_captions_are_of_one_picture_only():
    found = list(retrieval_scenes(0, 500))
    texts = [captions(s, "full") for s in found]
    for language in ("en", "zh"):
        flat = [text for sample in texts for text in sample[language]]
        assert len(flat) == len(set(flat)) > 500
    things = Counter((s["background"], *sorted((o["shape"], o["colour"]) for o in s["objects"])) for s in found)
    assert max(things.values()) == 1


def test_label_is_the_pair_of_the_first_object():
    first = {"objects": [{"shape": "square", "colour": "blue"}, {"shape": "circle", "colour": "red"}]}
    assert label(first) == 8 * 1 + 2


# ---- relations and tasks, closed forms -----------------------------------------------------------------------------


def box(x: float, y: float, side: float = 10) -> list[float]:
    return [x - side / 2, y - side / 2, x + side / 2, y + side / 2]


@pytest.mark.parametrize(
    ("angle", "expected"),
    [(0, {"right of"}), (29, {"right of"}), (90, {"below"}), (180, {"left of"}), (270, {"above"}),
     (45, {"right of", "below"}), (225, {"left of", "above"})],
)  # fmt: skip
def test_relations_by_angle(angle, expected):
    # far enough that the slack of two pixels hardly turns the angle
    a = box(1000 * math.cos(math.radians(angle)), 1000 * math.sin(math.radians(angle)))
    assert set(relations(a, box(0, 0))) == expected


def test_relations_need_more_than_a_tenth_of_the_sides():
    assert relations(box(2, 0), box(0, 0)) == []
    assert relations(box(5, 0), box(0, 0)) == ["right of"]
    assert relations(box(0, 0), box(0, 0)) == []


def thing(shape: str, colour: str, x: float = 5, y: float = 5, area: float = 50) -> dict:
    return {"shape": shape, "colour": colour, "box": box(x, y), "area": area}


def asks(task: str, *kinds: tuple, relation: str | None = None) -> dict:
    return {
        "task": task,
        "ask": [dict(zip(("shape", "colour", "count"), k, strict=True)) for k in kinds],
        "relation": relation,
    }


def test_fulfils_each_task():
    red, blue, square = thing("circle", "red"), thing("circle", "blue", 25), thing("square", "red", 16, 25)
    single = asks("single_object", ("circle", None, 1))
    assert fulfils([blue], single) and fulfils([blue, square, red], single) and not fulfils([square], single)
    two = asks("counting", ("circle", None, 2))
    assert fulfils([red, blue, square], two)
    assert not fulfils([red], two) and not fulfils([red, blue, thing("circle", "pink", 16)], two)
    assert fulfils([red, square], asks("colors", ("circle", "red", 1)))
    assert not fulfils([blue, square], asks("colors", ("circle", "red", 1)))
    attributes = asks("color_attr", ("circle", "blue", 1), ("square", "red", 1))
    assert fulfils([blue, square], attributes)
    assert not fulfils([red, thing("square", "blue")], attributes)  # colours swapped
    left = asks("position", ("circle", None, 1), ("square", None, 1), relation="left of")
    assert fulfils([red, thing("square", "red", 25)], left) and not fulfils([blue, thing("square", "red", 5)], left)
    assert not fulfils([red, square], left)  # above, rather
    # the larger circle decides
    assert not fulfils([red, thing("circle", "red", 30, 5, area=80), thing("square", "red", 18)], left)
    assert not fulfils([], two)


# ---- captions ------------------------------------------------------------------------------------------------------

THING = re.compile(
    r"(a|an|two|three) (?:(red|green|blue|yellow|orange|purple|cyan|pink) )?(circle|square|triangle|cross)(s|es)?"
)


def read_english(text: str) -> tuple[list[tuple], str, str | None]:
    """Things, relation or "and", background of an English caption."""
    text, _, ground = text.partition(" on a ")
    link = re.search(r" (left of|right of|above|below|and) ", text)
    things = []
    for part in text.split(link[0]) if link else [text]:
        number, colour, shape, plural = THING.fullmatch(part).groups()
        count = {"a": 1, "an": 1, "two": 2, "three": 3}[number]
        assert (number == "an") == (count == 1 and colour == "orange")
        assert plural == (None if count == 1 else "es" if shape == "cross" else "s")
        things.append((shape, colour, count))
    return things, link[1] if link else "and", ground.removesuffix(" background") or None


def read_chinese(text: str) -> tuple[list[tuple], str, str | None]:
    """The same of a Chinese one."""
    colours = dict(zip("红绿蓝黄橙紫青粉", COLOURS, strict=True))
    shapes = {"圆": "circle", "正方": "square", "三角": "triangle", "十字": "cross"}
    sides = {"左": "left of", "右": "right of", "上": "above", "下": "below"}
    grounds = {"白": "white", "灰": "grey", "黑": "black"}
    text, _, ground = text.partition("，")
    found = re.findall(r"(一|两|三)个(?:(.)色的)?(圆|正方|三角|十字)形", text)
    things = [(shapes[s], colours.get(c), "一两三".index(n) + 1) for n, c, s in found]
    relation = re.search(r"在.*的(.)边$", text)
    assert relation or ("和" in text) == (len(things) == 2)
    return things, sides[relation[1]] if relation else "and", grounds[ground[0]] if ground else None


INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", "and": "and"}


@pytest.mark.parametrize("split", SPLITS)
def test_captions_tell_the_truth_and_at_least_what_is_asked(all_scenes, split):
    kind = {"train": "train", "retrieval": "full"}.get(split, "prompt")
    for found in all_scenes[split]:
        texts = captions(found, kind)
        assert set(texts) == {"en", "zh"} and len(texts["en"]) == len(texts["zh"])
        shown = Counter((o["shape"], o["colour"]) for o in found["objects"])
        for language, read in (("en", read_english), ("zh", read_chinese)):
            assert len(set(texts[language])) == len(texts[language])
            for text in texts[language]:
                things, link, ground = read(text)
                assert ground in (None, found["background"])
                order = [ask["shape"] for ask in found["ask"]]
                link = link if [s for s, _, _ in things] == order else INVERSE[link]
                assert link == (found["relation"] or "and")
                for shape, colour, count in things:
                    fit = sum(n for (s, c), n in shown.items() if s == shape and colour in (None, c))
                    assert fit == count
                told = {s: (c, n) for s, c, n in things}
                for ask in found["ask"]:
                    colour, count = told[ask["shape"]]
                    assert count == ask["count"] and (ask["colour"] is None or colour == ask["colour"])
                if kind == "prompt":  # no more than what is asked: colours unasked would be scored for nothing
                    assert ground is None and {c for _, c, _ in things} == {ask["colour"] for ask in found["ask"]}


def test_captions_have_at_most_thirty_tokens(all_scenes):
    for found in chain(*all_scenes.values()):
        for kind in ("prompt", "train", "full"):
            texts = captions(found, kind)
            assert max(len(text.split()) for text in texts["en"]) <= 30
            assert max(map(len, texts["zh"])) <= 30


def test_training_scenes_have_several_captions(all_scenes):
    assert all(len(captions(s, "train")["en"]) >= 2 for s in all_scenes["train"])


# ---- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES.values())
@pytest.mark.parametrize(
    ("shape", "share"), [("circle", math.pi / 4), ("square", 1), ("triangle", 1 / 2), ("cross", 5 / 9)]
)
def test_coverage_is_the_area_of_the_shape(shape, share, size):
    assert coverage(shape, size).sum() / 64 == pytest.approx(share * size**2, rel=0.015)


def test_render_has_flat_insides_and_mixed_edges():
    item = {"shape": "circle", "colour": "red", "box": [4, 6, 16, 18]}
    picture = render({"background": "white", "objects": [item]})
    assert tuple(picture[0, 0]) == BACKGROUNDS["white"]
    assert tuple(picture[12, 10]) == COLOURS["red"]
    share = coverage("circle", 12)[0, 3] / 64
    assert 0 < share < 1
    mixed = np.array(BACKGROUNDS["white"]) * (1 - share) + np.array(COLOURS["red"]) * share
    assert np.abs(picture[6, 7] - mixed).max() <= 0.5


def test_palette_is_far_apart():
    colours = np.array([*COLOURS.values(), *BACKGROUNDS.values()], float)
    distances = np.linalg.norm(colours[:, None] - colours, axis=-1)[~np.eye(len(colours), dtype=bool)]
    assert distances.min() > 90
    assert len(SHAPES) == 4 and len(COLOURS) == 8


def test_png_decodes_to_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 24, 3)).astype(np.uint8)
    image = Image.open(io.BytesIO(png(pixels)))
    assert image.mode == "RGB" and (np.asarray(image) == pixels).all()


# ---- the data set on disk ------------------------------------------------------------------------------------------


def test_ensure_writes_the_world_once_with_golden_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_T2I_DATA", str(tmp_path))
    folder = worlds.ensure("shapes")
    about = json.loads((folder / "dataset.json").read_text())
    assert about["splits"] == {"train": 20_000, "val": 1000, "test": 1000, "retrieval": 500}
    assert about["sha256"] == "8cc0c4937f38c10fdcde88fade452853b25c86ba89b75fce19f87a43f2ed749a"
    stamp = (folder / "dataset.json").stat().st_mtime_ns
    assert worlds.ensure("shapes") == folder and (folder / "dataset.json").stat().st_mtime_ns == stamp
    index = Index.load(folder, "train")
    assert len(index) == 20_000 and len(index.shards) == 20
    i = 4321
    with index.shards[index["shard"][i]].open("rb") as file:
        file.seek(index["offset"][i])
        picture = np.asarray(Image.open(io.BytesIO(file.read(index["size"][i]))))
        file.seek(index["json_offset"][i])
        meta = json.loads(file.read(index["json_size"][i]))
    assert meta["scene"] == scene(0, "train", i) and meta["caption"] == captions(meta["scene"], "train")
    assert (picture == render(meta["scene"])).all()
    assert index["task"][i] == meta["scene"]["task"] and index["objects"][i] == len(meta["scene"]["objects"])
    assert Index.load(folder, "test")["held_out"].sum() > 50


def test_parameters_make_another_folder_and_other_scenes(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_T2I_DATA", str(tmp_path))
    small = {"train": 10, "val": 0, "test": 6, "retrieval": 4}
    one, two = worlds.ensure("shapes", **small), worlds.ensure("shapes", seed=1, **small)
    assert one != two
    assert sorted(p.name for p in one.glob("*.parquet")) == [
        f"index-{s}.parquet" for s in ("retrieval", "test", "train")
    ]
    assert Index.load(one, "train").sha != Index.load(two, "train").sha


def test_ensure_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_T2I_DATA", str(tmp_path))
    with pytest.raises(UserError, match="did you mean shapes"):
        worlds.ensure("shape")
    with pytest.raises(UserError, match="did you mean train"):
        worlds.ensure("shapes", trian=5)
    assert list(tmp_path.iterdir()) == []
