"""Markdown and plot of a result, from its JSON file alone."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

from lightning_t2i.claims.results import Result
from lightning_t2i.report import table

COLOURS = {"reproduced": "#2a7f3f", "contradicted": "#b03030", "inconclusive": "#b07d10", "reported-only": "#555555"}
MODES = {
    "quick": "**A rehearsal (`--quick`): everything ran, at a size at which the verdicts say nothing.**",
    "pilot": "**A pilot (`--seeds`): other seeds than those of the claims; thresholds are chosen from such runs.**",
}


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def span(interval: Sequence[float | None] | None) -> str:
    """An interval in words; a single seed has none."""
    if interval is None or None in interval:
        return "none"
    return f"{interval[0]:+.4f} to {interval[1]:+.4f}"


def threshold(claim: dict[str, Any]) -> str:
    if claim["threshold"] is None:
        return "none"
    return f"{'at least' if claim['direction'] == 'higher' else 'at most'} {claim['threshold']:+g}"


def claim_rows(result: Result) -> list[list[str]]:
    return [
        [
            c["id"],
            f"{c['measured']:+.4f}",
            span(c["interval"]),
            span(c["prompts_interval"]),
            threshold(c),
            ", ".join(f"{e:+.4f}" for e in c["effects"]),
            f"**{c['verdict']}**",
        ]
        for c in result["claims"]
    ]


CLAIM_HEAD = ("claim", "effect", "95 % over seeds", "95 % over prompts", "threshold", "each seed", "verdict")


def registered(result: Result) -> str:
    """When the thresholds were set, in a sentence."""
    facts = result["thresholds"]
    if not facts:
        return "Only a full run is judged by thresholds of a known commit."
    at = f"at commit {facts['commit'][:12]}" if facts["commit"] else "in no commit when they were first used"
    cells = "no cell" if facts["measured"] == 0 else f"{facts['measured']} cells"
    return f"Thresholds: set {at}; {cells} of this matrix had been measured by then ({facts['time']})."


def markdown(result: Result) -> str:
    """The page of a result."""
    method, claims = result["method"], result["claims"]
    parts = [f"# Claims of {method}", MODES.get(result["mode"], ""), table(claim_rows(result), CLAIM_HEAD)]
    parts.append(f"![Effects with intervals and thresholds]({method}.png)")
    for c in claims:
        compared = f"`{c['arms'][0]}`" + (f" minus `{c['arms'][1]}` ({number(c['baseline'])})" if c["arms"][1:] else "")
        n = f", {c['n']} prompts" if c["n"] else ""
        parts.append(f"**{c['id']}**: {c['text']}\n{c['metric']} of {compared}; seeds {_list(c['seeds'])}{n}.")
    rows = []
    for name, arm in result["arms"].items():
        numbers = "; ".join(f"{metric} {_list(map(number, v))}" for metric, v in arm["numbers"].items())
        seconds = arm["seconds"]
        rows.append([f"`{name}`", numbers, f"{sum(seconds) / len(seconds):.0f} ({arm['budget_s']:.0f})"])
    parts.append("## Arms\n\nNumbers in the order of the seeds; seconds of a cell, in brackets those of the budget.")
    parts.append(table(rows, ("arm", "numbers", "seconds")))
    options = [[f"`{n}`", ", ".join(f"{k} `{v}`" for k, v in a["options"].items())] for n, a in result["arms"].items()]
    parts.append("## What the arms are\n\n" + table(options, ("arm", "options")))
    hashes = result["hashes"]
    kinds = (("config of", "configs"), ("data", "data"))
    files = [(f"{kind} {name}", value) for kind, part in kinds for name, value in hashes[part].items()]
    parts.append("## What it rests on\n\n" + registered(result))
    facts = [("commit of the run", result["commit"] or "none"), ("machine", result["machine"])]
    facts += [("wall time", f"{result['wall_s'] / 60:.1f} min"), ("golden losses", hashes["golden"]), *files]
    parts.append(table(facts, ("", "")))
    parts.append(f"`python -m lightning_t2i.claims {method} --check` says whether it is stale.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _list(values: Any) -> str:
    return ", ".join(str(value) for value in values)


def draw(result: Result, file: Path) -> None:
    """A row for each claim: the seeds' effects, both intervals, the threshold and zero."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    claims = result["claims"]
    figure = Figure(figsize=(8, 0.5 + 1.15 * len(claims)), layout="constrained")
    for row, claim in enumerate(claims, 1):
        axis = figure.add_subplot(len(claims), 1, row)
        colour = COLOURS[claim["verdict"]]
        axis.axvline(0, color="0.6", linewidth=1)
        if claim["threshold"] is not None:
            axis.axvline(claim["threshold"], color="black", linewidth=1, linestyle="--", label="threshold")
        bars = (("over seeds", claim["interval"], 1, 4.0), ("over prompts", claim["prompts_interval"], 0, 1.5))
        for name, bar, height, width in bars:
            if bar is not None and None not in bar:
                axis.plot(bar, [height, height], color=colour, linewidth=width, label=f"95 % {name}")
        axis.plot(claim["effects"], [1] * len(claim["effects"]), "o", color=colour, markerfacecolor="white",
                  markersize=5, label="each seed")  # fmt: skip
        axis.plot(claim["measured"], 0, "D", color=colour, markersize=5, label="mean")
        axis.set(ylim=(-0.7, 1.7), yticks=[])
        axis.tick_params(labelsize=8)
        axis.set_title(f"{claim['id']}: {claim['verdict']}", fontsize=9, loc="left", color=colour)
        axis.set_title(f"effect on {claim['metric']}", fontsize=8, loc="right")
        for side in ("left", "right", "top"):
            axis.spines[side].set_visible(False)
    drawn = {label: line for a in figure.axes for line, label in zip(*a.get_legend_handles_labels(), strict=True)}
    grey = [copy(line) for line in drawn.values()]
    for line in grey:
        line.set_color("0.3")
    figure.legend(grey, list(drawn), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(file, dpi=110)


def write_report(file: Path, result: Result) -> list[Path]:
    """Writes Markdown and plot beside the JSON file of a result."""
    page, picture = file.with_suffix(".md"), file.with_suffix(".png")
    page.write_text(markdown(result), encoding="utf-8")
    draw(result, picture)
    return [page, picture]
