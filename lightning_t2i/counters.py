"""Progress in training steps and samples, and the one place that touches Lightning's private progress counter."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import lightning as L


@dataclass
class Counters:
    """Progress of a run.

    step: training steps completed; micro: micro-batches of the current step done; batches: micro-batches consumed in
    the whole run; samples: samples seen by all ranks together.
    """

    step: int = 0
    micro: int = 0
    batches: int = 0
    samples: int = 0

    @property
    def at_boundary(self) -> bool:
        """True between two training steps: the only moments at which checkpoints and validation act."""
        return self.micro == 0

    def state(self) -> dict[str, int]:
        return asdict(self)

    def load(self, state: dict[str, int]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def advance_global_step(trainer: L.Trainer) -> None:
    """Makes `trainer.global_step` rise by one, and validation metrics carry that step.

    Lightning counts each optimizer step of manual optimisation, so two optimizers would count twice, and stamps
    validation metrics with a count of batches. The engine steps raw optimizers and counts the training step itself.
    These names are private in Lightning 2.6: tests fail when they change.
    """
    loop = trainer.fit_loop.epoch_loop
    loop.manual_optimization.optim_step_progress.increment_ready()
    loop.manual_optimization.optim_step_progress.increment_completed()
    loop._batches_that_stepped = trainer.global_step


def validate_now(trainer: L.Trainer) -> None:
    """Runs the validation of a fit out of turn, between two training steps or beside them."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False  # after a resume its progress is that of the validation before
    trainer.validating = True
    loop.run()
    trainer.training = True
