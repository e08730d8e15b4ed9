"""ECAD: evolved caching schedules that speed up an untouched diffusion transformer (arXiv 2506.15682).

    S[n, b, f] in {0, 1}               step n computes component f of block b, or takes its last output again
    y = f(x) if S[n, b, f] else slot;  slot = y;  h = h + gate_n y       before gate and residual           section 3
    F1(S) = 1 - mean over prompts p and seeds s of R(G_S(p, s), p)       quality                            section 3
    F2(S) = N fixed + sum S[n, b, f] w[b, f]                             multiply-accumulates of a picture
    S_k+1   by NSGA-II from S_1, ..., S_k and their F, under S != 1      crossover of 4 cuts, bit flips     algorithm 1
    result  all S that no evaluated S beats in F1 and F2 at once

    N       sampling steps, n = 0 the noisiest; there slots are empty and everything is computed
    G_S     the frozen pipeline's sampler under schedule S; its noise is a function of (p, s) alone
    R       reward of a picture, higher is better
    w, fixed  costs of a component and of the rest of a step, counted once

Nothing is trained: a training step is a generation. Every process evaluates every candidate on its share of the
pictures; scores are ordered by (prompt id, seed) and summed in float64 everywhere, so populations are equal in any bit
for any number of processes. Logged, as search/...: hypervolume, evaluated, dropped, front, best_2x (quality at half of
the MACs).

Deviations from paper and code, all undone by `search.REFERENCE`: step 0 is no part of the genome; half of the children
are mutated, in one bit on average; schedules are evaluated once; clearly worse ones on a quarter of the pictures alone;
the products within attention count. The final front is evaluated again on fresh seeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_t2i.batch import Batch, Cond, Records
from lightning_t2i.caching import Cost, Executor, Schedule
from lightning_t2i.caching.archive import chosen
from lightning_t2i.caching.calibration import Calibration, Sampler, Uses, finite, refuse_shares, refuse_uneven
from lightning_t2i.caching.comparison import compared, held_out
from lightning_t2i.caching.executor import Kind
from lightning_t2i.caching.front import write_front, write_picks, write_plots
from lightning_t2i.caching.progress import Progress
from lightning_t2i.caching.rewards import Attributes, Detector, Reward
from lightning_t2i.caching.search import SearchOptions
from lightning_t2i.errors import UserError
from lightning_t2i.frozen import folder_identity
from lightning_t2i.keys import Keys
from lightning_t2i.method import MethodModule
from lightning_t2i.networks.build import save_pipeline
from lightning_t2i.networks.codec import LatentCodec
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.networks.load import load_process
from lightning_t2i.networks.text_encoder import TextEncoder
from lightning_t2i.options import MethodOptions
from lightning_t2i.paths import resolve
from lightning_t2i.processes import Process


class ECAD(MethodModule):
    """Searches caching schedules of a PixArt or FLUX pipeline.

    Args:
        network: pipeline folder or hub id.
        parts: that of autoencoder, text encoder and scheduler; null is the network's.
        process: noise process and its grid of times; null reads it from the scheduler.
        revision: commit of a hub id.
        reward: what a search maximises.
        judge: what validation reports on other prompts.
        steps, guidance, solver: the sampler that schedules are made for.
        embedded_guidance: what a guidance-distilled network (FLUX.1-dev) is told; other networks ignore it.
        size: side of the pictures in pixels; null is the size that the network was made for.
        text_length: tokens of T5; null is the pipeline's usual number.
        seeds: noises of every prompt; the batch size of the data is this times the number of prompts.
        micro_batch: pictures that are made at a time. Another number may change last bits, and so the search.
        executor: hooks on the stock network; its blocks as static programs; or these compiled.
        search: how schedules are searched.
        schedule: what `predict` samples with: the file of a schedule or of a front; null: the front of this search, or
            no cache where there is none.
        speed: of a front, how many times fewer MACs at least; null is its knee.
        common: options of the engine.
    """

    def __init__(
        self,
        network: str,
        parts: str | None = None,
        process: Process | None = None,
        revision: str | None = None,
        reward: Reward | None = None,
        judge: Reward | None = None,
        steps: int = 20,
        guidance: float = 4.5,
        solver: Literal["ddim", "euler", "heun", "dpmpp_2m"] = "dpmpp_2m",
        embedded_guidance: float = 5.0,
        size: int | None = None,
        text_length: int | None = None,
        seeds: int = 10,
        micro_batch: int = 100,
        executor: Kind = "static",
        search: SearchOptions | None = None,
        schedule: str | None = None,
        speed: float | None = None,
        common: MethodOptions | None = None,
    ):
        super().__init__(common)
        for name, value, least in (("steps", steps, 2), ("seeds", seeds, 1), ("micro_batch", micro_batch, 1)):
            if value < least:
                raise UserError(f"{name} is too small", where=f"model.{name}", given=value, allowed=f"{least} or more")
        if self.common.accumulate > 1:
            what, where = "A generation is one training step", "model.common.accumulate"
            raise UserError(what, where=where, given=self.common.accumulate, allowed="1", fix="micro_batch: 50")
        self.source, self.parts, self.process, self.revision = network, parts or network, process, revision
        self.steps, self.guidance, self.solver = steps, guidance, solver
        self.reward, self.judge = reward or Attributes(), judge or Detector()
        self.embedded_guidance, self.size, self.text_length = embedded_guidance, size, text_length
        self.seeds, self.micro_batch, self.kind = seeds, micro_batch, executor
        self.options, self.schedule, self.speed = search or SearchOptions(), schedule, speed
        self._saved: Any = None

    def configure_model(self) -> None:
        identity, others = (folder_identity(resolve(s), self.revision) for s in (self.source, self.parts))
        dtype = torch.bfloat16 if self.common.precision == "bf16" else None
        known, prediction = load_process(self.parts, self.revision)
        made: dict[str, Any] = {"process": self.process or known, "prediction": prediction}
        denoiser = Denoiser.from_pretrained(self.source, revision=self.revision, **made)
        codec = LatentCodec.from_pretrained(self.parts, revision=self.revision)
        text = TextEncoder.from_pretrained(self.parts, revision=self.revision, t5_length=self.text_length)
        size = self.size or getattr(denoiser.backbone.config, "sample_size", 0) * codec.factor
        if not size:
            raise UserError("The network does not say how large its pictures are", where="model.size", fix="size: 256")
        shape = codec.latent_shape(size)
        self.sampler = Sampler(denoiser, codec, shape, self.steps, self.guidance, self.solver)
        self.add_frozen("denoiser", denoiser, identity, dtype)
        self.add_frozen("codec", codec, others)
        self.add_frozen("text", text, others, dtype)

    def open(self) -> ECAD:
        """Hooks the network and counts it, once; a search that was loaded is there then."""
        if not hasattr(self, "progress"):
            self.executor = Executor(self.denoiser.backbone, self.sampler.times, self.kind)
            self.progress = Progress(self.counted(), self.steps, self.options, self.common.seed)
            if self._saved is not None:
                self.progress.load(self._saved)
        return self

    def counted(self) -> Cost:
        """What the network costs for a picture."""
        tokens, rows = self.encode([""]).embeds.shape[1], 1 if self.guidance == 1 else 2
        return Cost.of(self.denoiser.backbone, self.sampler.shape, tokens, rows)

    def kept_bytes(self) -> int:
        """Bytes of a micro-batch's kept values, under the schedule that keeps most."""
        return self.micro_batch * self.counted().most_bytes

    def check_batch(self, samples: int, batch: int, world: int) -> None:
        """Refuses a batch that is not every prompt with every seed, or leaves a process without pictures."""
        refuse_shares(samples, self.seeds, batch, self.micro_batch, world)

    def on_fit_start(self) -> None:
        """Reads all prompts on every process."""
        stream, places = self.trainer.datamodule.training["main"], (self.trainer.global_rank, self.trainer.world_size)
        self.check_batch(len(stream), stream.batch_size, places[1])
        refuse_uneven(self, stream.batch_size, self.micro_batch, places[1], self.options.race)
        self.records = stream.fetch(np.arange(len(stream)), torch.arange(len(stream))).to(self.device)
        self.reward.setup(self.device)
        self.places = places
        self.open().calibration = self.calibrated(range(self.seeds))

    def calibrated(self, seeds: range) -> Calibration:
        """This process's share of the prompts with some seeds."""
        keys = Keys(self.common.seed).fork("calibration")
        return Calibration(self.records, self.condition, seeds, self.micro_batch, keys, *self.places)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        progress = self.progress
        if progress.anchors is None:
            none, worst = self.measure([None, progress.only_first]).mean(1).tolist()
            progress.anchors = none, worst
        genomes = progress.search.ask()
        self.agree(genomes)
        schedules = progress.schedules(genomes)
        n, first = self.calibration.n, self.calibration.first
        progress.evaluate(progress.new(schedules), self.measure, first, n, self.counters.step)
        objectives = [(1 - progress.quality(s), progress.macs(s) / 1e12) for s in schedules]
        self.tell(np.array(objectives).reshape(-1, 2))
        self.note(**{f"search/{name}": value for name, value in progress.summary().items()})
        if self.trainer.is_global_zero:
            write_front(Path(self.trainer.default_root_dir), self.found())

    def measure(
        self, schedules: Sequence[Schedule | None], jobs: range | None = None, sampler: Sampler | None = None,
        executor: Uses | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Scores [k, n] of all pictures of all processes, ordered by (prompt id, seed); 0 outside of `jobs`."""
        how = sampler or self.sampler, self.reward, executor or self.executor
        mine = self.calibration.scores(*how, schedules, jobs)
        every = self.gathered(mine.to(self.device)).view(-1, *mine.shape).sum(0)
        return finite(every.cpu().numpy(), self.reward)

    def tell(self, objectives: np.ndarray) -> None:
        """Gives the search F [k, 2] of the candidates that it asked for."""
        self.progress.search.tell(objectives)

    def agree(self, genomes: np.ndarray) -> None:
        """Stops where processes hold other candidates."""
        digest = hashlib.blake2b(np.packbits(genomes).tobytes(), digest_size=7).digest()
        rows = self.gathered(torch.tensor([int.from_bytes(digest, "little")], device=self.device))
        if len(rows.unique()) > 1:
            raise RuntimeError(f"Processes disagree about the candidates of generation {self.counters.step + 1}")

    def found(self) -> dict[str, Any]:
        """The front of this search with what it belongs to, as front.json holds it."""
        identity = {"network": self.source, "identity": self.frozen_identities["denoiser"], "made_for": self.made_for()}
        return self.open().progress.found(**identity)

    def finish(self) -> None:
        """Evaluates the front and what it is compared with on fresh seeds, and draws the plots."""
        self.calibration = self.calibrated(range(self.seeds, 2 * self.seeds))
        found = compared(self, self.found())
        self.calibration = self.calibrated(range(self.seeds))
        if self.trainer.is_global_zero:
            write_front(Path(self.trainer.default_root_dir), found)
            write_plots(Path(self.trainer.default_root_dir), found)

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The judge on other prompts, without a cache and with the picks of the front, and how far pictures moved."""
        stage = "test" if self.trainer.testing else "val"
        for name, value in held_out(self.open(), batch["main"]).items():
            self.log(f"{stage}/{name}", value, batch_size=len(batch["main"]), sync_dist=True)

    test_step = validation_step

    def condition(self, records: Records) -> Cond:
        """Cached conditions, or captions encoded."""
        return records.cond if records.cond is not None else self.encode(records.caption)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Cond:
        cond = self.text(captions)
        if getattr(self.denoiser.backbone.config, "guidance_embeds", False):
            cond.guidance = torch.full((len(captions),), self.embedded_guidance, device=self.device)
        return cond

    @torch.no_grad()
    def sample(self, cond: Cond | None, keys: Keys, positions: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] under the schedule; the noise of a picture depends on keys and position."""
        self.open().executor.use(self.picked())
        images = self.sampler.pictures(keys.normal("z", positions, self.sampler.shape), cond)
        self.executor.use(None)
        return images

    def picked(self) -> Schedule | None:
        """The schedule of the config, or that of this search's front."""
        if self.schedule is not None:
            found = Schedule.load(self.schedule, self.speed)
            found.check(self.progress.full.layout, self.steps)
            return found
        front = self.found()["front"]
        return Schedule.from_plain(front[chosen(front, self.speed)]["schedule"]) if front else None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["t2i"]["ecad"] = {**self.progress.state(), "made_for": self.made_for()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._saved = checkpoint["t2i"].get("ecad")
        if self._saved is None or self._saved["made_for"] != self.made_for():
            raise UserError("The checkpoint is of another search", where="model", fix="start a new run with --run NAME")
        if hasattr(self, "progress"):
            self.progress.load(self._saved)

    def made_for(self) -> dict[str, Any]:
        """What the objectives of a search depend on, as plain values."""
        return {"steps": self.steps, "guidance": self.guidance, "solver": self.solver, "seeds": self.seeds,
                "shape": list(self.sampler.shape), "reward": type(self.reward).__name__, "sdpa": self.options.sdpa,
                "first step": self.options.fix_first_step, "embedded_guidance": self.embedded_guidance,
                "text_length": self.text_length, "process": repr(self.process)}  # fmt: skip

    def export(self, folder: Path, batches: Iterable[Batch]) -> None:
        """Writes the stock pipeline in fp16, front.json and the picks of the front beside it.

        Its networks are those that were given. Its scheduler is that of `to_scheduler` for the search's solver.
        """
        found = self.found()
        self.executor.detach()  # a copy of the network is written
        save_pipeline(folder, self.denoiser, self.codec, self.text, solver=self.solver)
        write_front(folder, found)
        write_picks(folder, found)
        self.executor.attach()
