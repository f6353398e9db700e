"""What happened, as data, and the two listeners that tell it: a terminal and JSON lines. Nothing else prints."""

import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

UNITS = ((1e9, "billion", "GB"), (1e6, "million", "MB"), (1e3, "thousand", "kB"))
PLAIN_WIDTH = 100  # columns of text where nothing tells how wide the page is
NUMBER = re.compile(r"[-+±≤≥<>~]?\s?\d[\d.,e+-]*(\s?(%|×|x|s|ms|points|B|[kMGT]B?|[KMGT]iB|[\[(].*[\])]))*")
BLANK = frozenset({"", "-", "–", "—"})


@dataclass(frozen=True)
class Event:
    """Something that happened."""

    def to_dict(self) -> dict[str, Any]:
        """The event's name and fields; numbers that JSON cannot say become None."""
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()
        return {"event": name} | {key: _plain(value) for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Note(Event):
    """A sentence for the user."""

    text: str
    level: Literal["info", "warning"] = "info"


@dataclass(frozen=True)
class Phase(Event):
    """A stretch of work of `total` units begins."""

    name: str
    total: int


@dataclass(frozen=True)
class Advance(Event):
    """`done` more units of the phase are finished."""

    done: int = 1


@dataclass(frozen=True)
class LayerDone(Event):
    """A layer (counted from 0) is finished; None where something is not measured.

    `error` is the relative change of its output on the first calibration window; `kept` is the share of the entries of
    what was pruned that is not zero, whoever zeroed the others.
    """

    layer: int
    layers: int
    seconds: float
    error: float | None = None
    kept: float | None = None


@dataclass(frozen=True)
class Metric(Event):
    """A measured number, with its interval."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""


@dataclass(frozen=True)
class Table(Event):
    """Results in rows; columns that hold numbers are aligned to the right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Output(Event):
    """Text that was asked for, to be passed on as it is."""

    text: str


@dataclass(frozen=True)
class Finished(Event):
    """The folder that was written and bears its final name."""

    folder: str


@dataclass(frozen=True)
class Failed(Event):
    """Why the work ended, what to do about it, and the exit code."""

    message: str
    hint: str = ""
    exit_code: int = 1


Emit = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The listener that does not listen."""


def fan(*listeners: Emit) -> Emit:
    """One listener that tells all of these, in order."""

    def emit(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return emit


def number(value: float) -> str:
    """A number for people: whole numbers in groups of three, others with four significant digits."""
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) >= 1e4):
        return f"{int(value):,}"
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.3g}" if digits > 7 else f"{value:,.{digits}f}"


def size(value: float) -> str:
    """A number of bytes for people."""
    unit, _, word = next((unit for unit in UNITS if value >= unit[0]), (1.0, "", "bytes"))
    return f"{value / unit:.2f} {word}" if word != "bytes" else f"{value:,.0f} bytes"


class JsonLines:
    """Writes each event as one JSON line with its time (seconds since 1970), to a path (appended) or a stream."""

    def __init__(self, target: str | os.PathLike[str] | TextIO) -> None:
        self._owned = isinstance(target, str | os.PathLike)
        self._stream = (
            Path(target).open("a", encoding="utf-8")  # noqa: SIM115
            if isinstance(target, str | os.PathLike)
            else target
        )

    def __call__(self, event: Event) -> None:
        line = {"time": round(time.time(), 3)} | event.to_dict()
        self._stream.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._stream.flush()

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file that was opened here."""
        if self._owned:
            self._stream.close()


class Terminal:
    """Tells events to people: results on stdout, progress and notes on stderr, bars only where stderr is a terminal."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out = _console(out, stderr=False)
        self._err = _console(err, stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __call__(self, event: Event) -> None:
        match event:
            case Phase():
                self._begin(event)
            case Advance():
                self._advance(event.done)
            case LayerDone():
                self._err.print(_layer_line(event))
                self._advance(1)
            case Note():
                style = "yellow" if event.level == "warning" else ""
                prefix = "warning: " if event.level == "warning" else ""
                self._err.print(Text(prefix + event.text, style))
            case Failed():
                self.close()
                self._err.print(Text.assemble(("error: ", "bold red"), event.message), soft_wrap=True)
                if event.hint:
                    self._err.print(Text.assemble(("hint: ", "bold cyan"), event.hint), soft_wrap=True)
            case Metric():
                self._result(_metric_line(event))
            case Table():
                if event.title:
                    self._result(Text("\n" + event.title, "bold"))
                self._result(_table(event))
            case Output():
                self._result(Text(event.text.rstrip("\n")))
            case Finished():
                self._result(Text.assemble(("written: ", "bold green"), event.folder))

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _begin(self, phase: Phase) -> None:
        if not self._err.is_terminal:
            self._err.print(Text(phase.name))
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False, table_column=Column(min_width=24, no_wrap=True)),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self._err,
                transient=True,
            )
            self._bar.start()
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._task = self._bar.add_task(phase.name, total=phase.total or None)

    def _advance(self, done: int) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, done)

    def _result(self, item: Text | RichTable) -> None:
        self.close()  # the bar lives on stderr: both on one screen would overwrite one another
        if isinstance(item, Text):
            self._out.print(item, soft_wrap=True)
            return
        if not self._out.is_terminal:
            self._out.width = max(PLAIN_WIDTH, _widest(self._out, item))
        self._out.print(item)


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError  # rich would exit with 1, as if the bug were ours


def _console(file: TextIO | None, *, stderr: bool) -> Console:
    console = _Console(file=file, stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def _widest(console: Console, item: RichTable) -> int:
    wide = console.options.update(width=10_000, max_width=10_000)
    return console.measure(item, options=wide).maximum


def _layer_line(event: LayerDone) -> Text:
    width = len(str(event.layers))
    line = f"layer {event.layer + 1:>{width}}/{event.layers}  {event.seconds:6.2f} s"
    line += "" if event.error is None else f"  error {event.error:.4f}"
    return Text(line + ("" if event.kept is None else f"  kept {event.kept:6.1%}"))


def _metric_line(event: Metric) -> Text:
    unit = f" {event.unit}" if event.unit else ""
    known = event.low is not None and event.high is not None
    interval = f"  [{number(event.low)}, {number(event.high)}]" if known else ""  # type: ignore[arg-type]
    return Text(f"{event.name:<28} {number(event.value):>12}{unit}{interval}")


def _table(event: Table) -> RichTable:
    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, name in enumerate(event.columns):
        cells = [row[index] for row in event.rows if row[index].strip() not in BLANK]
        numeric = bool(cells) and all(NUMBER.fullmatch(cell.strip()) for cell in cells)
        table.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in event.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
