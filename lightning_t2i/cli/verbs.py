"""fit, validate, test and predict."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import yaml

from lightning_t2i.cli import runs
from lightning_t2i.cli.banner import banner
from lightning_t2i.cli.configs import merge, show
from lightning_t2i.cli.main import Request, usage
from lightning_t2i.cli.record import Record
from lightning_t2i.cli.session import Session, quiet
from lightning_t2i.errors import UserError, closest
from lightning_t2i.loggers import Clock, JsonlLogger, TrackingOptions, build_loggers
from lightning_t2i.report import write_report
from lightning_t2i.state_io import newest, write_atomically


def opened(request: Request) -> tuple[Session, dict[str, Any]] | None:
    """The session of a command and its resolved config; None when a help request or --print_config was answered.

    Without --config, the config of the run that --run names is taken.

    Raises:
        UserError: all mistakes of the config at once.
    """
    quiet(request.debug)
    session = Session()
    if request.help:
        if request.help != ["--help"]:
            session.parser.parse_args(request.help)  # prints and exits
        main_help = f"{usage()}\n\nkeys of the config\n"
        raise SystemExit(session.parser.print_help() or main_help) if False else _help(session, main_help)
    configs = request.configs
    if not configs and request.run is not None:
        configs = [runs.runs_root() / runs.run_name(request.run, []) / "config.yaml"]
        if not configs[0].is_file():
            _no_such_run(request.run)
    if not configs and not request.overrides:
        raise UserError("No config was named", where="--config", fix="python train.py list shows the configs")
    config = session.parse(merge(configs, request.overrides), request.verb)
    if request.print_config:
        _write(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        return None
    return session, config
