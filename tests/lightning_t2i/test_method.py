"""The engine on a two-network method: rhythm, accumulation, clipping, EMA, counting, guards, membership."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from toy import Toy, ToyData, adam, trainer_for
from weights import weights_hash

from callbacks.checkpoints import CheckpointOptions, Checkpoints
from lightning_t2i.errors import UserError
from lightning_t2i.guards import NonFiniteError
from lightning_t2i.method import MethodModule
from lightning_t2i.options import EMAOptions, GroupOptions, MethodOptions
from lightning_t2i.schedules import Warmup
from lightning_t2i.state_io import AtomicCheckpointIO, newest


class Watch(L.Callback):
    """Counts changes of each group's weights and records what Lightning calls the global step."""

    def __init__(self):
        self.changes = {"generator": 0, "critic": 0}
        self.hashes = {}
        self.global_steps = []
        self.validations = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        for name in self.changes:
            now = weights_hash(getattr(module, name))
            self.changes[name] += name in self.hashes and now != self.hashes[name]
            self.hashes[name] = now
        self.global_steps.append(trainer.global_step)

    def on_train_start(self, trainer, module):
        self.hashes = {name: weights_hash(getattr(module, name)) for name in self.changes}

    def on_validation_start(self, trainer, module):
        self.validations.append(module.counters.step)


def fit(folder: Path, module: Toy, steps: int, data: ToyData | None = None, **kwargs) -> L.Trainer:
    trainer = trainer_for(folder, steps, **kwargs)
    trainer.fit(module, data or ToyData(), weights_only=True)
    return trainer


class Ends(Toy):
    def __init__(self):
        super().__init__()
        self.ends = []

    def finish(self):
        self.ends.append(self.counters.step)


@pytest.mark.parametrize("fsdp", [False, True])
def test_finish_is_called_once_after_the_last_step(tmp_path, fsdp):
    whole = Ends()
    fit(tmp_path, whole, 3, fsdp=fsdp).save_checkpoint(tmp_path / "end.ckpt")
    assert whole.ends == [3]
    killed = Ends()  # in `finish`: what was saved has no step left
    trainer_for(tmp_path, 3, fsdp=fsdp).fit(killed, ToyData(), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert killed.ends == [3]


def test_finish_is_not_called_where_steps_are_left(tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, module, *unused):
            trainer.should_stop = module.counters.step == 2

    module = Ends()
    assert fit(tmp_path, module, 3, callbacks=[Stop()]).global_step == 2
    assert module.ends == []


def test_generator_every_five_steps_and_critic_every_step(tmp_path):
    watch = Watch()
    module = Toy()
    trainer = fit(tmp_path, module, 100, callbacks=[watch])
    assert watch.changes == {"generator": 20, "critic": 100}
    assert {n: g.updates for n, g in module.groups.items()} == {"generator": 20, "critic": 100}
    assert trainer.global_step == 100
    assert module.counters.samples == 800


def test_global_step_counts_training_steps_and_fails_when_lightning_changes(tmp_path):
    watch = Watch()
    trainer = fit(tmp_path, Toy(MethodOptions(accumulate=3)), 4, callbacks=[watch])
    assert trainer.global_step == 4
    assert watch.global_steps == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]


