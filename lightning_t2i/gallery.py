"""The pictures of docs/gallery.md, drawn again from what is in the repository.

    python -m lightning_t2i.gallery [NAME ...]                  draws docs/images/NAME.png; default: all of them
    python -m lightning_t2i.gallery --keep NAME --run FOLDER    keeps the curves of a run that docs/results/curves has

Pictures come from assets/tiny and the first test prompts of the shapes world, with noise of seed 0; curves from the
series in docs/results/curves, which are those of a run's metrics.jsonl; what experts are like from the numbers of
`lightning_t2i.expert_plots` in docs/results/experts.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure  # no pyplot: no global state, no display
from PIL import Image, ImageOps

from lightning_t2i.claims.training import prompts
from lightning_t2i.expert_plots import draw
from lightning_t2i.keys import Keys
from lightning_t2i.loggers import read_lines
from lightning_t2i.metrics.assets import SOLVERS, STUDENTS
from lightning_t2i.paths import ROOT, resolve
from lightning_t2i.pictures import draw_grid, to_pil
from lightning_t2i.report import series
from lightning_t2i.state_io import write_atomically

IMAGES, SERIES = ROOT / "docs" / "images", ROOT / "docs" / "results" / "curves"
EXPERTS = ROOT / "docs" / "results" / "experts"
ROWS, COLUMNS, SIDE = 12, 6, 64  # pictures of a grid, and pixels of one at least
OF = 500  # test pictures that texts are compared with
Panel = tuple[str, dict[str, str]]  # title, and series by their labels
CURVES: dict[str, list[Panel]] = {
    "fluid": [
        ("validation loss (velocity)", {"all tokens": "val/velocity_mse"}),
        ("by the share of masked tokens", {
            "less than .1": "bins/velocity_mse/r0", ".3 to .4": "bins/velocity_mse/r3",
            ".6 to .7": "bins/velocity_mse/r6", ".9 and more": "bins/velocity_mse/r9"}),
        ("shapes score, 100 validation prompts", {"score": "eval/shapes_score/overall@n=100"}),
        ("Fréchet distance of these", {"distance": "eval/fd@n=100,ref=shapes-val:1000"}),
    ],
    "swiftbrush": [
        ("loss of the adapter", {"lora": "lora/loss"}),
        ("gap of both estimates", {"gap": "student/gap"}),
        ("g by thirds of the times", {
            "low": "student/g_low", "middle": "student/g_mid", "high": "student/g_high"}),
        ("deviation of the student's x", {"deviation": "student/contrast"}),
    ],
    "instaflow": [
        ("loss of the reflow", {"all times": "student/loss"}),
        ("its quarters of t", {
            "nearest the data": "student/loss_1", "second": "student/loss_2",
            "third": "student/loss_3", "nearest the noise": "student/loss_4"}),
        ("validation: distance to the teacher", {"distance": "val/distance"}),
    ],
}  # fmt: skip


@torch.no_grad()
def fluid(rows: int = ROWS) -> Image.Image:
    """Prompts in rows; each column has its own noise."""
    from lightning_t2i.token_pipeline import TokenPipeline

    pipeline, (records,) = TokenPipeline.from_pretrained(str(resolve("assets/tiny/fluid"))), prompts("test", rows)
    cond, keys = pipeline.condition(records), Keys(0).fork("gallery")
    columns = [to_pil(pipeline.sample(cond, keys, records.position + 1000 * k)) for k in range(COLUMNS)]
    return draw_grid(list(zip(*columns, strict=True)), records.caption or (), [""] * COLUMNS, SIDE)


@torch.no_grad()
def student(name: str, rows: int = ROWS) -> Image.Image:
    """A teacher in 25 steps and in one, and its student in one, at equal noise."""
    from lightning_modules.teacher import Teacher

    (records,) = prompts("test", rows)
    columns = []
    for network, steps, guidance in (("sd", 25, 4.5), ("sd", 1, 4.5), (name, 1, 1.0)):
        teacher = Teacher(f"assets/tiny/{network}", guidance=guidance, steps=steps, solver=SOLVERS[network])  # type: ignore[arg-type]
        teacher.configure_model()
        images = teacher.eval().sample(teacher.condition(records), Keys(0).fork("gallery"), records.position)
        columns.append(to_pil(images))
    titles = ["teacher, 25", "teacher, 1", f"{name}, 1"]
    return draw_grid(list(zip(*columns, strict=True)), records.caption or (), titles, SIDE + 32)


@torch.no_grad()
def wukong(rows: int = ROWS) -> Image.Image:
    """For short Chinese texts of test scenes the nearest of 500 pictures, the nearest first; their own are framed.

    Beside them stand the same scenes' captions in English, for which there are letters everywhere.
    """
    from datamodules.retrieval import RetrievalPairs
    from lightning_t2i.networks.towers import Towers

    found = []
    for language, short in (("zh", True), ("en", False)):
        stream = RetrievalPairs("shapes", "retrieval", OF, short, languages=[language], in_memory=True)
        stream.prepare()
        stream.setup()
        stream.begin(0, "retrieval", shuffle=False)
        found.append(stream.load(range(OF), 0))
    towers = Towers.build(str(resolve("assets/tiny/clip"))).eval()
    queries, captions = ((records.caption or [])[:rows] for records in found)
    texts = towers.encode_text(towers.tokenize(queries))
    nearest = (texts @ towers.encode_image(found[0].image).T).topk(COLUMNS).indices.tolist()
    pictures = to_pil(found[0].image)
    framed = [[ImageOps.expand(pictures[k], 2, "red" if k == i else "white") for k in n] for i, n in enumerate(nearest)]
    return draw_grid(framed, captions, [""] * COLUMNS, SIDE)


def curves(name: str) -> Image.Image:
    """The series of a training, a panel for each."""
    found, panels = json.loads((SERIES / f"{name}.json").read_text(encoding="utf-8")), CURVES[name]
    figure = Figure(figsize=(3.4 * len(panels), 3.0), layout="constrained")
    for number, (title, lines) in enumerate(panels, 1):
        axis = figure.add_subplot(1, len(panels), number)
        for label, key in lines.items():
            axis.plot(*found[key], marker=".", linewidth=1, label=label)
        axis.set_title(title, fontsize=9)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=7)
        if len(lines) > 1:
            axis.legend(fontsize=7)
    figure.supxlabel("training step", fontsize=9)
    return rendered(figure)


def experts(name: str) -> Image.Image:
    """What the experts of a run are like, and their merge."""
    return rendered(draw(json.loads((EXPERTS / f"{name}.json").read_text(encoding="utf-8"))))


def rendered(figure: Figure) -> Image.Image:
    stream = io.BytesIO()
    figure.savefig(stream, dpi=90)
    return Image.open(stream)


def keep(name: str, run: Path) -> None:
    """Keeps the series of a run that its curves show, thinned to two hundred points each."""
    found = series(read_lines(run / "metrics.jsonl"))
    kept: dict[str, Any] = {}
    for _, lines in CURVES[name]:
        for key in lines.values():
            steps, values = found[key]
            every = -(-len(steps) // 200)
            kept[key] = [steps[::every], [float(f"{value:.5g}") for value in values[::every]]]
    SERIES.mkdir(parents=True, exist_ok=True)
    write_atomically(SERIES / f"{name}.json", (json.dumps(kept) + "\n").encode())


PICTURES: dict[str, Callable[[], Image.Image]] = {
    "fluid": fluid,
    "wukong": wukong,
    **{name: partial(student, name) for name in STUDENTS},
    **{f"{name}_curves": partial(curves, name) for name in CURVES},
    **{f"deme_{base}": partial(experts, base) for base in ("sd", "early")},
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m lightning_t2i.gallery", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(PICTURES)} (default: all)")
    parser.add_argument("--keep", choices=list(CURVES), metavar="NAME", help="keep the curves of --run instead")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="run folder of --keep")
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - set(PICTURES):
        parser.error(f"no such picture: {', '.join(sorted(unknown))}; there are {', '.join(PICTURES)}")
    if given.keep:
        if given.run is None:
            parser.error("--keep needs --run FOLDER")
        keep(given.keep, given.run)
        return 0
    torch.set_num_threads(1)
    for name in given.names or PICTURES:
        PICTURES[name]().save(IMAGES / f"{name}.png")
        print(IMAGES / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
