"""Reads EDM's published network snapshots (network-snapshot-*.pkl, edm-*.pkl) without running what is inside.

A snapshot is a plain pickle: a dict whose `ema` is a network, each of its modules saved as (source code, class name,
attributes) and rebuilt by running that source. Here the source is never run and never looked at: an unpickler with a
short list of allowed names rebuilds tensors, numbers and containers, modules become plain records of their attributes,
and any other name is refused. Tensor storages, pickles of their own inside the pickle, are read by torch's
`weights_only` loader.

EDM's published weights are under CC BY-NC-SA 4.0 (not for commercial use); converting them does not change that.

Untested on the real files: the tests use snapshots of the same structure, made for them.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy
import torch
from torch import Tensor

from lightning_t2i.errors import UserError
from lightning_t2i.processes.edm import EDM
from lightning_t2i.processes.schedulers import to_scheduler

LICENCE = "CC BY-NC-SA 4.0"

# Published argument -> ours. Left out: label_dropout, which is a matter of the conditions here.
ARGUMENTS = {
    "img_resolution": "sample_size",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "label_dim": "num_classes",
    "augment_dim": "augment_dim",
    "model_channels": "channels",
    "channel_mult": "channel_mult",
    "channel_mult_emb": "embedding_mult",
    "channel_mult_noise": "noise_mult",
    "num_blocks": "blocks",
    "attn_resolutions": "attention_sizes",
    "dropout": "dropout",
    "embedding_type": "embedding",
}
FIXED = {"encoder_type": "standard", "decoder_type": "standard", "resample_filter": [1, 1]}
# Published parts of tensor names -> ours, for the network and inside a block.
NETWORK_NAMES = {
    "enc": "encoder",
    "dec": "decoder",
    "map_noise.freqs": "noise.frequencies",
    "map_label": "label_embedding",
    "map_augment": "augment_embedding",
    "map_layer0": "embed1",
    "map_layer1": "embed2",
}
BLOCK_NAMES = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "embedding",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "skip",
    "norm2": "attention.norm",
    "qkv": "attention.qkv",
    "proj": "attention.out",
}
OUTPUT_NAMES = {"aux_norm": "out_norm", "aux_conv": "out_conv"}  # last parts of the decoder in DDPM++


@dataclass
class Snapshot:
    """What a file holds.

    network: published class name, SongUNet or DhariwalUNet; arguments: those it was made with; tensors: published
    name -> tensor; sigma_data: of the preconditioning.
    """

    network: str
    arguments: dict[str, Any]
    tensors: dict[str, Tensor]
    sigma_data: float


class Record:
    """A module as data: the name of its class and its attributes. Nothing of the class is run.

    torch's own containers are made by `Record.__new__` and a state, so the defaults stand at the class.
    """

    name = "container"
    attributes: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, name: str, attributes: dict[str, Any]):
        self.name, self.attributes = name, attributes

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.attributes = dict(state)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Parameters and buffers of the module and of those below it, named as in a state dict."""
        found = {}
        for kind in ("_parameters", "_buffers"):
            own = self.attributes.get(kind, {}).items()
            found.update({prefix + name: value.detach() for name, value in own if value is not None})
        for name, child in self.attributes.get("_modules", {}).items():
            if child is not None:
                found.update(child.tensors(f"{prefix}{name}."))
        return found


class Dtype:
    """A numpy number type as data."""

    def __init__(self, code: str, *_flags: Any):
        if code not in ("f4", "f8", "i4", "i8", "b1"):
            raise pickle.UnpicklingError(f"a number of type {code}")
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", "|"):
            raise pickle.UnpicklingError(f"numbers in byte order {state[1]}")


class Call:
    """An allowed function. The wrapper keeps a file from changing the function's attributes."""

    __slots__ = ("function",)

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state for a function")


def _module(meta: dict[str, Any]) -> Record:
    return Record(meta["class_name"], meta["state"])


def _scalar(dtype: Dtype, data: bytes) -> Any:
    return numpy.frombuffer(data, dtype=f"<{dtype.code}", count=1)[0].item()


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


# (module, name) in the file -> what stands for it here; nothing is imported by the names of a file.
ALLOWED: dict[tuple[str, str], Any] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Call(_module),
    ("dnnlib.util", "EasyDict"): dict,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch.nn.modules.container", "ModuleDict"): Record,
    ("torch.nn.modules.container", "ModuleList"): Record,
    ("torch.nn.modules.container", "Sequential"): Record,
    ("torch._utils", "_rebuild_parameter"): Call(lambda data, *_: data),
    ("torch._utils", "_rebuild_tensor_v2"): Call(torch._utils._rebuild_tensor_v2),
    ("torch.storage", "_load_from_bytes"): Call(_storage),
    ("numpy", "dtype"): Dtype,
    ("numpy.core.multiarray", "scalar"): Call(_scalar),
    ("numpy._core.multiarray", "scalar"): Call(_scalar),
}


