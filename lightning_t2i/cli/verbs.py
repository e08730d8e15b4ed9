"""fit, validate, test and predict."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_t2i.cli import launch, runs
from lightning_t2i.cli.banner import banner
from lightning_t2i.cli.configs import merge, show
from lightning_t2i.cli.main import Request, usage
from lightning_t2i.cli.predictions import output
from lightning_t2i.cli.record import Record
from lightning_t2i.cli.restore import UseAverage
from lightning_t2i.cli.session import Session, quiet
from lightning_t2i.errors import UserError, closest
from lightning_t2i.loggers import Clock, JsonlLogger, TrackingOptions, build_loggers
from lightning_t2i.report import write_report
from lightning_t2i.slurm import restarted
from lightning_t2i.state_io import newest, write_atomically


def opened(request: Request) -> tuple[Session, dict[str, Any]] | None:
    """The session of a command and its resolved config; None when a help request or --print_config was answered.

    Without --config, the config of the run that --run names is taken.

    Raises:
        UserError: all mistakes of the config at once.
    """
    quiet(request.debug)
    session = Session()
    if request.help == ["--help"]:
        print(f"{usage()}\n\nkeys of the config\n\n{session.parser.format_help()}")
        return None
    if request.help:
        with contextlib.suppress(SystemExit):  # the parser prints and leaves
            session.parser.parse_args(request.help)
        return None
    configs = request.configs or _config_of_run(request)
    config = session.parse(merge(configs, request.overrides), request.verb)
    if request.print_config:
        print(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), end="")
        return None
    session.construct()
    return session, config


def _config_of_run(request: Request) -> list[Path]:
    if request.run is None:
        raise UserError("No config was named", where="--config", fix="python train.py list shows the configs")
    file = runs.runs_root() / runs.run_name(request.run, []) / "config.yaml"
    if not file.is_file():
        known = [p.parent.name for p in runs.runs_root().glob("*/config.yaml")]
        near = closest(request.run, known)
        fix = f"--run {near}" if near else "--config FILE starts a new run"
        raise UserError("There is no such run", where="--run", given=request.run, fix=fix)
    return [file]


def changes_of(request: Request, config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a command samples or measures with otherwise than the run in `folder`: {"--ema": label, dotted key: value}.

    Empty for the run's own config and the first average of each group.
    """
    found, file = {} if request.ema is None else {"--ema": request.ema}, folder / "config.yaml"
    if (request.configs or request.overrides) and file.is_file():
        found |= runs.changes(yaml.safe_load(file.read_text()), config)
    return found


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What Lightning refuses as a mistake of the user's is one of ours to tell."""
    try:
        yield
    except MisconfigurationException as error:
        raise UserError("Lightning refuses this combination", given=str(error), fix="--debug shows where") from error


def fit(request: Request) -> int:
    """Trains; goes on from the newest checkpoint when the run folder holds the same training."""
    if (found := opened(request)) is None:
        return 0
    session, config = found
    if request.ckpt_path is not None:
        where, fix = "--ckpt_path", "--run NAME"
        raise UserError("fit resumes from its own run folder", where=where, given=request.ckpt_path, fix=fix)
    if config["trainer"]["fast_dev_run"]:
        with tempfile.TemporaryDirectory() as temporary:
            return _rehearse(session, config, Path(temporary))
    folder = runs.runs_root() / runs.run_name(request.run, request.configs)
    trainer = session.build(folder, [], [Record(folder)])
    fresh = request.fresh and not restarted()
    run = runs.begin(folder, config, fresh)  # everything that can be refused before is built by now
    if request.reset_optimizer and not restarted():
        if run.resume is None:
            raise UserError("There is no checkpoint to go on from", where="--reset_optimizer", given=str(folder))
        session.method.reset_optimizer = True
    once = [name for name in ("fresh", "reset_optimizer") if getattr(request, name)]  # they would do it all again
    session.preemption.again += "".join(f" without --{name}" for name in once)
    tracking = session.config_init.tracking
    trainer.loggers = build_loggers(folder, tracking, config, run.step, Clock(trainer))
    if trainer.is_global_zero:
        print(banner(session, run, tracking), flush=True)
        if session.method.reset_optimizer:
            print("optimizer states start anew; weights, EMA and counters go on", flush=True)
    with told(), session.preemption:
        trainer.fit(session.method, session.data, ckpt_path=run.resume and str(run.resume), weights_only=True)
    if trainer.is_global_zero and not session.preemption.requeues:
        if 0 < trainer.max_steps <= trainer.global_step:
            write_atomically(folder / "finished", json.dumps({"step": trainer.global_step}).encode())
        report = write_report(folder, session.method)
        for grid in sorted((folder / "samples").glob("*.png"))[-1:]:
            print(f"samples: {show(grid.resolve())}")
        if (picture := folder / "comparison.png").is_file():
            print(f"teacher and student: {show(picture.resolve())}")
        print(f"report:  {show(report.resolve())}")
    return 0


def _rehearse(session: Session, config: dict[str, Any], folder: Path) -> int:
    """trainer.fast_dev_run: touches no run and leaves nothing; each process has a folder that no other knows of."""
    options = session.config_init.checkpoints
    session.config_init.checkpoints = dataclasses.replace(options, form="single", mirror=None)  # rank 0 writes alone
    trainer = session.build(folder, [], [Record(folder)])
    if trainer.is_global_zero:
        print(banner(session, runs.Run(folder), TrackingOptions(wandb="off")), flush=True)
    with told(), session.preemption:
        trainer.fit(session.method, session.data)
    return 0


def _evaluate(request: Request) -> int:
    if (found := opened(request)) is None:
        return 0
    session, config = found
    folder = runs.runs_root() / runs.run_name(request.run, request.configs)
    checkpoint: Any = request.ckpt_path  # else rank 0's choice: a training beside may save while processes look
    if checkpoint is None:
        checkpoint = launch.agreed(folder, f"launch-{request.verb}.json", lambda: newest(folder / "checkpoints"))
    if checkpoint is None and request.run is not None:
        raise UserError("The run has no complete checkpoint", where="--run", given=request.run, fix="fit it first")
    predicts = request.verb == "predict"
    callbacks: list[Any] = [output(session.data, folder)] if predicts else []
    if request.ema is not None:
        callbacks.append(UseAverage(request.ema, folder))
    trainer = session.build(folder, [], callbacks)
    changes = changes_of(request, config, folder)
    trainer.loggers = [JsonlLogger(folder / f"{request.verb}.jsonl", clock=Clock(trainer), changes=changes)]
    if trainer.is_global_zero:
        print(banner(session, runs.Run(folder, checkpoint), TrackingOptions(wandb="off")), flush=True)
    arguments: dict[str, Any] = {"return_predictions": False} if predicts else {}
    arguments |= {"ckpt_path": checkpoint and str(checkpoint), "weights_only": True}
    with told():
        getattr(trainer, request.verb)(session.method, datamodule=session.data, **arguments)
    return 0


def validate(request: Request) -> int:
    """Runs the validation loop and writes validate.jsonl."""
    return _evaluate(request)


def test(request: Request) -> int:
    """Runs the test loop and writes test.jsonl."""
    return _evaluate(request)


def predict(request: Request) -> int:
    """Generates for the prompts of `data.predict`: pictures into predictions/, or teacher pairs into their folder."""
    return _evaluate(request)
