"""How fast a checkpoint reads and writes, and what it takes: measured in turns, with spread, and what else ran."""

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from scipy import stats
from torch import nn

from ssmcompress.arch.base import Arch
from ssmcompress.arch.mixer import mixers
from ssmcompress.checkpoint.source import Checkpoint
from ssmcompress.errors import InputError
from ssmcompress.evaluate.peak import decode, first_token, in_memory, peak, prefill
from ssmcompress.events import Advance, Emit, Note, Phase, Table, ignore, number
from ssmcompress.tokens.schedule import lengths as lengths_left

NAME = "speed.json"
WARM_UP = 2
RESAMPLES = 9_999


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spread(_Record):
    """Median and quartiles of the repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of these values."""
        low, median, high = np.percentile(np.asarray(values), [25, 50, 75])
        return cls(median=float(median), low=float(low), high=float(high))


class Prefill(_Record):
    """Reading a prompt of `length` tokens: backbone and the last token's logits.

    Tokens/s are without a cache; the first token is that of a greedy continuation, its cache filled, in seconds.
    FLOPs are per token of the prompt.
    """

    length: int
    tokens_per_s: Spread
    time_to_first_token_s: Spread
    flops_per_token: float


class ModelSpeed(_Record):
    """The figures of one model.

    Weights as stored and as computed with, the recurrent state of one sequence, and the most memory at work (reading
    the longest prompt, then decoding), all in bytes. On a CPU that is the resident size of a process that does nothing
    else (`memory_before_bytes`: weights and libraries loaded, no work done yet); on CUDA what torch allocated.
    """

    model: str
    dtype: str
    prefill: tuple[Prefill, ...]
    decode_tokens_per_s: Spread
    decode_flops_per_token: float
    weight_bytes: int
    weight_bytes_in_memory: int
    state_bytes: int
    peak_memory_bytes: int
    memory_before_bytes: int


class Ratio(_Record):
    """How many times as fast as `against` a model is: the median over turns, with its 95 % bootstrap interval."""

    figure: str
    ratio: float
    interval: tuple[float, float] | None

    @classmethod
    def of(cls, figure: str, seconds: Sequence[float], against: Sequence[float], seed: int = 0) -> "Ratio":
        """The ratio of seconds taken in turns; a single turn has no interval."""
        ratios = np.asarray(against) / np.asarray(seconds)
        held = None
        if len(ratios) > 1:
            drawn = stats.bootstrap(
                (ratios,), np.median, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
            )
            held = float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)
        return cls(figure=figure, ratio=float(np.median(ratios)), interval=held)


class Speed(_Record):
    """speed.json: a model, where asked for another in turns with it, and under what conditions.

    `load` is the machine's average of the last minute, before and after.
    """

    schema_version: Literal[1] = 1
    model: ModelSpeed
    against: ModelSpeed | None
    ratios: tuple[Ratio, ...]
    batch: int
    decode_tokens: int
    repetitions: int
    warm_up: int
    seed: int
    device: str
    backend: dict[str, str]
    threads: int
    load: tuple[float, float]
    machine: str
    torch: str

    def write(self, folder: str | Path) -> None:
        """Writes speed.json into a folder."""
        (Path(folder) / NAME).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read(folder: str | Path) -> Speed | None:
    """The speed.json of a folder, or None where there is none; InputError where it is damaged."""
    path = Path(folder) / NAME
    if not path.exists():
        return None
    try:
        return Speed.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read: {str(error).splitlines()[0]}.", hint="Measure again with `eval --speed`."
        ) from None


