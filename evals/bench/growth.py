"""How time and memory grow with the length of a prompt, the number of layers and the calibration text.

python evals/bench/growth.py [--quick] [--keep]

At the width of the 130M checkpoints, four layers unless told otherwise, random weights, float32, one thread. Each
figure is of a process of its own: CPU seconds, and the highest resident set beyond the model. `--keep` writes
results-growth.md.
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
import rivals
import torch

from ssmcompress.evaluate.peak import forget, resident
from ssmcompress.events import Note, Table, Terminal
from ssmcompress.prune.apply import find_edits
from ssmcompress.steps import Prune, ReduceTokens
from ssmcompress.tokens.matching import match
from ssmcompress.tokens.schedule import resolved
from ssmcompress.tokens.selection import Selection

HERE = Path(__file__).parent
LENGTHS, LAYERS, WINDOWS, LENGTH = (512, 1024, 2048, 4096, 8192, 16384), (2, 4, 8, 16), (4, 8, 16, 32), 512
NEAR = 256  # tokens within which a window lets two be matched
COLUMNS = ("", "over", "CPU s", "grows as", "MiB", "grows as")


@dataclass(frozen=True)
class Series:
    """One curve: what is done, over what, and where."""

    name: str
    over: str
    points: Sequence[int]
    work: Callable[..., Callable[[], Any]]
    more: dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures every curve, prints how they grow, and keeps them where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that all of it runs")
    parser.add_argument("--keep", action="store_true", help="write results-growth.md")
    given = parser.parse_args(arguments)
    rows = []
    with Terminal() as tell:
        for series in curves(given.quick):
            points = []
            for point in series.points:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                    points.append(alone.submit(measured, series, point, given.quick).result())
                tell(Note(f"{series.name}, {series.over} {point}: {points[-1][0]:.2f} s, {points[-1][1]:.0f} MiB"))
            rows.append(row(series, points))
        tell(Table("growth, one thread", COLUMNS, tuple(rows)))
    if given.keep:
        lines = (COLUMNS, ("---",) * len(COLUMNS), *rows)
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        (HERE / "results-growth.md").write_text(text + "\n", encoding="utf-8")


def curves(quick: bool) -> list[Series]:
    """What is measured: forward, token reduction and its matching over the length, WANDA over all three."""
    lengths, layers, windows = ((32, 64), (1, 2), (1, 2)) if quick else (LENGTHS, LAYERS, WINDOWS)
    found = []
    for family in ("mamba", "mamba2"):
        found.append(Series(f"{family}, forward", "tokens", lengths, forward, {"family": family}))
        for near in (None, NEAR):
            name = f"{family}, fewer tokens, matched {'anywhere' if near is None else f'within {near}'}"
            found.append(Series(name, "tokens", lengths, forward, {"family": family, "reduce": True, "near": near}))
        found.append(
            Series(f"{family}, WANDA by length", "tokens", lengths, prune, {"family": family, "over": "length"})
        )
        found.append(
            Series(f"{family}, WANDA by layers", "layers", layers, prune, {"family": family, "over": "layers"})
        )
        found.append(
            Series(f"{family}, WANDA by text", "windows", windows, prune, {"family": family, "over": "windows"})
        )
    for near in (None, NEAR):
        name = f"matching {'anywhere' if near is None else f'within {near}'}"
        found.append(Series(name, "tokens", lengths, matching, {"near": near}))
    return found


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
    return (series.name, over, *cells)


if __name__ == "__main__":
    main()
