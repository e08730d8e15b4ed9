"""Perceptual losses: distances between the features of two pictures. For losses only; metrics have their own networks.

    d(x, y) = sum_l mean_places sum_c w_lc (f_lc(x) / |f_l(x)| - f_lc(y) / |f_l(y)|)^2     (LPIPS, arXiv 1801.03924, 3)

    x, y [B, 3, H, W] in [-1, 1] -> d [B];  f_l after the ReLU that ends stage l;  w >= 0

LPIPS has VGG16 or AlexNet features and learned w. PerceptualNetwork is this repository's small stand-in with
w_lc = 1; results name it "perceptual", never "lpips".
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from lightning_t2i import rank0
from lightning_t2i.errors import UserError
from lightning_t2i.frozen import folder_identity
from lightning_t2i.networks.classifier import CONFIG, WEIGHTS, Scores, save_network
from lightning_t2i.paths import resolve

# Layers in the order of torchvision's `features`: (channels, kernel, stride, padding), "pool", or "tap" after a ReLU.
VGG16: tuple = ((64, 3, 1, 1), (64, 3, 1, 1), "tap", "pool", (128, 3, 1, 1), (128, 3, 1, 1), "tap", "pool")
for _width in (256, 512, 512):
    VGG16 += ((_width, 3, 1, 1),) * 3 + ("tap", "pool")
VGG16 = VGG16[:-1]
ALEX: tuple = ((64, 11, 4, 2), "tap", "pool", (192, 5, 1, 2), "tap", "pool", (384, 3, 1, 1), "tap")
ALEX += ((256, 3, 1, 1), "tap", (256, 3, 1, 1), "tap")
LAYOUTS = {"vgg16": (VGG16, 2), "alex": (ALEX, 3)}  # layers, size of the pooling windows (stride 2)

MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet, for pictures in [-1, 1]
DOWNLOAD = (
    "take torchvision's vgg16-397923af.pth or alexnet-owt-7be5be79.pth (BSD-3-Clause; trained on ImageNet, whose "
    "pictures are for non-commercial research) and the heads weights/v0.1/vgg.pth or alex.pth of "
    "richzhang/PerceptualSimilarity (BSD-2-Clause), and join them: "
    "lightning_t2i.networks.perceptual.join_weights(FEATURES, HEADS, OUT)"
)


def unit_distance(x: Tensor, y: Tensor, eps: float = 1e-10) -> Tensor:
    """Squared difference of features [B, C, h, w], each place normalised over channels: [B, C, h, w]."""

    def unit(f: Tensor) -> Tensor:
        # eps under the root: after a ReLU a place may be all zero, where the root alone has no gradient
        return f / (f.square().sum(1, keepdim=True) + eps).sqrt()

    return (unit(x) - unit(y)).square()


class Head(nn.Module):
    """The weights w of one stage, under the published name `model.1`; untrained they are equal."""

    def __init__(self, channels: int):
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))
        nn.init.constant_(self.model[1].weight, 1 / channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class LPIPS(nn.Module):
    """The LPIPS distance. Parameters are named as in the published files: features.N, linK.model.1.

    Args:
        layout: "vgg16" or "alex".
        resize: side to which pictures are resized first (bilinear); None keeps theirs. DMD uses 224 for small pictures.
        average_pool: averages instead of maxima in the pooling layers, for smoother gradients.
    """

    name = "lpips"

    def __init__(self, layout: str = "vgg16", resize: int | None = None, average_pool: bool = False):
        super().__init__()
        if layout not in LAYOUTS:
            raise UserError("Unknown layout of LPIPS", where="layout", given=layout, allowed=LAYOUTS)
        self.resize, self.identity = resize, "untrained"
        layers, window = LAYOUTS[layout]
        self.features = nn.ModuleList()
        self.taps: list[int] = []
        channels = 3
        for layer in layers:
            if layer == "tap":
                self.taps.append(len(self.features) - 1)
                self.add_module(f"lin{len(self.taps) - 1}", Head(channels))
            elif layer == "pool":
                pool = nn.AvgPool2d if average_pool else nn.MaxPool2d
                self.features.append(pool(window, 2))
            else:
                self.features += [nn.Conv2d(channels, *layer), nn.ReLU()]
                channels = layer[0]

    @classmethod
    def from_file(
        cls, file: str | Path, layout: str = "vgg16", resize: int | None = None, average_pool: bool = False
    ) -> LPIPS:
        """From one safetensors file with the tensors of features and heads; float32, eval, without gradients.

        Raises:
            UserError: there is no such file, or it is of another layout.
        """
        path, network = resolve(file), cls(layout, resize, average_pool)
        if not path.is_file():
            raise UserError("There are no LPIPS weights here", where="lpips", given=file, fix=DOWNLOAD)
        if rank0.reads():
            wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
            weights = {name: tensor.to(torch.float32) for name, tensor in load_file(str(path)).items()}
            if {name: tensor.shape for name, tensor in weights.items()} != wanted:
                what = f"The file does not hold LPIPS weights of the layout {layout}"
                raise UserError(what, given=file, fix=DOWNLOAD)
            network.load_state_dict(weights)
        network.identity = rank0.agreed(lambda: f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}")
        return network.eval().requires_grad_(False)

    def stages(self, images: Tensor) -> list[Tensor]:
        """Pictures in [-1, 1] -> the features of each stage."""
        x = images
        if self.resize is not None:
            x = interpolate(x, size=(self.resize, self.resize), mode="bilinear", align_corners=False)
        x = (x - x.new_tensor(MEAN).view(1, 3, 1, 1)) / x.new_tensor(STD).view(1, 3, 1, 1)
        found = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                found.append(x)
        return found

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances [B] of pictures [B, 3, H, W] in [-1, 1]; they are not clamped, so gradients stay."""
        pairs = zip(self.stages(x), self.stages(y), strict=True)
        parts = [getattr(self, f"lin{k}")(unit_distance(a, b)).mean((1, 2, 3)) for k, (a, b) in enumerate(pairs)]
        return torch.stack(parts).sum(0)


