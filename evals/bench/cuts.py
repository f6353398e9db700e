"""Speed of cut models beside the dense one, in one process on the same kernels: prefill and decoding at the 130M shape.

python evals/bench/cuts.py [--repeats 5] [--quick] [--keep]
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import rivals
import torch
from torch import Tensor, nn

from ssmcompress.arch.surgery import Surgery
from ssmcompress.edits import Add, Edit
from ssmcompress.evaluate.speed import rounds
from ssmcompress.events import Emit, Table, Terminal
from ssmcompress.prune.sizes import outline
from ssmcompress.steps import Cut

HERE = Path(__file__).parent
CUTS = {
    "mamba": (
        Cut(axis="channel", keep=0.5),
        Cut(axis="state", keep=0.5),
        Cut(axis="dt_rank", keep=0.5),
        Cut(axis="layer", keep=0.75),
    ),
    "mamba2": (
        Cut(axis="head", keep=0.5),
        Cut(axis="state", keep=0.5),
        Cut(axis="state", keep=0.5, method="rotate"),
        Cut(axis="layer", keep=0.75),
    ),
}
AIMS = {("channel", 0.5): 1.7, ("head", 0.5): 1.7, ("layer", 0.75): 1.25}
COLUMNS = ("", "dtype", "parameters in blocks", "state", "prefill", "by round", "aim", "decoding", "by round")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and keeps the table where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that all of it runs")
    parser.add_argument("--keep", action="store_true", help="write results-cuts.md")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shape = rivals.Shape(32, 4, 64, 4, 16, 8) if given.quick else rivals.Shape()
    with Terminal() as tell:
        rows = measured(shape, 24 if given.quick else given.length, 1 if given.quick else given.repeats, tell)
    if given.keep:
        lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        (HERE / "results-cuts.md").write_text(text + "\n", encoding="utf-8")


def measured(shape: rivals.Shape, length: int, repeats: int, tell: Emit) -> list[tuple[str, ...]]:
    """A row for every family, cut and dtype: what is left, and how many times faster than dense."""
    rows = []
    for family, cuts in CUTS.items():
        arch = shape.arch(family)
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            dense: Any = rivals.build(arch, "ours", dtype)
            ids = rivals.tokens(arch, 1, length)
            for step in cuts:
                size = arch.layers if step.axis == "layer" else arch.axes()[step.axis].size
                surgery = Surgery(arch, map(filled, outline(arch, step, int(size * (step.keep or 1)))))
                small = surgery.operate(dense)
                rows.append(
                    (
                        f"{family}, {step.axis} keep {step.keep:g}{', rotated' * step.rotates}",
                        str(dtype).removeprefix("torch."),
                        f"{entries(small) / entries(dense):.1%}",
                        f"{surgery.arch.state_bytes() / arch.state_bytes():.1%}",
                        *told(rivals.prefill, dense, small, ids, repeats),
                        f"{AIMS.get((step.axis, step.keep), '—')}",
                        *told(rivals.decode, dense, small, ids[:, :8], repeats),
                    )
                )
    tell(Table("Times faster than dense: CPU seconds of one thread, least of all rounds", COLUMNS, tuple(rows)))
    return rows


def filled(edit: Edit) -> Edit:
    """An edit of an outline with random values where it adds a tensor."""
    return replace(edit, values=torch.randn(edit.shape)) if isinstance(edit, Add) else edit


def told(task: Any, dense: nn.Module, small: nn.Module, ids: Tensor, repeats: int) -> tuple[str, str]:
    """The ratio of the least times, and the lowest, middle and highest ratio within a round."""
    works = {"dense": partial(task, dense, ids), "small": partial(task, small, ids)}
    times = rounds(works, repeats, 1, clock=time.process_time)
    pairs = sorted(a / b for a, b in zip(times["dense"], times["small"], strict=True))
    spread = f"{pairs[0]:.2f}–{statistics.median(pairs):.2f}–{pairs[-1]:.2f}"
    return f"{min(times['dense']) / min(times['small']):.2f}", spread


def entries(model: Any) -> int:
    """Parameters outside the embeddings."""
    return sum(parameter.numel() for parameter in model.backbone.layers.parameters())


if __name__ == "__main__":
    main()
