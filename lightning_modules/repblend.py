"""RepBlend: distils an image-text set into a few synthetic pairs, with representation blending (arXiv 2505.14705).

    f = E(X)                      once a training step; E frozen, P_x, P_y trained heads          networks/projection.py
    f~_i = lam f_i + (1 - lam) f_p(i),  y~ likewise with the same lam ~ Beta(c, c) and permutation p      blending, RB
    l_ij = <P_x(f~_i), P_y(y~_j)> / tau
    S    = diag(a) + (alpha / r) L R^T                             similarity of picture i and text j; I at the start
    L    = 1/2 [mean of e over S > 1/2 + mean of e over the rest]                                      wBCE (2406.03793)
           e_ij = -S_ij log sigmoid(l_ij) - (1 - S_ij) log sigmoid(-l_ij)            the pairs of S are not blended
    theta_{k+1} = theta_k - eta dL/dtheta on batch k of b synthetic pairs, from an expert's theta*_s, k < T
    J    = |theta_T - theta*_{s+e}|^2 / |theta*_s - theta*_{s+e}|^2, of each head ("separate") or of both ("merged"), SM
    X, Y, (a, L, R), (eta_x, eta_y)   each by SGD on J, by the gradient of lightning_t2i/trajectory_matching.py

    X [M, 3, H, W]  synthetic pictures in [-1, 1] at the start;  Y [M, d']  vectors of the text encoder, no tokens
    theta           weights of both heads;   theta*_e   of an expert after epoch e (lightning_modules/experts.py)
    a [M], L, R [M, r]   factors of S;   alpha, r   their scale and rank;   tau   temperature
    eta             learned rates of the inner loop;   T, b, c   `inner_steps`, `inner_batch`, `blending.concentration`

A training step is one iteration with one segment of an expert on each process and micro-batch; their gradients are
averaged. The batches of the data module only beat time. Logged: J, image and text (its two parts), rate, largest |S|.

Predecessors are configs: blending none is LoRS with heads only (2406.03793); S = I besides, InfoNCE and the unrolled
gradient MTT-VL (2308.07545); wBCE and tesla TESLA-VL (2211.10586). `initial` alone, untrained, is a coreset.

Deviations: eta's gradient has J's own normaliser where the published code always takes the separate one; dropout of the
second pass is that of the first (`replay` false draws it anew, as there); log sigmoid without 1e-6 (the objective
wbce_epsilon has it); eta is kept above a floor; X are scaled to [-1, 1] and not by CLIP's deviations, so rates for
X are (2 x .27)^2 as large. Collapse is watched in the space of the first expert, which is matched as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_modules.experts import Course, Recipe, Trajectories, trained
from lightning_t2i import coresets
from lightning_t2i.batch import Batch
from lightning_t2i.blending import Blending, Plan
from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.measured_set import MeasuredSet
from lightning_t2i.networks.frozen_pair import Encoders, encoded, facts_of
from lightning_t2i.networks.projection import Branches
from lightning_t2i.networks.tensors import Tensors
from lightning_t2i.options import GroupOptions, MethodOptions
from lightning_t2i.pair_features import PairFeatures, records_of
from lightning_t2i.paths import resolve
from lightning_t2i.retrieval_student import Protocol
from lightning_t2i.soft_contrast import OBJECTIVES, similarity
from lightning_t2i.trajectory_matching import Matched, Segment, tesla, unrolled

GROUPS = ("images", "texts", "rates", "similarity")
RATES = {"images": 100.0, "texts": 100.0, "rates": 0.01, "similarity": 10.0}  # of the outer loop: Flickr30K, 100 pairs


def published_update(rate: float) -> GroupOptions:
    """SGD with momentum 0.5, no clipping."""
    return GroupOptions(partial(torch.optim.SGD, lr=rate, momentum=0.5), clip=None)


class RepBlend(MeasuredSet):
    """Distils a retrieval set into synthetic pairs.

    Args:
        encoders: the frozen ones, those of the experts.
        experts: folder of their trajectories; null trains some by `recipe` before the first step, for small sets.
        recipe: of such experts.
        pairs: M.
        size: pixels of a side.
        initial: which real pairs to begin with (lightning_t2i/coresets.py), or noise.
        target: S by factors, dense, or I.
        rank, alpha: of the factors.
        objective: L, see lightning_t2i/soft_contrast.py.
        blending: RB.
        gradient: truncated (tesla) or whole (unrolled).
        merged: one normaliser of J for both heads.
        inner_steps, inner_batch: T, b.
        expert_epochs: epochs from theta*_s to theta*_{s+e}.
        max_start: s is below it.
        rate, floor: initial eta, and its least value.
        replay: take the dropout of pass 1 again in pass 2.
        chunk: encode so many pictures at a time, and again in the backward pass; null keeps all activations.
        kept: pictures whose activations are kept all the same.
        protocol: how validation and test train new students on the set.
        images, texts, rates, similarity: how X, Y, eta and S are updated.
        common: options of the engine.
    """

    may_rest = ()

    def __init__(
        self,
        encoders: Encoders,
        experts: str | None = None,
        recipe: Recipe | None = None,
        pairs: int = 99,
        size: int = 224,
        initial: Literal["random", "herding", "k_center", "forgetting", "noise"] = "random",
        target: Literal["factors", "dense", "identity"] = "factors",
        rank: int = 10,
        alpha: float = 3.0,
        objective: str = "wbce",
        blending: Blending | None = None,
        gradient: Literal["tesla", "unrolled"] = "tesla",
        merged: bool = False,
        inner_steps: int = 8,
        inner_batch: int = 20,
        expert_epochs: int = 1,
        max_start: int = 2,
        rate: float = 0.1,
        floor: float = 1e-3,
        replay: bool = True,
        chunk: int | None = None,
        kept: int = 0,
        protocol: Protocol | None = None,
        images: GroupOptions | None = None,
        texts: GroupOptions | None = None,
        rates: GroupOptions | None = None,
        similarity: GroupOptions | None = None,
        common: MethodOptions | None = None,
    ):
        super().__init__(common)
        if objective not in OBJECTIVES:
            raise UserError("No such objective", where="model.objective", given=objective, allowed=OBJECTIVES)
        if not 1 <= inner_batch <= pairs:
            what, allowed = "An inner batch is taken from the set", f"1 to {pairs}, the number of pairs"
            raise UserError(what, where="model.inner_batch", given=inner_batch, allowed=allowed)
        least = {"inner_steps": inner_steps, "expert_epochs": expert_epochs, "max_start": max_start, "rank": rank}
        for name, value in {**least, "chunk": chunk}.items():
            if value is not None and value < 1:
                raise UserError("Must be at least 1", where=f"model.{name}", given=value)
        if self.common.precision == "bf16":
            where, fix = "model.common.precision", "model.common.precision: fp32"
            raise UserError("Second derivatives are taken in float32", where=where, given="bf16", fix=fix)
        self.encoders, self.experts, self.recipe, self.pairs = encoders, experts, recipe or Recipe(), pairs
        self.size, self.initial, self.target, self.rank, self.alpha = size, initial, target, rank, alpha
        self.objective, self.blending, self.protocol = (
            OBJECTIVES[objective],
            blending or Blending(),
            protocol or Protocol(),
        )
        self.gradient, self.merged, self.replay = gradient, merged, replay
        self.chunk, self.kept = chunk, kept
        self.inner_steps, self.inner_batch, self.rate, self.floor = inner_steps, inner_batch, rate, floor
        self.expert_epochs, self.max_start = expert_epochs, max_start
        given = dict(zip(GROUPS, (images, texts, rates, similarity), strict=True))
        self.options = {name: given[name] or published_update(RATES[name]) for name in GROUPS}

    def configure_model(self) -> None:
        self.student, m = self.encoders.into(self), self.pairs
        left = Keys(self.common.seed).normal("left", torch.arange(m), (self.rank,))
        found = {
            "images": {"pixels": torch.zeros(m, 3, self.size, self.size)},  # filled before the first step
            "texts": {"vectors": torch.zeros(m, self.student.text.inputs)},
            "rates": {"eta": torch.full((2,), self.rate)},
            "similarity": {
                "factors": {"a": torch.ones(m), "left": left, "right": torch.zeros(m, self.rank)},
                "dense": {"dense": torch.eye(m)},
                "identity": {},
            }[self.target],
        }
        for name in GROUPS:
            if found[name]:
                self.add_group(name, Tensors(**found[name]), self.options[name])

    def configure_optimizers(self) -> list[Any]:
        found = super().configure_optimizers()
        self.groups["rates"].optimizer.register_step_post_hook(lambda *_: self.rates.clamp(self.floor))
        return found

    def on_fit_start(self) -> None:
        """Opens or trains the experts; before the first step, chooses the pairs to begin with."""
        stream = self.trainer.datamodule.training["main"]
        features = PairFeatures.of(stream, (self.image, self.text), self.identities, self.device)
        if len(features) < self.pairs:
            allowed = f"at most {len(features)}"
            raise UserError("There are fewer real pairs", where="model.pairs", given=self.pairs, allowed=allowed)
        if self.experts is None:
            course = Course(self.student, features, self.recipe, self.common.seed)
            snapshots = list(trained(course, range(self.recipe.count), self.recipe))
            image, text = (torch.stack(side, 1) for side in zip(*snapshots, strict=True))
            self.trajectories = Trajectories((image, text))
        else:
            self.trajectories = Trajectories(resolve(self.experts), facts_of(self.frozen_identities, self.student))
        last = self.max_start - 1 + self.expert_epochs
        if last >= self.trajectories.length:
            what, allowed = "The experts have fewer epochs", f"below {self.trajectories.length} together"
            raise UserError(what, where="model.max_start, model.expert_epochs", given=last, allowed=allowed)
        self.judge, self.known = self.trajectories.snapshot(0, self.trajectories.length - 1, self.device), features
        if self.counters.step == 0:
            self.begin(stream, features)
            self.draw("before")

    def finish(self) -> None:
        self.draw("after")

    @torch.no_grad()
    def begin(self, stream: Any, features: PairFeatures) -> None:
        """Fills X and Y with real pairs, or with noise of their mean and deviation."""
        keys = Keys(self.common.seed).fork("initial")
        chosen = coresets.choose(self.initial, features, self.pairs, keys, self.trajectories, self.student)
        rows = features.owner.cpu()[chosen].tolist()
        pixels = torch.cat([records_of(stream, [row]).image for row in rows])
        vectors = features.texts.cpu()[chosen]
        if pixels.shape[-1] != self.size:
            fix = f"size: {pixels.shape[-1]}"
            raise UserError("The pictures have another size", where="model.size", given=self.size, fix=fix)
        if self.initial == "noise":
            mean, deviation = (f(pixels, (0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
            pixels = mean + deviation * keys.normal("pixels", torch.arange(self.pairs), tuple(pixels.shape[1:]))
            noise = keys.normal("vectors", torch.arange(self.pairs), tuple(vectors.shape[1:]))
            vectors = vectors.mean() + vectors.std() * noise
        self.images.set(pixels=pixels)
        self.texts.set(vectors=vectors)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        index = self.counters.micro * self.trainer.world_size + self.global_rank  # of the segments of this step
        plan = Plan.draw(self.keys, f"inner/{index}", self.pairs, self.inner_steps, self.inner_batch, self.blending,
                         self.device)  # fmt: skip
        pixels, vectors, eta, *factors = self.learned()
        features = encoded(self.image, pixels[plan.used], self.chunk, self.kept)
        inputs = [features, vectors, *factors]
        leaves = [t.detach().requires_grad_() for t in inputs]
        found = self.matched(leaves, eta, self.segment(index), plan)
        # A scalar of the value J whose gradients are those found; that of f goes on through E, once.
        value = sum((t * g).sum() for t, g in zip([*inputs, eta], found.gradients, strict=True))
        scalars = {"image": found.branches[0], "text": found.branches[1], "rate": eta.mean()}
        if factors and self.logs_now:
            scalars["similarity"] = similarity(tuple(factors), self.alpha, torch.arange(self.pairs)).abs().max()
        self.backward(tuple(self.groups), found.loss + value - value.detach(), **scalars)

    def segment(self, index: int) -> Segment:
        """An expert's: experts come in a new order each round, starts are drawn."""
        share = self.common.accumulate * self.trainer.world_size
        round_, place = divmod(self.counters.step * share + index, len(self.trajectories))
        order = Keys(self.common.seed).fork("order").at(round_).uniform("", torch.arange(len(self.trajectories)))
        start = int(self.keys.integers("start", torch.tensor([index]), 0, self.max_start))
        return self.trajectories.segment(int(order.argsort()[place]), start, self.expert_epochs, self.device)

    def matched(self, leaves: list[Tensor], eta: Tensor, segment: Segment, plan: Plan) -> Matched:
        """J and its gradients at leaves (f of the used pictures, Y, the factors of S) and at eta."""
        step, sizes = self.inner(leaves, plan), (self.inner_steps, self.merged)
        if self.gradient == "unrolled":
            return unrolled(step, leaves, eta, segment, *sizes)
        return tesla(step, leaves, eta, segment, *sizes, again=None if self.replay else self.inner(leaves, plan, True))

    def inner(self, leaves: list[Tensor], plan: Plan, anew: bool = False) -> Callable[..., Tensor]:
        """L of an inner step as a function of its number and the weights of the heads."""
        features, vectors, factors = leaves[0], leaves[1], tuple(leaves[2:])

        def loss(k: int, theta: Branches) -> Tensor:
            rows = plan.rows[k]
            x, y = plan.mixed(k, features[plan.place[rows]], vectors[rows], self.blending)
            logits = self.student.logits(theta, x, y, plan.keep(k, self.student, anew))
            return self.objective(logits, similarity(factors, self.alpha, rows).to(logits))

        return loss
