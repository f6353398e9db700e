"""Which charts the page has, and what is said of them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from ssmcompress.measure.passage import Passage
from ssmcompress.report import figures, words
from ssmcompress.report.figures import Point, Share
from ssmcompress.report.measures import Measure
from ssmcompress.report.tables import Member

PALEST = 0.2  # how visible a token would be that no block reads


@dataclass(frozen=True)
class Drawing:
    """A chart with its title, what is to be said of it, and a text whose pieces are so visible (up to 1)."""

    title: str
    svg: str
    words: str
    text: tuple[tuple[str, float], ...] = ()


def quality(members: Sequence[Member], text: Measure) -> Iterable[Drawing]:
    """Bits per byte against size, and its paired change against dense."""
    sized = [(each, each.checkpoint.nonzero or each.checkpoint.params) for each in members if text in each.figures]
    placed = [(member, size) for member, size in sized if size]
    if len(placed) < 2:
        return
    unit, word, _ = next(unit for unit in (*words.UNITS, (1.0, "", "")) if max(size for _, size in placed) >= unit[0])
    x_words = f"parameters that are not zero{f', {word}s' if word else ''}"
    points, changes = [], []
    for member, size in placed:
        figure, x = member.figures[text], size / unit
        low, high = figure.interval or (None, None)
        points.append(Point(member.label, member.mark, x, figure.value, low, high))
        if figure.change is not None:
            low, high = figure.change.interval or (None, None)
            changes.append(Point(member.label, member.mark, x, figure.change.value, low, high))
        elif member.checkpoint.source is None:
            changes.append(Point(member.label, member.mark, x, 0.0))
    told = "; ".join(f"{point.label} {point.y:.4f}" for point in points)
    yield Drawing(
        "Bits per byte",
        figures.scatter(points, x_words, "bits per byte (lower is better)", f"Bits per byte by size: {told}."),
        "Bars are 95 % intervals over documents. They hold how much documents differ, which all models share.",
    )
    if len(changes) > 1 and any(point.low is not None for point in changes):
        told = "; ".join(f"{point.label} {point.y:+.4f}" for point in changes)
        chart = figures.scatter(changes, x_words, "bits per byte, change", f"Change by size: {told}.", zero=True)
        what = "Document by document, so that what they share falls out: bars are paired 95 % intervals. "
        what += "Points of one size stand side by side."
        yield Drawing("Change against dense", chart, what)


def accuracies(members: Sequence[Member]) -> Iterable[Drawing]:
    """Right answers in memory probes and tasks, every model beside the others, and chance."""
    every = list(dict.fromkeys(measure for member in members for measure in member.figures))
    place = "eval" if any(measure.key[0] == "eval" for measure in every) else "look"
    memory = [measure for measure in every if measure.group == "memory" and measure.key[0] == place]
    tasks = [measure for measure in every if measure.group == "tasks"]
    for title, measures in (("Memory probes", memory), ("Tasks", tasks)):
        groups: dict[str, list[Share]] = {}
        chances: dict[str, float | None] = {}
        for measure in measures:
            alone = sum(measure.name == other.name for other in measures) == 1
            name = measure.name if alone else f"{measure.name}, {measure.about}"
            for member in members:
                figure = member.figures.get(measure)
                if figure is not None and figure.unit == "share" and figure.interval:
                    row = Share(member.label, member.mark, figure.value, *figure.interval)
                    groups.setdefault(name, []).append(row)
                    chances[name] = figure.chance
        if groups:
            rows = ((name, row) for name, shares in groups.items() for row in shares)
            told = "; ".join(f"{name}, {row.label} {row.value:.1%}" for name, row in rows)
            guess = " The dashed line is chance." if any(each is not None for each in chances.values()) else ""
            chart = figures.shares(groups, chances, f"{title}: {told}.")
            yield Drawing(title, chart, f"Bars are 95 % intervals of each model by itself.{guess}")


def layers(members: Sequence[Member]) -> Iterable[Drawing]:
    """The relative error after each layer, where a run measured it."""
    series = [(each.label, each.mark, each.checkpoint.made.errors) for each in members if each.checkpoint.made]
    measured = [one for one in series if one[2]]
    if measured:
        worst = {name: max(errors, key=lambda layer: errors[layer]) for name, _, errors in measured}
        told = "; ".join(f"{name}: most after layer {layer}" for name, layer in worst.items())
        silent = [name for name, _, errors in series if not errors]
        said = (
            "How far the residual stream moves from what the dense layer makes of the same input, over the first window"
        )
        said += " of the calibration text."
        said += f" Not measured for {', '.join(silent)}." if silent else ""
        chart = figures.lines(measured, f"Relative error by layer. {told}.")
        yield Drawing("Error by layer", chart, said)


def grids(members: Sequence[Member]) -> Iterable[Drawing]:
    """The kept share by module and layer, once for all members in which it is the same."""
    same: dict[str, list[Member]] = {}
    kept = {member.label: _kept(member) for member in members}
    for member in members:
        if kept[member.label]:
            same.setdefault(json.dumps(kept[member.label]), []).append(member)
    for group in same.values():
        cells, names = kept[group[0].label], ", ".join(member.label for member in group)
        told = "; ".join(f"{name} {_range(row.values())}" for name, row in cells.items())
        chart = figures.grid(cells, f"Share of entries kept by {names}: {told}.")
        done = ", ".join(dict.fromkeys(member.done for member in group))
        yield Drawing("Entries kept", chart, f"{names} ({done}).")


def learning(members: Sequence[Member]) -> Iterable[Drawing]:
    """How the loss went while each adapter was learned."""
    for member in members:
        for each in member.checkpoint.learned:
            loss, validation = each.course.loss, each.course.validation
            series: list[tuple[str, int | None, Sequence[tuple[int, float]]]] = [
                ("validation", member.mark, validation)
            ]
            said = f"{each.method} on {member.label}: {each.trainable:,} parameters. "
            if each.distilled and loss:
                said += (
                    f"Its divergence from the teacher went from {loss[0][1]:.4f} to {loss[-1][1]:.4f} nats a token. "
                )
            elif loss:
                series.insert(0, ("training", None, loss))
                said += "The line without marks is the loss of training. "
            first, best = validation[0][1], min(value for _, value in validation)
            said += f"Validation went from {first:.4f} to {best:.4f}; the state of update {each.best} was kept."
            told = f"{each.label}: validation from {first:.4f} to {best:.4f}."
            chart = figures.curves(series, "update", "nats a token", told)
            yield Drawing(f"Learning {each.label}", chart, said)


def passages(members: Sequence[Member]) -> Iterable[Drawing]:
    """How far the tokens of a real text go, for each member that lets some leave."""
    for member in members:
        looks = member.checkpoint.made and member.checkpoint.made.looks
        read = looks.after.passage if looks else None
        if read is None:
            continue
        through = sum(blocks == read.depth for blocks in read.seen)
        told = f"{through} of {len(read.seen)} tokens go through all {read.depth} blocks"
        chart = figures.depths(read.tokens, read.seen, read.depth, member.mark, f"{member.label}: {told}.")
        said = f"{member.label} ({member.done}): {told}. Below, paler words leave earlier; from Wikipedia’s page"
        yield Drawing("Tokens kept over depth", chart, f"{said} “Robert Boulter” (CC BY-SA).", _faded(read))


def _faded(read: Passage) -> tuple[tuple[str, float], ...]:
    """The text in pieces that go equally far."""
    pieces = groupby(zip(read.seen, read.tokens, strict=True), key=itemgetter(0))
    return tuple(
        ("".join(token for _, token in run), PALEST + (1 - PALEST) * blocks / read.depth) for blocks, run in pieces
    )


def _kept(member: Member) -> dict[str, dict[int, float]]:
    """The share of entries that pruning left, by module and layer."""
    found: dict[str, dict[int, float]] = {}
    made = member.checkpoint.made
    for tensor in made.manifest.tensors if made else ():
        parts = tensor.name.split(".")
        layer = next((int(part) for part in parts if part.isdecimal()), None)
        if tensor.status == "pruned" and layer is not None:
            found.setdefault(parts[-2], {})[layer] = tensor.kept
    return found


def _range(values: Iterable[float]) -> str:
    low, high = min(kept := list(values)), max(kept)
    return f"{low:.1%}" if f"{low:.1%}" == f"{high:.1%}" else f"{low:.1%} to {high:.1%}"
