"""Merging: theta = theta_0 + sum_i w_i (theta_i - theta_0), of weights in safetensors files, piece by piece.

    python train.py merge OUT BASE EXPERT EXPERT ... --weights 0.1,0.1,0.2,0.5
    python train.py merge OUT --run NAME --weights ... | --search METHOD

An expert is a folder with the networks of BASE (pipelines or single models, of whatever method), or a *delta*: a file
with theta_i - theta_0 of the denoising network (`save_delta`). The sum is float32; what is written has the precision of
BASE. Memory is that of some pieces of a million numbers, whatever the number of experts: nothing is mapped, and while
one piece is summed the next ones are read, once: what files are identified by is hashed on the way.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_t2i.errors import UserError
from lightning_t2i.frozen import folder_identity
from lightning_t2i.networks.load import BACKBONES
from lightning_t2i.state_io import write_atomically
from lightning_t2i.streamed import Digests, Entry, index, read_ahead, read_header, write_streamed

PROVENANCE = "merge.json"


def merged(base: Tensor, taus: Iterable[tuple[float, Tensor]], float32: bool = True) -> Tensor:
    """theta_0 + sum w tau of one tensor; a sharded one is summed shard by shard. Zero weights are left out.

    Args:
        float32: sum in float32, whatever the precision of the base; what is no number stays as it is.
    """
    if not base.is_floating_point():
        return base
    total = base.detach().to(torch.float32 if float32 else base.dtype, copy=True)
    for weight, tau in taus:
        if weight:
            total.add_(tau.to(total.dtype), alpha=weight)
    return total


# ---- sources -------------------------------------------------------------------------------------------------------


class Expert:
    """theta_i - theta_0 of an expert's folder or a delta's file.

    Args:
        source: the folder or file.
        base: index of the base, whose tensors a folder must have, all of them and no others.

    Raises:
        UserError: it is neither, or of another architecture.
    """

    def __init__(self, source: Path, base: Mapping[str, Entry]):
        self.source = source
        self.about: dict[str, str] = {}
        self.is_delta = source.is_file()
        if self.is_delta:
            tensors, self.about = read_header(source)
            if "delta" not in self.about:
                raise UserError("This file is no delta", where=str(source), allowed="a folder, or a file of a DeMe run")
            places = {name.partition("/")[0] for name in base}
            place = next((b for b in BACKBONES if b in places), ".")
            self.entries = {f"{place}/{name}": entry for name, entry in tensors.items()}
            wrong = sorted(self.entries.keys() - base.keys())
            fix = "python train.py merge OUT --run NAME, which knows the network's projections"
        else:
            self.entries = index(source)
            wrong = sorted(self.entries.keys() ^ base.keys())
            fix = "merge folders that were exported from one base"
        wrong = wrong or [n for n, e in self.entries.items() if e.shape != base[n].shape]
        if wrong or not self.entries:
            given = f"{len(wrong)} tensors differ, first: {wrong[0]}" if wrong else "no safetensors files"
            raise UserError("This expert has not the architecture of the base", where=str(source), given=given, fix=fix)

    def tau(self, tensor: Tensor, base: Tensor) -> Tensor:
        """theta_i - theta_0 of a tensor of the source."""
        return tensor if self.is_delta else tensor.float().sub_(base)

    def identity(self, known: Mapping[Path, bytes]) -> dict[str, str]:
        """What merge.json says of it; `known` are digests of files that need not be read again."""
        if self.is_delta:
            return dict(self.about)
        return {"folder": self.source.name, "identity": folder_identity(self.source, known=known)}


def merge_folders(out: Path, base: Path, experts: Sequence[Path], weights: Sequence[float]) -> Path:
    """Writes `out`: the base's folder with merged weights, and merge.json, which says what it was made of.

    Raises:
        UserError: the numbers do not match, a folder is missing, `out` exists, or an expert does not fit.
    """
    check_weights(weights, len(experts))
    for folder in (base, *experts):
        if not folder.exists():
            raise UserError("There is no such folder", given=str(folder))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("The folder exists", where="OUT", given=str(out), fix="name a new folder or remove it")
    of_base = index(base)
    if not of_base:
        raise UserError("The base has no safetensors files", where=str(base))
    found = [Expert(source, of_base) for source in experts]
    refuse_mixed([e.about for e in found if e.is_delta])
    digests = Digests()

    def pieces(place: str, entries: Mapping[str, Entry]) -> Iterator[Tensor]:
        plan: list[tuple[list[tuple[float, Expert]], tuple[Entry, ...]]] = []  # of each piece: what is added, reads
        for name, entry in entries.items():
            pairs = zip(weights, found, strict=True) if entry.dtype.is_floating_point else ()
            added = [(w, e) for w, e in pairs if w and f"{place}/{name}" in e.entries]
            sources = (entry, *(e.entries[f"{place}/{name}"] for _, e in added))
            plan += [(added, row) for row in zip(*(one.pieces() for one in sources), strict=True)]
        reads = read_ahead((piece for _, row in plan for piece in row), digests)
        for added, (own, *_) in plan:
            theta = next(reads)
            yield merged(theta, ((w, e.tau(next(reads), theta)) for w, e in added)).to(own.dtype)

    for file in sorted(p for p in base.rglob("*") if p.is_file()):
        target = out / file.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix != ".safetensors":
            if file.name not in ("README.md", PROVENANCE):  # they are about the base alone
                shutil.copyfile(file, target)
            continue
        entries, about = read_header(file)
        like = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
        place = file.parent.relative_to(base).as_posix()
        write_streamed(target, like, pieces(place, entries), about or {"format": "pt"})
    known = digests.whole()
    write_provenance(out, folder_identity(base, known=known), [e.identity(known) for e in found], weights)
    return out


def write_provenance(
    out: Path, base: str, experts: Sequence[Mapping[str, Any]], weights: Sequence[float], **more: Any
) -> None:
    """merge.json: identities of base and experts, weights, and how they were found."""
    facts = {"base": base, "experts": [dict(e) for e in experts], "weights": list(map(float, weights)), **more}
    write_atomically(out / PROVENANCE, (json.dumps(facts, indent=1) + "\n").encode())


def check_weights(weights: Sequence[float], experts: int) -> None:
    """Refuses weights that are no numbers, or not one for each expert."""
    if len(weights) != experts or not experts or not all(math.isfinite(w) for w in weights):
        what, allowed = "There must be one weight for each expert", f"{experts} numbers"
        raise UserError(what, where="--weights", given=list(weights), allowed=allowed, fix="0.1,0.1,0.2,0.5")


# ---- deltas --------------------------------------------------------------------------------------------------------


def save_delta(file: Path, taus: Iterable[tuple[str, Tensor]], about: Mapping[str, Any]) -> None:
    """Writes theta_i - theta_0 of a denoising network with what is known of it: base, ranges, index and so on."""
    tensors = dict(taus)
    file.parent.mkdir(parents=True, exist_ok=True)
    like = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    facts = {"delta": "1", **{k: str(v) for k, v in about.items()}}
    write_streamed(file, like, tensors.values(), facts)


def refuse_mixed(abouts: Sequence[Mapping[str, str]]) -> None:
    """Refuses deltas of different bases, divisions into ranges, sets of projections, or recipes.

    A delta that does not tell its recipe, as those of older versions, goes with any.
    """
    for name in ("base", "ranges", "projected", "recipe"):
        values = {about.get(name, "") for about in abouts} - ({""} if name == "recipe" else set())
        if len(values) > 1:
            fix = "train them again, or name another folder"
            raise UserError(f"The deltas are of different {name}", given=", ".join(sorted(values)), fix=fix)
