"""What distillations share: the parts of a teacher's pipeline, copies to train, checks of its pairs, the export."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_t2i import rank0
from lightning_t2i.batch import Cond, Records
from lightning_t2i.errors import UserError
from lightning_t2i.networks.build import save_pipeline
from lightning_t2i.networks.codec import LatentCodec
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.networks.edm_unets import EDMUNet
from lightning_t2i.networks.load import components
from lightning_t2i.networks.perceptual import LPIPS, PerceptualNetwork
from lightning_t2i.networks.text_encoder import TextEncoder
from lightning_t2i.pairs import teacher_identity
from lightning_t2i.paths import resolve
from lightning_t2i.processes import Process

Inputs: TypeAlias = tuple[Tensor, Cond | None, Tensor]  # noise [B, C, h, w], condition, int64 keys of the draws [B]
RESIZE = 224  # side to which LPIPS resizes the small pictures of pixel-space models
PAIRS_FIX = "make them with this teacher: python train.py predict and a config like those of configs/pairs"


@dataclass
class Pipeline:
    """A teacher's pipeline: on latents with its autoencoder, or on pixels.

    denoiser; codec, the identity on pixels; text, None without a text encoder; identity of all of them; shape (C, h, w)
    of one x0; classes of a class-conditional network, whose number is the null label, else 0.
    """

    denoiser: Denoiser
    codec: LatentCodec
    text: TextEncoder | None
    identity: str
    shape: tuple[int, int, int]
    classes: int

    @classmethod
    def load(cls, source: str, revision: str | None = None, guidance: float = 1.0, size: int | None = None) -> Pipeline:
        """Reads a pipeline folder or hub id, or the folder of a single network with a scheduler.

        Args:
            guidance: scale at which it will be asked, 1 is none.
            size: side of its pictures in pixels; null is the size that the network was made for.

        Raises:
            UserError: there is none, it has parts that are not served, or it has no condition to be guided by.
        """
        parts = components(source, revision)
        denoiser = Denoiser.from_pretrained(source, revision=revision)
        codec = LatentCodec.from_pretrained(source if parts & {"vae", "vqvae"} else None, revision=revision)
        text = TextEncoder.from_pretrained(source, revision=revision) if "text_encoder" in parts else None
        config: Any = denoiser.backbone.config
        classes = denoiser.classes
        if getattr(config, "guidance_embeds", False):
            what, allowed = "A guidance-distilled network has to be told its guidance", "guidance_embeds: false"
            raise UserError(what, where="model.teacher", given="guidance_embeds: true", allowed=allowed)
        if guidance != 1 and text is None and not classes:
            what = "A teacher without a condition cannot be guided"
            raise UserError(what, where="model.guidance", given=guidance, fix="1.0")
        if size is None and not hasattr(config, "sample_size"):
            what, given = "This network has no size of its own", type(denoiser.backbone).__name__
            raise UserError(what, where="model.size", given=given, fix="the side of its pictures in pixels")
        shape = codec.latent_shape(size or config.sample_size * codec.factor)
        return cls(denoiser, codec, text, teacher_identity(source, revision), shape, classes)

    def beginning_with(self, source: str, revision: str | None = None) -> Pipeline:
        """This pipeline with the network of another folder or hub id, with which a student of it begins.

        Raises:
            UserError: one of another prediction or architecture.
        """
        found = Denoiser.from_pretrained(source, revision=revision)
        found.process = self.denoiser.process  # an exported student's ends where it is asked
        for name, theirs, ours in (
            ("prediction", found.prediction, self.denoiser.prediction),
            ("architecture", shapes_of(found), shapes_of(self.denoiser)),
        ):
            if theirs != ours:
                what = f"The student begins with another {name} than its teacher's"
                raise UserError(what, where="model.student_from", given=source)
        return replace(self, denoiser=found)

    def trainable(self, gradient_checkpointing: bool = False) -> Denoiser:
        """A copy of the denoiser to train, without dropout and without EDM's embedding of augmentations.

        Raises:
            UserError: the network cannot recompute its activations.
        """
        network = without_dropout(copy.deepcopy(self.denoiser).requires_grad_(True).train())
        backbone: Any = network.backbone
        if isinstance(backbone, EDMUNet):
            backbone.drop_augmentation()
        if gradient_checkpointing:
            if not backbone._supports_gradient_checkpointing:
                what, given = "This network cannot recompute activations", type(backbone).__name__
                raise UserError(what, where="model.gradient_checkpointing", given=given, allowed="false")
            backbone.enable_gradient_checkpointing()
        return network

    @torch.no_grad()
    def condition(self, records: Records) -> Cond | None:
        """Cached conditions, encoded captions, class labels (in turn where records have none), or None.

        Raises:
            UserError: pairs of a class-conditional teacher without labels.
        """
        if records.cond is not None:
            return records.cond
        if self.text is not None:
            assert records.caption is not None, "a teacher with text needs captions"
            return self.text(records.caption)
        if not self.classes:
            return None
        if records.label is None and records.noise_seed is not None:
            raise UserError("Pairs of a class-conditional teacher need labels", where="data.pairs", given="no labels")
        label = records.position % self.classes if records.label is None else records.label
        return Cond(label=label, null_label=self.classes)

    def save(self, folder: Path, denoiser: Denoiser, times: Sequence[float | None] = (None,)) -> None:
        """Writes the stock pipeline with another denoiser of this kind, or the model folder of an EDM network.

        Args:
            times: of a student's steps, see `to_scheduler`; None is the last of the process.
        """
        save_pipeline(folder, denoiser, self.codec, self.text, [t for t in times if t is not None])


def shapes_of(network: nn.Module) -> dict[str, torch.Size]:
    """Of the parameters that a copy to train has, by their names: EDM's embedding of augmentations is left out."""
    found = {name: parameter.shape for name, parameter in network.named_parameters()}
    return {name: shape for name, shape in found.items() if "augment_embedding" not in name}


