"""Values that a config can have and that cannot be meant: warnings with the key and the fix, never errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_t2i.cli.explain import descend
from lightning_t2i.preflight.bill import Bill
from lightning_t2i.preflight.fetch import Cache, is_hub_id
from lightning_t2i.preflight.sources import Source, Store, free_bytes, machine_ram
from lightning_t2i.preflight.world import World
from lightning_t2i.protocols import Searches

CARD = 80e9  # bytes of the largest card in wide use
RATES = 1e-8, 0.1  # learning rates of the optimizers in use lie well inside
EPOCHS = 10_000
GUIDANCE = 30.0


@dataclass(frozen=True)
class Doubt:
    """key: of the config; what: one sentence; fix: what to write or to run."""

    key: str
    what: str
    fix: str


def doubts(
    config: Mapping[str, Any],
    method: Any,
    world: World,
    bill: Bill,
    sources: list[Source],
    stores: list[Store],
    ram: int,
    hub: Cache,
) -> list[Doubt]:
    """All warnings.

    Args:
        config: resolved.
        method: rehearsed, so that its groups have optimizers and schedules.
        sources: of the training streams.
        stores: what will be written.
        ram: bytes of a node that the loaders hold.
        hub: what of the hub is in the local cache.
    """
    found = [*_missing(hub, bill, sources), *_lengths(config, method), *_places(config, world, bill, stores, ram)]
    for name, group in method.groups.items():
        found += _group(name, group, config["trainer"]["max_steps"])
    return [*found, *_data(config, method, world, sources), *_guidance(config, method)]


def _missing(hub: Cache, bill: Bill, sources: list[Source]) -> Iterator[Doubt]:
    for name in sorted(bill.absent):
        if is_hub_id(name):
            fix = "python train.py check --fetch --config FILE, where there is a network"
        else:
            fix = "make it first; the comments of the config say how"
        yield Doubt(name, "Not on this machine; checked by its published architecture", fix)
    for (name, revision), folder in hub.items():
        if revision == "main":
            what = f"The weights may change between two starts: {name} is at no fixed commit"
            yield Doubt("revision", what, f"revision: {folder.name if folder else 'hash of the commit'}")
    for source in sources:
        if not source.there:
            fix = "make the data first, or correct the path"
            yield Doubt(f"data.{source.name}.source", f"Nothing to read at {source.place}", fix)


def _lengths(config: Mapping[str, Any], method: Any) -> Iterator[Doubt]:
    trainer, steps = config["trainer"], config["trainer"]["max_steps"]
    interval, val = trainer["val_check_interval"], descend(config, ["data", "val"])[1]
    if val and isinstance(interval, int) and interval > steps > 0:
        what = f"Validation every {interval} steps never comes in {steps}"
        yield Doubt("trainer.val_check_interval", what, f"at most {steps}")
    every = config["checkpoints"]["every"]
    if every == 0 or every > steps > 0:
        what = f"No checkpoint before the end of {steps} steps: a kill loses all"
        yield Doubt("checkpoints.every", what, f"for example {max(steps // 10, 1)}")
    if method.common.log_every > steps > 0:
        yield Doubt("model.common.log_every", "Only the first step is logged", f"at most {steps}")
    for name, value in vars(method).items():
        if isinstance(value, dict) and value and all(type(k) is int for k in value) and steps > 0:
            late = sorted(k for k in value if k >= steps)
            if late:
                what = f"What holds from step {late[0]} on is never reached in {steps} steps"
                yield Doubt(f"model.{name}", what, "a larger trainer.max_steps, or an earlier step")


def _group(name: str, group: Any, steps: int) -> Iterator[Doubt]:
    settings = group.optimizer.param_groups[0]
    rate = float(settings.get("initial_lr", settings["lr"]))
    if not RATES[0] <= rate <= RATES[1]:
        yield Doubt(f"model.{name}.optimizer.lr", f"A learning rate of {rate:g}", f"{RATES[0]:g} to {RATES[1]:g}")
    if steps <= 0:
        return
    updates = steps / group.options.every
    if updates < 1:
        yield Doubt(f"model.{name}.every", f"One update in {steps} steps", f"less than {steps}")
    if (ema := group.options.ema) is not None:
        for decay in ema.decays:
            if (1 - decay) * updates < 1:
                what = f"An average over {1 / (1 - decay):,.0f} updates of only {updates:,.0f}"
                yield Doubt(f"model.{name}.ema.decay", what, f"at most {1 - 10 / max(updates, 11):.4g}")
        if ema.start >= steps:
            yield Doubt(f"model.{name}.ema.start", f"The average begins after {steps} steps", f"less than {steps}")
    schedule = group.scheduler
    warmup, total = getattr(schedule, "steps", None), getattr(schedule, "total", None)
    if isinstance(warmup, int) and warmup >= steps:
        what = f"The warm-up of {warmup} steps is longer than the training of {steps}"
        yield Doubt(f"model.{name}.schedule.steps", what, f"less than {steps}")
    if isinstance(total, int) and total != steps:
        what = f"The learning rate ends its way at step {total}, the training at {steps}"
        yield Doubt(f"model.{name}.schedule.total", what, str(steps))
    late = [m for m in getattr(schedule, "milestones", ()) if m >= steps]
    if late:
        what = f"The milestone at step {late[0]} is never reached in {steps} steps"
        yield Doubt(f"model.{name}.schedule.milestones", what, f"less than {steps}")


def _places(config: Mapping[str, Any], world: World, bill: Bill, stores: list[Store], ram: int) -> Iterator[Doubt]:
    if config["trainer"]["accelerator"] != "cpu" and bill.peak > CARD:
        fix = "gradient_checkpointing, a smaller batch with more accumulate, or ../trainer/fsdp.yaml"
        yield Doubt("trainer.strategy", f"{bill.peak / 1e9:.0f} GB on each process fit no card of 80 GB", fix)
    for store in stores:
        free = free_bytes(store.place)
        if store.bytes is not None and store.bytes > free:
            what = f"{store.what}: {store.bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free at {store.place}"
            yield Doubt(store.key, what, "a smaller number, or another disk")
    if ram > machine_ram():
        what = f"The loaders of a node hold {ram / 1e9:.1f} GB; this machine has {machine_ram() / 1e9:.1f} GB"
        yield Doubt("data.main.in_memory", what, "in_memory: false, or fewer workers")


def _data(config: Mapping[str, Any], method: Any, world: World, sources: list[Source]) -> Iterator[Doubt]:
    steps, workers = config["trainer"]["max_steps"], descend(config, ["data", "workers"])[1] or 0
    accumulate = descend(config, ["model", "common", "accumulate"])[1] or 1
    for source in sources:
        if source.rows is None:
            continue
        key = f"data.{source.name}"
        size = descend(config, ["data", source.name, "batch_size"])[1] or 64
        if isinstance(method, Searches):
            pass  # each of its steps goes through all samples, on purpose
        elif source.rows < size:
            what = f"A batch of {size} repeats samples: there are {source.rows}"
            yield Doubt(f"{key}.batch_size", what, f"at most {source.rows}")
        elif steps > 0 and (epochs := steps * accumulate * size / source.rows) > EPOCHS:
            yield Doubt("trainer.max_steps", f"{epochs:,.0f} passes over the {source.rows} samples of {key}", "fewer")
        readers = world.ranks * max(workers, 1)
        if readers > source.rows:
            what = f"{readers} readers for {source.rows} samples"
            yield Doubt("data.workers", what, f"at most {max(source.rows // world.ranks, 1)}")


def _guidance(config: Mapping[str, Any], method: Any) -> Iterator[Doubt]:
    guidance, null = (descend(config, ["model", name])[1] for name in ("guidance", "null_probability"))
    key = "model.guidance" if guidance is not None else "model.sampling.guidance"
    if guidance is None and hasattr(method, "sampling"):  # Fluid's
        guidance = method.sampling.guidance
    if isinstance(guidance, int | float) and not 0 <= guidance <= GUIDANCE:
        yield Doubt(key, f"A guidance of {guidance:g}", f"0 to {GUIDANCE:g}")
    if null == 0 and isinstance(guidance, int | float) and guidance != 1:
        what = f"Samples are guided by {guidance:g}, but the null condition is never trained"
        yield Doubt("model.null_probability", what, "0.1")
