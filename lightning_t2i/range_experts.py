"""Range experts: fine-tunings of one network from the same weights on, one after the other or in jobs of their own.

Each leaves its delta, EMA(theta_i) - theta_0, in a folder; deltas of equal base, division, architecture and recipe can
be merged (lightning_t2i/merging.py). What is trained on which range is the method's affair.
"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_t2i.errors import UserError
from lightning_t2i.frozen import freeze
from lightning_t2i.merging import check_weights, merged, refuse_mixed, save_delta
from lightning_t2i.method import MethodModule
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.networks.projections import inject, projected
from lightning_t2i.options import MethodOptions
from lightning_t2i.state_io import copy_into, full_tensor, local_tensor
from lightning_t2i.streamed import read_header

log = logging.getLogger(__name__)
RATES = 1000  # training steps whose learning rates are part of a recipe


class RangeExperts(MethodModule):
    """Trains the group "student" N times from the same weights, or once for one of the experts.

    A fit has N x K training steps, or K for one expert. Before training step i K the student, its averages, optimizer
    and schedule return to where they were at the beginning, so that an expert does not depend on those before it but by
    the draws of its training steps and samples.

    Args:
        num: N.
        index: the expert to train; None trains all.
        length: K.
        deltas: folder of the deltas, one for all jobs of an array; None is `deltas` in the run's folder.
        precision: of stored deltas.
    """

    identity: str  # of theta_0; set by configure_model
    student: Denoiser
    student_ema: Denoiser

    def __init__(
        self, num: int, index: int | None, length: int, deltas: str | None, precision: torch.dtype,
        common: MethodOptions | None,
    ):  # fmt: skip
        super().__init__(common)
        for name, count in (("num_ranges", num), ("steps_per_range", length)):
            if count < 1:
                raise UserError("At least one is needed", where=f"model.{name}", given=count)
        if index is not None and not 0 <= index < num:
            allowed = f"0 to {num - 1}, or null for all"
            raise UserError("There is no such range", where="model.range_index", given=index, allowed=allowed)
        self.num_ranges, self.range_index, self.steps_per_range = num, index, length
        self.deltas, self.precision = deltas, precision
        self._written: int | None = None  # training steps after which `finish` wrote last

    @abstractmethod
    def read(self) -> nn.Module:
        """theta_0's network from its files, whole and in float32, without projections."""

    @property
    @abstractmethod
    def drawing(self) -> dict[str, Any]:
        """What the loss of all experts has in common: plain values."""

    @property
    def current(self) -> int:
        """The expert that is trained, or was last."""
        done = self.counters.step // self.steps_per_range
        return min(done, self.num_ranges - 1) if self.range_index is None else self.range_index

    def begin_step(self) -> None:
        """Called before each training step: ends an expert and begins the next where it is time."""
        step = self.counters.step
        if self.range_index is None and step and step % self.steps_per_range == 0:
            self.finish()
            self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Student, averages, optimizer and schedule as they were before the first training step."""
        theta = self.read().state_dict()
        for name, weight in self.student.backbone.named_parameters():
            copy_into(weight, theta[name] if name in theta else torch.zeros(weight.shape))
        self.groups["student"].restart()

    # ---- deltas --------------------------------------------------------------------------------------------------

    def taus(self) -> Iterator[tuple[str, Tensor]]:
        """(name, EMA - theta_0) of each weight, on the CPU; a collective call when sharded."""
        theta = self.read().state_dict()
        for name, weight in self.student_ema.backbone.named_parameters():
            whole = full_tensor(weight)
            yield name, (whole - theta[name] if name in theta else whole).to(self.precision)

    def finish(self) -> None:
        """Writes the delta of an expert whose last training step is done, once, on rank 0; all processes call it."""
        step, length = self.counters.step, self.steps_per_range
        if step == 0 or step % length or step == self._written:
            return
        index = step // length - 1 if self.range_index is None else self.range_index
        about = self.about | {"index": index, "steps": length, "seed": self.common.seed}
        writes = self.trainer.is_global_zero
        taus = [tau for tau in self.taus() if writes]  # the others only help to gather, and keep nothing
        if writes:
            save_delta(self.delta_folder / f"range-{index}-of-{self.num_ranges}.safetensors", taus, about)
        self.trainer.strategy.barrier()
        self._written = step

    @property
    def delta_folder(self) -> Path:
        return Path(self.deltas) if self.deltas is not None else Path(self.trainer.default_root_dir) / "deltas"

    @property
    def about(self) -> dict[str, Any]:
        """What deltas have in common that may be merged."""
        names = ",".join(projected(self.student.backbone))
        return {"base": self.identity, "ranges": self.num_ranges, "projected": names, "recipe": self.recipe}

    @cached_property
    def recipe(self) -> str:
        """Digest of how experts are trained: of their loss, length, optimizer, rates, clipping and average.

        Not of index, seed, processes and batches, in which the jobs of an array may differ.
        """
        options = self.groups["student"].options
        optimizer = options.optimizer([nn.Parameter(torch.zeros(1, 1))])
        average = options.ema and asdict(options.ema)
        facts = {**self.drawing, "steps": self.steps_per_range, "clip": options.clip, "ema": average,
                 "optimizer": type(optimizer).__name__, "settings": optimizer.defaults}  # fmt: skip
        if options.schedule is not None:
            schedule, rates = options.schedule(optimizer), []
            optimizer.step()  # which a schedule waits for
            for _ in range(min(self.steps_per_range, RATES)):
                rates += [f"{rate:.6g}" for rate in schedule.get_last_lr()]
                schedule.step()
            facts["rates"] = rates
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def found_deltas(self) -> list[Path]:
        """The deltas that are there, in the order of their experts.

        Raises:
            UserError: one is of another base, division, set of projections or recipe.
        """
        files = sorted(self.delta_folder.glob("range-*.safetensors"))
        abouts = [read_header(file)[1] for file in files]
        ours = {name: str(value) for name, value in self.about.items()}
        refuse_mixed([ours, *({name: about.get(name, "") for name in ours} for about in abouts)])
        order = sorted(range(len(files)), key=lambda i: int(abouts[i]["index"]))
        return [files[i] for i in order]

    def all_deltas(self) -> list[Path] | None:
        """One delta for each expert, or None while some are missing."""
        found = self.found_deltas()
        return found if len(found) == self.num_ranges else None

    # ---- merged weights ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def put(self, network: Denoiser, weights: Sequence[float]) -> None:
        """Overwrites a network like the student, on any mesh, with theta_0 + sum w tau, read tensor by tensor.

        Raises:
            UserError: deltas are missing, or there is not a weight for each.
        """
        files = self.all_deltas()
        if files is None:
            given, fix = f"{len(self.found_deltas())} of {self.num_ranges}", "train the others first"
            raise UserError("Deltas are missing", where=str(self.delta_folder), given=given, fix=fix)
        check_weights(weights, len(files))
        headers, theta = [read_header(file)[0] for file in files], self.read().state_dict()
        for name, parameter in network.backbone.named_parameters():
            base = theta[name] if name in theta else torch.zeros(parameter.shape)
            parts = ((w, h[name].read()) for w, h in zip(weights, headers, strict=True) if w)
            copy_into(parameter, merged(base, parts))

    @contextmanager
    def merged(self, weights: Sequence[float]) -> Iterator[None]:
        """Within, the averaged student is the merged model; afterwards it is what it was, whatever happens."""
        parameters = list(self.student_ema.parameters())
        kept = [local_tensor(p).detach().clone() for p in parameters]
        try:
            self.put(self.student_ema, weights)
            yield
        finally:
            with torch.no_grad():
                for parameter, before in zip(parameters, kept, strict=True):
                    local_tensor(parameter).copy_(before)

    def plain(self, weights: Sequence[float] | None = None) -> Denoiser:
        """theta_0, or the merged model, as a whole frozen network of its own on every process, on any mesh."""
        network = self.read()
        inject(network, projected(self.student.backbone))
        found = Denoiser(network, self.student.process, self.student.prediction, self.student.sigma_data)
        if weights is not None:
            self.put(found, weights)
        return freeze(found).to(self.device)

    def experts(self) -> list[Denoiser]:
        """All experts as whole networks of their own."""
        n = self.num_ranges
        return [self.plain([float(i == j) for j in range(n)]) for i in range(n)]

    # ---- Lightning's hooks ---------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Refuses a fit that is longer than its experts or has no end in training steps, and deltas that could not be
        merged with those to come."""
        length = self.steps_per_range * (self.num_ranges if self.range_index is None else 1)
        given = self.trainer.max_steps
        if not 0 <= given <= length:
            fix = f"--trainer.max_steps {length}, or a larger model.steps_per_range"
            raise UserError("The fit does not end with its ranges", where="trainer.max_steps", given=given,
                            allowed=f"up to {length}", fix=fix)  # fmt: skip
        if 0 < given < length:
            log.warning("%s of %s training steps: ranges that are not finished leave no delta", given, length)
        self.found_deltas()
