"""Classifier: targets of a scene by hand; the network learns the shapes world; it is no loss of what it judges."""

import lightning as L
import pytest
import torch
import yaml
from pictures import fit
from toy import adam

from datamodules.image_text import ImageText
from datamodules.streams import Streams
from lightning_modules.classifier import Classifier, targets
from lightning_t2i.options import EMAOptions, GroupOptions

pytestmark = pytest.mark.filterwarnings("ignore:The .* does not have many workers")


def test_targets_of_a_scene():
    red_circle = {"shape": "circle", "colour": "red", "cell": [0, 2]}
    blue_square = {"shape": "square", "colour": "blue", "cell": [2, 1]}
    shape, colour, count = targets([{"objects": [red_circle, blue_square]}, {"objects": []}])
    assert shape.shape == colour.shape == (2, 9)
    assert {i for i, s in enumerate(shape[0].tolist()) if s} == {2, 7}
    assert shape[0, 2] != shape[0, 7]
    assert colour[0, 2] != colour[0, 7]
    assert not shape[1].any()
    assert count.tolist() == [2, 0]


def test_it_learns_the_shapes_world(tmp_path):
    data = Streams(
        main=ImageText("shapes", split="train", batch_size=32, limit=640, in_memory=True),
        val=ImageText("shapes", split="val", batch_size=100, limit=200, in_memory=True),
    )
    losses = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, module, *unused):
            losses.append(float(module.last_loss))

    class Recorded(Classifier):
        def backward(self, names, loss, **scalars):
            self.last_loss = loss.detach()
            super().backward(names, loss, **scalars)

    module = Recorded(classifier=GroupOptions(adam(3e-3), ema=EMAOptions(0.9)))
    fit(tmp_path, module, 30, data, callbacks=[Record()])
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_noise_changes_the_training(tmp_path):
    states = []
    for noise in (0.0, 0.5):
        data = Streams(
            main=ImageText("shapes", split="train", batch_size=4, limit=16, in_memory=True),
            val=ImageText("shapes", split="val", batch_size=4, limit=4, in_memory=True),
        )
        module = Classifier(noise=noise)
        fit(tmp_path, module, 2, data)
        states.append(module.state_dict())
    assert any(not torch.equal(states[0][n], t) for n, t in states[1].items())


def test_no_training_config_uses_the_metric_network(repo):
    """A model trained on its own score is worth nothing: only evaluation sections may name assets/tiny/classifier.

    RepBlend's pairs are measured by retrieval of students on a frozen encoder, which it is there; not by its features.
    """

    def names(value) -> bool:
        if isinstance(value, dict):
            return any(names(v) for v in value.values())
        if isinstance(value, list):
            return any(names(v) for v in value)
        return isinstance(value, str) and "tiny/classifier" in value

    files = sorted((repo / "configs").rglob("*.yaml"))
    assert files
    for file in (file for file in files if file.parent.name not in ("repblend", "experts")):
        config = yaml.safe_load(file.read_text()) or {}
        assert not any(names(config.get(section)) for section in ("model", "data", "trainer")), file


def test_the_network_option_decides_what_is_trained(tmp_path):
    from lightning_t2i.networks.classifier import ShapesClassifier
    from lightning_t2i.networks.perceptual import PerceptualNetwork

    for name, cls in (("metric", ShapesClassifier), ("perceptual", PerceptualNetwork)):
        module = Classifier(network=name)
        module.configure_model()
        module.export(tmp_path / name, [])
        assert isinstance(module.classifier, cls)
        assert cls.from_pretrained(tmp_path / name).identity.startswith("sha256:")