def speed(
    checkpoint: Checkpoint,
    *,
    lengths: Sequence[int] = (128, 512),
    decode_tokens: int = 64,
    batch: int = 1,
    repetitions: int = 10,
    against: Checkpoint | None = None,
    seed: int = 0,
    emit: Emit = ignore,
) -> Speed:
    """Times a model on random tokens, where asked for in turns A B B A … with another on the same tokens.

    Rates count the tokens of all rows of the batch. Raises InputError for a size below one, ResourceError where the
    memory to measure in cannot be had.
    """
    sizes = {"--lengths": min(lengths, default=0), "decode_tokens": decode_tokens, "batch": batch}
    for name, size in (sizes | {"repetitions": repetitions}).items():
        if size < 1:
            raise InputError(f"{name} holds {size}; expected at least 1.", hint="For example --lengths 128,512.")
    contestants = {"model": checkpoint} | ({} if against is None else {"against": against})
    lengths = tuple(sorted(set(lengths)))
    before = os.getloadavg()[0]
    emit(Phase("speed", (2 * len(lengths) + 1) * (repetitions + WARM_UP)))
    seconds = partial(clock, checkpoint.model.device)
    moves = {name: partial(move, each.model) for name, each in contestants.items()} if against else None
    taken = {
        figure: rounds(work, repetitions, WARM_UP, moves=moves, clock=seconds, emit=emit)
        for figure, work in _works(contestants, lengths, decode_tokens, batch, seed).items()
    }
    after = os.getloadavg()[0]
    peaks = {name: peak(each, lengths[-1], decode_tokens, batch) for name, each in contestants.items()}
    figures = {
        name: _figures(
            each, {figure: times[name] for figure, times in taken.items()}, lengths, batch, decode_tokens, peaks[name]
        )
        for name, each in contestants.items()
    }
    ratios = [Ratio.of(name, times["model"], times["against"], seed) for name, times in taken.items() if against]
    model = checkpoint.model
    return Speed(
        model=figures["model"],
        against=figures.get("against"),
        ratios=tuple(ratios),
        batch=batch,
        decode_tokens=decode_tokens,
        repetitions=repetitions,
        warm_up=WARM_UP,
        seed=seed,
        device=str(model.device),
        backend=next(mixers(model)).backend.names(model.device, model.dtype),
        threads=torch.get_num_threads(),
        load=(before, after),
        machine=_machine(model.device),
        torch=torch.__version__,
    )


def tell(found: Speed, emit: Emit) -> None:
    """The figures as a table, beside those of the other model and the ratios where there is one."""
    sides = [found.model] + ([found.against] if found.against else [])
    columns = ["", *(side.model for side in sides)]
    rows = [[words, *cells] for words, cells, _ in _rows(sides)]
    if found.against:
        ratios = {ratio.figure: _ratio(ratio) for ratio in found.ratios}
        columns.append("times as fast [95 %]")
        rows = [[*row, ratios.get(figure, "")] for row, (*_, figure) in zip(rows, _rows(sides), strict=True)]
    emit(Table(f"speed, median [quartiles] of {found.repetitions}", tuple(columns), tuple(map(tuple, rows))))
    threads = f"{found.threads} thread{'s' * (found.threads > 1)}"
    busy = f"load {found.load[0]:.1f} before and {found.load[1]:.1f} after"
    emit(Note(f"Timed on {found.machine} ({found.device}, {threads}), {busy}."))


def parsed(lengths: str) -> tuple[int, ...]:
    """The lengths of `128,512`; InputError for what is none."""
    try:
        found = tuple(int(length) for length in lengths.split(","))
    except ValueError:
        raise InputError(f"--lengths {lengths} holds no numbers.", hint="For example --lengths 128,512.") from None
    if min(found) < 1:
        raise InputError(f"--lengths holds {min(found)}; expected at least 1.", hint="For example --lengths 128,512.")
    return found


def rounds(
    work: Mapping[str, Callable[[], Any]],
    repetitions: int,
    warm_up: int,
    *,
    moves: Mapping[str, Callable[[], Any]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    emit: Emit = ignore,
) -> dict[str, list[float]]:
    """Seconds of each work in turn, A B B A …, round by round; rounds that warm up are dropped.

    With `moves`, each is moved before every round and then run once untimed: where weights happen to lie in memory is
    worth a percent or two, and would else count as a difference of the models.
    """
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repetitions + warm_up):
        order = list(work)[:: -1 if turn % 2 else 1]
        if moves:
            for each in (*(moves[name] for name in order), *(work[name] for name in order)):
                each()
        for name in order:
            started = clock()
            work[name]()
            if turn >= warm_up:
                times[name].append(clock() - started)
        emit(Advance())
    return times


def move(model: nn.Module) -> None:
    """Lays the weights of a model elsewhere in memory."""
    for weight in model.parameters():
        weight.data = weight.data.clone()