def test_accumulation_equals_one_large_batch(tmp_path):
    small, large = Toy(MethodOptions(accumulate=3), dropout=0.0), Toy(dropout=0.0)
    fit(tmp_path / "a", small, 7, ToyData(batch_size=4))
    fit(tmp_path / "b", large, 7, ToyData(batch_size=12))
    assert small.counters.batches == 21
    assert small.counters.samples == large.counters.samples == 84
    for name, tensor in small.state_dict().items():
        torch.testing.assert_close(tensor, large.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_each_group_is_clipped_by_its_own_norm(tmp_path):
    limit = 1e-3

    def plain(parameters):
        return torch.optim.SGD(parameters, lr=1.0)

    module = Toy(generator=GroupOptions(plain, clip=None), critic=GroupOptions(plain, clip=limit), dropout=0.0)
    module_before = Toy(dropout=0.0)
    module_before.configure_model()
    before = {n: t.clone() for n, t in module_before.state_dict().items() if "_ema" not in n}
    fit(tmp_path, module, 1)
    step = {
        group: torch.cat([(t - before[n]).flatten() for n, t in module.state_dict().items() if n.startswith(group)])
        for group in ("generator", "critic")
    }
    assert float(step["critic"].norm()) == pytest.approx(limit, rel=1e-2)
    assert float(step["generator"].norm()) > 10 * limit


def test_schedules_count_training_steps_even_where_a_group_rests(tmp_path):
    module = Toy(generator=GroupOptions(adam(1.0), schedule=lambda o: Warmup(o, 10), every=5))
    fit(tmp_path, module, 7)
    assert module.groups["generator"].learning_rate() == pytest.approx(0.8)  # the rate of step 7 is (7 + 1) / 10


def test_warmup_then_cosine_ends_at_its_share():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = Warmup(optimizer, steps=4, total=24, final=0.1)
    rates = []
    for _ in range(30):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[14] == pytest.approx(2 * (0.1 + 0.9 / 2))
    assert rates[24:] == pytest.approx([0.2] * 6)


@pytest.mark.parametrize("warmup", [False, True])
def test_ema_follows_its_recurrence_and_starts_late(tmp_path, warmup):
    start, decay, weights = 3, 0.8, []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, module, *unused):
            weights.append(module.critic.outside.weight.detach().clone())

    module = Toy(critic=GroupOptions(adam(1e-2), ema=EMAOptions(decay, start=start, warmup=warmup)))
    fit(tmp_path, module, 8, callbacks=[Record()])
    expected = weights[start - 1]
    for n, weight in enumerate(weights[start:]):
        kept = min(decay, (1 + n) / (10 + n)) if warmup else decay
        expected = kept * expected + (1 - kept) * weight
    torch.testing.assert_close(module.groups["critic"].ema.outside.weight, expected, rtol=1e-5, atol=1e-7)


def test_ema_twin_is_a_callable_target_without_gradients_in_eval_mode(tmp_path):
    module = Toy(generator=GroupOptions(adam(1e-2), ema=EMAOptions(0.9)))
    fit(tmp_path, module, 6)
    twin = module.groups["generator"].ema
    assert twin(torch.ones(2, 6)).shape == (2, 6)
    assert not twin.training
    assert not any(p.requires_grad for p in twin.parameters())
    assert module.generator_of("generator") is twin
    assert module.generator_of("critic") is module.critic


def test_a_backward_leaves_no_gradient_in_other_groups():
    """The generator's loss runs through the critic; the critic must not see it."""
    module = Toy(dropout=0.0)
    module.configure_model()
    held = torch.ones_like(module.critic.outside.weight)
    module.critic.outside.weight.grad = held
    module.backward("generator", module.critic(module.generator(torch.ones(4, 6))).mean())
    assert module.critic.outside.weight.grad is held
    assert torch.equal(held, torch.ones_like(held))
    assert module.critic.inside.weight.grad is None
    assert module.generator.inside.weight.grad.abs().sum() > 0


def test_backward_outside_a_groups_rhythm_is_an_error():
    module = Toy()
    module.configure_model()
    module.counters.step = 1
    with pytest.raises(RuntimeError, match="not due"):
        module.backward("generator", module.generator(torch.ones(1, 6)).mean())


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning")  # advice to toy loops
def test_model_checkpoint_and_validation_count_training_steps(tmp_path):
    class Validated(Toy):
        def validation_step(self, batch, batch_idx):
            return None

    class WithValidation(ToyData):
        def val_dataloader(self):
            return DataLoader(range(2), num_workers=0)

    watch = Watch()
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1, save_last=False)
    fit(
        tmp_path,
        Validated(MethodOptions(accumulate=2)),
        7,
        WithValidation(),
        callbacks=[watch, saver],
        enable_checkpointing=True,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )
    assert sorted(p.stem for p in tmp_path.glob("step=*.ckpt")) == ["step=3", "step=6"]
    assert watch.validations == [2, 4, 6]


