"""Merging four experts of Stable Diffusion's size: time against that of the disk, and memory.

Five folders hold random weights of the true shapes of Stable Diffusion 1.5's U-Net, in float32. "merge" is
`lightning_t2i.merging.merge_folders` in a process of its own; "disk" reads these five files and writes one, in parts
and without arithmetic, which no merge can beat. Both begin with files that are not cached, where the system lets them
be dropped. "memory" is the most that the process held beyond what it had before; "in memory" is what five models take.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.running import isolated
from callbacks.throughput import resident_peak
from lightning_t2i.keys import Keys
from lightning_t2i.merging import merge_folders
from lightning_t2i.networks.load import build_network, read_architecture
from lightning_t2i.state_io import flush
from lightning_t2i.streamed import write_streamed

NETWORKS = {"full": "configs/networks/sd15_unet.json", "quick": "configs/networks/tiny_sd_unet.json"}
EXPERTS, PART = 4, 16 * 2**20
WEIGHTS = [0.1, 0.1, 0.2, 0.5]
BAR = 2.0  # GB beyond one model
COLUMNS = [
    ["network", ""], ["experts", "d"], ["read, GB", ".2f"], ["written, GB", ".2f"], ["merge, s", ".1f"],
    ["disk, s", ".1f"], ["merge / disk", ".2f"], ["memory, GB", ".2f"], ["in memory, GB", ".1f"], ["under 2 GB", ""],
]  # fmt: skip


def shapes(spec: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    with torch.device("meta"):
        network = build_network(spec)
    return {name: (torch.float32, tuple(p.shape)) for name, p in network.state_dict().items()}


def random_folder(folder: Path, spec: str, seed: int) -> Path:
    """A model folder with random weights; of large tensors a part repeats, since numbers take longer than files."""

    def tensors() -> Iterator[Tensor]:
        block = Keys(seed).normal("weights", torch.arange(4096), (16,)).flatten() / 100
        for _, shape in like.values():
            count = torch.Size(shape).numel()
            yield block.repeat(-(-count // len(block)))[:count].view(shape)

    like = shapes(spec)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(read_architecture(spec)))
    write_streamed(folder / "diffusion_pytorch_model.safetensors", like, tensors(), {"format": "pt"})
    return folder


def uncached(files: list[Path]) -> None:
    """Asks the system to forget what it keeps of files, where it can be asked."""
    if hasattr(os, "posix_fadvise"):
        for file in files:
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk(files: list[Path], target: Path) -> float:
    """Seconds of reading all files and writing as much as the first one has."""
    uncached(files)
    start, part = time.perf_counter(), bytearray(PART)
    with target.open("wb", buffering=0) as out:
        for number, file in enumerate(files):
            with file.open("rb", buffering=0) as stream:
                while count := stream.readinto(part):
                    if number == 0:
                        out.write(memoryview(part)[:count])
    flush(target)
    return time.perf_counter() - start


def merge_alone(out: str, folders: list[str]) -> tuple[float, float]:
    """Seconds of a merge, and the gigabytes that it needed; for a process of its own."""
    base, *experts = map(Path, folders)
    before, start = resident_peak(), time.perf_counter()
    merge_folders(Path(out), base, experts, WEIGHTS[: len(experts)])
    return time.perf_counter() - start, (resident_peak() - before) / 1e9


def measure(quick: bool = False) -> dict[str, Any]:
    """One row; quick: the tiny network."""
    name = "quick" if quick else "full"
    spec = NETWORKS[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base, *experts = (random_folder(folder / str(i), spec, i) for i in range(EXPERTS + 1))
        files = [next(f.glob("*.safetensors")) for f in (base, *experts)]
        size = files[0].stat().st_size
        taken = disk(files, folder / "copy")
        (folder / "copy").unlink()
        uncached(files)
        names = [str(f) for f in (base, *experts)]
        seconds, memory = isolated("benchmarks.merging", "merge_alone", out=str(folder / "out"), folders=names)
    label = Path(spec).stem
    bar = "yes" if memory < BAR else "no"
    row = [label, EXPERTS, (EXPERTS + 1) * size / 1e9, size / 1e9, seconds, taken, seconds / taken, memory]
    return {
        "title": "Merging experts",
        "tables": [{"columns": COLUMNS, "rows": [[*row, (EXPERTS + 1) * size / 1e9, bar]]}],
    }
