"""The documents say what is there: commands parse, files and tests exist, samples are the code, and add-a-method runs.

In add-a-method.md a comment above each block says how it is run: `run: shell`, `run: write FILE`, both optionally
followed by `needs FOLDER`. A block under `run: shell long: REASON` is run only where the environment variable
LIGHTNING_T2I_LONG_TESTS is set. Links are checked by tests/test_hygiene.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from lightning_t2i.cli.configs import flatten, merge
from lightning_t2i.cli.listing import methods, methods_table
from lightning_t2i.cli.main import VERBS, parse
from lightning_t2i.cli.session import Session
from lightning_t2i.errors import UserError
from lightning_t2i.paths import ROOT

CARDS = sorted((ROOT / "assets" / "tiny").glob("*/README.md"))
DOCUMENTS = [*sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]), *CARDS]
TUTORIAL = ROOT / "docs" / "add-a-method.md"
LONG = "LIGHTNING_T2I_LONG_TESTS"  # environment variable
GAP = 0.5  # of the tutorial's student after 30 steps, below it; before the first step it is above
RUN_VERBS = {"setup", "lint", "test", "slurm-test", "proof", "--help"}  # of ./run itself
USERS = ("my_", "my-", "your")  # names that a page invents for its reader's own files


def short(file: Path) -> str:
    return f"{file.parent.name}/{file.name}" if file in CARDS else file.name


by_name = pytest.mark.parametrize("file", DOCUMENTS, ids=short)


@dataclass
class Block:
    """A fenced block: the comment above it, its language and its text."""

    note: str
    language: str
    text: str


def blocks(markdown: str) -> list[Block]:
    """Those of lists too, without the indentation of their fence."""
    pattern = r"(?:<!-- *(?P<note>[^\n]*?) *-->\n)?^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$"
    return [
        Block(m["note"] or "", m["language"], re.sub(rf"^{m['indent']}", "", m["text"], flags=re.M))
        for m in re.finditer(pattern, markdown, flags=re.M | re.S)
    ]


def written(markdown: str) -> set[str]:
    """Files that a page makes: by a block, or by train.py new."""
    found = {m[1] for b in blocks(markdown) if (m := re.match(r"run: write (\S+)", b.note))}
    for name in re.findall(r"train\.py new (\w+)", markdown):
        found |= {f"lightning_modules/{name}.py", f"configs/{name}/tiny.yaml"}
    return found


def commands(markdown: str) -> list[list[str]]:
    """The words of every command in the shell blocks of a page, without comments and settings of variables."""
    found = []
    for block in blocks(markdown):
        if block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words:
                    end = words.index("&&") if "&&" in words else len(words)
                    command, words = words[:end], words[end + 1 :]
                    while command and re.fullmatch(r"[A-Z][A-Z_0-9]*=.*", command[0]):
                        command = command[1:]
                    found += [command] if command else []
    return found


# ---- what is named exists ------------------------------------------------------------------------------------------


def unknown_tests(markdown: str) -> list[str]:
    """Tests that are named but not there, as tests/FILE.py::test_NAME or as a file alone."""
    found = []
    for path, name in re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", markdown):
        file = ROOT / path
        if path in written(markdown):
            continue
        if not file.is_file() or (name and not re.search(rf"^def {name}\(", file.read_text(), flags=re.M)):
            found.append(f"{path}::{name}")
    return found


def unknown_files(markdown: str) -> list[str]:
    """Files of the tree that are named in code font but not there."""
    folders = "assets|benchmarks|callbacks|configs|constraints|datamodules|docs|lightning_modules|lightning_t2i|tests"
    named = re.findall(rf"`((?:{folders})/[\w./-]+\.(?:py|yaml|json|md|txt))", markdown)
    named += re.findall(r"--config (\S+\.yaml)", markdown)
    return [
        f
        for f in named
        if not (ROOT / f).exists() and f not in written(markdown) and not Path(f).name.startswith(USERS)
    ]


def test_missing_names_are_found() -> None:
    text = "`tests/test_docs.py::test_missing_names_are_found` tests/test_docs.py::test_no tests/no.py"
    assert unknown_tests(text) == ["tests/test_docs.py::test_no", "tests/no.py::"]
    assert unknown_files("`configs/no.yaml` `configs/quickstart.yaml` `docs/my_page.md`") == ["configs/no.yaml"]
    page = "<!-- run: write configs/a.yaml -->\n```yaml\nx: 1\n```\n`configs/a.yaml`\n```\nb\n```\n"
    assert blocks(page) == [Block("run: write configs/a.yaml", "yaml", "x: 1\n"), Block("", "", "b\n")]
    assert unknown_files(page) == []
    assert commands("```bash\nA=1 ./run fit \\\n  --run 'a b' # why\n```") == [["./run", "fit", "--run", "a b"]]
    assert commands("- x:\n\n  ```bash\n  rm -r a && B=2 mv b a\n  ```\n") == [["rm", "-r", "a"], ["mv", "b", "a"]]


@by_name
def test_named_tests_exist(file: Path) -> None:
    assert unknown_tests(file.read_text(encoding="utf-8")) == []


@by_name
def test_named_files_exist(file: Path) -> None:
    assert unknown_files(file.read_text(encoding="utf-8")) == []


# ---- commands ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session() -> Session:
    return Session()


def wrong_command(words: list[str], session: Session, made: set[str]) -> str | None:
    """What is wrong with a command of ours; None for one that would start, and for other programs."""
    if words[:1] == ["./run"] and len(words) > 1 and words[1] in RUN_VERBS:
        return None
    if words[:2] == ["python", "-m"]:
        return None if importlib.util.find_spec(words[2]) else f"no module {words[2]}"
    if words[:2] == ["python", "-c"]:
        module = re.match(r"from ([\w.]+) import", words[2])
        return None if module and importlib.util.find_spec(module[1]) else f"no module in {words[2]}"
    if words[:1] == ["python"] and len(words) > 1 and words[1] != "train.py":
        return None if (ROOT / words[1]).is_file() or words[1] in made else f"no file {words[1]}"
    ours = words[1:] if words[:1] == ["./run"] else words[2:] if words[:2] == ["python", "train.py"] else None
    if ours is None or ours[0].startswith("-"):
        return None
    request = parse(ours)
    if not request.configs or request.help or any(str(c) in made or c.name.startswith(USERS) for c in request.configs):
        return None
    session.parse(merge(request.configs, request.overrides), request.verb)
    return None


@by_name
def test_commands_would_start(file: Path, session: Session) -> None:
    """Verbs, options, configs and overrides are parsed as train.py parses them, which raises what is wrong."""
    markdown = file.read_text(encoding="utf-8")
    wrong = [(words, wrong_command(words, session, written(markdown))) for words in commands(markdown)]
    assert [w for w in wrong if w[1]] == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("./run fitt --config configs/quickstart.yaml", "fitt"),
        ("python train.py fit --config configs/quickstrat.yaml", "quickstrat"),
        ("python train.py fit --config configs/quickstart.yaml --trainer.max_step 5", "max_step"),
        ("python -m datamodules.pakc a b", "no module datamodules.pakc"),
        ("python benchmarks/none.py", "no file benchmarks/none.py"),
        ("python -c 'from lightning_t2i.networks.none import Towers'", "no module in from lightning_t2i.networks.none"),
    ],
)
def test_wrong_commands_are_noticed(line: str, said: str, session: Session) -> None:
    try:
        complaint = wrong_command(shlex.split(line), session, set())
    except UserError as error:  # of train.py's own parser
        complaint = str(error)
    assert complaint is not None and said in complaint


def in_chains(words: list[str]) -> list[list[str]]:
    """A command, or those of the chain that it runs."""
    if words[:3] != ["python", "-m", "lightning_t2i.chain"]:
        return [words]
    lines = (ROOT / words[3]).read_text(encoding="utf-8").splitlines()
    return [["python", "train.py", *line.split()] for line in lines if line and not line.startswith("#")]


def refused_exports(found: list[list[str]]) -> list[str]:
    """Exports of shipped folders that would stop: the folder is there, or it is gone and the run's config reads it."""
    configs: dict[str, str] = {}
    gone: set[str] = set()
    wrong = []
    for words in chain.from_iterable(map(in_chains, found)):
        if words[:3] == ["python", "train.py", "fit"]:
            configs[words[words.index("--run") + 1]] = words[words.index("--config") + 1]
        elif words[:2] == ["rm", "-r"]:
            gone |= set(words[2:])
        elif words[:3] == ["python", "train.py", "export"]:
            out, run = words[3], words[words.index("--run") + 1]
            known = merge([ROOT / configs[run]]).config
            if (ROOT / out).exists() and (out not in gone or out in flatten(known).values()):
                wrong.append(out)
            gone.discard(out)
    return wrong


