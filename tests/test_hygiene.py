"""Rules that hold for the whole tree and that no single test would notice: each is tried on a sample that breaks it."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ("lightning_modules", "lightning_t2i", "callbacks", "datamodules")
CODE_LINES = 200

# file -> (what it may call all the same, why)
ALLOWED_RANDOM = {
    "lightning_t2i/keys.py": (
        {"random.seed", "numpy.random.seed", "torch.default_generator.manual_seed", "torch.cuda.manual_seed"},
        "Keys.seed_globals is the one place that seeds the global generators",
    ),
}

# ---- the tree ------------------------------------------------------------------------------------------------------


@cache
def tree() -> tuple[Path, ...]:
    """Every file that git tracks or would add, relative to the root; outside a clone every file that is not hidden."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    if names == [""]:
        found = (f.relative_to(ROOT) for f in ROOT.rglob("*"))
        names = [str(f) for f in found if not f.parts[0].startswith(".") and f.parts[0] not in ("runs", "data")]
    return tuple(sorted(Path(name) for name in set(names) if name and (ROOT / name).is_file()))


def python_files(*folders: str) -> list[Path]:
    return [f for f in tree() if f.suffix == ".py" and (f.parts[0] in folders or not folders)]


def text_files() -> list[Path]:
    kinds = {".py", ".md", ".yaml", ".yml", ".toml", ".json", ".sh", ".sbatch", ".txt", ".cfg", ".cff", ""}
    return [f for f in tree() if f.suffix in kinds]


def read(file: Path) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


# ---- rules: source -> complaints -----------------------------------------------------------------------------------


def imported_names(module: ast.Module) -> dict[str, str]:
    """Local name -> the dotted name it stands for."""
    names = {}
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return names


