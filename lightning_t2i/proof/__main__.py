"""Proves that resume is exact: a run that is killed again and again ends at the bits of one that is not.

    ./run proof METHOD                     the tiny config of a method, on three meshes, killed ten times on each
    ./run proof FILE                       any config whose classes can be imported, also from beside the file
    ./run proof METHOD --meshes 1x2 --kills 3 --seed 7 [words of train.py fit]

Compared, bit for bit: weights, EMA, optimizer states, counters and positions in the data of the last checkpoint; all
logged values; the loss of every backward and the ids of every micro-batch, on every rank. What was trained once more
after a kill must have been the same the first time. A kill is SIGKILL for all processes of the run at once.
"""

from __future__ import annotations

import argparse
import json
import platform
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_t2i.claims.results import machine
from lightning_t2i.cli.runs import git_state
from lightning_t2i.errors import UserError
from lightning_t2i.paths import ROOT
from lightning_t2i.proof.runs import MESHES, Proof, prove
from lightning_t2i.state_io import write_atomically

RESULTS = ROOT / "docs" / "results" / "proof"


def said(proof: Proof) -> str:
    """One line for a mesh, and one for each of the first differences."""
    cut = sum(s.cut for s in proof.kills)
    kills = f"{len(proof.kills)} kills, {cut} of them in a save (seed {proof.seed})"
    verdict = "no bit differs" if proof.holds else f"{len(proof.differences)} DIFFERENCES"
    return "\n  ".join([f"{proof.mesh}  {kills}: {verdict}", *proof.differences[:20]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 when something differs, 2 for a mistake."""
    parser = argparse.ArgumentParser("./run proof", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("name", metavar="METHOD|FILE")
    parser.add_argument("--meshes", nargs="+", default=MESHES, metavar="RxS", help="replicate x shard; default: three")
    parser.add_argument("--kills", type=int, default=10, metavar="N", help="on each mesh; default: 10")
    parser.add_argument("--steps", type=int, default=33, metavar="N", help="training steps; default: 33")
    parser.add_argument("--seed", type=int, help="of the first mesh's moments, the next ones count up; default: random")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="default: docs/results/proof")
    options, overrides = parser.parse_known_args(arguments)
    first = secrets.randbelow(10_000) if options.seed is None else options.seed
    began, found = time.monotonic(), git_state()
    proofs: list[Proof] = []
    try:
        for seed, mesh in enumerate(options.meshes, start=first):
            with tempfile.TemporaryDirectory() as folder:
                proofs.append(prove(options.name, Path(folder), mesh, seed, options.kills, options.steps, overrides))
            print(said(proofs[-1]), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        "name": options.name,
        "words": overrides,
        "commit": found.get("commit"),
        "changed": found.get("changed"),
        "machine": machine(),
        "system": platform.system(),
        "seconds": round(time.monotonic() - began),
        "proofs": [proof.plain() for proof in proofs],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{Path(options.name).stem}.json"
    write_atomically(file, (json.dumps(result, indent=1) + "\n").encode())
    print(f"written: {file}")
    return 0 if all(proof.holds for proof in proofs) else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
