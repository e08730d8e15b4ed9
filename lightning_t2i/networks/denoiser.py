"""A network together with its noise process and what it predicts: the one way in which methods call a denoiser.

    x_t = alpha x0 + sigma eps,  latents of unit scale, t in the process's native time
    EDM preconditioning (arXiv 2206.00364, table 1), F the network, d = sigma_data:
        x0 = c_skip x_t + c_out F(c_in x_t, ln(sigma) / 4)
        c_skip = d^2 / (s^2 + d^2)    c_out = s d / sqrt(s^2 + d^2)    c_in = 1 / sqrt(s^2 + d^2)

The backbone runs in its own precision; conversions around it are float32 or float64.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_t2i.batch import Cond
from lightning_t2i.errors import UserError
from lightning_t2i.networks.backbones import adapter_for
from lightning_t2i.processes.base import ContinuousProcess, Process, Time
from lightning_t2i.processes.conversions import convert, convert_coefficients, expand, work_dtype
from lightning_t2i.processes.edm import EDM

KINDS = ("eps", "v", "x0", "velocity", "edm")


class Predictor(nn.Module):
    """Predictions of every kind from one `predict`; the base of `Denoiser` and of `Reexpressed`.

    All methods take x_t [B, C, h, w], t (native time, [B] or scalar) and a Cond of B samples or None, and return a
    tensor of the shape of x_t, at least float32.

    Attributes:
        process: the noise process.
        prediction: the kind that `predict` returns, one of KINDS.
        sigma_data: standard deviation of the data, for "edm".
    """

    def __init__(self, process: Process, prediction: str, sigma_data: float = 0.5):
        super().__init__()
        if prediction not in KINDS:
            raise UserError("Unknown prediction", where="prediction", given=prediction, allowed=KINDS)
        if prediction == "edm" and not isinstance(process, EDM):
            raise UserError("EDM preconditioning needs the EDM process", where="process", given=process.name)
        self.process, self.prediction, self.sigma_data = process, prediction, sigma_data

    @abstractmethod
    def predict(self, x_t: Tensor, t: Time, cond: Cond | None = None) -> Tensor:
        """The network's raw output, of kind `prediction`, in float32 or float64."""

    def forward(self, x_t: Tensor, t: Time, cond: Cond | None = None) -> Tensor:
        return self.predict(x_t, t, cond)

    def convert(self, raw: Tensor, x_t: Tensor, t: Time, target: str) -> Tensor:
        """Another kind from what `predict` returned at (x_t, t), without a second network call."""
        if target == self.prediction:
            return raw
        alpha, sigma = self.process.alpha_sigma(torch.as_tensor(t, device=x_t.device), torch.float64)
        source = self.prediction
        if source == "edm":
            c_skip, c_out, _ = self._preconditioning(sigma)
            raw, source = expand(c_skip, x_t) * x_t + expand(c_out, x_t) * raw, "x0"
        return convert(raw, x_t, alpha, sigma, source, target)

    def target(self, x0: Tensor, eps: Tensor, t: Time) -> Tensor:
        """What `predict` is trained to return at x_t = alpha x0 + sigma eps."""
        alpha, sigma = self.process.alpha_sigma(torch.as_tensor(t, device=x0.device), torch.float64)
        dtype = work_dtype(x0)
        x0, eps = x0.to(dtype), eps.to(dtype)
        if self.prediction == "edm":
            c_skip, c_out, _ = self._preconditioning(sigma)
            return (x0 - expand(c_skip, x0) * (x0 + expand(sigma, x0) * eps)) / expand(c_out, x0)
        return {
            "x0": lambda: x0,
            "eps": lambda: eps,
            "v": lambda: expand(alpha, x0) * eps - expand(sigma, x0) * x0,
            "velocity": lambda: eps - x0,
        }[self.prediction]()

    def x0(self, x_t: Tensor, t: Time, cond: Cond | None = None) -> Tensor:
        """The estimate of clean data, E[x0 | x_t]."""
        return self.convert(self.predict(x_t, t, cond), x_t, t, "x0")

    def eps(self, x_t: Tensor, t: Time, cond: Cond | None = None) -> Tensor:
        """The estimate of the noise, E[eps | x_t]."""
        return self.convert(self.predict(x_t, t, cond), x_t, t, "eps")

    def v(self, x_t: Tensor, t: Time, cond: Cond | None = None) -> Tensor:
        """alpha eps - sigma x0."""
        return self.convert(self.predict(x_t, t, cond), x_t, t, "v")

    def velocity(self, x_t: Tensor, t: Time, cond: Cond | None = None) -> Tensor:
        """eps - x0: from data to noise (the probability flow's dx/dt when the process is a rectified flow)."""
        return self.convert(self.predict(x_t, t, cond), x_t, t, "velocity")

    def score(self, x_t: Tensor, t: Time, cond: Cond | None = None) -> Tensor:
        """The gradient of the log density of x_t: -eps / sigma."""
        return self.convert(self.predict(x_t, t, cond), x_t, t, "score")

    def generate(self, z: Tensor, cond: Cond | None = None, t: Time | None = None) -> Tensor:
        """One-step generation: the x0 estimate of the state that unit Gaussian noise z is.

        Args:
            t: the time given to the network and to the conversion; the process's t_max by default.
        """
        return self.x0(self.process.initial(z, t), self.process.t_max if t is None else t, cond)

    def _preconditioning(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        variance = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / variance, sigma * self.sigma_data / variance.sqrt(), 1 / variance.sqrt()


class Denoiser(Predictor):
    """A diffusers backbone (or any module called as `backbone(x, t, cond)`) with its process and prediction.

    Only the backbone has parameters. It is always called through its forward, so it can be sharded as its own root.

    Args:
        backbone: UNet2DModel, UNet2DConditionModel, PixArt, SD3 or Flux transformer, or a module of ours.
        process, prediction, sigma_data: see `Predictor`.

    Attributes:
        compute_dtype: precision of the tensors given to the backbone; None is that of its parameters. Times stay
            float32 or integer in every case: in bfloat16 a time near 1000 would be rounded to a multiple of 4.
    """

    def __init__(self, backbone: nn.Module, process: Process, prediction: str, sigma_data: float = 0.5):
        super().__init__(process, prediction, sigma_data)
        self.backbone = backbone
        self.compute_dtype: torch.dtype | None = None
        self._call = adapter_for(backbone)

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        subfolder: str | None = None,
        revision: str | None = None,
        torch_dtype: torch.dtype = torch.float32,
        variant: str | None = None,
        process: Process | None = None,
        prediction: str | None = None,
    ) -> Denoiser:
        """From a diffusers pipeline folder or hub id; the scheduler's config tells the process and the prediction.

        Args:
            subfolder: the component, "unet" or "transformer" by default, whichever the pipeline has.
            process, prediction: override what the scheduler says.

        Raises:
            UserError: not a folder or a reachable hub id, no such component, or an unknown scheduler.
        """
        from lightning_t2i.networks import load

        backbone = load.load_backbone(path, subfolder, revision, torch_dtype, variant)
        if process is None or prediction is None:
            found = load.load_process(path, revision)
            process, prediction = process or found[0], prediction or found[1]
        return cls(backbone, process, prediction)

    @property
    def classes(self) -> int:
        """Classes of a class-conditional network, whose number is the null label; 0 of any other.

        diffusers' networks count the null label among their classes, EDM's of this repository do not.
        """
        config: Any = getattr(self.backbone, "config", None)
        ours, theirs = getattr(config, "num_classes", 0), getattr(config, "num_class_embeds", None)
        return ours or (theirs - 1 if theirs else 0)

    def merged(self) -> Denoiser:
        """A plain copy, with adapters in its weights."""
        backbone: Any = copy.deepcopy(self.backbone)
        if getattr(backbone, "peft_config", None):
            backbone.fuse_lora()
            backbone.unload_lora()
        return Denoiser(backbone, self.process, self.prediction, self.sigma_data)

    def owns(self, name: str) -> bool:
        """Whether a parameter that is trainable belongs to this denoiser alone; see `adapters.Role`."""
        return True

    def shard_roots(self) -> list[nn.Module]:
        """What is sharded, each as a root of its own."""
        return [self.backbone]

    def predict(self, x_t: Tensor, t: Time, cond: Cond | None = None) -> Tensor:
        x, time = self._inputs(x_t, t)
        cond = cond.to(x.device, x.dtype) if cond is not None else None
        out = self._call(self.backbone, x, time, cond)
        if out.shape[1] == 2 * x_t.shape[1]:  # learned variances (arXiv 2102.09672) are not used
            out = out[:, : x_t.shape[1]]
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def features(
        self, x_t: Tensor, t: Time, cond: Cond | None = None, layers: Sequence[str] = ("mid_block",)
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What `predict` returns and, from the same forward pass, outputs of inner modules, for instance "mid_block".

        Of a module that returns several tensors the first is taken.

        Raises:
            UserError: the backbone has no module of that name.
        """
        modules = dict(self.backbone.named_modules())
        kept: dict[str, Tensor] = {}

        def keep(name: str):
            def hook(_module: nn.Module, _args: Any, out: Any) -> None:
                kept[name] = out[0] if isinstance(out, tuple) else out

            return hook

        for name in layers:
            if name not in modules:
                outer = [child for child, _ in self.backbone.named_children()]
                raise UserError("No such layer in the backbone", where="layers", given=name, allowed=outer)
        handles = [modules[name].register_forward_hook(keep(name)) for name in layers]
        try:
            return self.predict(x_t, t, cond), kept
        finally:
            for handle in handles:
                handle.remove()

    def _inputs(self, x_t: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """Scaled input in the backbone's precision, and its time input [B]."""
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        dtype = self.compute_dtype or next((p.dtype for p in self.backbone.parameters() if p.is_floating_point()), None)
        x = x_t
        if self.prediction == "edm":
            x = expand(self._preconditioning(t.to(torch.float64))[2], x_t) * x_t
        if isinstance(self.process, EDM):
            t = t.to(torch.float64).log() / 4
        elif isinstance(self.process, ContinuousProcess):
            t = t.to(torch.float64) * 1000
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return x.to(dtype or work_dtype(x)), t.to(wide) if t.is_floating_point() else t


class Reexpressed(Predictor):
    """A denoiser seen through another prediction or another process, by algebra alone.

    With the same process only the prediction changes: an eps network becomes a v network. With another one the time of
    equal signal-to-noise ratio is used and the input is rescaled, so a DDPM teacher becomes a rectified flow whose
    velocity can be integrated or distilled. Outside the range of ratios that the inner network knows, its end is used,
    and the estimate that the noise level determines well (x0 at high noise, eps at low noise) is kept.

    Args:
        inner: the denoiser to re-express.
        prediction: the new kind, not "edm".
        process: the new process; None keeps the inner one.
    """

    def __init__(self, inner: Predictor, prediction: str, process: Process | None = None):
        super().__init__(process or inner.process, prediction)
        if prediction == "edm":
            raise UserError("A network cannot be re-expressed as preconditioned", where="prediction", given=prediction)
        self.inner = inner

    def predict(self, x_t: Tensor, t: Time, cond: Cond | None = None) -> Tensor:
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        if self.process == self.inner.process:
            return self.inner.convert(self.inner.predict(x_t, t, cond), x_t, t, self.prediction)
        alpha, sigma = self.process.alpha_sigma(t, torch.float64)
        inner_t = self.inner.process.time_of_log_snr(self.process.log_snr(t, torch.float64))
        inner_alpha, inner_sigma = self.inner.process.alpha_sigma(inner_t, torch.float64)
        scale = ((inner_alpha**2 + inner_sigma**2) / (alpha**2 + sigma**2)).sqrt()
        inner_x = x_t * expand(scale, x_t)
        raw = self.inner.predict(inner_x, inner_t, cond)
        estimates = {kind: self.inner.convert(raw, inner_x, inner_t, kind) for kind in ("x0", "eps")}
        low_noise = alpha > sigma
        from_eps = convert_coefficients(alpha, sigma, "eps", self.prediction)
        from_x0 = convert_coefficients(alpha, sigma, "x0", self.prediction)
        a, b = (expand(torch.where(low_noise, e, x), x_t) for e, x in zip(from_eps, from_x0, strict=True))
        estimate = torch.where(low_noise.view(-1, *[1] * (x_t.dim() - 1)), estimates["eps"], estimates["x0"])
        return a * x_t + b * estimate
