"""What tests of caching schedules share: small PixArt and FLUX denoisers, random schedules, a small search."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import tiny_networks
import torch
from torch import Tensor
from toy import trainer_for

from datamodules.prompts import Prompts
from datamodules.streams import Streams
from lightning_modules.ecad import ECAD
from lightning_t2i.caching import Layout, Schedule
from lightning_t2i.caching.rewards import Reward
from lightning_t2i.caching.search import SearchOptions
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.options import MethodOptions
from lightning_t2i.processes import DDPM, RectifiedFlow, sample

FAMILIES = ("pixart", "flux")
STEPS = 5


def denoiser(family: str) -> Denoiser:
    """Of 4 x 8 x 8 latents; PixArt has 2 blocks, FLUX 1 + 2."""
    process = DDPM() if family == "pixart" else RectifiedFlow()
    network = tiny_networks.backbone(family)
    if family == "flux":
        config = {**network.config, "num_single_layers": 2, "guidance_embeds": False}
        torch.manual_seed(3)
        network = type(network).from_config(config).eval()
    for parameter in network.parameters():  # gates and tables of a new network are small
        torch.nn.init.normal_(parameter, std=0.15)
    return Denoiser(network.requires_grad_(False), process, "eps" if family == "pixart" else "velocity")


def times(network: Denoiser, steps: int = STEPS) -> Callable[[], Tensor]:
    return lambda: network.process.timesteps(steps)[:-1]


def run(network: Denoiser, batch: int = 2, seed: int = 0, solver: str | None = None, steps: int = STEPS) -> Tensor:
    """Guided latents [B, 4, 8, 8]; those of a seed begin with equal noise."""
    z = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    kind = solver or ("dpmpp_2m" if isinstance(network.process, DDPM) else "euler")
    return sample(network, z, tiny_networks.condition(batch), steps, 3.0, kind)


def random_schedule(layout: Layout, seed: int, share: float = 0.5, steps: int = STEPS) -> Schedule:
    rows = np.random.default_rng(seed).random((steps, layout.width)) < share
    return Schedule(rows, layout).canonical()


class Stripes(Reward):
    """Prefers pictures near a fixed pattern: a reward without a network, that differs from picture to picture."""

    def __call__(self, images: Tensor, records: Any) -> Tensor:
        goal = torch.linspace(-1, 1, images[0].numel()).view(images.shape[1:])
        return -(images - goal).square().flatten(1).double().mean(1)


def prompts(folder: Path, n: int = 4) -> str:
    file = folder / "prompts.txt"
    file.write_text("".join(f"{word}\n" for word in tiny_networks.WORDS[:n]))
    return str(file)


def pipeline(folder: Path, family: str = "pixart") -> str:
    """A pipeline folder whose schedules matter: all weights of its transformer are large."""
    tiny_networks.pipeline_folder(folder, family, None if family == "pixart" else _flow())
    denoiser(family).backbone.save_pretrained(folder / "transformer")
    return str(folder)


def _flow() -> Any:
    import diffusers

    return diffusers.FlowMatchEulerDiscreteScheduler()


def method(network: str, **options: Any) -> ECAD:
    """A search on 4 prompts x 2 seeds."""
    search = {"population": 6, **options.pop("search", {})}
    common = MethodOptions(seed=options.pop("seed", 0), log_every=1)
    given: dict[str, Any] = {"steps": 4, "seeds": 2, "micro_batch": 4, "guidance": 3.0, "size": 16, **options}
    if "flux" in network:
        given.setdefault("solver", "euler")
    return ECAD(network, reward=Stripes(), judge=Stripes(), search=SearchOptions(**search), common=common, **given)


def data(folder: Path, batch: int = 8, n: int = 4) -> Streams:
    file = prompts(folder, n)
    return Streams(main=Prompts(file, batch_size=batch), val=Prompts(file, batch_size=4, limit=4))


def fit(folder: Path, module: ECAD, generations: int, ends: bool = False, **options: Any) -> L.Trainer:
    """Searches; only where it `ends` with comparisons and plots, which take longer than the search."""
    if not ends:
        module.finish = lambda: None
    folder.mkdir(parents=True, exist_ok=True)
    resume = options.pop("resume", None)
    trainer = trainer_for(folder, generations, **options)
    trainer.fit(module, data(folder), ckpt_path=resume, weights_only=True)
    return trainer
