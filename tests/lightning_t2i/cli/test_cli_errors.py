"""Mistakes of a config: all of them at once, each with its key, its value and its repair."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import yaml

from lightning_t2i.cli.configs import Merged, flatten, merge
from lightning_t2i.cli.errors import Mistakes
from lightning_t2i.cli.main import main
from lightning_t2i.cli.session import Session
from lightning_t2i.errors import UserError

GOOD = {
    "model": {"class_path": "toy.Toy", "init_args": {"common": {"seed": 3}}},
    "data": {"class_path": "toy.ToyData", "init_args": {"batch_size": 8}},
    "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 2},
}


@cache
def session() -> Session:
    return Session()


def mistakes(changes: dict, verb: str = "fit") -> list[str]:
    """The messages for the good config with dotted changes; None removes a key."""
    found = Merged()
    for key, value in copy.deepcopy(GOOD).items():
        found.add((key,), value, "good.yaml")
    for key, value in changes.items():
        if value is None:
            del found.config[key]
        else:
            found.add(tuple(key.split(".")), value, "bad.yaml")
    try:
        session().parse(found, verb)
        session().construct()
    except Mistakes as error:
        return [str(e) for e in error.errors]
    return []


def test_a_good_config_has_none() -> None:
    assert mistakes({}) == []


CASES = {
    "unknown section": (
        {"sampels": {"every": 3}},
        ["Unknown key", "sampels (bad.yaml)", "write samples instead of sampels"],
    ),
    "unknown trainer key": (
        {"trainer.max_stepz": 3},
        ["trainer.max_stepz (bad.yaml)", "given:   3", "write max_steps"],
    ),
    "unknown option": ({"samples.evry": 3}, ["samples.evry (bad.yaml)", "write every instead of evry"]),
    "unknown method option": (
        {"model.init_args.droput": 0.5},
        ["model.init_args.droput (bad.yaml)", "given:   0.5", "write dropout instead"],
    ),
    "unknown nested option": (
        {"model.init_args.common.sead": 1},
        ["model.init_args.common.sead (bad.yaml)", "allowed: seed, accumulate", "write seed"],
    ),
    "unknown optimizer option": (
        {"model.init_args.critic.optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lrr": 1}}},
        ["model.init_args.critic.optimizer.init_args.lrr (bad.yaml)", "write lr instead of lrr"],
    ),
    "wrong type": (
        {"trainer.max_steps": "three"},
        ["trainer.max_steps (bad.yaml)", "given:   'three'", "allowed: int"],
    ),
    "wrong nested type": (
        {"model.init_args.common.seed": "x"},
        ["model.init_args.common.seed (bad.yaml)", "given:   'x'", "allowed: int"],
    ),
    "not one of": ({"tracking.wandb": "onlin"}, ["tracking.wandb", "offline, online, off", "did you mean online?"]),
    "number or nothing": (
        {"model.init_args.critic.clip": "x"},
        ["model.init_args.critic.clip", "allowed: float or null"],
    ),
    "unknown class": (
        {"model.class_path": "lightning_modules.tokenizer.Tokeniser"},
        ["model.class_path (bad.yaml)", "given:   lightning_modules.tokenizer.Tokeniser", "tokenizer.Tokenizer"],
    ),
    "unknown module": (
        {"model.class_path": "lightning_modules.tokeniser.Tokenizer"},
        ["There is no such class", "class_path: lightning_modules.tokenizer.Tokenizer"],
    ),
    "unknown module of data": (
        {"data": {"class_path": "datamodules.stream.Streams"}},
        [
            "There is no such class",
            "given:   datamodules.stream.Streams",
            "fix:     class_path: datamodules.streams.Streams",
        ],
    ),
    "unknown optimizer": (
        {"model.init_args.critic.optimizer": {"class_path": "torch.optim.AdamWW"}},
        ["model.init_args.critic.optimizer.class_path", "class_path: torch.optim.AdamW"],
    ),
    "class of another kind": (
        {"model.class_path": "toy.ToyData"},
        ["not of the kind that belongs here", "model.class_path", "toy.ToyData"],
    ),
    "missing option": (
        {"model": {"class_path": "lightning_modules.tokenizer.Tokenizer"}},
        ["A value is missing", "where:   model.init_args.network", "--model.init_args.network VALUE"],
    ),
    "wrong type of what is required": (
        {"model": {"class_path": "lightning_modules.tokenizer.Tokenizer", "init_args": {"network": [1]}}},
        ["model.init_args.network (bad.yaml)", "given:   [1]", "allowed: str"],
    ),
    "unknown option of a callback": (
        {"trainer.callbacks": [{"class_path": "kills.KillAt", "init_args": {"wrong": 1}}]},
        ["Unknown key", "remove wrong"],
    ),
    "no model": ({"model": None}, ["A section is missing", "where:   model"]),
    "no steps": ({"trainer.max_steps": 0}, ["at least one step", "trainer.max_steps (bad.yaml)", "given:   0"]),
    "refused by a constructor": (
        {"model.init_args.common.accumulate": 0},
        ["accumulate must be at least 1", "model.init_args.common.accumulate", "given:   0"],
    ),
    "refused by a callback's options": ({"checkpoints.every": -1}, ["interval is negative", "given:   -1"]),
    "Lightning's accumulation": (
        {"trainer.accumulate_grad_batches": 2},
        ["another place", "trainer.accumulate_grad_batches (bad.yaml)", "model.init_args.common.accumulate"],
    ),
    "Lightning's clipping": ({"trainer.gradient_clip_val": 1.0}, ["the `clip` of a method's group"]),
    "another strategy": ({"trainer.strategy": "ddp"}, ["FSDP2", "given:   ddp", "does what DDP does"]),
    "a linked value": ({"data.init_args.seed": 5}, ["follows the method's", "set model.init_args.common.seed alone"]),
}


@pytest.mark.parametrize("name", CASES)
def test_one_mistake_is_told_once_and_in_full(name) -> None:
    changes, parts = CASES[name]
    found = mistakes(changes)
    assert len(found) == 1, found
    for part in parts:
        assert part in found[0], found[0]


def test_no_steps_at_all() -> None:
    found = Merged(config={**copy.deepcopy(GOOD), "trainer": {"accelerator": "cpu"}})
    with pytest.raises(Mistakes, match="how long to train"):
        session().parse(found, "fit")
    session().parse(found, "validate")  # needs none


def test_five_mistakes_of_one_file_are_told_together(tmp_path, capsys) -> None:
    bad = copy.deepcopy(GOOD)
    bad["base"] = ["nowhere.yaml"]
    bad["trainer"] |= {"max_steps": "three", "acelerator": "cpu"}
    bad["data"]["class_path"] = "toy.ToyDatum"
    bad["checkpoints"] = {"every": -1}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(bad))
    assert main(["fit", "--config", str(tmp_path / "bad.yaml")]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: 5 problems") and "Traceback" not in text
    for part in (
        "nowhere.yaml",
        "allowed: int",
        "write accelerator instead of acelerator",
        "class_path: toy.ToyData",
        "given:   -1",
    ):
        assert part in text
    assert "6. " not in text


def test_several_mistakes_of_constructors_are_told_together() -> None:
    found = mistakes(
        {
            "model.init_args.common.accumulate": 0,
            "model.init_args.critic.clip": -1.0,
            "model.init_args.generator.ema": {"decay": 2.0},
            "samples.count": 0,
        }
    )
    keys = ["common.accumulate", "critic.clip", "generator.ema.decay", "samples.count"]
    assert len(found) == 4
    assert all(any(key in text for text in found) for key in keys), found


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("from torch import nothing_like_it", "cannot import name 'nothing_like_it'"),
        ("import nothing_like_it", "No module named 'nothing_like_it'"),
        ("x = = 1", "SyntaxError"),
        ("x = undefined", "NameError: name 'undefined' is not defined"),
    ],
)
@pytest.mark.parametrize("key", ["model", "model.init_args.critic.optimizer"])
def test_a_module_that_fails_to_import_says_why(tmp_path, monkeypatch, key, code, reason) -> None:
    name = f"broken_{abs(hash((code, key)))}"
    (tmp_path / f"{name}.py").write_text(f"{code}\n\nclass Thing:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = mistakes({key: {"class_path": f"{name}.Thing"}})
    assert len(found) == 1 and "cannot be imported" in found[0] and reason in found[0], found
    assert f"{key}.class_path (bad.yaml)" in found[0] and f"import {name}" in found[0]


def test_many_mistakes_end() -> None:
    found = mistakes({f"trainer.wrong_{i}": i for i in range(30)})
    assert 15 <= len(found) <= 21


def test_later_user_errors_are_told_likewise(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("LIGHTNING_T2I_RUNS", str(tmp_path / "runs"))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(GOOD | {"tracking": {"wandb": "off"}}))
    words = ["fit", "--config", str(tmp_path / "c.yaml")]

    def refuse(self):
        raise UserError("No such weights", where="model.network", given="x", fix="y")

    monkeypatch.setattr("toy.Toy.configure_model", refuse)
    assert main(words) == 2
    assert capsys.readouterr().err.endswith(
        "error: No such weights\n  where:   model.network\n  given:   x\n  fix:     y\n"
    )
    assert main([*words, "--run", "two", "--trainer.devices", "2"]) == 2
    assert "FSDP2" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "two").exists()  # refused before a folder is made


def test_the_resolved_config_reads_back_as_itself(tmp_path) -> None:
    found = Merged(config=copy.deepcopy(GOOD))
    found.config["model"]["init_args"]["generator"] = {"ema": {"decay": 0.5}}  # its optimizer's default is a lambda
    first = session().parse(found, "fit")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(first))
    assert session().parse(merge([tmp_path / "config.yaml"]), "fit") == first
    flat = flatten(first)
    assert flat["model.init_args.common.seed"] == 3 and "data.init_args.seed" not in flat
    assert not any("serialize" in str(value) for value in flat.values())


def test_the_data_follow_the_methods_seed_and_accumulation() -> None:
    found = Merged(config=copy.deepcopy(GOOD))
    session().parse(found, "fit")
    session().construct()
    assert session().data.seed == session().method.common.seed == 3
