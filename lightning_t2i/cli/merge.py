"""merge: one model of several, from folders with equal networks, or from the deltas of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from lightning_t2i.cli.card import RunFacts, write_card
from lightning_t2i.cli.main import Request
from lightning_t2i.errors import UserError
from lightning_t2i.merging import check_weights, merge_folders
from lightning_t2i.paths import resolve

USAGE = "train.py merge OUT BASE EXPERT EXPERT ... --weights 0.5,0.5, or train.py merge OUT --run NAME"


def merge(request: Request) -> int:
    """Writes a merged model.

    `train.py merge OUT BASE EXPERT ... --weights w,w,... | uniform`: folders with safetensors, tensor by tensor.
    `train.py merge OUT --run NAME [--weights ... | --merge.search METHOD]`: the experts of a run and its config.

    Raises:
        UserError: folders or weights that do not fit, or deltas that are missing.
    """
    overrides = dict(request.overrides)
    text = overrides.pop("weights", None)
    if not request.positional or (request.run is None) != (len(request.positional) > 2):
        raise UserError("merge takes a base and experts, or a run", given=" ".join(request.positional), fix=USAGE)
    out = Path(request.positional[0])
    if request.run is not None:
        return _of_run(request, out, text)
    if text is None or overrides:
        raise UserError("Folders are merged with given weights", where="--weights", given=list(overrides), fix=USAGE)
    base, *experts = (resolve(word) for word in request.positional[1:])
    weights = parse_weights(text, len(experts))
    merge_folders(out, base, experts, weights)
    print(f"merged {len(experts)} experts with weights {', '.join(f'{w:g}' for w in weights)} into {out}")
    return 0


def parse_weights(text: str, number: int) -> list[float]:
    """Numbers with commas between them, or "uniform": 1 / N for each.

    Raises:
        UserError: neither, or not one for each.
    """
    if text == "uniform":
        return [1 / number] * number
    try:
        weights = [float(word) for word in text.strip("[]").split(",")]
    except ValueError as error:
        raise UserError("Not weights", where="--weights", given=text, allowed="uniform, or 0.1,0.1,0.2,0.5") from error
    check_weights(weights, number)
    return weights


def _of_run(request: Request, out: Path, text: str | None) -> int:
    from callbacks.deme_merge import DeMeMerge
    from lightning_t2i.cli import runs
    from lightning_t2i.cli.verbs import opened, told
    from lightning_t2i.state_io import AtomicCheckpointIO, newest

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("The folder exists", where="OUT", given=str(out), fix="name a new folder or remove it")
    request.overrides = [pair for pair in request.overrides if pair[0] != "weights"]
    if text is None and "merge.search" in (asked := dict(request.overrides)) and "merge.weights" not in asked:
        request.overrides.append(("merge.weights", "null"))  # a search that is asked for beats weights of the config
    request.overrides += [
        ("merge.enabled", "true"),
        ("merge.in_validation", "false"),
        ("trainer.limit_val_batches", "1"),
    ]
    if text is not None and text != "uniform":
        request.overrides.append(("merge.weights", f"[{text.strip('[]')}]"))
    elif text == "uniform":
        request.overrides += [("merge.weights", "null"), ("merge.search", "uniform")]
    if (found := opened(request)) is None:
        return 0
    session, _ = found
    folder = runs.runs_root() / runs.run_name(request.run, request.configs)
    if (checkpoint := request.ckpt_path or newest(folder / "checkpoints")) is None:
        raise UserError("The run has no complete checkpoint", where="--run", given=request.run, fix="fit it first")
    merging = DeMeMerge(out, session.config_init.merge)
    trainer = session.build(folder, [], [_At(merging)])
    with told():
        trainer.validate(session.method, session.data, ckpt_path=str(checkpoint), weights_only=True, verbose=False)
    if not out.exists():
        given = f"{len(session.method.found_deltas())} of {session.method.num_ranges}"
        raise UserError("Deltas are missing", where=str(session.method.delta_folder), given=given, fix="fit the others")
    if trainer.is_global_zero:
        method: Any = session.method
        state = AtomicCheckpointIO().load_checkpoint(checkpoint, whole=False)
        sampling = {name: getattr(method, name) for name in ("steps", "guidance")}
        write_card(out, RunFacts.of(folder, method, state), sampling)
        print(f"merged the experts of {folder.name} into {out}")
    return 0


class _At(L.Callback):
    """Merges where a validation ends: the networks are built and restored then, and the data are there."""

    def __init__(self, merging: Any):
        self.merging = merging

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.merging.on_fit_start(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.merging.merge(trainer, pl_module)
