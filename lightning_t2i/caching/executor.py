"""Runs a transformer under a schedule: `with apply(pipeline, "schedule.json"): pipeline(prompt, ...)`.

    y = f(x), kept if a later step reads it      where the schedule computes component f
    y = what was kept                            where it does not; then h = h + gate y as always, with this step's gate

Hooks stand on the component modules of the stock network, or on its blocks where these run as static programs
(`programs.py`). The row of the schedule follows the time that the transformer is called with, never a count of calls:
both passes of a guidance in two passes, and a solver that calls twice at one time, find the same row. Slots belong to a
cache context of diffusers ("cond", "uncond"), and are empty when a sampling begins.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook, StateManager
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_t2i.caching.layout import COMPONENTS, PER_BLOCK, Layout
from lightning_t2i.caching.programs import PROGRAMS, program
from lightning_t2i.caching.schedule import Plan, Schedule
from lightning_t2i.errors import UserError

log = logging.getLogger(__name__)
NAME = "lightning_t2i.caching"
Kind = Literal["hooks", "static", "compiled"]
Times = Callable[[], Tensor]


class Slots:
    """What is kept in one cache context: the step it stands at, its calls, and the value of each column.

    `several` says whether a step was called more than once, as by Heun's method.
    """

    def __init__(self) -> None:
        self.step, self.calls, self.several = -1, 0, False
        self.values: dict[int, Any] = {}

    def leave(self, plan: Plan | None) -> None:
        """Drops what no step after this one reads."""
        if plan is not None and self.step >= 0:
            self.values = {column: value for column, value in self.values.items() if plan.keep[self.step, column]}

    @property
    def bytes(self) -> int:
        """Bytes that the kept tensors take."""
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                    for x in tree_leaves(list(self.values.values())) if isinstance(x, Tensor)}  # fmt: skip
        return sum(storages.values())


class Executor:
    """Attached to a transformer until `detach`; also a context manager.

    Args:
        backbone: PixArt or FLUX transformer.
        times: gives the N times that it will be called with, in the order of the steps.
        kind: "hooks" on components; "static" runs each block as a program of its mask, eagerly; "compiled" compiles
            these programs, at most 8 for each class of blocks.

    Attributes:
        peak: largest number of bytes kept between two steps since `use`.
    """

    def __init__(self, backbone: nn.Module, times: Times, kind: Kind = "hooks"):
        self.backbone, self.times, self.kind = backbone, times, kind
        self.layout = Layout.of(backbone)
        self.contexts: dict[str, Slots] = {}
        self.schedule: Schedule | None = None
        self.plan: Plan | None = None
        self.slots, self.peak = Slots(), 0
        self._attached: list[tuple[nn.Module, bool, bool]] = []
        self.attach()

    def use(self, schedule: Schedule | None) -> Executor:
        """Runs this schedule from the next sampling on; None computes everything and keeps nothing.

        Raises:
            UserError: it was made for another network.
        """
        if schedule is not None:
            schedule.check(self.layout, schedule.steps)
        self.schedule, self.plan = schedule, None if schedule is None else schedule.plan
        self.reset()
        return self

    def reset(self) -> None:
        """Forgets what is kept."""
        self.contexts, self.slots, self.peak = {}, Slots(), 0

    def attach(self) -> None:
        """Puts the hooks on, as the constructor does, after a `detach`."""
        modules = dict(self.backbone.named_modules())
        self._attach(self.backbone, _Begin(self))
        if self.kind == "hooks":
            for column, path in enumerate(self.layout.components):
                self._attach(modules[path], _Component(self, column))
        else:
            for number, (path, block) in enumerate(self.layout.blocks):
                self._attach(modules[path], _Block(self, number, block))
        HookRegistry.check_if_exists_or_initialize(self.backbone).invalidate_child_registries_cache()

    def detach(self) -> None:
        """Leaves the transformer as it was found."""
        for module, had_registry, had_forward in reversed(self._attached):
            registry: Any = module._diffusers_hook
            registry.remove_hook(NAME, recurse=False)
            if not had_forward:
                module.__dict__.pop("forward", None)
            if not had_registry:
                del module._diffusers_hook
        self._attached = []
        if hasattr(self.backbone, "_diffusers_hook"):
            self.backbone._diffusers_hook.invalidate_child_registries_cache()
        self.reset()

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *unused: object) -> None:
        self.detach()

    def _attach(self, module: nn.Module, hook: ModelHook) -> None:
        had_registry, had_forward = hasattr(module, "_diffusers_hook"), "forward" in vars(module)
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, NAME)
        self._attached.append((module, had_registry, had_forward))

    # ---- what hooks ask ------------------------------------------------------------------------------------------

    def begin(self, time: Tensor, context: str) -> None:
        """A call of the transformer begins, at this time."""
        if self.schedule is None:
            return
        times = self.times().to(torch.float64).cpu()
        if len(times) != self.schedule.steps:
            self.schedule.check(self.layout, len(times))
        gaps = (self.rounded(times, time.dtype) - time.flatten()[0].to("cpu", torch.float64)).abs()
        step = int(gaps.argmin())
        if len(times) > 1 and gaps[step] > times.diff().abs().min() / 2:
            what = "The sampler is at a time that is none of the schedule's steps"
            raise UserError(what, where="schedule", given=f"{float(time.flatten()[0]):g}", fix="use the sampler's grid")
        self.slots = self.contexts.setdefault(context, Slots())
        if step < self.slots.step or step == 0:
            self.slots.values, self.slots.several = {}, False  # a new sampling
        if step != self.slots.step:
            for slots in self.contexts.values():
                if slots.step != step:
                    slots.leave(self.plan)
            self.peak = max(self.peak, sum(slots.bytes for slots in self.contexts.values()))
            self.slots.calls = 0
        self.slots.step, self.slots.calls = step, self.slots.calls + 1
        self.slots.several |= self.slots.calls > 1

    def rounded(self, times: Tensor, dtype: torch.dtype) -> Tensor:
        """Times, float64 [N], as they come from diffusers' pipelines in this precision.

        A pipeline of half precision rounds t; FLUX's then divides by 1000, and rounds once more. Near 1 both together
        may be more than half of the distance between two steps (1024 px, 50 steps), so the same is done here.

        Raises:
            UserError: two steps come out as one.
        """
        if dtype not in (torch.float16, torch.bfloat16):
            return times
        scale = scale_of(self.layout)
        found = ((times * scale).float().to(dtype) / scale).to(torch.float64)
        if len(found.unique()) < len(found):
            what, given = "Steps cannot be told apart by their times", f"{len(times)} steps in {dtype}"
            raise UserError(what, where="schedule", given=given, fix="fewer steps, or a pipeline in float32")
        return found

    @property
    def frees(self) -> bool:
        """Whether nothing comes after this call: a solver that calls once in a step is in its last one."""
        assert self.plan is not None
        return self.slots.step == len(self.plan.keep) - 1 and not self.slots.several

    def output(self, column: int, call: Callable[[], Any], blank: Callable[[], Any]) -> Any:
        """What a component gives in this step: `call` computes it, `blank` stands for what nothing reads."""
        if self.plan is None:
            return call()
        step, values = self.slots.step, self.slots.values
        computes, keeps = self.plan.live[step, column], self.plan.keep[step, column]
        if not computes and not self.plan.used[step, column]:
            return blank()
        if not computes and column not in values:
            log.warning("step %d: nothing is kept of %s, so it is computed", step, self.layout.components[column])
            computes = True
        found = call() if computes else values[column]
        if keeps:
            values[column] = found
        elif self.frees:
            values.pop(column, None)
        return found


def scale_of(layout: Layout) -> float:
    """What a scheduler's times are divided by before the transformer is called with them."""
    return 1000.0 if "Flux" in layout.family else 1.0


