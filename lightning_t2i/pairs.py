"""Teacher pairs (z, x0): the noise that a seed stands for, and what a teacher is known by.

    noise_seed = 64 bits of Philox("noise_seed"; seed, position)      a pair's own number, stored with it
    z          = N(0, I) from Philox("z"; noise_seed), float32        never stored: drawn again from the number
    x0         = the teacher's deterministic map of z and a condition; it starts from process.initial(z), EDM at 80 z

All draws are keyed (`lightning_t2i.keys`), so that z has the same bits on CPU and GPU, in any batch and on any rank.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from torch import Tensor

from lightning_t2i.frozen import folder_identity
from lightning_t2i.keys import Keys
from lightning_t2i.paths import resolve

LAW = "N(0, I): Philox4x32-10 of the noise seed, inverse normal CDF"  # a cache of another law is stale
PARTS = ("unet", "transformer", "text_encoder", "tokenizer", "scheduler")  # of a pipeline: what x0 depends on


def noise_seeds(seed: int, positions: Tensor) -> Tensor:
    """The noise seeds of the pairs at these positions of a job with this seed: int64 [B] from int64 [B]."""
    words = Keys(seed).fork("pairs").words("noise_seed", positions, 2)
    return words[:, 0] | (words[:, 1] << 32)


def noise(noise_seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The unit Gaussian noise z of pairs: float32 [B, *shape] from int64 [B], on the device of the seeds."""
    return Keys(0).fork("pairs").normal("z", noise_seed, tuple(shape))


def noise_checksum(noise_seed: Tensor, shape: tuple[int, ...]) -> str:
    """sha256 of the bytes of `noise`, to tell whether the noise of stored pairs is drawn again as it was."""
    return hashlib.sha256(noise(noise_seed.cpu(), shape).numpy().astype("<f4").tobytes()).hexdigest()


def teacher_identity(source: str | Path, revision: str | None = None) -> str:
    """What the latents of a teacher are known by: its `folder_identity`, of a pipeline without what x0 does not pass.

    An autoencoder or a score file that is replaced in a pipeline folder leaves its pairs valid.
    """
    folder = resolve(source)
    index = folder / "model_index.json"
    if not index.is_file():
        return folder_identity(folder, revision)
    components = json.loads(index.read_text(encoding="utf-8"))
    parts = sorted(name for name, entry in components.items() if name.startswith(PARTS) and entry[0])
    text = json.dumps([[part, folder_identity(folder / part)] for part in parts])
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
