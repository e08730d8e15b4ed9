"""The scaling study: fits and correlations of made-up points, and a study of two real runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from fluid_parts import parts

from lightning_t2i.cli.main import main as train
from lightning_t2i.errors import UserError
from lightning_t2i.scaling_study import Point, findings, last_of, main, markdown, pearson, points_of, power_law


def made(name: str, size: int, step: int, loss: float, score: float, variant: str = "random diffusion") -> Point:
    return Point(name, variant, size, step, loss, {"shapes_score": score})


def test_a_power_law_is_found_again() -> None:
    sizes = [166e6, 369e6, 665e6, 1.1e9, 3.1e9]
    fit = power_law(sizes, [0.5 * n**-0.015 for n in sizes])
    assert fit.exponent == pytest.approx(-0.015, rel=1e-6)
    assert math.exp(fit.intercept) == pytest.approx(0.5, rel=1e-6)
    assert fit.r2 == pytest.approx(1)
    assert power_law(sizes, [1.0, 3.0, 0.5, 4.0, 1.0]).r2 < 0.3
    with pytest.raises(ValueError, match="two sizes"):
        power_law([1e6, 1e6], [0.1, 0.2])


def test_the_exponents_of_the_papers_figure() -> None:
    """End to end, 0.166 to 3.1 B: -.015 for random order and -.029 for raster order of continuous tokens."""
    sizes = [0.166, 0.369, 0.665, 1.1, 3.1]
    assert power_law(sizes, [0.3066, 0.3029, 0.2992, 0.2976, 0.2938]).exponent == pytest.approx(-0.015, abs=0.0015)
    assert power_law(sizes, [0.2555, 0.2493, 0.2450, 0.2414, 0.2344]).exponent == pytest.approx(-0.029, abs=0.0015)


def test_correlations() -> None:
    assert pearson([1.0, 2.0, 3.0], [5.0, 3.0, 1.0]) == pytest.approx(-1)
    assert pearson([1.0, 2.0], [1.0, 2.0]) is None
    assert pearson([1.0, 2.0, 3.0], [4.0, 4.0, 4.0]) is None


def test_variants_are_never_mixed_and_fits_take_last_checkpoints() -> None:
    points = [made("a", 100, 10, 0.9, 0.1), made("a", 100, 20, 0.4, 0.3), made("b", 400, 20, 0.2, 0.6)]
    points += [made("c", 100, 20, 6.0, 0.2, "raster categorical")]
    assert [p.step for p in last_of(points[:2])] == [20]
    found = findings(points)
    assert found["random diffusion"]["fit"]["exponent"] == pytest.approx(-0.5)
    assert found["random diffusion"]["r"]["shapes_score"] == pytest.approx(-0.937, abs=0.001)
    assert found["raster categorical"]["fit"] is None
    page = markdown(points)
    assert "-0.5000" in page and "| c " in page


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two short trainings on the shapes world that differ in width, validated at each of their two checkpoints."""
    import os

    root = tmp_path_factory.mktemp("study")
    folder = parts(root)
    facts = json.loads((folder / "network.json").read_text())
    before = os.environ.get("LIGHTNING_T2I_RUNS")
    os.environ["LIGHTNING_T2I_RUNS"] = str(root / "runs")
    for width in (8, 16):
        (root / f"{width}.json").write_text(json.dumps({**facts, "width": width}))
        stream = {"init_args": {"batch_size": 4, "latents": None, "in_memory": False, "limit": 8}}
        config = {
            "base": str(Path("configs/fluid/tiny.yaml").resolve()),
            "model": {"init_args": {"network": str(root / f"{width}.json"), "mask": {"strata": 4}}},
            "data": {"init_args": dict.fromkeys(("main", "val", "test"), stream)},
            "trainer": {"max_steps": 2, "val_check_interval": 1, "enable_progress_bar": False},
            "checkpoints": {"every": 1, "keep": 2},
            "samples": {"enabled": False},
            "tracking": {"wandb": "off"},
        }
        (root / f"w{width}.yaml").write_text(yaml.safe_dump(config))
        assert train(["fit", "--config", str(root / f"w{width}.yaml"), "--run", f"w{width}"]) == 0
    if before is None:
        del os.environ["LIGHTNING_T2I_RUNS"]
    else:
        os.environ["LIGHTNING_T2I_RUNS"] = before
    return root / "runs"


def test_a_study_of_runs(runs, tmp_path, capsys) -> None:
    words = [str(tmp_path / "study"), str(runs / "w8"), str(runs / "w16"), "--n", "6", "--guidance", "1.0"]
    assert main([*words, "--metrics", "shapes_score"]) == 0
    content = json.loads((tmp_path / "study" / "study.json").read_text())
    assert [(p["run"], p["step"]) for p in content["points"]] == [("w8", 1), ("w8", 2), ("w16", 1), ("w16", 2)]
    assert content["points"][0]["parameters"] < content["points"][2]["parameters"]
    assert all(0 < p["loss"] < 5 and 0 <= p["scores"]["shapes_score"] <= 1 for p in content["points"])
    assert (tmp_path / "study" / "study.png").stat().st_size > 1000
    (tmp_path / "study" / "study.md").unlink()
    assert main([str(tmp_path / "study"), "--report"]) == 0
    assert "exponent" in (tmp_path / "study" / "study.md").read_text()
    assert "w16" in capsys.readouterr().out


def test_runs_of_one_name_stay_apart(runs, tmp_path) -> None:
    for width in (8, 16):  # as the cells of claims, whose folders are all called alike
        (tmp_path / str(width)).mkdir()
        (tmp_path / str(width) / "training").symlink_to(runs / f"w{width}")
    words = [str(tmp_path / str(width) / "training") for width in (8, 16)]
    assert main([str(tmp_path / "study"), *words, "--metrics"]) == 0
    found = json.loads((tmp_path / "study" / "study.json").read_text())
    assert len({p["run"] for p in found["points"]}) == 2
    assert all(variant["fit"]["n"] == 2 for variant in found["findings"].values())


def test_mistakes_are_told(runs, tmp_path, capsys) -> None:
    assert main([str(tmp_path / "study")]) == 2
    assert "No run" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing"), "--report"]) == 2
    assert "no study here" in capsys.readouterr().err
    other = yaml.safe_load((runs / "w8" / "config.yaml").read_text())
    other["data"]["init_args"]["main"]["init_args"]["source"] = "data/mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text(yaml.safe_dump(other))
    assert main([str(tmp_path / "study"), str(tmp_path / "other")]) == 2
    assert "shapes world alone" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="No checkpoint was validated"):
        points_of(tmp_path / "empty", "val", 1, 0, [], {})
