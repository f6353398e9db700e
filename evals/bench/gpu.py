"""What pruning, cutting and leaving out tokens give on a card: WANDA's time, prompts and tokens a second, memory.

python evals/bench/gpu.py [--shapes 130M,1.4B,2.8B] [--dtypes bfloat16,float32] [--repeats 5] [--quick] [--keep]

Random weights: neither speed nor memory asks what they are. Every model reads prompts, and decodes after short ones, in
turns with the dense one in one process. Of the ceiling: what its matrix products would take at the rate of one large
product, measured here, over what reading takes. `--quick` runs all of it at a tiny shape, on the CPU where there is no
card. `--keep` writes results-gpu.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cuts
import rivals
import torch
from torch import nn

from ssmcompress.arch.base import Arch
from ssmcompress.arch.surgery import Surgery
from ssmcompress.evaluate.speed import clock, rounds
from ssmcompress.events import Emit, Note, Table, Terminal
from ssmcompress.prune.apply import find_edits
from ssmcompress.prune.masks import n_of_m
from ssmcompress.prune.sizes import outline
from ssmcompress.steps import Cut, Prune, ReduceTokens
from ssmcompress.tokens.schedule import resolved
from ssmcompress.tokens.selection import Selection

HERE = Path(__file__).parent
SHAPES = {
    "130M": rivals.Shape(),
    "1.4B": rivals.Shape(width=2048, layers=48, heads=64),
    "2.8B": rivals.Shape(width=2560, layers=64, heads=80),
}
QUICK = {"tiny": rivals.Shape(64, 4, 64, 4, 32, 16)}
HALF = {"mamba": Cut(axis="channel", keep=0.5), "mamba2": Cut(axis="head", keep=0.5)}
FLOPS = 0.3  # of the blocks' work, saved by leaving out tokens
READ = ("", "dtype", "", "prompt tokens/s", "times dense", "decoded tokens/s", "times dense", "peak", "of the ceiling")
PRUNED = ("", "dtype", "windows", "s", "peak")


@dataclass(frozen=True)
class Work:
    """How much is read at once, what a decoding batch is, the calibration windows, and where."""

    device: torch.device
    rows: int = 8
    length: int = 2048
    batch: int = 64
    windows: int = 128
    product: int = 8192


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and keeps the tables where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that all of it runs")
    parser.add_argument("--keep", action="store_true", help="write results-gpu.md")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not given.quick:
        raise SystemExit("torch sees no CUDA device: `--quick` runs without one.")
    work = Work(device, 2, 32, 2, 2, 64) if given.quick else Work(device)
    shapes = QUICK if given.quick else {name: SHAPES[name] for name in given.shapes.split(",")}
    read, pruned = [], []
    with Terminal() as tell:
        for dtype in (getattr(torch, name) for name in given.dtypes.split(",")):
            rate = ceiling(dtype, work)
            tell(Note(f"One product of {work.product} x {work.product} in {dtype}: {rate / 1e12:.1f} TFLOP/s."))
            for name, shape in shapes.items():
                for family in HALF:
                    arch = shape.arch(family)
                    read += reading(f"{family}, {name}", arch, dtype, rate, work, given.repeats, tell)
                    pruned.append((f"{family}, {name}", _name(dtype), *wanda(arch, dtype, work)))
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else "no card"
        tell(Table(f"{card}: {work.rows} x {work.length} tokens read, {work.batch} rows decoded", READ, tuple(read)))
        tell(Table(f"{card}: WANDA", PRUNED, tuple(pruned)))
    if given.keep:
        head = f"{card}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; random weights\n\n"
        (HERE / "results-gpu.md").write_text(
            head + _table(READ, read) + "\n" + _table(PRUNED, pruned), encoding="utf-8"
        )


def ceiling(dtype: torch.dtype, work: Work) -> float:
    """FLOP/s of one large matrix product, the best of ten."""
    a, b = (torch.randn(work.product, work.product, device=work.device, dtype=dtype) for _ in range(2))
    times = rounds({"": lambda: a @ b}, 10, 2, clock=partial(clock, work.device))[""]
    return 2 * work.product**3 / min(times)


def reading(
    name: str, arch: Arch, dtype: torch.dtype, rate: float, work: Work, repeats: int, tell: Emit
) -> Iterator[tuple[str, ...]]:
    """A row for the dense model and each of what is made of it."""
    dense = built(arch, dtype, work.device)
    ids = rivals.tokens(arch, max(work.rows, work.batch), work.length).to(work.device)
    for way, make in variants(arch, dtype, work).items():
        try:
            model = make(dense)
        except (NotImplementedError, RuntimeError) as error:  # torch's semi-structured weights, where it has none
            tell(Note(f"{name}, {way}: {str(error).splitlines()[0]}", "warning"))
            continue
        times = {
            task: rounds(
                {"dense": partial(each, dense), "small": partial(each, model)},
                repeats,
                2,
                clock=partial(clock, work.device),
            )
            for task, each in (
                ("read", lambda m: rivals.prefill(m, ids[: work.rows])),
                ("decoded", lambda m: rivals.decode(m, ids[: work.batch, :8])),
            )
        }
        seconds = {task: statistics.median(both["small"]) for task, both in times.items()}
        ratios = {task: statistics.median(both["dense"]) / seconds[task] for task, both in times.items()}
        read = work.rows * work.length
        products = 2 * read * sum(m.weight.numel() for m in model.backbone.layers.modules() if isinstance(m, nn.Linear))
        row = (
            name,
            _name(dtype),
            way,
            f"{read / seconds['read']:,.0f}",
            f"{ratios['read']:.2f}",
            f"{work.batch * rivals.STEPS / seconds['decoded']:,.0f}",
            f"{ratios['decoded']:.2f}",
            _peak(model, lambda model=model: rivals.prefill(model, ids[: work.rows])),
            f"{products / rate / seconds['read']:.2f}" if way in ("dense", "half") else "",
        )
        tell(Note(" ".join(row)))
        yield row


def variants(arch: Arch, dtype: torch.dtype, work: Work) -> dict[str, Callable[[Any], Any]]:
    """How the contestants are made of the dense model; what shares its weights leaves it as it is."""

    def half(dense: Any) -> Any:
        step = HALF[arch.model_type]
        size = arch.axes()[step.axis].size
        return Surgery(arch, map(cuts.filled, outline(arch, step, size // 2))).operate(dense)

    def fewer(_: Any) -> Any:
        model = built(arch, dtype, work.device)
        model.backbone.select = Selection(resolved(ReduceTokens(flops=FLOPS), arch))
        return model

    def sparse(_: Any) -> Any:
        model = built(arch, dtype, work.device)
        for module in model.backbone.layers.modules():
            if isinstance(module, nn.Linear) and not any(size % 64 for size in module.weight.shape):
                masked = module.weight.detach() * n_of_m(module.weight.detach().abs().float(), 2, 4)
                module.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(masked), requires_grad=False)
        return model

    found = {"dense": lambda dense: dense, "half": half, f"{FLOPS:.0%} of the work less by tokens": fewer}
    return found | ({"2:4": sparse} if dtype == torch.bfloat16 else {})


def wanda(arch: Arch, dtype: torch.dtype, work: Work) -> tuple[str, ...]:
    """Windows, seconds and peak of pruning half of the weights."""
    model, ids = built(arch, dtype, work.device), rivals.tokens(arch, work.windows, work.length).to(work.device)
    started = clock(work.device)
    peak = _peak(model, lambda: find_edits(model, arch, Prune(method="wanda"), ids))
    return f"{work.windows} x {work.length}", f"{clock(work.device) - started:.1f}", peak


def built(arch: Arch, dtype: torch.dtype, device: torch.device) -> Any:
    """The random model on the device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return arch.build(str(device)).to(dtype).eval()
    finally:
        torch.set_default_dtype(before)


def _peak(model: nn.Module, work: Callable[[], Any]) -> str:
    """The most that the model and its work take; nothing is told of a CPU."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        work()
        return "—"
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    weights = sum(each.nbytes for each in model.parameters())
    return f"{(torch.cuda.max_memory_allocated(device) - before + weights) / 2**30:.2f} GiB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table(columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
