"""`train.py check --fetch`: brings the hub files that a config names into the local cache, at their revisions.

Run it where there is a network; with HF_HUB_OFFLINE=1 the training then finds them in the same cache (HF_HOME). The
cache records at which commit a branch was, and offline the branch stays there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from lightning_t2i.errors import UserError
from lightning_t2i.paths import may_be_hub_id, resolve

Source: TypeAlias = tuple[str, str]  # hub id, revision
Cache: TypeAlias = dict[Source, Path | None]  # folder in the local cache, named by its commit; None: not there

NAMES = ("teacher", "network", "base", "backbone", "parts", "codec", "image", "text", "tokenizer", "student_from",
         "latents", "clip", "decoder", "encoder")  # keys that may hold a hub id  # fmt: skip
ALONE = ("student_from", "clip", "decoder")  # keys that a `revision` beside them does not mean
FILES = (".json", ".safetensors")
# What is read here: configs, tokenizers and safetensors of the components; a pipeline's root also holds single files of
# all its weights, and its components hold copies in other formats.
WANTED = ["*.json", "*.txt", "*.model", "*/*.safetensors", "model*.safetensors", "diffusion_pytorch_model*.safetensors"]
UNWANTED = ["*.fp16.*", "*.non_ema.*", "*flax*", "*openvino*", "*onnx*", "safety_checker/*"]


def is_hub_id(text: Any) -> bool:
    """Whether a value of a config means a repository of the hub: owner/name, no folder of ours."""
    if not isinstance(text, str) or not may_be_hub_id(text):
        return False
    return not text.endswith(FILES) and not resolve(text).exists()


def hub_sources(config: Mapping[str, Any]) -> set[Source]:
    """The hub ids in a resolved config with their revisions, "main" where there is none."""
    found: set[Source] = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= hub_sources(value)
        elif key in NAMES and is_hub_id(value):
            alone = key in ALONE or (key == "tokenizer" and "image" in config)  # Wukong's `revision` is its tower's
            given = config.get(f"{key}_revision", None if alone else config.get("revision"))
            found.add((value, given or "main"))
    return found


def cached(source: Source) -> Path | None:
    """The folder of the local cache that holds all that is wanted, named by its commit; None when there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, revision = source
    patterns = {"allow_patterns": WANTED, "ignore_patterns": UNWANTED}
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True, **patterns))
    except LocalEntryNotFoundError:
        return None


def fetch(sources: Iterable[Source]) -> Cache:
    """Downloads what is missing of each source; returns their folders in the cache, named by the commit.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    folders: Cache = {}
    for name, revision in sorted(sources):
        patterns = {"allow_patterns": WANTED, "ignore_patterns": UNWANTED}
        try:
            folder = huggingface_hub.snapshot_download(name, revision=revision, **patterns)
        except LocalEntryNotFoundError as error:
            what, fix = (
                "The hub cannot be reached and the cache is not complete",
                "run it on a machine with access",
            )
            raise UserError(what, where="--fetch", given=f"{name} at {revision}", fix=fix) from error
        except (HfHubHTTPError, OSError) as error:
            what = "The hub refuses this model: wrong id or revision, withdrawn, private or gated"
            fix = "check the id and accept its licence with your account (hf auth login)"
            raise UserError(what, where="--fetch", given=f"{name} at {revision}", fix=fix) from error
        folders[name, revision] = Path(folder)
    return folders
