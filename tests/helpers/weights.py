"""Bits of networks."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weights_hash(network: nn.Module) -> str:
    """Hash over all parameters and buffers of an unsharded network; equal hashes mean equal bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
