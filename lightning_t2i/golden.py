"""Golden losses: the losses of the first 20 training steps of each method's tiny config, kept in tests/golden/.

Of a search, whose training step is a generation, the objectives of the candidates of the first 3.

    python -m lightning_t2i.golden                            compares every method that has a golden file
    python -m lightning_t2i.golden --method NAME --refresh    prints the differences, then writes the file

A change that should not touch the mathematics leaves them as they are; one that does shows where the losses part. The
config is taken as it is but for the data: the first scenes of the shapes world, in batches of 8, encoded in the run.

Losses agree to a relative 1e-4 in the first ten steps and to 1e-3 after: rounding differs between processors and
versions of torch and grows over the steps (one commit of the tokenizer gave losses 1.7e-4 apart at step 19 on two
machines), while a changed draw, weight or loss shows in the third digit at the latest. A loss that is the square of a
small difference, and objectives of pictures, are rougher: SwiftBrush's part by 2.2e-3 at step 18 and ECAD's by 3e-4 at
step 1 between processors with AVX-512 and AVX2, and have five times the tolerance.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_t2i.errors import UserError
from lightning_t2i.paths import ROOT

FOLDER = ROOT / "tests" / "golden"
STEPS, BATCH, SCENES = 20, 8, 256
GENERATIONS = {"ecad": 3}  # training steps of methods whose step is a search's generation
ROUGH = {"ecad": 5.0, "swiftbrush": 5.0, "swiftbrush_v2": 5.0}  # factors of the tolerances
EARLY, RTOL, LATER_RTOL = 10, 1e-4, 1e-3  # training steps up to which the first tolerance holds; then the second


@dataclass(frozen=True)
class Golden:
    """What a method's first steps gave.

    method: folder of its configs; frozen: identities of its frozen networks; losses: for each training step the
    (group, loss) of each backward in order.
    """

    method: str
    frozen: dict[str, str]
    losses: list[list[tuple[str, float]]]

    @classmethod
    def load(cls, file: Path) -> Golden:
        """Reads what `save` wrote.

        Raises:
            UserError: there is no such file.
        """
        if not file.is_file():
            fix = f"python -m lightning_t2i.golden --method {file.stem} --refresh"
            raise UserError("There are no golden losses of this method", where=str(file), fix=fix)
        content = json.loads(file.read_text(encoding="utf-8"))
        losses = [[(str(group), float(loss)) for group, loss in step] for step in content.pop("losses")]
        return cls(losses=losses, **content)

    def save(self, file: Path) -> None:
        """Writes JSON with one line per training step."""
        content = asdict(self)
        steps = ",\n".join(f"  {json.dumps(step)}" for step in content.pop("losses"))
        head = json.dumps(content, indent=1).removesuffix("\n}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f'{head},\n "losses": [\n{steps}\n ]\n}}\n', encoding="utf-8")


def methods() -> list[str]:
    """The methods that have a tiny config."""
    return sorted(file.parent.name for file in (ROOT / "configs").glob("*/tiny.yaml"))


def steps_of(method: str) -> int:
    """Training steps that are kept of a method."""
    return GENERATIONS.get(method, STEPS)


def overrides(data: dict[str, Any], folder: Path, limit: int | None = None) -> dict[tuple[str, ...], Any]:
    """What replaces the data of a config: few scenes and small batches for training, nothing to validate on.

    Args:
        limit: scenes of `main`, where a search has fixed ones.
    """
    changed: dict[tuple[str, ...], Any] = {("data", "init_args", name): None for name in ("val", "test", "predict")}
    for name in ("main", "pairs", "real"):
        if data.get(name):
            place, arguments = ("data", "init_args", name, "init_args"), data[name].get("init_args") or {}
            changed[(*place, "batch_size")] = BATCH
            if limit is not None and name == "main":
                changed[(*place, "limit")] = limit
            if arguments.get("source") in ("shapes", "openmoji"):
                changed[(*place, "source")] = str(folder)
            if arguments.get("latents"):
                changed[(*place, "latents")] = None
    return changed


def record(
    method: str,
    steps: int | None = None,
    changes: Mapping[tuple[str, ...], Any] | None = None,
    strategy: Any = "auto",
    after: Callable[[Any], None] = lambda method: None,
) -> Golden:
    """Trains a method's tiny config for a few steps on the CPU, with one thread, in this process.

    Args:
        method: folder of its configs.
        steps: None for as many as golden losses have.
        changes: place in the config -> value.
        strategy: the trainer's.
        after: is given the trained method.

    Raises:
        UserError: there is no such method, or its config has a mistake.
    """
    import lightning as L

    from datamodules.worlds import ensure
    from lightning_t2i.cli.configs import merge
    from lightning_t2i.cli.session import Session

    if method not in methods():
        raise UserError("No such method has a tiny config", where="--method", given=method, allowed=methods())
    limit = BATCH // 2 if method in GENERATIONS else None  # with two seeds each
    folder = ensure("shapes", train=SCENES, val=0, test=0, retrieval=0)
    merged = merge([ROOT / "configs" / method / "tiny.yaml"])
    changed = {**overrides(merged.config["data"]["init_args"], folder, limit), **(changes or {})}
    for place, value in changed.items():
        merged.add(place, value, "lightning_t2i.golden")
    session = Session()
    session.parse(merged, "fit")
    session.construct()
    module = session.method
    with one_thread(), heard(module) as losses, tempfile.TemporaryDirectory() as runs:
        trainer = L.Trainer(
            max_steps=steps or steps_of(method),
            max_epochs=-1,
            accelerator="cpu",
            devices=1,
            strategy=strategy,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            limit_val_batches=0,
            default_root_dir=runs,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no `val_dataloader`")
            trainer.fit(module, session.data)
        after(module)
    return Golden(method, dict(module.frozen_identities), losses)


@contextmanager
def heard(module: Any) -> Iterator[list[list[tuple[str, float]]]]:
    """Keeps the losses that a method gives to `backward`, or a search to `tell`, step by step."""
    losses: list[list[tuple[str, float]]] = []
    backward, tell = module.backward, getattr(module, "tell", lambda objectives: None)

    def told(objectives: Any) -> None:
        named = zip(("quality", "tmacs") * len(objectives), objectives.ravel().tolist(), strict=True)
        losses.append([(name, float(f"{value:.9g}")) for name, value in named])
        tell(objectives)

    def listened(names: str | tuple[str, ...], loss: Any, **scalars: Any) -> None:
        losses.extend([] for _ in range(module.counters.step + 1 - len(losses)))
        losses[-1].append((names if isinstance(names, str) else "+".join(names), float(f"{float(loss.detach()):.9g}")))
        backward(names, loss, **scalars)

    module.backward = listened
    if hasattr(module, "tell"):
        module.tell = told
    try:
        yield losses
    finally:
        del module.backward
        vars(module).pop("tell", None)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums come in one order, whatever the machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def compare(golden: Golden, found: Golden) -> list[str]:
    """Losses that differ, a line each, and then the frozen networks that do; empty when the losses agree."""
    lines = []
    if len(golden.losses) != len(found.losses):
        lines.append(f"training steps: {len(golden.losses)} -> {len(found.losses)}")
    for step, (old, new) in enumerate(zip(golden.losses, found.losses, strict=False), start=1):
        groups = [group for group, _ in old], [group for group, _ in new]
        if groups[0] != groups[1]:
            lines.append(f"step {step:2}: backwards {', '.join(groups[0])} -> {', '.join(groups[1])}")
            continue
        tolerance = (RTOL if step <= EARLY else LATER_RTOL) * ROUGH.get(golden.method, 1.0)
        for (group, a), (_, b) in zip(old, new, strict=True):
            if not math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-8):
                lines.append(f"step {step:2}: {group:16} {a:<14.8g} -> {b:<14.8g} {(b - a) / max(abs(a), 1e-8):+.2%}")
    others = [name for name in sorted(golden.frozen.keys() | found.frozen.keys()) if _changed(name, golden, found)]
    return lines and [*(f"frozen network {name} is another one" for name in others), *lines]


def _changed(name: str, golden: Golden, found: Golden) -> bool:
    return golden.frozen.get(name) != found.frozen.get(name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares or refreshes; returns 1 when golden losses differ and are not refreshed, 2 for a mistake."""
    parser = argparse.ArgumentParser("python -m lightning_t2i.golden", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--method", action="append", metavar="NAME", help="may be repeated; default: all golden files")
    parser.add_argument("--refresh", action="store_true", help="print the differences, then write what was found")
    options = parser.parse_args(arguments)
    differing = 0
    try:
        for method in options.method or sorted(file.stem for file in FOLDER.glob("*.json")):
            file = FOLDER / f"{method}.json"
            found = record(method)
            if options.refresh and not file.is_file():
                lines = [f"{len(found.losses)} training steps, new"]
            else:
                lines = compare(Golden.load(file), found)
            print("\n  ".join([f"{method}: {'golden losses' if lines else 'as before'}", *lines]))
            if options.refresh and lines:
                found.save(file)
                print(f"  written: {file}")
            differing += bool(lines) and not options.refresh
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
