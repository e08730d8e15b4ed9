"""`python -m datamodules.worlds` writes worlds and draws a sheet of samples."""

import numpy as np
from PIL import Image, ImageFont

from datamodules.worlds import __main__ as command


def test_sheet_shows_evenly_spaced_samples_of_each_world(make_data_set, tmp_path, monkeypatch, capsys):
    folder = make_data_set(n=24, captions=lambda i: {"en": ["short", f"a long caption of number {i}"]})
    monkeypatch.setattr(command, "ensure", lambda name: folder)
    assert command.main(["--sheet", str(tmp_path / "sheet.png")]) == 0
    assert capsys.readouterr().out.splitlines() == [str(folder)] * 2
    page = np.asarray(Image.open(tmp_path / "sheet.png"))
    cell, height = command.CELL, 32 * command.ZOOM + command.TEXT
    assert page.shape == (2 * command.ROWS * height, command.COLUMNS * cell, 3)
    # the toy pictures' red value is their number
    reds = [page[r * height + 12, c * cell + cell // 2, 0] for r in range(4) for c in range(command.COLUMNS)]
    assert reds == [2 * i for i in range(12)] * 2
    text = page[32 * command.ZOOM + 8 : height, : command.CELL]
    assert (text < 128).any()


def test_lines_fit_their_width():
    font = ImageFont.load_default(11)
    text = "a red circle left of an orange square on a white background"
    lines = command.wrapped(text, font, 150)
    assert " ".join(lines) == text and len(lines) > 1
    assert all(font.getlength(line) <= 150 for line in lines)


def test_unknown_world_is_an_error(capsys):
    assert command.main(["shape"]) == 2
    assert "did you mean shapes" in capsys.readouterr().err
