"""MethodModule: the thin glue between a method's mathematics and Lightning.

A method declares its networks in `configure_model` and shows its whole update in `training_step`:

    def training_step(self, batch, batch_idx):
        if self.due("student"):
            self.backward("student", student_loss(...))
        self.backward("fake", fake_loss(...))

A training step is `accumulate` consecutive batches. On its last one the engine clips, steps, advances the schedules
and updates the EMA of each due group, in the order of declaration, and `trainer.global_step` rises by one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_t2i.batch import Batch
from lightning_t2i.building import once, place_frozen
from lightning_t2i.counters import Counters, advance_global_step, validate_now
from lightning_t2i.errors import UserError
from lightning_t2i.group import Group
from lightning_t2i.guards import stop_unless_finite
from lightning_t2i.keys import Keys
from lightning_t2i.options import GroupOptions, MethodOptions, Plain
from lightning_t2i.protocols import Generates
from lightning_t2i.quantization import refuse_quantized
from lightning_t2i.saved import Saved
from lightning_t2i.strategies.fsdp2 import mesh_of
from lightning_t2i.strategies.sharding import compile_blocks, set_gradient_sync, shard_network


def _as_training_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """Puts the engine's work before and after a method's own `training_step`; a super() call passes through."""

    @functools.wraps(step)
    def training_step(self: MethodModule, batch: Batch, batch_idx: int) -> None:
        if self._inside_step:
            return step(self, batch, batch_idx)
        self._inside_step = True
        try:
            self._begin(batch)
            step(self, batch, batch_idx)
            self._finish(batch)
        finally:
            self._inside_step = False

    return training_step


class MethodModule(Saved):
    """Base of all methods.

    Args:
        common: seed, accumulation, precision and the other options that every method shares.
    """

    may_rest: tuple[str, ...] | None = None  # groups whose `every` and `start` are heeded; None: all
    quantizes = True  # False builds whole networks where `common.quantize` is set, for an export

    def __init__(self, common: MethodOptions | None = None):
        super().__init__()
        self.common = common or MethodOptions()
        self.automatic_optimization = False
        self.strict_loading = False  # Lightning's check knows nothing of frozen networks; `load_state_dict` has ours
        self.counters = Counters()
        self.groups: dict[str, Group] = {}
        self.frozen_identities: dict[str, str] = {}
        self._inside_step = self._stop_wanted = self._finished = False
        self._pending: Plain | None = None
        self._losses: list[tuple[str, Tensor]] = []
        self._scalars: dict[str, list[Tensor | float]] = {}
        self._seen: list[dict[str, Tensor]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, wrap in (("configure_model", once), ("training_step", _as_training_step)):
            if name in vars(cls):
                setattr(cls, name, wrap(vars(cls)[name]))

    # ---- what a method calls -------------------------------------------------------------------------------------

    def add_group(
        self, name: str, network: nn.Module, options: GroupOptions, parameters: Callable[[str], bool] | None = None
    ) -> nn.Module:
        """Registers a trained network as `self.<name>`; its EMA twin is `self.groups[name].ema`.

        Build every network of the method first, copies included: this call shards, and a sharded network cannot be
        copied.
        """
        refuse_quantized(name, network)
        if self.may_rest is not None and name not in self.may_rest and (options.every, options.start) != (1, 0):
            given = f"every {options.every}, start {options.start}"
            what = "This group is updated in every training step"
            raise UserError(what, where=f"model.{name}", given=given, fix="every: 1, start: 0")
        group = self.groups[name] = Group(name, network, options, parameters)
        mesh = mesh_of(self)
        if self.common.precision == "bf16" and mesh is None:
            what = "bf16 training needs the FSDP2 strategy, which keeps float32 master weights"
            fix = "base: [../trainer/gpu.yaml], which runs FSDP2 with one process"
            raise UserError(what, where="model.common.precision", given="bf16", fix=fix)
        for member in [network] if group.ema is None else [network, group.ema]:
            if self.common.compile == "blocks":
                compile_blocks(member)
            if mesh is not None:
                shard_network(member, mesh, self.common.precision)
        self.add_module(name, network)
        if group.ema is not None:
            self.add_module(f"{name}_ema", group.ema)
        return network

    def add_frozen(self, name: str, network: nn.Module, identity: str, dtype: torch.dtype | None = None) -> nn.Module:
        """Registers a network that is never trained as `self.<name>`.

        Args:
            identity: `folder_identity` of where its weights come from; the checkpoint records it.
            dtype: own precision of its weights.
        """
        bits = self.common.quantize.get(name)
        place_frozen(network, dtype, mesh_of(self), bits if self.quantizes else None)
        self.frozen_identities[name] = f"{identity} in {bits}" if bits else identity
        self.add_module(name, network)
        return network

    @property
    def keys(self) -> Keys:
        """The source of draws of the current training step."""
        return Keys(self.common.seed, step=self.counters.step)

    def due(self, name: str) -> bool:
        """Whether the group is updated in the current training step."""
        return self.groups[name].due(self.counters.step)

    def backward(self, names: str | tuple[str, ...], loss: Tensor, **scalars: Tensor) -> None:
        """Adds the gradient of a loss, averaged over the training step, to the named groups and to no other.

        It takes the place of Lightning's hook of the same name, which manual optimisation never calls.

        Args:
            names: a group, or several that share the loss (a denoiser and its text encoder).
            loss: scalar, a mean over the micro-batch.
            scalars: further values to log beside the loss.
        """
        names = (names,) if isinstance(names, str) else names
        if not all(self.due(name) for name in names):
            raise RuntimeError(f"backward({names}) in a training step in which a group is not due; ask self.due first")
        others = [p for other, g in self.groups.items() if other not in names for p in g.parameters]
        held = [p.grad for p in others]
        for parameter in others:
            parameter.grad = None
        (loss / self.common.accumulate).backward()
        for parameter, gradient in zip(others, held, strict=True):
            parameter.grad = gradient
        self._losses.append((names[0], loss.detach()))
        self.note(**{f"{names[0]}/loss": loss, **{f"{names[0]}/{k}": v for k, v in scalars.items()}})

    def note(self, **scalars: Tensor | float) -> None:
        """Keeps values for the log line of this training step, which has their mean over its micro-batches; dropped in
        steps that are not logged."""
        if self.logs_now:
            for name, value in scalars.items():
                self._scalars.setdefault(name, []).append(value.detach() if isinstance(value, Tensor) else value)

    def gathered(self, rows: Tensor, gradients: bool = False) -> Tensor:
        """The rows of all processes in the order of their ranks: [B, ...] -> [W B, ...].

        In a training step every process has as many; the shares of a last batch of validation may differ.

        Args:
            gradients: let gradients flow back to the process that a row came from.
        """
        if self._trainer is None or self.trainer.world_size == 1:
            return rows
        if self.trainer.training:
            return self.all_gather(rows, sync_grads=gradients).flatten(0, 1)
        counts = self.all_gather(torch.tensor(len(rows), device=rows.device)).tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        return torch.cat([own[:count] for own, count in zip(self.all_gather(padded), counts, strict=True)])

    @property
    def logs_now(self) -> bool:
        """Whether this training step has a log line: the first in which all groups are due after `log_every` more."""
        step, every = self.counters.step, self.common.log_every
        period = math.lcm(*(group.options.every for group in self.groups.values()))
        return step == 0 or (step % period == 0 and (step + 1) // every > (step + 1 - period) // every)

    def generator_of(self, name: str) -> nn.Module:
        """The network to sample from: the EMA twin where there is one."""
        return self.groups[name].ema or self.groups[name].network

    # ---- the training step ---------------------------------------------------------------------------------------

    def _begin(self, batch: Batch) -> None:
        # Until they are reduced, gradients of shards wait where `backward` cannot tell whose they are.
        reduced = self.counters.micro + 1 == self.common.accumulate or len(self.groups) > 1
        for group in self.groups.values():
            set_gradient_sync(group.network, reduced)
        self.keys.seed_globals(self.counters.micro, self.global_rank)
        self._seen.append({name: records.id for name, records in batch.items()})

    def _finish(self, batch: Batch) -> None:
        counters = self.counters
        counters.samples += len(batch["main"]) * self.trainer.world_size
        counters.batches, counters.micro = counters.batches + 1, counters.micro + 1
        if counters.micro < self.common.accumulate:
            return
        due = [g for g in self.groups.values() if g.due(counters.step)]
        norms = {g.name: g.gradient_norm() for g in due}
        if self.common.check_finite:
            stop_unless_finite(self, self._losses, norms, self._seen)
        for group in due:
            group.step(norms[group.name])
            group.average(counters.step)
        for group in self.groups.values():
            group.advance_schedule()
            group.clear_gradients()
        self._log(norms)
        counters.micro, counters.step = 0, counters.step + 1
        self._losses, self._scalars, self._seen = [], {}, []
        advance_global_step(self.trainer)

    def _log(self, norms: dict[str, Tensor]) -> None:
        listens = self._trainer is not None and (self.trainer.loggers or self.trainer.progress_bar_callback)
        if not self.logs_now or not listens:
            return
        for name, group in self.groups.items():
            self._scalars[f"{name}/lr"] = [group.learning_rate()]
            if name in norms:
                self._scalars[f"{name}/grad_norm"] = [norms[name]]
        as_float = functools.partial(torch.as_tensor, dtype=torch.float32, device=self.device)
        values = torch.stack([torch.stack([as_float(v) for v in many]).mean() for many in self._scalars.values()])
        values = self.trainer.strategy.reduce(values, reduce_op="mean")
        metrics = dict(zip(self._scalars, values.tolist(), strict=True)) | {"samples": self.counters.samples}
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.counters.step + 1)
        self.log_dict({k: v for k, v in metrics.items() if k.endswith("/loss")}, prog_bar=True, logger=False)

    # ---- Lightning's hooks ---------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        interval = self.trainer.val_check_interval
        if stage == "fit" and isinstance(interval, int):  # Lightning counts batches there; we mean training steps
            self.trainer.val_check_interval = interval * self.common.accumulate

    def configure_optimizers(self) -> list[Any]:
        """Builds the optimizers of all groups; Lightning is given none, for the engine steps them."""
        for group in self.groups.values():
            group.build()
        if self._pending is not None:
            self._load_groups(self._pending)
        return []

    def train(self, mode: bool = True) -> MethodModule:
        super().train(mode)
        for name in self.frozen_identities:
            getattr(self, name).eval()
        for group in self.groups.values():
            if group.ema is not None:
                group.ema.eval()
        return self

    def on_train_start(self) -> None:
        self._stop_wanted = False
        if self.common.validate_first and self.counters.step == 0 and self.trainer.enable_validation:
            validate_now(self.trainer)
        self.train()  # frozen networks and EMA twins back to eval, whatever Lightning remembered

    def on_train_batch_end(self, *unused: Any) -> None:
        """A wish to stop (trainer.max_time) waits for the end of the training step, whose state alone can be saved."""
        self._stop_wanted = self._stop_wanted or self.trainer.should_stop
        self.trainer.should_stop = self._stop_wanted and self.counters.at_boundary

    def finish(self) -> None:
        """Called when the last training step is done, once in each process that sees the end; collective."""

    def on_train_end(self) -> None:
        if not self._finished and 0 < self.trainer.max_steps <= self.trainer.global_step:
            self._finished = True
            self.to(self.trainer.strategy.root_device)  # when a fit ends, the strategy has taken it to the CPU
            self.finish()

    def on_fit_end(self) -> None:
        """A run that was killed in its `finish` has no step left when resumed: Lightning calls no other hook then."""
        self.on_train_end()

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Pictures for the records of a batch, by a method that generates."""
        assert isinstance(self, Generates)
        main = batch["main"]
        return self.sample(self.condition(main), self.keys.fork("predict"), main.position)
