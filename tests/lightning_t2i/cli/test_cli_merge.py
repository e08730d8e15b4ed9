"""A run of DeMe from the command line: fit, merge, the card, the analysis, and what is told when deltas are missing."""

import json
from unittest import mock

import pytest
import torch
import yaml

from lightning_t2i import expert_plots
from lightning_t2i.cli.main import main
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.paths import ROOT


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two ranges of one step each on eight scenes, with projections that fold."""
    few = {"init_args": {"batch_size": 4, "limit": 8, "latents": None}}
    more = {"init_args": {**few["init_args"], "limit": 12}}
    model = {"num_ranges": 2, "steps_per_range": 1, "steps": 2, "projection": {"blocks": "foldable"}}
    content = {
        "base": str(ROOT / "configs/deme/tiny.yaml"),
        "model": {"init_args": model},
        "data": {"init_args": {"main": few, "val": more, "test": few}},
        "trainer": {"max_steps": 2, "limit_val_batches": 1, "enable_progress_bar": False},
        "checkpoints": {"every": 1},
        "merge": {"enabled": False, "n": 4, "limit": 2, "weights": [0.1, 0.2]},
        "samples": {"enabled": False},
        "tracking": {"wandb": "off"},
    }
    file = tmp_path_factory.mktemp("config") / "few.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_a_run_is_merged_into_a_stock_folder_with_a_card(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LIGHTNING_T2I_RUNS", str(tmp_path / "runs"))
    assert main(["fit", "--config", str(config), "--run", "mine"]) == 0
    assert len(list((tmp_path / "runs/mine/deltas").glob("*.safetensors"))) == 2
    out, older = tmp_path / "out", str(tmp_path / "runs/mine/checkpoints/step-00000001")
    assert main(["merge", str(out), "--run", "mine", "--weights", "0.5,2", "--ckpt_path", older]) == 0
    assert "merged the experts of mine" in capsys.readouterr().out
    about = json.loads((out / "merge.json").read_text())
    assert about["weights"] == [0.5, 2.0] and "merged/loss" in about["report"]
    card = (out / "README.md").read_text()
    assert "StableDiffusionPipeline" in card and "2410.06664" in card and "training steps | 1 |" in card
    moved, base = (Denoiser.from_pretrained(str(f)).backbone.conv_in.weight for f in (out, ROOT / "assets/tiny/sd"))
    assert not torch.equal(moved, base)
    assert main(["merge", str(out), "--run", "mine", "--weights", "0.5,2"]) == 2
    assert "folder exists" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "searched"), "--run", "mine", "--merge.search", "quadratic"]) == 0
    searched = json.loads((tmp_path / "searched/merge.json").read_text())
    assert searched["search"] == "quadratic" and searched["weights"] != [0.1, 0.2]
    with mock.patch.object(expert_plots, "analyse", wraps=expert_plots.analyse) as analyse:
        words = ["--weights", "0.3,0.7", "--batches", "2", "--times", "2", "--points", "3"]
        assert expert_plots.main([str(tmp_path / "runs/mine"), *words]) == 0
    batches, found = analyse.call_args[0][1], json.loads((tmp_path / "runs/mine/analysis.json").read_text())
    assert len(batches) == 2 and len(found["times"]) == 2 and len(found["landscape"]["steps"]) == 3
    assert found["weights"] == [0.3, 0.7] and (tmp_path / "runs/mine/analysis.png").is_file()
    next((tmp_path / "runs/mine/deltas").glob("*.safetensors")).unlink()
    assert main(["merge", str(tmp_path / "none"), "--run", "mine", "--weights", "uniform"]) == 2
    assert "Deltas are missing" in capsys.readouterr().err
