"""What is in the repository, read without importing it: docstrings of methods, first lines of configs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from lightning_t2i.paths import ROOT


def methods(root: Path = ROOT) -> dict[str, str]:
    """Module name -> first line of its docstring, for every file of lightning_modules."""
    found = {}
    for file in sorted((root / "lightning_modules").glob("*.py")):
        if not file.stem.startswith("_"):
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            found[file.stem] = text.strip().partition("\n")[0]
    return found


def published(root: Path = ROOT) -> set[str]:
    """Methods that have a row in docs/methods.md: those that its first column names."""
    file = root / "docs" / "methods.md"
    if not file.is_file():
        return set()
    rows = [line for line in file.read_text(encoding="utf-8").splitlines() if line.lstrip().startswith("|")]
    named = {word for row in rows for word in re.findall(r"\w+", row.split("|")[1].lower())}
    return named & methods(root).keys()


def method_classes(root: Path = ROOT) -> list[str]:
    """Class paths of the public classes in lightning_modules that derive from something."""
    found = []
    for name in methods(root):
        tree = ast.parse((root / "lightning_modules" / f"{name}.py").read_text(encoding="utf-8"))
        classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.bases and not n.name.startswith("_")]
        found += [f"lightning_modules.{name}.{n.name}" for n in classes]
    return found


def configs(root: Path = ROOT) -> dict[str, str]:
    """Path of each config that trains something -> its first comment line."""
    found = {}
    for file in sorted((root / "configs").rglob("*.yaml")):
        lines = file.read_text(encoding="utf-8").splitlines()
        if any(re.match(r"(model|base)\s*:", line) for line in lines):
            comment = next((line.lstrip("# ") for line in lines[:1] if line.startswith("#")), "")
            found[str(file.relative_to(root))] = comment
    return found


def _columns(rows: dict[str, str]) -> str:
    width = max(map(len, rows), default=0)
    return "\n".join(f"  {name:{width}}  {text}".rstrip() for name, text in rows.items()) or "  none"


def methods_table(root: Path = ROOT) -> str:
    shown, mark = methods(root), published(root)
    return _columns(
        {name: text + ("" if not mark or name in mark else "  (not published)") for name, text in shown.items()}
    )


def configs_table(root: Path = ROOT) -> str:
    return _columns(configs(root))