@pytest.mark.parametrize("file", CARDS, ids=short)
def test_cards_rebuild_what_is_there(file: Path) -> None:
    assert refused_exports(commands(file.read_text(encoding="utf-8"))) == []


def test_an_export_into_a_folder_or_of_what_it_needs_is_noticed() -> None:
    fit, export = "python train.py fit --config configs/tokenizer/tiny_decoder.yaml --run a", "python train.py export"
    vae, sd = "assets/tiny/vae", "assets/tiny/sd"
    assert refused_exports([fit.split(), f"{export} {sd} --run a".split()]) == [sd]
    assert refused_exports([fit.split(), ["rm", "-r", sd], f"{export} {sd} --run a".split()]) == []
    assert refused_exports([fit.split(), ["rm", "-r", vae], f"{export} {vae} --run a".split()]) == [vae]


def configs_named(markdown: str) -> set[str]:
    """Configs by their last folder and name: as a path, or as a name in code font behind another one of its folder."""
    found = set()
    for line in markdown.splitlines():
        folder = ""
        for there, name in re.findall(r"(?:([\w-]+)/|`)([\w.-]+\.yaml)", line):
            folder = there or folder
            found.add(f"{folder}/{name}")
    return found


def test_every_config_is_in_a_page() -> None:
    named = set().union(*(configs_named(file.read_text(encoding="utf-8")) for file in DOCUMENTS))
    configs = [file.relative_to(ROOT) for file in sorted((ROOT / "configs").rglob("*.yaml"))]
    assert [str(file) for file in configs if "/".join(file.parts[-2:]) not in named] == []


