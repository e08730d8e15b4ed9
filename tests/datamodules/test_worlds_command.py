"""`python -m datamodules.worlds` writes worlds and draws a sheet of samples."""

import numpy as np
from PIL import Image

from datamodules.worlds import __main__ as command


def test_sheet_shows_evenly_spaced_samples_of_each_world(make_data_set, tmp_path, monkeypatch, capsys):
    folder = make_data_set(n=24, captions=lambda i: {"en": ["short", f"a long caption of number {i}"]})
    monkeypatch.setattr(command, "ensure", lambda name: folder)
    assert command.main(["--sheet", str(tmp_path / "sheet.png")]) == 0
    assert capsys.readouterr().out.splitlines() == [str(folder)] * 2
    page = np.asarray(Image.open(tmp_path / "sheet.png"))
    cell, height = 200, 128 + 56
    assert page.shape == (2 * command.ROWS * height, command.COLUMNS * cell, 3)
    # the toy pictures' red value is their number
    reds = [page[r * height + 12, c * cell + cell // 2, 0] for r in range(4) for c in range(command.COLUMNS)]
    assert reds == [2 * i for i in range(12)] * 2
    text = page[128 + 8 : height, :cell]
    assert (text < 128).any()


def test_unknown_world_is_an_error(capsys):
    assert command.main(["shape"]) == 2
    assert "did you mean shapes" in capsys.readouterr().err
