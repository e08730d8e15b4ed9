"""Config files: `base:` merging, overrides, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_t2i.cli.configs import flatten, merge, read_yaml


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / "main.yaml"


def merged(folder: Path, *overrides: tuple[str, str | None], **files: str):
    return merge([write(folder, **files)], overrides)


def test_bases_are_merged_in_order_and_the_file_wins(tmp_path) -> None:
    found = merged(
        tmp_path,
        a="trainer: {max_steps: 1, devices: 1}\nlist: [1, 2]",
        b="trainer: {max_steps: 2, precision: x}\nlist: [3]",
        main="base: [a.yaml, b.yaml]\ntrainer: {precision: y}",
    )
    assert found.errors == []
    assert found.config == {"trainer": {"max_steps": 2, "devices": 1, "precision": "y"}, "list": [3]}
    assert found.source_of("trainer.devices").endswith("a.yaml")
    assert found.source_of("trainer.precision").endswith("main.yaml")


def test_bases_are_relative_to_their_file_and_nest(tmp_path, monkeypatch) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "deep.yaml").write_text("base: y/deeper.yaml\nk: {b: 2}")
    (tmp_path / "x" / "y" / "deeper.yaml").write_text("k: {a: 1, b: 1}")
    monkeypatch.chdir("/")
    assert merged(tmp_path, main="base: x/deep.yaml\nk: {c: 3}").config == {"k": {"a": 1, "b": 2, "c": 3}}


def test_configs_of_the_command_line_merge_in_order(tmp_path) -> None:
    write(tmp_path, main="k: {a: 1, b: 1}", second="k: {b: 2}")
    found = merge([tmp_path / "main.yaml", tmp_path / "second.yaml"], [("k.c", "3")])
    assert found.config == {"k": {"a": 1, "b": 2, "c": 3}}


def test_a_path_is_found_from_here_and_then_beside_train_py(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert merge([Path("configs/diffusion/tiny.yaml")]).config["model"]["class_path"].endswith("Diffusion")
    (tmp_path / "configs" / "diffusion").mkdir(parents=True)
    (tmp_path / "configs" / "diffusion" / "tiny.yaml").write_text("mine: 1")
    assert merge([Path("configs/diffusion/tiny.yaml")]).config == {"mine": 1}


def test_circles_are_refused(tmp_path) -> None:
    found = merged(tmp_path, main="base: a.yaml", a="base: [b.yaml]", b="base: main.yaml")
    assert len(found.errors) == 1 and "circle" in str(found.errors[0])
    assert str(found.errors[0]).count("main.yaml") == 2


def test_a_file_may_be_named_twice_without_a_circle(tmp_path) -> None:
    found = merged(tmp_path, main="base: [a.yaml, b.yaml]", a="base: c.yaml", b="base: c.yaml", c="k: 1")
    assert (found.errors, found.config) == ([], {"k": 1})


def test_a_missing_base_is_named_with_the_nearest_file(tmp_path) -> None:
    found = merged(tmp_path, main="base: cpuu.yaml\nk: 1", cpu="k: 2")
    assert "main.yaml does not exist" in str(found.errors[0]) and str(found.errors[0]).count("cpu.yaml") == 1
    assert found.config == {"k": 1}


CLASS = "data: {class_path: a.A, init_args: {x: 1, y: 2}}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {init_args: {y: 3}}", {"class_path": "a.A", "init_args": {"x": 1, "y": 3}}),
        ("data: {class_path: a.A, init_args: {y: 3}}", {"class_path": "a.A", "init_args": {"x": 1, "y": 3}}),
        ("data: {class_path: b.B, init_args: {z: 3}}", {"class_path": "b.B", "init_args": {"z": 3}}),
        ("data: b.B", {"class_path": "b.B"}),
        ("data: null", None),
    ],
)
def test_another_class_drops_the_old_init_args(tmp_path, text, expected) -> None:
    assert merged(tmp_path, base=CLASS, main=f"base: base.yaml\n{text}").config == {"data": expected}


def test_a_method_that_derives_from_the_old_one_keeps_its_settings(tmp_path) -> None:
    old = "model: {class_path: collections.OrderedDict, init_args: {x: 1}}"
    for new, kept in (("typing.OrderedDict", False), ("torch.nn.modules.container.OrderedDict", True)):
        found = merged(tmp_path, base=old, main=f"base: base.yaml\nmodel: {{class_path: {new}}}")
        assert ("init_args" in found.config["model"]) == kept


@pytest.mark.parametrize(
    "text",
    [
        "trainer: cpu.yaml",
        "trainer: cpu.yaml\ntrainer.max_steps: 77",
        "trainer.max_steps: 77\ntrainer: cpu.yaml",
        "base: other.yaml\ntrainer: cpu.yaml",
        "data: {class_path: a.A, init_args: cpu.yaml}",
        "model: {common: {seed: 1}}\nmodel.common: cpu.yaml",
        "model.common: cpu.yaml\nmodel: {common: {seed: 1}}",
    ],
)
def test_a_section_that_names_a_file_is_refused_in_any_order(tmp_path, text) -> None:
    found = merged(tmp_path, cpu="max_steps: 1", other="trainer: {max_steps: 3}", main=text)
    assert len(found.errors) == 1, found.config
    assert "base: [cpu.yaml]" in str(found.errors[0]) and "main.yaml" in str(found.errors[0])


def test_dotted_keys_merge_like_nested_ones(tmp_path) -> None:
    for text in ("trainer.max_steps: 7\ntrainer: {devices: 1}", "trainer: {devices: 1}\ntrainer.max_steps: 7"):
        assert merged(tmp_path, main=text).config == {"trainer": {"max_steps": 7, "devices": 1}}


@pytest.mark.parametrize(
    ("key", "text", "path", "value"),
    [
        ("data.x", "5", "data.init_args.x", 5),
        ("data.init_args.x", "5", "data.init_args.x", 5),
        ("data.part.size", "1e-3", "data.init_args.part.init_args.size", 1e-3),
        ("data.new", None, "data.init_args.new", True),
        ("trainer.devices", "[0, 1]", "trainer.devices", [0, 1]),
        ("tracking.wandb", "off", "tracking.wandb", "off"),
        ("samples.prompts", "[a red circle, 'x: y']", "samples.prompts", ["a red circle", "x: y"]),
        ("model.text", "a: b: c", "model.text", "a: b: c"),
    ],
)
def test_overrides_of_the_command_line(tmp_path, key, text, path, value) -> None:
    base = "data: {class_path: a.A, init_args: {x: 1, part: {class_path: b.B, init_args: {size: 2}}}}"
    assert flatten(merged(tmp_path, (key, text), main=base).config)[path] == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("-2E3", -2000.0),
        ("3", 3),
        ("-3", -3),
        ("1.5", 1.5),
        (".inf", float("inf")),
        ("off", "off"),
        ("no", "no"),
        ("true", True),
        ("null", None),
        ("2024-01-02", "2024-01-02"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
    ],
)
def test_scalars(text, value) -> None:
    found = read_yaml(text)
    assert found == value and type(found) is type(value)


def test_a_key_that_appears_twice_is_refused(tmp_path) -> None:
    found = merged(tmp_path, main="a: 1\nb: 2\na: 3")
    assert "'a' appears twice" in str(found.errors[0])


def test_anchors_and_merge_keys_work_and_share_nothing(tmp_path) -> None:
    found = merged(tmp_path, ("b.lr", "2"), main="a: &update {lr: 1}\nb: *update\nc: {<<: *update, every: 5}")
    assert found.config == {"a": {"lr": 1}, "b": {"lr": 2}, "c": {"lr": 1, "every": 5}}


def test_broken_files_are_errors_not_tracebacks(tmp_path) -> None:
    for text, message in (("a: [1", "not readable"), ("- 1", "must be a mapping"), ("base: 3", "list of files")):
        assert message in str(merged(tmp_path, main=text).errors[0])


def test_what_a_base_says_before_a_class_is_named_stays(tmp_path):
    """As trainer/gpu.yaml does, whose precision is meant for whatever method comes."""
    base = "model: {init_args: {common: {precision: bf16}}}"
    found = merged(tmp_path, base=base, main="base: base.yaml\nmodel: {class_path: a.A, init_args: {x: 1}}")
    assert found.config["model"] == {"class_path": "a.A", "init_args": {"common": {"precision": "bf16"}, "x": 1}}


@pytest.mark.parametrize("name", ["sd15", "sd15_lora", "sd21", "pixart", "flux"])
def test_configs_for_gpus_compute_in_bf16(name):
    found = merge([Path(f"configs/diffusion/{name}.yaml")])
    assert found.config["model"]["init_args"]["common"]["precision"] == "bf16"
