"""Chains of commands: each once, in order, on from where a kill left them; what changes them; mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import programs
import pytest
import yaml
from distilling import words_file
from tiny_networks import pipeline_folder

from lightning_t2i import chain
from lightning_t2i.chain import Chain, main, read
from lightning_t2i.errors import UserError


class Commands:
    """Stands in for subprocess: notes the words of each command and makes what it would leave."""

    def __init__(self, root: Path):
        self.root, self.said, self.code = root, [], 0

    def run(self, command: list[str]) -> subprocess.CompletedProcess:
        words = command[2:]
        self.said.append(words)
        if self.code == 0 and words[0] == "export":
            Path(words[1]).mkdir(parents=True)
        return subprocess.CompletedProcess(command, self.code)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LIGHTNING_T2I_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("trainer: {max_steps: 3}\n")
    lines = [
        "# three",
        "predict --config a.yaml",
        "",
        "fit --config a.yaml --run r  # reflow",
        "export out/flow --run r",
    ]
    (tmp_path / "my.chain").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def commands(place, monkeypatch) -> Commands:
    stand_in = Commands(place)
    monkeypatch.setattr(chain, "subprocess", stand_in)
    return stand_in


def test_commands_run_once_and_in_order(place, commands, capsys) -> None:
    assert main(["my.chain"]) == 0
    assert [words[0] for words in commands.said] == ["predict", "fit", "export"]
    assert (place / "out/flow").is_dir() and not (place / "out/flow.part").exists()
    assert main(["my.chain"]) == 0 and len(commands.said) == 3
    assert capsys.readouterr().out.count("done") == 3


def test_a_failed_command_stops_the_chain_and_is_run_again(place, commands) -> None:
    commands.code = 7
    assert main(["my.chain"]) == 7 and len(commands.said) == 1
    commands.code = 0
    assert main(["my.chain"]) == 0
    assert [words[0] for words in commands.said] == ["predict", "predict", "fit", "export"]


def test_what_a_change_repeats(place, commands) -> None:
    main(["my.chain"])
    (place / "a.yaml").write_text("# a comment\ntrainer: {max_steps: 3}\n")
    main(["my.chain"])
    assert len(commands.said) == 3  # comments do not count
    keys = [stage.key for stage in read(Path("my.chain"))]
    (place / "a.yaml").write_text("trainer: {max_steps: 4}\n")
    assert not set(keys) & {stage.key for stage in read(Path("my.chain"))}  # what comes after it depends on it
    (place / "a.yaml").write_text("trainer: {max_steps: 3}\n")
    text = (place / "my.chain").read_text()
    (place / "my.chain").write_text(text.replace("--run r  #", "--run r --model.x 1  #"))
    again = [stage.key for stage in read(Path("my.chain"))]
    assert again[0] == keys[0] and again[1] != keys[1] and again[2] != keys[2]


def test_a_training_that_ended_is_not_begun_again(place, commands) -> None:
    stages = Chain(Path("my.chain")).stages
    found = Chain(Path("my.chain"))
    found.note(stages[0], "done")
    found.note(stages[1], "begun")  # killed after the end of the training
    (place / "runs/r").mkdir(parents=True)
    (place / "runs/r/finished").write_text("{}")
    assert main(["my.chain"]) == 0
    assert [words[0] for words in commands.said] == ["export"]


def test_the_end_of_a_training_of_other_words_is_not_this_ones(place, commands) -> None:
    """train.py refuses to go on with another config; the chain must not take the old end for the new one's."""
    assert main(["my.chain"]) == 0
    (place / "runs/r").mkdir(parents=True)
    (place / "runs/r/finished").write_text("{}")
    (place / "a.yaml").write_text("trainer: {max_steps: 4}\n")
    commands.said.clear()
    run = commands.run
    commands.run = lambda command: subprocess.CompletedProcess(run(command).args, 2 * (command[2] == "fit"))
    assert [main(["my.chain"]), main(["my.chain"])] == [2, 2]
    assert [words[0] for words in commands.said] == ["predict", "fit", "fit"]