def calls(module: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Every call with its dotted name, imports resolved; a method of something computed is `?.name`."""
    names = imported_names(module)
    for node in ast.walk(module):
        if not isinstance(node, ast.Call):
            continue
        parts, target = [], node.func
        while isinstance(target, ast.Attribute):
            parts.append(target.attr)
            target = target.value
        first = names.get(target.id, target.id) if isinstance(target, ast.Name) else "?"
        yield ".".join([first, *reversed(parts)]), node


TORCH_DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
TORCH_DRAWS |= {"rand_like", "randn_like", "randint_like"}
TENSOR_DRAWS = {"normal_", "uniform_", "bernoulli_", "random_", "exponential_", "cauchy_", "geometric_", "log_normal_"}
TORCH_SEEDS = {"manual_seed", "seed", "manual_seed_all", "seed_all", "set_rng_state", "seed_everything"}
NUMPY_OBJECTS = {"default_rng", "Generator", "SeedSequence", "Philox", "PCG64"}  # with a seed they are no globals


def draws_globally(name: str, call: ast.Call) -> bool:
    package, last = name.split(".")[0], name.rsplit(".", 1)[-1]
    has_generator = any(keyword.arg == "generator" for keyword in call.keywords)
    if package == "torch" and not name.startswith("torch.nn.init"):
        return (last in TORCH_DRAWS and not has_generator) or last in TORCH_SEEDS
    if last in ("getstate", "setstate", "get_state", "set_state"):  # keeping a state for later draws nothing
        return False
    if name.startswith("numpy.random."):
        return last not in NUMPY_OBJECTS or not (call.args or call.keywords)
    if package == "random":
        return name != "random.Random" or not call.args
    if last == "seed_everything":
        return True
    return last in TENSOR_DRAWS and ".init." not in f".{name}" and not has_generator


def global_draws(source: str) -> list[str]:
    return [name for name, call in calls(ast.parse(source)) if draws_globally(name, call)]


def unsafe_loads(source: str) -> list[str]:
    found = []
    for name, call in calls(ast.parse(source)):
        flags = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
        if flags.get("weights_only") is False or flags.get("allow_pickle") is True:
            found.append(f"{name} at line {call.lineno}")
        if name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "yaml.unsafe_load", "joblib.load"):
            found.append(f"{name} at line {call.lineno}")
    return found


def bare_excepts(source: str) -> list[str]:
    return [
        f"line {node.lineno}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (ast.unparse(node.type) == "BaseException" and "raise" not in ast.unparse(node)))
    ]


def unfinished(source: str) -> list[str]:
    return re.findall(r"\b(?:NotImplementedError|TODO|FIXME|XXX)\b", source)


def prints(source: str) -> list[str]:
    """Calls of print outside a function named main: a library logs or returns."""
    module = ast.parse(source)
    mains = [n for n in ast.walk(module) if isinstance(n, ast.FunctionDef) and n.name == "main"]
    spared = {id(node) for main in mains for node in ast.walk(main)}
    return [f"line {call.lineno}" for name, call in calls(module) if name == "print" and id(call) not in spared]


def optional_imports(source: str) -> list[str]:
    """Packages of the `full` extra that are imported when the module is."""
    found = []
    module = ast.parse(source)
    inside = {id(n) for f in ast.walk(module) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(module):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
    return [name for name in found if name.split(".")[0] in ("torchvision", "timm", "open_clip", "torch_fidelity")]


def code_lines(source: str) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            docstrings |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def assertless_tests(source: str) -> list[str]:
    def asserts(function: ast.AST) -> bool:
        return any(
            isinstance(node, ast.Assert)
            or (isinstance(node, ast.Call) and re.search(r"assert|raises|warns|fail", ast.unparse(node.func)))
            for node in ast.walk(function)
        )

    module = ast.parse(source)
    scopes = [module, *(n for n in module.body if isinstance(n, ast.ClassDef) and n.name.startswith("Test"))]
    functions = [n for scope in scopes for n in scope.body if isinstance(n, ast.FunctionDef)]
    # A test may leave its assertions to a helper of its own file.
    helpers = {f.name for f in functions if not f.name.startswith("test_") and asserts(f)}
    return [
        f.name
        for f in functions
        if f.name.startswith("test_")
        and not asserts(f)
        and not any(isinstance(n, ast.Call) and getattr(n.func, "id", None) in helpers for n in ast.walk(f))
    ]


def machine_paths(text: str) -> list[str]:
    return re.findall(r"(?<![\w.$}/>-])/(?:root|home|Users|work|opt|scratch)/[\w.-]+", text)


RULES: list[tuple[Callable[[str], list[str]], list[str], list[str]]] = [
    (
        global_draws,
        [
            "import torch\nx = torch.randn(3)",
            "import torch as t\nt.manual_seed(1)",
            "from torch import randint\nrandint(0, 3, (2,))",
            "import numpy as np\nnp.random.rand(3)",
            "import numpy as np\nnp.random.default_rng()",
            "import random\nrandom.shuffle(x)",
            "from random import choice\nchoice(x)",
            "import torch\ntorch.empty(3).normal_()",
            "from lightning import seed_everything\nseed_everything(1)",
        ],
        [
            "import torch\nx = torch.randn(3, generator=g)",
            "import numpy as np\nnp.random.default_rng(1).normal()",
            "import random\nr = random.Random(1)\nr.shuffle(x)",
            "from torch import nn\nnn.init.normal_(w)",
            "keys.normal('noise', positions, (3,))",
        ],
    ),
    (
        unsafe_loads,
        [
            "import torch\ntorch.load(f, weights_only=False)",
            "import pickle\npickle.load(f)",
            "from pickle import loads\nloads(f)",
            "import numpy as np\nnp.load(f, allow_pickle=True)",
            "import yaml\nyaml.load(f, yaml.Loader)",
        ],
        ["import torch\ntorch.load(f, weights_only=True)", "import yaml\nyaml.safe_load(f)"],
    ),
    (
        bare_excepts,
        ["try:\n    f()\nexcept:\n    pass", "try:\n    f()\nexcept BaseException:\n    pass"],
        ["try:\n    f()\nexcept OSError:\n    pass", "try:\n    f()\nexcept BaseException:\n    g()\n    raise"],
    ),
    (unfinished, ["raise NotImplementedError", "# TODO: more"], ["# to do"]),
    (prints, ["def f():\n    print(1)"], ["def main():\n    print(1)", "def f():\n    log.info(1)"]),
    (
        optional_imports,
        [
            "import torchvision.transforms as T",
            "try:\n    from timm import create_model\nexcept ImportError:\n    pass",
        ],
        ["def f():\n    import torchvision", "import torch"],
    ),
    (
        assertless_tests,
        [
            "def test_f():\n    f()",
            "class TestF:\n    def test_f(self):\n        f()",
            "def g():\n    pass\n\ndef test_f():\n    g()",
        ],
        [
            "def test_f():\n    assert f()",
            "def test_f():\n    with pytest.raises(E):\n        f()",
            "def check(x):\n    assert x\n\ndef test_f():\n    check(1)",
        ],
    ),
    (
        machine_paths,
        ["see /" + "root/x", 'open("/' + 'home/ann/data")'],
        ["PYTHON=/path/to/python", "https://host.org/work/x", "runs/home/x", "#!/usr/bin/env bash"],
    ),
]
CASES = [(rule, text, True) for rule, bad, _ in RULES for text in bad]
CASES += [(rule, text, False) for rule, _, good in RULES for text in good]


@pytest.mark.parametrize(
    ("rule", "text", "broken"), CASES, ids=[f"{r.__name__}-{i}" for i, (r, _, _) in enumerate(CASES)]
)
def test_rules_find_what_they_are_for(rule: Callable[[str], list[str]], text: str, broken: bool) -> None:
    assert bool(rule(text)) == broken


def test_code_lines_counts_code_alone() -> None:
    source = '"""Title.\n\nText.\n"""\n\n# why\nx = """a\nb"""\n'
    source += 'def f(\n    y,\n):\n    """Doc."""\n\n    return y  # same line\n'
    assert code_lines(source) == 6


# ---- the rules on the tree -----------------------------------------------------------------------------------------


def complaints(rule: Callable[[str], list[str]], files: list[Path]) -> list[str]:
    return [f"{file}: {found}" for file in files for found in rule(read(file))]


def test_random_draws_are_keyed() -> None:
    found = {str(f): set(global_draws(read(f))) for f in python_files(*LIBRARY)}
    assert {f: names - ALLOWED_RANDOM.get(f, (set(), ""))[0] for f, names in found.items()} == {f: set() for f in found}
    assert {f: names for f, (names, _) in ALLOWED_RANDOM.items()} == {f: found[f] for f in ALLOWED_RANDOM}


def test_nothing_unsafe_is_loaded() -> None:
    assert complaints(unsafe_loads, [f for f in python_files() if f.parts[0] != "tests"]) == []


def test_no_bare_except() -> None:
    assert complaints(bare_excepts, python_files()) == []


def test_nothing_is_unfinished() -> None:
    assert complaints(unfinished, [f for f in python_files() if f.parts[0] != "tests"]) == []


def test_the_library_does_not_print() -> None:
    files = [f for f in python_files(*LIBRARY) if f.parts[1] not in ("cli", "claims")]
    assert complaints(prints, files) == []


def test_files_keep_their_budget() -> None:
    sizes = {str(f): code_lines(read(f)) for f in python_files(*LIBRARY)}
    assert {f: size for f, size in sizes.items() if size > CODE_LINES} == {}


def test_every_test_asserts() -> None:
    assert complaints(assertless_tests, [f for f in python_files("tests") if f.name.startswith("test_")]) == []


def test_no_paths_of_one_machine() -> None:
    assert complaints(machine_paths, text_files()) == []


def test_test_files_have_names_of_their_own() -> None:
    names = [f.name for f in python_files("tests") if f.name.startswith("test_")]
    assert sorted(n for n in set(names) if names.count(n) > 1) == []


# ---- imports -------------------------------------------------------------------------------------------------------


def test_optional_packages_are_not_imported_with_a_module() -> None:
    assert complaints(optional_imports, python_files(*LIBRARY, "benchmarks", "train.py")) == []


IMPORT_ALL = """
import importlib, sys
for name in ("torchvision", "timm", "open_clip", "torch_fidelity"):
    sys.modules[name] = None  # an import raises, and find_spec says that the package is not there
for name in sys.argv[1:]:
    importlib.import_module(name)
print(len(sys.argv) - 1)
"""


def test_every_module_imports_without_the_optional_packages() -> None:
    modules = [".".join(f.with_suffix("").parts).removesuffix(".__init__") for f in python_files(*LIBRARY)]
    modules = [m for m in modules if not m.endswith("__main__")]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *modules, "train"], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(len(modules) + 1)


# ---- documents -----------------------------------------------------------------------------------------------------


def anchors(markdown: str) -> set[str]:
    """The anchors that headings get on the usual code hosts."""
    headings = re.findall(r"^#+ +(.+?)\s*$", re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S), flags=re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h) for h in headings]
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in plain}


def broken_links(file: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", read(file), flags=re.M | re.S)
    found = []
    for target in re.findall(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (ROOT / file).parent / path if path else ROOT / file
        if not goal.exists() or (anchor and goal.suffix == ".md" and anchor not in anchors(goal.read_text())):
            found.append(target)
    return found


def test_links_of_the_documents_resolve() -> None:
    assert {str(f): broken_links(f) for f in tree() if f.suffix == ".md" and broken_links(f)} == {}


def test_anchor_of_a_heading() -> None:
    assert anchors("# A `b` c: [d](e)\n```\n# no\n```\n## X_y-z\n") == {"a-b-c-d", "x_y-z"}
