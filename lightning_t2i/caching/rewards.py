"""Rewards: what a schedule is judged by, a number for each picture; higher is better.

    Attributes   mean log-probability, under the metric network, of what the caption of a shapes scene asks for
    Detector     1 where the rule-based detector finds all of it, else 0: the judge on held-out prompts
    ClipReward   100 cos(picture, caption) of a CLIP folder; PickScore: with the network's own scale in place of 100
    Piped        a scorer in another interpreter: ImageReward and HPSv2, whose packages need other versions than ours
    Custom       any function of (pictures, records)

The metric network is named here and in no config: nothing is trained on it, no gradient passes through it. But a search
selects by its score, so distances in its features say nothing of what is found.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.worlds.shapes_scenes import COLOURS, SHAPES
from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError
from lightning_t2i.frozen import folder_identity
from lightning_t2i.metrics.clip_score import TransformersClip
from lightning_t2i.metrics.shapes_detector import satisfied
from lightning_t2i.networks.classifier import ShapesClassifier
from lightning_t2i.paths import resolve

FLOOR = 1e-4  # of an attribute's probability
_RUNNING: dict[tuple[str, ...], subprocess.Popen[bytes]] = {}  # command and GPU -> its process


class Reward(ABC):
    """A judge of pictures. Networks are read by `setup`, not by the constructor."""

    identity: str = ""  # of what it judges by, after `setup`

    def setup(self, device: torch.device) -> None:
        """Makes it ready on a device."""
        self.identity = type(self).__name__

    @abstractmethod
    def __call__(self, images: Tensor, records: Records) -> Tensor:
        """float64 [B] for pictures [B, 3, H, W] in [-1, 1] and the records that they were made for."""


class Attributes(Reward):
    """For scenes of the shapes world.

    Of each thing that is asked for, log P(at least one cell of the grid shows it), P(cell) = P(shape) P(colour); where
    objects are counted, log P(count) too; each not below log 1e-4. Their mean.

    Args:
        classifier: folder of a ShapesClassifier.
    """

    def __init__(self, classifier: str = "assets/tiny/classifier"):
        self.classifier = classifier

    def setup(self, device: torch.device) -> None:
        self.network = ShapesClassifier.from_pretrained(self.classifier).to(device)
        self.identity = self.network.identity

    @torch.no_grad()
    def __call__(self, images: Tensor, records: Records) -> Tensor:
        scenes = _scenes(records, self)
        scores = self.network.classify(images.float())
        shape, colour = scores.shape.double().softmax(-1), scores.colour.double().softmax(-1)
        count = scores.count.double().softmax(-1)
        rows = []
        for i, scene in enumerate(scenes):
            found = []
            for ask in scene["ask"]:
                cells = shape[i, :, 1 + list(SHAPES).index(ask["shape"])]
                if ask["colour"] is not None:
                    cells = cells * colour[i, :, 1 + list(COLOURS).index(ask["colour"])]
                found.append(1 - (1 - cells).prod())
            if scene["task"] == "counting":
                found.append(count[i, sum(ask["count"] for ask in scene["ask"])])
            rows.append(torch.stack(found).clamp(min=FLOOR).log().mean())
        return torch.stack(rows)


class Detector(Reward):
    """Whether pictures of the shapes world show what is asked for, relation and count included."""

    def __call__(self, images: Tensor, records: Records) -> Tensor:
        return torch.from_numpy(satisfied(images, _scenes(records, self))).double().to(images.device)


class ClipReward(Reward):
    """Cosine between picture and caption.

    Args:
        folder: transformers folder or hub id of a CLIP.
        revision: commit of a hub id.
        scaled: multiply by the network's own scale, as PickScore does, not by 100.
    """

    def __init__(self, folder: str, revision: str | None = None, scaled: bool = False):
        self.folder, self.revision, self.scaled = folder, revision, scaled

    def setup(self, device: torch.device) -> None:
        source = str(resolve(self.folder))
        self.encoder = TransformersClip.from_pretrained(source, self.revision).to(device)
        self.identity = folder_identity(source, self.revision)

    @torch.no_grad()
    def __call__(self, images: Tensor, records: Records) -> Tensor:
        image, text = self.encoder.encode_image(images), self.encoder.encode_text(list(records.caption or []))
        network: Any = self.encoder.network
        scale = float(network.logit_scale.exp()) if self.scaled else 100.0
        return scale * (image.double() * text.double()).sum(-1)


class PickScore(ClipReward):
    """PickScore (arXiv 2305.01569): a CLIP that was trained on choices of people.

    Args:
        folder: transformers folder or hub id of its weights, with tokenizer and image processor.
        revision: commit of a hub id.
    """

    def __init__(self, folder: str = "yuvalkirstain/PickScore_v1", revision: str | None = None):
        super().__init__(folder, revision, scaled=True)


class Piped(Reward):
    """A scorer in a process of another interpreter.

    The process gets, for each batch, a line of JSON {"shape": [B, H, W, 3], "prompts": [...]} and then the pictures as
    bytes; it answers with a line {"scores": [...]}, or {"error": "..."}. `scorer_worker.py` beside this file serves
    ImageReward and HPSv2 and imports nothing of this repository: python scorer_worker.py imagereward. It sees the one
    GPU that `setup` is told. Scorers of one command on one device, as reward and judge may be, share a process.

    Args:
        command: the interpreter, the script and its arguments.
    """

    def __init__(self, command: list[str]):
        if not command:
            raise UserError("There is no scorer to run", where="model.reward.command", given=command)
        self.command = command

    def setup(self, device: torch.device) -> None:
        visible: dict[str, str] = {}
        if device.type == "cuda":  # the packages take the first GPU that they see
            known, index = os.environ.get("CUDA_VISIBLE_DEVICES"), device.index or 0
            visible = {"CUDA_VISIBLE_DEVICES": known.split(",")[index].strip() if known else str(index)}
        key = (*self.command, *visible.values())
        if key not in _RUNNING or _RUNNING[key].poll() is not None:
            try:
                pipe, env = subprocess.PIPE, {**os.environ, **visible}
                _RUNNING[key] = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, env=env)
            except OSError as error:
                where = "model.reward.command"
                raise UserError(f"The scorer does not start: {error}", where=where, given=self.command) from error
        self.process = _RUNNING[key]
        self.identity = " ".join(Path(word).name for word in self.command)

    def __call__(self, images: Tensor, records: Records) -> Tensor:
        pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        head = json.dumps({"shape": list(pixels.shape), "prompts": list(records.caption or [])})
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(head.encode() + b"\n" + pixels.tobytes())
            stdin.flush()
            answer = json.loads(stdout.readline() or '{"error": "it ended"}')
        except (OSError, ValueError) as error:
            answer = {"error": str(error)}
        if "error" in answer or len(answer["scores"]) != len(images):
            what = f"The scorer failed: {answer.get('error', 'a score for each picture was expected')}"
            raise UserError(what, where="model.reward.command", given=self.command, fix="its own output says more")
        return torch.tensor(answer["scores"], dtype=torch.float64, device=images.device)

    def close(self) -> None:
        """Ends the process, for all that share it."""
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what is left in the buffer of a process that has ended
                assert stream is not None
                stream.close()
        self.process.wait(timeout=30)


class Custom(Reward):
    """Any function (pictures, records) -> tensor [B].

    Args:
        function: dotted name, as in my_package.my_module.my_reward.
    """

    def __init__(self, function: str):
        self.function = function

    def setup(self, device: torch.device) -> None:
        module, _, name = self.function.rpartition(".")
        try:
            self.call = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            where = "model.reward.function"
            raise UserError(f"No such function: {error}", where=where, given=self.function) from error
        self.identity = self.function

    def __call__(self, images: Tensor, records: Records) -> Tensor:
        found: Tensor = self.call(images, records)
        if found.shape != (len(images),):
            raise UserError("A reward is one number for each picture", where="model.reward.function",
                            given=list(found.shape), allowed=[len(images)])  # fmt: skip
        return found.double()


def _scenes(records: Records, reward: Reward) -> list[dict[str, Any]]:
    if records.scene is None:
        what = f"{type(reward).__name__} judges scenes of the shapes world, and the data has none"
        raise UserError(what, where="model.reward", fix="class_path: lightning_t2i.caching.rewards.ClipReward")
    return records.scene