def test_frozen_networks_stay_frozen_and_out_of_the_checkpoint(tmp_path):
    module = Toy()
    trainer = trainer_for(tmp_path, 5)
    seen = []

    class Frozen(L.Callback):
        def on_train_batch_end(self, trainer, module, *unused):
            seen.append((weights_hash(module.scale), module.scale.training, module.critic.training))

    trainer.callbacks.append(Frozen())
    trainer.fit(module, ToyData(), weights_only=True)
    assert len({h for h, *_ in seen}) == 1
    assert not any(training for _, training, _ in seen)
    assert all(training for *_, training in seen)
    assert not any(p.requires_grad or p.grad is not None for p in module.scale.parameters())
    trainer.save_checkpoint(tmp_path / "c", False)
    saved = AtomicCheckpointIO().load_checkpoint(tmp_path / "c")
    assert not [name for name in saved["state_dict"] if "scale" in name]
    assert saved["t2i"]["frozen"] == {"scale": "toy:1"}


def test_an_adapter_inside_a_frozen_network_is_all_that_is_saved(tmp_path):
    module = Toy(lora=True, critic=GroupOptions(adam(1e-2), ema=EMAOptions(0.9)))
    fit(tmp_path, module, 5)
    names = [n for n in module.state_dict() if n.startswith("critic")]
    assert names == ["critic.adapter.weight", "critic_ema.adapter.weight"]
    assert module.groups["critic"].ema.inside.weight is module.critic.inside.weight  # frozen weights are shared


def test_a_checkpoint_of_another_frozen_network_is_refused(tmp_path):
    module = Toy()
    trainer = fit(tmp_path, module, 2)
    trainer.save_checkpoint(tmp_path / "c", False)

    class Other(Toy):
        def configure_model(self):
            super().configure_model()
            self.frozen_identities["scale"] = "toy:2"

    with pytest.raises(UserError, match="another frozen network 'scale'"):
        trainer_for(tmp_path, 4).fit(Other(), ToyData(), ckpt_path=tmp_path / "c", weights_only=True)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    fit(tmp_path, Toy(), 1).save_checkpoint(tmp_path / "c", False)
    with pytest.raises(UserError, match="does not fit"):
        trainer_for(tmp_path, 4).fit(Toy(lora=True), ToyData(), ckpt_path=tmp_path / "c", weights_only=True)


def test_non_finite_loss_stops_before_the_weights_are_touched(tmp_path):
    module = Toy(poison_step=3, dropout=0.0)
    with pytest.raises(NonFiniteError, match="training step 3") as error:
        fit(tmp_path, module, 10)
    reference = Toy(dropout=0.0)
    fit(tmp_path / "reference", reference, 3)
    assert all(torch.equal(t, reference.state_dict()[n]) for n, t in module.state_dict().items())
    report = json.loads((tmp_path / "non-finite-step-3-rank-0.json").read_text())
    assert report["ids"] == [{"main": [7 * p for p in range(24, 32)]}]
    assert report["replay"] == f"python train.py fit --run {tmp_path.name}"
    assert "critic" in str(error.value)


def test_without_the_check_training_goes_on(tmp_path):
    module = Toy(MethodOptions(check_finite=False), poison_step=1)
    assert fit(tmp_path, module, 3).global_step == 3


def test_building_depends_on_the_seed_alone():
    def weights(seed):
        torch.rand(3)  # another state of the global generator
        module = Toy(MethodOptions(seed=seed))
        module.configure_model()
        return weights_hash(module)

    assert weights(0) == weights(0)
    assert weights(0) != weights(1)


def test_configure_model_builds_once():
    module = Toy()
    module.configure_model()
    network = module.critic
    module.configure_model()
    assert module.critic is network


def test_a_step_in_which_no_group_is_due_still_counts(tmp_path):
    class Rare(MethodModule):
        def configure_model(self):
            self.add_group("net", nn.Linear(6, 1), GroupOptions(adam(1e-2), every=3))

        def training_step(self, batch, batch_idx):
            if self.due("net"):
                self.backward("net", self.net(batch["main"].latent).square().mean())

    module = Rare()
    assert fit(tmp_path, module, 7).global_step == 7
    assert module.groups["net"].updates == 3


