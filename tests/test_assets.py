"""The shipped tiny networks: stock formats, the figures of their cards, our sampler and the stock one agree."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from datamodules.image_text import ImageText
from datamodules.worlds.shapes_scenes import HELD_OUT, PAIRS
from lightning_modules.classifier import targets
from lightning_modules.diffusion import Diffusion
from lightning_t2i.batch import Cond, Records
from lightning_t2i.keys import Keys
from lightning_t2i.metrics.assets import SOLVERS, STEPS, STUDENTS, main, tokens
from lightning_t2i.metrics.shapes_detector import detect, to_pixels
from lightning_t2i.metrics.shapes_score import ShapesScore
from lightning_t2i.networks.classifier import ShapesClassifier
from lightning_t2i.networks.codec import LatentCodec
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.networks.perceptual import PerceptualNetwork
from lightning_t2i.pictures import to_pil
from lightning_t2i.processes import sample
from lightning_t2i.token_pipeline import TokenPipeline

TINY = Path(__file__).parent.parent / "assets/tiny"
PIPELINES = ("sd", "pixart", "flux", *STUDENTS, "ddpm", "edm")
MADE = (*STUDENTS, "fluid")  # by the methods; the others are what methods start from
DATA = ("pairs", "points", "statistics", "tokenizers")
FOLDERS = ("vae", "vq", "classifier", "perceptual", "clip", *PIPELINES, "fluid", *DATA)
TEACHERS = ("sd", "pixart", "flux")
PROMPTS = ["a red circle", "two blue squares", "a green triangle above a yellow cross"]


@pytest.fixture(scope="module")
def scenes():
    """400 test prompts with their ground-truth pictures, and where to score pictures for them."""
    stream = ImageText("shapes", split="test", batch_size=100, size=32, in_memory=True)
    stream.prepare()
    stream.setup()
    stream.begin(0, "test", shuffle=False)
    return [stream.load(range(k * 100, k * 100 + 100), k) for k in range(4)]


def score(pictures, scenes) -> float:
    metric = ShapesScore()
    for images, records in zip(pictures, scenes, strict=True):
        metric.update(images, records.scene)
    return float(metric.compute()["overall"])


def test_all_weights_are_small_fp16_safetensors():
    files = sorted(TINY.rglob("*.safetensors"))
    assert files
    for file in files:
        if file.parent.name == "statistics":  # sums over pictures, in float64
            continue
        with safe_open(file, "pt") as weights:
            dtypes = {weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118 (not a dict)
        assert dtypes <= {torch.float16, torch.int64}, file
    contents = {f.read_bytes(): f.relative_to(TINY).parts[0] for f in sorted(TINY.rglob("*")) if f.is_file()}
    sizes = [(len(content), folder in MADE) for content, folder in contents.items()]  # copies cost git nothing
    pieces = 21128 * 64 * 2  # the table of the Chinese vocabulary alone
    assert sum(size for size, made in sizes if not made) < 25e6 + pieces
    assert sum(size for size, _ in sizes) < 48e6
    assert not [f for f in TINY.rglob("*") if f.suffix in {".bin", ".pt", ".ckpt", ".pkl"}]


def test_no_config_tells_where_it_was_made():
    for file in TINY.rglob("*.json"):
        assert not json.loads(file.read_text()).get("_name_or_path"), file


@pytest.mark.parametrize("pipeline", ["sd", "pixart", "flux", *STUDENTS, "fluid"])
def test_a_pipeline_holds_the_shipped_autoencoder(pipeline):
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (TINY / pipeline / "vae" / name).read_bytes() == (TINY / "vae" / name).read_bytes()


def test_each_folder_says_how_it_was_made():
    for folder in FOLDERS:
        text = (TINY / folder / "README.md").read_text()
        for word in ("Rebuild", "Machine", "Licence"):
            assert word in text, (folder, word)


def test_autoencoder_keeps_what_the_detector_checks(scenes):
    codec = LatentCodec.from_pretrained(str(TINY / "vae"))
    with torch.no_grad():
        latents = [codec.encode(r.image) for r in scenes]
        pictures = [codec.decode(z).clamp(-1, 1) for z in latents]
    assert score(pictures, scenes) >= 0.97 * score([r.image for r in scenes], scenes)
    assert float(torch.cat(latents).std()) == pytest.approx(1, abs=0.1)


def test_classifier_reads_scenes(scenes):
    network = ShapesClassifier.from_pretrained(TINY / "classifier")
    right = 0
    for records in scenes:
        scores = network.classify(records.image)
        shape, colour, count = targets(records.scene)
        exact = (scores.shape.argmax(-1) == shape).all(1) & (scores.colour.argmax(-1) == colour).all(1)
        right += int((exact & (scores.count.argmax(-1) == count)).sum())
    assert right / 400 > 0.95


def test_discrete_tokens_keep_pictures_and_use_the_codebook():
    card, found = json.loads((TINY / "vq/score.json").read_text()), tokens("vq", TINY / "vq")
    assert found["usage"] >= 0.8
    for name in ("psnr_vq", "psnr_vae"):
        assert found[name] == pytest.approx(card[name], abs=0.3), name
    sizes = [
        sum(p.numel() for p in LatentCodec.from_pretrained(str(TINY / n)).vae.decoder.parameters())
        for n in ("vq", "vae")
    ]
    assert sizes[0] == sizes[1]


def test_perceptual_network_reads_scenes_and_is_not_the_metric(scenes):
    network = PerceptualNetwork.from_pretrained(TINY / "perceptual")
    x = scenes[0].image
    shape, colour, _ = targets(scenes[0].scene)
    scores = network.classify(x)
    assert float((scores.shape.argmax(-1) == shape).float().mean()) > 0.95
    assert float((scores.colour.argmax(-1) == colour).float().mean()) > 0.95
    assert network.identity != ShapesClassifier.from_pretrained(TINY / "classifier").identity
    near, far = network(x, x + 0.05 * torch.randn_like(x)), network(x, x.roll(1, 0))
    assert float((near < far).float().mean()) > 0.95


@pytest.mark.parametrize("language", ["en", "zh"])
def test_clip_tells_pictures_apart(language):
    from transformers import AutoProcessor, CLIPModel

    card = json.loads((TINY / "clip/score.json").read_text())
    stream = ImageText("shapes", split="test", batch_size=100, in_memory=True, languages=[language])
    stream.prepare()
    stream.setup()
    stream.begin(0, "test", shuffle=False)
    records = stream.load(range(100), 0)
    model = CLIPModel.from_pretrained(TINY / "clip", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(TINY / "clip", use_fast=False)
    pictures = to_pil(records.image)
    with torch.no_grad():
        out = model(**processor(images=pictures, text=records.caption, return_tensors="pt", padding=True))
    recall = float((out.logits_per_image.argmax(1) == torch.arange(100)).float().mean())
    assert recall == pytest.approx(card[f"recall@1,n=100,{language}"], abs=0.03)
    assert recall > 0.1  # chance is 0.01


def teacher(name: str, **options) -> Diffusion:
    module = Diffusion(str(TINY / name), **{"size": 32, **options})
    module.configure_model()
    return module.eval()


def stock(name: str):
    """The pipeline's own class, and what it is called with to draw our pictures."""
    import diffusers

    cls, options = {
        "sd": (diffusers.StableDiffusionPipeline, {"guidance_scale": 3.0}),
        **dict.fromkeys(STUDENTS, (diffusers.StableDiffusionPipeline, {"guidance_scale": 1.0})),
        "pixart": (
            diffusers.PixArtAlphaPipeline,
            {"guidance_scale": 3.0, "use_resolution_binning": False, "clean_caption": False, "height": 32, "width": 32},
        ),
        "flux": (
            diffusers.FluxPipeline,
            {"true_cfg_scale": 3.0, "negative_prompt": [""] * 3, "max_sequence_length": 32, "height": 32, "width": 32},
        ),
    }[name]
    pipeline = cls.from_pretrained(TINY / name, dtype=torch.float32, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, options


@pytest.mark.parametrize(("name", "steps"), [*((name, 25) for name in TEACHERS), *((name, 1) for name in STUDENTS)])
def test_stock_pipeline_gives_our_pictures(name, steps):
    pipeline, options = stock(name)
    module, guidance = teacher(name, solver=SOLVERS[name]), 1.0 if name in STUDENTS else 3.0
    z = Keys(0).normal("z", torch.arange(3), (4, 8, 8))
    theirs = pipeline(
        PROMPTS,
        latents=pipeline._pack_latents(z, 3, 4, 8, 8) if name == "flux" else z,
        num_inference_steps=steps,
        output_type="pt",
        **options,
    ).images
    ours = module.sample(
        module.condition(Records.of_prompts(PROMPTS)), Keys(0), torch.arange(3), guidance=guidance, steps=steps
    )
    torch.testing.assert_close((ours + 1) / 2, theirs, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", [*TEACHERS, *STUDENTS])
def test_pipeline_draws_what_it_is_asked(scenes, name):
    """A tenth of the full measurement in the card; the bound is three standard errors below its figure."""
    card = json.loads((TINY / name / "score.json").read_text())
    module, n = teacher(name, guidance=card["guidance"], solver=SOLVERS[name], steps=STEPS.get(name, 25)), 60
    records = scenes[0].slice(0, n)
    picture = module.sample(module.condition(records), Keys(0).fork("eval"), records.position)
    p = card["overall"]
    assert score([picture], [records]) > p - 3 * math.sqrt(p * (1 - p) / n)


def test_tokens_draw_what_they_are_asked(scenes):
    """As above."""
    pipeline, n = TokenPipeline.from_pretrained(TINY / "fluid"), 60
    p = json.loads((TINY / "fluid/score.json").read_text())
    records, overall = scenes[0].slice(0, n), p["overall"]
    assert pipeline.sampling.guidance == p["guidance"]
    picture = pipeline.sample(pipeline.condition(records), Keys(0).fork("eval"), records.position)
    assert score([picture], [records]) > overall - 3 * math.sqrt(overall * (1 - overall) / n)


def pixels(name: str, z: torch.Tensor, labels: torch.Tensor | None, steps: int, solver: str) -> torch.Tensor:
    """Pictures [B, 3, 32, 32] in [0, 1] of a pipeline without text."""
    denoiser = Denoiser.from_pretrained(str(TINY / name))
    cond = None if labels is None else Cond(label=labels, null_label=denoiser.classes)
    return (sample(denoiser, z, cond, steps, 1.0, solver).clamp(-1, 1) + 1) / 2


def test_stock_ddpm_gives_our_pictures():
    from diffusers import DDIMPipeline

    pipeline = DDIMPipeline.from_pretrained(TINY / "ddpm", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    draw = {"num_inference_steps": 10, "use_clipped_model_output": True, "output_type": "np"}
    theirs = pipeline(2, torch.Generator().manual_seed(3), **draw).images
    z = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    ours = pixels("ddpm", z, None, 10, "ddim")
    assert pipeline.scheduler.config.clip_sample
    torch.testing.assert_close(ours, torch.from_numpy(theirs).permute(0, 3, 1, 2), atol=2e-3, rtol=0)


def test_stock_edm_gives_our_pictures():
    from diffusers import ConsistencyModelPipeline

    pipeline = ConsistencyModelPipeline.from_pretrained(TINY / "edm", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    z, labels = Keys(0).normal("z", torch.arange(2), (3, 32, 32)), torch.tensor([3, 7])
    theirs = pipeline(2, labels, num_inference_steps=10, latents=z, output_type="pt").images
    # diffusers starts from z sqrt(sigma_max^2 + 1), this repository from z sigma_max: 8e-5 apart.
    torch.testing.assert_close(pixels("edm", z, labels, 10, "euler"), theirs, atol=5e-3, rtol=0)


@pytest.mark.parametrize(("name", "figure"), [("ddpm", "scenes"), ("edm", "scenes"), ("edm", "pairs")])
def test_pixel_models_draw_scenes(name, figure):
    """A small part of the full measurement in the card; the bound is three standard errors below its figure."""
    p, n = json.loads((TINY / name / "score.json").read_text())[figure], 40
    z, known = Keys(0).normal("z", torch.arange(n), (3, 32, 32)), [i for i, p in enumerate(PAIRS) if p not in HELD_OUT]
    labels = torch.tensor(known)[torch.arange(n) % len(known)] if name == "edm" else None
    drawn = pixels(name, z, labels, STEPS[name], SOLVERS[name]) * 2 - 1
    found = [detect(picture) for picture in to_pixels(drawn)]
    if figure == "scenes":
        right = [1 <= len(objects) <= 3 for objects in found]
    else:
        seen = [{(o["shape"], o["colour"]) for o in objects} for objects in found]
        right = [PAIRS[int(label)] in objects for label, objects in zip(labels, seen, strict=True)]
    assert sum(right) / n > p - 3 * math.sqrt(p * (1 - p) / n)


def test_early_snapshot_is_worse_than_the_teacher():
    denoiser = Denoiser.from_pretrained(str(TINY / "sd"), subfolder="unet_early")
    module = teacher("sd")
    stream = ImageText("shapes", split="val", batch_size=200, in_memory=True)
    stream.prepare()
    stream.setup()
    stream.begin(0, "val", shuffle=False)
    records = stream.load(range(200), 0)
    with torch.no_grad():
        cond = module.condition(records)
        losses = [float(module.loss(records, d, cond, Keys(0))) for d in (denoiser, module.denoiser)]
    assert losses[0] > losses[1]


def test_unknown_networks_are_refused(capsys):
    assert main(["sdd"]) == 2
    assert "No such network is measured" in capsys.readouterr().err
