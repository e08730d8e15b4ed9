"""Merging of folders and deltas: bits, architecture checks, memory, what is written, and the command."""

import json
import weakref

import pytest
import tiny_networks
import torch
from deme_parts import built, made_up
from safetensors.torch import load_file, save_file

from lightning_t2i import frozen, streamed
from lightning_t2i.cli.main import main
from lightning_t2i.cli.merge import parse_weights
from lightning_t2i.errors import UserError
from lightning_t2i.frozen import folder_identity
from lightning_t2i.merging import merge_folders, save_delta
from lightning_t2i.streamed import AHEAD, Entry, index, read_header, write_streamed


def folder(path, seed: int, dtype=torch.float32, **more):
    """A model folder: two weight files, a buffer of integers, a config and a card."""
    generator = torch.Generator().manual_seed(seed)
    (path / "unet").mkdir(parents=True)
    for part in ("a", "b"):
        state = {f"{part}.weight": torch.randn(4, 3, generator=generator).to(dtype), **more.get(part, {})}
        save_file(state, path / "unet" / f"model-{part}.safetensors")
    save_file({"x": torch.randn(2, generator=generator), "ids": torch.arange(3) + seed}, path / "m.safetensors")
    (path / "config.json").write_text('{"_class_name": "X"}')
    (path / "README.md").write_text("about the base")
    return path


def state(path) -> dict[str, torch.Tensor]:
    return {name: entry.read() for name, entry in index(path).items()}


@pytest.fixture
def folders(tmp_path):
    return [folder(tmp_path / name, seed) for seed, name in enumerate(("base", "one", "two"))]


def test_folders_are_merged_tensor_by_tensor(folders, tmp_path):
    base, one, two = folders
    out = merge_folders(tmp_path / "out", base, [one, two], [0.25, -0.5])
    theta, a, b, found = map(state, (base, one, two, out))
    assert found.keys() == theta.keys()
    for name, tensor in found.items():
        if name.endswith("ids"):
            assert torch.equal(tensor, theta[name])  # integers stay those of the base
        else:
            expected = theta[name] + 0.25 * (a[name] - theta[name]) - 0.5 * (b[name] - theta[name])
            torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=0)
    assert (out / "config.json").is_file() and not (out / "README.md").exists()
    about = json.loads((out / "merge.json").read_text())
    assert about["weights"] == [0.25, -0.5] and [e["folder"] for e in about["experts"]] == ["one", "two"]
    assert load_file(out / "m.safetensors").keys() == {"x", "ids"}  # a file that safetensors itself reads


def test_no_weight_gives_the_bits_of_the_base_and_one_those_of_the_expert(folders, tmp_path):
    base, one, two = folders
    for number, (weights, like) in enumerate([([0.0, 0.0], base), ([0.0, 1.0], two)]):
        found = state(merge_folders(tmp_path / f"out{number}", base, [one, two], weights))
        for name, tensor in state(like).items():
            if not name.endswith("ids"):
                torch.testing.assert_close(found[name], tensor, atol=1e-6 * number, rtol=0)


def test_half_precision_is_summed_in_float32_and_stays_half(tmp_path):
    base, one = (folder(tmp_path / str(i), i, torch.float16) for i in range(2))
    found = state(merge_folders(tmp_path / "out", base, [one], [0.3]))
    theta, other = state(base)["unet/a.weight"], state(one)["unet/a.weight"]
    assert found["unet/a.weight"].dtype == torch.float16
    exact = theta.double() + 0.3 * (other.double() - theta.double())
    assert torch.equal(found["unet/a.weight"], exact.half())


def test_other_names_of_files_do_not_matter(folders, tmp_path):
    base, one, _ = folders
    whole = {**load_file(one / "unet/model-a.safetensors"), **load_file(one / "unet/model-b.safetensors")}
    for file in (one / "unet").glob("*"):
        file.unlink()
    save_file(whole, one / "unet" / "all.safetensors")
    found = state(merge_folders(tmp_path / "out", base, [one], [1.0]))
    torch.testing.assert_close(found["unet/b.weight"], whole["b.weight"], atol=1e-6, rtol=0)


