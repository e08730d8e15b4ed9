"""EDM snapshots: files of the published structure become model folders; code inside a file is never run.

The files are made here: they imitate how the published ones are pickled (modules as source text, class name and
attributes; torch's own containers; storages as pickles in the pickle). The real files were not available.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_t2i.batch import Cond
from lightning_t2i.cli.main import main
from lightning_t2i.errors import UserError
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.networks.edm_snapshot import LICENCE, architecture, convert_snapshot, our_name, read_snapshot

# Published names of the layers of a network with two resolutions (8, 4) and one block each, with their channels in and
# out: channels 8, multiples 1 and 2, attention at 4; written down, not derived from our networks.
ENCODER = {"8x8_block0": (8, 8), "4x4_down": (8, 8), "4x4_block0": (8, 16)}
DECODER = {
    "4x4_in0": (16, 16),
    "4x4_in1": (16, 16),
    "4x4_block0": (32, 16),
    "4x4_block1": (24, 16),
    "8x8_up": (16, 16),
    "8x8_block0": (24, 8),
    "8x8_block1": (16, 8),
}
ATTENDED = {
    "SongUNet": {"enc.4x4_block0", "dec.4x4_in0", "dec.4x4_block1"},
    "DhariwalUNet": {"enc.4x4_block0", "dec.4x4_in0", "dec.4x4_block0", "dec.4x4_block1"},
}
ARGUMENTS = {
    "img_resolution": 8,
    "in_channels": 3,
    "out_channels": 3,
    "label_dim": 5,
    "augment_dim": 2,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "channel_mult_emb": 4,
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.13,
    "label_dropout": 0.1,
}
SONG = {
    "channel_mult_noise": 1,
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
}


def published_tensors(kind: str) -> dict[str, Tensor]:
    song = kind == "SongUNet"
    shapes: dict[str, tuple[int, ...]] = {
        "map_layer0.weight": (32, 8), "map_layer0.bias": (32,),
        "map_layer1.weight": (32, 32), "map_layer1.bias": (32,),
        "map_augment.weight": (8, 2), "map_label.weight": (8, 5) if song else (32, 5),
        "enc.8x8_conv.weight": (8, 3, 3, 3), "enc.8x8_conv.bias": (8,),
    }  # fmt: skip
    norm, conv = ("dec.8x8_aux_norm", "dec.8x8_aux_conv") if song else ("out_norm", "out_conv")
    shapes |= {f"{norm}.weight": (8,), f"{norm}.bias": (8,), f"{conv}.weight": (3, 8, 3, 3), f"{conv}.bias": (3,)}
    if song:
        shapes["map_label.bias"] = (8,)
    blocks = {f"enc.{n}": v for n, v in ENCODER.items()} | {f"dec.{n}": v for n, v in DECODER.items()}
    for name, (a, b) in blocks.items():
        layers = {"norm0": (a,), "conv0": (b, a, 3, 3), "norm1": (b,), "conv1": (b, b, 3, 3)}
        layers["affine"] = (b if song else 2 * b, 32)
        resampled = name.endswith(("_down", "_up"))
        if a != b or (song and resampled):
            layers["skip"] = (b, a, 1, 1)
        if name in ATTENDED[kind]:
            layers |= {"norm2": (b,), "qkv": (3 * b, b, 1, 1), "proj": (b, b, 1, 1)}
        for layer, shape in layers.items():
            shapes |= {f"{name}.{layer}.weight": shape, f"{name}.{layer}.bias": shape[:1]}
        if resampled:
            shapes |= {f"{name}.{layer}.resample_filter": (1, 1, 2, 2) for layer in ("conv0", "skip")}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.full(shape, 0.25) if name.endswith("filter") else torch.randn(shape, generator=generator) * 0.2
        for name, shape in shapes.items()
    }


def written_out(kind: str, w: dict[str, Tensor], x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """The published network as formulas on published tensors (arXiv 2206.00364, appendix F.2)."""
    song = kind == "SongUNet"
    eps, scale = (1e-6, 0.5**0.5) if song else (1e-5, 1.0)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, x.shape[1] // 4, w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def conv(x: Tensor, name: str, change: str = "") -> Tensor:
        if "down" in change:
            x = F.conv2d(x, torch.full((x.shape[1], 1, 2, 2), 0.25), stride=2, groups=x.shape[1])
        if "up" in change:
            x = F.conv_transpose2d(x, torch.ones(x.shape[1], 1, 2, 2), stride=2, groups=x.shape[1])
        kernel = w.get(f"{name}.weight")
        return x if kernel is None else F.conv2d(x, kernel, w[f"{name}.bias"], padding=kernel.shape[-1] // 2)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def block(x: Tensor, name: str) -> Tensor:
        h = conv(F.silu(norm(x, f"{name}.norm0")), f"{name}.conv0", name)
        params = linear(emb, f"{name}.affine")[:, :, None, None]
        if song:
            h = F.silu(norm(h + params, f"{name}.norm1"))
        else:
            gain, shift = params.chunk(2, dim=1)
            h = F.silu(shift + norm(h, f"{name}.norm1") * (gain + 1))
        h = (conv(h, f"{name}.conv1") + conv(x, f"{name}.skip", name)) * scale
        if f"{name}.qkv.weight" not in w:
            return h
        b, c = h.shape[:2]  # 16 channels: one head in both networks
        q, k, v = conv(norm(h, f"{name}.norm2"), f"{name}.qkv").reshape(b, c, 3, -1).unbind(2)
        a = torch.einsum("ncq,nck->nqk", q, k / c**0.5).softmax(2)
        return (h + conv(torch.einsum("nqk,nck->ncq", a, v).reshape(h.shape), f"{name}.proj")) * scale

    powers = torch.arange(4) / (3 if song else 4)
    angles = t[:, None] / 10000**powers
    emb = torch.cat([angles.sin(), angles.cos()] if song else [angles.cos(), angles.sin()], dim=1)
    hot = F.one_hot(label, 5).float()
    if song:
        emb = F.silu(linear(emb + linear(hot * 5**0.5, "map_label"), "map_layer0"))
        emb = F.silu(linear(emb, "map_layer1"))
    else:
        emb = linear(F.silu(linear(emb, "map_layer0")), "map_layer1")
        emb = F.silu(emb + linear(hot, "map_label"))
    kept = [conv(x, "enc.8x8_conv")]
    for name in ENCODER:
        kept.append(block(kept[-1], f"enc.{name}"))
    x = kept[-1]
    for name in DECODER:
        x = block(torch.cat([x, kept.pop()], dim=1) if "block" in name else x, f"dec.{name}")
    last = "dec.8x8_aux_" if song else "out_"
    return conv(F.silu(norm(x, f"{last}norm")), f"{last}conv")


# ---- files of the published structure ------------------------------------------------------------------------------


class Persistent:
    """Pickled as `torch_utils.persistence` does: a function of (source, class name, state) from a module of its own."""

    def __init__(self, class_name: str, state: dict, source: str):
        self.meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,), None


class Command:
    """Runs a shell command when an ordinary unpickler reads it."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def publish(monkeypatch, tmp_path):
    """Writes a snapshot; afterwards the modules that its names come from are gone, as on a user's machine."""

    def write(kind: str, tensors: dict[str, Tensor], arguments: dict, **changes) -> Path:
        persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
        exec("def _reconstruct_persistent_obj(meta): exec(meta['module_src'])", persistence.__dict__)
        exec("class EasyDict(dict): pass", util.__dict__)
        modules = {"torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": persistence}
        modules |= {"dnnlib": types.ModuleType("dnnlib"), "dnnlib.util": util}
        source = f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n"

        def persistent(name: str, own: dict[str, Tensor], children: dict, **attributes) -> Persistent:
            state = dict(nn.Module().__dict__)
            state["_parameters"] = {n: nn.Parameter(v) for n, v in own.items() if n != "resample_filter"}
            state["_buffers"] = {n: v for n, v in own.items() if n == "resample_filter"}
            state |= {"_modules": children, "_init_args": (), "_init_kwargs": util.EasyDict(gain=np.sqrt(0.2))}
            return Persistent(name, state | attributes, source)

        def tree(prefix: str) -> Persistent | nn.ModuleDict:
            inside = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
            own = {n: v for n, v in inside.items() if "." not in n}
            children = {n: tree(f"{prefix}{n}.") for n in dict.fromkeys(n.split(".")[0] for n in inside if "." in n)}
            if prefix in ("enc.", "dec."):
                container = nn.ModuleDict()
                container._modules.update(children)
                return container
            if not prefix:
                kwargs = util.EasyDict(arguments)
                return persistent(kind, own, children, _init_kwargs=kwargs, **changes.get("inner", {}))
            return persistent("Layer", own, children)

        with monkeypatch.context() as patch:
            for name, module in modules.items():
                patch.setitem(sys.modules, name, module)
            outer = {"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5, "use_fp16": False}
            outer |= changes.get("outer", {})
            network = persistent(changes.get("wrapper", "EDMPrecond"), {}, {"model": tree("")}, **outer)
            content = {"ema": network, "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2}, source)}
            content |= {"augment_pipe": None, "dataset_kwargs": {"path": "x"}, **changes.get("content", {})}
            file = tmp_path / "edm-small.pkl"
            file.write_bytes(pickle.dumps(content))
        return file

    return write


def arguments_of(kind: str) -> dict:
    return ARGUMENTS | (SONG if kind == "SongUNet" else {})


@pytest.mark.parametrize("kind", ["SongUNet", "DhariwalUNet"])
def test_a_snapshot_becomes_a_folder_of_the_same_function(kind, publish, tmp_path, capsys) -> None:
    tensors = published_tensors(kind)
    file = publish(kind, tensors, arguments_of(kind))
    assert main(["export", str(tmp_path / "out"), "--from-edm", str(file)]) == 0
    assert LICENCE in capsys.readouterr().out and LICENCE in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "ran").exists()
    assert sorted(p.suffix for p in (tmp_path / "out").iterdir() if p.is_file()) == [".json", ".md", ".safetensors"]
    denoiser = Denoiser.from_pretrained(str(tmp_path / "out"))
    assert (denoiser.prediction, denoiser.process.name, denoiser.backbone.config.dropout) == ("edm", "edm", 0.13)
    generator = torch.Generator().manual_seed(2)
    x, t, label = torch.randn(3, 3, 8, 8, generator=generator), torch.tensor([-1.5, 0.1, 1.0]), torch.tensor([0, 4, 2])
    with torch.no_grad():
        found = denoiser.backbone(x, t, Cond(label=label))
    torch.testing.assert_close(found, written_out(kind, tensors, x, t, label), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("map_noise.freqs", "noise.frequencies"),
        ("map_layer0.weight", "embed1.weight"),
        ("enc.32x32_conv.bias", "encoder.32x32_conv.bias"),
        ("dec.8x8_in0.qkv.weight", "decoder.8x8_in0.attention.qkv.weight"),
        ("dec.32x32_aux_conv.weight", "out_conv.weight"),
        ("out_norm.bias", "out_norm.bias"),
        ("enc.16x16_down.conv0.resample_filter", None),
    ],
)
def test_table_of_names(theirs: str, ours: str | None) -> None:
    assert our_name(theirs) == ours


