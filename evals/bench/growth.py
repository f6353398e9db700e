"""How time and memory grow with the length of a prompt, the number of layers and the calibration text.

python evals/bench/growth.py [--quick] [--keep]

At the width of the 130M checkpoints, four layers unless told otherwise, random weights, float32, one thread. Each
figure is of a process of its own: CPU seconds, and the highest resident set beyond the model. `--keep` writes
results-growth.md and results-growth.svg, whose axes have even steps: what grows as its axis is a straight line.
"""

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import panels
import rivals
import torch

from ssmcompress.evaluate.peak import forget, resident
from ssmcompress.events import Note, Table, Terminal
from ssmcompress.prune.apply import find_edits
from ssmcompress.report import figures
from ssmcompress.steps import Prune, ReduceTokens
from ssmcompress.tokens.matching import match
from ssmcompress.tokens.schedule import resolved
from ssmcompress.tokens.selection import Selection

HERE = Path(__file__).parent
LENGTHS, LAYERS, WINDOWS, LENGTH = (512, 1024, 2048, 4096, 8192, 16384), (2, 4, 8, 16), (4, 8, 16, 32), 512
NEAR = 256  # tokens within which a window lets two be matched
PANELS = ("forward", "fewer tokens", "matching", "WANDA by length", "WANDA by layers", "WANDA by text")
COLUMNS = ("", "over", "CPU s", "grows as", "MiB", "grows as")


@dataclass(frozen=True)
class Series:
    """One curve: its panel and its name in it, what is done, over what, and where."""

    panel: str
    name: str
    over: str
    points: Sequence[int]
    work: Callable[..., Callable[[], Any]]
    more: dict[str, Any]


Found = list[tuple[Series, list[tuple[float, float]]]]  # CPU seconds and MiB at every point


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures every curve, prints how they grow, and keeps and draws them where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that all of it runs")
    parser.add_argument("--keep", action="store_true", help="write results-growth.md and .svg")
    given = parser.parse_args(arguments)
    found: Found = []
    with Terminal() as tell:
        for series in curves(given.quick):
            points = []
            for point in series.points:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                    points.append(alone.submit(measured, series, point, given.quick).result())
                seconds, size = points[-1]
                tell(Note(f"{series.panel}, {series.name}, {series.over} {point}: {seconds:.2f} s, {size:.0f} MiB"))
            found.append((series, points))
        rows = tuple(row(*each) for each in found)
        tell(Table("growth, one thread", COLUMNS, rows))
    if given.keep:
        lines = (COLUMNS, ("---",) * len(COLUMNS), *rows)
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        (HERE / "results-growth.md").write_text(text + "\n", encoding="utf-8")
        (HERE / "results-growth.svg").write_text(drawn(found), encoding="utf-8")


def curves(quick: bool) -> list[Series]:
    """What is measured: forward, token reduction and its matching over the length, WANDA over all three."""
    lengths, layers, windows = ((32, 64), (1, 2), (1, 2)) if quick else (LENGTHS, LAYERS, WINDOWS)
    found = []
    for near in (None, NEAR):
        name = "anywhere" if near is None else f"within {near}"
        found.append(Series("matching", name, "tokens", lengths, matching, {"near": near}))
        for family in ("mamba", "mamba2"):
            more = {"family": family, "reduce": True, "near": near}
            found.append(Series("fewer tokens", f"{family}, matched {name}", "tokens", lengths, forward, more))
    for family in ("mamba", "mamba2"):
        found.append(Series("forward", family, "tokens", lengths, forward, {"family": family}))
        for panel, over, points in (
            ("length", "tokens", lengths),
            ("layers", "layers", layers),
            ("text", "windows", windows),
        ):
            more = {"family": family, "over": "length" if over == "tokens" else over}
            found.append(Series(f"WANDA by {panel}", family, over, points, prune, more))
    return sorted(found, key=lambda series: PANELS.index(series.panel))


def measured(series: Series, point: int, quick: bool) -> tuple[float, float]:
    """CPU seconds of the second time, and MiB that it takes at most beyond what was there."""
    torch.set_num_threads(1)
    work = series.work(point, quick, **series.more)
    work()
    gc.collect()
    before = resident("VmRSS")
    forget()
    started = time.process_time()
    work()
    return time.process_time() - started, (resident("VmHWM") - before) / 2**20


def _shape(quick: bool) -> rivals.Shape:
    return rivals.Shape(32, 4, 64, 4, 16, 8) if quick else rivals.Shape()


def forward(length: int, quick: bool, family: str, reduce: bool = False, near: int | None = None) -> Callable[[], Any]:
    """The backbone and the logits of the last token."""
    arch = _shape(quick).arch(family, 4)
    model: Any = rivals.build(arch, "ours")
    if reduce:
        model.backbone.select = Selection(resolved(ReduceTokens(flops=0.2, layers=(0, 1), match_window=near), arch))
    ids = rivals.tokens(arch, 1, length)

    def work() -> None:
        with torch.no_grad():
            model(ids, use_cache=False, logits_to_keep=1)

    return work


def prune(point: int, quick: bool, family: str, over: str) -> Callable[[], Any]:
    """Masks by WANDA, on one window unless the text grows."""
    usual = {"length": 32 if quick else LENGTH, "layers": 2 if quick else 4, "windows": 2}
    size = usual | {over: point}
    arch = _shape(quick).arch(family, size["layers"])
    model: Any = rivals.build(arch, "ours")
    ids = rivals.tokens(arch, size["windows"], size["length"])
    return partial(find_edits, model, arch, Prune(method="wanda"), ids)


def matching(length: int, quick: bool, near: int | None) -> Callable[[], Any]:
    """Every second token's most similar one among the others."""
    features = torch.randn(length, 32 if quick else 768, generator=torch.Generator().manual_seed(0))
    every = torch.arange(length)
    return partial(match, features, every[::2], every[1::2], every, near)


def row(series: Series, points: Sequence[tuple[float, float]]) -> tuple[str, ...]:
    """The ends of a curve, and the power of its last stretch: from half of the largest point to it."""
    over = f"{series.points[0]:,} to {series.points[-1]:,} {series.over}"
    cells = []
    for digits, values in zip((2, 0), zip(*points, strict=True), strict=True):
        power = np.log(max(values[-1], 1e-9) / max(values[-2], 1e-9)) / np.log(series.points[-1] / series.points[-2])
        cells += [f"{values[0]:,.{digits}f} to {values[-1]:,.{digits}f}", f"n^{power:.2f}"]
    return (f"{series.panel}, {series.name}", over, *cells)


def drawn(found: Found) -> str:
    """Seconds and MiB side by side, a panel below the other."""
    rows = []
    for title in PANELS:
        members = [each for each in found if each[0].panel == title]
        charts = []
        for column, unit in enumerate(("CPU seconds", "MiB")):
            lines = [
                (series.name, mark, [(at, both[column]) for at, both in zip(series.points, points, strict=True)])
                for mark, (series, points) in enumerate(members, 1)
            ]
            over = members[0][0].over
            charts.append(figures.curves(lines, over, unit, f"{title}: {unit} by {over}", zero=True))
        rows.append(panels.Panel(title, [series.name for series, _ in members], charts))
    return panels.file(rows)


if __name__ == "__main__":
    main()
