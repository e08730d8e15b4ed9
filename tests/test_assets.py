"""The shipped tiny pipelines: stock formats, their own score, and one picture for our sampler and the stock one."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from datamodules.image_text import ImageText
from lightning_modules.classifier import targets
from lightning_modules.diffusion import Diffusion
from lightning_t2i.batch import Records
from lightning_t2i.keys import Keys
from lightning_t2i.metrics.shapes_score import ShapesScore
from lightning_t2i.networks.classifier import ShapesClassifier
from lightning_t2i.networks.codec import LatentCodec
from lightning_t2i.networks.denoiser import Denoiser

TINY = Path(__file__).parent.parent / "assets/tiny"


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
    assert sum(f.stat().st_size for f in TINY.rglob("*") if f.is_file()) < 25e6
    assert not [f for f in TINY.rglob("*") if f.suffix in {".bin", ".pt", ".ckpt", ".pkl"}]


def test_no_config_tells_where_it_was_made():
    for file in TINY.rglob("*.json"):
        assert not json.loads(file.read_text()).get("_name_or_path"), file


def test_the_pipeline_holds_the_shipped_autoencoder():
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (TINY / "sd/vae" / name).read_bytes() == (TINY / "vae" / name).read_bytes()


def test_each_folder_says_how_it_was_made():
    for folder in ("vae", "classifier", "sd", "tokenizers"):
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


def teacher(**options) -> Diffusion:
    module = Diffusion(str(TINY / "sd"), **options)
    module.configure_model()
    return module.eval()


def test_stock_pipeline_gives_our_pictures():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(TINY / "sd", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    module, prompts = teacher(), ["a red circle", "two blue squares", "a green triangle above a yellow cross"]
    z = Keys(0).normal("z", torch.arange(3), (4, 8, 8))
    theirs = pipeline(prompts, latents=z, guidance_scale=3.0, num_inference_steps=25, output_type="pt").images
    ours = module.sample(
        module.condition(Records.of_prompts(prompts)), Keys(0), torch.arange(3), guidance=3.0, steps=25
    )
    torch.testing.assert_close((ours + 1) / 2, theirs, atol=1e-3, rtol=0)


def test_teacher_draws_what_it_is_asked(scenes):
    """A tenth of the full measurement in the card; the bound is three standard errors below its figure."""
    card = json.loads((TINY / "sd/score.json").read_text())
    module, n = teacher(guidance=card["guidance"]), 60
    records = scenes[0].slice(0, n)
    picture = module.sample(module.condition(records), Keys(0).fork("eval"), records.position)
    p = card["overall"]
    assert score([picture], [records]) > p - 3 * math.sqrt(p * (1 - p) / n)


def test_early_snapshot_is_worse_than_the_teacher():
    denoiser = Denoiser.from_pretrained(str(TINY / "sd"), subfolder="unet_early")
    module = teacher()
    stream = ImageText("shapes", split="val", batch_size=200, in_memory=True)
    stream.prepare()
    stream.setup()
    stream.begin(0, "val", shuffle=False)
    records = stream.load(range(200), 0)
    with torch.no_grad():
        cond = module.condition(records)
        losses = [float(module.loss(records, d, cond, Keys(0))) for d in (denoiser, module.denoiser)]
    assert losses[0] > losses[1]
