"""Teacher pairs: equal whoever makes them, whole after a kill, refused when stale, and shipped for the tiny teacher."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lightning as L
import numpy as np
import programs
import pytest
import torch
import webdataset
import yaml
from tiny_networks import pipeline_folder

from datamodules.pair_prompts import PairPrompts, array_part
from datamodules.pair_shards import PairFolder
from datamodules.pairs import Pairs
from datamodules.prompts import Prompts
from datamodules.records import Shards
from datamodules.streams import Streams
from lightning_modules.teacher import Teacher
from lightning_t2i.cli.main import main
from lightning_t2i.cli.pair_job import PairJob
from lightning_t2i.errors import UserError
from lightning_t2i.metrics.shapes_score import ShapesScore
from lightning_t2i.networks.codec import LatentCodec
from lightning_t2i.options import MethodOptions
from lightning_t2i.pairs import noise, noise_seeds, teacher_identity
from lightning_t2i.strategies import FSDP2

ROOT = Path(__file__).resolve().parent.parent.parent
WORDS = ("red", "blue", "square", "circle", "two", "the")
N, BATCH, PER_SHARD = 22, 4, 8  # shards of 8, 8 and 6 pairs, the last batch of 2


# Where nothing is left to do Lightning is given no batch.
NOTHING_LEFT = pytest.mark.filterwarnings("ignore:Total length of `StreamLoader` across ranks is zero:UserWarning")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> str:
    return str(pipeline_folder(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("prompts") / "words.jsonl"
    rows = [{"caption": {"en": [f"{WORDS[i % 6]} {WORDS[i // 6]}"]}, "label": i} for i in range(N)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


def teacher(pipeline: str, **options) -> Teacher:
    return Teacher(pipeline, **{"guidance": 2.0, "steps": 2, **options})


def stream(prompts: str, folder: Path, **options) -> PairPrompts:
    sizes = {"batch_size": BATCH, "samples_per_shard": PER_SHARD}
    return PairPrompts(prompts, str(folder), **{**sizes, **options})


def run(method: Teacher, job: PairPrompts, **options) -> None:
    """The job, as the command runs it."""
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[PairJob(job)], **options,
    )  # fmt: skip
    trainer.predict(method, datamodule=Streams(predict=job, seed=method.common.seed), return_predictions=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory, pipeline, prompts) -> Path:
    """Pairs that one process made; tests that change them take a copy."""
    folder = tmp_path_factory.mktemp("made") / "pairs"
    run(teacher(pipeline), stream(prompts, folder))
    return folder


@pytest.fixture
def copied(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "pairs"))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "README.md"}


def begun(pairs: Pairs, shuffle: bool = False) -> Pairs:
    pairs.prepare()
    pairs.setup()
    pairs.begin(0, "pairs", shuffle)
    return pairs


# ---- noise -----------------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_its_seed_alone() -> None:
    seeds = noise_seeds(7, torch.arange(64))
    assert len(set(seeds.tolist())) == 64 and bool((seeds < 0).any()) and bool((seeds > 2**32).any())
    assert torch.equal(seeds[10:20], noise_seeds(7, torch.arange(10, 20)))
    assert not torch.equal(seeds, noise_seeds(8, torch.arange(64)))
    z = noise(seeds, (4, 8, 8))
    assert torch.equal(z[5:6], noise(seeds[5:6], (4, 8, 8)))
    assert z.dtype == torch.float32
    assert abs(float(z.mean())) < 0.03 and abs(float(z.std()) - 1) < 0.03
    assert noise(torch.tensor([3]), (3,)).tolist() == [[0.7611181139945984, -1.1388630867004395, -0.20859627425670624]]


# ---- what a pair is --------------------------------------------------------------------------------------------------


def test_a_pair_is_the_teachers_map_of_its_noise_and_prompt(made, pipeline) -> None:
    records = begun(Pairs(str(made), pipeline, guidance=2.0, steps=2, solver="ddim", batch_size=N)).load(range(N), 0)
    method = teacher(pipeline)
    method.configure_model()
    assert records.position.tolist() == list(range(N)) and records.label.tolist() == list(range(N))
    assert records.caption == [f"{WORDS[i % 6]} {WORDS[i // 6]}" for i in range(N)]
    assert records.noise_seed.tolist() == noise_seeds(0, torch.arange(N)).tolist()
    assert len(set(records.id.tolist())) == N
    z = noise(records.noise_seed, (4, 8, 8))
    with torch.no_grad():
        for rows in (slice(0, BATCH), slice(20, 22)):  # batches of the job: the same bits
            x0 = method.couple(z[rows], method.condition(records.slice(rows.start, rows.stop)))
            assert torch.equal(records.latent[rows], x0.half().float())
        x0 = method.couple(z, method.condition(records))  # another batch size: up to the network's rounding
    torch.testing.assert_close(records.latent, x0, atol=2e-3, rtol=2e-3)
    assert float((x0[0] - x0[1]).abs().mean()) > 0.1  # pairs differ, so a wrong row would be seen


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves the last shard open
def test_webdataset_reads_the_shards(made) -> None:
    shards = [str(path) for path in sorted(made.glob("*.tar"))]
    batches = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode())
    assert [len(batch["npy"]) for batch in batches] == [4, 4, 4, 4, 4, 2]
    assert batches[0]["npy"].dtype == np.float16 and batches[0]["npy"].shape == (4, 4, 8, 8)
    rows = [row for batch in batches for row in batch["json"]]
    assert [row["label"] for row in rows] == list(range(N))
    assert rows[3]["noise_seed"] == int(noise_seeds(0, torch.tensor([3]))) and rows[3]["caption"] == {
        "en": ["circle red"]
    }
    assert set(rows[0]) == {"caption", "label", "noise_seed", "source"}


def test_pairs_are_prompts_too(made) -> None:
    prompts = Prompts(str(made))
    prompts.setup()
    prompts.begin(0, "main", shuffle=False)
    assert prompts.load([3], 0).caption == ["circle red"]


# ---- who makes them --------------------------------------------------------------------------------------------------


def test_array_tasks_give_the_bytes_of_one_job(made, tmp_path, pipeline, prompts, capsys) -> None:
    folder = tmp_path / "pairs"
    run(teacher(pipeline), stream(prompts, folder, part=(1, 2)))
    assert [path.name for path in folder.glob("*.tar")] == ["train-000001.tar"]
    assert "1 of 3 shards" in capsys.readouterr().out
    with pytest.raises(UserError, match="incomplete"):
        begun(Pairs(str(folder), pipeline))
    run(teacher(pipeline), stream(prompts, folder, part=(0, 2)))
    assert "complete" in capsys.readouterr().out
    assert bytes_of(folder) == bytes_of(made)


def two_ranks(rank: int, pipeline: str, prompts: str, folder: str) -> int:
    run(teacher(pipeline), stream(prompts, Path(folder)), devices=2, strategy=FSDP2(replicate=2, shard=1))
    return rank


def test_two_ranks_give_the_bytes_of_one(made, tmp_path, pipeline, prompts, ranks) -> None:
    folder = tmp_path / "pairs"
    assert ranks(two_ranks, pipeline, prompts, str(folder)) == [0, 1]
    assert bytes_of(folder) == bytes_of(made)


def test_work_is_dealt_out_by_shards_and_ranks_take_equal_steps(tmp_path, prompts) -> None:
    job = stream(prompts, tmp_path)
    job.setup()
    job.begin(0, "predict", shuffle=False)
    for world in (1, 2, 4):
        passes = [job.passes(rank, world) for rank in range(world)]
        assert len({len(p) for p in passes}) == 1  # a teacher cut over the ranks needs all of them at each call
        made = [k for rank in range(world) for k in job.mine(rank, world)]
        assert sorted(made) == [0, 1, 2]
    first, second = job.passes(0, 2), job.passes(1, 2)
    assert first == [range(4), range(4, 8), range(16, 20), range(20, 22)]
    assert second[:2] == [range(8, 12), range(12, 16)]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, (0, 1)), ({"ID": "3", "COUNT": "8"}, (3, 8)), ({"ID": "7", "MIN": "1", "STEP": "2", "COUNT": "5"}, (3, 5))],
)
def test_part_of_a_job_array(monkeypatch, environment, expected) -> None:
    for name in ("ID", "COUNT", "MIN", "STEP"):
        monkeypatch.delenv(f"SLURM_ARRAY_TASK_{name}", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert array_part() == expected


@pytest.mark.parametrize("options", [{"part": (2, 2)}, {"batch_size": 0}, {"samples_per_shard": 0}])
def test_sizes_and_parts_out_of_range_are_refused(tmp_path, prompts, options) -> None:
    with pytest.raises(UserError, match=r"data\.predict"):
        stream(prompts, tmp_path, **options)


@NOTHING_LEFT
def test_a_complete_folder_stays_as_it_is(copied, pipeline, prompts) -> None:
    before = bytes_of(copied)
    stamps = {path: path.stat().st_mtime_ns for path in copied.iterdir()}
    run(teacher(pipeline), stream(prompts, copied))
    assert bytes_of(copied) == before and stamps == {path: path.stat().st_mtime_ns for path in copied.iterdir()}


def test_several_that_finish_at_once_join_once(made, tmp_path) -> None:
    about = json.loads((made / "dataset.json").read_text())
    folders = [PairFolder(tmp_path / "pairs", "train", 3, about["parameters"], about["licence"]) for _ in range(4)]
    for number in range(3):
        shard = folders[0].begin(number, {"shape": [1, 1], "noise": "n"})
        shard.write([number], torch.zeros(1, 1, 1), [{"noise_seed": number}])
        shard.close()
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(PairFolder.join, folders)) == [True] * 4
    names = ["dataset.json", "index-train.parquet", *(f"train-00000{i}.tar" for i in range(3))]
    assert sorted(path.name for path in (tmp_path / "pairs").iterdir()) == names


def test_two_jobs_cannot_write_one_shard(tmp_path) -> None:
    first, second = (PairFolder(tmp_path, "train", 1, {"a": 1}, "none") for _ in range(2))
    held = first.begin(0, {})
    assert held is not None
    with pytest.raises(UserError, match="Another process makes this shard"):
        second.begin(0, {})
    held.abandon()
    again = second.begin(0, {})
    assert again is not None
    again.abandon()


# ---- kills -----------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
import datamodules.pair_shards as module
from test_pairs import run, stream, teacher
from pathlib import Path

write = module.ShardInProgress.write

def killing(self, positions, *rest):
    write(self, positions, *rest)
    if positions[0] == {at}:
        self._writer._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

module.ShardInProgress.write = killing
run(teacher({pipeline!r}), stream({prompts!r}, Path({folder!r})))
"""


