"""Writes tables and figures of the results into a page, between two marks."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.figure
import matplotlib.lines
import numpy as np

from petalfl.errors import PetalError

from . import tables
from .results import Line
from .tables import Setting, settings_of

BEGIN, END = "<!-- tables: python -m benchmarks.blossom report -->", "<!-- end of tables -->"
PANELS_ACROSS = 3


def write_report(lines: Sequence[Line], page: Path) -> list[Path]:
    """Replaces the part of the page between `BEGIN` and `END`; figures go beside it.

    Returns:
        The files written.

    Raises:
        PetalError: The page is missing or has no such part.
    """
    try:
        text = page.read_text()
    except OSError as error:
        raise PetalError(f"cannot read {page}: {error.strerror}") from error
    if BEGIN not in text or END not in text:
        raise PetalError(f"{page}: expected a part between {BEGIN} and {END}")
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    written, parts = [page], []
    for setting in settings_of(lines):
        figure = page.parent / "images" / f"blossom_{_slug(setting.title)}.png"
        draw_curves(setting, figure)
        written.append(figure)
        parts.append(section(setting, f"images/{figure.name}"))
    if codecs := tables.codecs_table(lines):
        parts.append(f"### Codecs\n\nCells that differ in nothing else, seed by seed.\n\n{codecs}")
    body = "\n\n".join(parts) if parts else "No cell has been run yet."
    page.write_text(f"{head}{BEGIN}\n\n{body}\n\n{END}{tail}")
    return written


def section(setting: Setting, figure: str) -> str:
    """The tables of one setting, as Markdown."""
    parts = [
        f"### {setting.title[0].upper()}{setting.title[1:]}",
        f"```\n{tables.command(setting)}\n```",
        f"{setting.metric} in points, mean ± standard deviation over the seeds, (1): one seed. "
        "†: in some seed the curve still rises at its last round.",
    ]
    for stage, name in setting.stages.items():
        parts.append(f"{name.capitalize()}:\n\n{tables.scores_table(setting, stage)}")
    if differences := tables.differences_table(setting):
        parts.append(
            "Paired differences in points, seed by seed, and gains over the full model (the "
            f"paper's, on average: {tables.paper_gains()}):\n\n{differences}"
        )
    if unseen := tables.unseen_table(setting):
        parts.append(f"People that took no part:\n\n{unseen}")
    parts.append(f"What a device sends in all rounds:\n\n{tables.traffic_table(setting)}")
    parts.append(f"![Curves]({figure})")
    parts.append(ran_on(setting.lines))
    return "\n\n".join(parts)


def ran_on(lines: Sequence[Line]) -> str:
    """Where and for how long, in one line."""
    machines = sorted({f"{x['machine']['cpu']}, {x['machine']['cores']} cores" for x in lines})
    loads = [x["machine"]["load"] for x in lines]
    seconds = [x["seconds"] for x in lines]
    return (
        f"{len(lines)} cells, {sum(seconds) / 60:.1f} minutes of one process in all, "
        f"{min(seconds):.0f} to {max(seconds):.0f} s each, on {'; '.join(machines)}; "
        f"load average {min(loads):.1f} to {max(loads):.1f}."
    )


def draw_curves(setting: Setting, path: Path) -> None:
    """The metric after each round, a panel for each regime; the band is ± a standard deviation.

    The axis begins where the curves are after a fifth of the rounds: what comes before is steep.
    """
    columns, schemes = setting.columns(), setting.schemes()
    across = min(len(columns), PANELS_ACROSS)
    down = math.ceil(len(columns) / across)
    figure = matplotlib.figure.Figure(
        figsize=(4.2 * across, 3.6 * down), dpi=100, layout="constrained"
    )
    panels = figure.subplots(down, across, sharey=True, squeeze=False)
    which = tables.COLUMNS[setting.metric]
    palette = matplotlib.colormaps["tab10" if len(schemes) <= 10 else "tab20"]
    color_of = {scheme: palette(n) for n, scheme in enumerate(schemes)}
    drawn: dict[str, matplotlib.lines.Line2D] = {}
    lowest = 99.0  # an axis needs a length where all curves are at 100
    for axes, (regime, missing) in zip(panels.flat, columns, strict=False):
        for scheme in schemes:
            lines = setting.of(scheme, regime, missing).values()
            if not lines:
                continue
            rounds = np.array([point[0] for point in next(iter(lines))["curve"]])
            scores = 100 * np.array([[point[which] for point in x["curve"]] for x in lines])
            mean = scores.mean(axis=0)
            spread = scores.std(axis=0, ddof=min(1, len(scores) - 1))
            color = color_of[scheme]
            (drawn[scheme],) = axes.plot(rounds, mean, label=scheme, color=color)
            axes.fill_between(rounds, mean - spread, mean + spread, alpha=0.15, color=color)
            lowest = min(lowest, (mean - spread)[rounds >= rounds[-1] / 5].min())
        axes.set_title(f"{regime}, {missing}")
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylim(max(0, lowest), 100)
    for axes in panels.flat[len(columns) :]:
        axes.remove()
    figure.supxlabel("rounds")
    figure.supylabel(f"{setting.metric}, points")
    figure.legend(handles=[*drawn.values()], loc="outside right upper", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")
