"""Our CPU path against stock transformers, side by side in one process: reading, decoding, learning, WANDA, memory.

python evals/bench/cpu.py [--threads 1] [--repeats 2] [--quick] [--keep]
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import rivals
import torch
import transformers
from torch import Tensor

from ssmcompress.evaluate.peak import forget, resident
from ssmcompress.evaluate.speed import rounds as in_turns
from ssmcompress.events import Emit, Metric, Note, Table, Terminal
from ssmcompress.kernels import AUTO

HERE = Path(__file__).parent
AIMS = {"forward": {"mamba": {"float32": 3.2, "bfloat16": 5.5}, "mamba2": {"float32": 2.1, "bfloat16": 2.6}}}
AIMS["decoding"] = {family: {"float32": 1.25} for family in rivals.STOCK}
AIMS["training step"] = {"mamba": dict.fromkeys(("float32", "bfloat16"), 50.0)}
AIMS["training step"]["mamba2"] = dict.fromkeys(("float32", "bfloat16"), 2.3)
TITLES = {"mamba": "Mamba-1", "mamba2": "Mamba-2"}
SPEED = ("", "dtype", "against", "ours, s", "stock, s", "times faster", "by round", "aim", "linears alone / ours")
MEMORY = ("", "dtype", "", "peak RSS, GB", "above the weights, GB", "seconds")


@dataclass(frozen=True)
class Bench:
    """What is measured, and how often."""

    shape: rivals.Shape = field(default_factory=rivals.Shape)
    length: int = 512
    long: int = 2048
    threads: int = 1
    repeats: int = 3
    windows: int = 16
    wanda_layers: int = 4
    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    def clock(self) -> float:
        """Seconds: of this process's CPU on one thread, where a busy machine counts little, else of the wall."""
        return time.process_time() if self.threads == 1 else time.perf_counter()