def flops(model: nn.Module, arch: Arch, length: int = 1) -> dict[str, float]:
    """Floating-point operations per token of a prompt of `length`, of which the last token alone gets logits.

    Two per weight of a matrix or convolution, and five per entry of the recurrent state: h ← a·h + b·x, y ← c·h. What
    is done once a channel (norms, gates, steps) is left out. Zeros count: nothing skips them. Tokens that left a long
    prompt do not; what chooses them is left out.
    """
    head = model.get_output_embeddings().weight.numel()
    blocks = arch.blocks(model)
    seen = [1.0] * len(blocks)
    if arch.policy is not None:
        seen = [tokens / length for tokens in lengths_left(length, arch.layers, arch.policy)]
    linear = [sum(each.weight.numel() for each in block.modules() if isinstance(each, nn.Linear)) for block in blocks]
    convolutions = [mixer.conv1d.weight for mixer in mixers(model)]
    kept = sum(weight.shape[0] * (weight.shape[-1] - 1) for weight in convolutions)
    return {
        "matrices": 2 * (sum(share * size for share, size in zip(seen, linear, strict=True)) + head / length),
        "convolutions": 2.0 * sum(share * each.numel() for share, each in zip(seen, convolutions, strict=True)),
        "scan": 5.0 * (arch.state_bytes() // 4 - kept) * sum(seen) / len(seen),
    }


def _works(
    contestants: Mapping[str, Checkpoint], lengths: Sequence[int], decode_tokens: int, batch: int, seed: int
) -> dict[str, dict[str, Callable[[], Any]]]:
    """What is timed, by figure and by contestant; a decoding goes on where its last one ended."""
    models = {name: each.model for name, each in contestants.items()}
    vocabulary = min(model.config.vocab_size for model in models.values())
    ids = torch.randint(vocabulary, (batch, max(lengths)), generator=torch.Generator().manual_seed(seed))
    prompts = {name: ids.to(model.device) for name, model in models.items()}
    found: dict[str, dict[str, Callable[[], Any]]] = {}
    for length in lengths:
        for figure, step in ((f"prefill_{length}", prefill), (f"first_token_{length}", first_token)):
            found[figure] = {name: partial(step, model, prompts[name][:, :length]) for name, model in models.items()}
    starts = {name: first_token(model, prompts[name][:, : lengths[0]]) for name, model in models.items()}
    found["decode"] = {name: partial(decode, model, *starts[name], decode_tokens) for name, model in models.items()}
    return found


def _figures(
    checkpoint: Checkpoint,
    seconds: Mapping[str, Sequence[float]],
    lengths: Sequence[int],
    batch: int,
    decode_tokens: int,
    memory: tuple[int, int],
) -> ModelSpeed:
    model, stored = checkpoint.model, checkpoint.stored
    read = tuple(
        Prefill(
            length=length,
            tokens_per_s=Spread.of([batch * length / taken for taken in seconds[f"prefill_{length}"]]),
            time_to_first_token_s=Spread.of(seconds[f"first_token_{length}"]),
            flops_per_token=sum(flops(model, checkpoint.arch, length).values()),
        )
        for length in lengths
    )
    return ModelSpeed(
        model=checkpoint.label,
        dtype=str(model.dtype),
        prefill=read,
        decode_tokens_per_s=Spread.of([batch * decode_tokens / taken for taken in seconds["decode"]]),
        decode_flops_per_token=sum(flops(model, checkpoint.arch).values()),
        weight_bytes=sum(stored.shape(name).numel() * stored.dtype(name).itemsize for name in stored),
        weight_bytes_in_memory=in_memory(checkpoint),
        state_bytes=checkpoint.arch.state_bytes(),
        peak_memory_bytes=memory[0],
        memory_before_bytes=memory[1],
    )


def _rows(sides: Sequence[ModelSpeed]) -> Iterator[tuple[str, list[str], str]]:
    """A row a figure: its words, a cell for each model, and the name its ratio goes by."""
    for i, length in enumerate(each.length for each in sides[0].prefill):
        read = [side.prefill[i] for side in sides]
        yield f"prefill of {length}, tokens/s", [_spread(each.tokens_per_s) for each in read], f"prefill_{length}"
        times = [_spread(each.time_to_first_token_s, 1e3) for each in read]
        yield f"first token after {length}, ms", times, f"first_token_{length}"
        yield f"FLOPs a token, prefill of {length}", [number(int(each.flops_per_token)) for each in read], ""
    yield "decode, tokens/s", [_spread(side.decode_tokens_per_s) for side in sides], "decode"
    yield "FLOPs a token, decode", [number(int(side.decode_flops_per_token)) for side in sides], ""
    told = {
        "weights stored, bytes": "weight_bytes",
        "weights in memory, bytes": "weight_bytes_in_memory",
        "state of a sequence, bytes": "state_bytes",
        "most memory at work, bytes": "peak_memory_bytes",
        "memory before work, bytes": "memory_before_bytes",
    }
    for words, field in told.items():
        yield words, [number(getattr(side, field)) for side in sides], ""


def _spread(found: Spread, scale: float = 1.0) -> str:
    return f"{number(scale * found.median)} [{number(scale * found.low)}, {number(scale * found.high)}]"


def _ratio(found: Ratio) -> str:
    held = "" if found.interval is None else f" [{found.interval[0]:.3f}, {found.interval[1]:.3f}]"
    return f"{found.ratio:.3f}{held}"


def clock(device: torch.device) -> float:
    """Seconds of the wall, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _machine(device: torch.device) -> str:
    """The name of the processor or card."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    rows = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = next((row.partition(":")[2].strip() for row in rows if row.startswith("model name")), platform.processor())
    return f"{found or platform.machine()}, {os.cpu_count()} CPUs"