class DataUnpickler(pickle.Unpickler):
    """Rebuilds what ALLOWED names and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise UserError(
                "The file asks for code that a network snapshot of EDM does not need; nothing of it was run",
                where="--from-edm",
                given=f"{module}.{name}",
                fix="do not trust this file",
            )
        return ALLOWED[module, name]


def read_snapshot(file: str | Path) -> Snapshot:
    """Network, arguments and tensors of a snapshot; the averaged network (`ema`) is taken.

    Raises:
        UserError: no such file, not a snapshot of an EDM-preconditioned network, or names that are not allowed.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError("No such file", where="--from-edm", given=path)
    try:
        with path.open("rb") as stream:
            outer = DataUnpickler(stream).load()["ema"]
        attributes, inner = outer.attributes, outer.attributes["_modules"]["model"]
        if outer.name != "EDMPrecond" or inner.attributes["_init_args"]:
            raise ValueError(f"a {outer.name}")
        arguments, sigma_data = dict(inner.attributes["_init_kwargs"]), float(attributes["sigma_data"])
        return Snapshot(inner.name, arguments, inner.tensors(), sigma_data)
    except UserError:
        raise
    except Exception as error:  # what a damaged or foreign pickle raises has no bounds
        raise UserError(
            "Not a network snapshot of EDM",
            where="--from-edm",
            given=f"{path} ({type(error).__name__}: {error})",
            allowed="a pickle with an EDM-preconditioned network under 'ema'",
            fix="take a file of EDM's release, such as edm-cifar10-32x32-cond-vp.pkl",
        ) from error


def architecture(snapshot: Snapshot) -> dict[str, Any]:
    """Our config of the snapshot's network.

    Raises:
        UserError: a network that `edm_unets` does not build.
    """
    if snapshot.network not in ("SongUNet", "DhariwalUNet"):
        raise _unsupported("network", snapshot.network, ("SongUNet", "DhariwalUNet"))
    if snapshot.sigma_data != 0.5:
        raise _unsupported("sigma_data", snapshot.sigma_data, (0.5,))
    config: dict[str, Any] = {"_class_name": snapshot.network}
    for name, value in snapshot.arguments.items():
        if name in FIXED:
            if value != FIXED[name]:
                raise _unsupported(name, value, (FIXED[name],))
        elif name in ARGUMENTS:
            config[ARGUMENTS[name]] = value
        elif name != "label_dropout":
            raise _unsupported(name, value, tuple(ARGUMENTS))
    return config


def our_name(name: str) -> str | None:
    """Our name of a published tensor; None for resampling filters, which are fixed here."""
    if name.endswith(".resample_filter"):
        return None
    for theirs, ours in NETWORK_NAMES.items():
        if name.startswith(f"{theirs}.") or name == theirs:
            name = ours + name.removeprefix(theirs)
            break
    parts = name.split(".")
    if parts[0] not in ("encoder", "decoder"):
        return name
    for theirs, ours in OUTPUT_NAMES.items():
        if parts[1].endswith(theirs):
            return ".".join([ours, *parts[2:]])
    if len(parts) == 4:  # a tensor of a layer of a block; the first convolution has no layers
        parts[2] = BLOCK_NAMES.get(parts[2], parts[2])
    return ".".join(parts)


def convert_snapshot(file: str | Path, folder: str | Path) -> None:
    """Writes the averaged network as a model folder: safetensors, config.json, a scheduler and the licence.

    `Denoiser.from_pretrained(folder)` reads it as an EDM-preconditioned denoiser of pixels.

    Raises:
        UserError: see `read_snapshot` and `architecture`, or tensors that do not fit the arguments.
    """
    from lightning_t2i.networks.load import build_network

    snapshot = read_snapshot(file)
    config = architecture(snapshot)
    weights = {our_name(name): tensor.float() for name, tensor in snapshot.tensors.items() if our_name(name)}
    try:
        network: Any = build_network(config)
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            "The snapshot's tensors do not fit the arguments it was made with", where="--from-edm", given=str(error)
        ) from error
    out = Path(folder)
    network.save_pretrained(out, safe_serialization=True)
    to_scheduler(EDM(), "edm", snapshot.sigma_data).save_pretrained(out / "scheduler")
    text = f"{snapshot.network} converted from {Path(file).name}.\n\nEDM's published weights are under {LICENCE}.\n"
    (out / "README.md").write_text(text, encoding="utf-8")


def _unsupported(name: str, value: Any, allowed: tuple) -> UserError:
    return UserError(f"EDM networks of this {name} are not supported", where=name, given=value, allowed=allowed)
