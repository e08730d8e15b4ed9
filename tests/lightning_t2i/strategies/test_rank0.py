"""Rank 0 alone reads weights; what the other process is sent is what `from_pretrained` gives, buffers and all.

The other process has folders without a single weight file, so that it cannot read any.
"""

import copy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))  # for the processes that `ranks` starts

from toy import MLP

from lightning_t2i import rank0
from lightning_t2i.batch import Cond, Records
from lightning_t2i.errors import UserError
from lightning_t2i.method import MethodModule
from lightning_t2i.networks.backbones import adapter_for
from lightning_t2i.networks.load import load_model
from lightning_t2i.options import EMAOptions, GroupOptions, MethodOptions
from lightning_t2i.strategies import shard_network
from lightning_t2i.strategies.sharding import roots

# folder of assets/tiny, component: UNet2D, UNet2DCondition, PixArt, Flux, AutoencoderKL, CLIP text, T5
NETWORKS = [
    ("ddpm", "unet"), ("sd", "unet"), ("pixart", "transformer"), ("flux", "transformer"),
    ("sd", "vae"), ("sd", "text_encoder"), ("pixart", "text_encoder"),
]  # fmt: skip


def output(network) -> torch.Tensor:
    """One forward pass on fixed inputs."""
    config, draw = network.config, torch.Generator().manual_seed(0)
    if type(network).__name__.removeprefix("FSDP") in ("CLIPTextModel", "T5EncoderModel"):
        return network(input_ids=torch.arange(12).view(2, 6)).last_hidden_state
    if hasattr(network, "encode"):
        return network.encode(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)).latent_dist.mean
    channels = config.in_channels // 4 if "guidance_embeds" in config else config.in_channels
    x = torch.randn(2, channels, 8, 8, generator=draw)
    width = next((config[k] for k in ("cross_attention_dim", "joint_attention_dim") if config.get(k)), 1)
    width = config.get("caption_channels") or width
    pooled = torch.randn(2, config.get("pooled_projection_dim") or 1, generator=draw)
    embeds = torch.randn(2, 5, width, generator=draw)
    cond = Cond(embeds=embeds, pooled=pooled, guidance=torch.ones(2))
    return adapter_for(network)(network, x, torch.tensor([500.0, 20.0]), cond)


def contents(network) -> dict[str, torch.Tensor]:
    """Every parameter and every buffer, whole, the buffers that no file has included."""
    found = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in found.items()}


def networks(rank: int, tiny: str, bare: str) -> list[dict]:
    """What each network is after it was read by rank 0: cut on both processes, and whole on both."""
    mesh, found = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard")), []
    for folder, component in NETWORKS:
        with rank0.alone(True):
            whole = load_model(f"{tiny if rank == 0 else bare}/{folder}", component)
        facts = {
            "meta": all(p.is_meta for p in whole.parameters()),
            "buffers": not any(b.is_meta for b in whole.buffers()),
        }
        cut = copy.deepcopy(whole)
        shard_network(cut, mesh)
        rank0.receive(whole, "cpu")
        reference, expected = load_model(f"{tiny}/{folder}", component), {}
        expected = contents(reference)
        with torch.no_grad():
            for kind, network in (("cut", cut), ("whole", whole)):
                got = contents(network)
                facts[kind] = [n for n in got.keys() | expected.keys() if not torch.equal(got[n], expected[n])]
                facts[f"{kind}_output"] = output(network)
            facts["output"] = output(reference)
        facts["kept"] = len(dict(reference.named_buffers()).keys() - reference.state_dict().keys())
        facts["is_cut"] = all(isinstance(root, FSDPModule) for root in roots(cut)) and not cut.training
        found.append(facts)
    return found


class Adapted(MethodModule):
    """Trains an adapter in a frozen network, by the engine's own pieces."""

    def __init__(self, base: torch.dtype = torch.float32):
        super().__init__(MethodOptions())
        self.base = base

    def configure_model(self):
        network = MLP(2, dropout=0.0, lora=True).to(self.base).requires_grad_(False)
        network.adapter.float().requires_grad_(True)
        options = GroupOptions(lambda p: torch.optim.AdamW(p, lr=0.1), ema=EMAOptions([0.5, 0.9]))
        self.add_group("net", network, options)


def adapters(rank: int) -> dict:
    found = {}
    x = torch.linspace(-1, 1, 24).view(4, 6)
    for name in ("plain", "sharded"):
        module = Adapted()
        if name == "sharded":
            module._device_mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
        module.configure_model()
        module.configure_optimizers()
        group = module.groups["net"]
        for step in range(3):
            module.backward("net", (module.net(x) - 1).square().mean())
            group.step(group.gradient_norm())
            group.average(step)
            group.clear_gradients()
        found[name] = module.state_dict()
        with torch.no_grad():
            found[f"{name}_twin"] = group.ema(x)
    module = Adapted(torch.bfloat16)
    module._device_mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    try:
        module.configure_model()
    except UserError as error:
        found["mixed"] = str(error)
    return found


def another(rank: int) -> str:
    """What both processes say to networks that differ."""
    try:
        rank0.receive(MLP(2 + rank), "cpu")
    except RuntimeError as error:
        return str(error)
    return ""