class _Begin(ModelHook):
    """On the transformer: reads the time of the call, and the context that its caller opened."""

    _is_stateful = True  # diffusers then tells it of contexts

    def __init__(self, executor: Executor):
        super().__init__()
        self.executor, self.state = executor, StateManager(Slots)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if (time := kwargs.get("timestep")) is None:
            raise UserError("The transformer was called without `timestep=`", where="schedule")
        context: Any = self.state._context
        self.executor.begin(time, context.name if context is not None else "")
        return args, kwargs

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.executor.reset()
        return module


class _Component(ModelHook):
    """On one component module."""

    def __init__(self, executor: Executor, column: int):
        super().__init__()
        self.executor, self.column = executor, column

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def blank() -> Tensor:  # only what feeds the projection of a single-stream block is ever unread
            x = args[0] if args else kwargs["hidden_states"]
            width = getattr(module, "out_features", x.shape[-1])
            return x.new_zeros(()).expand(*x.shape[:-1], width)

        return self.executor.output(self.column, lambda: self.fn_ref.original_forward(*args, **kwargs), blank)


class _Block(ModelHook):
    """On one block: runs the program of its mask in place of its forward."""

    def __init__(self, executor: Executor, number: int, kind: str):
        super().__init__()
        self.executor, self.first, self.kind = executor, PER_BLOCK * number, kind

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        executor = self.executor
        plan, step, values = executor.plan, executor.slots.step, executor.slots.values
        columns = range(self.first, self.first + PER_BLOCK)
        mask, slots = [True] * PER_BLOCK, [None] * PER_BLOCK
        if plan is not None:
            for i, column in enumerate(columns):
                mask[i] = bool(plan.live[step, column])
                if not mask[i] and plan.used[step, column]:
                    slots[i] = values.get(column)
                    mask[i] = slots[i] is None  # nothing is kept
                    if mask[i]:
                        name = COMPONENTS[self.kind][i]
                        log.warning("step %d: nothing is kept of %s, so it is computed", step, name)
        compiled, inputs = executor.kind == "compiled", PROGRAMS[self.kind].inputs(*args, **kwargs)
        if compiled:  # the first block gets other strides than the rest, which would be programs of their own
            inputs = tree_map_only(Tensor, Tensor.contiguous, inputs)
        output, found = program(self.kind, tuple(mask), compiled)(tuple(mask), module, slots, *inputs)
        if plan is not None:
            for column, value in zip(columns, found, strict=True):
                if value is not None and plan.keep[step, column]:
                    values[column] = value
                elif executor.frees:
                    values.pop(column, None)
        return output


@contextmanager
def apply(
    target: Any, schedule: Schedule | str | Path, kind: Kind = "hooks", times: Times | None = None
) -> Iterator[Executor]:
    """Runs a pipeline, or a transformer, under a schedule while the context is open.

    Args:
        target: a diffusers pipeline of PixArt or FLUX; or a transformer, with `times`.
        schedule: or its JSON file, or a front of a search (its knee is taken).
        kind: see `Executor`.
        times: see `Executor`; a pipeline's are those of its scheduler. A scheduler with another solver than that of
            the schedule's search is told in the log.

    Raises:
        UserError: the schedule was made for another network, or, when sampling begins, another number of steps.
    """
    found = schedule if isinstance(schedule, Schedule) else Schedule.load(schedule)
    backbone = getattr(target, "transformer", target)
    if times is None:
        if not hasattr(target, "scheduler"):
            raise UserError("A transformer alone does not know the times of its sampler", where="times")
        found.doubt(type(target.scheduler).__name__)
        scale = scale_of(Layout.of(backbone))
        times = lambda: torch.unique_consecutive(target.scheduler.timesteps.cpu().to(torch.float64)) / scale  # noqa: E731
    with Executor(backbone, times, kind).use(found) as executor:
        yield executor