def test_the_file_is_dangerous_for_an_ordinary_unpickler(publish, tmp_path, monkeypatch) -> None:
    """Else the other tests would show nothing: with its modules at hand the embedded source runs."""
    file = publish("SongUNet", published_tensors("SongUNet"), arguments_of("SongUNet"))
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    exec("def _reconstruct_persistent_obj(meta): exec(meta['module_src']); raise ValueError", persistence.__dict__)
    exec("class EasyDict(dict): pass", util.__dict__)
    for name, module in {"torch_utils.persistence": persistence, "dnnlib.util": util}.items():
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, name.split(".")[0], types.ModuleType(name.split(".")[0]))
    with pytest.raises(ValueError):
        pickle.loads(file.read_bytes())
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("where", ["content", "outer", "inner"])
def test_commands_in_a_file_are_not_run(where, publish, tmp_path, capsys) -> None:
    changes = {where: {"extra": Command(f"touch {tmp_path / 'ran'}")}}
    file = publish("SongUNet", published_tensors("SongUNet"), arguments_of("SongUNet"), **changes)
    assert main(["export", str(tmp_path / "out"), "--from-edm", str(file)]) == 2
    assert "posix.system" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_commands_in_a_storage_are_not_run(publish, tmp_path) -> None:
    stream = io.BytesIO()
    torch.save(Command(f"touch {tmp_path / 'ran'}"), stream, _use_new_zipfile_serialization=False)

    class Storage:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (stream.getvalue(),)

    file = publish("SongUNet", {}, {}, content={"extra": Storage()})
    with pytest.raises(UserError, match="Not a network snapshot"):
        read_snapshot(file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", [b"cbuiltins\neval\n.", b"ctorch.storage\n_load_from_bytes.__globals__\n.", b"ctorch\nload\n."]
)
def test_other_names_are_refused(name: bytes, tmp_path) -> None:
    (tmp_path / "x.pkl").write_bytes(name)
    with pytest.raises(UserError, match="nothing of it was run"):
        read_snapshot(tmp_path / "x.pkl")


