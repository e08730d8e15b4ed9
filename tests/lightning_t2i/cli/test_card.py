"""Model cards: the head is YAML, the snippet runs, the figures are those of the run, and nothing is made up."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_networks
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from lightning_modules.diffusion import Diffusion
from lightning_modules.tokenizer import Tokenizer
from lightning_t2i.cli.card import RunFacts, front_matter, write_card, write_edm_card
from lightning_t2i.cli.main import main
from lightning_t2i.cli.origins import bases_of, data_rows, licence_of, public, recipe_of
from lightning_t2i.cli.stock import read_stock
from lightning_t2i.networks.classifier import ShapesClassifier
from lightning_t2i.networks.load import build_network
from lightning_t2i.networks.perceptual import PerceptualNetwork
from lightning_t2i.paths import ROOT
from lightning_t2i.pictures import save_png
from lightning_t2i.processes.edm import EDM
from lightning_t2i.processes.schedulers import to_scheduler
from lightning_t2i.state_io import AtomicCheckpointIO, newest

CHECKPOINT = {
    "t2i": {"counters": {"step": 20, "samples": 160}, "seed": 3},
    "callbacks": {"Record": {"seconds": 3725.0}},
}
SAMPLING = {"steps": 2, "guidance": 3.0, "embedded_guidance": None}


def head_of(card: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, flags=re.S)[1])


def snippet_of(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, flags=re.S)[1]


def section(card: str, title: str) -> str:
    return card.partition(f"## {title}\n")[2].partition("\n## ")[0]


def execute(snippet: str, folder: Path, monkeypatch) -> dict:
    """Runs a snippet in its folder and returns its names."""
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(snippet, names)
    return names


# ---- folders -------------------------------------------------------------------------------------------------------


def pipeline(folder: Path, kind: str, name: str, **options) -> Path:
    """A pipeline folder with random weights under the name of its stock class."""
    import diffusers

    ddim = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler() if kind == "flux" else ddim
    tiny_networks.pipeline_folder(folder, kind, scheduler)
    tiny_networks.autoencoder(shift_factor=0.0).save_pretrained(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": name, **options}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def pixel_pipeline(folder: Path, name: str, classes: int | None) -> Path:
    """A pipeline without text or autoencoder."""
    import diffusers

    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    unet = build_network(
        {"_class_name": "UNet2DModel", "sample_size": 8, **blocks, "norm_num_groups": 4, "layers_per_block": 1}
        | {"attention_head_dim": 4, "num_class_embeds": classes}
    )
    scheduler = diffusers.CMStochasticIterativeScheduler() if classes else diffusers.DDIMScheduler()
    getattr(diffusers, name)(unet=unet, scheduler=scheduler).save_pretrained(folder)
    return folder


NO_CHECKER = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
PIPELINES = {
    "StableDiffusionPipeline": ("unet_text", NO_CHECKER),
    "StableDiffusionXLPipeline": ("unet_xl", {"force_zeros_for_empty_prompt": True}),
    "PixArtAlphaPipeline": ("pixart", {}),
    "FluxPipeline": ("flux", {}),
}


def vq() -> torch.nn.Module:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"block_out_channels": [8, 8], "norm_num_groups": 4, "num_vq_embeddings": 16, "vq_embed_dim": 4}
    return build_network({"_class_name": "VQModel", **blocks, **sizes, "latent_channels": 4})


def edm(folder: Path) -> None:
    sizes = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "num_classes": 10, "channels": 8, "blocks": 1}
    build_network({"_class_name": "SongUNet", **sizes, "channel_mult": [1, 1], "attention_sizes": []}).save_pretrained(
        folder
    )
    to_scheduler(EDM(), "edm", 0.5).save_pretrained(folder / "scheduler")


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder as a training of 40 steps leaves it."""
    folder = tmp_path / "runs" / "red-squares"
    (folder / "samples").mkdir(parents=True)
    save_png(Image.new("RGB", (4, 4)), folder / "samples" / "step-00000016.png", prompts="two red squares\nx")
    save_png(Image.new("RGB", (8, 8)), folder / "samples" / "step-00000040.png", prompts="y")
    base = pipeline(tmp_path / "base", "unet_text", "StableDiffusionPipeline")
    (base / "README.md").write_text("# Base\n\n- Licence: Apache-2.0; the data are CC0.\n")
    data = tmp_path / "mine"
    data.mkdir()
    facts = {"name": "mine", "splits": {"train": 12345}, "licence": "CC BY 4.0"}
    (data / "dataset.json").write_text(json.dumps(facts))
    stream = {"source": str(data), "split": "train", "languages": ["en", "zh"]}
    config = {
        "model": {
            "class_path": "lightning_modules.diffusion.Diffusion",
            "init_args": {"network": str(base), "codec": str(base), "prediction": "eps"},
        },
        "data": {"init_args": {"main": {"init_args": stream}, "val": {"init_args": stream}, "workers": 0}},
        "trainer": {"max_steps": 40},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {
        "versions": {"torch": "9.9", "peft": "absent"},
        "git": {"commit": "abc123", "changed": [" M x"]},
        "hardware": {"cpus": 2, "gpus": []},
        "starts": [{"command": "train.py fit --config no/such.yaml", "step": 0}],
    }
    (folder / "env.json").write_text(json.dumps(environment))
    lines = [
        {"step": 10, "samples": 80, "time": 1.0, "denoiser/loss": 0.5, "val/loss": 0.9},
        {"step": 20, "samples": 160, "time": 2.0, "val/loss": 0.123456789, "eval/fd@n=400,ref=mine-val:1000": 7.25},
        {"step": 20, "samples": 160, "time": 2.0, "eval/seconds": 1.5},
        {"step": 40, "samples": 320, "time": 3.0, "val/loss": 0.777},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tests = [{"step": 10, "test/loss": 0.31}, {"step": 20, "test/loss": 0.32}]
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in tests))
    return folder


