"""What takes the place of weights, tokenizers and draws while a method is built and run on fake tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.networks import load
from lightning_t2i.paths import resolve
from lightning_t2i.preflight.known import KNOWN, Files
from lightning_t2i.processes import timesteps
from lightning_t2i.streamed import read_header

LONGEST = 10**9  # what a tokenizer that says nothing takes, as transformers' own


@dataclass
class Noted:
    """What was met on the way.

    absent: model folders, hub ids and files of weights that are not here, whose architecture is known from elsewhere;
    last: which end of its range a draw takes that is the same for all samples, so that a method may branch on it;
    branched: whether there was such a draw.
    """

    absent: set[str] = field(default_factory=set)
    last: bool = False
    branched: bool = False


@contextmanager
def stand_ins(noted: Noted) -> Iterator[None]:
    """Networks have their architecture and no weights, tokenizers give full length, draws have shapes alone."""
    import transformers

    from lightning_t2i.networks import classifier, perceptual
    from lightning_t2i.networks.perceptual import LPIPS

    read, known = load.read_json, dict[str, Files]()

    def read_json(path: str | Path, name: str, revision: str | None = None) -> dict[str, Any] | None:
        source = str(path)
        if source in known:
            return known[source].get(name)
        try:
            return read(path, name, revision)
        except UserError:
            if source not in KNOWN:
                raise
        noted.absent.add(source)
        return known.setdefault(source, KNOWN[source]()).get(name)

    def from_file(cls: Any, file: Any, layout: str = "vgg16", resize: int | None = None, average_pool: bool = False):
        if not resolve(file).is_file():
            noted.absent.add(str(file))
        return cls(layout, resize, average_pool).eval().requires_grad_(False)

    tokenizers: Any = transformers.PreTrainedTokenizerBase
    real = tokenizers.from_pretrained.__func__

    def from_pretrained(cls: Any, path: Any, *_: Any, revision: str | None = None, subfolder: str = "", **__: Any):
        about = load.read_json(path, f"{subfolder}/tokenizer_config.json".lstrip("/"), revision) or {}
        place = None if str(path) in noted.absent else partial(real, cls, path, revision=revision, subfolder=subfolder)
        return Tokenizer(about.get("model_max_length", LONGEST), place)

    with ExitStack() as stack:
        # What is not in the cache is not waited for: `fetch` has asked the hub before, where that was wanted.
        stack.enter_context(patch("huggingface_hub.constants.HF_HUB_OFFLINE", True))
        stack.enter_context(patch.object(load, "read_json", read_json))
        # As a process builds networks whose weights another one reads, but on fake tensors.
        build = SimpleNamespace(reads=lambda: False, without_weights=lambda make: make())
        stack.enter_context(patch.object(load, "rank0", build))
        stack.enter_context(patch.object(load, "locate", _anywhere(load.locate)))
        stack.enter_context(patch.object(LPIPS, "from_file", classmethod(from_file)))
        for module in (classifier, perceptual):  # safetensors cannot make fake tensors
            stack.enter_context(patch.object(module, "load_file", _shapes))
        stack.enter_context(patch.object(nn.Module, "_apply", _converted))
        stack.enter_context(patch.object(Tensor, "__deepcopy__", _copied))
        stack.enter_context(patch.object(tokenizers, "from_pretrained", classmethod(from_pretrained)))
        stack.enter_context(patch.object(timesteps, "inverse_normal_cdf", torch.zeros_like))  # asks where the tails are
        stack.enter_context(patch.object(torch, "bincount", _counts))
        if "bitsandbytes" in sys.modules:  # its tables of quantised values are computed from values
            table = "bitsandbytes.functional.create_dynamic_map"
            stack.enter_context(patch(table, lambda *_, **__: torch.zeros(256)))
        for name, draw in _draws(noted).items():
            stack.enter_context(patch.object(Keys, name, draw))
        yield


def _shapes(file: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file without their values."""
    entries, _ = read_header(Path(file))
    return {name: torch.zeros(entry.shape, dtype=entry.dtype) for name, entry in entries.items()}


def _converted(module: nn.Module, convert: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which swaps tensors in place; fake ones do not let themselves be swapped."""
    changed: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in changed:
                with torch.no_grad():
                    new = convert(parameter)
                same = new is parameter or new.dtype == parameter.dtype
                changed[id(parameter)] = parameter if same else nn.Parameter(new, parameter.requires_grad)
            child._parameters[name] = changed[id(parameter)]
        for name, buffer in child._buffers.items():
            child._buffers[name] = None if buffer is None else convert(buffer)
    return module


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """`Tensor.__deepcopy__`, which copies the storage: of a fake one there is none, and none can be made beside it."""
    copy = tensor.detach().clone()
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def _counts(values: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    """`torch.bincount`, whose length depends on values where they exceed `minlength`."""
    return torch.zeros(minlength, dtype=torch.int64 if weights is None else torch.float64)


def _anywhere(locate: Any) -> Any:
    """A folder that is still to be made is no mistake while only its architecture is asked for."""
    return lambda path: str(path) if str(path) in KNOWN else locate(path)


class Tokenizer:
    """Gives tokens without values, all attended: as many as fit, or as the longest of known captions has.

    Args:
        model_max_length: tokens that fit.
        real: makes the tokenizer that it stands for; None where that is not here.
    """

    def __init__(self, model_max_length: int, real: Callable[[], Any] | None = None):
        self.model_max_length, self._real = model_max_length, real

    def __call__(
        self, captions: list[str], padding: str = "max_length", max_length: int = LONGEST, **unused: Any
    ) -> dict[str, Tensor]:
        length = min(max_length, self.model_max_length)
        if padding == "longest":
            length = max(self.counts(captions, length))
        tokens = torch.zeros(len(captions), length, dtype=torch.int64)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def counts(self, captions: list[str], most: int) -> list[int]:
        """Tokens of each caption, cut at `most`, which is also the number where nobody knows."""
        if not all(captions) or self._real is None:
            return [most] * len(captions)
        return [min(len(tokens), most) for tokens in self._real()(captions)["input_ids"]]


def _draws(noted: Noted) -> dict[str, Any]:
    """Stand-ins of the methods of Keys, which computes on values that fake tensors do not have."""

    def words(keys: Keys, stream: str, positions: Tensor, count: int) -> Tensor:
        return torch.zeros(len(positions), count, dtype=torch.int64)

    def real(keys: Keys, stream: str, positions: Tensor, shape: tuple[int, ...] = (), dtype: Any = torch.float32):
        return torch.zeros(len(positions), *shape, dtype=dtype)

    def integers(keys: Keys, stream: str, positions: Tensor, low: int, high: int, shape: tuple[int, ...] = ()):
        if len(positions) == 1 and not shape and stream != "label":
            noted.branched = noted.branched or high - low > 1
            return torch.tensor([high - 1 if noted.last else low])
        return torch.zeros(len(positions), *shape, dtype=torch.int64)

    def bernoulli(keys: Keys, stream: str, positions: Tensor, p: float) -> Tensor:
        return torch.zeros(len(positions), dtype=torch.bool)

    return {"words": words, "uniform": real, "normal": real, "integers": integers, "bernoulli": bernoulli}
