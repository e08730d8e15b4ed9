"""The two frozen encoders of a retrieval student: pictures to vectors, captions to vectors.

    pictures   the classifiers of the shapes world: features;  NFNet: pooled;  CLIP's ViT and Swin: their global vector
    captions   the text encoder of a pipeline folder: mean of a caption's tokens;  BERT: [CLS]

Pictures are [B, 3, H, W] in [-1, 1] everywhere; each encoder brings them to what it was trained on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_t2i import rank0
from lightning_t2i.errors import UserError
from lightning_t2i.frozen import folder_identity
from lightning_t2i.networks.classifier import ShapesClassifier
from lightning_t2i.networks.image_tower import CLIP_PIXELS, ImageTower
from lightning_t2i.networks.load import build_network, locate, model_index, read_json
from lightning_t2i.networks.nfnet import NFNet
from lightning_t2i.networks.perceptual import PerceptualNetwork
from lightning_t2i.networks.projection import Student
from lightning_t2i.networks.text_encoder import TextEncoder
from lightning_t2i.paths import resolve

if TYPE_CHECKING:
    from lightning_t2i.method import MethodModule

DOWNLOAD = (
    "curl -L -o FILE https://huggingface.co/timm/nfnet_l0.ra2_in1k/resolve/main/model.safetensors "
    "(timm's nfnet_l0, trained on ImageNet)"
)


class FrozenImages(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] -> features [B, width].

    Args:
        network: ShapesClassifier, PerceptualNetwork, NFNet or ImageTower.
        width: of the features.
    """

    def __init__(self, network: nn.Module, width: int):
        super().__init__()
        self.network, self.width = network, width
        for name, values in zip(("mean", "deviation"), CLIP_PIXELS, strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def build(cls, source: str, weights: str | None = None, revision: str | None = None) -> tuple[FrozenImages, str]:
        """The encoder of a folder, a hub id or "nfnet_l0", and what its weights are known by.

        Args:
            weights: safetensors file of an NFNet, with timm's names.

        Raises:
            UserError: no such source, weights that do not fit, or an NFNet without any.
        """
        if source == "nfnet_l0":
            network, identity = _nfnet(weights)
            return cls(network, network.width), identity
        facts = read_json(source, "config.json", revision) or {}
        ours: dict[str, Any] = {"ShapesClassifier": ShapesClassifier, "PerceptualNetwork": PerceptualNetwork}
        if (kind := ours.get(facts.get("_class_name", ""))) is not None:
            classifier = kind.from_pretrained(source)
            return cls(classifier, facts["widths"][-1]), classifier.identity
        tower = ImageTower.build(source, tokens=False, revision=revision)
        return cls(tower, tower.width), folder_identity(resolve(source), revision)

    def forward(self, images: Tensor) -> Tensor:
        if isinstance(self.network, ImageTower):
            return self.network(images)[:, 0]
        if isinstance(self.network, NFNet):
            return self.network(((images + 1) / 2 - self.mean) / self.deviation)
        if isinstance(self.network, PerceptualNetwork):
            return self.network.stages(images)[-1].mean((2, 3))
        return self.network(images)


def _nfnet(weights: str | None) -> tuple[NFNet, str]:
    if weights is None:
        what = "An encoder of random weights is frozen"
        raise UserError(what, where="model.image_weights", given=None, fix=f"name a file: {DOWNLOAD}")
    file = resolve(weights)
    if not file.is_file():
        raise UserError("There are no weights here", where="model.image_weights", given=weights, fix=DOWNLOAD)
    network = NFNet()
    if rank0.reads():
        found = {name: t for name, t in load_file(file).items() if not name.startswith("head.fc.")}
        if found.keys() != network.state_dict().keys():
            given = sorted(found.keys() ^ network.state_dict().keys())[0]
            raise UserError("The file holds another network", where="model.image_weights", given=given)
        network.load_state_dict(found)
    return network, rank0.agreed(lambda: f"{file.name}:{file.stat().st_size}")


def encoded(encoder: nn.Module, pixels: Tensor, chunk: int | None = None, kept: int = 0) -> Tensor:
    """Features of pictures, with their gradient.

    Args:
        chunk: pictures at a time that are encoded again in the backward pass; None keeps all activations.
        kept: pictures whose activations are kept all the same.
    """
    if chunk is None:
        return encoder(pixels)
    parts = [encoder(pixels[:kept])] if kept else []
    rest = pixels[kept:].split(chunk) if len(pixels) > kept else ()
    return torch.cat([*parts, *(checkpoint(encoder, part, use_reentrant=False) for part in rest)])


class FrozenTexts(nn.Module):
    """Captions -> vectors [B, width].

    Args:
        encoder: TextEncoder of a pipeline, or BERT.
        width: of the vectors.
        tokenizer: of BERT.
    """

    def __init__(self, encoder: Any, width: int, tokenizer: Any = None):
        super().__init__()
        self.encoder, self.width, self._tokenizer = encoder, width, tokenizer

    @classmethod
    def build(cls, source: str, revision: str | None = None) -> tuple[FrozenTexts, str]:
        """The encoder of a pipeline folder, or a BertModel with its tokenizer, and its identity."""
        identity = folder_identity(resolve(source), revision)
        if model_index(source, revision):
            found = TextEncoder.from_pretrained(source, revision=revision)
            return cls(found, found.width), identity
        from transformers import AutoTokenizer

        network: Any = build_network(source, revision)
        if not hasattr(network, "encoder") or not hasattr(network.config, "hidden_size"):
            allowed = "a pipeline folder with a text encoder, or a BertModel"
            raise UserError("Not a text encoder", where="model.text", given=type(network).__name__, allowed=allowed)
        tokenizer = AutoTokenizer.from_pretrained(locate(source), revision=revision)
        return cls(network, network.config.hidden_size, tokenizer), identity

    def forward(self, captions: list[str]) -> Tensor:
        if self._tokenizer is None:
            embeds, mask, _ = self.encoder.encode(self.encoder.tokenize(captions))
            if mask is None:
                return embeds.mean(1)
            return (embeds * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        tokens = self._tokenizer(list(captions), padding=True, truncation=True, max_length=60, return_tensors="pt")
        device = next(self.encoder.parameters()).device
        return self.encoder(**{name: value.to(device) for name, value in tokens.items()}).last_hidden_state[:, 0]


@dataclass(frozen=True)
class Encoders:
    """The frozen encoders and the space of a student's heads; experts and all that is matched to them share it.

    Args:
        image: folder, hub id, or "nfnet_l0".
        text: pipeline folder, or folder or hub id of a BertModel.
        image_weights: safetensors file of an NFNet.
        image_revision, text_revision: commits of hub ids.
        width: D; null is the width of the pictures' features.
        temperature: tau.
    """

    image: str
    text: str
    image_weights: str | None = None
    image_revision: str | None = None
    text_revision: str | None = None
    width: int | None = None
    temperature: float = 0.07

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            where = "model.encoders.temperature"
            raise UserError("Not a temperature", where=where, given=self.temperature, allowed="above 0")

    def into(self, method: MethodModule) -> Student:
        """Adds both to a method as `image` and `text`; returns what is trained on their features."""
        images, identity = FrozenImages.build(self.image, self.image_weights, self.image_revision)
        texts, text_identity = FrozenTexts.build(self.text, self.text_revision)
        method.add_frozen("image", images, identity)
        method.add_frozen("text", texts, text_identity)
        return Student.of(images.width, texts.width, self.width, self.temperature)


def facts_of(identities: dict[str, str], student: Student) -> dict[str, Any]:
    """What experts and a synthetic set must share: identities of the encoders, the student's heads and temperature."""
    heads = {f"{name}_head": asdict(getattr(student, name)) for name in ("image", "text")}
    return {**{name: identities[name] for name in ("image", "text")}, **heads, "temperature": student.temperature}