def test_super_calls_do_not_repeat_the_engines_work(tmp_path):
    class Child(Toy):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    module = Child()
    assert fit(tmp_path, module, 5).global_step == 5
    assert module.counters.batches == 5


@pytest.mark.parametrize(("every", "steps"), [(5, [1, 6, 11]), (1, [1, 4, 8, 12])])
def test_scalars_are_logged_every_n_training_steps(tmp_path, every, steps):
    """A group that is updated in few of them is in all lines: they wait for it."""
    lines = []

    class Memory(L.pytorch.loggers.Logger):
        name, version = "memory", 0

        def log_metrics(self, metrics, step=None):
            lines.append((step, metrics))

        def log_hyperparams(self, *args, **kwargs):
            pass

    module = Toy(MethodOptions(log_every=4, accumulate=2), generator=GroupOptions(adam(1e-2), every=every))
    fit(tmp_path, module, 13, logger=Memory())
    assert [step for step, _ in lines] == steps
    for step, line in lines:
        assert {"generator/loss", "generator/grad_norm", "critic/loss", "critic/lr", "samples"} <= line.keys()
        assert line["samples"] == step * 2 * 8


def test_log_lines_are_means_over_micro_batches(tmp_path):
    noted, lines = [], []

    class Notes(Toy):
        def note(self, **scalars):
            if "critic/loss" in scalars:
                noted.append(scalars["critic/loss"].item())
            super().note(**scalars)

    class Memory(L.pytorch.loggers.Logger):
        name, version = "memory", 0

        def log_metrics(self, metrics, step=None):
            lines.append(metrics["critic/loss"])

        def log_hyperparams(self, *args, **kwargs):
            pass

    fit(tmp_path, Notes(MethodOptions(log_every=1, accumulate=3)), 2, logger=Memory())
    first, *_ = lines  # the group that is updated every five steps is in no other
    assert len(set(noted[:3])) == 3 and first == pytest.approx(sum(noted[:3]) / 3)


def test_a_wish_to_stop_waits_for_the_end_of_the_training_step(tmp_path):
    """What trainer.max_time does where it runs out inside an accumulated step."""

    class TimeIsUp(L.Callback):
        def on_train_batch_end(self, trainer, module, *unused):
            trainer.should_stop = trainer.should_stop or module.counters.batches == 4

    module = Toy(MethodOptions(accumulate=3))
    trainer = fit(tmp_path, module, 9, callbacks=[TimeIsUp(), Checkpoints(tmp_path / "c", CheckpointOptions(every=0))])
    assert (trainer.global_step, module.counters.batches, module.counters.micro) == (2, 6, 0)
    assert newest(tmp_path / "c").name == "step-00000002"


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: MethodOptions(accumulate=0), "common.accumulate"),
        (lambda: GroupOptions(every=0), "every"),
        (lambda: GroupOptions(clip=-1.0), "clip"),
        (lambda: EMAOptions(decay=1.0), "ema.decay"),
    ],
)
def test_impossible_options_name_their_key(build, key):
    with pytest.raises(UserError, match=key):
        build()


def test_bf16_without_master_weights_is_refused():
    module = Toy(MethodOptions(precision="bf16"))
    with pytest.raises(UserError, match="FSDP2"):
        module.configure_model()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # the compiler's own import
def test_compiled_blocks_keep_their_parameter_names():
    plain, compiled = Toy(), Toy(MethodOptions(compile="blocks"))
    plain.configure_model()
    compiled.configure_model()
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    assert compiled.critic.blocks[0]._compiled_call_impl is not None
    assert plain.critic.blocks[0]._compiled_call_impl is None


def test_a_group_without_trainable_parameters_is_an_error():
    class Empty(MethodModule):
        def configure_model(self):
            self.add_group("net", nn.Linear(2, 2).requires_grad_(False), GroupOptions())

    with pytest.raises(ValueError, match="no trainable parameter"):
        Empty().configure_model()
