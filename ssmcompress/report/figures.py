"""The charts of the report as inline SVG: same numbers, same bytes; ink takes the colour of the page's text."""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#2a7f9e", "#e07a3f", "#6a994e", "#a35fa8", "#c9a227", "#7d8597", "#c44e52", "#4c72b0")
INK = "#010203"  # becomes currentColor
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ssmcompress",
    "font.family": "sans-serif",
    "font.size": 11,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
Point = tuple[str, str, float, float, tuple[float, float]]
Line = tuple[str, str, Sequence[float], Sequence[float]]


def colour(index: int) -> str:
    """The colour of the model at this place of the page, the same in every chart."""
    return COLOURS[index % len(COLOURS)]


def tradeoff(points: Sequence[Point], y: str) -> str:
    """Loss against size: points (label, colour, millions of entries, loss, interval)."""
    with plt.rc_context(STYLE):
        figure, axes = _axes()
        axes.axhline(0, color=INK, alpha=0.4, linewidth=1)
        for label, shade, size, value, (low, high) in points:
            spread = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.errorbar([size], [value], spread, fmt="o", color=shade, capsize=3, markersize=5, label=label)
        axes.set_xlabel("millions of weights that are not zero")
        axes.set_ylabel(y)
        axes.margins(x=0.12, y=0.12)
        figure.legend(frameon=False, fontsize=9.5, loc="outside lower center", ncols=2)
        return _svg(figure)


def lines(
    series: Sequence[Line], x: str, y: str, *, chance: tuple[Sequence[float], Sequence[float]] | None = None
) -> str:
    """Lines (label, colour, xs, ys) with a marker at each point, from zero; shares have their chance, dotted."""
    with plt.rc_context(STYLE):
        figure, axes = _axes()
        for label, shade, xs, ys in series:
            axes.plot(xs, ys, "o-", color=shade, label=label, linewidth=1.6, markersize=4.5)
        if chance:
            axes.plot(*chance, ":", color=INK, alpha=0.6, label="chance", linewidth=1.2)
        axes.set_xticks(sorted({each for _, _, xs, _ in series for each in xs}))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_ylim(0, 1.05 if chance else None)
        if chance:
            axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
        figure.legend(frameon=False, fontsize=9.5, loc="outside lower center", ncols=2)
        return _svg(figure)


def _axes() -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(4.8, 3.8), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=INK, alpha=0.12)
    return figure, axes


def _svg(figure: Figure) -> str:
    target = io.StringIO()
    figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = target.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"(?s)<metadata>.*?</metadata>", "", text)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)