def test_a_delta_is_added_to_the_denoising_network_alone(folders, tmp_path):
    base, _, _ = folders
    tau = torch.ones(4, 3)
    save_delta(tmp_path / "range-0-of-1.safetensors", [("a.weight", tau)], {"base": "x", "index": 0})
    found = state(merge_folders(tmp_path / "out", base, [tmp_path / "range-0-of-1.safetensors"], [0.5]))
    for name, tensor in state(base).items():
        assert torch.equal(found[name], tensor + 0.5 if name == "unet/a.weight" else tensor)


def test_memory_does_not_grow_with_tensors_files_or_experts(tmp_path, monkeypatch):
    """The sum, what is added, and those that are read ahead, of 48 pieces in each of five folders."""
    size = 250_000
    monkeypatch.setattr(streamed, "PIECE", 100_000)
    for k in range(5):
        (tmp_path / str(k)).mkdir()
        save_file({f"t{i}": torch.full((size,), float(k)) for i in range(16)}, tmp_path / str(k) / "m.safetensors")
    read, living, most = Entry.read, weakref.WeakSet(), []

    def counted(self):
        tensor = read(self)
        living.add(tensor)
        most.append((len(living), len(tensor)))
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Entry, "read", counted)
        out = merge_folders(tmp_path / "out", tmp_path / "0", [tmp_path / str(k) for k in range(1, 5)], [0.25] * 4)
    assert AHEAD < max(most)[0] <= AHEAD + 3 and {length for _, length in most} == {100_000, 50_000}
    assert torch.equal(state(out)["./t3"], torch.full((size,), 2.5))


def test_what_is_merged_is_read_once_and_known_as_always(folders, tmp_path, monkeypatch):
    base, one, two = folders
    order = ["unet/model-a.safetensors", "unet/model-b.safetensors"]
    digest, again = frozen._digest_of, []
    monkeypatch.setattr(frozen, "_digest_of", lambda file: again.append(file) or digest(file))
    out = merge_folders(tmp_path / "out", base, [one, two], [0.5, 0.0])
    read = [f.relative_to(tmp_path).as_posix() for f in again if f.suffix == ".safetensors"]
    assert read == ["two/m.safetensors", *(f"two/{name}" for name in order)]  # what has no weight is not merged
    about = json.loads((out / "merge.json").read_text())
    monkeypatch.undo()
    assert about["base"] == folder_identity(base)
    assert [e["identity"] for e in about["experts"]] == [folder_identity(one), folder_identity(two)]


