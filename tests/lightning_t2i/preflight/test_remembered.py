"""Operations that are remembered return what they would have returned."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_t2i.preflight.remembered import Remembered

OPERATIONS = {
    "new": lambda x: x @ x.t(),
    "promoted": lambda x: x + x.double(),
    "keyword": lambda x: torch.zeros_like(x, dtype=torch.int64),
    "two outputs": lambda x: x.max(1),
    "norm": lambda x: torch.nn.functional.layer_norm(x, (6,)),
    "view": lambda x: x.view(2, 2, 6),
    "offset": lambda x: x[1:, 2:],
    "views": lambda x: x.split(2, 1),
    "transposed": lambda x: x.transpose(0, 1),
    "in a list": lambda x: torch.cat([x, x[:, :2]], 1),
}


class Counting(TorchDispatchMode):
    """Counts what comes down to it."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        Counting.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_second_call_returns_what_the_first_did_and_is_not_made(name):
    def about(out):
        tensors = (out,) if isinstance(out, torch.Tensor) else tuple(out)
        return [
            (o.shape, o.stride(), o.storage_offset(), o.dtype, o.device, o.is_contiguous()) for o in tensors
        ], tensors

    with FakeTensorMode(), torch.no_grad():
        x, y = torch.zeros(4, 6), torch.zeros(4, 6)
        plain, outputs = about(OPERATIONS[name](x))
        aliases = [o.untyped_storage()._cdata == x.untyped_storage()._cdata for o in outputs]
        with Counting(), Remembered():
            first, _ = about(OPERATIONS[name](x))
            before, Counting.calls = Counting.calls, 0
            second, made = about(OPERATIONS[name](y))
    assert before and not Counting.calls
    assert plain == first == second
    assert aliases == [o.untyped_storage()._cdata == y.untyped_storage()._cdata for o in made]


def test_what_goes_in_is_told_apart():
    with FakeTensorMode(), Remembered():
        x = torch.zeros(4, 6)
        for scale, dtype in ((2, torch.float32), (2, torch.int64), (2.0, torch.float32), (2.0, torch.int64)):
            assert (x.to(dtype) * scale).dtype == (torch.zeros(1, dtype=dtype) * scale).dtype
        assert x.sum(0).shape == (6,) and x.sum(1).shape == (4,) and x[2:].t().stride() == x[1:3].t().stride() == (1, 6)
        assert [x[i:].storage_offset() for i in range(3)] == [0, 6, 12]
        assert x.t().contiguous().stride() == (4, 1) != x.t().clone().stride()


def test_changes_of_values_alone_are_left_out():
    with FakeTensorMode(), Counting(), Remembered():
        x, y = torch.zeros(4, 6), torch.zeros(6)
        Counting.calls = 0
        torch._foreach_add_([x], 1)
        assert x.mul_(2) is x and not Counting.calls
        y.resize_(12)
        assert y.shape == (12,) and Counting.calls
    real = torch.zeros(2)
    with Remembered():
        assert real.add_(1).tolist() == [1, 1]


def test_gradients_flow_through_what_was_made():
    with FakeTensorMode(), Remembered():
        for _ in range(2):
            weight = torch.zeros(6, 3, requires_grad=True)
            (torch.zeros(4, 6) @ weight).view(2, 6).square().mean().backward()
            assert weight.grad.shape == weight.shape
