"""From a merged config to a method, its data and a Trainer with the standard callbacks."""

from __future__ import annotations

import argparse
import logging
import warnings
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment

from callbacks.checkpoints import CheckpointOptions, Checkpoints
from callbacks.eval_metrics import EvalMetrics, EvalOptions
from callbacks.sample_grid import SampleGrid, SampleOptions
from callbacks.throughput import Throughput, ThroughputOptions
from lightning_t2i.cli.checks import semantic
from lightning_t2i.cli.configs import Merged
from lightning_t2i.cli.errors import Mistakes, parse_all
from lightning_t2i.cli.progress import Progress
from lightning_t2i.errors import UserError
from lightning_t2i.loggers import TrackingOptions
from lightning_t2i.method import MethodModule
from lightning_t2i.state_io import AtomicCheckpointIO
from lightning_t2i.strategies import FSDP2

# Key of the config -> (its options, callback of (run folder, options)), in the order in which they are called.
STANDARD: dict[str, tuple[type, Callable[[Path, Any], L.Callback]]] = {
    "throughput": (ThroughputOptions, lambda folder, options: Throughput(options)),
    "samples": (SampleOptions, lambda folder, options: SampleGrid(options)),
    "eval": (EvalOptions, lambda folder, options: EvalMetrics(options)),
    "checkpoints": (CheckpointOptions, Checkpoints),
}
SECTIONS = {"tracking": TrackingOptions} | {key: options for key, (options, _) in STANDARD.items()}
# Values that the data and the method must agree on: the method's counts.
LINKS = ("seed", "accumulate")
TRAINER_DEFAULTS = {
    "max_epochs": -1,  # training is counted in steps
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_checkpointing": False,  # Checkpoints does it, at the boundaries of training steps
    "enable_model_summary": False,
    "enable_autolog_hparams": False,
}
# What the libraries say of our deliberate choices.
HARMLESS = (
    r"`?isinstance\(treespec, LeafSpec\)`? is deprecated",
    r"Found \d+ module\(s\) in eval mode at the start of training",
    r"The `srun` command is available on your system but is not used",
    r"The '\w+_dataloader' does not have many workers",
    r"You have overridden `transfer_batch_to_device` in `LightningModule` but",
    r"`training_step` returned `None`",
)


class Session(LightningCLI):
    """One parser for all verbs; `method`, `data` and `trainer` exist after `build`."""

    def __init__(self) -> None:
        super().__init__(
            MethodModule,
            L.LightningDataModule,
            save_config_callback=None,  # the run folder's config.yaml is written before anything is built
            trainer_defaults=dict(TRAINER_DEFAULTS),
            seed_everything_default=False,
            parser_kwargs={"exit_on_error": False, "prog": "train.py", "description": None},
            subclass_mode_model=True,
            subclass_mode_data=True,
            args={},
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """No seed_everything: the method's `common.seed` seeds everything."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name, options in SECTIONS.items():
            parser.add_argument(f"--{name}", type=options, default=options())
        for name in LINKS:
            parser.link_arguments(f"model.init_args.common.{name}", f"data.init_args.{name}")

    # The parent parses, seeds and builds in its constructor; here these are steps that a verb takes in turn.
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = argparse.Namespace()

    def _parse_ckpt_path(self) -> None: ...

    def _set_seed(self) -> None: ...

    def before_instantiate_classes(self) -> None:
        self.subcommand = None

    def instantiate_classes(self) -> None: ...

    def parse(self, merged: Merged, verb: str) -> dict[str, Any]:
        """Parses a merged config and returns it resolved, defaults included.

        Raises:
            Mistakes: all that is wrong with it, told at once.
        """
        parsed, errors = parse_all(self.parser, merged)
        errors = [*merged.errors, *errors, *semantic(merged, verb)]
        if parsed is not None:
            self.config = parsed
            errors += self._constructor_errors() if errors else []
        if errors or parsed is None:
            raise Mistakes(errors)
        return self.resolved()

    def resolved(self) -> dict[str, Any]:
        """The parsed config as plain values, without the linked ones, as `fit --config` reads it."""
        return yaml.safe_load(self.parser.dump(self.config, skip_none=False, format="yaml"))

    def _constructor_errors(self) -> list[UserError]:
        """What the constructors refuse, section by section; no network is built there."""
        found = []
        for key in ("model", "data", *SECTIONS):
            if key in self.config:
                only = self.config.clone()
                for other in [k for k in vars(only) if k != key]:
                    del only[other]
                try:
                    self.parser.instantiate_classes(only)
                except UserError as error:
                    found.append(error)
                except (TypeError, ValueError, KeyError, ArgumentError):
                    continue  # follows from a value that was dropped
        return found

    def build(self, folder: Path, loggers: list[Any], callbacks: list[L.Callback]) -> None:
        """Instantiates the method, the data module and the Trainer.

        Raises:
            Mistakes: constructors refused their values.
        """
        try:
            built = self.config_init = self.parser.instantiate_classes(self.config)
        except UserError as error:
            raise Mistakes(self._constructor_errors() or [error]) from error
        self.method, self.data = built.model, built.data
        self.trainer = self._trainer(folder, loggers, callbacks)

    def _trainer(self, folder: Path, loggers: list[Any], callbacks: list[L.Callback]) -> L.Trainer:
        given = self.config_init.trainer
        for key, (_, make) in STANDARD.items():
            options = self.config_init[key]
            if getattr(options, "enabled", True):
                callbacks = [*callbacks, make(folder, options)]
        if given.enable_progress_bar is not False:
            callbacks = [Progress(), *callbacks]
        plugins = list(given.plugins) if isinstance(given.plugins, list) else [given.plugins] if given.plugins else []
        if SLURMEnvironment.detect():
            plugins.append(SLURMEnvironment(auto_requeue=False))  # Lightning's handler saves in the middle of a step
        if not isinstance(given.strategy, FSDP2):
            plugins.append(AtomicCheckpointIO())
        try:
            trainer = self.instantiate_trainer(
                logger=loggers or False,
                callbacks=[*callbacks, *(given.callbacks or [])],
                default_root_dir=str(folder),
                plugins=plugins or None,
            )
        except MisconfigurationException as error:
            raise UserError("The Trainer refuses its options", where="trainer", given=str(error)) from error
        if trainer.world_size > 1 and not isinstance(trainer.strategy, FSDP2):
            raise UserError(
                "Several processes run through FSDP2",
                where="trainer.strategy",
                given=f"{given.strategy} with {trainer.world_size} processes",
                fix="base: [../trainer/ddp.yaml], or trainer.devices: 1",
            )
        return trainer


def quiet(debug: bool = False) -> None:
    """Hides what the libraries say of our deliberate choices; the banner tells the rest."""
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message=message)
    if not debug:
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