class Forgetful(MethodModule):
    """Reads a network and does not say what it is for."""

    def __init__(self, folder: str):
        super().__init__(MethodOptions())
        self.folder = folder

    def configure_model(self):
        self.vae = load_model(self.folder, None)


def methods(rank: int, tiny: str, bare: str) -> dict:
    """A whole method whose second process has no weights at all."""
    from lightning_modules.diffusion import Diffusion

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    ema = GroupOptions(ema=EMAOptions())
    method = Diffusion(f"{tiny if rank == 0 else bare}/sd", lora_rank=2, denoiser=ema)
    method._device_mesh = mesh
    method.configure_model()
    alone = Diffusion(f"{tiny}/sd", lora_rank=2, denoiser=ema)
    alone.configure_model()
    same = contents(alone)
    batch = Records(
        id=torch.arange(2), position=torch.arange(2), latent=torch.ones(2, 4, 8, 8), caption=["a red square", ""]
    )  # fmt: skip
    losses = []
    for module in (method, alone):
        losses.append(float(module.loss(batch, module.denoiser, module.condition(batch), module.keys).detach()))
    got, forgetful, error = contents(method), Forgetful(f"{tiny if rank == 0 else bare}/vae"), ""
    forgetful._device_mesh = mesh
    try:
        forgetful.configure_model()
    except RuntimeError as raised:
        error = str(raised)
    return {
        "different": [n for n in same if "lora_A" not in n and not torch.equal(got[n], same[n])],
        "adapters": {n: t for n, t in got.items() if "lora_A" in n},
        "identities": method.frozen_identities,
        "expected": alone.frozen_identities,
        "losses": losses,
        "forgotten": error,
    }


def uncut(rank: int) -> dict:
    """A large frozen network on a mesh that copies and does not cut: plain, with rank 0's weights."""
    import lightning_t2i.strategies.sharding as sharding

    sharding.REPLICATE_BELOW_BYTES = 0
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    with rank0.alone(True):
        network = MLP(2) if rank0.reads() else rank0.without_weights(lambda: MLP(2))
    sharding.shard_frozen(network.requires_grad_(False), mesh)
    return {"plain": not isinstance(network, FSDPModule), "weight": network.inside.weight.detach().clone()}


def everything(rank: int, tiny: str, bare: str) -> dict:
    return {
        "networks": networks(rank, tiny, bare),
        "adapters": adapters(rank),
        "methods": methods(rank, tiny, bare),
        "another": another(rank),
        "uncut": uncut(rank),
    }


_found: list[dict] = []


@pytest.fixture
def found(ranks, repo, tmp_path) -> list[dict]:
    """What both processes found; run once for all tests of the file."""
    if not _found:
        tiny, bare = repo / "assets/tiny", tmp_path / "bare"
        for name in ("ddpm", "sd", "pixart", "flux", "vae"):
            shutil.copytree(tiny / name, bare / name, ignore=shutil.ignore_patterns("*.safetensors"))
        _found.extend(ranks(everything, str(tiny), str(bare)))
    return _found


@pytest.mark.parametrize("case", range(len(NETWORKS)), ids=lambda i: "-".join(NETWORKS[i]))
def test_what_is_sent_is_what_from_pretrained_reads(found, case):
    for rank, facts in enumerate(f["networks"][case] for f in found):
        assert facts["meta"] == (rank == 1)
        assert facts["buffers"] and facts["is_cut"]
        assert facts["cut"] == facts["whole"] == []
        assert torch.equal(facts["whole_output"], facts["output"])
        torch.testing.assert_close(facts["cut_output"], facts["output"])


def test_buffers_that_no_file_has_are_among_them(found):
    assert sum(facts["kept"] for facts in found[0]["networks"]) >= 2  # PixArt's positions, CLIP's ids


def test_a_method_needs_no_weights_on_the_other_process(found):
    first, second = (f["methods"] for f in found)
    assert first["different"] == second["different"] == []
    assert first["identities"] == second["identities"] == first["expected"]
    assert all(torch.equal(t, second["adapters"][n]) for n, t in first["adapters"].items()) and first["adapters"]
    for losses in (first["losses"], second["losses"]):
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_network_that_was_read_and_not_added_is_told(found):
    assert "vae." in found[1]["methods"]["forgotten"]


def test_adapters_and_their_averages_train_in_a_sharded_frozen_network(found):
    for result in (f["adapters"] for f in found):
        assert {"net.adapter.weight", "net_ema.adapter.weight", "net_ema[0.9].adapter.weight"} == set(result["plain"])
        for name, tensor in result["plain"].items():
            torch.testing.assert_close(result["sharded"][name], tensor, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(result["sharded_twin"], result["plain_twin"], rtol=1e-4, atol=1e-6)


def test_float32_adapters_in_a_bfloat16_network_are_refused(found):
    for result in (f["adapters"] for f in found):
        assert "two precisions" in result["mixed"]
        assert "torch.bfloat16, torch.float32" in result["mixed"]


def test_another_architecture_on_another_process_is_told(found):
    assert all("not the same architecture on all processes" in f["another"] for f in found)


def test_a_large_frozen_network_that_is_not_cut_is_sent_too(found):
    first, second = (f["uncut"] for f in found)
    assert first["plain"] and second["plain"]
    assert not second["weight"].is_meta and torch.equal(first["weight"], second["weight"])
