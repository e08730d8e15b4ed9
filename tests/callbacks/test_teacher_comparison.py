"""Student and teacher side by side: the same prompts and noise for all; what is not possible is said at the start."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mean import Mean
from PIL import Image
from tiny_networks import pipeline_folder
from torch import Tensor

from callbacks.teacher_comparison import ComparisonOptions, TeacherComparison, arms
from lightning_modules.dmd import DMD
from lightning_t2i.batch import Cond, Records
from lightning_t2i.cli import runs
from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.metrics import scorers
from lightning_t2i.metrics.scorers import Scorer, ScorerOptions
from lightning_t2i.networks.codec import LatentCodec
from lightning_t2i.networks.denoiser import Predictor
from lightning_t2i.pictures import to_pil
from lightning_t2i.processes import RectifiedFlow, sample
from lightning_t2i.protocols import Distils
from lightning_t2i.state_io import AtomicCheckpointIO
from lightning_t2i.strategies import FSDP2

SHAPE = (3, 8, 8)
TITLES = ["teacher, 3 steps", "teacher, 1 step", "student, 1 step"]


class Shade(Predictor):
    """A denoiser to which noise, condition and time matter."""

    def __init__(self) -> None:
        super().__init__(RectifiedFlow(), "x0")

    def predict(self, x_t: Tensor, t: Any, cond: Cond | None = None) -> Tensor:
        assert cond is not None and cond.label is not None
        shade = cond.label.view(-1, 1, 1, 1) / 64 * torch.as_tensor(t).view(-1, 1, 1, 1)
        return (0.3 * x_t + shade).float()


def distiller(painter: Any, student: str = "teacher") -> Any:
    """A method with a teacher; its student is what the teacher makes in one step, or its negative."""

    class Distiller(painter):
        shape, guidance, val_steps = SHAPE, 2.0, 3

        def configure_model(self) -> None:
            super().configure_model()
            self.add_frozen("teacher", Shade(), "closed form")
            self.add_frozen("codec", LatentCodec.from_pretrained(None), "none")

        def condition(self, records: Records) -> Cond:
            return Cond(label=super().condition(records).label, null_label=0)

        def sample(self, cond: Cond, keys: Keys, positions: Tensor) -> Tensor:
            assert not self.brush.training and not torch.is_grad_enabled()
            self.sampled.append((self.counters.step, positions.tolist()))
            z = keys.normal("z", positions, SHAPE)
            x = sample(self.teacher, z, cond, 1, self.guidance).clamp(-1, 1)
            return x if student == "teacher" else -x

    return Distiller()


@pytest.fixture(autouse=True)
def _mean_is_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scorers.SCORERS, "mean", lambda options, name: Scorer(Mean()))


def compared(studio, method: Any = None, data: Any = None, steps: int = 1, logger: Any = None, **options: Any) -> dict:
    """What `comparison.json` holds after a training."""
    callback = TeacherComparison(ComparisonOptions(**{"enabled": True, "metrics": ["mean"], "n": 8, **options}))
    studio.trainer(callback, steps=steps, logger=logger).fit(
        method or distiller(studio.Painter), data or studio.Easel()
    )
    return json.loads((studio.folder / "comparison.json").read_text())


def picture(folder: Path) -> Image.Image:
    with Image.open(folder / "comparison.png") as image:
        image.load()
        return image


def column(image: Image.Image, number: int, rows: int) -> np.ndarray:
    """The pictures of a column, in their own size: pictures of 128 pixels with 8 between them, right to left."""
    canvas = np.asarray(image)
    left, top = canvas.shape[1] - (3 - number) * 136, canvas.shape[0] - rows * 136
    return np.stack([canvas[top + r * 136 :, left:][:128, :128][::16, ::16] for r in range(rows)])


def test_all_arms_have_the_same_prompts_and_noise(studio) -> None:
    method = distiller(studio.Painter)
    found = compared(studio, method, steps=2, count=3)
    assert list(found["arms"]) == TITLES and found["step"] == 2 and found["data"] == "val"
    image = picture(studio.folder)
    assert image.text["titles"].split("\n") == TITLES and image.text["prompts"].split("\n") == studio.prompts[:3]
    full, few, student = (column(image, k, 3) for k in range(3))
    assert np.array_equal(few, student)  # in these closed forms the student is the teacher with one step
    assert np.abs(full.astype(int) - few).mean() > 5
    # The pictures are those of these prompts, noises and steps.
    records = Records.of_prompts(studio.prompts[:3])
    z = method.keys.fork("comparison").normal("z", records.position, SHAPE)
    expected = to_pil(sample(method.teacher, z, method.condition(records), 3, 2.0))
    assert np.array_equal(full, np.stack([np.asarray(p) for p in expected]))
    assert method.sampled == [(2, [0, 1, 2, 3]), (2, [4, 5, 6, 7])]  # nothing is drawn twice


def test_numbers_are_those_of_each_arm_and_are_logged_once(studio) -> None:
    notebook, method = studio.Notebook(), distiller(studio.Painter, "negative")
    found = compared(studio, method, steps=3, logger=notebook)["arms"]
    values = {title: arm["mean@n=8"] for title, arm in found.items()}
    assert values["student, 1 step"] == pytest.approx(-values["teacher, 1 step"], rel=1e-5)
    records = studio.Easel().records(torch.arange(8))
    z, cond = method.keys.fork("comparison").normal("z", records.position, SHAPE), method.condition(records)
    mean = sample(method.teacher, z, cond, 3, 2.0).clamp(-1, 1).mean()
    assert values["teacher, 3 steps"] == pytest.approx(float(mean), rel=1e-4)
    for name, title in zip(("teacher_3", "teacher_1", "student_1"), TITLES, strict=True):
        assert notebook.values(f"comparison/{name}/mean@n=8") == {3: values[title]}
    assert notebook.images == [(3, "comparison")]
    assert [arm["guidance"] for arm in found.values()] == [2.0, 2.0, None]


def test_every_option_changes_what_is_compared(studio, monkeypatch) -> None:
    usual = compared(studio)["arms"]
    height = picture(studio.folder).height
    # few_guidance: of the teacher with few steps alone.
    other = compared(studio, few_guidance=1.0)["arms"]
    assert [usual[title] == other[title] for title in TITLES] == [True, False, True]
    assert other["teacher, 1 step"]["guidance"] == 1.0
    compared(studio, count=5)
    assert height - picture(studio.folder).height == 3 * 136  # 8 are the default
    # n: whole batches, and never more than there are.
    for n, expected in ((1, 4), (9, 10), (99, 10)):
        assert f"mean@n={expected}" in compared(studio, n=n)["arms"][TITLES[0]]
    asked = []
    monkeypatch.setitem(
        scorers.SCORERS, "fd", lambda options, name: asked.append((options.classifier, name)) or Scorer(Mean())
    )
    compared(studio, metrics=["fd"], networks=ScorerOptions(classifier="other"))
    assert asked == [("other", "val")]
    assert compared(studio, metrics=[])["arms"][TITLES[2]] == {"guidance": None}


def test_switched_off_by_default(studio) -> None:
    method = studio.Painter()
    studio.trainer(TeacherComparison(), steps=1).fit(method, studio.Easel())
    assert method.sampled == [] and list(studio.folder.iterdir()) == []


def test_a_student_of_several_steps_meets_the_teacher_with_as_many(studio) -> None:
    method = distiller(studio.Painter)
    method.steps = 2
    found = compared(studio, method)["arms"]
    assert list(found) == ["teacher, 3 steps", "teacher, 2 steps", "student, 2 steps"]
    assert found["teacher, 2 steps"]["mean@n=8"] != found["student, 2 steps"]["mean@n=8"]


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"metrics": ["shapes_score"]}, {}, "shapes_score needs scenes"),
        ({}, {"n": 0}, r"data\.val"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_training(studio, options, data, message) -> None:
    method = distiller(studio.Painter)
    with pytest.raises(UserError, match=message):
        compared(studio, method, studio.Easel(**data), **options)
    assert method.counters.step == 0


def test_a_method_without_a_teacher_is_refused_before_the_training(studio) -> None:
    method = studio.Painter()
    with pytest.raises(UserError, match="without teacher, codec, shape, guidance, val_steps"):
        compared(studio, method)
    assert method.counters.step == 0


@pytest.mark.parametrize("options", [{"n": 0}, {"count": 0}, {"metrics": ["shape_score"]}])
def test_wrong_options_name_their_key(options) -> None:
    with pytest.raises(UserError, match=rf"comparison\.{next(iter(options))}"):
        ComparisonOptions(**options)


def test_options_may_change_between_two_starts_of_a_run() -> None:
    assert runs.differences({"comparison": {"n": 1}, "model": 1}, {"comparison": {"n": 2}, "model": 1}) == []


def test_a_run_that_was_killed_while_comparing_compares_when_it_is_resumed(studio) -> None:
    first = compared(studio, steps=2)
    method = distiller(studio.Painter)
    trainer = studio.trainer(steps=2, plugins=[AtomicCheckpointIO()])
    trainer.fit(method, studio.Easel())
    trainer.save_checkpoint(studio.folder / "step-00000002")
    (studio.folder / "comparison.json").unlink()
    options = ComparisonOptions(enabled=True, metrics=["mean"], n=8)
    trainer = studio.trainer(TeacherComparison(options), steps=2, plugins=[AtomicCheckpointIO()])
    path = str(studio.folder / "step-00000002")
    trainer.fit(distiller(studio.Painter), studio.Easel(), ckpt_path=path, weights_only=True)
    assert json.loads((studio.folder / "comparison.json").read_text()) == first


def test_an_untrained_dmd_student_is_its_teacher_with_one_step(tmp_path) -> None:
    method = DMD(str(pipeline_folder(tmp_path)), guidance=1.0)
    method.configure_model()
    assert [name for name in Distils.__annotations__ if not hasattr(method, name)] == []
    records = Records.of_prompts(["red square", "two"])
    full, few, student = arms(method)
    assert [arm.title for arm in (full, few, student)] == ["teacher, 25 steps", "teacher, 1 step", "student, 1 step"]
    with torch.no_grad():
        drawn = [arm.draw(method, method.condition(records), Keys(3), records.position) for arm in (few, student, full)]
    torch.testing.assert_close(drawn[0], drawn[1], atol=1e-4, rtol=1e-4)
    assert float((drawn[0] - drawn[2]).abs().mean()) > 1e-3


def compared_by_a_rank(rank: int, folder: str) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("studio", Path(__file__).with_name("conftest.py"))
    helper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helper)
    scorers.SCORERS["mean"] = lambda options, name: Scorer(Mean())
    world = torch.distributed.get_world_size()
    own = Path(folder) / f"{world}-{rank}"
    own.mkdir()
    strategy = FSDP2(1, world) if world > 1 else "auto"
    options = ComparisonOptions(enabled=True, metrics=["mean"], n=8, count=2)
    trainer = helper.Studio(own).trainer(TeacherComparison(options), steps=1, strategy=strategy, devices=world)
    trainer.fit(distiller(helper.Painter), helper.Easel())
    written = sorted(file.name for file in own.iterdir())
    return {"written": written, "found": (own / "comparison.json").read_text() if written else ""}


def test_two_ranks_compare_what_one_compares_and_rank_0_writes(ranks, tmp_path) -> None:
    first, second = ranks(compared_by_a_rank, str(tmp_path))
    alone = ranks(compared_by_a_rank, str(tmp_path), world=1)[0]
    assert second == {"written": [], "found": ""} and first["written"] == ["comparison.json", "comparison.png"]
    found, expected = (json.loads(result["found"])["arms"] for result in (first, alone))
    assert list(found) == list(expected) == TITLES
    for title in TITLES:
        assert found[title]["mean@n=8"] == pytest.approx(expected[title]["mean@n=8"], rel=1e-4)
    assert np.array_equal(np.asarray(picture(tmp_path / "2-0")), np.asarray(picture(tmp_path / "1-0")))
