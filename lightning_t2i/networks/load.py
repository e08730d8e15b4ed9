"""Reading stock diffusers and transformers folders, local or on a hub; weights come from safetensors only."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_t2i import rank0
from lightning_t2i.errors import UserError
from lightning_t2i.networks import projections
from lightning_t2i.networks.backbones import is_told_size
from lightning_t2i.networks.codec import factor_of
from lightning_t2i.paths import may_be_hub_id, resolve
from lightning_t2i.processes.base import Process
from lightning_t2i.processes.schedulers import from_scheduler

BACKBONES = ("unet", "transformer")
MADE_BY = "make it first: python train.py export (or merge) FOLDER --run RUN; the config or its page names the run"
# Networks of this repository that are built and loaded like diffusers' own: class name -> module.
OURS = {
    "SongUNet": "lightning_t2i.networks.edm_unets",
    "DhariwalUNet": "lightning_t2i.networks.edm_unets",
    "MLP": "lightning_t2i.networks.mlp",
    "StackedUNet": "lightning_t2i.networks.stacked_unet",
    "TokenTransformer": "lightning_t2i.networks.token_transformer",
}


def locate(path: str | Path) -> str:
    """The local folder that `path` names, looked up in the working directory and beside the package, or the hub id.

    Raises:
        UserError: neither a folder nor of the form owner/name.
    """
    folder = resolve(path)
    if folder.is_dir():
        return str(folder.resolve())
    text = str(path)
    if may_be_hub_id(text):
        return text
    parent = resolve(folder.parent)
    beside = sorted(p.name for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else ()
    raise UserError(
        "No such model folder",
        where=text,
        given=folder.name,
        allowed=beside or "a folder, or a hub id owner/name",
        fix=MADE_BY if text.startswith("exported/") else "check the path",
    )


def read_json(path: str | Path, name: str, revision: str | None = None) -> dict[str, Any] | None:
    """A JSON file of a model folder or hub repository; None when there is no such file.

    Raises:
        UserError: the hub cannot be reached or refuses (gated, private, withdrawn).
    """
    place = locate(path)
    if Path(place).is_dir():
        file = Path(place) / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return json.loads(Path(huggingface_hub.hf_hub_download(place, name, revision=revision)).read_text("utf-8"))
    except LocalEntryNotFoundError as error:
        if _is_whole(place, name, revision):
            return None
        raise UserError(
            "The model is not in the local cache and the hub cannot be reached",
            given=f"{place} at {revision or 'the default revision'}",
            fix="python train.py check --fetch --config FILE on a machine with access, or give a local folder",
        ) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            "The hub refuses this model: wrong id, withdrawn, private or gated",
            given=f"{place} at {revision or 'the default revision'}",
            fix="check the id and accept its licence with your account, or give a local folder",
        ) from error


def _is_whole(repository: str, name: str, revision: str | None) -> bool:
    """Whether the local cache holds a file wherever the repository has it: offline, what is not there is no error."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        huggingface_hub.snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=[name])
    except LocalEntryNotFoundError:
        return False
    return True