def test_names_of_configs_are_found() -> None:
    text = "`configs/a/b.yaml`, `c.yaml`: base [../d/e.yaml]\n`f.yaml` and configs/g.yaml"
    assert configs_named(text) == {"a/b.yaml", "a/c.yaml", "d/e.yaml", "/f.yaml", "configs/g.yaml"}


def test_every_verb_is_described_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [verb for verb in VERBS if f"`{verb}`" not in readme] == []


# ---- samples of code -----------------------------------------------------------------------------------------------


def differs_from_source(block: Block) -> bool:
    """Whether a block under `from FILE` is not in that file; its parts are divided by lines of `...`."""
    source = (ROOT / block.note.removeprefix("from ")).read_text(encoding="utf-8")
    parts = re.split(r"^ *\.\.\.\n", block.text, flags=re.M)
    return not all(part.strip("\n") in source for part in parts)


@by_name
def test_samples_are_the_code(file: Path) -> None:
    samples = [b for b in blocks(file.read_text(encoding="utf-8")) if b.note.startswith("from ")]
    assert [b.text for b in samples if differs_from_source(b)] == []
    assert samples or file != ROOT / "README.md"


def test_a_changed_sample_is_noticed() -> None:
    lines = (ROOT / "train.py").read_text(encoding="utf-8").splitlines(keepends=True)
    assert not differs_from_source(Block("from train.py", "python", lines[2] + "...\n" + lines[-1]))
    assert differs_from_source(Block("from train.py", "python", lines[-1].replace("main", "mian")))