def test_a_killed_job_goes_on_with_the_missing_shards(made, tmp_path, pipeline, prompts) -> None:
    folder = tmp_path / "pairs"
    paths = [str(ROOT), str(ROOT / "tests/helpers"), str(Path(__file__).parent)]
    program = tmp_path / "killed.py"
    program.write_text(KILLED.format(paths=paths, at=8, pipeline=pipeline, prompts=prompts, folder=str(folder)))
    done = programs.run([sys.executable, str(program)], cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in folder.glob("*.tar")] == ["train-000000.tar"]
    partial = folder / ".train-000001/train-000001.tar"
    assert 0 < partial.stat().st_size < (made / "train-000001.tar").stat().st_size
    with pytest.raises(UserError, match="incomplete[\\s\\S]*1 shards so far"):
        begun(Pairs(str(folder), pipeline))
    stamp = (folder / "train-000000.tar").stat().st_mtime_ns
    run(teacher(pipeline), stream(prompts, folder))
    assert (folder / "train-000000.tar").stat().st_mtime_ns == stamp
    assert bytes_of(folder) == bytes_of(made)


@NOTHING_LEFT
def test_a_job_that_was_killed_before_the_index_only_joins(copied, made, pipeline, prompts, monkeypatch) -> None:
    shutil.rmtree(copied)
    monkeypatch.setattr(PairFolder, "join", lambda self: False)  # as if killed there
    run(teacher(pipeline), stream(prompts, copied))
    monkeypatch.undo()
    assert not (copied / "dataset.json").exists()
    monkeypatch.setattr(Teacher, "couple", None)  # nothing is sampled again
    run(teacher(pipeline), stream(prompts, copied))
    assert bytes_of(copied) == bytes_of(made)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [("guidance", {"guidance": 3.0}), ("steps", {"steps": 3}), ("solver", {"solver": "dpmpp_2m"}),
     ("seed", {"common": MethodOptions(seed=1)})],
)  # fmt: skip
@pytest.mark.parametrize("complete", [True, False])
def test_a_job_refuses_pairs_of_another_recipe(copied, pipeline, prompts, name, options, complete) -> None:
    if not complete:  # as the folder is while it is made
        (copied / "job.json").write_text(json.dumps(json.loads((copied / "dataset.json").read_text())["parameters"]))
        (copied / "dataset.json").unlink()
    with pytest.raises(UserError, match=f"stale or foreign: '{name}'[\\s\\S]*given[\\s\\S]*allowed[\\s\\S]*fix"):
        run(teacher(pipeline, **options), stream(prompts, copied))


