"""The metric network: shapes of its outputs, cells in their order, a folder read back, a loss that can be learned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_t2i.errors import UserError
from lightning_t2i.metrics.frechet import FrechetDistance
from lightning_t2i.networks.classifier import ClassifierConfig, ShapesClassifier


def test_outputs_and_size() -> None:
    network = ShapesClassifier(ClassifierConfig(grid=3, shapes=4, colours=8, max_count=3))
    scores = network.classify(torch.zeros(2, 3, 32, 32))
    assert scores.shape.shape == (2, 9, 5) and scores.colour.shape == (2, 9, 9) and scores.count.shape == (2, 4)
    assert network.features(torch.zeros(2, 3, 32, 32)).shape == (2, network.num_features)
    assert 150_000 < sum(p.numel() for p in network.parameters()) < 300_000


def test_cells_are_numbered_row_by_row() -> None:
    torch.manual_seed(0)
    network = ShapesClassifier(ClassifierConfig(grid=2)).eval()
    images = torch.zeros(1, 3, 32, 32)
    empty = network.classify(images).colour[0]
    images[..., :8, 24:] = 1  # upper right: cell 1
    change = (network.classify(images).colour[0] - empty).abs().sum(-1)
    assert int(change.argmax()) == 1


def test_folder_read_back(tmp_path: Path) -> None:
    config = ClassifierConfig(grid=2, colours=5, widths=(8, 16, 24))
    network = ShapesClassifier(config).eval()
    network.save_pretrained(tmp_path / "classifier")
    loaded = ShapesClassifier.from_pretrained(tmp_path / "classifier")
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    assert loaded.config == config and not loaded.training and loaded.identity.startswith("sha256:")
    assert torch.allclose(loaded.features(images), network.features(images), atol=2e-2)  # weights are kept in float16
    assert not any(p.requires_grad for p in loaded.parameters())


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no classifier"):
        ShapesClassifier.from_pretrained(tmp_path)


def test_loss_falls_on_four_coloured_scenes() -> None:
    torch.manual_seed(0)
    network = ShapesClassifier(ClassifierConfig(grid=2, widths=(8, 16, 24)))
    images, shape = torch.zeros(4, 3, 32, 32) - 1, torch.zeros(4, 4, dtype=torch.int64)
    colour, count = torch.zeros_like(shape), torch.ones(4, dtype=torch.int64)
    for i in range(4):
        images[i, i % 3, 16 * (i // 2) + 4 : 16 * (i // 2) + 12, 16 * (i % 2) + 4 : 16 * (i % 2) + 12] = 1
        shape[i, i], colour[i, i] = 1, 1 + i % 3
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(60):
        loss = network.classify(images).loss(shape, colour, count)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = network.classify(images)
    assert torch.equal(scores.colour.argmax(-1), colour) and torch.equal(scores.shape.argmax(-1), shape)


def test_it_is_an_extractor_of_the_metrics() -> None:
    metric = FrechetDistance(ShapesClassifier(ClassifierConfig(widths=(8, 8, 8))), "noise")
    metric.update(torch.rand(6, 3, 32, 32) * 2 - 1)
    metric.update(torch.rand(6, 3, 32, 32) * 2 - 1, real=True)
    assert float(metric.compute()) > 0 and metric.name == "fd@n=6,ref=noise:6"