def test_stock_pipelines_are_read_in_one_precision() -> None:
    """Folders are in float16: diffusers makes its networks float32, transformers leaves the text encoder as it is."""
    pattern = r"StableDiffusionPipeline\.from_pretrained\(.*\)"
    lines = [line for file in DOCUMENTS for line in re.findall(pattern, file.read_text(encoding="utf-8"))]
    assert len(lines) >= 5 and [line for line in lines if "dtype=torch.float32" not in line] == []


def test_the_stock_pipeline_of_the_readme_draws(tmp_path, monkeypatch) -> None:
    (sample,) = [b.text for b in blocks((ROOT / "README.md").read_text("utf-8")) if "StableDiffusionPipeline" in b.text]
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    exec(compile(sample, "README.md", "exec"), {})
    with Image.open("circle.png") as picture:
        assert picture.size == (32, 32) and len(picture.getcolors(1024) or ()) > 1


# ---- the list of methods -------------------------------------------------------------------------------------------


def published(markdown: str) -> list[str]:
    """Methods with a row in the table of docs/methods.md: what its first column links to or names in code font."""
    rows = [line for line in markdown.splitlines() if line.startswith("|")][2:]
    return [re.search(r"\w+", row.split("|")[1])[0] for row in rows]  # type: ignore[index]


def missing(name: str, root: Path = ROOT) -> list[str]:
    """Files that a published method lacks."""
    wanted = [
        f"lightning_modules/{name}.py",
        f"configs/{name}/tiny.yaml",
        f"tests/lightning_modules/test_{name}.py",
        f"lightning_t2i/claims/{name}.py",
        f"docs/{name}.md",
        f"docs/results/{name}.json",
        f"docs/results/{name}.md",
    ]
    return [path for path in wanted if not (root / path).is_file()]


def test_published_methods_are_complete() -> None:
    names = published((ROOT / "docs" / "methods.md").read_text(encoding="utf-8"))
    assert {name: missing(name) for name in names if missing(name)} == {}


def test_a_published_method_without_its_parts_is_noticed(tmp_path) -> None:
    table = "| method | x |\n|---|---|\n| [abc](abc.md) | 1 |\n| `deme` | 2 |\n"
    assert published(table) == ["abc", "deme"]
    assert len(missing("abc", tmp_path)) == 7
    assert published("none\n") == []


def test_every_method_file_is_listed() -> None:
    """Either as published or among those that make teachers; nothing is published by accident."""
    markdown = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert [name for name in methods() if f"{name}.py" not in markdown and name not in published(markdown)] == []
    shown = {line.split()[0]: "(not published)" not in line for line in methods_table().splitlines()}
    if published(markdown):  # with an empty table nothing is marked
        assert {name for name, is_published in shown.items() if is_published} == set(published(markdown))


# ---- the tutorial, executed ----------------------------------------------------------------------------------------


