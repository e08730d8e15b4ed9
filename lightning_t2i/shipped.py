"""Files of code that lie inside exported folders, where no library has the class that a component is of.

diffusers imports COMPONENT/FILE.py of a folder whose model_index.json names FILE, if it is told `trust_remote_code`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lightning_t2i.networks import flow_scheduler, stacked_unet

PIPELINE = "StableDiffusionPipeline"  # it asks a scheduler for what those of flows lack
SCHEDULER = "FlowMatchUniformScheduler"


def ship(folder: Path) -> None:
    """Gives a written Stable Diffusion pipeline of a flow the scheduler of `flow_scheduler`, and the file of a stacked
    U-Net; leaves other folders as they are."""
    index = folder / "model_index.json"
    facts: dict[str, Any] = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    if facts.get("_class_name") != PIPELINE or not facts["scheduler"][1].startswith("FlowMatch"):
        return
    (folder / "scheduler" / "scheduler_config.json").unlink()
    flow_scheduler.FlowMatchUniformScheduler().save_pretrained(folder / "scheduler")
    _put(folder, facts, "scheduler", flow_scheduler.__file__, SCHEDULER)
    if facts["unet"][1] == "StackedUNet":
        _put(folder, facts, "unet", stacked_unet.__file__, "StackedUNet")
    index.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _put(folder: Path, facts: dict[str, Any], component: str, file: str, name: str) -> None:
    shutil.copyfile(file, folder / component / Path(file).name)
    facts[component] = [Path(file).stem, name]


def shipped(folder: Path) -> list[str]:
    """The code files of the components of a folder."""
    return sorted(str(file.relative_to(folder)) for file in folder.glob("*/*.py"))