def model_index(path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Component name -> [library, class] of a pipeline folder; empty when the folder is a single model."""
    return read_json(path, "model_index.json", revision) or {}


def components(path: str | Path, revision: str | None = None) -> set[str]:
    """Names of the components that a pipeline folder has; empty when the folder is a single model."""
    index = model_index(path, revision)
    return {name for name, entry in index.items() if isinstance(entry, list) and entry[0]}


def load_process(path: str | Path, revision: str | None = None) -> tuple[Process, str]:
    """The noise process and prediction that a pipeline's scheduler config describes.

    Raises:
        UserError: there is no scheduler config or it is of an unknown kind.
    """
    config = read_json(path, "scheduler/scheduler_config.json", revision)
    if config is None:
        raise UserError(
            "The model folder has no scheduler config", given=str(path), fix="give process and prediction explicitly"
        )
    return from_scheduler(config)


def model_class(config: dict[str, Any]) -> Any:
    """The class that a config names by `_class_name` (transformers: or `architectures`): of OURS or of the libraries.

    Raises:
        UserError: neither library has it, nor this repository.
    """
    import diffusers
    import transformers

    name = config.get("_class_name") or next(iter(config.get("architectures") or []), "")
    if name.startswith(projections.OURS):
        return projections.Loader
    if name in OURS:
        return getattr(importlib.import_module(OURS[name]), name)
    for library in (diffusers, transformers):
        if name and hasattr(library, name):
            return getattr(library, name)
    raise UserError("Not a diffusers or transformers model", where="_class_name", given=name)


def load_model(
    path: str | Path,
    subfolder: str | None,
    revision: str | None = None,
    torch_dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> nn.Module:
    """A diffusers or transformers model of a folder or hub id, in eval mode, all parameters in `torch_dtype`.

    Where rank 0 reads for all processes, those of the others are on meta, see lightning_t2i/rank0.py.

    Raises:
        UserError: the component is missing.
    """
    config = read_json(path, f"{subfolder}/config.json" if subfolder else "config.json", revision)
    if config is None:
        known = [k for k, v in model_index(path, revision).items() if isinstance(v, list)]
        raise UserError("The pipeline has no such component", where=str(path), given=subfolder, allowed=known)
    if not rank0.reads():
        return rank0.without_weights(lambda: build_network(config)).to(torch_dtype).eval()
    cls = model_class(config)
    # transformers would keep the saved precision: both libraries are asked explicitly.
    dtype = {"torch_dtype": torch_dtype} if "_class_name" in config else {"dtype": torch_dtype}
    options = {"revision": revision, "variant": variant, "use_safetensors": True, **dtype}
    if subfolder:
        options["subfolder"] = subfolder
    return cls.from_pretrained(locate(path), **options)


def load_backbone(
    path: str | Path,
    subfolder: str | None = None,
    revision: str | None = None,
    torch_dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> nn.Module:
    """The denoising network of a pipeline; `subfolder` defaults to "unet" or "transformer", or to the folder itself.

    One that is told the size of its pictures gets an attribute `picture_factor`: pixels per latent position and side,
    by the autoencoder beside it. At the network it stays with copies and adapters, and is not saved.

    Raises:
        UserError: there is none.
    """
    if subfolder is None:
        index = model_index(path, revision)
        subfolder = next((name for name in BACKBONES if index.get(name, [None])[0]), None)
        if subfolder is None and index:
            raise UserError("The pipeline has no denoising network", where=str(path), allowed=BACKBONES)
    backbone = load_model(path, subfolder, revision, torch_dtype, variant)
    if is_told_size(backbone) and (vae := read_json(path, "vae/config.json", revision)):
        backbone.picture_factor = factor_of(vae)
    return backbone


def read_architecture(path: str | Path) -> dict[str, Any]:
    """A JSON architecture file.

    Raises:
        UserError: there is no such file.
    """
    file = resolve(path)
    if not file.is_file():
        raise UserError("No such architecture file", given=str(path), fix="see configs/networks")
    return json.loads(file.read_text(encoding="utf-8"))


def build_network(spec: str | Path | dict[str, Any], revision: str | None = None) -> nn.Module:
    """A network from an architecture file (random weights) or from a model folder or hub id (its weights, float32).

    Args:
        spec: a .json file or a dict with `_class_name` (of diffusers or transformers) and that class's config, or
            the folder or hub id of a single model. Under `torch.device("meta")` the first kind costs no memory.

    Raises:
        UserError: no such file or folder, or an unknown class.
    """
    if not isinstance(spec, dict) and not str(spec).endswith(".json"):
        return load_model(spec, None, revision)
    config = dict(spec) if isinstance(spec, dict) else read_architecture(spec)
    cls = model_class(config)
    if hasattr(cls, "from_config"):
        return cls.from_config(config)
    config.pop("_class_name", None)
    return cls(cls.config_class.from_dict(config))
