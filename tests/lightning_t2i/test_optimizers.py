"""AdamW8bit: bitsandbytes' own steps, states by name and value, exact resume, clear refusals, a fallback that tells."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from toy import DIM, MLP, Toy, ToyData, trainer_for

from callbacks.checkpoints import CheckpointOptions, Checkpoints
from lightning_t2i import optimizers
from lightning_t2i.cli.main import main
from lightning_t2i.errors import UserError
from lightning_t2i.group import Group
from lightning_t2i.optimizers import AdamW8bit
from lightning_t2i.options import EMAOptions, GroupOptions, MethodOptions
from lightning_t2i.proof.compare import differences
from lightning_t2i.schedules import Warmup
from lightning_t2i.state_io import AtomicCheckpointIO
from lightning_t2i.strategies import sharding

WIDTH = 96  # half of a 96 x 96 weight still has the 4096 elements from which on moments take 8 bits


class Wide(Toy):
    """A toy whose blocks are wide enough for 8 bits, on networks of one update a step."""

    def __init__(self, optimizer=AdamW8bit, quantize=None):
        options = partial(
            GroupOptions, partial(optimizer, lr=1e-2), schedule=lambda o: Warmup(o, 3), ema=EMAOptions(0.9)
        )
        super().__init__(MethodOptions(seed=5, quantize=quantize or {}), generator=options(), critic=options())

    def configure_model(self):
        self.add_frozen("scale", nn.Sequential(nn.Linear(DIM, DIM)), "toy:1")
        self.add_group("generator", MLP(DIM, WIDTH, dropout=0.0), self.options["generator"])
        self.add_group("critic", MLP(1, WIDTH, dropout=0.0), self.options["critic"])


def fit(folder: Path, steps: int, resume: Path | None = None, save: Path | None = None, reset=False, **options) -> Wide:
    module = Wide(options.pop("optimizer", AdamW8bit))
    module.reset_optimizer = reset
    trainer = trainer_for(folder, steps, **options)
    trainer.fit(module, ToyData(), ckpt_path=resume, weights_only=True)
    if save is not None:
        trainer.save_checkpoint(save, False)
    return module


def read(folder: Path) -> dict:
    return AtomicCheckpointIO().load_checkpoint(folder)


def bytes_of(optimizer: torch.optim.Optimizer) -> int:
    tensors = [t for entries in optimizer.state.values() for t in entries.values() if isinstance(t, torch.Tensor)]
    return sum(storage.nbytes() for storage in {t.data_ptr(): t.untyped_storage() for t in tensors}.values())


def one_step(optimizer, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    parameter = nn.Parameter(weight.clone())
    made = optimizer([parameter], lr=1e-2, betas=(0.5, 0.9), eps=1e-6, weight_decay=0.1)
    for _ in range(3):
        parameter.grad = gradient.clone()
        made.step()
    return parameter.detach()


def test_it_is_bitsandbytes_own_optimizer():
    import bitsandbytes

    weight, gradient = torch.randn(64, 96), torch.randn(64, 96)
    ours = one_step(AdamW8bit, weight, gradient)
    assert torch.equal(ours, one_step(bitsandbytes.optim.AdamW8bit, weight, gradient))
    whole = one_step(torch.optim.AdamW, weight, gradient)
    assert 0 < (ours - whole).norm() < 0.1 * (whole - weight).norm()


def test_states_take_a_quarter_of_the_bytes():
    sizes = {}
    for make in (AdamW8bit, torch.optim.AdamW):
        parameter = nn.Parameter(torch.randn(1024, 1024))
        parameter.grad = torch.randn_like(parameter)
        optimizer = make([parameter])
        optimizer.step()
        sizes[make] = bytes_of(optimizer)
    assert sizes[torch.optim.AdamW] == 2 * 4 * 2**20 + 4  # two moments and the count of steps
    assert sizes[AdamW8bit] == 2 * 2**20 + 2 * 4 * 2**20 // 256 + 2 * 4 * 256  # moments, a scale for 256, two maps
    assert sizes[AdamW8bit] / sizes[torch.optim.AdamW] == pytest.approx(0.254, abs=1e-3)


def test_a_plan_without_values_has_states_of_the_same_size():
    from torch._subclasses import FakeTensorMode

    def states() -> list:
        parameters = [nn.Parameter(torch.zeros(size)) for size in ((64, 96), (100, 41), (4095,))]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = AdamW8bit(parameters)
        optimizer.step()
        found = [
            {k: v for k, v in optimizer.state[p].items() if k not in ("qmap1", "qmap2", "step")} for p in parameters
        ]
        return [{k: (tuple(v.shape), v.dtype) for k, v in entries.items()} for entries in found]

    with FakeTensorMode():
        planned = states()
    assert planned == states()


def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path):
    fit(tmp_path, 8, save=tmp_path / "whole")
    fit(tmp_path, 4, save=tmp_path / "half")
    fit(tmp_path, 8, tmp_path / "half", tmp_path / "resumed")
    a, b = read(tmp_path / "whole"), read(tmp_path / "resumed")
    assert differences(a["state_dict"], b["state_dict"]) == differences(a["t2i"], b["t2i"]) == []
    critic = a["t2i"]["groups"]["critic"]
    assert (critic["optimizer"], critic["parts"]) == ("AdamW8bit", 1)
    states = critic["states"]
    assert states["blocks.0.linear.weight"]["state1"].dtype == torch.uint8
    assert states["blocks.0.linear.weight"]["qmap1"].shape == (256,)
    assert states["blocks.0.linear.bias"]["state1"].dtype == torch.float32  # 96 values
    assert states["blocks.0.linear.weight"]["step"] == 8


def test_states_of_another_optimizer_are_refused_unless_they_start_anew(tmp_path):
    fit(tmp_path, 4, save=tmp_path / "adam", optimizer=torch.optim.AdamW)
    with pytest.raises(UserError, match=r"AdamW8bit[\s\S]*--reset_optimizer"):
        fit(tmp_path, 8, tmp_path / "adam")
    module = fit(tmp_path, 4, tmp_path / "adam", tmp_path / "same", reset=True)  # no step left: as it was loaded
    a, b = read(tmp_path / "adam"), read(tmp_path / "same")
    assert differences(a["state_dict"], b["state_dict"]) == []  # weights and EMA
    assert a["t2i"]["counters"] == b["t2i"]["counters"]
    group = module.groups["critic"]
    assert group.updates == group.averages.count == 4
    assert group.learning_rate() == a["t2i"]["groups"]["critic"]["settings"][0]["lr"]
    assert not b["t2i"]["groups"]["critic"]["states"]["outside.weight"]
    assert a["t2i"]["groups"]["critic"]["schedule"] == b["t2i"]["groups"]["critic"]["schedule"]


@pytest.mark.parametrize("fault", ["missing", "broken"])
def test_without_bitsandbytes_torchs_adamw_takes_its_place_with_one_warning(monkeypatch, fault):
    if fault == "missing":
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    else:
        import bitsandbytes

        def fails(*_):
            raise RuntimeError("no native library")

        monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "update_step", fails)
    optimizers._works.cache_clear()
    weight, gradient = torch.randn(64, 96), torch.randn(64, 96)
    with pytest.warns(UserWarning, match=r"torch\.optim\.AdamW takes its place") as found:
        ours = [one_step(AdamW8bit, weight, gradient) for _ in range(2)]
    optimizers._works.cache_clear()
    assert len(found) == 1
    assert torch.equal(ours[0], one_step(torch.optim.AdamW, weight, gradient))
    assert torch.equal(ours[0], ours[1])


def test_it_is_named_in_a_config(tmp_path):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(GroupOptions, "group")
    spec = {"class_path": "lightning_t2i.optimizers.AdamW8bit", "init_args": {"lr": 0.25, "betas": [0.5, 0.9]}}
    options = parser.instantiate(parser.parse_object({"group": {"optimizer": spec}})).group
    group = Group("net", MLP(2, WIDTH), options)
    group.build()
    assert type(group.optimizer) is AdamW8bit
    assert group.learning_rate() == 0.25 and tuple(group.optimizer.param_groups[0]["betas"]) == (0.5, 0.9)


def on_two_ranks(rank: int, folder: str, plain: str) -> dict:
    """A whole run, a resumed one, refusals and a reset on the mesh 1x2; a run on the mesh 2x1; frozen networks."""
    place, found = Path(folder), {}
    sharded = Checkpoints(place / "sharded", CheckpointOptions(every=4, keep=9, form="sharded"))
    module = fit(place, 8, save=place / "whole", shard=2, callbacks=[sharded])
    fit(place, 8, place / "sharded/step-00000004", place / "from-sharded", shard=2)
    fit(place, 4, save=place / "half", shard=2)
    fit(place, 8, place / "half", place / "resumed", shard=2)
    found["gathered"] = gathered_at_once(module)
    parameter = module.critic.blocks[0].linear.weight
    optimizer = module.groups["critic"].optimizer
    found["shared"] = optimizer.inside(parameter).data_ptr() == parameter.to_local().data_ptr()
    found["state"] = list(optimizer.state[parameter]["state1"].shape)
    found["bytes"] = bytes_of(optimizer)
    found["empty"] = module.critic.outside.weight.to_local().numel() == 0
    try:
        fit(place, 8, Path(plain), shard=2)
    except UserError as error:
        found["refused"] = str(error)
    fit(place, 8, Path(plain), place / "reset", shard=2, reset=True)
    fit(place, 8, save=place / "copies", replicate=2)
    sharding.REPLICATE_BELOW_BYTES = 0  # every frozen network is cut, but for one that is quantised
    for bits in (None, "nf4"):
        frozen = Wide(quantize={"scale": bits} if bits else {})
        frozen._device_mesh = module._device_mesh
        frozen.configure_model()
        found[f"frozen in {bits}"] = type(frozen.scale[0].weight).__name__
        found[f"y in {bits}"] = frozen.scale(torch.ones(2, DIM))
    return found


def gathered_at_once(module: Wide) -> int:
    """The most values of moments that one call of a save sends."""
    original, sizes = optimizers.dist.all_gather_object, []

    def counted(found, mine, *group):
        sizes.append(sum(v.numel() for v in mine.values() if isinstance(v, torch.Tensor) and v.dtype == torch.uint8))
        original(found, mine, *group)

    optimizers.dist.all_gather_object = counted
    module.groups["critic"].state()
    optimizers.dist.all_gather_object = original
    return max(sizes)


def test_on_local_shards(tmp_path, ranks):
    fit(tmp_path, 8, save=tmp_path / "whole-1x1")
    fit(tmp_path, 4, save=tmp_path / "half-1x1")
    first, second = ranks(on_two_ranks, str(tmp_path), str(tmp_path / "half-1x1"))
    a = read(tmp_path / "whole")
    for other in ("resumed", "from-sharded", "sharded/step-00000008"):
        b = read(tmp_path / other)
        assert differences(a["state_dict"], b["state_dict"]) == differences(a["t2i"], b["t2i"]) == [], other
    states = a["t2i"]["groups"]["critic"]["states"]
    assert a["t2i"]["groups"]["critic"]["parts"] == 2
    assert states["blocks.0.linear.weight"]["0/state1"].dtype == torch.uint8
    assert not torch.equal(*(states["blocks.0.linear.weight"][f"{i}/state1"] for i in (0, 1)))
    assert first["shared"] and second["shared"] and first["state"] == second["state"] == [WIDTH // 2, WIDTH]
    assert first["gathered"] == 2 * WIDTH * WIDTH // 2  # of one weight
    assert second["empty"]  # rank 1 has no row of the last layer

    assert "1 shards" in first["refused"] and "2 shards" in first["refused"] and "--reset_optimizer" in first["refused"]
    with pytest.raises(UserError, match="2 shards"):
        fit(tmp_path, 8, tmp_path / "half")
    assert read(tmp_path / "reset")["t2i"]["counters"]["step"] == 8
    assert read(tmp_path / "reset")["t2i"]["groups"]["critic"]["states"]["inside.weight"]["0/step"] == 4

    # Blocks are cut otherwise: close to the unsharded weights, not equal. Copies have one shard, as one process has.
    whole, cut = read(tmp_path / "whole-1x1"), a
    for name, tensor in whole["state_dict"].items():
        assert (tensor - cut["state_dict"][name]).norm() < 0.1 * tensor.norm() + 1e-2, name
    fit(tmp_path, 9, tmp_path / "copies")
    assert read(tmp_path / "copies")["t2i"]["groups"]["critic"]["parts"] == 1

    for rank in (first, second):
        assert (rank["frozen in None"], rank["frozen in nf4"]) == ("DTensor", "Params4bit")
    assert torch.equal(first["y in nf4"], second["y in nf4"])
    torch.testing.assert_close(first["y in nf4"], first["y in None"], atol=0.2, rtol=0)


def test_reset_optimizer_is_an_option_of_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LIGHTNING_T2I_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("LIGHTNING_T2I_RESUME", raising=False)
    content = {
        "model": {"class_path": "toy.Toy"},
        "data": {"class_path": "toy.ToyData"},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 4},
        "throughput": {"enabled": False},
        "tracking": {"wandb": "off"},
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(content))
    config, more = ["--config", str(tmp_path / "toy.yaml")], ["--trainer.max_steps", "5"]
    assert main(["fit", *config, "--reset_optimizer"]) == 2
    assert "no checkpoint to go on from" in capsys.readouterr().err
    assert main(["validate", *config, "--reset_optimizer"]) == 2
    assert "Only fit has optimizers" in capsys.readouterr().err
    assert main(["fit", *config]) == 0
    assert "start anew" not in capsys.readouterr().out
    assert main(["fit", *config, "--reset_optimizer", *more]) == 0
    assert capsys.readouterr().out.count("optimizer states start anew") == 1
    saved = read(tmp_path / "runs/toy/checkpoints/step-00000005")["t2i"]
    assert saved["counters"]["step"] == 5
    assert saved["groups"]["critic"]["updates"] == 5
    assert saved["groups"]["critic"]["states"]["inside.weight"]["step"] == 1
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun gives the same command again after a failure
    assert main(["fit", *config, "--reset_optimizer", "--trainer.max_steps", "6"]) == 0
    saved = read(tmp_path / "runs/toy/checkpoints/step-00000006")["t2i"]
    assert saved["groups"]["critic"]["states"]["inside.weight"]["step"] == 2