@pytest.mark.parametrize("order", ["cab", "bca", "cba", "acb"])
def test_files_in_another_order_are_known_as_always(tmp_path, order):
    for name, names in (("base", "abc"), ("one", order)):
        (tmp_path / name).mkdir()
        like = dict.fromkeys(names, (torch.float32, (3,)))
        tensors = [torch.full((3,), float(ord(k))) for k in names]
        write_streamed(tmp_path / name / "m.safetensors", like, tensors, {"format": "pt"})
    out = merge_folders(tmp_path / "out", tmp_path / "base", [tmp_path / "one"], [0.5])
    (about,) = json.loads((out / "merge.json").read_text())["experts"]
    assert about["identity"] == folder_identity(tmp_path / "one") and state(out).keys() == {"./a", "./b", "./c"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, e: save_file({"y": torch.ones(1)}, e / "more.safetensors"), "first: ./y"),
        (lambda b, e: (e / "m.safetensors").unlink(), "architecture"),
        (lambda b, e: save_file({"x": torch.ones(3), "ids": torch.arange(3)}, e / "m.safetensors"), "first: ./x"),
        (lambda b, e: (e / "m.safetensors").write_bytes(b"\x04" + 7 * b"\0" + b"nojs"), "safetensors"),
        (lambda b, e: [f.unlink() for f in b.rglob("*.safetensors")], "base has no"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(folders, tmp_path, change, message):
    base, one, two = folders
    change(base, one)
    with pytest.raises(UserError, match=message):
        merge_folders(tmp_path / "out", base, [one, two], [0.5, 0.5])
    assert not (tmp_path / "out").exists()


def test_missing_folders_other_files_and_an_existing_target_are_refused(folders, tmp_path):
    base, one, _ = folders
    for out, experts, message in (
        (tmp_path / "out", [tmp_path / "none"], "no such folder"),
        (tmp_path / "out", [base / "m.safetensors"], "no delta"),
        (one, [one], "folder exists"),
    ):
        with pytest.raises(UserError, match=message):
            merge_folders(out, base, experts, [1.0])
    with pytest.raises(UserError, match="one weight for each"):
        merge_folders(tmp_path / "out", base, [one], [0.5, 0.5])


def test_deltas_of_two_bases_are_refused(folders, tmp_path):
    base, _, _ = folders
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for i, file in enumerate(files):
        save_delta(file, [("a.weight", torch.ones(4, 3))], {"base": f"sha256:{i}", "ranges": 2})
    with pytest.raises(UserError, match="different base"):
        merge_folders(tmp_path / "out", base, files, [0.5, 0.5])


def test_deltas_with_projections_are_sent_to_the_run(tmp_path):
    base = tiny_networks.pipeline_folder(tmp_path / "base")
    module = built(base, tmp_path / "deltas")
    made_up(module)
    with pytest.raises(UserError, match="--run NAME"):
        merge_folders(tmp_path / "out", base, module.found_deltas(), [0.5, 0.5])


def test_a_failing_write_leaves_nothing(tmp_path):
    def tensors():
        yield torch.ones(2)
        raise OSError("full")

    like = {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    with pytest.raises(OSError, match="full"):
        write_streamed(tmp_path / "m.safetensors", like, tensors(), {})
    for count, more in ((3, "-4 bytes"), (5, r"\+4 bytes")):
        with pytest.raises(ValueError, match=more):
            write_streamed(tmp_path / "m.safetensors", like, [torch.ones(count)], {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pieces_of_another_precision_meet(tmp_path, monkeypatch, dtype):
    """A float32 base and an expert of either precision, in pieces of three numbers: no matter."""
    for name, factor, own in (("base", 1.0, torch.float32), ("one", 3.0, dtype)):
        (tmp_path / name).mkdir()
        tensors = {"a": factor * torch.arange(10.0), "b": factor * torch.ones(()), "empty": torch.ones(0, 4)}
        save_file({k: t.to(own) for k, t in tensors.items()}, tmp_path / name / "m.safetensors")
    monkeypatch.setattr(streamed, "PIECE", 3)
    found = state(merge_folders(tmp_path / "out", tmp_path / "base", [tmp_path / "one"], [0.5]))
    assert torch.equal(found["./a"], 2 * torch.arange(10.0)) and found["./b"] == 2 and found["./empty"].shape == (0, 4)


def test_a_truncated_file_is_told(tmp_path):
    save_file({"a": torch.ones(100)}, tmp_path / "m.safetensors")
    data = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(data[:-40])
    with pytest.raises(UserError, match="middle of a tensor"):
        read_header(tmp_path / "m.safetensors")[0]["a"].read()


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_merges_folders(folders, tmp_path, capsys):
    words = ["merge", str(tmp_path / "out"), *map(str, folders)]
    assert main([*words, "--weights", "uniform"]) == 0
    assert "weights 0.5, 0.5" in capsys.readouterr().out
    theta, a, b = map(state, folders)
    middle = (a["./x"] + b["./x"]) / 2
    torch.testing.assert_close(state(tmp_path / "out")["./x"], middle, atol=1e-6, rtol=0)
    assert not torch.equal(middle, theta["./x"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "base and experts, or a run"),
        (["OUT"], "base and experts, or a run"),
        (["OUT", "BASE", "ONE"], "--weights"),
        (["OUT", "BASE", "ONE", "--weights", "0.5,0.5"], "one weight for each"),
        (["OUT", "BASE", "ONE", "--weights", "x"], "Not weights"),
        (["OUT", "BASE", "ONE", "--weights", "1", "--other", "2"], "given weights"),
        (["OUT", "BASE", "ONE", "--weights", "1", "--run", "x"], "base and experts, or a run"),
    ],
)
def test_mistakes_of_the_command(words, message, folders, tmp_path, capsys):
    places = {"OUT": tmp_path / "out", "BASE": folders[0], "ONE": folders[1]}
    assert main(["merge", *(str(places.get(word, word)) for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_weights_of_the_command():
    assert parse_weights("0.1,-2", 2) == [0.1, -2.0]
    assert parse_weights("[0.1, 0.2]", 2) == [0.1, 0.2]
    with pytest.raises(UserError):
        parse_weights("nan,1", 2)
