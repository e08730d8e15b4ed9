"""Scenes of the shapes world, drawn for the six tasks of GenEval (arXiv 2310.11513), and when a scene fulfils one.

A scene is plain JSON:

    task        single_object, two_object, counting, colors, position or color_attr
    background  white, grey or black
    objects     [{shape, colour, size, cell: [row, column], box: [x0, y0, x1, y1]}, ...], pixels, x1 and y1 exclusive
    ask         what a picture for the prompt must show: [{shape, colour or null, count}, ...]
    relation    null, or what ask[0] is to ask[1]: "left of", "right of", "above", "below"
    held_out    whether it asks for a (shape, colour) pair that no training picture shows
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from datamodules.worlds.draws import Draws
from datamodules.worlds.shapes_draw import BACKGROUNDS, COLOURS, SHAPES, SIDE

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
HELD_OUT = (("circle", "purple"), ("square", "orange"), ("triangle", "cyan"), ("cross", "green"))
PAIRS = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)
SIZES = {"small": 9, "large": 12}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # x right, y down
CENTRES = (5.5, 16.0, 26.5)  # of the three rows and columns
GAP = 2  # pixels between two boxes, and half of that to the border


def relations(a: Sequence[float], b: Sequence[float]) -> list[str]:
    """What box a is to box b, as GenEval decides: no relation when they are close, two when it is diagonal.

    Offsets of the centres count beyond a tenth of the boxes' summed sides; a relation holds within 60 degrees.
    """
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    slack = [0.1 * (a[i + 2] - a[i] + b[i + 2] - b[i]) for i in (0, 1)]
    beyond = [math.copysign(max(abs(d) - s, 0.0), d) for d, s in zip(offset, slack, strict=True)]
    length = math.hypot(*offset)
    if not any(beyond):
        return []
    return [name for name, (x, y) in RELATIONS.items() if (beyond[0] * x + beyond[1] * y) / length > 0.5]


def place(draws: Draws, n: int) -> list[dict[str, Any]]:
    """Sizes, cells and boxes of `n` objects that keep their distance, uniform among such placements."""
    while True:
        placed: list[dict[str, Any]] = []
        for cell in draws.sample(range(9), n):
            size = draws.choose(tuple(SIZES))
            row, column = divmod(cell, 3)
            corner = []
            for centre in (CENTRES[column], CENTRES[row]):
                start = math.floor(centre - SIZES[size] / 2) + draws.below(3) - 1
                corner.append(min(max(start, GAP // 2), SIDE - GAP // 2 - SIZES[size]))
            box = [*corner, corner[0] + SIZES[size], corner[1] + SIZES[size]]
            placed.append({"size": size, "cell": [row, column], "box": box})
        boxes = [item["box"] for item in placed]
        if all(apart(a, b) for i, a in enumerate(boxes) for b in boxes[:i]):
            return placed


def apart(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two boxes are GAP pixels or more from each other."""
    return any(a[i] - b[i + 2] >= GAP or b[i] - a[i + 2] >= GAP for i in (0, 1))


def clearly(relation: str, a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two boxes show a relation with a margin: within 27 degrees of its axis."""
    x, y = RELATIONS[relation]
    dx, dy = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
    along, across = (dx * x + dy * y), abs(dx * y) + abs(dy * x)
    return along >= 9 and across <= along / 2


def draw(draws: Draws, task: str, held_out: bool = False) -> dict[str, Any]:
    """A scene for a task; `held_out` asks for one pair of HELD_OUT and needs a task that names colours."""
    pairs = [pair for pair in PAIRS if pair not in HELD_OUT]
    n = {"single_object": 1, "colors": 1, "counting": 2 + draws.below(2)}.get(task, 2)
    kinds = [draws.choose(HELD_OUT if held_out else pairs)]
    if task in ("two_object", "position", "color_attr"):
        other = [pair for pair in pairs if pair[0] != kinds[0][0] and pair[1] != kinds[0][1]]
        kinds = draws.sample([*kinds, draws.choose(other)], 2)
    relation = draws.choose(tuple(RELATIONS)) if task == "position" else None
    while True:
        places = place(draws, n)
        if relation is None or clearly(relation, places[0]["box"], places[1]["box"]):
            break
    named = task in ("colors", "color_attr")
    shown = kinds if len(kinds) == n else kinds * n
    return {
        "task": task,
        "background": draws.choose(tuple(BACKGROUNDS)),
        "objects": [{"shape": s, "colour": c, **where} for (s, c), where in zip(shown, places, strict=True)],
        "ask": [{"shape": s, "colour": c if named else None, "count": n // len(kinds)} for s, c in kinds],
        "relation": relation,
        "held_out": held_out,
    }


def fulfils(objects: Sequence[Mapping[str, Any]], scene: Mapping[str, Any]) -> bool:
    """Whether found objects ({shape, colour, box, area}) show what a scene's prompt asks for.

    As in GenEval, further objects do no harm, except that a counted kind must be there exactly so often. A relation is
    judged on the largest object of each kind.
    """
    found = []
    for ask in scene["ask"]:
        fit = [o for o in objects if o["shape"] == ask["shape"] and ask["colour"] in (None, o["colour"])]
        if len(fit) < ask["count"] or (scene["task"] == "counting" and len(fit) != ask["count"]):
            return False
        found.append(max(fit, key=lambda o: o["area"]))
    return scene["relation"] is None or scene["relation"] in relations(found[0]["box"], found[1]["box"])
