"""Every shipped config parses and stays short; paper-scale networks have their published sizes."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

from lightning_t2i.cli.configs import flatten, merge
from lightning_t2i.cli.runs import config_name
from lightning_t2i.cli.session import Session
from lightning_t2i.networks.load import build_network
from lightning_t2i.paths import ROOT
from lightning_t2i.preflight.world import World
from lightning_t2i.strategies import FSDP2

CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml"))
RUNNABLE = [p for p in CONFIGS if p.parent.name not in ("trainer", "data")]

# Parameters of the networks that the paper-scale configs name, counted from their architecture files on meta.
SIZES = {
    "sd15_unet": 859_520_964,
    "sd21_unet": 865_910_724,
    "sdxl_unet": 2_567_463_684,
    "pixart_alpha_512": 610_856_096,
    "flux1_dev": 11_901_408_320,
    "sd15_stacked": 1_719_017_924,
}
ARCHITECTURES = {
    "sd15": "sd15_unet",
    "sd15_lora": "sd15_unet",
    "sd21": "sd21_unet",
    "pixart": "pixart_alpha_512",
    "flux": "flux1_dev",
}
PROCESSES = {"gpu": 1, "fsdp": 8, "hsdp": 8}  # processes over which one copy of the weights is cut


@pytest.fixture(scope="module")
def session():
    return Session()


PARSE = """
import sys
from pathlib import Path

for name in ("torchvision", "timm", "open_clip", "torch_fidelity"):
    sys.modules[name] = None
from lightning_t2i.cli.configs import merge
from lightning_t2i.cli.session import Session
from lightning_t2i.errors import UserError

session, wrong = Session(), []
for path in map(Path, sys.argv[1:]):
    trains = path.parent.name != "pairs"  # those make data
    try:
        config = session.parse(merge([path]), "fit" if trains else "predict")
        assert config["model"]["class_path"].startswith("lightning_modules."), "another class"
        assert config["trainer"]["max_steps"] > 0 if trains else config["data"]["init_args"]["predict"], "no end"
    except (AssertionError, UserError) as error:
        wrong.append(f"{path}: {error}")
sys.exit("\\n".join(wrong) or 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, 1])
def test_configs_parse_without_the_optional_packages(part):
    """In a new process, where nothing has imported them yet."""
    command = [sys.executable, "-c", PARSE, *map(str, RUNNABLE[part::2])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_config_states_differences_in_forty_lines(path):
    assert len(path.read_text().splitlines()) <= 40
    assert path.read_text().startswith("#"), "the first line says what the config is for"


def test_runs_that_configs_read_have_the_names_that_fit_gives_them():
    names = {config_name(path) for path in RUNNABLE}
    read = {(path, name) for path in CONFIGS for name in re.findall(r"\bruns/([\w.-]+)", path.read_text())}
    assert read
    assert sorted((str(path.relative_to(ROOT)), name) for path, name in read if name not in names) == []


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_architecture_has_its_published_size(name, size):
    with torch.device("meta"):
        network = build_network(f"configs/networks/{name}.json")
    assert sum(p.numel() for p in network.parameters()) == size


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_paper_scale_memory_per_process(session, name, capsys):
    """Weights, gradients, AdamW states and EMA in float32, cut over the processes of the config's mesh."""
    path = ROOT / f"configs/diffusion/{name}.yaml"
    options = session.parse(merge([path], []), "fit")["model"]["init_args"]
    base = yaml.safe_load(path.read_text())["base"]
    mesh = next((m for m in PROCESSES if any(m in b for b in ([base] if isinstance(base, str) else base))), "gpu")
    weights = SIZES[ARCHITECTURES[name]]
    trained = 0.002 * weights if options["lora_rank"] else weights
    copies = 4 + bool(options["denoiser"]["ema"])  # weights, gradient, two moments, EMA
    gibibytes = 4 * (weights - trained + copies * trained) / PROCESSES[mesh] / 2**30
    with capsys.disabled():
        print(f"\n{name}: {weights / 1e6:.0f} M parameters, {gibibytes:.1f} GiB of state per process ({mesh})")
    assert gibibytes < 80


TRAINERS = {"cpu": None, "gpu": (1, 1), "ddp": (8, 1), "fsdp": (1, 8), "hsdp": (2, 8)}  # meshes on nodes of 8 devices
METHODS = sorted(file.parent.name for file in (ROOT / "configs").glob("*/tiny.yaml"))


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_every_trainer_by_one_base_line(session, tmp_path, method, trainer):
    """Parsed with one trainer each, since the sections know nothing of each other; all are merged."""
    bases = [str(ROOT / f"configs/{name}.yaml") for name in (f"{method}/tiny", f"trainer/{trainer}")]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"base": bases}))
    merged = merge([tmp_path / "mine.yaml"], [("trainer.accelerator", "cpu")])
    assert merged.errors == []
    if METHODS.index(method) % len(TRAINERS) == list(TRAINERS).index(trainer):
        session.parse(merged, "fit")
    facts = {"num_nodes": 1, "strategy": "auto", **merged.config["trainer"]}
    common, strategy = merged.config["model"]["init_args"].get("common") or {}, facts["strategy"]
    facts["strategy"] = FSDP2(**strategy["init_args"]) if isinstance(strategy, dict) else strategy
    facts["accelerator"] = "cpu" if trainer == "cpu" else "gpu"
    world = World.of(SimpleNamespace(**facts))
    assert world.mesh == TRAINERS[trainer]
    assert common.get("precision", "fp32") == ("fp32" if trainer == "cpu" else "bf16")
    form = merged.config.get("checkpoints", {}).get("form", "single")
    assert form == ("sharded" if trainer in ("fsdp", "hsdp") else "single")
    assert facts["max_steps"] == merge([ROOT / f"configs/{method}/tiny.yaml"]).config["trainer"]["max_steps"]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_on_the_cpu_change_nothing_else(method):
    configs = [ROOT / f"configs/{name}.yaml" for name in (f"{method}/tiny", "trainer/cpu_two")]
    one, two = (flatten(merge(configs[:n]).config) for n in (1, 2))
    changed = {key.removeprefix("trainer.") for key in one | two if one.get(key) != two.get(key)}
    assert changed == {"devices", "strategy.class_path", "strategy.init_args.shard"}


def test_no_config_repeats_anothers_values():
    """A paper-scale variant names its base and what differs, nothing it inherits unchanged."""
    for name in ("sd21", "pixart", "sd15_lora", "flux"):
        own = yaml.safe_load((ROOT / f"configs/diffusion/{name}.yaml").read_text())
        base = yaml.safe_load((ROOT / "configs/diffusion/sd15.yaml").read_text())

        def repeated(a, b, path=""):
            if isinstance(a, dict) and isinstance(b, dict):
                return [r for k in a.keys() & b.keys() for r in repeated(a[k], b[k], f"{path}.{k}")]
            return [path] if a == b else []

        assert repeated(own, base) == []
