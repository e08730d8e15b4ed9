"""Model cards: what an exported folder holds, where it comes from and what it scores, all of it read from files.

The networks are those of the written folder; steps, samples and time those of the exported checkpoint; scores those
that the run logged up to that step, with the average and the sampling of the export. What a run folder lacks is left
out, and no path of the machine is written.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from lightning_t2i.cli.origins import UNKNOWN, bases_of, data_rows, public, recipe_of
from lightning_t2i.cli.stock import Stock, read_stock
from lightning_t2i.loggers import read_lines
from lightning_t2i.report import duration, table

# Licence -> the hub's name for it; FLUX.1's has no name of its own there.
HUB_NAMES = {
    "Apache-2.0": "apache-2.0",
    "CC0-1.0": "cc0-1.0",
    "CC BY-SA 4.0": "cc-by-sa-4.0",
    "CC BY-NC-SA 4.0": "cc-by-nc-sa-4.0",
    "CreativeML OpenRAIL-M": "creativeml-openrail-m",
    "OpenRAIL++-M": "openrail++",
}
# The parts of a flow's folder with a scheduler of diffusers, which begins at .999 and not at 1.
STOCK_FLOW = """from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

kinds = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "tokenizer": CLIPTokenizer}
parts = {name: kind.from_pretrained(folder, subfolder=name) for name, kind in kinds.items()}
facts = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 1}
scheduler, off = DPMSolverMultistepScheduler(**facts), {"safety_checker": None, "feature_extractor": None}
pipeline = StableDiffusionPipeline(**parts, **off, scheduler=scheduler, requires_safety_checker=False)"""
SCORES = ("val/", "eval/", "test/")
GRID = "samples.png"


@dataclass
class RunFacts:
    """What is known of a run at a checkpoint; empty where its folder does not say.

    config: resolved; environment: env.json; step, samples, seconds: at the checkpoint; seed: of the run; title: first
    line of the method's file; papers: arXiv ids there; deviations: its paragraph of that name; changes: what is
    exported otherwise than the run says, see `verbs.changes_of`.
    """

    folder: Path
    step: int
    samples: int | None = None
    seconds: float | None = None
    seed: int | None = None
    title: str = ""
    papers: list[str] = field(default_factory=list)
    deviations: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, folder: Path, method: Any, checkpoint: Mapping[str, Any], changes: Mapping[str, Any] | None = None
    ) -> RunFacts:
        """Reads a run folder, the file of its method, and the state that was exported."""
        text = (sys.modules[type(method).__module__].__doc__ or "").strip()
        paragraph = re.search(r"^Deviations[^:]*: *(.+?)(?:\n\n|\Z)", text, flags=re.M | re.S)
        config, environment = folder / "config.yaml", folder / "env.json"
        counters = checkpoint["t2i"]["counters"]
        return cls(
            folder,
            counters["step"],
            counters["samples"],
            checkpoint.get("callbacks", {}).get("Record", {}).get("seconds"),
            checkpoint["t2i"]["seed"],
            text.partition("\n")[0],
            list(dict.fromkeys(re.findall(r"\b\d{4}\.\d{4,5}\b", text))),
            " ".join(paragraph[1].split()) if paragraph else "",
            yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {},
            json.loads(environment.read_text(encoding="utf-8")) if environment.is_file() else {},
            dict(changes or {}),
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the method."""
        return (self.config.get("model") or {}).get("init_args") or {}

    @property
    def grid(self) -> Path | None:
        """The newest sample grid that is not newer than the checkpoint."""
        grids = [p for p in sorted(self.folder.glob("samples/step-*.png")) if int(p.stem[5:]) <= self.step]
        return grids[-1] if grids else None


def score_rows(facts: RunFacts) -> list[tuple[str, str, str, str]]:
    """(name, value, training step, file): the last score of each name in each file.

    None from after the checkpoint, none of another average or other sampling than that of the export.
    """
    rows = []
    for name in ("metrics.jsonl", "validate.jsonl", "test.jsonl"):
        latest: dict[str, tuple[float, int]] = {}
        for line in read_lines(facts.folder / name):
            if line.get("with", {}) != facts.changes:
                continue
            if line["step"] == facts.step or (line["step"] < facts.step and name == "metrics.jsonl"):
                scores = {k: v for k, v in line.items() if k.startswith(SCORES) and not k.endswith("/seconds")}
                latest |= {k: (v, line["step"]) for k, v in scores.items()}
        rows += [(f"`{k}`", f"{v:.5g}", f"{step:,}", name) for k, (v, step) in latest.items()]
    return rows


def training_rows(facts: RunFacts, recipe: str) -> list[tuple[str, str]]:
    environment = facts.environment
    git, hardware, versions = (environment.get(k) or {} for k in ("git", "hardware", "versions"))
    machine = ", ".join(hardware.get("gpus") or ()) or (f"{hardware['cpus']} CPU cores" if hardware else "")
    rows = [
        ("class", f"`{facts.config['model']['class_path']}`" if facts.arguments or facts.config else ""),
        ("recipe", recipe),
        ("training steps", f"{facts.step:,}"),
        ("samples", "" if facts.samples is None else f"{facts.samples:,}"),
        ("wall time", "" if facts.seconds is None else duration(facts.seconds)),
        ("seed", "" if facts.seed is None else str(facts.seed)),
        ("commit", f"{git['commit']}{' with changes' if git.get('changed') else ''}" if git.get("commit") else ""),
        ("machine", machine),
        ("exported with", ", ".join(f"`{key}` {public(value)}" for key, value in facts.changes.items())),
        ("versions", ", ".join(f"{name} {v}" for name, v in versions.items() if v != "absent")),
    ]
    return [row for row in rows if row[1]]


