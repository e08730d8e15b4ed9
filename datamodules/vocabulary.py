"""The tokenizers of the tiny pipelines: `python -m datamodules.vocabulary OUT [--source shapes openmoji]`.

Trained on the English and Chinese captions of the training splits: byte-level BPE for CLIP, and for T5, whose
tokenizer class is a Unigram model, pieces of the same number. Both are saved as stock fast tokenizers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamodules.records import data_folder
from datamodules.shards import Index, read_json

PIECES, LENGTH = 2048, 32


def captions(sources: list[str]) -> Iterator[str]:
    """Every caption of the training splits, both languages, in index order."""
    for source in sources:
        index = Index.load(data_folder(source), "train")
        for row in range(len(index)):
            for language in ("en", "zh"):
                yield from read_json(index, row)["caption"].get(language, [])


def clip_tokenizer(texts: list[str]) -> Any:
    """A CLIPTokenizer of PIECES byte-level BPE pieces; 0 begins and 1 ends a caption and pads it."""
    from tokenizers import trainers
    from transformers import CLIPTokenizer

    special = ["<|startoftext|>", "<|endoftext|>"]
    fresh = CLIPTokenizer(vocab={token: i for i, token in enumerate(special)}, merges=[])
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        special_tokens=special,
        end_of_word_suffix="</w>",
        initial_alphabet=_byte_alphabet(),
        show_progress=False,
    )
    model = fresh.backend_tokenizer
    model.train_from_iterator(texts, trainer)
    state = json.loads(model.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    return CLIPTokenizer(vocab=state["vocab"], merges=merges, model_max_length=LENGTH)


def t5_tokenizer(texts: list[str]) -> Any:
    """A T5Tokenizer of at most PIECES Unigram pieces: 0 pads, 1 ends, 2 is unknown."""
    from tokenizers import trainers
    from transformers import T5Tokenizer

    special = ["<pad>", "</s>", "<unk>"]
    fresh = T5Tokenizer(extra_ids=0)
    trainer = trainers.UnigramTrainer(
        vocab_size=PIECES, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    model = fresh.backend_tokenizer
    model.train_from_iterator(texts, trainer)
    vocab = [(piece, score) for piece, score in json.loads(model.to_str())["model"]["vocab"]]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=LENGTH)


def _byte_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m datamodules.vocabulary", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", nargs="+", default=["shapes", "openmoji"])
    options = parser.parse_args()
    texts = list(captions(options.source))
    for name, make in (("clip", clip_tokenizer), ("t5", t5_tokenizer)):
        tokenizer = make(texts)
        tokenizer.save_pretrained(options.out / name)
        lengths = [len(ids) for ids in tokenizer(texts[:: max(1, len(texts) // 5000)])["input_ids"]]
        print(f"{name}: {len(tokenizer)} pieces, longest of {len(lengths)} captions {max(lengths)} tokens")


if __name__ == "__main__":
    main()
