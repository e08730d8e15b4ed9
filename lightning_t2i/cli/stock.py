"""What a written model folder holds, read from the folder alone: its networks, and lines of Python that load it."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lightning_t2i.dual_encoder_pipeline import FACTS
from lightning_t2i.errors import UserError
from lightning_t2i.networks import load, projections
from lightning_t2i.shipped import shipped
from lightning_t2i.synthetic_set import KIND

# Networks of this repository that are written as folders of their own: class -> module.
OURS = {
    **load.OURS,
    "ShapesClassifier": "lightning_t2i.networks.classifier",
    "PerceptualNetwork": "lightning_t2i.networks.perceptual",
}
# Pipelines of this repository, where no library has one that draws in the same way: class -> module.
PIPELINES = {"TokenPipeline": "lightning_t2i.token_pipeline"}
PRECISIONS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}  # integers are buffers, no parameters
BINNED = (32, 64, 128)  # latent sizes whose aspect ratios PixArt's pipeline has a table for
PROMPT = "a red square"


@dataclass(frozen=True)
class Network:
    """component: folder of a pipeline, "" for a single model; parameters: numbers in its weight files."""

    component: str
    kind: str
    parameters: int
    precision: str


@dataclass(frozen=True)
class Stock:
    """kind: class of the pipeline or model; library: package that has it; task: what the hub calls its use, or "";
    code: files of code that the folder brings along."""

    kind: str
    library: str
    task: str
    networks: list[Network]
    snippet: str
    code: list[str] = field(default_factory=list)


def read_stock(folder: Path, sampling: Mapping[str, Any] | None = None) -> Stock:
    """Describes a pipeline or model folder.

    Args:
        sampling: what the snippet samples with, each optional: prompt, steps, guidance, embedded_guidance.

    Raises:
        UserError: neither model_index.json nor config.json is there.
    """
    index, config = _json(folder / "model_index.json"), _json(folder / "config.json")
    if (folder / FACTS).is_file():
        return _dual_encoder(folder)
    if index:
        parts = [name for name, value in index.items() if isinstance(value, list) and value[0]]
        networks = [found for name in parts if (found := _network(folder, name)) is not None]
        kind = index["_class_name"]
        if any(str(index[name][1]).startswith(projections.OURS) for name in parts):
            lines = _projected(dict(sampling or {}), "text_encoder" in parts)
            task = "text-to-image" if "text_encoder" in parts else "unconditional-image-generation"
            return Stock(kind, "lightning-t2i", task, networks, lines)
        lines, task = _pipeline(folder, kind, dict(sampling or {}))
        library = "lightning-t2i" if kind in PIPELINES else "diffusers"
        return Stock(kind, library, task, networks, lines, shipped(folder))
    if not config:
        raise UserError("Not a model folder", where=str(folder), allowed="model_index.json or config.json")
    network = _network(folder, "")
    assert network is not None  # it has a config
    if network.kind == KIND:  # no network: factors of a similarity
        code = ["from pathlib import Path", "from lightning_t2i.synthetic_set import SyntheticSet", ""]
        code += ['pairs = SyntheticSet.load(Path("."))  # this folder', "print(pairs.images.shape, pairs.similarity)"]
        return Stock(KIND, "lightning-t2i", "", [network], "\n".join(code))
    return Stock(network.kind, _library(network.kind), "", [network], _model(network.kind, config))


def _dual_encoder(folder: Path) -> Stock:
    """A folder of lightning_t2i/dual_encoder_pipeline.py; a stock model calls that of style g with a ViT."""
    networks = [found for name in ("", "image", "text") if (found := _network(folder, name)) is not None]
    lines = ["import torch", "from lightning_t2i.dual_encoder_pipeline import DualEncoderPipeline", ""]
    lines += ['model = DualEncoderPipeline.from_pretrained(".")  # this folder']
    lines += ["side = model.image.size", "pictures = model.encode_image(torch.zeros(1, 3, side, side))  # in [-1, 1]"]
    lines += ["texts = model.encode_text(['红色的圆形', '一只猫'])", "print(model.probabilities(pictures, texts))"]
    stock = networks[0].kind == "CLIPModel" and not _json(folder / FACTS)["tokens"]
    library = "transformers" if stock else "lightning-t2i"
    return Stock("DualEncoderPipeline", library, "zero-shot-image-classification", networks, "\n".join(lines))


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _network(folder: Path, component: str) -> Network | None:
    """Counts the weights by the headers of their files; nothing is loaded."""
    config = _json(folder / component / "config.json")
    if not config:
        return None
    count, kinds = 0, set()
    for file in sorted((folder / component).glob("*.safetensors")):
        with safe_open(str(file), "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no mapping
                part = tensors.get_slice(name)
                if part.get_dtype() in PRECISIONS:
                    count += math.prod(part.get_shape())
                    kinds.add(PRECISIONS[part.get_dtype()])
    kind = config.get("_class_name") or next(iter(config.get("architectures") or []), "")
    return Network(component, kind, count, ", ".join(sorted(kinds)))


def _library(kind: str) -> str:
    import diffusers

    return "lightning-t2i" if kind in OURS else "diffusers" if hasattr(diffusers, kind) else "transformers"


def _sampling(asked: Mapping[str, Any], backbone: Mapping[str, Any], sampling: Mapping[str, Any]) -> dict[str, Any]:
    """What is sampled and how, under the names of a pipeline's call."""
    guidance, embedded = sampling.get("guidance"), sampling.get("embedded_guidance")
    given: dict[str, Any] = {}
    if "prompt" in asked:
        given["prompt"] = sampling.get("prompt") or PROMPT
    if "class_labels" in asked and backbone.get("num_class_embeds"):
        given["class_labels"] = 0
    if "num_inference_steps" in asked and sampling.get("steps"):
        given["num_inference_steps"] = sampling["steps"]
    if "true_cfg_scale" in asked:  # Flux: its guidance_scale is only told to the network
        if guidance is not None and guidance != 1:
            given |= {"negative_prompt": "", "true_cfg_scale": guidance}
        if backbone.get("guidance_embeds") and embedded is not None:
            given["guidance_scale"] = embedded
    elif "guidance_scale" in asked and guidance is not None:
        given["guidance_scale"] = guidance
    return given


