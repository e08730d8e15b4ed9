"""The captions that are named beside a synthetic pair, and the sheet that shows both."""

from __future__ import annotations

import torch

from lightning_t2i.set_pictures import draw_pairs
from lightning_t2i.synthetic_set import nearest_captions


def test_nearest_captions_are_different_ones_best_first() -> None:
    known = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    words = ["east", "east", "north-east", "north"]
    texts = torch.tensor([[2.0, 0.1], [0.0, 5.0]])
    assert nearest_captions(texts, known, words, 2) == [["east", "north-east"], ["north", "north-east"]]
    assert nearest_captions(texts, known, words, 9)[0] == ["east", "north-east", "north"]


def test_a_long_caption_goes_on_in_a_second_line() -> None:
    sheets = [
        draw_pairs(torch.zeros(1, 3, 8, 8), [[words]], 1)
        for words in ("a green circle", "a green circle right of an orange triangle")
    ]
    dark = [
        (torch.frombuffer(bytearray(s.tobytes()), dtype=torch.uint8).view(s.height, s.width, 3) < 99) for s in sheets
    ]
    rows = [int(d[104:].any(2).any(1).sum()) for d in dark]
    assert rows[1] > rows[0] + 4
