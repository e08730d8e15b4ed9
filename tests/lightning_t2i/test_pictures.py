"""Tensors to pictures, grids and files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFont

from lightning_t2i.pictures import can_draw, contact_sheet, draw_grid, save_png, to_pil, wrapped


def test_values_become_bytes() -> None:
    images = torch.tensor([-1.0, 0.0, 1.0, 3.0, -9.0]).view(5, 1, 1, 1).expand(-1, 3, 2, 2)
    levels = [np.unique(np.asarray(image)).tolist() for image in to_pil(images)]
    assert levels == [[0], [128], [255], [255], [0]]


def test_channels_and_axes_keep_their_order() -> None:
    image = torch.full((1, 3, 4, 6), -1.0)
    image[0, 0, 1, 5] = 1  # red, row 1, column 5
    assert to_pil(image)[0].size == (6, 4) and to_pil(image)[0].getpixel((5, 1)) == (255, 0, 0)


def test_one_channel_is_grey() -> None:
    assert to_pil(torch.zeros(1, 1, 2, 2))[0].getpixel((0, 0)) == (128, 128, 128)


def plain(colour: str) -> Image.Image:
    return Image.new("RGB", (32, 32), colour)


def test_grid_has_every_picture_in_its_place() -> None:
    grid = draw_grid([[plain("red"), plain("lime")], [plain("blue"), plain("black")]], ["a", "b"], ["", ""])
    right, first = grid.width - 8 - 48, grid.width - 8 - 96 - 8 - 48
    places = [(first, 56), (right, 56), (first, 160), (right, 160)]
    assert [grid.getpixel(p) for p in places] == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)]


def test_texts_and_titles_are_drawn() -> None:
    row, ink = [[plain("white")]], lambda grid: int((np.asarray(grid) < 128).any(-1).sum())
    empty = ink(draw_grid(row, [""], [""]))
    text = ink(draw_grid(row, ["a red square"], [""]))
    assert empty == 0 and text > 50
    assert ink(draw_grid(row, ["a red square"], ["real"])) > text


def test_long_text_stays_beside_its_picture() -> None:
    grid = np.asarray(draw_grid([[plain("white")]] * 2, ["word " * 200, ""], [""]))
    assert (grid[:104] < 128).any() and not (grid[108:] < 128).any()


def test_text_that_the_font_lacks_becomes_a_number() -> None:
    assert can_draw("a café") and not can_draw("红色圆形")
    row = [[plain("white")]]
    numbered = draw_grid(row, ["prompt 1"], [""])
    assert np.array_equal(np.asarray(draw_grid(row, ["红色圆形"], [""])), np.asarray(numbered))


def test_lines_fit_their_width() -> None:
    font = ImageFont.load_default(11)
    text = "a red circle left of an orange square on a white background"
    lines = wrapped(text, font, 150)
    assert " ".join(lines) == text and len(lines) > 1
    assert all(font.getlength(line) <= 150 for line in lines)


def test_contact_sheet_shows_pictures_whole_in_rows_with_their_texts() -> None:
    images = [Image.new("RGB", size, "red") for size in ((10, 5), (200, 100), (64, 64))]
    page = np.asarray(contact_sheet(images, ["one", "two", "three"], columns=2, side=64, room=2))
    assert page.shape == (2 * (64 + 2 * 13 + 4), 2 * (64 + 72), 3)
    red = (page == (255, 0, 0)).all(axis=2)
    height, cell = page.shape[0] // 2, page.shape[1] // 2
    sums = [red[r * height : (r + 1) * height, c * cell : (c + 1) * cell].sum() for r in range(2) for c in range(2)]
    assert sums == [60 * 30, 64 * 32, 64 * 64, 0]
    dark = (page < 100).all(axis=2)
    assert [bool(dark[r * height + 72 : (r + 1) * height].any()) for r in range(2)] == [True, True]


def test_file_keeps_texts_of_any_script(tmp_path: Path) -> None:
    save_png(plain("red"), tmp_path / "new" / "grid.png", prompts="红色圆形\na red circle")
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["grid.png"]
    with Image.open(tmp_path / "new" / "grid.png") as image:
        image.load()
        assert image.text["prompts"] == "红色圆形\na red circle"