def carded(out: Path, run: Path, method: type = Diffusion, changes: dict | None = None) -> str:
    facts = RunFacts.of(run, method.__new__(method), CHECKPOINT, changes)
    return write_card(out, facts, SAMPLING).read_text()


# ---- what a card says ----------------------------------------------------------------------------------------------


def test_the_figures_are_those_of_the_run_at_the_checkpoint(run, tmp_path) -> None:
    out = pipeline(tmp_path / "out", "unet_text", "StableDiffusionPipeline", **NO_CHECKER)
    card = carded(out, run)
    head = head_of(card)
    assert head["license"] == "apache-2.0" and head["library_name"] == "diffusers"
    assert head["base_model"] == ["base"] and head["language"] == ["en", "zh"]
    assert head["pipeline_tag"] == "text-to-image" and {"diffusion", "arxiv:2112.10752"} <= set(head["tags"])
    assert "Licence: that of the base network, Apache-2.0. The data" in card
    assert "[2303.09556](https://arxiv.org/abs/2303.09556)" in card
    parameters = sum(p.numel() for p in tiny_networks.backbone("unet_text").parameters())
    assert f"| unet | `UNet2DConditionModel` | {parameters:,} | float32 |" in section(card, "Networks")
    bases = section(card, "Base networks")
    assert "| codec, network | `base` | `sha256:" in bases and "Apache-2.0; the data are CC0 |" in bases
    assert "| main | mine | train | 12,345 | en, zh | CC BY 4.0 |" in section(card, "Data")
    training = section(card, "Training")
    for row in ("training steps | 20", "samples | 160", "wall time | 1 h 2 min 5 s", "seed | 3", "2 CPU cores"):
        assert row in training
    assert "abc123 with changes" in training and "torch 9.9 |" in training and "recipe" not in training
    scores = section(card, "Scores")
    assert "| `val/loss` | 0.12346 | 20 | metrics.jsonl |" in scores
    assert "| `eval/fd@n=400,ref=mine-val:1000` | 7.25 | 20 | metrics.jsonl |" in scores
    assert "| `test/loss` | 0.32 | 20 | test.jsonl |" in scores
    assert "0.777" not in card and "0.31" not in card and "seconds" not in card and "denoiser/loss" not in card
    assert "20 of 40 training steps" in section(card, "Limits")
    with Image.open(out / "samples.png") as grid:
        assert grid.size == (4, 4)  # not the one from after the checkpoint
    assert "prompt='two red squares'," in snippet_of(card)
    assert str(tmp_path) not in card and str(ROOT) not in card


