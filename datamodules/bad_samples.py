"""Bad samples: replaced, named and counted, up to a share of the data set.

A process knows of its own reads alone, and of a large data set those are few: a rank of hundreds meets in an epoch one
sample in hundreds. So beside the names, which are exact, it is the share of its reads that is held,

    replaced <= share n + 4 (share n b)^(1/2) + 4 b        of n reads, b rows a block

where the excess is what luck allows. Bad samples lie together (a shard is cut) and a lane stays in a block for b reads,
so it is blocks that are met at random: of b-th parts of the counts, which are then those of rare events, a bound of
four standard deviations and four.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_t2i.errors import UserError

log = logging.getLogger(__name__)
NAMED = 1000  # bad samples that are kept by name
LOGGED = 100  # and those that have a line in the log
DEVIATIONS, BLOCKS = 4, 4


@dataclass
class Reads:
    """What reading met.

    read: samples that were read, in every epoch anew; replaced: those of them in whose place another one stood;
    bad: the first `NAMED` bad samples by name -> reason.
    """

    read: int = 0
    replaced: int = 0
    bad: dict[str, str] = field(default_factory=dict)

    def name(self, bad: Mapping[str, str]) -> list[str]:
        """Adds bad samples to the named ones; returns the names that are new."""
        new = [name for name in bad if name not in self.bad][: NAMED - len(self.bad)]
        self.bad |= {name: bad[name] for name in new}
        return new

    def add(self, other: Reads) -> None:
        """Counts further reads and says in the log which bad samples are new."""
        self.read, self.replaced, before = self.read + other.read, self.replaced + other.replaced, len(self.bad)
        for number, name in enumerate(self.name(other.bad), before):
            if number < LOGGED:
                log.warning("bad sample %s replaced: %s", name, other.bad[name])
        if before < LOGGED <= len(self.bad):
            log.warning("further bad samples are counted and have no line here; %d reads replaced", self.replaced)

    def refuse_more(self, count: int, share: float, block: int) -> None:
        """Holds the share of a data set of `count` samples in blocks of `block` rows.

        Raises:
            UserError: more than the share of it is bad.
        """
        refuse_bad(self.bad, count, share)
        expected = share * self.read
        if self.replaced > expected + DEVIATIONS * math.sqrt(expected * block) + BLOCKS * block:
            raise _too_many(self.bad, f"{self.replaced} bad of {self.read} that this process read", share)


def refuse_bad(bad: Mapping[str, str], count: int, share: float) -> None:
    """Raises a UserError where more than a share of `count` samples is bad; `bad` is name -> reason."""
    if len(bad) > share * count:
        raise _too_many(bad, f"{len(bad)} bad of {count}", share)


def _too_many(bad: Mapping[str, str], given: str, share: float) -> UserError:
    name, reason = next(iter(bad.items()))
    return UserError(
        f"Too many bad samples; the first is {name}: {reason}",
        where="max_bad_fraction",
        given=given,
        allowed=f"at most {share:g} of the samples",
        fix="repair the data set, or raise max_bad_fraction",
    )
