"""Speed and memory of prompts that lose tokens, beside the same model dense, at the 130M shape with random weights.

python evals/bench/tokens.py [--repeats 3] [--quick] [--keep]
"""

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import rivals
import torch
from torch import Tensor

from ssmcompress.evaluate.peak import forget, resident
from ssmcompress.evaluate.speed import rounds
from ssmcompress.events import Emit, Note, Table, Terminal
from ssmcompress.policy import TokenPolicy
from ssmcompress.steps import ReduceTokens
from ssmcompress.tokens.schedule import resolved
from ssmcompress.tokens.selection import Selection

HERE = Path(__file__).parent
FLOPS = 0.3
COLUMNS = ("", "tokens", "window", "prefill, times faster", "by round", "choosing", "memory", "dense")


class Timed(Selection):
    """A selection that adds up the CPU seconds it takes."""

    seconds = 0.0

    def __call__(self, layer: int, tokens: Any) -> Any:
        """As it is."""
        started = time.process_time()
        found = super().__call__(layer, tokens)
        self.seconds += time.process_time() - started
        return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and keeps the table where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lengths", default="2048,4096,16384")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that all of it runs")
    parser.add_argument("--keep", action="store_true", help="write results-tokens.md")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shape = rivals.Shape(32, 6, 64, 4, 16, 8) if given.quick else rivals.Shape()
    lengths = (32,) if given.quick else tuple(map(int, given.lengths.split(",")))
    with Terminal() as tell:
        repeats = 1 if given.quick else given.repeats
        rows = [row for family in ("mamba", "mamba2") for row in measured(shape, family, lengths, repeats, tell)]
        tell(Table(f"{FLOPS:.0%} of the blocks' work saved by utrc, one thread", COLUMNS, tuple(rows)))
    if given.keep:
        lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        (HERE / "results-tokens.md").write_text(text + "\n", encoding="utf-8")


def measured(
    shape: rivals.Shape, family: str, lengths: Sequence[int], repeats: int, tell: Emit
) -> list[tuple[str, ...]]:
    """A row for every length, with and without a window for the matching."""
    arch = shape.arch(family)
    torch.manual_seed(0)
    model: Any = rivals.build(arch, "ours", torch.float32)
    rows = []
    for length in lengths:
        ids = rivals.tokens(arch, 1, length)
        for window in (None, 256):
            policy = resolved(ReduceTokens(flops=FLOPS, match_window=window), arch)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                most = alone.submit(peaks, shape, family, length, policy, repeats).result()
            row = (family, str(length), str(window or "anywhere"), *told(model, ids, policy, repeats))
            rows.append((*row, *(f"{each / 2**20:,.0f} MiB" for each in most)))
            tell(Note(" ".join(rows[-1])))
    return rows


def told(model: Any, ids: Tensor, policy: TokenPolicy, repeats: int) -> tuple[str, ...]:
    """Ratio of the least times, ratios by round, and the share of time that choosing takes."""
    timed = Timed(policy)
    works = {"dense": partial(prefill, model, ids, None), "reduced": partial(prefill, model, ids, timed)}
    times = rounds(works, repeats, 1, clock=time.process_time)
    pairs = sorted(a / b for a, b in zip(times["dense"], times["reduced"], strict=True))
    timed.seconds = 0.0
    started = time.process_time()
    works["reduced"]()
    share = timed.seconds / (time.process_time() - started)
    return (
        f"{min(times['dense']) / min(times['reduced']):.2f}",
        f"{pairs[0]:.2f}–{statistics.median(pairs):.2f}–{pairs[-1]:.2f}",
        f"{share:.1%}",
    )


def peaks(shape: rivals.Shape, family: str, length: int, policy: TokenPolicy, repeats: int) -> tuple[float, float]:
    """Bytes beyond the model that reading a prompt takes at most, reduced and dense, by turns in one process."""
    torch.set_num_threads(1)
    arch = shape.arch(family)
    model: Any = rivals.build(arch, "ours", torch.float32)
    ids, ways = rivals.tokens(arch, 1, length), (Selection(policy), None)
    for select in ways:
        prefill(model, ids[:, :64], select)
    gc.collect()
    before = resident("VmRSS")
    found: dict[Selection | None, list[float]] = {select: [] for select in ways}
    for select in ways * repeats:
        forget()
        prefill(model, ids, select)
        found[select].append(resident("VmHWM") - before)
    reduced, dense = (statistics.median(found[select]) for select in ways)
    return reduced, dense


@torch.no_grad()
def prefill(model: Any, ids: Tensor, select: Selection | None) -> Tensor:
    """The backbone, and the logits of the last token."""
    model.backbone.select = select
    return model(ids, use_cache=False, logits_to_keep=1).logits


if __name__ == "__main__":
    main()