def test_a_job_refuses_other_prompts_and_other_data(copied, made, pipeline, prompts, tmp_path) -> None:
    with pytest.raises(UserError, match="stale or foreign: 'prompts'"):
        run(teacher(pipeline), stream(prompts, copied, limit=N - 1))
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(made / "train-000000.tar", other)
    with pytest.raises(UserError, match="something else here"):
        run(teacher(pipeline), stream(prompts, other))


def test_a_reader_refuses_pairs_of_another_teacher_or_sampler(made, pipeline, tmp_path) -> None:
    changed = Path(shutil.copytree(pipeline, tmp_path / "changed"))
    config = json.loads((changed / "scheduler/scheduler_config.json").read_text())
    (changed / "scheduler/scheduler_config.json").write_text(json.dumps({**config, "beta_end": 0.013}))
    with pytest.raises(UserError, match="stale or foreign: 'teacher'"):
        begun(Pairs(str(made), str(changed)))
    for name, value in {"guidance": 3.0, "steps": 25, "solver": "heun"}.items():
        with pytest.raises(UserError, match=f"stale or foreign: '{name}'"):
            begun(Pairs(str(made), pipeline, **{name: value}))
    with pytest.raises(UserError, match="No pairs are there"):
        begun(Pairs(str(tmp_path), pipeline))


