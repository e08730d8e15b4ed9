"""Zero-shot classification: both rules of ensembling in closed form, vectors and tokens, top-k accuracy."""

import pytest
import torch
from torch.nn.functional import normalize

from lightning_t2i.metrics.zero_shot import BARE, TEMPLATES, class_scores, top_accuracy
from lightning_t2i.processes.similarity import token_similarity

WORDS = {"甲": [1.0, 0.0], "乙": [0.0, 1.0], "甲！": [0.6, 0.8], "乙！": [-0.8, 0.6]}


class Vectors:
    """Texts have the vectors of WORDS."""

    def encode_text(self, texts):
        return torch.tensor([WORDS[text] for text in texts])

    def similarity(self, images, texts):
        return images @ texts.T, texts @ images.T


class Tokens(Vectors):
    def encode_text(self, texts):
        return super().encode_text(texts)[:, None]

    def similarity(self, images, texts):
        return token_similarity(images, texts, back=True)


def test_vectors_are_averaged_and_made_unit():
    images = torch.tensor([[1.0, 0.0]])
    found = class_scores(Vectors(), images, ["甲", "乙"], ("{}", "{}！"))
    expected = [float(normalize(torch.tensor(v), dim=0)[0]) for v in ([1.6, 0.8], [-0.8, 1.6])]
    assert found[0].tolist() == pytest.approx(expected)
    assert class_scores(Vectors(), images, ["甲", "乙"], BARE)[0].tolist() == [1.0, 0.0]


def test_tokens_average_similarities_or_probabilities():
    images, names, templates = torch.tensor([[[1.0, 0.0]]]), ["甲", "乙"], ("{}", "{}！")
    assert class_scores(Tokens(), images, names, templates)[0].tolist() == pytest.approx([0.8, -0.4])
    for scale in (1.0, 20.0):
        parts = [torch.tensor([1.0, 0.0]), torch.tensor([0.6, -0.8])]
        expected = torch.stack([(scale * p).softmax(0) for p in parts]).mean(0)
        found = class_scores(Tokens(), images, names, templates, "mean_prob", scale, block=1)
        torch.testing.assert_close(found[0], expected)
        assert float(found.sum()) == pytest.approx(1)


def test_top_accuracy_counts_the_best():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1], [0.0, 0.1, 0.2]])
    labels = torch.tensor([1, 2, 0])
    assert top_accuracy(scores, labels, (1, 2)) == {"top1": pytest.approx(1 / 3), "top2": pytest.approx(1 / 3)}
    assert top_accuracy(scores, labels)["top5"] == 1.0


def test_templates_take_a_name_each():
    assert len({t.format("猫") for t in TEMPLATES}) == len(TEMPLATES) and all("猫" in t.format("猫") for t in TEMPLATES)