def test_a_file_cannot_change_the_allowed_functions(tmp_path) -> None:
    # GLOBAL f, {'function': 1} as slot state, BUILD
    code = b"ctorch.storage\n_load_from_bytes\n(N(S'function'\nI1\ndtb."
    (tmp_path / "x.pkl").write_bytes(code)
    with pytest.raises(UserError, match="a state for a function"):
        read_snapshot(tmp_path / "x.pkl")


def test_the_option_belongs_to_export(tmp_path, capsys) -> None:
    assert main(["fit", "--from-edm", str(tmp_path / "x.pkl")]) == 2
    assert "--from-edm" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "out"), "--from-edm", str(tmp_path / "x.pkl")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_other_files_are_told(tmp_path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_snapshot(tmp_path / "none.pkl")
    for i, content in enumerate([b"", b"PK\x03\x04", pickle.dumps({"net": 1}), pickle.dumps({"ema": {"model": 2}})]):
        (tmp_path / f"{i}.pkl").write_bytes(content)
        with pytest.raises(UserError, match="Not a network snapshot"):
            read_snapshot(tmp_path / f"{i}.pkl")


@pytest.mark.parametrize(
    ("arguments", "changes", "match"),
    [
        ({}, {"wrapper": "VPPrecond"}, "a VPPrecond"),
        ({}, {"outer": {"sigma_data": 1.0}}, "sigma_data"),
        ({}, {"inner": {"_init_args": (8,)}}, "Not a network snapshot"),
        ({"resample_filter": [1, 3, 3, 1]}, {}, "resample_filter"),
        ({"encoder_type": "residual"}, {}, "encoder_type"),
        ({"unheard_of": 1}, {}, "unheard_of"),
        ({"model_channels": 16}, {}, "do not fit"),
        ({"img_resolution": "large"}, {}, "do not fit"),
    ],
)
def test_networks_that_are_not_built_are_told(arguments, changes, match, publish, tmp_path) -> None:
    file = publish("SongUNet", published_tensors("SongUNet"), arguments_of("SongUNet") | arguments, **changes)
    with pytest.raises(UserError, match=match):
        convert_snapshot(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_architectures_are_told(publish) -> None:
    with pytest.raises(UserError, match="DhariwalUNet"):
        architecture(read_snapshot(publish("UNetModel", {}, {})))
