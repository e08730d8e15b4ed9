"""`python train.py check --config FILE`: what a training would need, and what in its config cannot be meant."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from callbacks.checkpoints import CheckpointOptions
from lightning_t2i.cli import runs
from lightning_t2i.cli.configs import merge
from lightning_t2i.cli.explain import descend
from lightning_t2i.cli.main import Request, loading
from lightning_t2i.cli.verbs import opened
from lightning_t2i.preflight.bill import Bill
from lightning_t2i.preflight.captions import captions_of, text_caches
from lightning_t2i.preflight.doubts import doubts
from lightning_t2i.preflight.fetch import Cache, cached, fetch, hub_sources
from lightning_t2i.preflight.plan import Plan
from lightning_t2i.preflight.rehearsal import rehearse
from lightning_t2i.preflight.sources import Store, caches, ram_per_process, source_of
from lightning_t2i.preflight.world import World
from lightning_t2i.protocols import Searches

# Operations per second of one device where --tflops says nothing: a share of a data sheet's peak that trainings of
# these networks commonly reach, and what one core of a server does in matrix products.
MFU, A100, CORE = 0.4, {"bf16": 312e12, "fp32": 156e12}, 0.03e12


def check(request: Request) -> int:
    """Prints the plan of a training; returns 0, with warnings too.

    Raises:
        UserError: mistakes that `fit` would refuse, and networks or batches that do not fit the processes.
    """
    began = time.perf_counter()
    merged = merge(request.configs, request.overrides).config
    trains = descend(merged, ["data", "main"])[1] is not None or not request.configs
    with loading():
        found = opened(replace(request, verb="fit" if trains else "predict"))
    if found is None:
        return 0
    session, config = found
    wanted = sorted(hub_sources(config))
    hub = fetch(wanted) if request.fetch else {source: cached(source) for source in wanted}
    plan = planned(session, config, request, hub)
    plan.seconds = time.perf_counter() - began
    sys.stdout.write((json.dumps(plan.plain(), indent=1) if request.json else plan.text()) + "\n")
    return 0


def planned(session: Any, config: dict[str, Any], request: Request, hub: Cache) -> Plan:
    """The plan of a constructed session; its method is of no other use afterwards."""
    method, data, given = session.method, session.data, session.config_init
    world = World.of(given.trainer, request.ranks, request.nodes)
    steps = config["trainer"]["max_steps"]
    bill = rehearse(method, data, world, max(steps, 1))
    streams = getattr(data, "training", {})
    sources = [source_of(name, stream) for name, stream in streams.items()]
    if isinstance(method, Searches) and sources and (rows := sources[0].rows) is not None:
        method.check_batch(rows, streams[sources[0].name].batch_size, world.ranks)
    workers = getattr(data, "workers", 0)
    ram = world.per_node * ram_per_process(sources, bill.batch, workers)
    folder = runs.runs_root() / runs.run_name(request.run, request.configs)
    stores = [*checkpoints(bill, given.checkpoints, steps, folder)] if bill.checkpoint else []
    every = {**streams, **getattr(data, "finite", {})}
    texts = captions_of(method, streams, sources, bill, world.ranks, max(steps, 0))
    stores += [*caches(every), *text_caches(texts, every)]
    rate, assumed = assumed_rate(given.trainer.accelerator, method.common.precision, request.tflops)
    title = (sys.modules[type(method).__module__].__doc__ or type(method).__name__).strip().splitlines()[0]
    found = doubts(config, method, world, bill, sources, stores, ram, hub)
    return Plan(title, world, bill, steps, sources, ram, stores, rate, assumed, workers, hub, found, texts)


def checkpoints(bill: Bill, options: CheckpointOptions, steps: int, folder: Path) -> Iterator[Store]:
    """What a training keeps in its run folder."""
    ever = steps // options.keep_every if options.keep_every else 0
    kept = (
        options.keep + 1 + ever + (options.best.keep if options.best else 0)
    )  # the newest comes before the oldest goes
    count = min(kept, 1 + steps // options.every if options.every else 1) if steps > 0 else kept
    yield Store(f"{count} checkpoint{'s' if count > 1 else ''}", folder, count * bill.checkpoint, "checkpoints.keep")
    if options.ema.every and bill.snapshot:
        count = min(options.ema.keep, steps // options.ema.every) if steps > 0 else options.ema.keep
        yield Store(f"{count} snapshots of averages", folder, count * bill.snapshot, "checkpoints.ema.keep")


def assumed_rate(accelerator: str, precision: str, tflops: float | None) -> tuple[float, str]:
    """(operations per second of one device, where the number comes from)."""
    if tflops is not None:
        return tflops * 1e12, "--tflops"
    if accelerator == "cpu":
        return CORE, "one core; --tflops says otherwise"
    return MFU * A100[precision], f"{MFU:.0%} of an A100's peak in {precision}; --tflops says otherwise"
