"""A hub id is read at the revision that was given, wherever a method or a stream reads it.

The cache knows one revision of each repository and not `main`, and there is no network: what asks for another fails.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from data_sets import write_data_set
from huggingface_hub import constants
from wukong_parts import text_file

from datamodules.pairs import Pairs
from datamodules.text_cache import TextCache, encode_texts, text_folder
from lightning_modules import instaflow
from lightning_modules.deme import DeMe
from lightning_modules.diffusion import Diffusion
from lightning_modules.dmd import DMD
from lightning_modules.dmd2 import DMD2
from lightning_modules.ecad import ECAD
from lightning_modules.fluid import Fluid
from lightning_modules.swiftbrush import SwiftBrush
from lightning_modules.swiftbrush_v2 import SwiftBrushV2
from lightning_modules.teacher import Teacher
from lightning_modules.wukong import Wukong
from lightning_t2i.errors import UserError
from lightning_t2i.networks.chinese_tokenizer import VOCABULARY
from lightning_t2i.paths import ROOT
from lightning_t2i.token_sampling import Sampling

# diffusers gives the argument
pytestmark = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument is deprecated")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SD, PIXART, PARTS, FLUID, CLIP = (f"owner/{name}" for name in ("sd", "pixart", "parts", "fluid", "clip"))
WORDS = "owner/words"


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: Any) -> None:
    """Folders of assets as repositories whose branch v1 was fetched."""
    for source in (SD, PIXART, PARTS, FLUID, CLIP, WORDS):
        name = source.removeprefix("owner/")
        place = tmp_path / "hub" / f"models--owner--{name}"
        for folder in ("refs", "snapshots"):
            (place / folder).mkdir(parents=True)
        (place / "refs" / "v1").write_text(COMMIT)
        tiny = ROOT / "assets" / "tiny" / name.replace("parts", "pixart")
        (place / "snapshots" / COMMIT).symlink_to(ROOT / VOCABULARY if source == WORDS else tiny)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def pinned(kind: Any, source: str, **options: Any) -> Callable[..., Any]:
    """A method whose further hub ids are read at v1."""
    own = {f"{name}_revision": "v1" for name, value in options.items() if str(value).startswith("owner/")}
    return partial(kind, source, **options, **own)


METHODS: dict[str, Callable[..., Any]] = {
    "Diffusion": partial(Diffusion, SD),
    "Diffusion-parts": partial(Diffusion, SD, codec=PIXART, text=PIXART),
    "Teacher": partial(Teacher, SD),
    "SwiftBrush": partial(SwiftBrush, SD),
    "DMD": partial(DMD, SD),
    "DMD2": partial(DMD2, SD),
    "Reflow": partial(instaflow.Reflow, SD),
    "OneStep": partial(instaflow.OneStep, SD),
    "DeMe": partial(DeMe, PIXART),
    "DeMe-backbone": partial(DeMe, PIXART, backbone=PIXART),
    "ECAD": partial(ECAD, PIXART),
    "ECAD-parts": partial(ECAD, PIXART, parts=PARTS),
    "SwiftBrushV2": pinned(SwiftBrushV2, SD, student_from=SD, student_rank=2, clip=CLIP, decoder=SD),
    "Fluid": pinned(Fluid, FLUID, codec=SD, text=PIXART, head="flow", patch=2, size=32, sampling=Sampling(16)),
    "Wukong": pinned(Wukong, CLIP, tokenizer=WORDS),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_read_hub_ids_at_their_revision(tmp_path: Path, name: str) -> None:
    given = {"text": text_file(tmp_path)} if name == "Wukong" else {}
    method = METHODS[name](**given, revision="v1")
    method.configure_model()
    identities = [one for one in method.frozen_identities.values() if "owner/" in one]
    assert identities and all(one.count("@v1") == one.count("owner/") for one in identities)
    with pytest.raises(UserError, match="not in the local cache"):
        METHODS[name](**given).configure_model()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("SwiftBrushV2", "student_from"), ("SwiftBrushV2", "clip"), ("SwiftBrushV2", "decoder"), ("Fluid", "codec"),
        ("Fluid", "text"), ("Wukong", "tokenizer"),
    ],
)  # fmt: skip
def test_each_further_hub_id_has_a_revision_of_its_own(tmp_path: Path, name: str, part: str) -> None:
    given = {"text": text_file(tmp_path)} if name == "Wukong" else {}
    with pytest.raises(UserError, match="not in the local cache"):
        METHODS[name](**given, revision="v1", **{f"{part}_revision": None}).configure_model()


def test_an_architecture_file_has_no_revision() -> None:
    with pytest.raises(UserError, match="codec_revision"):
        Fluid("configs/networks/fluid_166m.json", codec=SD, text=PIXART, revision="v1")


@pytest.mark.parametrize("kind", [instaflow.Reflow, DMD])
def test_pairs_are_compared_with_the_teacher_at_its_revision(monkeypatch: Any, kind: Any) -> None:
    asked: list[Any] = []

    def compared(pairs: Any, recipe: Callable[[], dict[str, Any]], *rest: Any) -> None:
        asked.append(recipe()["teacher"])

    monkeypatch.setattr(sys.modules[kind.__module__], "refuse_foreign_pairs", compared)
    streams = dict.fromkeys(("main", "pairs"), SimpleNamespace(batch_size=1))
    trainer = SimpleNamespace(datamodule=SimpleNamespace(training=streams), world_size=1)
    monkeypatch.setattr(kind, "trainer", trainer)
    method = kind(SD, revision="v1")
    method.configure_model()
    method.on_fit_start()
    assert asked == [f"{SD}@v1"]


def test_streams_of_pairs_want_the_teacher_at_its_revision() -> None:
    for revision, wanted in (("v1", f"{SD}@v1"), (None, f"{SD}@main")):
        with pytest.raises(UserError) as error:
            Pairs("assets/tiny/pairs", teacher=SD, revision=revision).prepare()
        assert wanted in str(error.value)


def test_embeddings_are_those_of_the_encoder_at_its_revision(tmp_path: Path) -> None:
    folder = write_data_set(tmp_path / "toy", 4)
    made = encode_texts(folder, "train", TextCache(PIXART, revision="v1"), ["en"])
    assert made == text_folder(folder, TextCache(PIXART, revision="v1"), ["en"]) and "owner--pixart-v1" in made.name
    with pytest.raises(UserError, match="not in the local cache"):
        encode_texts(folder, "train", TextCache(PIXART), ["en"])
