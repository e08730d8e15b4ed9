"""The detector is exact on true scenes and fooled by nothing else; the score is GenEval's, on any number of ranks."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from datamodules.worlds.shapes import Parameters, scenes
from datamodules.worlds.shapes_draw import BACKGROUNDS, COLOURS, SHAPES, render
from datamodules.worlds.shapes_scenes import TASKS
from lightning_t2i.errors import UserError
from lightning_t2i.metrics.shapes_detector import backgrounds, detect, satisfied, to_pixels
from lightning_t2i.metrics.shapes_score import ShapesScore

N = 600


@pytest.fixture(scope="module")
def truth() -> tuple[list[dict], torch.Tensor]:
    """Test scenes, held-out pairs among them, with their pictures."""
    found = list(scenes(Parameters(test=N), "test"))
    return found, to_images([render(scene) for scene in found])


def to_images(pictures) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def content(objects: list[dict]) -> list[tuple]:
    return sorted((o["shape"], o["colour"], *o["box"]) for o in objects)


def scored(images: torch.Tensor, found: list[dict], **options) -> dict[str, float]:
    metric = ShapesScore(**options)
    metric.update(images, found)
    return {name: float(value) for name, value in metric.compute().items()}


# ---- detector ------------------------------------------------------------------------------------------------------


def test_accuracy_on_ground_truth_is_at_least_99_percent_in_every_task(truth):
    scores = scored(truth[1], truth[0])
    assert set(scores) == {"overall", "overall_low", "overall_high", "held_out", *TASKS}
    assert min(scores.values()) >= 0.99


def test_detector_finds_shapes_colours_and_boxes_exactly(truth):
    right = [content(detect(p)) == content(s["objects"]) for p, s in zip(to_pixels(truth[1]), truth[0], strict=True)]
    assert np.mean(right) >= 0.99


def test_backgrounds_are_found(truth):
    noisy = truth[1] + 0.1 * torch.randn(truth[1].shape, generator=torch.Generator().manual_seed(0))
    names = [list(BACKGROUNDS)[i] for i in backgrounds(noisy)]
    assert names == [scene["background"] for scene in truth[0]] and set(names) == set(BACKGROUNDS)


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_colour_size_and_background(shape, background):
    for colour in COLOURS:
        for side in (9, 12):
            item = {"shape": shape, "colour": colour, "box": [7, 8, 7 + side, 8 + side]}
            (found,) = detect(render({"background": background, "objects": [item]}))
            assert content([found]) == content([item]) and found["match"] > 0.99


def test_detector_bears_noise_and_blur(truth):
    found, images = truth[0][:300], truth[1][:300]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * 16 / 127.5
    assert satisfied(images + noise, found).mean() >= 0.99
    blurred = torch.from_numpy(gaussian_filter(images.numpy(), (0, 0, 0.7, 0.7)))
    assert satisfied(blurred, found).mean() >= 0.99


def test_pictures_without_objects_have_none():
    generator = torch.Generator().manual_seed(0)
    for level in (-1.0, -0.3, 0.0, 0.5, 1.0):
        assert detect(to_pixels(torch.full((1, 3, 32, 32), level))[0]) == []
    for colour in COLOURS.values():  # nothing but one colour is no square
        assert detect(np.broadcast_to(np.array(colour, np.uint8), (32, 32, 3))) == []
    for pixels in to_pixels(torch.rand(20, 3, 32, 32, generator=generator) * 2 - 1):
        assert detect(pixels) == []


def test_what_is_no_shape_is_no_object():
    picture = np.full((32, 32, 3), 250, np.uint8)
    picture[14:18, 2:30] = COLOURS["red"]  # a bar
    assert detect(picture) == []
    picture[14:18, 2:30] = 250
    picture[10:22, 10:22] = (150, 255, 0)  # a square of no colour that has a name
    assert detect(picture) == []
    picture[10:22, 10:22] = (115, 115, 115)  # the colour of a background
    assert detect(picture) == []


def test_objects_are_sorted_by_size_and_boxes_say_where():
    small = {"shape": "circle", "colour": "blue", "box": [2, 3, 11, 12]}
    large = {"shape": "circle", "colour": "blue", "box": [18, 17, 30, 29]}
    found = detect(render({"background": "grey", "objects": [small, large]}))
    assert [o["box"] for o in found] == [large["box"], small["box"]]
    assert found[0]["area"] == pytest.approx(math.pi * 36, rel=0.02)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\[B, 3, 32, 32\]"):
        satisfied(torch.zeros(1, 3, 16, 16), [{}])
    assert to_pixels(torch.tensor([-3.0, 3.0]).view(2, 1, 1, 1).expand(2, 3, 32, 32))[:, 0, 0, 0].tolist() == [0, 255]


# ---- score ---------------------------------------------------------------------------------------------------------


def edited(scene: dict, **changes) -> torch.Tensor:
    """The scene's picture with its first object changed."""
    first = {**scene["objects"][0], **changes}
    return to_images([render({**scene, "objects": [first, *scene["objects"][1:]]})])


