"""Charts as SVG without a size of their own: they take the width they are given, and the colours of the page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from xml.etree.ElementTree import Element, SubElement, tostring

WIDTH = 360.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 10.0, 38.0
SHAPES = (
    "M0-4.2A4.2 4.2 0 1 1 0 4.2A4.2 4.2 0 1 1 0-4.2Z",
    "M-3.8-3.8H3.8V3.8H-3.8Z",
    "M0-5.2L5.2 0L0 5.2L-5.2 0Z",
    "M0-4.8L4.8 3.8H-4.8Z",
)
COLOURS = 8  # in figures.css; with four shapes in turn 32 marks differ


@dataclass(frozen=True)
class Point:
    """A model in a chart: its name, its mark (0 is the dense one's), where it lies, and its interval if it has one."""

    label: str
    mark: int
    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Share:
    """A share of right answers with its 95 % interval."""

    label: str
    mark: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Axis:
    """Where values lie between two ends of a line, and the ticks on it."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float, *, zero: bool = False, most: int = 5) -> "Axis":
        """An axis that holds these values between round numbers, and zero if asked for."""
        low, high = min(values), max(values)
        low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
        span = (high - low) or abs(high) or 1.0
        step = _round_step(span / most)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        last = max(last, first + 1)
        ticks = tuple(i * step for i in range(first, last + 1))
        return cls(ticks[0], ticks[-1], start, end, ticks)

    def at(self, value: float) -> float:
        """The place of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def words(self) -> list[str]:
        """The ticks, all with as many digits as their step needs."""
        step = self.ticks[1] - self.ticks[0]
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [f"{tick:,.{digits}f}".replace("-", "−") for tick in self.ticks]


def mark(number: int) -> str:
    """The mark of a model, for a legend."""
    svg = Element("svg", {"class": "figure key", "viewBox": "-7 -7 14 14", "aria-hidden": "true"})
    _mark(svg, number, 0, 0, "")
    return _text(svg)


def scatter(points: Sequence[Point], x_words: str, y_words: str, described: str, *, zero: bool = False) -> str:
    """Quality against size, with intervals; points of one size stand side by side."""
    svg = _svg(300, described)
    spans = [value for point in points for value in (point.y, point.low, point.high) if value is not None]
    y = Axis.of(spans, 300 - BOTTOM, TOP, zero=zero)
    x = Axis.of([point.x for point in points], LEFT, WIDTH - RIGHT, zero=True)
    _frame(svg, x, y, x_words, y_words)
    for point, shift in zip(points, _side_by_side([x.at(point.x) for point in points]), strict=True):
        across, up = x.at(point.x) + shift, y.at(point.y)
        told = f"{point.label}: {point.y:.4f}"
        if point.low is not None and point.high is not None:
            _line(svg, across, y.at(point.low), across, y.at(point.high), f"whisker m{_colour(point.mark)}")
            told += f" [{point.low:.4f}, {point.high:.4f}]"
        _mark(svg, point.mark, across, up, told)
    return _text(svg)


def shares(groups: Mapping[str, Sequence[Share]], chances: Mapping[str, float | None], described: str) -> str:
    """Accuracies in percent, measure by measure, with intervals and the line of chance."""
    heights = [26 + 13 * len(rows) for rows in groups.values()]
    height = sum(heights) + TOP + BOTTOM - 8
    svg = _svg(height, described)
    x = Axis(0.0, 1.0, 14.0, WIDTH - 18.0, (0.0, 0.25, 0.5, 0.75, 1.0))
    foot = height - BOTTOM + 6
    for tick in x.ticks:
        _line(svg, x.at(tick), TOP, x.at(tick), foot, "grid")
        _write(svg, x.at(tick), foot + 15, f"{tick:.0%}", "tick middle")
    _write(svg, WIDTH / 2, height - 3, "right answers, with 95 % interval", "title middle")
    top = TOP
    for (name, rows), tall in zip(groups.items(), heights, strict=True):
        _write(svg, x.start, top + 13, name, "name")
        chance = chances.get(name)
        if chance is not None:
            _line(svg, x.at(chance), top + 18, x.at(chance), top + tall, "chance")
        for i, row in enumerate(rows):
            up = top + 26 + 13 * i
            _line(svg, x.at(row.low), up, x.at(row.high), up, f"whisker m{_colour(row.mark)}")
            told = f"{row.label}: {row.value:.1%} [{row.low:.1%}, {row.high:.1%}]"
            _mark(svg, row.mark, x.at(row.value), up, told)
        top += tall
    return _text(svg)


def lines(series: Sequence[tuple[str, int, Mapping[int, float]]], described: str) -> str:
    """The relative error of each layer, a line a model: (name, mark, error by layer)."""
    svg = _svg(260, described)
    layers = sorted({layer for _, _, errors in series for layer in errors})
    y = Axis.of([error for _, _, errors in series for error in errors.values()], 260 - BOTTOM, TOP, zero=True)
    few = tuple(float(layer) for layer in layers if layer % math.ceil(len(layers) / 12) == 0)
    x = Axis(layers[0] - 0.4, layers[-1] + 0.4, LEFT, WIDTH - RIGHT, few)
    _frame(svg, x, y, "layer", "relative error after the layer")
    for name, number, errors in series:
        path = "M" + "L".join(f"{_near(x.at(layer))} {_near(y.at(error))}" for layer, error in errors.items())
        SubElement(svg, "path", {"class": f"line m{_colour(number)}", "d": path})
        for layer, error in errors.items() if len(layers) <= 24 else ():
            _mark(svg, number, x.at(layer), y.at(error), f"{name}, layer {layer}: {error:.4f}")
    return _text(svg)


def curves(
    series: Sequence[tuple[str, int | None, Sequence[tuple[int, float]]]],
    x_words: str,
    y_words: str,
    described: str,
    *,
    zero: bool = False,
) -> str:
    """What grows or falls by steps, a line each: (name, mark or None for a line without, (step, value) in turn)."""
    svg = _svg(260, described)
    points = [point for _, _, line in series for point in line]
    y = Axis.of([value for _, value in points], 260 - BOTTOM, TOP, zero=zero)
    x = Axis.of([float(step) for step, _ in points], LEFT, WIDTH - RIGHT, zero=True)
    _frame(svg, x, y, x_words, y_words)
    for name, number, line in series:
        path = "M" + "L".join(f"{_near(x.at(step))} {_near(y.at(value))}" for step, value in line)
        SubElement(svg, "path", {"class": f"line m{_colour(number or 0)}", "d": path})
        for step, value in line if number is not None else ():
            _mark(svg, number or 0, x.at(step), y.at(value), f"{name}, {x_words} {step}: {value:.4f}")
    return _text(svg)


def grid(cells: Mapping[str, Mapping[int, float]], described: str) -> str:
    """Which share of each module's entries each layer keeps: {module: {layer: share}}."""
    layers = sorted({layer for row in cells.values() for layer in row})
    left, tall, foot = 8.0 + 6.2 * max(map(len, cells)), 24.0, 34.0
    svg = _svg(TOP + tall * len(cells) + foot, described)
    wide = (WIDTH - left - 4) / len(layers)
    for i, (module, row) in enumerate(cells.items()):
        _write(svg, left - 6, TOP + tall * (i + 0.5) + 4, module, "tick end")
        for j, layer in enumerate(layers):
            share = row.get(layer)
            place = {"x": _near(left + wide * j), "y": _near(TOP + tall * i), "width": _near(wide - min(1.5, wide / 6))}
            cell = SubElement(svg, "rect", place | {"height": _near(tall - 1.5), "class": "cell"})
            if share is not None:
                cell.set("fill-opacity", f"{0.1 + 0.55 * share:.3f}")
                SubElement(cell, "title").text = f"{module}, layer {layer}: {share:.1%} kept"
                if wide >= 26:
                    middle = left + wide * (j + 0.5) - 0.75
                    _write(svg, middle, TOP + tall * (i + 0.5) + 3.5, f"{100 * share:.0f}", "in middle")
    bottom = TOP + tall * len(cells)
    for j, layer in enumerate(layers):
        if j % math.ceil(len(layers) / 12) == 0:
            _write(svg, left + wide * (j + 0.5), bottom + 13, str(layer), "tick middle")
    _write(svg, left + wide * len(layers) / 2, bottom + 29, "layer; share of entries kept, in percent", "title middle")
    return _text(svg)


def depths(tokens: Sequence[str], seen: Sequence[int], depth: int, mark: int, described: str) -> str:
    """How many blocks read each token of a prompt: a column a token, from the first block down."""
    svg = _svg(200, described)
    y = Axis(0.0, depth, TOP, 200 - BOTTOM, tuple(range(0, depth + 1, math.ceil(depth / 8))))
    x = Axis.of([0, len(tokens)], LEFT, WIDTH - RIGHT)
    x = replace(x, high=len(tokens), ticks=tuple(tick for tick in x.ticks if tick <= len(tokens)))
    for tick in y.ticks:
        _line(svg, x.start, y.at(tick), x.end, y.at(tick), "grid")
        _write(svg, x.start - 6, y.at(tick) + 3.5, f"{tick:.0f}", "tick end")
    for tick, word in zip(x.ticks, x.words(), strict=True):
        _write(svg, x.at(tick), y.end + 16, word, "tick middle")
    for i, (token, blocks) in enumerate(zip(tokens, seen, strict=True)):
        size = {"width": _near(x.at(1) - x.start), "height": _near(y.at(blocks) - y.start)}
        place = {"class": f"column m{_colour(mark)}", "x": _near(x.at(i)), "y": _near(y.start)}
        SubElement(SubElement(svg, "rect", place | size), "title").text = f"{token}: {blocks} of {depth} blocks"
    _write(svg, (x.start + x.end) / 2, y.end + 33, "token of the prompt", "title middle")
    words = _write(svg, 10, (y.start + y.end) / 2, "blocks that read it", "title middle")
    words.set("transform", f"rotate(-90 10 {_near((y.start + y.end) / 2)})")
    return _text(svg)


def _svg(height: float, described: str) -> Element:
    view = f"0 0 {WIDTH:.0f} {_near(height)}"
    return Element("svg", {"class": "figure", "viewBox": view, "role": "img", "aria-label": described})


def _text(svg: Element) -> str:
    return tostring(svg, encoding="unicode")


def _frame(svg: Element, x: Axis, y: Axis, x_words: str, y_words: str) -> None:
    """Grid, ticks and the words at the axes."""
    for tick, word in zip(y.ticks, y.words(), strict=True):
        _line(svg, x.start, y.at(tick), x.end, y.at(tick), "axis" if tick == 0 else "grid")
        _write(svg, x.start - 6, y.at(tick) + 3.5, word, "tick end")
    for tick, word in zip(x.ticks, x.words() if len(x.ticks) > 1 else ["0"], strict=True):
        _line(svg, x.at(tick), y.start, x.at(tick), y.start + 4, "axis")
        _write(svg, x.at(tick), y.start + 16, word, "tick middle")
    _line(svg, x.start, y.start, x.end, y.start, "axis")
    _write(svg, (x.start + x.end) / 2, y.start + 33, x_words, "title middle")
    middle = (y.start + y.end) / 2
    words = _write(svg, 10, middle, y_words, "title middle")
    words.set("transform", f"rotate(-90 10 {_near(middle)})")


def _round_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5, 10 times a power of ten that is at least this much."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(times * power for times in (1, 2, 2.5, 5, 10) if times * power >= rough * (1 - 1e-9))


def _side_by_side(places: Sequence[float], gap: float = 11.0) -> list[float]:
    """How far each point moves sideways, so that those at one place do not hide one another."""
    shifts = [0.0] * len(places)
    order = sorted(range(len(places)), key=lambda i: places[i])
    while order:
        near = [i for i in order if places[i] - places[order[0]] < gap]
        for position, i in enumerate(sorted(near)):
            shifts[i] = (position - (len(near) - 1) / 2) * gap
        order = order[len(near) :]
    return shifts


def _colour(number: int) -> int:
    return 0 if number == 0 else (number - 1) % COLOURS + 1


def _shape(number: int) -> str:
    """Each round of colours shifts the shapes by one."""
    return SHAPES[(number + max(0, number - 1) // COLOURS) % len(SHAPES)]


def _mark(svg: Element, number: int, x: float, y: float, told: str) -> None:
    kind = f"mark m{_colour(number)}"
    place = {"class": kind, "d": _shape(number), "transform": f"translate({_near(x)} {_near(y)})"}
    shape = SubElement(svg, "path", place)
    if told:
        SubElement(shape, "title").text = told


def _line(svg: Element, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
    ends = {"x1": _near(x1), "y1": _near(y1), "x2": _near(x2), "y2": _near(y2)}
    SubElement(svg, "line", {"class": kind} | ends)


def _write(svg: Element, x: float, y: float, words: str, kind: str) -> Element:
    text = SubElement(svg, "text", {"class": kind, "x": _near(x), "y": _near(y)})
    text.text = words
    return text


def _near(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