def refuse_time(process: Process, t: float | None, where: str = "model.student_t") -> None:
    """Refuses a time at which a student cannot be asked for x; None is the last one.

    Raises:
        UserError: there is only data at it, or it is none of the process's.
    """
    if t is not None and not 0 < t <= process.t_max:
        allowed = f"above 0, at most {process.t_max:g}, or null"
        raise UserError("Not a student's time", where=where, given=t, allowed=allowed)


def refuse_foreign_pairs(
    pairs: Any,
    recipe: Callable[[], Mapping[str, Any]],
    shape: tuple[int, ...],
    guidance: float | None,
    where: str = "data.pairs",
) -> None:
    """Refuses a stream that is not one of pairs, or whose pairs are not those of a teacher.

    Args:
        pairs: the stream `pairs` of the data, None if there is none.
        recipe: `Teacher.recipe` of the teacher, called on all processes; its solver and steps are not compared.
        shape: of one x0.
        guidance: scale that the pairs have to be sampled at; None takes any.
        where: key of the stream in the config.

    Raises:
        UserError: names what differs.
    """
    if not hasattr(pairs, "kind"):
        given = "null" if pairs is None else type(pairs).__name__
        raise UserError("This training needs the teacher's pairs", where=where, given=given, fix=PAIRS_FIX)
    about = json.loads((resolve(pairs.source) / "dataset.json").read_text(encoding="utf-8"))
    with rank0.alone(True):  # it hashes the teacher's files
        ours = {**recipe(), "shape": tuple(shape)}
    theirs = {**about["parameters"], "shape": tuple(about["shape"])}
    for name in ("x0", "shape", "teacher", "process", "prediction"):
        if theirs[name] != ours[name]:
            what = f"The pairs are not those of this teacher: '{name}' differs"
            raise UserError(what, where=where, given=theirs[name], allowed=str(ours[name]), fix=PAIRS_FIX)
    if guidance is not None and theirs["guidance"] != guidance:
        what = "The pairs were sampled at another guidance"
        raise UserError(what, where="model.guidance", given=guidance, allowed=str(theirs["guidance"]))


def refuse_size(stream: Any, codec: LatentCodec, shape: tuple[int, ...]) -> None:
    """Refuses a stream `main` of pictures of one size that is not the network's; streams that tell no size pass.

    Args:
        shape: of one x0.

    Raises:
        UserError: names both sizes.
    """
    one_size = hasattr(stream, "buckets") and stream.buckets is None
    if one_size and codec.latent_shape(stream.size) != shape:
        what, allowed = "The pictures have another size than the network's", str(shape[-1] * codec.factor)
        raise UserError(what, where="data.main.size", given=stream.size, allowed=allowed)


def joined(parts: list[Inputs]) -> Inputs:
    """The inputs of one call of a student, in the order of the parts."""
    zs, conds, places = zip(*parts, strict=True)
    first, *rest = conds
    return torch.cat(zs), first.cat(rest[0]) if rest and first is not None else first, torch.cat(places)


def picture_distance(kind: str, weights: str | None, codec: LatentCodec) -> Any:
    """A frozen network d(x, y) [B] of pictures [B, 3, H, W] in [-1, 1], with its `identity`.

    Args:
        kind: "perceptual", or "lpips" with VGG features and average pooling, or "lpips_alex" with AlexNet's.
        weights: folder of a PerceptualNetwork, or safetensors file of LPIPS.
        codec: of the pictures; LPIPS resizes the small ones of pixel-space models first.

    Raises:
        UserError: there are no such weights.
    """
    if weights is None:
        raise UserError("The metric has no weights", where="model.metric_weights", given="null")
    if kind == "perceptual":
        return PerceptualNetwork.from_pretrained(weights)
    layout = "alex" if kind == "lpips_alex" else "vgg16"
    resize = None if codec.vae else RESIZE
    return LPIPS.from_file(weights, layout, resize=resize, average_pool=layout == "vgg16")


def without_dropout(network: Any) -> Any:
    """The network, whose dropout layers drop nothing from now on."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network