def test_each_task_notices_its_own_mistake(truth):
    for task in TASKS:
        found = [scene for scene in truth[0] if scene["task"] == task][:20]
        for scene in found:
            shape, colour = scene["objects"][0]["shape"], scene["objects"][0]["colour"]
            other_shape = next(s for s in SHAPES if s not in {o["shape"] for o in scene["objects"]})
            other_colour = next(c for c in COLOURS if c not in {o["colour"] for o in scene["objects"]})
            assert satisfied(edited(scene, shape=shape), [scene])[0]
            assert not satisfied(edited(scene, shape=other_shape), [scene])[0]
            names_colours = task in ("colors", "color_attr")
            assert satisfied(edited(scene, colour=other_colour), [scene])[0] != names_colours, (colour, other_colour)
            mirrored = edited(scene).flip(-1 if scene["relation"] in ("left of", "right of") else -2)
            if task == "position":
                assert not satisfied(mirrored, [scene])[0]
            if task == "counting":
                fewer = to_images([render({**scene, "objects": scene["objects"][1:]})])
                assert not satisfied(fewer, [scene])[0]


def test_overall_is_the_mean_of_tasks_whatever_their_numbers(truth):
    found, images = truth
    task = torch.tensor([TASKS.index(scene["task"]) for scene in found])
    blank = torch.ones(1, 3, 32, 32)
    chosen = [*(task == 0).nonzero()[:8, 0].tolist(), *(task == 3).nonzero()[:2, 0].tolist()]
    pictures = torch.cat([images[chosen[:2]], blank.expand(6, -1, -1, -1), images[chosen[8:]]])
    scores = scored(pictures, [found[i] for i in chosen])
    assert scores["single_object"] == 0.25 and scores["colors"] == 1.0
    assert scores["overall"] == 0.625  # not 4 / 10
    assert "counting" not in scores and "held_out" not in scores


def test_held_out_prompts_are_scored_apart_too(truth):
    found, images = truth
    held_out = torch.tensor([scene["held_out"] for scene in found])
    scores = scored(torch.where(held_out.view(-1, 1, 1, 1), torch.ones(()), images), found)
    assert scores["held_out"] == 0
    assert scores["colors"] == pytest.approx(0.75) and scores["color_attr"] == pytest.approx(0.75)
    assert scores["single_object"] == 1


def test_interval_is_that_of_independent_outcomes(truth):
    found, images = truth
    wrong = torch.arange(N) % 10 >= 6  # tasks take turns by six: each has the share 0.6 within one picture
    scores = scored(torch.where(wrong.view(-1, 1, 1, 1), torch.ones(()), images), found)
    assert scores["overall"] == pytest.approx(0.6, abs=0.01)
    half = 1.96 * math.sqrt(0.6 * 0.4 / N)
    assert scores["overall_high"] - scores["overall"] == pytest.approx(half, rel=0.1)
    assert scores["overall"] - scores["overall_low"] == pytest.approx(half, rel=0.1)
    assert scored(images, found)["overall_low"] == 1.0  # no doubt left where nothing varies
    again = scored(torch.where(wrong.view(-1, 1, 1, 1), torch.ones(()), images), found)
    assert again == scores  # the bootstrap is keyed


def test_name_reset_and_empty(truth):
    metric = ShapesScore(resamples=10)
    with pytest.warns(UserWarning, match="before"), pytest.raises(UserError, match="no picture"):
        metric.compute()
    metric.update(truth[1][:7], truth[0][:7])
    metric.update(truth[1][7:12], truth[0][7:12])
    assert metric.name == "shapes_score@n=12"
    metric.compute()
    metric.reset()
    assert metric.name == "shapes_score@n=0"
    metric.update(truth[1][:1], truth[0][:1])
    assert float(metric.compute()["overall"]) == 1


def test_pictures_and_scenes_come_in_equal_numbers(truth):
    with pytest.raises(ValueError):
        ShapesScore().update(truth[1][:2], truth[0][:3])


def shapes_score_of_rank(rank: int, world: int = 2) -> dict:
    found = list(scenes(Parameters(test=60), "test"))
    images = to_images([render(scene) for scene in found])
    images[::4] = 1.0  # a quarter blank
    metric = ShapesScore(resamples=200)
    part = slice(0, 20) if rank == 0 and world == 2 else slice(20, 60) if world == 2 else slice(0, 60)
    metric.update(images[part], found[part])
    scores = {name: float(value) for name, value in metric.compute().items()}
    return {**scores, "n": int(metric.name.split("=")[1])}


def test_two_ranks_with_unequal_shares_equal_one(ranks):
    one = shapes_score_of_rank(0, world=1)
    assert 0 < one["overall"] < 1 and one["n"] == 60
    assert ranks(shapes_score_of_rank) == [one, one]