def _pipeline(folder: Path, kind: str, sampling: dict[str, Any]) -> tuple[str, str]:
    """Lines that make a picture, and the hub's name of the task."""
    if kind in PIPELINES:
        lines = ["# No stock pipeline draws token by token in this way.", f"from {PIPELINES[kind]} import {kind}", ""]
        lines += ['folder = "."  # this folder', f"pipeline = {kind}.from_pretrained(folder)"]
        return "\n".join([*lines, f"image = pipeline([{sampling.get('prompt') or PROMPT!r}])[0]"]), "text-to-image"
    import diffusers

    asked = inspect.signature(getattr(diffusers, kind).__call__).parameters
    backbone = next((c for n in load.BACKBONES if (c := _json(folder / n / "config.json"))), {})
    vae, given = _json(folder / "vae" / "config.json"), _sampling(asked, backbone, sampling)
    if "height" in asked and not backbone.get("sample_size") and vae.get("sample_size"):
        given |= {"height": vae["sample_size"], "width": vae["sample_size"]}
    if "use_resolution_binning" in asked and backbone.get("sample_size") not in BINNED:
        given["use_resolution_binning"] = False
    if "clean_caption" in asked:
        given["clean_caption"] = False  # captions are trained on as they are
    if "max_sequence_length" in asked:
        lengths = [_json(folder / f"tokenizer{n}/tokenizer_config.json").get("model_max_length") for n in ("_2", "")]
        length = next((n for n in lengths if n), None)
        if length is not None and length < asked["max_sequence_length"].default:
            given["max_sequence_length"] = length
    words = ", ".join(f"{name}={value!r}" for name, value in given.items())
    lines = ["import torch", f"from diffusers import {kind}", "", 'folder = "."  # this folder']
    trusted = ", trust_remote_code=True" if shipped(folder) else ""
    lines += [f"pipeline = {kind}.from_pretrained(folder, dtype=torch.float32{trusted})"]
    lines += [f"image = pipeline({words}).images[0]"]
    return "\n".join(lines), "text-to-image" if "prompt" in asked else "unconditional-image-generation"


def _projected(sampling: Mapping[str, Any], has_text: bool) -> str:
    """Lines that make a picture with a network that no stock class builds, and why none does."""
    facts = {name: sampling[name] for name in ("guidance", "steps") if sampling.get(name) is not None}
    words = "".join(f", {name}={value!r}" for name, value in facts.items())
    prompt = repr(sampling.get("prompt") or PROMPT) if has_text else "''"
    return "\n".join([
        f"# No stock pipeline holds this network: {projections.WHY}.",
        "import torch",
        "from lightning_modules.teacher import Teacher",
        "from lightning_t2i.batch import Records",
        "from lightning_t2i.keys import Keys",
        "",
        'folder = "."  # this folder',
        f"model = Teacher(folder{words})",
        "model.configure_model()",
        f"records = Records.of_prompts([{prompt}])",
        "image = model.sample(model.condition(records), Keys(0), torch.arange(1))[0]  # [3, H, W] in [-1, 1]",
    ])  # fmt: skip


def _model(kind: str, config: Mapping[str, Any]) -> str:
    """Lines that call a single network."""
    side = config.get("sample_size") or 32
    picture = f"picture = torch.zeros(1, 3, {side}, {side})  # values in [-1, 1]"
    opened = [f"from {_library(kind)} import {kind}", "", 'folder = "."  # this folder']
    if kind in load.OURS:
        shape = f"1, {config['in_channels']}, {side}, {side}"
        lines = ["import torch", "from lightning_t2i.networks.denoiser import Denoiser", "", opened[-1]]
        lines += ["denoiser = Denoiser.from_pretrained(folder)", f"x_t, sigma = 80 * torch.randn({shape}), 80.0"]
        return "\n".join([*lines, "x0 = denoiser.x0(x_t, torch.tensor([sigma]))  # one denoising step"])
    if kind in OURS:
        lines = ["import torch", f"from {OURS[kind]} import {kind}", *opened[1:]]
        call = "features = network(picture)" if kind == "ShapesClassifier" else "distance = network(picture, picture)"
        return "\n".join([*lines, f"network = {kind}.from_pretrained(folder)", picture, call])
    loaded = f"network = {kind}.from_pretrained(folder, dtype=torch.float32)"
    if kind == "AutoencoderKL":
        calls = [picture, "latent = network.encode(picture).latent_dist.mean * network.config.scaling_factor"]
        calls += ["again = network.decode(latent / network.config.scaling_factor).sample"]
    else:
        calls = [picture, "again = network(picture).sample"] if kind == "VQModel" else []
    return "\n".join(["import torch", *opened, loaded, *calls])
