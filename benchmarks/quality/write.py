"""Tables and figures: CSV, markdown and SVG, small enough to be committed."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.intervals import Interval

#: Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
#: Above it an axis shows the whole of 0 to 1.
_NEAR_ONE = 0.6
#: The most methods that share a panel.
_TOGETHER = 2


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of the same columns, numbers with four digits."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: f"{one:.4f}" if isinstance(one, float) else one for name, one in row.items()}
            for row in rows
        )


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table; bars in texts are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[str(one).replace("|", "\\|").replace("\n", " ") for one in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def write_page(file: Path, *, title: str, command: str, parts: Sequence[str]) -> None:
    """A markdown page that says first which command wrote it."""
    file.write_text(
        f"# {title}\n\nWritten by `{command}`.\n\n" + "\n".join(parts).rstrip() + "\n", encoding="utf-8"
    )


def draw_curves(
    file: Path, curves: Mapping[str, tuple[Sequence[int], Sequence[Interval]]], *, title: str, y: str
) -> None:
    """Means by layer with their intervals as bands; what the names call a control is drawn thin and broken.

    More than two methods have a panel each.

    Args:
        file: The SVG file.
        curves: For each name its layers and intervals, in the order of the legend; a control's name begins
            with its method's and a comma.
        title: The title.
        y: What the y axis shows.
    """
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    methods = list(dict.fromkeys(name.partition(",")[0] for name in curves))
    apart = len(methods) > _TOGETHER
    with mpl.rc_context({"svg.hashsalt": "patchscope", "svg.fonttype": "none", "font.size": 9}):
        shape = (-(-len(methods) // 2), 2) if apart else (1, 1)
        figure, grid = plt.subplots(*shape, figsize=(7, 2.4 * shape[0] + 1.6), sharey=True, squeeze=False)
        panels = dict(zip(methods, grid.flat, strict=False)) if apart else dict.fromkeys(methods, grid[0, 0])
        for panel in list(grid.flat)[len(methods) :]:
            panel.set_axis_off()
        colours = dict(zip(curves, COLOURS[:2] * len(methods) if apart else COLOURS, strict=False))
        for name, (layers, values) in curves.items():
            panel, control = panels[name.partition(",")[0]], "," in name
            panel.plot(
                layers,
                [one.mean for one in values],
                label=name,
                color=colours[name],
                linewidth=1 if control else 2,
                linestyle="--" if control else "-",
            )
            lows, highs = [one.low for one in values], [one.high for one in values]
            panel.fill_between(layers, lows, highs, color=colours[name], alpha=0.15, linewidth=0)
        highest = max(one.high for _, part in curves.values() for one in part)
        for panel in panels.values():
            panel.set(xlabel="source layer (0-based block output)")
            panel.set_ylim(0, 1.02 if highest > _NEAR_ONE else None)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.grid(visible=True, alpha=0.3)
            panel.legend(frameon=False, fontsize=8)
        figure.supylabel(y, fontsize=9)
        figure.suptitle(title, fontsize=10, wrap=True)
        figure.tight_layout()
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)
