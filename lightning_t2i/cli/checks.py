"""What no type can say: settings that this repository replaces, and values that contradict each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_t2i.cli.configs import Merged
from lightning_t2i.cli.explain import descend
from lightning_t2i.errors import UserError

# trainer option -> (values that are fine, what takes its place)
REPLACED: dict[str, tuple[tuple[Any, ...], str]] = {
    "accumulate_grad_batches": ((None, 1), "model.init_args.common.accumulate"),
    "gradient_clip_val": ((None,), "the `clip` of a method's group, such as model.init_args.student.clip"),
    "gradient_clip_algorithm": ((None,), "the `clip` of a method's group"),
    "precision": ((None, "32", "32-true", 32), "model.init_args.common.precision"),
    "logger": ((None, True), "tracking; metrics.jsonl is always written"),
    "default_root_dir": ((None,), "--run and the environment variable LIGHTNING_T2I_RUNS"),
    "enable_checkpointing": ((None, False), "checkpoints.every and checkpoints.keep"),
    "use_distributed_sampler": ((None, False), "nothing: the data module gives every rank its slice"),
    "barebones": ((None, False), "samples.enabled, throughput.enabled and tracking.wandb"),
}


def semantic(merged: Merged, verb: str) -> Iterator[UserError]:
    """Mistakes in a merged config that are none of the parser's."""
    trainer = merged.config.get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}

    for name, example in (("model", "lightning_modules.diffusion.Diffusion"), ("data", "datamodules.streams.Streams")):
        if merged.config.get(name) is None:
            fix = f"{name}: {{class_path: {example}, init_args: {{...}}}}, or a `base:` that has it"
            yield UserError("A section is missing", where=name, fix=fix)

    def at(key: str) -> str:
        source = merged.source_of(key)
        return f"{key} ({source})" if source else key

    for name, (fine, instead) in REPLACED.items():
        if name in trainer and trainer[name] not in fine:
            yield UserError(
                "This Trainer option has another place here",
                where=at(f"trainer.{name}"),
                given=trainer[name],
                fix=instead,
            )
    strategy = trainer.get("strategy")
    if isinstance(strategy, str) and strategy != "auto":
        yield UserError(
            "Several processes run through one strategy, FSDP2",
            where=at("trainer.strategy"),
            given=strategy,
            fix="{class_path: lightning_t2i.strategies.FSDP2, init_args: {shard: 1}} does what DDP does; null shards",
        )
    steps = trainer.get("max_steps")
    if verb == "fit" and not trainer.get("fast_dev_run"):
        if steps is None and trainer.get("max_time") is None:
            yield UserError("Nothing says how long to train", where="trainer.max_steps", fix="--trainer.max_steps 1000")
        elif isinstance(steps, int) and steps < 1 and not (steps == -1 and trainer.get("max_time")):
            yield UserError(
                "A training needs at least one step", where=at("trainer.max_steps"), given=steps, allowed="1 or more"
            )
    for name in ("seed", "accumulate"):
        if descend(merged.config, ["data", name])[1] is not None:
            yield UserError(
                "This value follows the method's",
                where=at(f"data.init_args.{name}"),
                fix=f"set model.init_args.common.{name} alone",
            )