def test_scores_are_those_of_the_exported_average_and_sampling(run, tmp_path) -> None:
    """A sweep over the guidance, and another average, leave their scores in the same files under the same names."""
    swept = [({}, 0.5), ({"model.init_args.guidance": 6.0}, 0.6), ({"--ema": "0.9"}, 0.7)]
    lines = [{"step": 20, "eval/x@n=4": x, **({"with": changes} if changes else {})} for changes, x in swept]
    (run / "validate.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for changes, score in swept:
        out = pipeline(tmp_path / f"out-{score}", "unet_text", "StableDiffusionPipeline", **NO_CHECKER)
        card = carded(out, run, changes=changes)
        scores, training = section(card, "Scores"), section(card, "Training")
        assert f"| `eval/x@n=4` | {score} | 20 | validate.jsonl |" in scores and scores.count("eval/x@n=4") == 1
        assert ("metrics.jsonl" in scores) == ("test.jsonl" in scores) == (not changes)  # those of the default alone
        assert ("exported with" in training) == bool(changes)
    assert "exported with | `--ema` 0.9" in training
    card = carded(out, run, changes={"model.init_args.text": str(tmp_path / "text")})
    assert "exported with | `model.init_args.text` text" in card and str(tmp_path) not in card


def test_what_the_run_folder_lacks_is_left_out(tmp_path) -> None:
    out = tmp_path / "out"
    vq().save_pretrained(out)
    run = tmp_path / "runs" / "bare"
    run.mkdir(parents=True)
    card = carded(out, run, Tokenizer)
    assert head_of(card)["license"] == "unknown" and "unknown: check" in card
    assert "base_model" not in head_of(card) and "pipeline_tag" not in head_of(card)
    titles = re.findall(r"^## (.+)$", card, flags=re.M)
    assert titles == ["Use", "Networks", "Training", "Limits"]
    assert "None" not in card and "commit" not in card and "samples.png" not in card
    assert "No scores were recorded" in card and not (out / "samples.png").exists()


# ---- what it says is so --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_snippet_of_a_text_pipeline_makes_a_picture(name, tmp_path, monkeypatch) -> None:
    kind, options = PIPELINES[name]
    stock = read_stock(pipeline(tmp_path / "out", kind, name, **options), SAMPLING | {"embedded_guidance": 2.0})
    assert (stock.kind, stock.library, stock.task) == (name, "diffusers", "text-to-image")
    image = execute(stock.snippet, tmp_path / "out", monkeypatch)["image"]
    assert image.size == ((32, 32) if name == "FluxPipeline" else (16, 16))
    told = "true_cfg_scale=3.0, guidance_scale=2.0" if name == "FluxPipeline" else "guidance_scale=3.0"
    assert told in stock.snippet


@pytest.mark.parametrize(("name", "classes"), [("DDIMPipeline", None), ("ConsistencyModelPipeline", 4)])
def test_snippet_of_a_pipeline_on_pixels_makes_a_picture(name, classes, tmp_path, monkeypatch) -> None:
    stock = read_stock(pixel_pipeline(tmp_path, name, classes), SAMPLING)
    assert (stock.kind, stock.task) == (name, "unconditional-image-generation")
    assert execute(stock.snippet, tmp_path, monkeypatch)["image"].size == (8, 8)
    assert ("class_labels=0" in stock.snippet) == bool(classes) and "prompt" not in stock.snippet


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel", "ShapesClassifier", "PerceptualNetwork", "SongUNet"])
def test_snippet_of_a_network_calls_it(kind, tmp_path, monkeypatch) -> None:
    makers = {"AutoencoderKL": tiny_networks.autoencoder, "VQModel": vq}
    makers |= {"ShapesClassifier": ShapesClassifier, "PerceptualNetwork": PerceptualNetwork}
    if kind == "SongUNet":
        edm(tmp_path)
        write_edm_card(tmp_path, Path("edm-small.pkl"), "CC BY-NC-SA 4.0")
        card = (tmp_path / "README.md").read_text()
        assert head_of(card)["license"] == "cc-by-nc-sa-4.0" and "CC BY-NC-SA 4.0" in card
        snippet = snippet_of(card)
    else:
        makers[kind]().save_pretrained(tmp_path)
        snippet = read_stock(tmp_path).snippet
    names = execute(snippet, tmp_path, monkeypatch)
    shapes = {"ShapesClassifier": ("features", (1, 80)), "PerceptualNetwork": ("distance", (1,))}
    shapes["SongUNet"] = ("x0", (1, 3, 8, 8))
    name, shape = shapes.get(kind, ("again", (1, 3, 32, 32)))
    assert names[name].shape == shape


def test_licences_are_read_and_never_guessed(tmp_path) -> None:
    assert licence_of("black-forest-labs/FLUX.1-dev").startswith("FLUX.1 [dev]")
    assert licence_of("someone/something") == "unknown: check"
    cases = {
        "": "unknown: check",
        "# A\n\n- Licence: CC0-1.0.\n": "CC0-1.0",
        "---\nlicense: mit\n---\n# A\n": "mit",
        "---\nlicense: unknown\n---\nLicence: x\n": "unknown: check",
        "---\nlicense: other\nlicense_name: mine\n---\n": "mine",
    }
    for text, licence in cases.items():
        (tmp_path / "README.md").write_text(text)
        assert licence_of(str(tmp_path)) == licence
    stock = SimpleNamespace(library="diffusers", task="")
    for licence, hub, name in (
        ("CreativeML OpenRAIL-M", "creativeml-openrail-m", None),
        ("FLUX.1 [dev] Non-Commercial License", "other", "flux-1-dev-non-commercial-license"),
        ("Apache-2.0 for the code; weights differ", "other", "apache-2-0-for-the-code-weights-differ"),
        ("unknown: check", "unknown", None),
    ):
        head = head_of(front_matter(stock, licence) + "\n")
        assert (head["license"], head.get("license_name")) == (hub, name)


def test_bases_are_folders_and_hub_ids(tmp_path) -> None:
    arguments = {"network": "org/net", "codec": "assets/tiny/vae", "text": "configs/networks/tiny_clip_text.json"}
    arguments |= {"tokenizer": "assets/tiny/tokenizers/clip", "prediction": "eps", "revision": "abc", "size": 3}
    bases = {base.source: base for base in bases_of(arguments)}
    assert set(bases) == {"org/net", "assets/tiny/vae"}
    assert bases["org/net"].identity == "org/net@abc" and bases["org/net"].is_start
    assert not bases["assets/tiny/vae"].is_start and bases["assets/tiny/vae"].identity.startswith("sha256:")


def test_data_without_a_licence_is_marked(tmp_path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({"name": "mine", "splits": {}, "licence": "unknown"}))
    (tmp_path / "words.txt").write_text("a\n")
    sources = {"main": str(tmp_path), "pairs": str(tmp_path / "words.txt")}
    config = {"data": {"init_args": {k: {"init_args": {"source": v}} for k, v in sources.items()}}}
    rows = list(data_rows(config))
    assert [(row[1], row[-1]) for row in rows] == [("mine", "unknown: check"), ("words", "unknown: check")]


def test_differences_from_the_recipe(capsys) -> None:
    recipe = "configs/diffusion/tiny.yaml"
    words = ["--config", recipe, "--model.guidance", "2.0", "--trainer.max_steps", "7"]
    assert main(["fit", *words, "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    start = {"command": " ".join(["train.py", "fit", *words])}
    assert recipe_of({"starts": [start]}, config) == (
        f"`{recipe}`",
        ["`model.init_args.guidance`: 3.0 -> 2.0", "`trainer.max_steps`: 8000 -> 7"],
    )
    resumed = {"command": "train.py fit --run diffusion-tiny"}
    assert recipe_of({"starts": [start, resumed]}, config) == recipe_of({"starts": [start]}, config)
    assert recipe_of({"starts": [{"command": "pytest x"}]}, config) is None
    assert recipe_of({}, config) is None


def test_paths_of_the_machine_are_cut(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = public({"a": str(ROOT / "assets" / "x"), "b": [str(tmp_path / "y" / "z")], "c": "/srv/data/set", "d": 3})
    assert found == {"a": "assets/x", "b": ["y/z"], "c": "set", "d": 3} and public("org/name") == "org/name"


# ---- the command ---------------------------------------------------------------------------------------------------


def test_export_writes_the_card_of_a_run(tmp_path, monkeypatch) -> None:
    """A run of the command, exported by the command."""
    monkeypatch.setenv("LIGHTNING_T2I_RUNS", str(tmp_path / "runs"))
    tiny_networks.autoencoder().save_pretrained(tmp_path / "vae")
    config = {
        "model": {
            "class_path": "lightning_modules.tokenizer.Tokenizer",
            "init_args": {"network": str(tmp_path / "vae")},
        },
        "data": {"class_path": "pictures.Pictures"},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 4, "val_check_interval": 2},
        "throughput": {"enabled": False},
        "checkpoints": {"every": 2},
        "tracking": {"wandb": "off"},
    }
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(config))
    words = ["fit", "--config", str(file), "--model.kl_weight", "0.5"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    assert main(words) == 0
    assert main(["export", str(tmp_path / "out"), "--run", "mine"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert head_of(card)["base_model"] == ["vae"] and head_of(card)["license"] == "unknown"
    training = section(card, "Training")
    assert "training steps | 4 |" in training and "samples | 16 |" in training and "wall time | 0 h 0 min" in training
    assert "recipe | `mine.yaml`" in training and "- `model.init_args.kl_weight`: 1e-06 -> 0.5" in training
    logged = [json.loads(x) for x in (tmp_path / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()]
    psnr = [line["val/psnr"] for line in logged if "val/psnr" in line][-1]
    assert f"| `val/psnr` | {psnr:.5g} | 4 | metrics.jsonl |" in card
    assert (tmp_path / "out" / "samples.png").is_file()
    assert str(tmp_path) not in card
    assert execute(snippet_of(card), tmp_path / "out", monkeypatch)["again"].shape == (1, 3, 32, 32)


def test_a_run_in_bf16_exports_its_float32_weights(tmp_path, monkeypatch) -> None:
    """Under FSDP2 it trains in bf16; the command that exports it has no strategy."""
    monkeypatch.setenv("LIGHTNING_T2I_RUNS", str(tmp_path / "runs"))
    tiny_networks.autoencoder().save_pretrained(tmp_path / "vae")
    strategy = {"class_path": "lightning_t2i.strategies.FSDP2", "init_args": {"replicate": 1, "shard": 1}}
    config = {
        "model": {
            "class_path": "lightning_modules.tokenizer.Tokenizer",
            "init_args": {"network": str(tmp_path / "vae"), "common": {"precision": "bf16"}},
        },
        "data": {"class_path": "pictures.Pictures"},
        "trainer": {
            "accelerator": "cpu", "devices": 1, "max_steps": 2, "strategy": strategy, "limit_val_batches": 0,
        },
        "throughput": {"enabled": False},
        "samples": {"enabled": False},
        "tracking": {"wandb": "off"},
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "mine.yaml")]) == 0
    assert main(["export", str(tmp_path / "out"), "--run", "mine"]) == 0
    state = AtomicCheckpointIO().load_checkpoint(newest(tmp_path / "runs/mine/checkpoints"))["state_dict"]
    (file,) = (tmp_path / "out").rglob("*.safetensors")
    name = "encoder.conv_in.weight"
    written, kept = load_file(file)[name], state[f"autoencoder.{name}"]
    assert torch.equal(written, kept.to(written.dtype)) and not torch.equal(kept, kept.bfloat16().float())
