"""The search: NSGA-II of pymoo by ask and tell, whose whole state is a few plain arrays.

    tournament    a feasible candidate wins, else the one that dominates the other, else the one in the emptier place
    crossover     4 cuts between 1 and n - 1, the pieces between the first two and the last two change sides
    mutation      of an individual with one probability, then of each bit with another
    survival      non-dominated fronts of parents and children; the last one by crowding distance
    constraint    at least one component of one step is reused

Both objectives are minimised: 1 - quality, and TMACs. What the paper calls a bit-flip probability of 0.05 is pymoo's
`prob`: the share of children that are mutated at all, in one bit of n on average (arXiv 2506.15682 and its code).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.core.termination import NoTermination
from pymoo.operators.crossover.pntx import PointCrossover
from pymoo.operators.mutation.bitflip import BitflipMutation
from pymoo.operators.sampling.rnd import BinaryRandomSampling
from torch import Tensor

from lightning_t2i.errors import UserError
from lightning_t2i.options import Plain
from lightning_t2i.state_io import Stored


@dataclass(frozen=True)
class SearchOptions:
    """How schedules are searched. The defaults are ours; `REFERENCE` is what the paper ran.

    Args:
        population: candidates of a generation.
        initial: what the first generation is: written by hand, random bits, or a front.json of another search.
        crossover: probability that two parents mix.
        cuts: points of the crossover.
        mutate: probability that a child is mutated.
        mutate_bit: probability of each of its bits; null is 1 / n.
        fix_first_step: leave step 0, where everything is computed in any case, out of the genome.
        memoise: give schedules that were evaluated before their known objectives.
        race: evaluate a quarter of the pictures first, and drop candidates that a known schedule of no more MACs beats
            on it by more than two standard errors of the paired differences.
        sdpa: count the products within attention.
    """

    population: int = 24
    initial: str = "heuristic"
    crossover: float = 0.9
    cuts: int = 4
    mutate: float = 0.5
    mutate_bit: float | None = None
    fix_first_step: bool = True
    memoise: bool = True
    race: bool = True
    sdpa: bool = True

    def __post_init__(self) -> None:
        if self.population < 2:
            raise UserError("A population has at least two", where="model.search.population", given=self.population)
        for name in ("crossover", "mutate", "mutate_bit"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError("Not a probability", where=f"model.search.{name}", given=value, allowed="0 to 1")
        if self.cuts < 1:
            raise UserError("A crossover needs a cut", where="model.search.cuts", given=self.cuts)


KEPT = ("F", "G", "rank", "crowding")  # of each member of the population
REFERENCE = SearchOptions(72, mutate=0.05, fix_first_step=False, memoise=False, race=False, sdpa=False)


class Search:
    """NSGA-II over genomes of n bits.

    Args:
        bits: n.
        options: its settings.
        seed: of its draws, in crossover, mutation, tournament and survival.
        initial: bool [k, n], the first population; None draws random bits.
    """

    def __init__(self, bits: int, options: SearchOptions, seed: int, initial: np.ndarray | None = None):
        self.bits, self.options = bits, options
        problem = Problem(n_var=bits, n_obj=2, n_ieq_constr=1, xl=False, xu=True, vtype=bool)
        self.algorithm: Any = NSGA2(
            pop_size=options.population,
            sampling=BinaryRandomSampling() if initial is None else np.asarray(initial, bool),
            crossover=PointCrossover(prob=options.crossover, n_points=options.cuts),
            mutation=BitflipMutation(prob=options.mutate, prob_var=options.mutate_bit),
        ).setup(problem, termination=NoTermination(), seed=seed)
        self._asked: Any = None

    @property
    def population(self) -> np.ndarray:
        """bool [P, n], after the last `tell`."""
        return np.asarray(self.algorithm.pop.get("X"), bool) if self.algorithm.is_initialized else self._nothing

    @property
    def _nothing(self) -> np.ndarray:
        return np.zeros((0, self.bits), bool)

    def ask(self) -> np.ndarray:
        """Candidates of the next generation, bool [k, n]; fewer than the population where mating finds no new ones."""
        self._asked = self.algorithm.ask()
        return self._nothing if self._asked is None else np.asarray(self._asked.get("X"), bool)

    def tell(self, objectives: np.ndarray) -> None:
        """Objectives [k, 2] of what `ask` gave, in its order."""
        if self._asked is not None:
            same = np.asarray(self._asked.get("X"), bool).all(1)
            self._asked.set("F", np.asarray(objectives, np.float64))
            self._asked.set("G", np.where(same, 1.0, 0.0)[:, None])
            for individual in self._asked:
                individual.evaluated.update("F", "G")
        self.algorithm.tell(infills=self._asked)
        self._asked = None

    def state(self) -> Plain:
        """Everything that the next generation depends on, between `tell` and `ask`."""
        random, pop = self.algorithm.random_state.bit_generator.state, self.algorithm.pop
        words = [number >> shift & 0xFFFFFFFF for number in random["state"].values() for shift in range(0, 128, 32)]
        state: Plain = {
            "iteration": self.algorithm.n_iter or 0,
            "random": torch.tensor([*words, random["has_uint32"], random["uinteger"]], dtype=torch.int64),
        }
        if self.algorithm.is_initialized:
            state["genomes"] = pack(self.population)
            state |= {name: torch.from_numpy(np.array(pop.get(name), np.float64)) for name in KEPT}
        return state

    def load(self, state: Plain) -> None:
        """Goes on where `state` was taken."""
        algorithm = self.algorithm
        words = whole(state["random"]).tolist()
        numbers = [sum(word << 32 * i for i, word in enumerate(words[at : at + 4])) for at in (0, 4)]
        algorithm.random_state.bit_generator.state = {
            "bit_generator": "PCG64",
            "state": dict(zip(("state", "inc"), numbers, strict=True)),
            "has_uint32": words[8],
            "uinteger": words[9],
        }
        algorithm.n_iter = state["iteration"] or None
        if "genomes" not in state:
            return
        pop = Population.new("X", unpack(state["genomes"], self.bits))
        for name in KEPT:
            pop.set(name, whole(state[name]).numpy())
        pop.set("rank", np.asarray(pop.get("rank"), int))
        for individual in pop:
            individual.evaluated.update("F", "G")
        algorithm.pop, algorithm.is_initialized = pop, True


def whole(tensor: Tensor | Stored) -> Tensor:
    """A tensor of a checkpoint, read if it is still in its files."""
    return tensor.whole() if isinstance(tensor, Stored) else tensor


def pack(genomes: np.ndarray) -> Tensor:
    """bool [k, n] -> uint8 [k, n / 8], eight bits in a byte."""
    return torch.from_numpy(np.packbits(genomes, axis=-1))


def unpack(packed: Tensor | Stored, bits: int) -> np.ndarray:
    """What `pack` was given."""
    return np.unpackbits(whole(packed).numpy(), axis=-1, count=bits).astype(bool)
