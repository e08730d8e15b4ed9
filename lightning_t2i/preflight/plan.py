"""What `check` found, as plain values and as text."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_t2i.preflight.bill import Bill
from lightning_t2i.preflight.captions import Captions
from lightning_t2i.preflight.doubts import Doubt
from lightning_t2i.preflight.fetch import Cache
from lightning_t2i.preflight.sources import Source, Store, free_bytes
from lightning_t2i.preflight.world import World

ORDER = ("weights", "gradients", "optimizer", "EMA", "frozen", "batch", "activations", "kept values")
GB = 1e9
SMALLEST = 0.5e6  # bytes that a table of GB shows


@dataclass
class Plan:
    """The findings of a check.

    title; world; bill; steps of the training; sources; ram: bytes that the loaders of a node hold; stores; rate:
    operations per second that one device is assumed to do, with `assumed` saying why; workers of a stream; hub;
    doubts; texts: captions by training stream; seconds that the check took.
    """

    title: str
    world: World
    bill: Bill
    steps: int
    sources: list[Source]
    ram: int
    stores: list[Store]
    rate: float
    assumed: str
    workers: int
    hub: Cache
    doubts: list[Doubt]
    texts: list[Captions] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def eta(self) -> float:
        """Seconds of computation alone, at the assumed rate."""
        return self.steps * self.bill.flops_of.total() / self.rate if self.steps > 0 else math.nan

    def plain(self) -> dict[str, Any]:
        """For machines: sizes in bytes, times in seconds."""
        bill, world = self.bill, self.world
        return {
            "method": self.title,
            "ranks": world.ranks,
            "nodes": world.nodes,
            "mesh": world.mesh,
            "networks": [asdict(network) for network in bill.networks],
            "optimizers": bill.optimizers,
            "memory_per_rank": {**{name: bill.memory[name] for name in ORDER}, "peak": bill.peak, "step": bill.worst},
            "flops_per_step_and_rank": {"total": bill.flops_of.total(), "networks": dict(bill.flops_of)},
            "collectives_per_step_and_rank": {
                f"{name} {'between' if between else 'inside'} nodes": size
                for (name, between), size in bill.moved.items()
            },
            "checkpoint": bill.checkpoint,
            "writes": [{**asdict(s), "place": str(s.place), "free": free_bytes(s.place)} for s in self.stores],
            "data": [asdict(source) for source in self.sources],
            "ram_per_node": self.ram,
            "captions": [asdict(captions) for captions in self.texts],
            "steps": self.steps,
            "eta": {"seconds": None if math.isnan(self.eta) else self.eta, "flops_per_second": self.rate},
            "assumed": [*world.assumed, self.assumed],
            "absent": sorted(bill.absent),
            "hub": [
                {"id": name, "revision": r, "commit": folder and folder.name} for (name, r), folder in self.hub.items()
            ],
            "warnings": [asdict(doubt) for doubt in self.doubts],
            "seconds": self.seconds,
        }

    def text(self) -> str:
        """For people. Nothing in it was measured; assumptions are named."""
        parts = [
            self._head(),
            self._networks(),
            self._memory(),
            self._moved(),
            self._written(),
            self._data(),
            self._captions(),
        ]
        return "\n\n".join([*(part for part in parts if part), self._time(), self._warnings()])

    def _head(self) -> str:
        mesh = f", (replicate, shard) = {self.world.mesh}" if self.world.mesh else ""
        ranks, nodes = counted(self.world.ranks, "process", "es"), counted(self.world.nodes, "node")
        return f"{self.title}\n{ranks} on {nodes}{mesh}; {counted(self.steps, 'step')}"

    def _networks(self) -> str:
        spent: Counter[str] = Counter()
        for name, flops in self.bill.flops_of.items():
            spent[name.partition(".")[0]] += flops
        lines = [f"{'network':30}{'parameters':>16}{'trained':>16}  {'precision':19}{'GB a process':>13}{'TFLOP':>12}"]
        for n in self.bill.networks:
            cost = f"{spent[n.name] / 1e12:,.3f}" if spent[n.name] else ""
            name = n.name if n.kind in ("trained", "EMA") else f"{n.name} ({n.kind})"
            if not n.parameters and n.kind != "frozen":
                lines.append(f"{n.name} (in {n.kind})")
                continue
            row = f"{name:30}{n.parameters:>16,}{n.trained:>16,}  {n.precision:19}{n.bytes / GB:>13.3f}{cost:>12}"
            lines.append(row)
        if spent[""]:
            lines.append(f"{'outside of networks':30}{'':66}{spent[''] / 1e12:>12,.3f}")
        lines.append(f"{'a step of one process':30}{'':66}{spent.total() / 1e12:>12,.3f}")
        return "\n".join(lines)

    def _memory(self) -> str:
        lines = [f"memory of a process, GB (at the worst moment of step {self.bill.worst})"]
        lines += [f"  {name:14}{self.bill.memory[name] / GB:>9.3f}" for name in ORDER if self.bill.memory[name]]
        return "\n".join([*lines, f"  {'peak':14}{self.bill.peak / GB:>9.3f}"])

    def _moved(self) -> str:
        if self.world.ranks == 1:
            return ""
        lines = ["collectives of a step, GB through a process"]
        for (name, between), size in sorted(self.bill.moved.items(), key=str):
            if size < SMALLEST:  # a norm or the like
                continue
            shown = name.strip("_").replace("_base", "")
            lines.append(f"  {shown:18}{'between' if between else 'inside'} nodes{size / GB:>10.3f}")
        return "\n".join(lines)

    def _written(self) -> str:
        lines = ["written, GB (free)"]
        for store in self.stores:
            size = "unknown" if store.bytes is None else f"{store.bytes / GB:.3f}"
            lines.append(f"  {store.what:34}{size:>9} ({free_bytes(store.place) / GB:.1f})  {store.place}")
        return "\n".join(lines)

    def _data(self) -> str:
        readers = f"{counted(self.world.ranks, 'process', 'es')} x {counted(max(self.workers, 1), 'reader')}"
        lines = [
            f"data ({readers}; the order of samples does not depend on them); loaders of a node {self.ram / GB:.3f} GB"
        ]
        for (name, revision), folder in self.hub.items():
            lines.append(f"  hub     {name} at {revision}: {folder.name if folder else 'not in the local cache'}")
        for s in self.sources:
            rows = "not there" if not s.there else "unknown" if s.rows is None else f"{s.rows:,} samples"
            shards = f" in {s.shards} shards" if s.shards else ""
            lines.append(f"  {s.name:8}{rows}{shards}  {s.place}")
        return "\n".join(lines)

    def _captions(self) -> str:
        """Numbers for `text: online | cached`."""
        lines = ["captions (text: online or cached)"] if self.texts else []
        for c in self.texts:
            epochs = "" if c.epochs is None else f", {c.epochs:,.3g} epochs"
            real = f"{c.tokens:.1f} of {c.length} tokens a caption"
            lines.append(f"  {c.name:8}{c.text}; encoding is {c.share:.1%} of a step's operations{epochs}; {real}")
            if c.captions is None or c.made is None:
                kilobytes = {name: size / 1e3 for name, size in c.sizes.items()}
                shown = "a caption costs {bf16:.1f} kB in bf16, {fp8:.1f} in fp8, {padded:.1f} padded".format(
                    **kilobytes
                )
                lines.append(f"{'':10}in a cache {shown}")
                continue
            sizes = {name: c.captions * size / GB for name, size in c.sizes.items()}
            shown = "{bf16:,.3f} GB in bf16, {fp8:,.3f} in fp8, {padded:,.3f} padded".format(**sizes)
            lines.append(f"{'':10}a cache of {c.captions:,} captions: {shown}")
            made, saved = (duration(abs(x) / self.rate / self.world.ranks) for x in (c.made, c.spent - c.made))
            change = f"saves {saved}" if c.spent > c.made else f"costs {saved} more than it saves"
            lines.append(f"{'':10}it takes {made} and {change}: {c.better}")
        return "\n".join(lines)

    def _time(self) -> str:
        shown = "unknown" if math.isnan(self.eta) else duration(self.eta)
        lines = [f"computation: {shown}, assumed {self.rate / 1e12:g} TFLOP/s on each device ({self.assumed})"]
        lines += [f"assumed: {line}" for line in self.world.assumed]
        return "\n".join([*lines, "not counted: waiting for data and collectives, validation, samples, checkpoints"])

    def _warnings(self) -> str:
        if not self.doubts:
            return f"no warnings ({self.seconds:.0f} s)"
        lines = [f"{len(self.doubts)} warnings ({self.seconds:.0f} s)"]
        for i, doubt in enumerate(self.doubts, 1):
            lines.append(f"{i:3}. {doubt.what}\n     key: {doubt.key}\n     fix: {doubt.fix}")
        return "\n".join(lines)


def counted(number: int, name: str, plural: str = "s") -> str:
    """ "1 node", "2 nodes"."""
    return f"{number} {name}{'' if number == 1 else plural}"


def duration(seconds: float) -> str:
    """A time in the two units that fit it."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    for limit, unit, smaller, part in ((3600, "min", "s", 60), (86400, "h", "min", 3600)):
        if seconds < limit:
            rest = int(seconds % part) // (1 if smaller == "s" else 60)
            return f"{int(seconds // part)} {unit} {rest} {smaller}"
    return f"{int(seconds // 86400)} d {int(seconds % 86400 // 3600)} h"
