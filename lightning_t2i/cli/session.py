"""From a merged config to a method, its data and a Trainer with the standard callbacks."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment

from callbacks.checkpoints import CheckpointOptions, Checkpoints
from callbacks.deme_merge import DeMeMerge, MergeOptions
from callbacks.eval_metrics import EvalMetrics, EvalOptions
from callbacks.health import Health, HealthOptions
from callbacks.missed_validation import MissedValidation
from callbacks.preemption import Preemption, PreemptionOptions
from callbacks.sample_grid import SampleGrid, SampleOptions
from callbacks.teacher_comparison import ComparisonOptions, TeacherComparison
from callbacks.throughput import Throughput, ThroughputOptions
from lightning_t2i.cli.checks import semantic
from lightning_t2i.cli.configs import Merged, flatten
from lightning_t2i.cli.errors import Mistakes, locate, parse_all
from lightning_t2i.cli.progress import Progress
from lightning_t2i.errors import UserError
from lightning_t2i.flops import use_tensor_cores
from lightning_t2i.loggers import TrackingOptions
from lightning_t2i.method import MethodModule
from lightning_t2i.options import MethodOptions
from lightning_t2i.state_io import AtomicCheckpointIO
from lightning_t2i.strategies import FSDP2

# Key of the config -> (its options, callback of (run folder, options)), in the order in which they are called.
STANDARD: dict[str, tuple[type, Callable[[Path, Any], L.Callback]]] = {
    "throughput": (ThroughputOptions, lambda folder, options: Throughput(options)),
    "samples": (SampleOptions, lambda folder, options: SampleGrid(options)),
    "eval": (EvalOptions, lambda folder, options: EvalMetrics(options)),
    "health": (HealthOptions, lambda folder, options: Health(options)),
    "checkpoints": (CheckpointOptions, lambda folder, options: Checkpoints(folder / "checkpoints", options)),
    "merge": (MergeOptions, lambda folder, options: DeMeMerge(folder / "merged", options)),
    "comparison": (ComparisonOptions, lambda folder, options: TeacherComparison(options)),  # takes long: saved first
}
SECTIONS = {"tracking": TrackingOptions, "preemption": PreemptionOptions}
SECTIONS |= {key: options for key, (options, _) in STANDARD.items()}
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
    r"Total length of `StreamLoader` across ranks is zero",  # of pairs that are all there
    r"You have overridden `transfer_batch_to_device` in `LightningModule` but",
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
)


class Session(LightningCLI):
    """One parser for all verbs; `construct` makes `method` and `data`, `build` makes `trainer` and `preemption`."""

    config: Any  # jsonargparse's Namespace

    def __init__(self) -> None:
        self.refused: list[UserError] = []
        self.diagnosing = False
        super().__init__(
            MethodModule,
            L.LightningDataModule,
            save_config_callback=None,  # the run folder's config.yaml is written before anything is built
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

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """As the parent's, but nothing is required: `semantic` misses a section together with all other mistakes."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()})
        parser.add_lightning_class_args(MethodModule, "model", subclass_mode=True, required=False)
        parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True, required=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name, options in SECTIONS.items():
            parser.add_class_arguments(options, name)

    # The parent parses, seeds and builds in its constructor; here these are steps that a verb takes in turn.
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = None

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
        self._link()
        return self.resolved()

    def _link(self) -> None:
        """Gives the data module what it must share with the method.

        jsonargparse's own links skip a source that is a dataclass in a union, such as `common: MethodOptions | None`.
        """
        common = self.config.model.init_args.get("common") or MethodOptions()
        arguments = self.config.data.get("init_args") or {}
        for name in [name for name in LINKS if name in arguments]:
            arguments[name] = getattr(common, name)

    def resolved(self) -> dict[str, Any]:
        """The parsed config as plain values, without the linked ones, as `fit --config` reads it."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"\s*Unable to serialize instance")
            plain = _without_unnamed(yaml.safe_load(self.parser.dump(self.config, skip_unset=False, format="yaml")))
        for name in LINKS:
            ((plain["data"] or {}).get("init_args") or {}).pop(name, None)
        return plain

    def _instantiate(self, kind: type, /, *args: Any, **kwargs: Any) -> Any:
        """Builds an object for the parser, which would try past a UserError; notes it, and while diagnosing goes on."""
        try:
            return kind(*args, **kwargs)
        except UserError as error:
            self.refused.append(error)
            if not self.diagnosing:
                raise
        stand_in: Any = object.__new__(kind)
        for name, value in kwargs.items():
            object.__setattr__(stand_in, name, value)
        return stand_in

    def _constructor_errors(self) -> list[UserError]:
        """What the constructors refuse, section by section; no network is built there."""
        self.refused, self.diagnosing = [], True
        for key in vars(self.config):
            only = self.config.clone()
            for other in [k for k in vars(only) if k != key]:
                del only[other]
            with contextlib.suppress(TypeError, ValueError, KeyError, AttributeError):  # follow from what was refused
                self._instantiated(only)
        self.diagnosing = False
        values = flatten(self.resolved())
        return [locate(error, values) for error in self.refused]

    def _instantiated(self, config: Any) -> Any:
        return self.parser.instantiate(config, instantiators=[(self._instantiate, object, True)])

    def construct(self) -> None:
        """Instantiates the method, the data module and the options; they build no network yet.

        Raises:
            Mistakes: constructors refused their values.
        """
        try:
            built = self.config_init = self._instantiated(self.config)
        except (ValueError, TypeError) as error:
            if self.refused:
                raise Mistakes(self._constructor_errors()) from error
            given = str(error).split("Given value")[0].strip()
            raise UserError("A constructor fails", given=given, fix="--debug shows where") from error
        self.method, self.data = built.model, built.data

    def build(self, folder: Path, loggers: list[Any], callbacks: list[L.Callback]) -> L.Trainer:
        """The Trainer with the standard callbacks, those of the verb, and the user's.

        Raises:
            UserError: Lightning refuses an option, or there are several processes without FSDP2.
        """
        given = self.config_init.trainer
        standard = [(make, self.config_init[key]) for key, (_, make) in STANDARD.items()]
        enabled = [(make, options) for make, options in standard if getattr(options, "enabled", True)]
        callbacks = [*(make(folder, options) for make, options in enabled), *callbacks]
        if given.enable_progress_bar is not False:
            callbacks = [*callbacks, Progress()]
        self.preemption = Preemption(self.config_init.preemption)
        last = [MissedValidation(folder / "metrics.jsonl"), self.preemption]  # which leaves at the end of a step
        plugins = list(given.plugins) if isinstance(given.plugins, list) else [given.plugins] if given.plugins else []
        if SLURMEnvironment.detect():
            plugins.append(SLURMEnvironment(auto_requeue=False))  # Lightning's handler saves in the middle of a step
        if not isinstance(given.strategy, FSDP2):
            plugins.append(AtomicCheckpointIO())
        try:
            trainer = self.trainer = self.instantiate_trainer(
                logger=loggers or False,
                callbacks=[*callbacks, *(given.callbacks or []), *last],
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
        use_tensor_cores(trainer.strategy.root_device)
        return trainer


def _without_unnamed(config: Any) -> Any:
    """Leaves out defaults that have no name to write, such as a lambda: they are the defaults again when read."""
    if isinstance(config, dict):
        return {k: _without_unnamed(v) for k, v in config.items() if not str(v).startswith("Unable to serialize")}
    return [_without_unnamed(v) for v in config] if isinstance(config, list) else config


def _of_interest(record: logging.LogRecord) -> bool:
    """Not an optional kernel that nothing here needs, nor int8's own half precision at every call."""
    return not any(text in record.getMessage() for text in ("gemm_4bit_forward", "inputs will be cast from"))


def quiet(debug: bool = False) -> None:
    """Hides what the libraries say of our deliberate choices; the banner tells the rest."""
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).addFilter(_of_interest)
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message=message)
    if not debug:
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
