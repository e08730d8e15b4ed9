"""The benchmark of teacher pairs runs, and both its sides sample the same pairs."""

from __future__ import annotations

import torch
from tiny_networks import pipeline_folder

from benchmarks import pairs as benchmark
from datamodules.pairs import Pairs
from lightning_modules.teacher import Teacher


def test_job_and_bare_sampler_do_the_same_work(tmp_path, monkeypatch) -> None:
    file, network = tmp_path / "words.txt", str(pipeline_folder(tmp_path / "teacher"))
    file.write_text("red\nblue\ntwo red\n")
    words = f"--network {network} --source {file} --pairs 3 --batch_size 2 --guidance 2 --steps 2 --rounds 2"
    options = benchmark.parser().parse_args(words.split())
    (found,) = benchmark.result(options)["tables"]
    (row,) = found["rows"]
    assert len(row) == len(found["columns"]) and row[:2] == [3, 4] and row[4] > 0

    sampled: list[torch.Tensor] = []
    couple = Teacher.couple
    monkeypatch.setattr(Teacher, "couple", lambda *args: sampled.append(couple(*args)) or sampled[-1])
    method = Teacher(network, guidance=2.0, steps=2)
    prompts = benchmark.job(method, options, tmp_path / "pairs")
    ready = benchmark.ready_for(method, prompts)
    sampled.clear()
    benchmark.bare(method, ready)
    pairs = Pairs(str(tmp_path / "pairs"), network)
    pairs.setup()
    pairs.begin(0, "pairs", shuffle=False)
    assert torch.equal(torch.cat(sampled).half().float(), pairs.load(range(3), 0).latent)
