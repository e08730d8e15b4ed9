"""The paper's rules for pairs, one by one and together; captions stay with their URLs."""

import csv
from pathlib import Path

import pytest

from datamodules.wukong_csv import (
    Rules,
    _words,
    chinese_characters,
    choose,
    digest,
    frequencies,
    is_file_name,
    key_of,
    main,
    replace_names,
    size_is_right,
)


def write(file: Path, rows: list[dict[str, str]]) -> Path:
    with file.open("w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return file


def row(caption: str, url: str = "u", **more: str) -> dict[str, str]:
    return {"url": url, "caption": caption, **more}


@pytest.mark.parametrize(
    ("text", "count"), [("一只猫", 3), ("a cat", 0), ("猫 and 狗。", 2), ("\U00020001", 1), ("、。", 0)]
)
def test_chinese_characters_are_counted(text, count):
    assert chinese_characters(text) == count


@pytest.mark.parametrize(
    ("text", "is_one"), [("000.jpg", True), ("照片1.PNG", True), ("一只猫.", False), ("看 000.jpg", False)]
)
def test_file_names_are_known(text, is_one):
    assert is_file_name(text) == is_one


@pytest.mark.parametrize(
    ("size", "right"), [((200, 200), True), ((199, 400), False), ((200, 600), True), ((601, 200), False)]
)
def test_sizes_in_both_orientations(size, right):
    assert size_is_right(*size) == size_is_right(*size[::-1]) == right


def test_names_are_replaced_longest_first():
    assert replace_names("王小明和王小在一起", ["王小", "王小明"]) == "<人名>和<人名>在一起"


@pytest.mark.parametrize(
    ("caption", "more", "rule"),
    [
        ("a cat", {}, "characters"),
        ("猫" * 32, {}, "characters"),
        ("猫" * 31, {}, None),
        ("照片000.jpg", {}, "file name"),
        ("查看源网页", {}, "frequency"),
        ("坏词在这里", {}, "sensitive"),
        ("一只猫", {"width": "100", "height": "300"}, "size"),
        ("一只猫", {"width": "300", "height": "300"}, None),
        ("一只猫", {"query": "猫"}, "query"),
        ("一只猫", {"query": "狗"}, None),
    ],
)
def test_each_rule(caption, more, rule):
    rules = Rules({digest("查看源网页"): 11, digest("一只猫"): 10}, sensitive=["坏词"])
    rules.count_of["猫"] = 1000
    assert rules.broken(row(caption, **more)) == rule


def test_two_passes_over_several_lists(tmp_path):
    boiler = [row("查看源网页", f"http://b/{i}") for i in range(11)]
    first = write(tmp_path / "a.csv", [row("一只，\n猫", "http://1"), *boiler[:6], row("cat", "http://2")])
    second = write(tmp_path / "b.csv", [*boiler[6:], row("李雷的狗", "http://3"), row("又一次", "http://1")])
    rules = choose(tmp_path / "out.csv", [first, second], names=["李雷"])
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as stream:
        found = list(csv.DictReader(stream))
    assert [(r["url"], r["caption"]) for r in found] == [("http://1", "一只，\n猫"), ("http://3", "<人名>的狗")]
    assert [r["key"] for r in found] == [key_of("http://1"), key_of("http://3")]
    assert dict(rules.dropped) == {"frequency": 11, "characters": 1, "url": 1}
    assert frequencies([row("a"), row("a"), row("b")]) == {digest("a"): 2}


def test_out_appears_whole(tmp_path, monkeypatch):
    table = write(tmp_path / "a.csv", [row("一只猫", "http://1"), row("两只猫", "http://2")])
    choose(tmp_path / "out.csv", [table])
    before = (tmp_path / "out.csv").read_bytes()

    def broken_off(self, rows):
        yield {"key": "0", "url": "http://1", "caption": "一只猫"}
        raise KeyboardInterrupt

    monkeypatch.setattr(Rules, "kept", broken_off)
    for name in ("out.csv", "new.csv"):
        with pytest.raises(KeyboardInterrupt):
            choose(tmp_path / name, [table])
    assert (tmp_path / "out.csv").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "out.csv"]


def test_lists_of_words_are_cut_at_ends_of_lines_alone(tmp_path):
    (tmp_path / "words.txt").write_bytes("坏\u2028词\r\n\r\n王小明\n".encode())
    assert _words(tmp_path / "words.txt") == ["坏\u2028词", "王小明"]


def test_the_command_reads_words_that_no_caption_may_have_and_names_to_replace(tmp_path):
    table = write(tmp_path / "a.csv", [row("坏词在这里", "http://1"), row("李雷的狗", "http://2")])
    for name, word in (("sensitive", "坏词"), ("names", "李雷")):
        (tmp_path / name).write_text(word, encoding="utf-8")
    words = [w for name in ("sensitive", "names") for w in (f"--{name}", str(tmp_path / name))]
    assert main([str(tmp_path / "out.csv"), str(table), *words]) == 0
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as stream:
        assert [found["caption"] for found in csv.DictReader(stream)] == ["<人名>的狗"]


def test_the_command_says_what_it_left_out(tmp_path, capsys):
    table = write(tmp_path / "a.csv", [row("一只猫", "http://1"), row("cat", "http://2")])
    assert main([str(tmp_path / "out.csv"), str(table)]) == 0
    assert "1 pairs" in (out := capsys.readouterr().out) and "characters 1" in out
    assert main([str(tmp_path / "out.csv"), str(tmp_path / "no.csv")]) == 2
    assert "No such list" in capsys.readouterr().err
    assert main([str(tmp_path / "out.csv"), str(write(tmp_path / "c.csv", [{"url": "x"}]))]) == 2
    assert "lacks a column" in capsys.readouterr().err