def test_an_export_has_its_name_when_it_is_whole(place, commands) -> None:
    main(["my.chain"])
    (place / "out/flow").rename(place / "out/flow.part")  # killed before the last rename
    assert main(["my.chain"]) == 0 and len(commands.said) == 3 and (place / "out/flow").is_dir()
    (place / "out/flow").rmdir()
    (place / "out/flow.part").mkdir()
    next((place / "runs/chains").glob("*-my.json")).unlink()
    main(["my.chain"])  # a part that is no whole export is written anew
    assert len(commands.said) == 6


def test_folders_of_others_are_not_replaced(place, commands, capsys) -> None:
    (place / "out/flow").mkdir(parents=True)
    assert main(["my.chain"]) == 2
    assert "did not make it" in capsys.readouterr().err and len(commands.said) == 2


def test_the_list_runs_nothing(place, commands, capsys) -> None:
    assert main(["my.chain", "--list"]) == 0 and commands.said == []
    assert capsys.readouterr().out.count("missing") == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no command"),
        ("fly --config a.yaml", "Unknown verb"),
        ("check --config a.yaml", "Not a command of a chain"),
        ("export --run r", "Not a command of a chain"),
        ("fit --config none.yaml", "none.yaml"),
    ],
)
def test_mistakes_are_told(place, text, message) -> None:
    (place / "bad.chain").write_text(text)
    with pytest.raises(UserError, match=message):
        read(Path("bad.chain"))
    assert main(["bad.chain"]) == 2
    with pytest.raises(UserError, match="no such chain"):
        read(Path("none.chain"))


@pytest.mark.parametrize("chain", ["tiny", "tiny_long"])
def test_the_shipped_chains_make_what_their_commands_read(repo, chain) -> None:
    stages = read(repo / f"configs/instaflow/{chain}.chain")
    verbs = [s.request.verb for s in stages]
    assert verbs[:5] == ["predict", "fit", "export", "predict", "fit"]
    from lightning_t2i.cli.configs import merge

    found = [merge(s.request.configs, s.request.overrides).config for s in stages if s.request.configs]
    pairs, reflow, flow_pairs, *distilled = (c["data"]["init_args"] for c in found)
    assert pairs["predict"]["init_args"]["folder"] == reflow["main"]["init_args"]["source"]
    flow, about = found[2]["model"]["init_args"], [c["model"]["init_args"] for c in found]
    assert str(stages[2].out) == flow["network"] and flow["guidance"] == about[1]["alpha"]
    assert about[0]["guidance"] == about[1]["guidance"] and len(distilled) == verbs.count("fit") - 1
    for data, method in zip(distilled, about[3:], strict=True):
        assert flow_pairs["predict"]["init_args"]["folder"] == data["main"]["init_args"]["source"]
        assert flow["network"] == method["teacher"] == data["main"]["init_args"]["teacher"]
        assert flow["guidance"] == method["guidance"]
    assert all(s["predict"]["init_args"]["limit"] == 2000 for s in (pairs, flow_pairs))
    trained, exported = ([s.request.run for s in stages if s.request.verb == verb] for verb in ("fit", "export"))
    assert trained == exported


# ---- a real chain, killed --------------------------------------------------------------------------------------------

