"""The analysis of a run: its numbers on tiny sizes, the picture, and the command."""

import json

import pytest
import tiny_networks
import torch
import yaml
from deme_parts import built, made_up
from pictures import records

from lightning_t2i.expert_plots import analyse, draw, main, tau_cosines
from lightning_t2i.merging import save_delta
from lightning_t2i.paths import ROOT


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysed")
    module = built(tiny_networks.pipeline_folder(folder / "base"), folder / "deltas", num_ranges=3)
    made_up(module, 0.02)
    with torch.no_grad():
        data = [(r, module.condition(r)) for r in (records(4 * k, 4) for k in range(2))]
    return module, analyse(module, data, [0.2, 0.3, 0.5], times=3, points=3), folder


def test_numbers_fit_together(analysed):
    found = analysed[1]
    matrix = found["ranges"]
    assert list(matrix) == ["base", "expert 0", "expert 1", "expert 2", "merged", "switched"]
    assert matrix["switched"] == pytest.approx([matrix[f"expert {i}"][i] for i in range(3)], rel=1e-5)
    strength = dict(zip(found["strength"]["s"], found["strength"]["loss"], strict=True))
    assert strength[0.0] == pytest.approx(sum(matrix["base"]) / 3, rel=1e-5)
    assert strength[1.0] == pytest.approx(sum(matrix["merged"]) / 3, rel=1e-5)
    assert len(found["landscape"]["all"]) == 3 and found["landscape"]["pair"] == [2, 1]
    assert found["times"] == [0.0, 500.0, 999.0]
    json.dumps(found)


def test_the_corner_of_the_landscape_is_what_it_says(analysed):
    """Three points of each side are -0.5, 0.5 and 1.5."""
    module, found, _ = analysed
    slope = found["landscape"]
    assert slope["steps"] == [-0.5, 0.5, 1.5]
    network = module.plain([0.0, 1.5, -0.5])
    with torch.no_grad():
        data = [(r, module.condition(r)) for r in (records(4 * k, 4) for k in range(2))]
        losses = torch.stack([module.range_losses(network, r, c, module.keys.fork("analysis")) for r, c in data]).mean(
            0
        )
    assert slope["own"][0][2] == pytest.approx(float(losses[2]), rel=1e-4)
    assert slope["all"][0][2] == pytest.approx(float(losses.mean()), rel=1e-4)


def test_cosines_and_norms_of_deltas(tmp_path):
    for i, row in enumerate(([3.0, 4.0], [4.0, -3.0], [-3.0, -4.0])):
        save_delta(tmp_path / f"{i}.safetensors", [("a", torch.tensor(row)), ("b", torch.zeros(2))], {})
    found = tau_cosines(sorted(tmp_path.glob("*.safetensors")))
    assert found["norms"] == pytest.approx([5, 5, 5])
    assert found["cosines"] == [pytest.approx(row) for row in ([1, 0, -1], [0, 1, 0], [-1, 0, 1])]


def test_the_picture_is_drawn(analysed, tmp_path):
    draw(analysed[1]).savefig(tmp_path / "analysis.png")
    assert (tmp_path / "analysis.png").stat().st_size > 10_000


def test_a_run_without_experts_and_one_without_deltas_are_told(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"base": str(ROOT / "configs/diffusion/tiny.yaml")}))
    assert main([str(tmp_path)]) == 2
    assert "no experts" in capsys.readouterr().err