def test_a_teacher_is_known_by_what_x0_passes_through(pipeline, tmp_path) -> None:
    moved = Path(shutil.copytree(pipeline, tmp_path / "moved"))
    (moved / "score.json").write_text("{}")
    (moved / "vae/config.json").write_text("{}")
    assert teacher_identity(moved) == teacher_identity(pipeline)
    (moved / "unet/config.json").write_text("{}")
    assert teacher_identity(moved) != teacher_identity(pipeline)
    assert teacher_identity("owner/name", "abc") == "owner/name@abc"


def test_changed_bytes_of_a_shard_are_found(copied, pipeline) -> None:
    shard = copied / "train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="bytes of a shard have changed[\\s\\S]*train-000001.tar"):
        begun(Pairs(str(copied), pipeline))
    assert len(begun(Pairs(str(copied), pipeline, verify=False))) == N


def test_noise_that_is_not_drawn_again_is_found(made, copied, pipeline, monkeypatch) -> None:
    about = json.loads((copied / "dataset.json").read_text())
    about["noise"]["train-000002.tar"] = "0" * 64
    (copied / "dataset.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="noise of a shard[\\s\\S]*train-000002.tar"):
        begun(Pairs(str(copied), pipeline))
    monkeypatch.setattr("lightning_t2i.pairs.noise", lambda seeds, shape: noise(seeds + 1, shape))
    with pytest.raises(UserError, match="noise of a shard[\\s\\S]*train-000000.tar"):
        begun(Pairs(str(made), pipeline))


def test_empty_prompts_are_refused(tmp_path, pipeline, make_data_set) -> None:
    file = tmp_path / "empty.txt"
    file.write_text("red\n\nblue\n")
    with pytest.raises(UserError, match="Empty prompt"):
        run(teacher(pipeline), stream(str(file), tmp_path / "a"))
    folder = make_data_set(n=10, captions=lambda i: {"en": [" " if i == 7 else "red"]})
    with pytest.raises(UserError, match="A pair needs its prompt[\\s\\S]*k0007"):
        run(teacher(pipeline), stream(str(folder), tmp_path / "b"))


def test_a_pair_is_read_as_it_was_whatever_the_order_of_the_batch_in_memory(tmp_path) -> None:
    """The noise of small shapes lies in memory by columns, and so does what is computed from it."""
    x0 = torch.arange(12.0).view(3, 4).T[:, :, None, None]
    assert not x0.is_contiguous()
    folder = PairFolder(tmp_path, "train", 1, {"x0": "image"}, "none")
    shard = folder.begin(0, {"shape": [3, 1, 1], "noise": "none"})
    shard.write(range(4), x0, [{"caption": {"en": ["a"]}, "noise_seed": i} for i in range(4)])
    shard.close()
    assert folder.join()
    stored = Shards(tmp_path, "train")
    rows = [np.frombuffer(stored.data(i), "<f2").tolist() for i in range(4)]
    assert rows == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]


def test_values_beyond_float16_are_refused(tmp_path) -> None:
    shard = PairFolder(tmp_path, "train", 1, {}, "none").begin(0, {})
    x0 = torch.tensor([1.0, 7e4]).view(2, 1, 1, 1)
    with pytest.raises(UserError, match="not finite in float16[\\s\\S]*given:   5"):
        shard.write([4, 5], x0, [{"noise_seed": 0}] * 2)
    shard.abandon()


