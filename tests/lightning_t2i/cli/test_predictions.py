"""What `predict` writes beside the pictures: which prompt each belongs to."""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch

from lightning_t2i.batch import Records
from lightning_t2i.cli.predictions import Predictions


class Method:
    def condition(self, records):
        """None is conditioned on."""

    def sample(self, cond, keys, positions):
        return torch.zeros(len(positions), 3, 2, 2)


def test_lists_of_an_earlier_call_with_more_processes_are_gone(tmp_path):
    """Their pictures belong to other prompts now; rank 0 removes them before any rank writes."""
    for rank in range(4):
        (tmp_path / f"prompts-{rank}.jsonl").write_text('{"file": "000000.png", "prompt": "earlier"}\n')
    found = []

    def barrier() -> None:
        found.append(sorted(path.name for path in tmp_path.glob("prompts-*")))

    for rank in range(2):
        trainer = SimpleNamespace(global_rank=rank, is_global_zero=rank == 0, strategy=SimpleNamespace(barrier=barrier))
        writer, records = Predictions(tmp_path), Records.of_prompts(["of rank 0", "of rank 1"]).slice(rank, rank + 1)
        writer.on_predict_start(trainer, Method())
        writer.on_predict_batch_end(trainer, Method(), torch.zeros(1, 3, 2, 2), {"main": records}, 0)
    assert found == [[], ["prompts-0.jsonl"]]
    lists = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("prompts-*")}
    assert lists == {f"prompts-{r}.jsonl": {"file": f"00000{r}.png", "prompt": f"of rank {r}"} for r in range(2)}
