"""Where a group's tensors are: meta parameters stand for those of a GPU."""

import pytest
import torch
from torch import nn

from lightning_t2i.group import Group
from lightning_t2i.options import GroupOptions


class Scaled(nn.Module):
    """A parameter without dimensions is shaped like its step count."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 2), nn.Parameter(torch.ones(()))


def group(device: str = "cpu", **options: bool) -> Group:
    made = Group("net", Scaled().to(device), GroupOptions(lambda p: torch.optim.AdamW(p, **options)))
    made.build()
    return made


@pytest.mark.parametrize("capturable", [True, False])
def test_optimizer_states_come_back_to_the_device_where_torch_keeps_them(capturable):
    trained = group()
    for parameter in trained.parameters:
        parameter.grad = torch.ones_like(parameter)
    trained.step(trained.gradient_norm())
    state = trained.state()
    state["settings"][0]["capturable"] = capturable
    resumed = group("meta", capturable=capturable)
    resumed.load(state)
    for name, parameter in zip(resumed.names, resumed.parameters, strict=True):
        devices = {k: v.device.type for k, v in resumed.optimizer.state[parameter].items()}
        assert devices == {"step": "meta" if capturable else "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}, name


def test_the_norm_of_no_gradients_is_with_the_parameters():
    assert group("meta").gradient_norm().device.type == "meta"
    resting = group()
    assert resting.gradient_norm() == 0
    resting.step(resting.gradient_norm())
    assert resting.updates == 1
