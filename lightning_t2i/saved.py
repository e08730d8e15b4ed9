"""Saved: what of a method goes into a checkpoint, and how it comes back onto any mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning as L
from torch import Tensor

from lightning_t2i.counters import Counters
from lightning_t2i.errors import UserError
from lightning_t2i.frozen import check_identities
from lightning_t2i.group import Group
from lightning_t2i.options import MethodOptions, Plain
from lightning_t2i.state_io import copy_into, full_tensor

FORMAT = 1


class Saved(L.LightningModule):
    """The half of MethodModule that Lightning's checkpoints talk to."""

    common: MethodOptions
    counters: Counters
    groups: dict[str, Group]
    frozen_identities: dict[str, str]
    _pending: Plain | None  # optimizer states that came before their optimizers
    reset_optimizer: bool = False  # a load leaves the states of the optimizers where they are: at their beginning
    take: Callable[[Tensor], Any] = staticmethod(full_tensor)  # what is kept of a tensor; `Saving` has its own

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all that training changes; a method that has such tensors beside its groups adds them."""
        for group in self.groups.values():
            yield from group.tensors()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Whole tensors of all that training changes; a collective call when sharded."""
        return {name: self.take(t) for name, t in self.tensors()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Restores what `state_dict` returned, onto any mesh.

        Raises:
            UserError: names or shapes differ from this method's.
        """
        targets = dict(self.tensors())
        wrong = sorted(targets.keys() ^ state_dict.keys()) or [
            n for n in targets if targets[n].shape != state_dict[n].shape
        ]
        if wrong:
            raise UserError(
                "The checkpoint does not fit this method and config",
                given=f"{len(wrong)} entries differ, first: {wrong[0]}",
                fix="use the config that wrote the checkpoint",
            )
        for name, target in targets.items():
            copy_into(target, state_dict[name])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["t2i"] = {
            "format": FORMAT,
            "counters": self.counters.state(),
            "groups": {name: group.state(self.take) for name, group in self.groups.items()},
            "frozen": dict(self.frozen_identities),
            "seed": self.common.seed,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("t2i")
        if saved is None or saved.get("format") != FORMAT:
            raise UserError(
                "The checkpoint was not written by this repository", fix="name a runs/NAME/checkpoints folder"
            )
        check_identities(saved["frozen"], self.frozen_identities)
        self.counters.load(saved["counters"])
        if any(group.optimizer for group in self.groups.values()):
            self._load_groups(saved["groups"])
        else:
            self._pending = saved["groups"]
            for name, group in self.groups.items():  # an export or an evaluation builds no optimizer
                if group.averages is not None:
                    group.averages.count = saved["groups"].get(name, {}).get("averages", 0)

    def _load_groups(self, groups: Plain) -> None:
        for name, group in self.groups.items():
            group.load(groups[name], self.reset_optimizer)
        self._pending = None
