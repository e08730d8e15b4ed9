"""Labels of a front's plot."""

from lightning_t2i.caching.front import labels


def test_what_lies_on_one_place_has_one_label_and_neighbours_have_theirs_on_other_sides() -> None:
    points = {"none": (1.0, -2.0), "first block": (1.0, -2.0), "3 steps": (0.30, -3.0), "FORA 4": (0.31, -3.1)}
    found = {name: (place, side) for place, name, side in labels(
        {name: {"relative_macs": m, "quality": q} for name, (m, q) in points.items()}
    )}  # fmt: skip
    assert found == {
        "none\nfirst block": ((1.0, -2.0), 1),
        "3 steps": ((0.30, -3.0), 1),
        "FORA 4": ((0.31, -3.1), -1),
    }
    assert list(labels({})) == []
    assert list(labels({"one": {"relative_macs": 0.5, "quality": 1.0}})) == [((0.5, 1.0), "one", -1)]
