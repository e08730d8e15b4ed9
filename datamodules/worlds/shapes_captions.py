"""Captions of shapes scenes in English and Chinese, at most 30 words or characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

PLURAL = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
NUMBER = {1: "a", 2: "two", 3: "three"}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
ZH_SHAPE = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "cross": "十字形"}
ZH_COLOUR = {"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色"}
ZH_COLOUR |= {"orange": "橙色", "purple": "紫色", "cyan": "青色", "pink": "粉色"}
ZH_GROUND = {"white": "白色", "grey": "灰色", "black": "黑色"}
ZH_NUMBER = {1: "一个", 2: "两个", 3: "三个"}
ZH_RELATION = {"left of": "左边", "right of": "右边", "above": "上边", "below": "下边"}

Kind = Literal["prompt", "train", "full"]
Thing = tuple[str, str | None, int]  # shape, colour or None, count


def english(things: Sequence[Thing], relation: str | None, background: str | None) -> str:
    """Such as "a red circle left of an orange square on a white background"."""
    parts = []
    for shape, colour, count in things:
        noun = shape if count == 1 else PLURAL[shape]
        number = "an" if count == 1 and colour == "orange" else NUMBER[count]
        parts.append(" ".join(word for word in (number, colour, noun) if word))
    return f" {relation or 'and'} ".join(parts) + (f" on a {background} background" if background else "")


def chinese(things: Sequence[Thing], relation: str | None, background: str | None) -> str:
    """Such as "一个红色的圆形在一个橙色的正方形的左边，白色背景"."""
    parts = [
        ZH_NUMBER[count] + (f"{ZH_COLOUR[colour]}的" if colour else "") + ZH_SHAPE[shape]
        for shape, colour, count in things
    ]
    text = f"{parts[0]}在{parts[1]}的{ZH_RELATION[relation]}" if relation else "和".join(parts)
    return text + (f"，{ZH_GROUND[background]}背景" if background else "")


def short_chinese(scene: Mapping[str, Any]) -> list[str]:
    """The whole scene in two ways, such as "红色圆形在橙色正方形左边，白色背景": 18 characters at most."""
    things = [(o["shape"], o["colour"], ask["count"]) for ask, o in zip(scene["ask"], scene["objects"], strict=False)]
    relation, background = scene["relation"], scene["background"]
    forms = []
    for order, way in ((things, relation), (things[::-1], INVERSE[relation] if relation else None)):
        parts = [(ZH_NUMBER[n] if n > 1 else "") + f"{ZH_COLOUR[c or '']}{ZH_SHAPE[s]}" for s, c, n in order]
        text = f"{parts[0]}在{parts[1]}{ZH_RELATION[way]}" if way else "和".join(parts)
        forms.append(f"{text}，{ZH_GROUND[background]}背景")
    return list(dict.fromkeys(forms))


def captions(scene: Mapping[str, Any], kind: Kind) -> dict[str, list[str]]:
    """Texts by language, all true of the picture, each telling at least what the scene asks for.

    Args:
        scene: see `datamodules.worlds.shapes_scenes`.
        kind: "prompt" tells what is asked and no more; "train" adds texts with colours and background; "full" has
            the texts with colours and background alone.
    """
    asked = [(ask["shape"], ask["colour"], ask["count"]) for ask in scene["ask"]]
    coloured = [(o["shape"], o["colour"], ask["count"]) for ask, o in zip(scene["ask"], scene["objects"], strict=False)]
    relation, background = scene["relation"], scene["background"]
    inverse = INVERSE[relation] if relation else None
    forms: list[tuple[Sequence[Thing], str | None, str | None]] = []
    if kind != "full":
        forms += [(asked, relation, None), (asked[::-1], inverse, None)]
    if kind == "train":
        forms += [(coloured, relation, None), (coloured, relation, background)]
    if kind == "full":
        forms += [(coloured, relation, background), (coloured[::-1], inverse, background)]
    return {
        language: list(dict.fromkeys(write(*form) for form in forms))
        for language, write in (("en", english), ("zh", chinese))
    }