KILLER = """
import os, signal, sys
sys.path[:0] = {path!r}
from datamodules import pair_shards
inner = pair_shards.ShardInProgress.write
def write(self, positions, *rest):
    inner(self, positions, *rest)
    if positions[0] >= 16:  # in the second shard
        os.kill(os.getpid(), signal.SIGKILL)
if {kill}:
    pair_shards.ShardInProgress.write = write
from lightning_t2i.cli.main import main
sys.exit(main({words!r}))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a teacher and the configs of a chain of six commands on it."""
    folder = tmp_path_factory.mktemp("chain")
    teacher = str(pipeline_folder(folder / "sd"))
    prompts = words_file(folder)

    def pairs(name: str, network: str, **options) -> None:
        job = {"source": prompts, "folder": str(folder / f"pairs-{name}"), "batch_size": 8, "samples_per_shard": 16}
        model = {
            "class_path": "lightning_modules.teacher.Teacher",
            "init_args": {"network": network, "steps": 2, **options},
        }
        stream = {"class_path": "datamodules.pair_prompts.PairPrompts", "init_args": job}
        write(f"pairs-{name}", model, {"predict": stream})

    def stage(name: str, kind: str, network: str, source: str, **options) -> None:
        model = {"class_path": f"lightning_modules.instaflow.{kind}", "init_args": {"teacher": network, **options}}
        main = {"source": str(folder / f"pairs-{source}"), "teacher": network, "batch_size": 4}
        val = {
            "class_path": "datamodules.prompts.Prompts",
            "init_args": {"source": prompts, "batch_size": 8, "limit": 8},
        }
        write(name, model, {"main": {"class_path": "datamodules.pairs.Pairs", "init_args": main}, "val": val})

    def write(name: str, model: dict, streams: dict) -> None:
        off = {key: {"enabled": False} for key in ("samples", "throughput")}
        trainer = {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 4,
            "val_check_interval": 4,
            "enable_progress_bar": False,
        }
        content = {"model": model, "trainer": trainer, "tracking": {"wandb": "off"}, "checkpoints": {"every": 2}, **off}
        content["data"] = {"class_path": "datamodules.streams.Streams", "init_args": streams}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))

    flow = str(folder / "flow")
    pairs("1", teacher, guidance=3.0, solver="dpmpp_2m")
    pairs("2", flow, guidance=1.5, solver="euler")
    stage("reflow", "Reflow", teacher, "1", guidance=3.0, init_steps=1, val_steps=2, steps=2)
    stage("distill", "OneStep", flow, "2", val_steps=2)
    lines = ["predict --config pairs-1.yaml", "fit --config reflow.yaml --run reflow", f"export {flow} --run reflow"]
    lines += [
        "predict --config pairs-2.yaml",
        "fit --config distill.yaml --run distill",
        "export student --run distill",
    ]
    (folder / "all.chain").write_text("\n".join(lines))
    return folder


@pytest.mark.slow
def test_a_killed_generation_repeats_no_finished_shard_and_the_chain_goes_on(world, monkeypatch) -> None:
    monkeypatch.setenv("LIGHTNING_T2I_RUNS", str(world / "runs"))
    monkeypatch.chdir(world)
    path = [str(chain.ROOT)]
    first = Chain(Path("all.chain"))
    script = world / "killed.py"
    script.write_text(KILLER.format(path=path, kill=True, words=first.stages[0].words))
    assert programs.run([sys.executable, str(script)]).returncode == -signal.SIGKILL
    first.note(first.stages[0], "begun")
    (shard,) = (world / "pairs-1").glob("*.tar")
    before = shard.stat().st_mtime_ns, shard.read_bytes()
    monkeypatch.setattr(chain, "subprocess", programs)
    monkeypatch.setattr(programs, "run", _told(programs.run), raising=True)
    assert main(["all.chain"]) == 0
    assert (shard.stat().st_mtime_ns, shard.read_bytes()) == before
    assert json.loads((world / "pairs-1/dataset.json").read_text())["splits"]["train"] == 32
    assert (world / "student/model_index.json").is_file() and (world / "student/scheduler/flow_scheduler.py").is_file()
    known = Chain(Path("all.chain")).known()
    assert list(known.values()) == ["done"] * 6
    listed = os.listdir(world / "runs")
    assert {"reflow", "distill"} <= set(listed)


def _told(run):
    """A failing command shows what it said."""

    def told(command, **settings):
        done = run(command, **settings)
        if done.returncode:
            sys.stderr.write(f"{done.stdout}\n{done.stderr}")
        return done

    return told
