"""new: a method of one's own, derived from one that exists, with a config that runs at once."""

from __future__ import annotations

import ast
import keyword
from pathlib import Path

from lightning_t2i.cli.configs import read_yaml
from lightning_t2i.cli.listing import methods
from lightning_t2i.cli.main import Request
from lightning_t2i.errors import UserError, closest
from lightning_t2i.paths import ROOT

METHOD = '''"""{title}: what it does, in one line (arXiv 0000.00000).

    the equations of the paper

Deviations from paper and reference: none yet.
"""

from __future__ import annotations

from lightning_modules.{parent} import {parent_class}


class {name}({parent_class}):
    """{title}, derived from {parent_class}: it trains as {parent_class} does until something is overridden.

    Override `training_step` to change the update, `configure_model` to change the networks, and `__init__` to add
    options: each typed argument becomes a key of the config.
    """
'''

CONFIG = """\
# {title} on the tiny world; everything else is as in {base}.
base: {base}
model:
  class_path: lightning_modules.{module}.{name}
"""


def camel(name: str) -> str:
    """my_dmd -> MyDmd."""
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))


def main_class(file: Path, config: Path) -> str:
    """The class of a method file: the one that its tiny config names, else the last public one."""
    model = (read_yaml(config.read_text(encoding="utf-8")) or {}).get("model") or {}
    module, _, name = str(model.get("class_path", "")).rpartition(".")
    if module == f"lightning_modules.{file.stem}":
        return name
    classes = [n.name for n in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef)]
    return [name for name in classes if not name.startswith("_")][-1]


def new(request: Request) -> int:
    """Writes lightning_modules/NAME.py and configs/NAME/tiny.yaml.

    Raises:
        UserError: no name, a name that Python cannot import or that exists, an unknown parent.
    """
    module, config = (file.relative_to(ROOT) for file in create(request.positional, request.parent))
    print(f"written: {module}, {config}\ntry it:  python train.py fit --config {config} --trainer.max_steps 10")
    return 0


def create(words: list[str], parent: str | None, root: Path = ROOT) -> tuple[Path, Path]:
    """The two files of a new method, written into `root`."""
    example = "python train.py new my_diffusion --from diffusion"
    if len(words) != 1:
        raise UserError("One name for the new method is needed", given=" ".join(words) or None, fix=example)
    name, known = words[0], methods(root)
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower() or name.startswith("_"):
        raise UserError(
            "The name must be one that Python can import", given=name, allowed="a-z, 0-9 and _", fix=example
        )
    module, config = root / "lightning_modules" / f"{name}.py", root / "configs" / name / "tiny.yaml"
    for path in (module, config):
        if path.exists():
            raise UserError(
                "This exists already", where=str(path.relative_to(root)), given=name, fix="choose another name"
            )
    if parent not in known:
        near = closest(parent or "", known)
        raise UserError(
            "Which method to start from?",
            where="--from",
            given=parent,
            allowed=known,
            fix=f"--from {near}" if near else example,
        )
    base = root / "configs" / parent / "tiny.yaml"
    if not base.is_file():
        raise UserError(
            f"{parent} has no tiny config to start from", where=str(base.relative_to(root)), fix="write it first"
        )
    facts = {
        "title": name.replace("_", " "),
        "name": camel(name),
        "module": name,
        "parent": parent,
        "parent_class": main_class(root / "lightning_modules" / f"{parent}.py", base),
        "base": f"../{parent}/tiny.yaml",
    }
    if facts["name"] == facts["parent_class"]:
        facts["name"] += "Method"
    module.write_text(METHOD.format(**facts), encoding="utf-8")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(CONFIG.format(**facts), encoding="utf-8")
    return module, config
