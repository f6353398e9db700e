"""The verb `report`: one page that needs no network, made of the folders that runs and evaluations wrote."""

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import ssmcompress
from ssmcompress.checkpoint import manifest
from ssmcompress.checkpoint.card import MASKS
from ssmcompress.errors import InputError
from ssmcompress.events import Advance, Emit, Finished, Phase, ignore
from ssmcompress.report import figures, tables, words
from ssmcompress.report.checkpoints import Checkpoint, read
from ssmcompress.report.figures import Point, Share
from ssmcompress.report.measures import Measure
from ssmcompress.report.measures import figures as figures_of
from ssmcompress.report.tables import Member, Table

GENERATOR = '<meta name="generator" content="ssmcompress'


@dataclass(frozen=True)
class Drawing:
    """A chart with its title and what is to be said of it."""

    title: str
    svg: Markup
    words: str


@dataclass(frozen=True)
class Story:
    """What was done to one checkpoint: sentences, and the recipe."""

    label: str
    mark: Markup
    sentences: tuple[str, ...]
    yaml: str


@dataclass(frozen=True)
class Family:
    """A dense model and what was made from it."""

    name: str
    legend: tuple[tuple[Markup, str, str], ...]
    text: str
    glance: Table
    drawings: tuple[Drawing, ...]
    measures: Table | None
    accuracies: tuple[Drawing, ...]
    speed: Table | None
    layers: tuple[Drawing, ...]
    coverage: Table | None
    stories: tuple[Story, ...]
    environment: Table
    hashes: Table
    masked: bool


def report(*folders: str | Path, out: str | Path = "report.html", overwrite: bool = False, emit: Emit = ignore) -> Path:
    """Writes an HTML page of model folders and evaluation folders, given in any order.

    Raises InputError for a folder of neither kind, one that is damaged, or an `out` that exists.
    """
    if not folders:
        raise InputError(
            "There is nothing to report on.", hint="Give folders that `prune`, `run` or `eval --out` wrote."
        )
    target = _permitted(Path(out).expanduser(), overwrite)
    page = render(read(folders), emit)
    _write(target, page)
    emit(Finished(str(out)))
    return target


def render(checkpoints: Sequence[Checkpoint], emit: Emit = ignore) -> str:
    """The page as HTML: the same checkpoints, the same text."""
    emit(Phase("pairing with dense", len(checkpoints)))
    members = list(_members(checkpoints, emit))
    families = [_family(group) for group in _families(members)]
    environment = Environment(
        loader=PackageLoader("ssmcompress.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html").render(
        title="Compression report",
        names=[family.name for family in families],
        style=Markup(_resource("page.css") + _resource("figures.css")),
        families=families,
        masks=MASKS,
        version=ssmcompress.__version__,
    )


def _members(checkpoints: Sequence[Checkpoint], emit: Emit) -> Iterable[Member]:
    marks: dict[frozenset[str], int] = {}
    for each in checkpoints:
        number = marks.get(each.family, 0 if _dense(each) else 1)
        marks[each.family] = number + 1
        yield Member(each, number, figures_of(each))
        emit(Advance())


def _dense(each: Checkpoint) -> bool:
    return each.made is None and not any(found.summary.source for found in each.evaluations)


def _families(members: Sequence[Member]) -> list[list[Member]]:
    groups: dict[frozenset[str], list[Member]] = {}
    for member in members:
        groups.setdefault(member.checkpoint.family, []).append(member)
    return list(groups.values())


def _family(members: Sequence[Member]) -> Family:
    text = _common(members, "likelihood")
    return Family(
        name=members[0].label,
        legend=tuple((Markup(figures.mark(each.mark)), each.label, each.done) for each in members),
        text=text.about if text else "",
        glance=tables.glance(members, text, _hardest(members)),
        drawings=tuple(_quality(members, text)) if text else (),
        measures=tables.measures(members),
        accuracies=tuple(_accuracies(members)),
        speed=tables.speed(members),
        layers=(*_layers(members), *_grids(members)),
        coverage=tables.covered(members),
        stories=tuple(_story(each) for each in members if each.checkpoint.made),
        environment=tables.environment(members),
        hashes=tables.hashes(members),
        masked=any(each.checkpoint.nonzero is not None for each in members),
    )


def _common(members: Sequence[Member], group: str) -> Measure | None:
    """The measure of a group that most members have; evaluations come before quick looks."""
    every = dict.fromkeys(measure for member in members for measure in member.figures if measure.group == group)
    held = {measure: sum(measure in member.figures for member in members) for measure in every}
    return max(held, key=lambda measure: (held[measure], measure.key[0] == "text"), default=None)


def _hardest(members: Sequence[Member]) -> list[Measure]:
    """Of each probe, its heaviest load; evaluations before quick looks."""
    every = dict.fromkeys(measure for member in members for measure in member.figures if measure.group == "memory")
    where = {measure.key[0] for measure in every}
    found: dict[str, Measure] = {}
    for measure in every:
        place, probe, load, _ = measure.key
        if place == ("eval" if "eval" in where else "look") and (probe not in found or load > found[probe].key[2]):
            found[probe] = measure
    return list(found.values())


def _quality(members: Sequence[Member], text: Measure) -> Iterable[Drawing]:
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
        Markup(figures.scatter(points, x_words, "bits per byte (lower is better)", f"Bits per byte by size: {told}.")),
        "Bars are 95 % intervals over documents. They hold how much documents differ, which all models share.",
    )
    if len(changes) > 1 and any(point.low is not None for point in changes):
        told = "; ".join(f"{point.label} {point.y:+.4f}" for point in changes)
        chart = figures.scatter(changes, x_words, "bits per byte, change", f"Change by size: {told}.", zero=True)
        what = "Document by document, so that what they share falls out: bars are paired 95 % intervals."
        yield Drawing("Change against dense", Markup(chart), what)


