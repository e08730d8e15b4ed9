"""Reads the command line, answers what needs no torch, and hands the rest to the verb's own function.

To add a verb: write `def verb(request: Request) -> int` in a module and give it a row in VERBS.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lightning_t2i import __version__
from lightning_t2i.cli.listing import configs_table, methods_table
from lightning_t2i.errors import UserError, closest, of_the_disk

# verb -> (module:function, one line of help)
VERBS = {
    "fit": ("lightning_t2i.cli.verbs:fit", "train; the same command again resumes"),
    "validate": ("lightning_t2i.cli.verbs:validate", "validation loop on a run's newest checkpoint"),
    "test": ("lightning_t2i.cli.verbs:test", "test loop on a run's newest checkpoint"),
    "predict": ("lightning_t2i.cli.verbs:predict", "predict loop on a run's newest checkpoint"),
    "check": ("lightning_t2i.preflight.check:check", "memory, operations, disk and doubtful values, before a training"),
    "export": ("lightning_t2i.cli.export:export", "export OUT --run NAME | --from-edm FILE: a stock model folder"),
    "merge": (
        "lightning_t2i.cli.merge:merge",
        "merge OUT BASE EXPERT ... --weights w,w,... | OUT --run NAME: one model",
    ),
    "new": ("lightning_t2i.cli.new:new", "new NAME --from METHOD: a method of your own that runs at once"),
    "list": ("lightning_t2i.cli.main:list_all", "methods and configs of this repository"),
}


@dataclass
class Request:
    """A parsed command line.

    verb: what to do; configs: files of --config in order; run, fresh, ckpt_path, ema, print_config, from_edm, debug,
    ranks, nodes, tflops, json, fetch: the options of the same names; positional: words after the verb; overrides:
    (dotted key, text) in order, the text None for a flag; help: arguments of a help request, such as ["--help"] or
    ["--model.help", "lightning_modules.a.A"].
    """

    verb: str
    configs: list[Path] = field(default_factory=list)
    run: str | None = None
    fresh: bool = False
    reset_optimizer: bool = False
    ckpt_path: Path | None = None
    ema: str | None = None
    print_config: bool = False
    debug: bool = False
    parent: str | None = None
    from_edm: Path | None = None
    ranks: int | None = None
    nodes: int | None = None
    tflops: float | None = None
    json: bool = False
    fetch: bool = False
    positional: list[str] = field(default_factory=list)
    overrides: list[tuple[str, str | None]] = field(default_factory=list)
    help: list[str] = field(default_factory=list)


def options() -> argparse.ArgumentParser:
    """The options that every verb takes; dotted keys of the config are read beside them."""
    parser = argparse.ArgumentParser("train.py", add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    parser.add_argument("-c", "--config", dest="configs", action="append", default=[], type=Path, metavar="FILE")
    parser.add_argument("--run", metavar="NAME", help="run folder runs/NAME (default: METHOD-EXPERIMENT of the config)")
    parser.add_argument("--fresh", action="store_true", help="start again; an existing run folder is moved aside")
    parser.add_argument(
        "--reset_optimizer", action="store_true", help="`fit` goes on with weights, EMA and counters but new optimizers"
    )
    parser.add_argument("--ckpt_path", type=Path, metavar="FOLDER", help="checkpoint to export, merge or evaluate")
    parser.add_argument(
        "--ema", metavar="NAME", help="average to export or evaluate: a decay of the config's, or sigma_rel=WIDTH"
    )
    parser.add_argument("--print_config", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--from", dest="parent", metavar="METHOD", help="method that `new` derives from")
    parser.add_argument("--from-edm", type=Path, metavar="FILE", help="network snapshot of EDM that `export` converts")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="processes that `check` plans for (default: the config's)"
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes that `check` deals them out to")
    parser.add_argument(
        "--tflops", type=float, metavar="X", help="10^12 operations per second of a device, for `check`"
    )
    parser.add_argument("--json", action="store_true", help="`check` prints JSON")
    parser.add_argument("--fetch", action="store_true", help="`check` first downloads the hub files of the config")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def usage() -> str:
    verbs = "\n".join(f"  {name:10} {text}" for name, (_, text) in VERBS.items())
    return (
        "usage: python train.py VERB --config FILE [--config FILE ...] [--section.key VALUE ...]\n\n"
        f"verbs:\n{verbs}\n\n{options().format_help().lstrip()}\n"
        "  --help, --version     with a verb, --help lists every key of the config\n"
        "  --model.help CLASS    options of a method; --data.help CLASS likewise\n\n"
        "example: python train.py fit --config configs/quickstart.yaml --trainer.max_steps 100"
    )


def parse(arguments: Sequence[str]) -> Request:
    """Splits a command line into verb, options, dotted overrides and help requests.

    Raises:
        UserError: unknown verb or option.
    """
    try:
        known, rest = options().parse_known_args(list(arguments))
    except SystemExit as error:  # argparse has said why
        raise UserError("The command line could not be read", fix="python train.py --help") from error
    request, words = Request(verb="", **vars(known)), []
    while rest:
        token = rest.pop(0)
        if token in ("-h", "--help"):
            request.help.append("--help")
        elif not token.startswith("--"):
            words.append(token)
        else:
            name, given, text = token[2:].partition("=")
            value: str | None = text
            if not given:
                value = rest.pop(0) if rest and not rest[0].startswith("--") else None
            if name.endswith(".help"):
                request.help += [f"--{name}"] + ([value] if value is not None else [])
            else:
                request.overrides.append((name, value))
    if not words:
        raise UserError("No verb was given", allowed=VERBS, fix="python train.py fit --config configs/quickstart.yaml")
    request.verb, request.positional = words[0], words[1:]
    if request.verb not in VERBS:
        raise UserError("Unknown verb", given=request.verb, allowed=VERBS, fix="python train.py --help")
    _refuse_strays(request)
    if request.positional and request.verb not in ("new", "export", "merge"):
        near = closest(request.positional[0], VERBS)
        raise UserError(
            f"{request.verb} takes no further words",
            given=" ".join(request.positional),
            fix=f"one verb per command: {near}" if near else "write overrides as --section.key VALUE",
        )
    return request


def _refuse_strays(request: Request) -> None:
    """Raises a UserError for options that only another verb reads."""
    if request.from_edm is not None and request.verb != "export":
        raise UserError(
            "Only export converts a snapshot", where="--from-edm", fix="train.py export OUT --from-edm FILE"
        )
    if request.ema is not None and request.verb not in ("export", "validate", "test", "predict"):
        raise UserError("Only export and evaluations choose an average", where="--ema", given=request.ema)
    if request.reset_optimizer and request.verb != "fit":
        raise UserError("Only fit has optimizers", where="--reset_optimizer", fix="python train.py fit --config FILE")
    given = [f"--{name}" for name in ("ranks", "nodes", "tflops", "json", "fetch") if getattr(request, name)]
    if given and request.verb != "check":
        raise UserError("Only check plans", where=", ".join(given), fix="python train.py check --config FILE")


def list_all(request: Request) -> int:
    """Prints the methods and the configs."""
    sys.stdout.write(f"Methods\n{methods_table()}\n\nConfigs\n{configs_table()}\n")
    return 0


@contextmanager
def loading() -> Iterator[None]:
    """Holds the garbage collector back: imports make a million objects and no garbage, and its rounds take a fifth."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 for a mistake of the user's."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments in (["--help"], ["-h"]):
        print(usage())
        return 0
    if "--version" in arguments:
        print(f"lightning-t2i {__version__}")
        return 0
    try:
        request = parse(arguments)
        module, function = VERBS[request.verb][0].split(":")
        with loading():
            verb = getattr(importlib.import_module(module), function)
        return verb(request)
    except (UserError, OSError) as raised:
        error = raised if isinstance(raised, UserError) else of_the_disk(raised)
        if error is None:
            raise
        if "--debug" in arguments:
            traceback.print_exc()
        rank = next((os.environ[n] for n in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if n in os.environ), "0")
        print(f"error{'' if rank == '0' else f' on rank {rank}'}: {error}", file=sys.stderr)
        return 2
