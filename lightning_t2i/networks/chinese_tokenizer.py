"""The WordPiece tokenizer of Chinese BERT, 21,128 entries: [PAD] 0, [CLS] 101, [SEP] 102."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_t2i.networks.load import locate

VOCABULARY = "assets/tokenizers/bert-base-chinese"
# Not in the vocabulary, and common in captions: as Chinese-CLIP writes them.
CURLY = str.maketrans({"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'"})


class ChineseTokenizer:
    """Texts to ids `[CLS] ... [SEP]`, cut so that [SEP] stays.

    Args:
        source: folder (or hub id) of a BertTokenizer.
        length: longest text in tokens, [CLS] and [SEP] included.
    """

    def __init__(self, source: str = VOCABULARY, length: int = 32):
        from transformers import BertTokenizer

        self.length = length
        # A CLIPModel, which our folders are read as, has no second kind of tokens: stock processors are told so.
        inputs = ["input_ids", "attention_mask"]
        self.inner: Any = BertTokenizer.from_pretrained(
            locate(source), model_max_length=length, model_input_names=inputs
        )

    def __call__(self, texts: Sequence[str], full: bool = False) -> Tensor:
        """Ids int64 [B, L], 0 behind the text; L is that of the longest text, or `length` with `full`."""
        padding = "max_length" if full else "longest"
        plain = [text.translate(CURLY) for text in texts]
        found: Tensor = self.inner(
            plain, padding=padding, max_length=self.length, truncation=True, return_tensors="pt"
        )["input_ids"]
        return found

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's files, as `BertTokenizer.from_pretrained` reads them."""
        self.inner.save_pretrained(folder)
