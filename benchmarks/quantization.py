"""What 4- and 8-bit frozen networks cost in accuracy and save in memory, on the teacher of configs/dmd/tiny.yaml.

    python -m benchmarks --only quantization

x are pictures of the one-step student assets/tiny/dmd for captions of the stored pairs. They are noised to a time t and
given to the teacher with whole and with quantised weights: its conditional x0, and the gradient of distribution
matching g = (fake - real) / w with guidance 4.5. The fake network is the teacher's early state (sd/unet_early), whole
in each case, so that only the real estimate changes. Errors are |quantised - whole| / |whole|; the cosine is that of g
with quantised and with whole weights, over all values of the batch.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.dmd import matching_gradient
from lightning_t2i.cli.session import quiet
from lightning_t2i.distillation import Pipeline
from lightning_t2i.keys import Keys
from lightning_t2i.networks.build import build_network
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.processes import guided
from lightning_t2i.quantization import Bits, quantize_frozen, quantized_share

TEACHER, STUDENT, PAIRS, GUIDANCE = "assets/tiny/sd", "assets/tiny/dmd", "assets/tiny/pairs", 4.5
FORMATS: tuple[Bits, ...] = ("nf4", "int8")
TIMES = (50, 250, 500, 750, 950)
STUDENT_T = 649  # of configs/dmd/tiny.yaml
PAPERS = {"SD 1.5 U-Net": "sd15_unet", "SDXL U-Net": "sdxl_unet", "PixArt-alpha": "pixart_alpha_512"}
PAPERS |= {"FLUX.1-dev": "flux1_dev"}
ERRORS = [
    ["weights of the U-Net", ""],
    ["t of 999", "d"],
    ["error of x0", ".2%"],
    ["error of g", ".1%"],
    ["cosine of g", ".4f"],
]
SIZES = [["network", ""], ["parameters", ",d"], ["in Linear layers", ".1%"], ["whole, MB", ",.2f"], ["nf4, MB", ",.2f"]]
SIZES += [["int8, MB", ",.2f"], ["error of its output, nf4", ".2%"], ["int8", ".2%"]]
SHARES = [["network", ""], ["parameters", ",d"], ["in Linear layers", ".1%"]]


def error(found: Tensor, whole: Tensor) -> float:
    return float((found - whole).norm() / whole.norm())


def size(network: nn.Module) -> float:
    """Megabytes of weights, scales of quantised ones included."""
    total = sum(p.numel() * p.element_size() for p in network.parameters())
    for parameter in network.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:  # the scales are quantised as well
            tensors = (state.absmax, state.code, state.state2.absmax, state.state2.code)
            total += sum(t.numel() * t.element_size() for t in tensors)
        if getattr(parameter, "SCB", None) is not None:
            total += parameter.SCB.numel() * parameter.SCB.element_size()
    return total / 1e6


@torch.no_grad()
def budget(samples: int) -> tuple[list[list[Any]], list[list[Any]]]:
    """Rows of ERRORS and of SIZES."""
    from datamodules.pairs import Pairs

    pairs = Pairs(PAIRS, teacher=TEACHER, guidance=GUIDANCE, batch_size=samples)
    pairs.setup()
    pairs.begin(0, "pairs")
    records = pairs.load(range(samples), 0)
    pipeline, keys, places = Pipeline.load(TEACHER, guidance=GUIDANCE), Keys(0), records.position
    real, process = pipeline.denoiser.requires_grad_(False).eval(), pipeline.denoiser.process
    assert pipeline.text is not None
    text = pipeline.text.requires_grad_(False).eval()
    fake = Denoiser.from_pretrained(TEACHER, subfolder="unet_early").eval()
    student = Denoiser.from_pretrained(STUDENT).eval()
    cond = text(records.caption)
    z = keys.normal("z", places, pipeline.shape)
    x = student.x0(z, torch.full((samples,), STUDENT_T), cond)
    networks: dict[Bits, nn.Module] = {bits: quantize_frozen(copy.deepcopy(real), bits) for bits in FORMATS}
    texts: dict[Bits, nn.Module] = {bits: quantize_frozen(copy.deepcopy(text), bits) for bits in FORMATS}
    errors = []
    for bits in FORMATS:
        for time in TIMES:
            t = torch.full((samples,), time)
            x_t = process.add_noise(x, keys.normal("eps", places, pipeline.shape), t)
            x0, g = {}, {}
            for name, network in (("whole", real), (bits, networks[bits])):
                x0[name] = network.x0(x_t, t, cond)
                estimate = guided(network.x0, x_t, t, cond, GUIDANCE)
                weights = process.alpha_sigma(t, torch.float64)
                g[name] = matching_gradient(x, estimate, fake.x0(x_t, t, cond), *weights, "dmd").flatten().double()
            cosine = float(nn.functional.cosine_similarity(g[bits], g["whole"], dim=0))
            errors.append([bits, time, error(x0[bits], x0["whole"]), error(g[bits], g["whole"]), cosine])
    row = [error(n.x0(x_t, t, cond), x0["whole"]) for n in networks.values()]
    sizes = [facts("U-Net of assets/tiny/sd, t = 950", real, networks, row)]
    row = [error(n(records.caption).embeds, cond.embeds) for n in texts.values()]
    sizes.append(facts("its text encoder", text, texts, row))
    return errors, sizes


def facts(name: str, whole: nn.Module, quantized: dict[Bits, nn.Module], errors: list[float]) -> list[Any]:
    count = sum(p.numel() for p in whole.parameters())
    return [name, count, quantized_share(whole), size(whole), *map(size, quantized.values()), *errors]


def shares() -> list[list[Any]]:
    """Rows of SHARES, on networks without weights."""
    rows = []
    for name, file in PAPERS.items():
        with torch.device("meta"):
            network = build_network(f"configs/networks/{file}.json")
        rows.append([name, sum(p.numel() for p in network.parameters()), quantized_share(network)])
    return rows


def measure(quick: bool = False) -> dict[str, Any]:
    """Errors, sizes and shares of quantised weights."""
    quiet()
    errors, sizes = budget(8 if quick else 256)
    tables = [{"columns": ERRORS, "rows": errors}, {"columns": SIZES, "rows": sizes}]
    return {"title": "Frozen networks in 4 and 8 bits", "tables": [*tables, {"columns": SHARES, "rows": shares()}]}