def copy_of_the_tree(folder: Path) -> Path:
    """What add-a-method needs of the repository, so that nothing is written into it."""
    for name in ("lightning_t2i", "lightning_modules", "callbacks", "datamodules", "configs", "assets"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests/lightning_modules", "docs/results", "docs/images"):
        (folder / name).mkdir(parents=True)
    shutil.copytree(ROOT / "tests/helpers", folder / "tests/helpers", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def run_page(markdown: str, folder: Path, environment: dict[str, str]) -> list[str]:
    """Runs the marked blocks in order; returns why blocks were left out: a folder is missing, or they take long."""
    left_out = []
    for block in blocks(markdown):
        what, _, needed = block.note.removeprefix("run: ").partition(" needs ")
        kind, is_long, reason = what.partition(" long: ")
        if is_long:
            what = kind
        if needed and not any((folder / needed).glob("*.json")):
            left_out.append(f"{needed} is missing")
        elif is_long and LONG not in environment:
            left_out.append(reason)
        elif what.startswith("write "):
            target = folder / what.removeprefix("write ")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text, encoding="utf-8")
        elif what == "shell":
            done = subprocess.run(
                ["bash", "-euc", block.text],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=3600 if is_long else 900,
            )
            assert done.returncode == 0, f"{block.text}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        else:
            raise AssertionError(f"the comment above this block does not say how it is run: {block}")
    return left_out


@pytest.mark.slow
@pytest.mark.timeout(3600 if LONG in os.environ else 1200)
def test_add_a_method_runs_as_written(tmp_path) -> None:
    folder = copy_of_the_tree(tmp_path / "copy")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LIGHTNING_T2I_", "SLURM_", "PYTEST_"))}
    environment |= {LONG: "1"} if LONG in os.environ else {}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # `python` is this one
        "LIGHTNING_T2I_RUNS": str(tmp_path / "runs"),
        "LIGHTNING_T2I_DATA": os.environ.get("LIGHTNING_T2I_DATA", str(ROOT / "data")),  # the worlds are made once
        "PYTHONPATH": str(folder),
    }
    page = TUTORIAL.read_text(encoding="utf-8")
    left_out = run_page(page, folder, environment)
    assert (tmp_path / "runs" / "my_lcm-0" / "report.md").is_file()
    config = yaml.safe_load((tmp_path / "runs" / "my_lcm-0" / "config.yaml").read_text())
    assert config["model"]["class_path"] == "lightning_modules.my_lcm.MyLcm"
    assert len(left_out) == (0 if LONG in environment else page.count("run: shell long: "))

    run = tmp_path / "runs" / "my_lcm-1"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    gaps = {line["step"]: line["val/gap"] for line in lines if "val/gap" in line}
    assert gaps[30] < GAP < gaps[0]
    assert any("student/loss" in line for line in lines)
    assert (run / "checkpoints" / "step-00000032").is_dir()
    assert list((run / "samples").glob("*.png"))
    assert "test/shapes_score/overall@n=100" in (run / "test.jsonl").read_text()
    scores = json.loads((folder / "my_lcm.json").read_text())["scores"]
    assert scores["student, 4 steps"]["overall"][0] > scores["teacher, 4 steps, guidance 4.5"]["overall"][0]
    assert (folder / "my_lcm.png").is_file()
    if LONG in environment:
        assert_students_are_ahead(json.loads((folder / "docs/results/lcm.json").read_text()))


def assert_students_are_ahead(result: dict[str, Any]) -> None:
    """The claim of the page: in four steps the student is better than the teacher at either of its guidances."""
    rivals = [values for name, values in result["scores"].items() if name.startswith("teacher, 4 steps")]
    assert len(rivals) == 2 and result["n"] >= 400
    assert all(values["student_ahead"][1] > 0 for values in rivals)


def test_result_of_the_tutorial_is_what_its_page_says() -> None:
    """The committed measurement supports the claim, belongs to the page's config, and stands on the page."""
    result, page = json.loads((ROOT / "docs/results/lcm.json").read_text()), TUTORIAL.read_text(encoding="utf-8")
    assert_students_are_ahead(result)
    (config,) = [b.text for b in blocks(page) if b.note == "run: write configs/my_lcm/tiny.yaml"]
    assert result["steps"] == yaml.safe_load(config)["trainer"]["max_steps"]
    shown = {f"{v:.3f}".removeprefix("0") for values in result["scores"].values() for v in values["overall"]}
    assert [figure for figure in sorted(shown) if figure not in page] == []


def test_a_block_without_its_comment_is_an_error(tmp_path) -> None:
    with pytest.raises(AssertionError, match="does not say how"):
        run_page("```bash\ntrue\n```\n", tmp_path, {})
    with pytest.raises(AssertionError, match="false"):
        run_page("<!-- run: shell -->\n```bash\nfalse\n```\n", tmp_path, dict(os.environ))
    assert run_page("<!-- run: shell needs x -->\n```bash\nfalse\n```\n", tmp_path, {}) == ["x is missing"]
    page = "<!-- run: shell long: an hour -->\n```bash\ntouch made\n```\n"
    assert run_page(page, tmp_path, dict(os.environ) | {LONG: ""}) == [] and (tmp_path / "made").is_file()
    assert run_page(page.replace("touch", "false"), tmp_path, {}) == ["an hour"]