def _accuracies(members: Sequence[Member]) -> Iterable[Drawing]:
    for group, title in (("memory", "Memory probes"), ("tasks", "Tasks")):
        groups: dict[str, list[Share]] = {}
        chances: dict[str, float | None] = {}
        for measure in dict.fromkeys(measure for member in members for measure in member.figures):
            if measure.group != group or (group == "memory" and measure.key[0] != _place(members)):
                continue
            for member in members:
                figure = member.figures.get(measure)
                if figure is not None and figure.unit == "share" and figure.interval:
                    row = Share(member.label, member.mark, figure.value, *figure.interval)
                    groups.setdefault(measure.name, []).append(row)
                    chances[measure.name] = figure.chance
        if groups:
            rows = ((name, row) for name, shares in groups.items() for row in shares)
            told = "; ".join(f"{name}, {row.label} {row.value:.1%}" for name, row in rows)
            guess = " The dashed line is chance." if any(each is not None for each in chances.values()) else ""
            chart = Markup(figures.shares(groups, chances, f"{title}: {told}."))
            yield Drawing(title, chart, f"Bars are 95 % intervals of each model by itself.{guess}")


def _place(members: Sequence[Member]) -> str:
    places = {measure.key[0] for member in members for measure in member.figures if measure.group == "memory"}
    return "eval" if "eval" in places else "look"


def _layers(members: Sequence[Member]) -> Iterable[Drawing]:
    series = [(each.label, each.mark, each.checkpoint.made.errors) for each in members if each.checkpoint.made]
    measured = [one for one in series if one[2]]
    if measured:
        worst = {name: max(errors, key=lambda layer: errors[layer]) for name, _, errors in measured}
        told = "; ".join(f"{name}: most after layer {layer}" for name, layer in worst.items())
        silent = [name for name, _, errors in series if not errors]
        said = "How far the residual stream moves from what the dense layer makes of the same input."
        said += f" Not measured without calibration: {', '.join(silent)}." if silent else ""
        chart = Markup(figures.lines(measured, f"Relative error by layer. {told}."))
        yield Drawing("Error by layer", chart, said)


def _grids(members: Sequence[Member]) -> Iterable[Drawing]:
    """The kept share by module and layer, once for all members in which it is the same."""
    same: dict[str, list[Member]] = {}
    kept = {member.label: _kept(member) for member in members}
    for member in members:
        if kept[member.label]:
            same.setdefault(json.dumps(kept[member.label]), []).append(member)
    for group in same.values():
        cells, names = kept[group[0].label], ", ".join(member.label for member in group)
        told = "; ".join(f"{name} {_range(row.values())}" for name, row in cells.items())
        chart = Markup(figures.grid(cells, f"Share of entries kept by {names}: {told}."))
        done = ", ".join(dict.fromkeys(member.done for member in group))
        yield Drawing("Entries kept", chart, f"{names} ({done}).")


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


def _story(member: Member) -> Story:
    made = member.checkpoint.made
    assert made is not None
    yaml = made.recipe.to_yaml() if made.recipe else ""
    return Story(member.label, Markup(figures.mark(member.mark)), tuple(words.sentences(made)), yaml)


def _resource(name: str) -> str:
    return files("ssmcompress.report").joinpath(name).read_text(encoding="utf-8")


def _permitted(target: Path, overwrite: bool) -> Path:
    """The path to write; InputError for what is there and may not be replaced."""
    if any((parent / manifest.NAME).exists() for parent in target.resolve().parents):
        raise InputError(
            f"{target} would lie in a model's folder, whose files are all accounted for.", hint="Choose another --out."
        )
    if not target.exists():
        return target
    if target.is_dir():
        raise InputError(f"{target} is a folder.", hint="Name a file: --out report.html.")
    if not overwrite:
        raise InputError(f"{target} exists already.", hint="Choose another --out, or replace it with --overwrite.")
    if GENERATOR.encode() not in target.read_bytes()[:4096]:
        raise InputError(
            f"{target} is no report of ssmcompress, and is not replaced.",
            hint="Choose another --out, or remove it yourself.",
        )
    return target


def _write(target: Path, page: str) -> None:
    """Writes the page under another name, and gives it its own when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
        partial = Path(work) / target.name
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