def join_weights(features: str | Path, heads: str | Path, out: str | Path) -> None:
    """Joins torchvision's features and LPIPS' heads (both .pth) into the safetensors file that `LPIPS` reads."""
    trunk = torch.load(features, map_location="cpu", weights_only=True)
    weights = {name: tensor for name, tensor in trunk.items() if name.startswith("features.")}
    weights.update(torch.load(heads, map_location="cpu", weights_only=True))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, str(out))


@dataclass(frozen=True)
class PerceptualConfig:
    """Sizes of the stand-in.

    Args:
        widths: channels at full, half and quarter resolution.
        grid, shapes, colours, max_count: of the scenes it is trained to read, as those of ClassifierConfig.
    """

    widths: tuple[int, int, int] = (24, 48, 64)
    grid: int = 3
    shapes: int = 4
    colours: int = 8
    max_count: int = 3


class PerceptualNetwork(nn.Module):
    """A small network of plain convolutions without normalisation, trained on shapes: about 0.1 M parameters.

    Its architecture and seed differ from those of the metric classifier, so that a loss on it is no training on the
    metric. `classify` serves its own training.
    """

    name = "perceptual"

    def __init__(self, config: PerceptualConfig | None = None):
        super().__init__()
        self.config = config or PerceptualConfig()
        inputs = (3, *self.config.widths)
        self.scales = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.Conv2d(b, b, 3, padding=1), nn.ReLU())
            for a, b in pairwise(inputs)
        )
        self.pool = nn.AvgPool2d(2)
        width = inputs[-1]
        self.shape = nn.Linear(width, self.config.shapes + 1)
        self.colour = nn.Linear(width, self.config.colours + 1)
        self.count = nn.Linear(width, self.config.max_count + 1)
        self.identity = "untrained"

    def stages(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] in [-1, 1] -> features at full, half and quarter resolution."""
        x, found = images, []
        for i, scale in enumerate(self.scales):
            x = scale(self.pool(x) if i else x)
            found.append(x)
        return found

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances [B] of pictures [B, 3, H, W] in [-1, 1]."""
        pairs = zip(self.stages(x), self.stages(y), strict=True)
        return torch.stack([unit_distance(a, b).sum(1).mean((1, 2)) for a, b in pairs]).sum(0)

    def classify(self, images: Tensor) -> Scores:
        """[B, 3, H, W] in [-1, 1] -> logits per cell and of the count, for its training."""
        last = self.stages(images)[-1]
        cells = adaptive_avg_pool2d(last, self.config.grid).flatten(2).transpose(1, 2)
        return Scores(self.shape(cells), self.colour(cells), self.count(last.mean((2, 3))))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors (float16)."""
        save_network(self, self.config, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> PerceptualNetwork:
        """Reads a folder, found from the working directory or beside train.py; float32, eval, without gradients.

        Raises:
            UserError: there is no such network in the folder; the metric classifier is refused too.
        """
        path = resolve(folder)
        facts = json.loads((path / CONFIG).read_text()) if (path / CONFIG).is_file() else {}
        if facts.pop("_class_name", None) != cls.__name__:
            raise UserError(
                "There is no perceptual network in this folder",
                given=folder,
                allowed=f"{CONFIG} of a {cls.__name__} and {WEIGHTS}",
                fix="assets/tiny/classifier judges, and is no perceptual network",
            )
        network = cls(PerceptualConfig(**{**facts, "widths": tuple(facts["widths"])}))
        if rank0.reads():
            network.load_state_dict({name: t.to(torch.float32) for name, t in load_file(str(path / WEIGHTS)).items()})
        network.identity = folder_identity(path)
        return network.eval().requires_grad_(False)
