"""Several averages of a group at once, power functions by their closed form, and averages made after the training."""

from __future__ import annotations

import json

import lightning as L
import numpy as np
import pytest
import tiny_networks
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from toy import Toy, ToyData, adam, trainer_for

from lightning_t2i.checkpoints.snapshots import averages, write_snapshot
from lightning_t2i.cli.main import main
from lightning_t2i.cli.restore import UseAverage
from lightning_t2i.ema import Averages, PowerFunction, gamma_of, profiles
from lightning_t2i.errors import UserError
from lightning_t2i.loggers import read_lines
from lightning_t2i.options import EMAOptions, GroupOptions
from lightning_t2i.posthoc import Snapshot, coefficients, reconstruct, updates_at, updates_until, use_average
from lightning_t2i.state_io import AtomicCheckpointIO, newest

# ---- profiles --------------------------------------------------------------------------------------------------------


def test_the_papers_widths_have_the_papers_exponents():
    """arXiv 2312.02696, section 3.2: 0.05 and 0.10 are gamma = 16.97 and 6.94."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    for width in (0.01, 0.15, 0.28):
        gamma = gamma_of(width)
        assert (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5) == pytest.approx(width)


def test_a_power_function_counts_an_update_by_its_share():
    """Weights that are one-hot in the update: the average is the profile, (k^(g+1) - (k-1)^(g+1)) / t^(g+1)."""
    steps, network = 20, nn.Linear(20, 1, bias=False)
    kept = Averages("net_ema", network, ["weight"], EMAOptions(None, sigma_rel=[0.2, 0.05]))
    for k in range(steps):
        with torch.no_grad():
            network.weight.copy_(torch.eye(steps)[k])
        kept.update([network.weight], k)
    for width, [found] in zip((0.2, 0.05), (kept.first, *kept.others), strict=True):
        k, power = np.arange(1, steps + 1), gamma_of(width) + 1
        expected = (k**power - (k - 1.0) ** power) / steps**power
        torch.testing.assert_close(found[0], torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-7)
        assert float(found.sum()) == pytest.approx(1, abs=1e-5)


def test_every_average_follows_its_own_recurrence(tmp_path):
    weights = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, module, *unused):
            weights.append(module.critic.outside.weight.detach().clone())

    options = EMAOptions([0.8, 0.3], start=2, warmup=False, sigma_rel=[0.1])
    module = Toy(critic=GroupOptions(adam(1e-2), ema=options))
    trainer_for(tmp_path, 7, callbacks=[Record()]).fit(module, ToyData(), weights_only=True)
    decays = {
        "critic_ema.": lambda n: 0.8,
        "critic_ema[0.3].": lambda n: 0.3,
        "critic_ema[sigma_rel=0.1].": PowerFunction(0.1).decay,
    }
    state, seen = module.state_dict(), set()
    for prefix, decay in decays.items():
        expected = weights[1]
        for n, weight in enumerate(weights[2:]):
            expected = decay(n) * expected + (1 - decay(n)) * weight
        torch.testing.assert_close(state[f"{prefix}outside.weight"], expected, rtol=1e-5, atol=1e-7)
        seen.add(float(expected.sum()))
    assert len(seen) == 3
    assert module.groups["critic"].averages.count == updates_until(7, module.groups["critic"]) == 5


def test_updates_are_counted_as_a_training_makes_them():
    for every, start, first in ((1, 0, 0), (1, 5, 0), (3, 0, 0), (3, 4, 0), (4, 8, 0), (1, 2, 5), (3, 0, 7), (3, 8, 4)):
        group = Toy(generator=GroupOptions(every=every, start=first, ema=EMAOptions(start=start)))
        group.configure_model()
        generator, count = group.groups["generator"], 0
        for step in range(20):
            assert updates_until(step, generator) == count
            count += step % every == 0 and step >= max(start, first)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"decay": [0.9, 1.0]}, "ema.decay"),
        ({"decay": [0.9, 0.9]}, "repeated"),
        ({"decay": None}, "missing"),
        ({"sigma_rel": [0.3]}, "ema.sigma_rel"),
    ],
)
def test_averages_that_cannot_be_are_refused(options, text):
    with pytest.raises(UserError, match=text):
        EMAOptions(**options)


# ---- after the training ----------------------------------------------------------------------------------------------


def trajectory(steps: int = 1000) -> torch.Tensor:
    """Weights that wander and swing: float64 [steps, 5]."""
    wander = torch.randn(steps, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum(0)
    return 0.05 * wander + torch.sin(torch.arange(steps)[:, None] / 150)


def averaged(weights: torch.Tensor, width: float) -> list[torch.Tensor]:
    """The power-function average after every update."""
    profile, average, found = PowerFunction(width), torch.zeros(5, dtype=torch.float64), []
    for n, weight in enumerate(weights):
        average = torch.lerp(average, weight, 1 - profile.decay(n))
        found.append(average)
    return found


def test_an_average_of_another_width_is_put_together_from_snapshots():
    weights = trajectory()
    kept = {width: averaged(weights, width) for width in (0.05, 0.1)}
    for updates in (1000, 700):
        stored = [
            Snapshot(width, t, lambda name, tensor=kept[width][t - 1]: tensor)
            for width in kept
            for t in range(25, 1001, 25)
        ]
        for width, bound in ((0.03, 2e-3), (0.07, 2e-4), (0.1, 1e-6), (0.15, 2e-4), (0.2, 2e-3)):
            direct = averaged(weights[:updates], width)[-1]
            [(name, found)] = reconstruct(stored, ["w"], width, updates)
            assert name == "w"
            assert float((found - direct).abs().max() / direct.abs().max()) < bound
            nearest = min(float((t[updates - 1] - direct).abs().max()) for t in kept.values())
            assert width == 0.1 or float((found - direct).abs().max()) < 0.1 * nearest


def test_a_stored_average_is_its_own_reconstruction():
    shares = coefficients([(0.05, 100), (0.1, 100), (0.05, 200), (0.1, 200)], 0.1, 100)
    assert shares == pytest.approx([0, 1, 0, 0], abs=1e-9)


def test_too_few_snapshots_are_told():
    with pytest.raises(UserError, match="Too few snapshots"):
        list(reconstruct([Snapshot(0.1, 5, lambda name: torch.ones(1))] * 3, ["w"], 0.07, 4))


class Snapshots(L.Callback):
    """Writes snapshots as a run does."""

    def __init__(self, folder, every: int):
        self.folder, self.every = folder, every

    def on_train_batch_end(self, trainer, module, *unused):
        if module.counters.step % self.every == 0:
            write_snapshot(self.folder, module.counters.step, averages(module.groups.values()), 99)


def test_a_twin_gets_another_average_for_an_evaluation(tmp_path):
    """One that was kept, and one made from the snapshots; it agrees with a third that the training kept."""
    options = EMAOptions([0.5], sigma_rel=[0.05, 0.1, 0.07])
    module = Toy(generator=GroupOptions(adam(1e-2), every=2, ema=options))
    data, callbacks = ToyData(), [Snapshots(tmp_path / "ema", 10)]
    trainer_for(tmp_path, 120, callbacks=callbacks).fit(module, data, weights_only=True)
    state = module.state_dict()
    for snapshot in (tmp_path / "ema").glob("*"):  # what a run that kept two widths alone would have
        tensors = {n: t for n, t in load_file(snapshot).items() if "0.07" not in n}
        write_snapshot(tmp_path / "two/ema", int(snapshot.stem[5:]), tensors, 99)
    seen = {}

    class Look(L.Callback):
        def on_validation_epoch_start(self, trainer, module):
            seen["twin"] = module.groups["generator"].ema.outside.weight.clone()

    class Validated(Toy):
        def validation_step(self, batch, batch_idx):
            return None

    def twin(label: str, widths: list[float]) -> torch.Tensor:
        ema = EMAOptions([0.5], sigma_rel=widths)
        again = Validated(generator=GroupOptions(adam(1e-2), every=2, ema=ema))
        again.configure_model()
        again.load_state_dict({n: t for n, t in state.items() if "0.07" not in n or 0.07 in widths})
        again.counters.step = 120
        trainer = trainer_for(tmp_path, 1, callbacks=[UseAverage(label, tmp_path / "two"), Look()], limit_val_batches=1)
        trainer.validate(again, torch.utils.data.DataLoader(range(2)), verbose=False)
        return seen["twin"]

    direct = state["generator_ema[sigma_rel=0.07].outside.weight"]
    assert torch.equal(twin("sigma_rel=0.07", [0.05, 0.1, 0.07]), direct)
    assert torch.equal(twin("0.5", [0.05, 0.1]), state["generator_ema.outside.weight"])
    made = twin("sigma_rel=0.07", [0.05, 0.1])
    scale = float(direct.abs().max())
    assert 0 < float((made - direct).abs().max()) < 0.01 * scale  # bfloat16 snapshots, 60 updates
    with pytest.raises(UserError, match=r"allowed: 0\.5, sigma_rel=0\.05"):
        twin("0.6", [0.05, 0.1])
    with pytest.raises(UserError, match="Not a width"):
        use_average(module.groups.values(), "sigma_rel=wide", tmp_path, 120)
    plain = Toy(generator=GroupOptions())
    plain.configure_model()
    with pytest.raises(UserError, match="No group"):
        use_average(plain.groups.values(), "0.5", tmp_path, 120)


def test_snapshots_of_before_a_restart_are_no_part_of_an_average(tmp_path):
    """A group that begins late, and anew in the middle: the average of another width is that of what came after."""

    class Restart(L.Callback):
        def on_train_batch_end(self, trainer, module, *unused):
            if module.counters.step == 60:
                module.groups["generator"].restart()

    def toy(*widths: float) -> Toy:
        ema = EMAOptions([0.5], start=4, sigma_rel=list(widths))
        return Toy(generator=GroupOptions(adam(1e-2), every=2, start=6, ema=ema))

    module, callbacks = toy(0.05, 0.1, 0.07), [Restart(), Snapshots(tmp_path / "ema", 10)]
    trainer = trainer_for(tmp_path, 120, callbacks=callbacks)
    trainer.fit(module, ToyData(), weights_only=True)
    trainer.save_checkpoint(tmp_path / "c", False)
    state = AtomicCheckpointIO().load_checkpoint(tmp_path / "c")
    direct = state["state_dict"]["generator_ema[sigma_rel=0.07].outside.weight"]
    again = toy(0.05, 0.1)
    again.configure_model()
    again.on_load_checkpoint(state)  # as an export does
    again.load_state_dict({n: t for n, t in state["state_dict"].items() if "0.07" not in n})
    group = again.groups["generator"]
    assert [updates_at(step, group, 120) for step in (60, 70, 120)] == [0, 5, 30]
    use_average([group], "sigma_rel=0.07", tmp_path / "ema", 120)
    error = float((group.ema.outside.weight - direct).abs().max())
    assert 0 < error < 0.01 * float(direct.abs().max())


def test_the_command_exports_and_evaluates_another_average(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LIGHTNING_T2I_RUNS", str(tmp_path / "runs"))
    tiny_networks.autoencoder().save_pretrained(tmp_path / "vae")
    ema = {"decay": [0.99, 0.1], "sigma_rel": [0.05, 0.1]}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    config = {
        "model": {
            "class_path": "lightning_modules.tokenizer.Tokenizer",
            "init_args": {"network": str(tmp_path / "vae"), "autoencoder": {"optimizer": optimizer, "ema": ema}},
        },
        "data": {"class_path": "pictures.Pictures"},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 6, "val_check_interval": 6},
        "throughput": {"enabled": False},
        "samples": {"enabled": False},
        "checkpoints": {"every": 3, "ema": {"every": 2}},
        "tracking": {"wandb": "off"},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "mine.yaml")]) == 0
    state = AtomicCheckpointIO().load_checkpoint(newest(tmp_path / "runs/mine/checkpoints"))["state_dict"]
    name, written = "encoder.conv_in.weight", {}
    for label in (None, "0.1", "sigma_rel=0.1", "sigma_rel=0.08"):
        out = tmp_path / f"out-{label}"
        assert main(["export", str(out), "--run", "mine", *(["--ema", label] if label else [])]) == 0
        written[label] = next(t for f in out.rglob("*.safetensors") for n, t in load_file(f).items() if n == name)
    for label, prefix in {None: "", "0.1": "[0.1]", "sigma_rel=0.1": "[sigma_rel=0.1]"}.items():
        assert torch.equal(written[label], state[f"autoencoder_ema{prefix}.{name}"].to(written[label].dtype))
    assert len({t.double().sum().item() for t in written.values()}) == 4
    older = ["--ckpt_path", str(tmp_path / "runs/mine/checkpoints/step-00000003")]
    assert main(["export", str(tmp_path / "older"), "--run", "mine", *older]) == 0
    found = next(t for f in (tmp_path / "older").rglob("*.safetensors") for n, t in load_file(f).items() if n == name)
    state = AtomicCheckpointIO().load_checkpoint(older[1])["state_dict"]
    assert torch.equal(found, state[f"autoencoder_ema.{name}"].to(found.dtype))
    assert not torch.equal(found, written[None])
    assert main(["validate", "--run", "mine", *older]) == 0
    assert [line["step"] for line in read_lines(tmp_path / "runs/mine/validate.jsonl")] == [3]
    assert main(["fit", "--config", str(tmp_path / "mine.yaml"), *older]) == 2
    assert "fit resumes from its own run folder" in capsys.readouterr().err
    losses = []
    for words in ([], ["--ema", "0.1"]):
        assert main(["validate", "--run", "mine", *words]) == 0
        losses.append(read_lines(tmp_path / "runs/mine/validate.jsonl")[-1])
    assert losses[0]["val/psnr"] != losses[1]["val/psnr"]
    assert "with" not in losses[0] and losses[1]["with"] == {"--ema": "0.1"}
    assert "exported with" not in (tmp_path / "out-None/README.md").read_text()
    assert "exported with | `--ema` 0.1" in (tmp_path / "out-0.1/README.md").read_text()
    assert main(["fit", "--config", str(tmp_path / "mine.yaml"), "--ema", "0.1"]) == 2
    assert "Only export and evaluations" in capsys.readouterr().err
    assert json.loads((tmp_path / "runs/mine/finished").read_text()) == {"step": 6}


def test_a_power_that_is_not_positive_is_refused() -> None:
    with pytest.raises(UserError, match="power"):
        EMAOptions(0.9999, power=-0.75)


def test_a_power_limits_the_decay_and_a_restart_forgets() -> None:
    """1 - (1 + n)^-0.75: 0 at first, 0.9944 after 1,000 updates, 0.9997 after 50,000; then the limit."""
    (profile,) = profiles(EMAOptions(0.9999, power=0.75))
    found = [profile.decay(n) for n in (0, 1000, 50_000, 1_000_000)]
    assert found == pytest.approx([0, 0.99438, 0.9997, 0.9999], abs=1e-5)
    network = nn.Linear(2, 2)
    averages = Averages("ema", network, ["weight"], EMAOptions([0.5, 0.9], warmup=False))
    for step in range(3):
        network.weight.data.add_(1.0)
        averages.update([network.weight], step)
    assert averages.count == 3 and not torch.equal(averages.first[0], network.weight)
    averages.restart([network.weight])
    assert averages.count == 0
    assert all(torch.equal(tensors[0], network.weight) for tensors in (averages.first, *averages.others))
