"""Rewards: attributes by hand, the detector, CLIP scores, scorers over a pipe, functions by name."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.worlds.shapes_scenes import COLOURS, SHAPES
from lightning_t2i.batch import Records
from lightning_t2i.caching import rewards
from lightning_t2i.caching.rewards import FLOOR, Attributes, ClipReward, Custom, Detector, PickScore, Piped
from lightning_t2i.errors import UserError
from lightning_t2i.networks.classifier import Scores

WORKER = Path(rewards.__file__).with_name("scorer_worker.py")
CPU = torch.device("cpu")


def scene(task: str, *asks: tuple[str, str | None, int]) -> dict[str, Any]:
    return {"task": task, "ask": [{"shape": s, "colour": c, "count": n} for s, c, n in asks], "relation": None}


def records(n: int = 2, **fields: Any) -> Records:
    return Records(torch.arange(n), torch.arange(n), **fields)


class Fixed:
    """A network that is sure of a red circle in cell 4, of emptiness elsewhere, and of one object."""

    def classify(self, images: torch.Tensor) -> Scores:
        shape = torch.full((len(images), 9, len(SHAPES) + 1), -50.0)
        colour = torch.full((len(images), 9, len(COLOURS) + 1), -50.0)
        shape[..., 0] = colour[..., 0] = 50.0
        shape[:, 4, 0] = colour[:, 4, 0] = -50.0
        shape[:, 4, 1 + list(SHAPES).index("circle")] = colour[:, 4, 1 + list(COLOURS).index("red")] = 50.0
        count = torch.full((len(images), 4), -50.0)
        count[:, 1] = 50.0
        return Scores(shape, colour, count)


def test_attributes_are_mean_log_probabilities() -> None:
    reward = Attributes()
    reward.network = Fixed()
    floor = math.log(FLOOR)
    scenes = [
        scene("single_object", ("circle", None, 1)),
        scene("color_attr", ("circle", "red", 1), ("square", "blue", 1)),
        scene("counting", ("circle", None, 2)),
    ]
    found = reward(torch.zeros(3, 3, 32, 32), records(3, scene=scenes))
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([0.0, floor / 2, floor / 2], abs=1e-6)
    with pytest.raises(UserError, match="scenes of the shapes world"):
        reward(torch.zeros(2, 3, 32, 32), records())


def test_the_shipped_classifier_tells_a_true_picture_from_an_empty_one() -> None:
    from datamodules.prompts import Prompts

    stream = Prompts("shapes", "val", batch_size=8, limit=8)
    stream.prepare()
    stream.setup()
    stream.begin(0, "val", shuffle=False)
    found = stream.load(range(8), 0)
    from datamodules.image_text import ImageText

    pictures = ImageText("shapes", "val", batch_size=8, limit=8)
    pictures.prepare()
    pictures.setup()
    pictures.begin(0, "val", shuffle=False)
    images = pictures.load(range(8), 0).image
    attributes, detector = Attributes(), Detector()
    attributes.setup(CPU)
    detector.setup(CPU)
    assert attributes.identity.startswith("sha256:") and detector.identity == "Detector"
    empty = torch.ones_like(images)
    assert attributes(images, found).mean() > -0.1 > -2 > attributes(empty, found).mean()
    assert detector(images, found).tolist() == [1.0] * 8 and detector(empty, found).sum() == 0


def test_clip_rewards_are_scaled_cosines() -> None:
    plain, pick = ClipReward("assets/tiny/clip"), PickScore("assets/tiny/clip")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    some = records(caption=["a red circle", "a blue square"])
    for reward in (plain, pick):
        reward.setup(CPU)
    a, b = plain(images, some), pick(images, some)
    cosine = (plain.encoder.encode_image(images) * plain.encoder.encode_text(some.caption)).sum(-1).double()
    scale = float(pick.encoder.network.logit_scale.exp())
    assert torch.allclose(a, 100 * cosine, atol=1e-4) and torch.allclose(b, scale * cosine, atol=1e-4)
    assert PickScore().folder == "yuvalkirstain/PickScore_v1" and plain.identity.startswith("sha256:")


def test_a_scorer_in_another_interpreter() -> None:
    reward = Piped([sys.executable, str(WORKER), "brightness"])
    reward.setup(CPU)
    images = torch.stack([torch.full((3, 4, 4), value) for value in (-1.0, 0.0, 1.0)])
    some = records(3, caption=["a", "b", "c"])
    for _ in range(2):  # it stays
        assert reward(images, some).tolist() == pytest.approx([0.0, 128 / 255, 1.0])
    reward.close()
    assert reward.process.returncode == 0 and "brightness" in reward.identity


FAKE = """
import json, sys
head = json.loads(sys.stdin.buffer.readline())
sys.stdin.buffer.read(1)
print(json.dumps({answer}), flush=True)
sys.stdin.buffer.read()
"""


@pytest.mark.parametrize(
    ("answer", "match"), [('{"scores": [1.0]}', "a score for each"), ('{"error": "no weights"}', "no weights")]
)
def test_a_scorer_that_fails_is_told(tmp_path: Path, answer: str, match: str) -> None:
    script = tmp_path / "fake.py"
    script.write_text(FAKE.replace("{answer}", answer))
    reward = Piped([sys.executable, str(script)])
    reward.setup(CPU)
    with pytest.raises(UserError, match=match):
        reward(torch.zeros(2, 3, 4, 4), records(caption=["a", "b"]))
    reward.close()


def test_scorers_that_do_not_start_or_end_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no scorer"):
        Piped([])
    with pytest.raises(UserError, match="does not start"):
        Piped([str(tmp_path / "none")]).setup(CPU)
    script = tmp_path / "ends.py"
    script.write_text("")
    reward = Piped([sys.executable, str(script)])
    reward.setup(CPU)
    reward.process.wait()
    with pytest.raises(UserError, match="The scorer failed"):
        reward(torch.zeros(1, 3, 4, 4), records(1, caption=["a"]))
    reward.close()


@pytest.mark.parametrize(
    ("visible", "index", "seen"), [(None, 3, "3"), ("4,5, 6", 2, "6"), ("GPU-a,GPU-b", 1, "GPU-b"), ("", 1, "1")]
)
def test_a_scorer_sees_the_gpu_of_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, index: int, seen: str
) -> None:
    script = tmp_path / "fake.py"
    script.write_text(FAKE.replace("{answer}", '{"error": __import__("os").environ["CUDA_VISIBLE_DEVICES"] + "."}'))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    reward = Piped([sys.executable, str(script)])
    reward.setup(torch.device("cuda", index))
    with pytest.raises(UserError, match=f"The scorer failed: {seen}\\."):
        reward(torch.zeros(1, 3, 4, 4), records(1, caption=["a"]))
    reward.close()


def test_equal_commands_share_a_process() -> None:
    command = [sys.executable, str(WORKER), "brightness"]
    reward, judge, elsewhere = (Piped(command) for _ in range(3))
    for scorer, device in ((reward, CPU), (judge, CPU), (elsewhere, torch.device("cuda", 0))):
        scorer.setup(device)
    assert judge.process is reward.process is not elsewhere.process
    some = records(1, caption=["a"])
    assert reward(torch.ones(1, 3, 4, 4), some) == judge(torch.ones(1, 3, 4, 4), some) == 1
    judge.close()
    elsewhere.close()
    reward.setup(CPU)
    assert reward.process is not judge.process
    reward.close()


PACKAGE = """
calls = 0
def score(pictures, prompt, hps_version):
    global calls
    calls += 1
    return [100 * calls + 10 * len(prompt) + picture.getpixel((0, 0))[0] / 255 for picture in pictures]
