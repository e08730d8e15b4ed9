"""Sample grids: when, of what, and that training does not notice them."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.inference import undisturbed
from callbacks.sample_grid import SampleGrid, SampleOptions, is_due
from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError


def test_powers_of_two_then_multiples() -> None:
    assert [s for s in range(60) if is_due(s, 20)] == [1, 2, 4, 8, 16, 20, 40]
    assert [s for s in range(20) if is_due(s, 8)] == [1, 2, 4, 8, 16]


def grids(folder: Path) -> dict[int, Image.Image]:
    found = {}
    for file in sorted((folder / "samples").glob("*.png")):
        with Image.open(file) as image:
            image.load()
            found[int(file.stem.split("-")[1])] = image
    return found


def test_grids_are_written_and_logged_at_their_steps_and_at_the_end(studio) -> None:
    notebook = studio.Notebook()
    grid = SampleGrid(SampleOptions(every=5, prompts=["a", "b"], per_prompt=3))
    studio.trainer(grid, steps=11, logger=notebook).fit(studio.Painter(), studio.Easel())
    assert sorted(grids(studio.folder)) == [1, 2, 4, 5, 10, 11]
    assert notebook.images == [(s, "grids") for s in (1, 2, 4, 5, 10, 11)]


def test_no_second_grid_when_the_end_is_due_anyway(studio) -> None:
    method = studio.Painter()
    grid = SampleGrid(SampleOptions(every=4, prompts=["a"], per_prompt=1))
    studio.trainer(grid, steps=4).fit(method, studio.Easel())
    assert [step for step, _ in method.sampled] == [1, 2, 4]


def test_steps_are_training_steps(studio) -> None:
    from lightning_t2i.options import MethodOptions

    method = studio.Painter(MethodOptions(accumulate=3))
    studio.trainer(SampleGrid(SampleOptions(every=2, prompts=["a"], per_prompt=1)), steps=4).fit(method, studio.Easel())
    assert [step for step, _ in method.sampled] == [1, 2, 4]


def test_prompts_and_noise_are_fixed(studio) -> None:
    method = studio.Painter()
    grid = SampleGrid(SampleOptions(every=1, count=3, per_prompt=2))
    studio.trainer(grid, steps=2).fit(method, studio.Easel())
    # Each prompt has its own two positions, the same in every grid.
    assert method.sampled == [(1, [0, 2, 4]), (1, [1, 3, 5]), (2, [0, 2, 4]), (2, [1, 3, 5])]
    assert grids(studio.folder)[1].text["prompts"].split("\n") == studio.prompts[:3]


def test_prompts_of_several_batches_are_one_grid(studio) -> None:
    class Restorer(studio.Painter):
        def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
            return images

    method = Restorer()
    studio.trainer(SampleGrid(SampleOptions(every=9, count=6, per_prompt=1)), steps=1).fit(method, studio.Easel())
    assert method.sampled == [(1, [0, 1, 2, 3]), (1, [4, 5])]
    grid = grids(studio.folder)[1]
    assert grid.text["prompts"].split("\n") == [studio.prompts[i % 4] for i in range(6)]
    real, restored = (np.asarray(grid)[-560:, x : x + 96] for x in (-312, -208))
    assert np.array_equal(real, restored) and real[-90:].std() > 20  # the sixth has its real picture too


def test_pictures_of_the_grid_are_the_samples(studio) -> None:
    method = studio.Painter()
    studio.trainer(SampleGrid(SampleOptions(every=9, count=2, per_prompt=2)), steps=1).fit(method, studio.Easel())
    with undisturbed(method):
        samples = method.sample(
            method.condition(Records.of_prompts(studio.prompts[:2])), method.keys.fork("samples"), torch.tensor([0, 2])
        )
    expected = ((samples.clamp(-1, 1) + 1) * 127.5).round()
    canvas = np.asarray(grids(studio.folder)[1])
    right, factor = canvas.shape[1] - 8, 96 // 8
    first = right - 2 * 96 - 8
    for row in range(2):
        drawn = canvas[8 + row * 104 : 104 + row * 104, first : first + 96][::factor, ::factor]
        assert np.array_equal(drawn, expected[row].permute(1, 2, 0).numpy())


def test_real_and_reconstructed_pictures_stand_beside_the_samples(studio) -> None:
    class Restorer(studio.Painter):
        def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
            return -images

    studio.trainer(SampleGrid(SampleOptions(every=9, count=2, per_prompt=1)), steps=1).fit(Restorer(), studio.Easel())
    canvas = np.asarray(grids(studio.folder)[1]).astype(int)
    real, restored = canvas[30:110, -312:-216], canvas[30:110, -208:-112]
    assert np.abs(real + restored - 255).max() <= 1 and real.std() > 20


def test_method_that_neither_generates_nor_reconstructs_is_left_alone(studio) -> None:
    class Silent(studio.Painter):
        sample = None  # type: ignore[assignment]
        condition = None  # type: ignore[assignment]

    studio.trainer(SampleGrid(SampleOptions(every=1)), steps=2).fit(Silent(), studio.Easel())
    assert not (studio.folder / "samples").exists()


def test_switched_off(studio) -> None:
    method = studio.Painter()
    studio.trainer(SampleGrid(SampleOptions(enabled=False, every=1)), steps=2).fit(method, studio.Easel())
    assert method.sampled == []


def test_method_without_captions_gets_empty_prompts(studio) -> None:
    method = studio.Painter()
    studio.trainer(SampleGrid(SampleOptions(every=1, count=3)), steps=1).fit(method, studio.Easel(captions=False))
    assert method.sampled[0] == (1, [0, 4, 8])


def test_training_data_serve_where_there_is_no_validation(studio) -> None:
    method = studio.Painter()
    studio.trainer(SampleGrid(SampleOptions(every=1)), steps=1).fit(method, studio.Easel(n=0))
    assert len(method.sampled[0][1]) == 4


def test_training_is_the_same_with_and_without_grids(studio) -> None:
    weights = []
    for options in (SampleOptions(every=1), SampleOptions(enabled=False)):
        method = studio.Painter()
        studio.trainer(SampleGrid(options), steps=4).fit(method, studio.Easel())
        weights.append(method.brush.linear.weight.clone())
    assert torch.equal(*weights)


def test_undisturbed_leaves_no_trace(studio) -> None:
    method = studio.Painter()
    method.configure_model()
    method.train()
    method.brush.dropout.eval()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with pytest.raises(RuntimeError), undisturbed(method):
        assert not method.brush.training
        torch.rand(1), np.random.rand(), random.random()
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1]) and random.getstate() == before[2]
    assert method.brush.training and not method.brush.dropout.training


def test_wrong_options_name_their_key() -> None:
    with pytest.raises(UserError, match="samples.every"):
        SampleOptions(every=0)
    with pytest.raises(UserError, match="samples.prompts"):
        SampleOptions(prompts=[])
