"""What each method runs with: docs/support.md, of probes that a test repeats.

    python -m lightning_t2i.support --refresh [--method NAME]   probes again, writes docs/results/support.json, page

A probe trains a method's tiny config on the CPU for two steps, a search for one generation, with one thing changed.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

from lightning_t2i.claims.spec import FURTHER
from lightning_t2i.claims.spec import methods as with_claims
from lightning_t2i.errors import UserError
from lightning_t2i.golden import FOLDER, Golden, record
from lightning_t2i.paths import ROOT
from lightning_t2i.report import table
from lightning_t2i.state_io import write_atomically

RESULT, PAGE = ROOT / "docs" / "results" / "support.json", ROOT / "docs" / "support.md"
PROOFS = ROOT / "docs" / "results" / "proof"
STEPS = {"ecad": 1}  # training steps of a probe, of a search generations; others 2
SMALLER: dict[str, dict[tuple[str, ...], Any]] = {"ecad": {("model", "init_args", "search", "population"): 4}}
AXES = {
    "bf16": "bfloat16 computation with float32 master weights, FSDP2 with one process",
    "compile": "repeated blocks traced by `torch.compile` (no code is generated: backend eager), the same losses",
    "int8": "the weights of a frozen network in 8 bits by bitsandbytes",
    "nf4": "the same in 4 bits",
    "export": "the folder that `train.py export` writes",
}
MESHES = ("1x1", "2x1", "1x2")
FROZEN = ("teacher", "denoiser", "image", "text")  # the frozen network that is quantised: the first that there is
Outcome = dict[str, str]  # outcome: "yes" or "refused"; what: the frozen network, the error, or the files of an export


def methods() -> list[str]:
    """The eight methods: those with claims of a paper."""
    return [method for method in with_claims() if method not in ("combinations", "diffusion", *FURTHER)]


def frozen_network(method: str) -> str:
    """The frozen network of a method whose weights are quantised."""
    names = Golden.load(FOLDER / f"{method}.json").frozen
    return next(name for name in FROZEN if name in names)


@cache
def plain(method: str) -> tuple[Golden, str]:
    """The steps with nothing changed, and the names in the folder that is exported after them."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        steps = record(method, STEPS.get(method, 2), SMALLER.get(method), after=lambda trained: trained.export(out, []))
        return steps, ", ".join(sorted(path.name for path in out.iterdir()))


def probe(method: str, axis: str) -> Outcome:
    """Trains with one thing changed.

    Raises:
        AssertionError: a loss is not finite, or the change has no effect, or one that it must not have.
    """
    common, model = ("model", "init_args", "common"), ("model", "init_args")
    if axis == "export":
        return {"outcome": "yes", "what": plain(method)[1]}
    changes: dict[tuple[str, ...], Any] = {}
    strategy: Any = "auto"
    if axis == "bf16":
        from lightning_t2i.strategies import FSDP2

        changes, strategy = {(*common, "precision"): "bf16"}, FSDP2(replicate=1, shard=1)
    elif axis == "compile":
        changes = {(*common, "compile"): "blocks"}
    elif method == "swiftbrush":  # its teacher is the backbone of the adapter
        changes = {(*model, "base_precision"): axis}
    else:
        changes = {(*common, "quantize"): {frozen_network(method): axis}}
    try:
        with traced():
            changed = record(method, STEPS.get(method, 2), SMALLER.get(method, {}) | changes, strategy)
    except UserError as error:
        return {"outcome": "refused", "what": error.what}
    before, _ = plain(method)
    detail = f"{method}, {axis}: {before} became {changed}"
    assert all(math.isfinite(loss) for step in changed.losses for _, loss in step), detail
    if axis == "compile":
        assert close(before, changed), detail
    if axis == "bf16":
        assert before.losses != changed.losses, detail
    if axis not in ("int8", "nf4"):
        return {"outcome": "yes", "what": ""}
    name = frozen_network(method)
    assert before.frozen[name] != changed.frozen[name], detail  # an identity tells the format
    return {"outcome": "yes", "what": name}


def traced() -> Any:
    """torch.compile without the generation of code, which takes a CPU minutes."""
    import torch

    return mock.patch("torch.compile", partial(torch.compile, backend="eager"))


def close(a: Golden, b: Golden) -> bool:
    """Whether two trainings had the same losses but for rounding."""
    pairs = [(x[1], y[1]) for old, new in zip(a.losses, b.losses, strict=True) for x, y in zip(old, new, strict=True)]
    return bool(pairs) and all(math.isclose(x, y, rel_tol=1e-4, abs_tol=1e-8) for x, y in pairs)


def probed(method: str, axes: Sequence[str] = tuple(AXES)) -> dict[str, Outcome]:
    """Probes of a method, in a process of its own: a strategy leaves a process group behind."""
    command = [sys.executable, "-m", "lightning_t2i.support", "--probe", method, *axes]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"the probes of {method} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Outcome] = json.loads(done.stdout.splitlines()[-1])
    return found


def meshes(method: str) -> dict[str, str]:
    """Mesh -> kills that a proof survived on it."""
    file = PROOFS / f"{method}.json"
    proofs = json.loads(file.read_text(encoding="utf-8"))["proofs"] if file.is_file() else []
    return {proof["mesh"]: f"{len(proof['kills'])} kills" for proof in proofs}


def page(results: dict[str, dict[str, Outcome]]) -> str:
    """docs/support.md."""
    rows, notes = [], []
    for method, found in results.items():
        proved = meshes(method)
        cells = [f"`{method}`", *(proved.get(mesh, "not proved") for mesh in MESHES)]
        for axis in AXES:
            of = found[axis]
            notes += [f"- `{method}`, {axis}: {of['what']}."] if of["outcome"] == "refused" or axis == "export" else []
            shown = f"yes ({of['what']})" if axis in ("int8", "nf4") and of["outcome"] == "yes" else of["outcome"]
            cells.append(shown)
        rows.append(cells)
    text = [
        "# What runs with what",
        "Made by `python -m lightning_t2i.support --refresh` from probes that `tests/lightning_t2i/test_support.py` "
        "repeats, those of bf16 and compile for two methods, and for all where LIGHTNING_T2I_LONG_TESTS is set. A "
        "probe trains a method's tiny config on the CPU for two steps, a search for one generation, with one thing "
        "changed. Nothing of this was run on a GPU.",
        table(rows, ("method", *(f"mesh {mesh}" for mesh in MESHES), *AXES)),
        "\n".join(f"- {axis}: {meaning}" for axis, meaning in AXES.items()),
        "Meshes (replicate x shard) are those of `./run proof METHOD`: ten kills on each, and no bit differs. In "
        "brackets: the frozen network that is quantised.",
        "## Refusals and exports",
        "A refusal is the error that is shown before any training.",
        "\n".join(notes),
    ]
    return "\n\n".join(text) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m lightning_t2i.support", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--refresh", action="store_true", help="probe, and write the result and the page")
    parser.add_argument("--method", nargs="+", choices=methods(), default=methods(), help="(default: all)")
    parser.add_argument("--probe", nargs="+", help=argparse.SUPPRESS)  # a method and axes
    given = parser.parse_args(arguments)
    if given.probe:
        method, *axes = given.probe
        print(json.dumps({axis: probe(method, axis) for axis in axes}))
        return 0
    results = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    if given.refresh:
        results |= {method: probed(method) for method in given.method}
        results = {method: results[method] for method in methods() if method in results}
        write_atomically(RESULT, (json.dumps(results, indent=1) + "\n").encode())
    write_atomically(PAGE, page(results).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
