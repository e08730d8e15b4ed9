"""Runs the commands of a file one after the other, each once: killed and started again it goes on where it was.

    python -m lightning_t2i.chain FILE            runs what is missing
    python -m lightning_t2i.chain FILE --list     says what is done

FILE has one command of train.py in a line, without `python train.py`: for instance pairs, reflow, export, pairs,
distillation, export. A command counts as done until its words, its config or a command before it change. One that was
killed goes on by its own means: `fit` from its checkpoint, `predict` with the shards that are missing; an export is
written beside its folder first.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from lightning_t2i.claims.hashes import digest
from lightning_t2i.cli import runs
from lightning_t2i.cli.configs import merge
from lightning_t2i.cli.main import Request, parse
from lightning_t2i.errors import UserError
from lightning_t2i.paths import ROOT, resolve
from lightning_t2i.state_io import write_atomically

VERBS = ("predict", "fit", "export", "validate", "test")


@dataclass(frozen=True)
class Stage:
    """A command: its words, what they mean, and a hash of them, of its config and of all commands before it."""

    words: list[str]
    request: Request
    key: str

    @property
    def out(self) -> Path | None:
        """The folder that an export writes."""
        return Path(self.request.positional[0]) if self.request.verb == "export" else None

    def finished(self) -> bool:
        """Whether a training has come to its end."""
        if self.request.verb != "fit":
            return False
        run = runs.runs_root() / runs.run_name(self.request.run, self.request.configs)
        return (run / "finished").is_file()


def read(file: Path) -> list[Stage]:
    """The commands of a file.

    Raises:
        UserError: there is none, a command that is none of train.py's, or a mistake in a config.
    """
    if not resolve(file).is_file():
        raise UserError("There is no such chain", given=file, allowed="configs/instaflow/tiny.chain and your own")
    stages: list[Stage] = []
    for number, line in enumerate(resolve(file).read_text(encoding="utf-8").splitlines(), 1):
        words = shlex.split(line, comments=True)
        if not words:
            continue
        request = parse(words)
        if request.verb not in VERBS or request.help or (request.verb == "export" and not request.positional):
            raise UserError("Not a command of a chain", where=f"{file}:{number}", given=line, allowed=VERBS)
        merged = merge(request.configs) if request.configs else None
        if merged is not None and merged.errors:
            raise merged.errors[0]
        before = stages[-1].key if stages else ""
        stages.append(Stage(words, request, digest([words, merged and merged.config, before])))
    if not stages:
        raise UserError("The chain has no command", where=str(file), allowed=VERBS)
    return stages


class Chain:
    """The commands of a file and what is known of them, in runs/chains/NAME.json.

    Args:
        file: the file; its stem is the chain's name together with its folder's.
    """

    def __init__(self, file: Path):
        self.stages = read(file)
        place = resolve(file).resolve()
        self.memory = runs.runs_root() / "chains" / f"{place.parent.name}-{place.stem}.json"

    def known(self) -> dict[str, str]:
        """Key of a command -> "begun" or "done"."""
        return json.loads(self.memory.read_text(encoding="utf-8")) if self.memory.is_file() else {}

    def note(self, stage: Stage, word: str) -> None:
        content = {**self.known(), stage.key: word}
        self.memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.memory, (json.dumps(content, indent=1) + "\n").encode())

    def done(self, stage: Stage) -> bool:
        """Whether a command has been done; moves an export to its place if it was killed just before that."""
        known = self.known().get(stage.key)
        if known == "begun" and stage.finished():  # killed between its end and our note of it
            self.note(stage, "done")
            return True
        if known == "done" and stage.out is not None:
            if (part := part_of(stage.out)).is_dir() and not stage.out.exists():
                os.replace(part, stage.out)
            return stage.out.is_dir()
        return known == "done"

    def run(self, stage: Stage) -> int:
        """Runs a command; returns its exit code."""
        words = stage.words
        if stage.out is not None:
            if stage.out.exists():
                fix = "name another folder, or remove this one"
                raise UserError("The export folder exists, and this chain did not make it", given=stage.out, fix=fix)
            shutil.rmtree(part_of(stage.out), ignore_errors=True)
            words = [str(part_of(stage.out)) if w == stage.request.positional[0] else w for w in words]
        if not stage.finished():  # a training of other words that has come to its end would pass for this one
            self.note(stage, "begun")
        code = subprocess.run([sys.executable, str(ROOT / "train.py"), *words]).returncode
        if code == 0:
            self.note(stage, "done")
            self.done(stage)
        return code


def part_of(out: Path) -> Path:
    """Where an export is written before it has its name."""
    return out.with_name(f"{out.name}.part")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs or lists; the exit code of the first command that fails, 2 for a mistake."""
    parser = argparse.ArgumentParser("python -m lightning_t2i.chain", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("file", type=Path, metavar="FILE", help="a command of train.py in each line")
    parser.add_argument("--list", action="store_true", help="say what is done and stop")
    given = parser.parse_args(arguments)
    try:
        chain = Chain(given.file)
        chain.memory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(chain.memory.with_suffix(".lock"), timeout=0):
            for number, stage in enumerate(chain.stages, 1):
                done = chain.done(stage)
                say = "done   " if done else "missing" if given.list else "begins "
                print(f"{say} {number}/{len(chain.stages)}: {shlex.join(stage.words)}", flush=True)
                if not done and not given.list and (code := chain.run(stage)):
                    print(f"stopped with exit code {code}; the same command goes on from here", file=sys.stderr)
                    return code
    except Timeout:
        print("error: this chain is running already", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