def test_another_method_cannot_make_pairs(tmp_path, prompts) -> None:
    with pytest.raises(UserError, match="maps noise to data"):
        PairJob(stream(prompts, tmp_path)).setup(L.Trainer(accelerator="cpu", logger=False), object(), "predict")


# ---- as a stream -----------------------------------------------------------------------------------------------------


def test_streams_remember_where_pairs_were(made, pipeline) -> None:
    def data() -> Streams:
        pairs = Pairs(str(made), pipeline, batch_size=4)
        streams = Streams(main=Pairs(str(made), pipeline, batch_size=2), pairs=pairs, seed=3)
        streams.prepare_data()
        streams.setup("fit")
        return streams

    whole = data()
    batches = [batch for batch, _ in zip(whole.train_dataloader(), range(6), strict=False)]
    assert [len(batch["pairs"]) for batch in batches] == [4] * 6
    assert batches[0]["pairs"].id.tolist() != sorted(batches[0]["pairs"].id.tolist())  # shuffled
    state = whole.state_dict()
    state["batches"] = 3
    for stream_state in state["streams"].values():
        stream_state["cursor"] = 3
    resumed = data()
    resumed.load_state_dict(state)
    for expected, found in zip(batches[3:], resumed.train_dataloader(), strict=False):
        assert torch.equal(expected["pairs"].noise_seed, found["pairs"].noise_seed)
        assert torch.equal(expected["pairs"].latent, found["pairs"].latent)
        assert expected["pairs"].caption == found["pairs"].caption


def test_the_command_makes_pairs(tmp_path, monkeypatch, pipeline, prompts, made, capsys) -> None:
    monkeypatch.setenv("LIGHTNING_T2I_RUNS", str(tmp_path / "runs"))
    sizes = {"batch_size": BATCH, "samples_per_shard": PER_SHARD}
    job = {"source": prompts, "folder": str(tmp_path / "pairs"), **sizes}
    config = {
        "model": {"class_path": "lightning_modules.teacher.Teacher",
                  "init_args": {"network": pipeline, "guidance": 2.0, "steps": 2}},
        "data": {"class_path": "datamodules.streams.Streams",
                 "init_args": {"predict": {"class_path": "datamodules.pair_prompts.PairPrompts", "init_args": job}}},
        "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
    }  # fmt: skip
    file = tmp_path / "pairs.yaml"
    file.write_text(yaml.safe_dump(config))
    assert main(["predict", "--config", str(file)]) == 0
    assert "complete" in capsys.readouterr().out
    assert bytes_of(tmp_path / "pairs") == bytes_of(made)
    assert main(["predict", "--config", str(file), "--model.guidance", "3.0"]) == 2
    assert "stale or foreign: 'guidance'" in capsys.readouterr().err


# ---- the shipped pairs -----------------------------------------------------------------------------------------------

TINY = ROOT / "assets/tiny"


@pytest.fixture(scope="module")
def shipped() -> Pairs:
    score = json.loads((TINY / "sd/score.json").read_text())
    recipe = {name: score[name] for name in ("guidance", "steps", "solver")}
    return begun(Pairs("assets/tiny/pairs", "assets/tiny/sd", **recipe))


def test_the_shipped_pairs_are_small_and_say_how_they_were_made(shipped) -> None:
    assert len(shipped) == 2000
    assert sum(path.stat().st_size for path in (TINY / "pairs").iterdir()) <= 2e6
    text = (TINY / "pairs/README.md").read_text()
    for word in ("Rebuild", "Time", "Machine", "Seed", "Licence", "configs/pairs/sd.yaml"):
        assert word in text, word


def test_the_sampler_reproduces_the_first_shipped_pairs(shipped) -> None:
    records = shipped.load(range(3), 0)
    method = Teacher("assets/tiny/sd", guidance=4.5)
    method.configure_model()
    x0 = method.couple(noise(records.noise_seed, shipped.shape), method.condition(records))
    torch.testing.assert_close(records.latent, x0, atol=5e-3, rtol=5e-3)


def test_decoded_shipped_pairs_show_their_prompts(shipped) -> None:
    """Near the teacher's score on test prompts, .787; pairs of shuffled prompts score about .09."""
    scenes = begun(Prompts("shapes", limit=400)).load(range(400), 0)
    records, metric = shipped.load(range(400), 0), ShapesScore()
    codec = LatentCodec.from_pretrained("assets/tiny/sd")
    with torch.no_grad():
        metric.update(codec.decode(records.latent).clamp(-1, 1), scenes.scene)
    assert float(metric.compute()["overall"]) > 0.7
    assert abs(float(records.latent.std()) - 1) < 0.2
