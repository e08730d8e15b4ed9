"""The WordPiece tokenizer of Chinese BERT, 21,128 entries: [PAD] 0, [CLS] 101, [SEP] 102."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_t2i.errors import UserError
from lightning_t2i.networks import load

VOCABULARY = "assets/tokenizers/bert-base-chinese"
SIZE, PAD, CLS, SEP = 21128, 0, 101, 102
# Not in the vocabulary, and common in captions: as Chinese-CLIP writes them.
CURLY = str.maketrans({"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'"})


class ChineseTokenizer:
    """Texts to ids `[CLS] ... [SEP]`, cut so that [SEP] stays.

    Args:
        source: folder (or hub id) of a BertTokenizer.
        length: longest text in tokens, [CLS] and [SEP] included.
        revision: commit of a hub id.

    Raises:
        UserError: there is none, or it has another vocabulary: towers take 0 for pads, the last other id for the end.
    """

    def __init__(self, source: str = VOCABULARY, length: int = 32, revision: str | None = None):
        from transformers import BertTokenizer

        self.length = length
        load.read_json(source, "tokenizer_config.json", revision)  # says what is wrong where the hub cannot be reached
        # A CLIPModel, which our folders are read as, has no second kind of tokens: stock processors are told so.
        inputs = ["input_ids", "attention_mask"]
        self.inner: Any = BertTokenizer.from_pretrained(
            load.locate(source), revision=revision, model_max_length=length, model_input_names=inputs
        )
        if isinstance(inner := self.inner, BertTokenizer):  # `check` has one that knows lengths alone
            _refuse_other("tokenizer", len(inner), inner.pad_token_id, inner.cls_token_id, inner.sep_token_id)

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


def refuse_text(config: Any) -> None:
    """Refuses the config of a text tower that was made for another vocabulary; pads and [CLS] mean nothing to it.

    Raises:
        UserError: it has another number of entries, or another end of a text.
    """
    _refuse_other("text", config.vocab_size, PAD, CLS, config.eos_token_id)


def _refuse_other(part: str, *found: int) -> None:
    given, allowed = (f"{n} entries, [PAD] {p}, [CLS] {c}, [SEP] {s}" for n, p, c, s in (found, (SIZE, PAD, CLS, SEP)))
    if given != allowed:
        raise UserError("Not the vocabulary of Chinese BERT", where=f"model.{part}", given=given, allowed=allowed)
