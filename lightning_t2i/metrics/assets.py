"""Measures the shipped networks and writes the `score.json` of their folders.

    python -m lightning_t2i.metrics.assets pixart flux     guidance chosen on validation prompts, scored on test prompts
    python -m lightning_t2i.metrics.assets dmd fluid       the same for a student in one step, and for a model of tokens
    python -m lightning_t2i.metrics.assets ddpm edm        Fréchet distance to the training pictures, and what is drawn
    python -m lightning_t2i.metrics.assets vq clip         quality of reconstructions, use of the codebook; retrieval

One thread. Positions and seed decide the noise, so that a repetition on the same machine gives the same figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from datamodules.image_text import ImageText
from datamodules.worlds.shapes_scenes import HELD_OUT, PAIRS
from lightning_modules.diffusion import Diffusion
from lightning_modules.tokenizer import psnr
from lightning_t2i.batch import Cond, Records
from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.metrics.scorers import ScorerOptions, build_scorer
from lightning_t2i.metrics.shapes_detector import detect, satisfied, to_pixels
from lightning_t2i.networks.codec import LatentCodec
from lightning_t2i.networks.towers import Towers
from lightning_t2i.paths import ROOT
from lightning_t2i.token_pipeline import TokenPipeline

TINY = ROOT / "assets" / "tiny"
STUDENTS = ("dmd", "swiftbrush", "instaflow")  # pipelines of one step
N, CHOOSING, SCALES = 1000, 200, dict.fromkeys(STUDENTS, (1.0,))
ALL_SCALES = (2.0, 3.0, 4.5, 6.0)  # where SCALES names none
SOLVERS = {"pixart": "ddim", "flux": "euler", "sd": "ddim", "ddpm": "ddim", "edm": "heun"}
SOLVERS |= {**dict.fromkeys(STUDENTS, "ddim"), "instaflow": "euler"}
STEPS = {"ddpm": 50, "edm": 18, **dict.fromkeys(STUDENTS, 1)}


def built(name: str, folder: Path) -> Diffusion:
    """A shipped pipeline as the method that samples it."""
    method = Diffusion(str(folder), solver=SOLVERS[name], steps=STEPS.get(name, 25), size=32)  # type: ignore[arg-type]
    method.configure_model()
    return method.eval()


def pictures(split: str, n: int, languages: Sequence[str] = ("en",), batch_size: int = 100) -> list[Records]:
    """The first n records of a split of the shapes world, in its order."""
    stream = ImageText("shapes", split, batch_size, languages=languages, in_memory=True, limit=n)
    stream.prepare()
    stream.setup()
    stream.begin(0, split, shuffle=False)
    return [stream.load(range(i, i + batch_size), i // batch_size) for i in range(0, n, batch_size)]


@torch.no_grad()
def scored(method: Any, split: str, n: int, metrics: Sequence[str], **sampling: float) -> dict[str, float]:
    """Metrics of the pictures of a method or token pipeline for the first n records of a split, by their full names."""
    scorers = [build_scorer(name, ScorerOptions(), f"shapes-{split}") for name in metrics]
    for records in pictures(split, n):
        images = method.sample(method.condition(records), Keys(0).fork("eval"), records.position, **sampling)
        for scorer in scorers:
            scorer.add(images, records)
    return {name: round(value, 4) for scorer in scorers for name, value in scorer.results().items()}


def text_to_image(name: str, folder: Path) -> dict[str, Any]:
    """The shapes score at the guidance scale that is best on validation prompts."""
    method = TokenPipeline.from_pretrained(folder) if name == "fluid" else built(name, folder)
    overall = f"shapes_score/overall@n={CHOOSING}"
    scales = SCALES.get(name, ALL_SCALES)
    found = {scale: scored(method, "val", CHOOSING, ["shapes_score"], guidance=scale)[overall] for scale in scales}
    scale = max(found, key=found.__getitem__)
    final = scored(method, "test", N, ["shapes_score", "fd"], guidance=scale)
    part = {key.removeprefix("shapes_score/").partition("@")[0]: final.pop(key) for key in list(final) if "/" in key}
    return {
        "overall": part.pop("overall"),
        "interval": [part.pop("overall_low"), part.pop("overall_high")],
        "tasks": part,
        **final,
        "n": N,
        "guidance": scale,
        "validation": {f"{s:g}": value for s, value in found.items()},
    }


@torch.no_grad()
def on_pixels(name: str, folder: Path) -> dict[str, Any]:
    """Fréchet distance to the training pictures, and how many pictures show what they should.

    scenes: share with one to three known objects. pairs: of a class-conditional network, share with the shape and
    colour that the label names, labels of pairs that training never showed left out.
    """
    method = built(name, folder)
    classes = method.denoiser.classes
    records = pictures("train", N)
    scorer = build_scorer("fd", ScorerOptions(), "shapes-train")
    scenes, pairs = 0, []
    for r in records:
        labels = r.label.tolist() if r.label is not None else []
        cond = Cond(label=r.label, null_label=classes) if classes else None
        images = method.sample(cond, Keys(0).fork("eval"), r.position, guidance=1.0)
        scorer.add(images, r)
        found = [detect(p) for p in to_pixels(images)]
        scenes += sum(1 <= len(objects) <= 3 for objects in found)
        for label, objects in zip(labels if classes else [], found, strict=bool(classes)):
            if PAIRS[label] not in HELD_OUT:
                pairs.append(PAIRS[label] in {(o["shape"], o["colour"]) for o in objects})
    shares = {"scenes": round(scenes / N, 4), **({"pairs": round(sum(pairs) / len(pairs), 4)} if pairs else {})}
    distance = {key: round(value, 4) for key, value in scorer.results().items()}
    return {**distance, "reconstructions": reconstructions(records), **shares, "n": N}


@torch.no_grad()
def reconstructions(records: list[Records]) -> dict[str, float]:
    """The same distance of pictures through the autoencoder, and of the pictures themselves: what n alone costs."""
    codec, found = LatentCodec.from_pretrained(str(TINY / "vae")), {}
    for name in ("autoencoder", "real"):
        scorer = build_scorer("fd", ScorerOptions(), "shapes-train")
        for r in records:
            scorer.add(r.image if name == "real" else codec.decode(codec.encode(r.image)).clamp(-1, 1), r)
        found[name] = round(next(iter(scorer.results().values())), 4)
    return found


@torch.no_grad()
def tokens(name: str, folder: Path) -> dict[str, Any]:
    """PSNR in dB of both autoencoders, shapes score of reconstructions, and the share of the codebook in use."""
    vq, vae = LatentCodec.from_pretrained(str(folder)), LatentCodec.from_pretrained(str(TINY / "vae"))
    x = torch.cat([r.image for r in pictures("test", 400)])
    scenes = [scene for r in pictures("test", 400) for scene in r.scene or []]
    chosen = torch.cat([vq.encode_tokens(part) for part in x.split(100)])
    y = torch.cat([vq.decode_tokens(part) for part in chosen.split(100)])
    z = torch.cat([vae.decode(vae.encode(part)) for part in x.split(100)])
    return {
        "psnr_vq": round(float(psnr(x, y)), 2),
        "psnr_vae": round(float(psnr(x, z)), 2),
        "usage": round(len(chosen.unique()) / vq.vae.config.num_vq_embeddings, 4),
        "shapes_right_vq": round(float(satisfied(y, scenes).mean()), 4),
        "shapes_right_vae": round(float(satisfied(z, scenes).mean()), 4),
        "n": 400,
    }


@torch.no_grad()
def retrieval(name: str, folder: Path) -> dict[str, Any]:
    """How often a picture's own caption is the nearest among 100, by language."""
    towers, found = Towers.build(str(folder)).eval(), {}
    for language in ("en", "zh"):
        records = pictures("test", 100, (language,))[0]
        f, g = towers.encode_image(records.image), towers.encode_text(towers.tokenize(records.caption))
        found[f"recall@1,n=100,{language}"] = round(float(((f @ g.T).argmax(1) == torch.arange(100)).float().mean()), 4)
    return found


MEASURES: dict[str, Callable[[str, Path], dict[str, Any]]] = {
    **dict.fromkeys(("sd", "pixart", "flux", *STUDENTS, "fluid"), text_to_image),
    "ddpm": on_pixels, "edm": on_pixels, "vq": tokens, "clip": retrieval,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures the named networks; 2 for a mistake."""
    parser = argparse.ArgumentParser(
        "python -m lightning_t2i.metrics.assets", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join(MEASURES))
    parser.add_argument("--folder", type=Path, help="measure this folder of the kind instead, and only print")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        for name in options.names:
            if name not in MEASURES:
                raise UserError("No such network is measured", where="NAME", given=name, allowed=list(MEASURES))
            found = MEASURES[name](name, options.folder or TINY / name)
            text = json.dumps({**found, "command": f"python -m lightning_t2i.metrics.assets {name}"}, indent=1)
            sys.stdout.write(f"{name}: {text}\n")
            if options.folder is None:
                (TINY / name / "score.json").write_text(f"{text}\n", encoding="utf-8")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
