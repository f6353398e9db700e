"""An update of what `tune-state` learns, beside LoRA on stock transformers through PEFT, at the 130M shape.

python evals/bench/tuning.py [--repeats 3] [--quick] [--keep]

Random weights, 512 tokens; an update is forward, loss, backward and AdamW on what is learned, in CPU seconds of one
thread, contestants in turns. Mamba-1 has two layers and no head, for stock's backward grows faster than the length.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import peft
import rivals
import torch
from torch import Tensor, nn

from ssmcompress.arch.base import Arch
from ssmcompress.arch.tunable import install
from ssmcompress.evaluate.speed import rounds
from ssmcompress.events import Emit, Note, Table, Terminal
from ssmcompress.tune.lora import wrap
from ssmcompress.tuning import TuneState

HERE = Path(__file__).parent
STOCK = "stock, LoRA on in_proj"  # PEFT refuses out_proj of stock models
COLUMNS = ("", "what is learned", "parameters", "s an update", "against stock LoRA", "by round")
METHODS = ("state-offset", "output-offset", "initial-state", "lora", "full")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and keeps the table where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that all of it runs")
    parser.add_argument("--keep", action="store_true", help="write results-tuning.md")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shape = rivals.Shape(32, 2, 64, 4, 16, 8) if given.quick else rivals.Shape()
    length, repeats = (16, 1) if given.quick else (512, given.repeats)
    with Terminal() as tell:
        rows = [row for family in ("mamba", "mamba2") for row in measured(shape, family, length, repeats, tell)]
        tell(Table(f"An update of {length} tokens, one thread", COLUMNS, tuple(rows)))
    if given.keep:
        lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        (HERE / "results-tuning.md").write_text(text + "\n", encoding="utf-8")


def measured(shape: rivals.Shape, family: str, length: int, repeats: int, tell: Emit) -> list[tuple[str, ...]]:
    """A row for every method of ours, and for LoRA on the stock model."""
    arch = shape.arch(family, 2 if family == "mamba" else 0)
    ids, works, counts = rivals.tokens(arch, 1, length), dict[str, Callable[[], None]](), dict[str, int]()
    for name in (STOCK, *METHODS):
        torch.manual_seed(0)
        model, learned = stock(arch) if name == STOCK else ours(arch, name)
        counts[name] = sum(each.numel() for each in learned)
        works[name] = partial(update, family, model, ids, torch.optim.AdamW(learned, lr=1e-6, weight_decay=0.0))
    times = rounds(works, repeats, 1, clock=time.process_time)
    rows = []
    for name in works:
        pairs = sorted(theirs / mine for theirs, mine in zip(times[STOCK], times[name], strict=True))
        told = f"{pairs[0]:.2f}–{statistics.median(pairs):.2f}–{pairs[-1]:.2f}"
        ratio = f"{min(times[STOCK]) / min(times[name]):.2f}"
        layers = f"{family}, 2 layers, no head" if family == "mamba" else family
        rows.append((layers, name, f"{counts[name]:,}", f"{min(times[name]):.3f}", ratio, told))
        tell(Note(" ".join(rows[-1])))
    return rows


def ours(arch: Arch, method: str) -> tuple[nn.Module, list[nn.Parameter]]:
    """Our model, and what a method learns of it."""
    model: Any = rivals.build(arch, "ours")
    model.requires_grad_(False)
    learned = wrap(model, arch, TuneState(method="lora"))[0] if method == "lora" else install(model, arch, method)
    for parameter in learned.values():
        parameter.requires_grad_(True)
    return model.train(), list(learned.values())


def stock(arch: Arch) -> tuple[nn.Module, list[nn.Parameter]]:
    """The stock model with PEFT's LoRA, rank 8."""
    with warnings.catch_warnings(action="ignore"):
        model = peft.get_peft_model(rivals.build(arch, "stock"), peft.LoraConfig(r=8, target_modules=["in_proj"]))
    return model.base_model.model.train(), [each for each in model.parameters() if each.requires_grad]


def update(family: str, model: Any, ids: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Forward, loss, backward, and the optimizer."""
    if family == "mamba":
        model.backbone(ids, use_cache=False).last_hidden_state.float().square().mean().backward()
    else:
        model(ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