QUICK = Bench(rivals.Shape(32, 2, 64, 4, 16, 8), length=32, long=64, repeats=1, windows=2, wanda_layers=2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and keeps the tables where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--quick", action="store_true", help="a tiny shape, to see that all of it runs; its aims mean nothing"
    )
    parser.add_argument("--keep", action="store_true", help="write results-cpu.md")
    given = parser.parse_args(arguments)
    bench = QUICK if given.quick else Bench(repeats=given.repeats)
    with Terminal() as tell:
        texts = run(replace(bench, threads=given.threads), tell)
    if given.keep:
        (HERE / "results-cpu.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def run(bench: Bench, tell: Emit) -> list[str]:
    """Every measurement, told as it comes; returns the same as Markdown."""
    transformers.utils.logging.set_verbosity_error()  # stock says at every build that its fast kernels are absent
    texts: list[str] = []

    def say(event: Note | Metric | Table) -> None:
        tell(event)
        texts.append(markdown(event))

    started = time.perf_counter()
    # children are forked while this process has run nothing but imports: their peaks are their own
    torch.set_num_threads(1)
    say(Table("Machine and models", ("", ""), machine(bench)))
    say(load("before"))
    say(Table("Peak memory, each in a process of its own", MEMORY, tuple(memory(bench))))
    title = f"WANDA, {bench.windows} × {bench.length} tokens, {bench.wanda_layers} layers, each in a process of its own"
    say(Table(title, MEMORY, tuple(wanda(bench))))
    say(load("before the timings in one process"))
    torch.set_num_threads(bench.threads)
    kind = "CPU seconds of the process" if bench.threads == 1 else "wall seconds"
    say(Table(f"Speed: {kind}, least (median) of {bench.repeats} rounds A B B A", SPEED, tuple(speed(bench))))
    say(load("after"))
    say(Note(f"The whole run took {time.perf_counter() - started:.0f} s."))
    return texts


def speed(bench: Bench) -> list[tuple[str, ...]]:
    """A row for every family, task, dtype and rival."""
    lines: list[tuple[str, ...]] = []
    for family in rivals.STOCK:
        for dtype in bench.dtypes:
            ours, others = contestants(bench, family, dtype)
            ids = rivals.tokens(bench.shape.arch(family), 1, bench.length)
            floor = partial(rivals.linears, ours, rivals.linear_inputs(ours, bench.length))
            asked = {name: partial(rivals.forward, model, ids) for name, model in others.items()}
            times = rounds(bench, {**asked, "linears": floor})
            lines += compared("forward", family, dtype, times)
            lines += alone(bench, family, dtype, ours)
            lines += decoding(bench, family, dtype, others)
            if family == "mamba":
                lines += mamba_training(bench, dtype, ours, ids, min(times["linears"]))
                continue
            for model in others.values():
                rivals.train(model, ids[:, :64])
            asked = {name: partial(rivals.train, model, ids) for name, model in others.items()}
            training = rounds(replace(bench, repeats=min(bench.repeats, 2)), asked, warm=False)
            lines += compared("training step", family, dtype, training | {"linears": [3 * min(times["linears"])]})
    return lines


def alone(bench: Bench, family: str, dtype: str, ours: Any) -> list[tuple[str, ...]]:
    """A longer text, which would take stock a minute: ours beside its linears."""
    ids, inputs = rivals.tokens(bench.shape.arch(family), 1, bench.long), rivals.linear_inputs(ours, bench.long)
    asked = {"ours": partial(rivals.forward, ours, ids), "linears": partial(rivals.linears, ours, inputs)}
    return compared(f"forward, {bench.long:,} tokens", family, dtype, rounds(bench, asked))


def decoding(bench: Bench, family: str, dtype: str, others: dict[str, Any]) -> list[tuple[str, ...]]:
    """Tokens one by one after a prompt of one token; stock's chunks have no part in it."""
    ids, inputs = rivals.tokens(bench.shape.arch(family), 1, 1), rivals.linear_inputs(others["ours"], 1)

    def floor() -> None:
        for _ in range(rivals.STEPS + 1):
            rivals.linears(others["ours"], inputs)

    asked = {name: partial(rivals.decode, others[name], ids) for name in ("ours", "stock")} | {"linears": floor}
    repeats = 1 if bench.repeats == 1 else 5 * bench.repeats
    return compared("decoding", family, dtype, rounds(replace(bench, repeats=repeats), asked))


def mamba_training(bench: Bench, dtype: str, ours: Any, ids: Tensor, floor: float) -> list[tuple[str, ...]]:
    """One layer against one layer of stock, a single round of it for minutes' sake, and our whole model by itself."""
    whole = rounds(bench, {"ours": partial(rivals.train, ours, ids)})
    one, others = contestants(bench, "mamba", dtype, layers=1)
    inputs = rivals.linear_inputs(one, bench.length)
    floors = rounds(bench, {"linears": partial(rivals.linears, one, inputs, head=False)})
    for model in others.values():
        rivals.train_blocks(model, ids[:, :32])
    mine = rounds(bench, {"ours": partial(rivals.train_blocks, others["ours"], ids)})
    theirs = rounds(
        replace(bench, repeats=1), {"stock": partial(rivals.train_blocks, others["stock"], ids)}, warm=False
    )
    single = mine | theirs | {"linears": [3 * min(floors["linears"])]}
    rows = compared("training step, 1 layer, no head", "mamba", dtype, single)
    return rows + compared("training step", "mamba", dtype, whole | {"linears": [3 * floor]})


def contestants(bench: Bench, family: str, dtype: str, layers: int = 0) -> tuple[Any, dict[str, Any]]:
    """Our model, and all rivals by name (ours first) on its weights."""
    arch = bench.shape.arch(family, layers)
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    ours: Any = rivals.build(arch, "ours", kind)
    return ours, {"ours": ours} | {name: rivals.build(arch, name, kind, ours) for name in rivals.RIVALS[family]}


def rounds(bench: Bench, asked: dict[str, Callable[[], Any]], warm: bool = True) -> dict[str, list[float]]:
    """Seconds of each in turn, round by round; a first round warms up and is dropped."""
    return in_turns(asked, bench.repeats, int(warm), clock=bench.clock)


def compared(task: str, family: str, dtype: str, times: dict[str, list[float]]) -> list[tuple[str, ...]]:
    """A row for each rival of ours: least times, their ratio, the ratios of single rounds, and the linears' share."""
    ours = times["ours"]
    share = f"{min(times['linears']) / min(ours):.2f}"
    aim = AIMS[task.split(",")[0]][family].get(dtype)
    others = {name: taken for name, taken in times.items() if name not in ("ours", "linears")}
    rows = []
    for name, taken in others.items() or {"—": []}.items():
        row = [f"{TITLES[family]} {task}", dtype, name, seconds(ours), "—", "—", "—", "—", share]
        if taken:
            pairs = [b / a for a, b in zip(ours, taken, strict=False)]
            row[4:8] = seconds(taken), f"{min(taken) / min(ours):.2f}", f"{min(pairs):.2f}–{max(pairs):.2f}", "—"
            row[7] = f"{aim:g}" if aim and name == "stock" else "—"
        rows.append(tuple(row))
    return rows


def seconds(taken: list[float]) -> str:
    """The least and the median."""
    return f"{min(taken):.3f} ({statistics.median(taken):.3f})"


def memory(bench: Bench) -> list[tuple[str, ...]]:
    """Peaks of a forward and of a training step."""
    lines = []
    for family in rivals.STOCK:
        names = ("ours", *rivals.RIVALS[family])
        for dtype in bench.dtypes:
            jobs = [(name, child(bench, partial(_forward, family, name, dtype))) for name in names]
            lines += [line(f"{TITLES[family]} forward", dtype, name, found) for name, found in jobs]
        layers = 1 if family == "mamba" else bench.shape.layers
        task = "training step, 1 layer, no head" if family == "mamba" else "training step"
        jobs = [(name, child(bench, partial(_train, family, name, layers))) for name in names]
        lines += [line(f"{TITLES[family]} {task}", "float32", name, found) for name, found in jobs]
    return lines


def wanda(bench: Bench) -> list[tuple[str, ...]]:
    """Time and peak of pruning, of two runs in turn the better time."""
    lines = []
    for family in rivals.STOCK:
        names = ("ours", "stock")  # chunk 64 would need a config edited by hand
        turns = [(name, child(bench, partial(_wanda, family, name))) for _ in range(2) for name in names]
        for name in names:
            best = min(found for other, found in turns if other == name)
            lines.append(line(f"{TITLES[family]} WANDA 50 %", "float32", name, best))
    return lines


def line(task: str, dtype: str, name: str, found: tuple[float, float, float]) -> tuple[str, ...]:
    """A row of a memory table from seconds, peak and what was there before, in bytes."""
    taken, peak, before = found
    return task, dtype, name, f"{peak / 1e9:.2f}", f"{(peak - before) / 1e9:.2f}", f"{taken:.2f}"


def _forward(family: str, name: str, dtype: str, bench: Bench) -> Callable[[], Any]:
    arch = bench.shape.arch(family)
    return partial(
        rivals.forward, rivals.build(arch, name, getattr(torch, dtype)), rivals.tokens(arch, 1, bench.length)
    )


def _train(family: str, name: str, layers: int, bench: Bench) -> Callable[[], Any]:
    arch = bench.shape.arch(family, layers)
    step = rivals.train_blocks if layers < bench.shape.layers else rivals.train
    return partial(step, rivals.build(arch, name), rivals.tokens(arch, 1, bench.length))


def _wanda(family: str, name: str, bench: Bench) -> Callable[[], Any]:
    arch = bench.shape.arch(family, bench.wanda_layers)
    windows = rivals.tokens(arch, bench.windows, bench.length)
    prune = rivals.our_wanda if name == "ours" else rivals.hook_wanda
    return partial(prune, arch, rivals.build(arch, name), windows)


def child(bench: Bench, prepare: Callable[[Bench], Callable[[], Any]]) -> tuple[float, float, float]:
    """Seconds, peak and starting resident bytes of prepared work in a forked process, where nothing else has run."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(bench, prepare, theirs))
    process.start()
    theirs.close()
    try:
        return mine.recv()
    except EOFError:
        raise SystemExit("A measurement ended without a result; its error is above.") from None
    finally:
        process.join()


def _work(bench: Bench, prepare: Callable[[Bench], Callable[[], Any]], result: Any) -> None:
    torch.set_num_threads(bench.threads)
    work = prepare(bench)
    before = resident("VmRSS")
    forget()
    started = bench.clock()
    work()
    result.send((bench.clock() - started, resident("VmHWM"), before))


def machine(bench: Bench) -> tuple[tuple[str, str], ...]:
    """What is measured and where: shape, CPU, threads, versions, kernels."""
    cpuinfo = Path("/proc/cpuinfo")
    rows = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((row.partition(":")[2].strip() for row in rows if row.startswith("model name")), platform.processor())
    shape = bench.shape
    return (
        ("models", f"random weights, width {shape.width}, {shape.layers} layers, batch 1, length {bench.length}"),
        ("CPU", f"{model}, {os.cpu_count()} CPUs, {bench.threads} of them used"),
        ("versions", f"torch {torch.__version__}, transformers {transformers.__version__}"),
        ("our kernels", ", ".join(f"{kernel} {name}" for kernel, name in AUTO.names("cpu").items())),
    )


def load(when: str) -> Metric:
    """The load of the last minute."""
    return Metric(f"load {when}", os.getloadavg()[0])


def markdown(event: Note | Metric | Table) -> str:
    """What was said, as Markdown."""
    match event:
        case Note():
            return event.text
        case Metric():
            return f"{event.name}: {event.value:.2f}"
    lines = [event.columns, ("---",) * len(event.columns), *event.rows]
    return f"### {event.title}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in lines)


if __name__ == "__main__":
    main()