"""


def test_hpsv2_is_called_once_for_each_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its calls reads the weights; scores come back in the order of the pictures."""
    (tmp_path / "hpsv2.py").write_text(PACKAGE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    reward = Piped([sys.executable, str(WORKER), "hpsv2"])
    reward.setup(CPU)
    images = torch.tensor([-1.0, -1.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    assert reward(images, records(3, caption=["a", "two", "a"])).tolist() == [110, 230, 111]
    reward.close()


def brightness(images: torch.Tensor, some: Records) -> torch.Tensor:
    return images.mean((1, 2, 3))


def wrong(images: torch.Tensor, some: Records) -> torch.Tensor:
    return images.mean()


def test_any_function_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "my_rewards", sys.modules[__name__])
    reward = Custom("my_rewards.brightness")
    reward.setup(CPU)
    assert reward(torch.ones(2, 3, 4, 4), records()).tolist() == [1.0, 1.0] and reward.identity.endswith("brightness")
    reward = Custom("my_rewards.wrong")
    reward.setup(CPU)
    with pytest.raises(UserError, match="one number for each"):
        reward(torch.ones(2, 3, 4, 4), records())
    for name in ("my_rewards.none", "nowhere.f", "plain"):
        with pytest.raises(UserError, match="No such function"):
            Custom(name).setup(CPU)
    assert np.isfinite(FLOOR)