def limits(facts: RunFacts, stock: Stock, scored: bool) -> list[str]:
    planned = (facts.config.get("trainer") or {}).get("max_steps") or 0
    said = [f"Deviations from the papers: {facts.deviations}"] if facts.deviations else []
    if facts.step < planned:
        said.append(f"Taken after {facts.step:,} of {planned:,} training steps.")
    said.append("One run with one seed: how much scores vary between runs is not known.")
    if not scored:
        said.append("No scores were recorded up to this step.")
    if stock.task:
        said.append("Nothing filters prompts or pictures; what the training data do not show cannot be expected.")
    return said


def front_matter(stock: Stock, licence: str, **more: Any) -> str:
    """The YAML head that the hub reads; `unknown` is its word for a licence that has to be looked up."""
    first = licence.partition(";")[0]  # "Apache-2.0; the data are CC0"
    named = HUB_NAMES.get(first) or (first if first in HUB_NAMES.values() else None)
    head: dict[str, Any] = {"license": named or ("unknown" if licence == UNKNOWN else "other")}
    if head["license"] == "other":
        head["license_name"] = re.sub(r"[^a-z0-9]+", "-", licence.lower()).strip("-")
    head |= {"library_name": stock.library, "pipeline_tag": stock.task, **more}
    shown = {key: value for key, value in head.items() if value}
    return f"---\n{yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)}---"


def networks_section(stock: Stock) -> str:
    rows = [(n.component, f"`{n.kind}`", f"{n.parameters:,}", n.precision) for n in stock.networks]
    return "## Networks\n\n" + table(rows, ("component", "class", "parameters", "stored as"))


def use_section(stock: Stock) -> str:
    said = f"## Use\n\nIn this folder:\n\n```python\n{stock.snippet}\n```"
    if stock.code:
        files = " and ".join(f"`{file}`" for file in stock.code)
        said += f"\n\nThe folder brings code that no library has, {files}; `trust_remote_code` lets it be imported."
    if stock.code == ["scheduler/flow_scheduler.py"]:
        said += f" Without any code of the folder, nearly the same:\n\n```python\n{STOCK_FLOW}\n```"
    return said


def optional(title: str, rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    return f"## {title}\n\n{table(rows, head)}" if rows else ""


def write_card(out: Path, facts: RunFacts, sampling: Mapping[str, Any]) -> Path:
    """Writes README.md, and the run's sample grid beside it, into an exported folder.

    Args:
        sampling: what the run samples with, see `read_stock`.
    """
    prompt = ""
    if facts.grid is not None:
        shutil.copyfile(facts.grid, out / GRID)
        with Image.open(facts.grid) as image:
            prompt = str(image.info.get("prompts", "")).partition("\n")[0]
    stock = read_stock(out, {"prompt": prompt, **sampling})
    bases, data = bases_of(facts.arguments), list(data_rows(facts.config))
    starts = [base for base in bases if base.is_start]
    licences = {base.licence for base in starts}
    licence = licences.pop() if len(licences) == 1 else UNKNOWN
    said = UNKNOWN if licence == UNKNOWN else f"that of the base network, {licence.partition(';')[0]}"
    recipe, changed = recipe_of(facts.environment, facts.config) or ("", [])
    changes = (
        "\n".join(["Changed from the recipe:\n", *(f"- {line}" for line in changed or ["nothing"])]) if recipe else ""
    )
    scores = score_rows(facts)
    languages = sorted({word for row in data for word in row[4].split(", ") if word})
    method = facts.title.partition(":")[0]
    tags = ["lightning-t2i", re.sub(r"\W+", "-", method.lower()).strip("-")]
    papers = ", ".join(f"[{p}](https://arxiv.org/abs/{p})" for p in facts.papers)
    tags = [tag for tag in [*tags, *(f"arxiv:{p}" for p in facts.papers)] if tag]
    base_rows = [(", ".join(b.keys), f"`{b.source}`", f"`{b.identity}`", b.licence) for b in bases]
    parts = [
        front_matter(stock, licence, language=languages, tags=tags, base_model=[b.source for b in starts]),
        f"# {facts.folder.name}",
        facts.title + (f"\n\nPapers: {papers}." if papers else ""),
        f"Licence: {said}. The data have their own.",
        f"![Samples of the run]({GRID})\n\n*Samples at step {int(facts.grid.stem[5:]):,}.*" if facts.grid else "",
        use_section(stock),
        networks_section(stock),
        optional("Base networks", base_rows, ("option", "source", "identity", "licence")),
        optional("Data", data, ("stream", "data set", "split", "samples", "captions", "licence")),
        optional("Training", training_rows(facts, recipe), ("", "")),
        changes,
        optional("Scores", scores, ("name", "value", "at step", "file")),
        "## Limits\n\n- " + "\n- ".join(limits(facts, stock, bool(scores))),
    ]
    return _written(out, parts)


def write_edm_card(out: Path, file: Path, licence: str) -> Path:
    """The card of a network that was converted from one of EDM's published snapshots."""
    stock = read_stock(out)
    parts = [
        front_matter(stock, licence, tags=["lightning-t2i", "edm", "arxiv:2206.00364"]),
        f"# {file.stem}",
        "A network of EDM, converted from its published snapshot.\n\n"
        "Papers: [2206.00364](https://arxiv.org/abs/2206.00364).",
        f"Licence of these weights, as of the published ones: {licence}.",
        use_section(stock),
        networks_section(stock),
        "## Limits\n\n- Averaged weights as they were published; nothing was trained or measured here.",
    ]
    return _written(out, parts)


def _written(out: Path, parts: Sequence[str]) -> Path:
    target = out / "README.md"
    target.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return target
