"""The tokenizers of the tiny pipelines: `python -m datamodules.vocabulary OUT [--source shapes openmoji]`.

Byte-pair encodings of the English and Chinese captions of the training splits, on bytes for CLIP and on characters for
T5 (whose class holds the pieces as a Unigram model). Both are saved as stock fast tokenizers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamodules.records import Shards, data_folder

PIECES, LENGTH = 2048, 32
CHARACTERS = 3  # Chinese is written without spaces: a piece of more characters would swallow whole phrases
FIRST_IDEOGRAPH = 0x2E80


def captions(sources: list[str]) -> Iterator[str]:
    """Every caption of the training splits, both languages, in index order."""
    for source in sources:
        shards = Shards(data_folder(source), "train")
        for row in range(len(shards)):
            for texts in shards.meta(row)["caption"].values():
                yield from texts


def clip_tokenizer(texts: list[str]) -> Any:
    """A CLIPTokenizer of PIECES byte-level BPE pieces; 0 begins and 1 ends a caption and pads it."""
    from tokenizers import trainers
    from transformers import CLIPTokenizer

    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=3 * PIECES,
        special_tokens=special,
        end_of_word_suffix="</w>",
        initial_alphabet=_byte_alphabet(),
        show_progress=False,
    )
    model = CLIPTokenizer(vocab={token: i for i, token in enumerate(special)}, merges=[]).backend_tokenizer
    model.train_from_iterator(texts, trainer)
    state = json.loads(model.to_str())["model"]
    pairs = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    # Longer pieces are built from shorter ones only, so dropping the long ones leaves no merge without its parts.
    pairs = [pair for pair in pairs if sum(ord(c) > 127 for c in "".join(pair)) <= 3 * CHARACTERS]
    merged = {"".join(pair) for pair in pairs}
    base = [piece for piece, _ in sorted(state["vocab"].items(), key=lambda item: item[1]) if piece not in merged]
    base = [piece for piece in base if len(piece.removesuffix("</w>")) == 1 or piece in special]
    pairs = pairs[: PIECES - len(base)]
    vocab = {piece: i for i, piece in enumerate([*base, *("".join(pair) for pair in pairs)])}
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=LENGTH)


def t5_tokenizer(texts: list[str]) -> Any:
    """A T5Tokenizer of at most PIECES pieces: 0 pads, 1 ends, 2 is unknown.

    The pieces are those of a BPE on characters. Early merges score higher, and every piece costs far more than that
    difference, so a caption is cut into as few pieces as possible.
    """
    from tokenizers import Tokenizer, models, trainers
    from transformers import T5Tokenizer

    special = ["<pad>", "</s>", "<unk>"]
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = T5Tokenizer(extra_ids=0).backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=3 * PIECES, special_tokens=special, show_progress=False)
    pairs.train_from_iterator(texts, trainer)
    pieces = [piece for piece, _ in sorted(pairs.get_vocab().items(), key=lambda item: item[1])]
    pieces = [piece for piece in pieces if sum(ord(c) > FIRST_IDEOGRAPH for c in piece) <= CHARACTERS][:PIECES]
    vocab = [(piece, 0.0 if piece in special else -10 - rank / PIECES) for rank, piece in enumerate(pieces)]
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
        sample = texts[:: max(1, len(texts) // 5000)]
        lengths = [len(ids) for ids in tokenizer(sample, truncation=False, verbose=False)["input_ids"]]
        print(f"{name}: {len(tokenizer)} pieces, longest of {len(lengths)} captions {max(lengths)} tokens")


if __name__ == "__main__":
    main()
