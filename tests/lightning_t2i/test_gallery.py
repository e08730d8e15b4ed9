"""docs/gallery.md shows the pictures that its command draws, from what is in the repository."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_t2i import gallery
from lightning_t2i.gallery import CURVES, IMAGES, PICTURES, SERIES, main, student, wukong
from lightning_t2i.paths import ROOT


def test_the_page_shows_every_picture() -> None:
    page = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    for name in PICTURES:
        assert (IMAGES / f"{name}.png").is_file() and f"(images/{name}.png)" in page, name


def test_a_student_stands_beside_its_teacher_as_it_is_committed() -> None:
    with Image.open(IMAGES / "dmd.png") as picture:
        found, kept = np.asarray(student("dmd", 12), np.int16), np.asarray(picture, np.int16)
    assert found.shape == kept.shape and np.abs(found - kept).mean() < 1  # of 255: rounding between machines


def test_the_picture_that_a_text_describes_is_framed() -> None:
    """At the places where the committed picture has its frames; the first two rows have theirs first and fourth."""
    with Image.open(IMAGES / "wukong.png") as picture:
        kept = np.asarray(picture)
    found = np.asarray(wukong(2))
    red = [np.argwhere((rows == (255, 0, 0)).all(-1)) for rows in (found, kept[: len(found)])]
    assert len(red[0]) and np.array_equal(*red)


@pytest.mark.parametrize("name", CURVES)
def test_curves_have_their_series(name: str) -> None:
    found = json.loads((SERIES / f"{name}.json").read_text(encoding="utf-8"))
    wanted = {key for _, lines in CURVES[name] for key in lines.values()}
    assert set(found) == wanted and all(1 < len(steps) == len(values) <= 200 for steps, values in found.values())


def test_curves_of_a_run_are_kept_thinned_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [key for _, lines in CURVES["fluid"] for key in lines.values()]
    lines = [{"step": i, **dict.fromkeys(keys, 1 / (i + 1))} for i in range(500)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(gallery, "SERIES", tmp_path / "curves")
    monkeypatch.setattr(gallery, "IMAGES", tmp_path)
    assert main(["--keep", "fluid", "--run", str(tmp_path)]) == 0
    steps, values = json.loads((tmp_path / "curves" / "fluid.json").read_text())[keys[0]]
    assert len(steps) == 167 and steps[:2] == [0, 3] and values[1] == 0.25
    assert main(["fluid_curves"]) == 0
    with Image.open(tmp_path / "fluid_curves.png") as drawn:
        assert drawn.width > 800


def test_an_unknown_picture_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["no_such_picture"])
    assert "no such picture: no_such_picture" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--keep", "fluid"])
    assert "--keep needs --run FOLDER" in capsys.readouterr().err
