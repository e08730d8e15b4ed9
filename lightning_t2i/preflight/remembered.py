"""What operations on fake tensors return, remembered by the shapes that go in: networks repeat their blocks.

Fake tensors have a cache of their own, whose keys and outputs serve every case and take most of the time. This one
serves what most operations are: they return new tensors or views of their first argument. Operations in place on fake
tensors are left out: they would change values, and there are none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.ops.prim.device.default
KEPT = ("aten::set_", "aten::resize_", "aten::resize_as_")  # work in place and change more than values
UNSURE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor with a storage of its own, or a view that begins at `offset` of the first argument's."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    view: bool
    dtype: torch.dtype
    device: torch.device


class Remembered(TorchDispatchMode):
    """Calls operations, or makes what they returned for the same arguments; while entered, those of others too."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[Any, Any] = {}  # key -> Made, a tuple of Made and None, or False: call it each time
        self._kinds: dict[Any, str | None] = {}

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `func` returns."""
        if func not in self._kinds:
            self._kinds[func] = kind_of(func)
        kind = self._kinds[func]
        if not args or kind is None:
            return func(*args, **kwargs)
        first = args[0][0] if isinstance(args[0], list | tuple) and args[0] else args[0]
        if type(first) is not FakeTensor or first.constant is not None:
            return func(*args, **kwargs)
        if kind == "values":
            return args[0] if isinstance(args[0], Tensor) else None
        try:
            key = (func, _key(args), _key(kwargs.items()), torch.get_default_dtype())
            made = self._made.get(key)
        except TypeError:  # a tensor that is not fake, or what has no hash
            return func(*args, **kwargs)
        if made is None:
            out = func(*args, **kwargs)
            self._made[key] = _made(func, out, args, kwargs)
            return out
        if made is False:
            return func(*args, **kwargs)
        mode = first.fake_mode
        with in_kernel_invocation_manager(mode):
            if isinstance(made, Made):
                return _make(mode, made, first)
            return tuple(m and _make(mode, m, first) for m in made)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard against it costs as much as the rest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE and isinstance(args[0], FakeTensor):  # half of all calls; this is the whole answer
            return args[0].fake_device
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own code runs, and what that calls comes here again
        return self(func, args, kwargs or {})


def kind_of(func: Any) -> str | None:
    """ "values" of an operation that changes nothing else, "shapes" of one that can be remembered, or None."""
    return "values" if changes_only_values(func) else "shapes" if depends_on_shapes(func) else None


def changes_only_values(func: Any) -> bool:
    """Whether an operation changes the values of its first argument and does nothing else."""
    if getattr(func, "namespace", None) != "aten" or torch.Tag.inplace_view in func.tags:
        return False
    name = func._schema.name
    return bool(name.endswith("_") and func._schema.is_mutable and name not in KEPT)


def depends_on_shapes(func: Any) -> bool:
    """Whether an operation's outputs do, and are new or views of its first argument, by its declaration."""
    if getattr(func, "namespace", None) != "aten" or func._schema.is_mutable or UNSURE & set(func.tags):
        return False
    if func.is_view:  # composed ones may copy
        composed = torch._C.DispatchKey.CompositeImplicitAutograd
        return not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), composed)
    return all(value.alias_info is None for value in (*func._schema.arguments, *func._schema.returns))


def _key(values: Iterable[Any]) -> tuple[Any, ...]:
    """Raises TypeError where a tensor is not fake, or stands for a value."""
    parts: list[Any] = []
    for value in values:
        if type(value) is FakeTensor:
            if value.constant is not None:
                raise TypeError
            parts.append((value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device))
        elif isinstance(value, Tensor):
            raise TypeError
        else:
            parts.append(_key(value) if isinstance(value, list | tuple) else (type(value), value))
    return tuple(parts)


def _made(func: Any, out: Any, args: Any, kwargs: Any) -> Made | tuple[Made | None, ...] | bool:
    """How to make it again; False for what cannot be: other types, and memory that is shared in another way."""
    outputs = (out,) if isinstance(out, Tensor) else out
    if not isinstance(outputs, tuple | list) or not all(o is None or _plain(o) for o in outputs):
        return False
    storages = [o.untyped_storage()._cdata for o in outputs if o is not None]
    given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    if func.is_view:
        alike = set(storages) == {args[0].untyped_storage()._cdata}
    else:
        alike = len(set(storages)) == len(storages) and not given & set(storages)
    if not alike:
        return False
    made = tuple(
        o if o is None else Made(o.shape, o.stride(), o.storage_offset(), func.is_view, o.dtype, o.fake_device)
        for o in outputs
    )
    return made[0] or False if isinstance(out, Tensor) else made


def _plain(tensor: Any) -> bool:
    """Whether shape, strides and type are all of a tensor."""
    if type(tensor) is not FakeTensor or tensor.constant is not None or tensor.requires_grad:
        return False
    return not (tensor.is_conj() or tensor.is_neg()) and tensor.layout == torch.strided


def _make(mode: Any, made: Made, first: FakeTensor) -> FakeTensor:
    out = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta")
    if made.view:
        out.set_(first.untyped_storage(), made.offset, made.shape, made.stride)
    return FakeTensor(mode, out, made.device)
