"""The Chinese tokenizer gives the published ids, keeps [SEP] where it cuts, and is a stock tokenizer."""

import pytest

from lightning_t2i.errors import UserError
from lightning_t2i.networks.chinese_tokenizer import VOCABULARY, ChineseTokenizer
from lightning_t2i.paths import ROOT


def test_the_vocabulary_has_its_entries():
    lines = (ROOT / VOCABULARY / "vocab.txt").read_text(encoding="utf-8").strip().split("\n")
    assert len(lines) == 21128
    places = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
    assert {word: lines.index(word) for word in places} == places


def test_ids_are_the_published_ones():
    ids = ChineseTokenizer()(["一张猫的照片。", "红色的圆形 abc"], full=True)
    assert ids.shape == (2, 32)
    assert ids[0].tolist() == [101, 671, 2476, 4344, 4638, 4212, 4275, 511, 102, *[0] * 23]
    assert ids[1].tolist() == [101, 5273, 5682, 4638, 1749, 2501, 8425, 102, *[0] * 24]


def test_a_long_text_keeps_its_end_and_short_ones_are_trimmed():
    tokenizer = ChineseTokenizer()
    long = tokenizer(["猫" * 50])
    assert long.shape == (1, 32) and long[0, 0] == 101 and long[0, 31] == 102 and 0 not in long
    assert tokenizer(["猫", "两只猫"]).shape == (2, 5)
    assert ChineseTokenizer(length=8)(["猫" * 50]).shape == (1, 8)


def test_curly_quotes_and_case_and_accents_are_folded():
    tokenizer = ChineseTokenizer()
    assert tokenizer(["“猫”"]).tolist() == tokenizer(['"猫"']).tolist()
    assert tokenizer(["‘ABC’"]).tolist() == tokenizer(["'abc'"]).tolist()
    assert 100 not in tokenizer(["“猫”"])
    assert tokenizer(["CAFÉ"]).tolist() == tokenizer(["cafe"]).tolist()


@pytest.mark.parametrize("change", ["fewer", "swapped"])
def test_another_vocabulary_is_refused(tmp_path, change):
    """Of another size, or with the end of a text elsewhere: ids of the one mean other words to a tower of the other."""
    words = (ROOT / VOCABULARY / "vocab.txt").read_text(encoding="utf-8").strip().split("\n")
    if change == "fewer":
        words = words[:-1]
    else:
        words[102], words[103] = words[103], words[102]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="Chinese BERT") as error:
        ChineseTokenizer(str(tmp_path))
    assert ("21127 entries" if change == "fewer" else "[SEP] 103") in str(error.value)


def test_the_saved_folder_is_stock(tmp_path):
    from transformers import AutoTokenizer

    ChineseTokenizer().save(tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert stock("一张猫的照片。").input_ids == [101, 671, 2476, 4344, 4638, 4212, 4275, 511, 102]
    assert stock.model_max_length == 32
    assert ChineseTokenizer(str(tmp_path))(["一张猫的照片。"]).shape == (1, 9)
