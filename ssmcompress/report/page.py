"""The verb `report`: one page that needs no network, made of the folders that runs and evaluations wrote."""

import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

import ssmcompress
from ssmcompress.checkpoint import manifest
from ssmcompress.checkpoint.card import MASKS
from ssmcompress.errors import InputError, ResourceError
from ssmcompress.events import Advance, Emit, Finished, Phase, ignore
from ssmcompress.paths import expanded
from ssmcompress.report import drawings, figures, tables, words
from ssmcompress.report.checkpoints import Checkpoint, read
from ssmcompress.report.measures import Measure
from ssmcompress.report.measures import figures as figures_of
from ssmcompress.report.tables import Member, Table

GENERATOR = '<meta name="generator" content="ssmcompress'


@dataclass(frozen=True)
class Story:
    """What was done to one checkpoint: sentences, and the recipe."""

    label: str
    mark: str
    sentences: tuple[str, ...]
    yaml: str


@dataclass(frozen=True)
class Family:
    """A dense model and what was made from it."""

    name: str
    legend: tuple[tuple[str, str, str], ...]
    text: str
    glance: Table
    quality: tuple[drawings.Drawing, ...]
    measures: Table | None
    accuracies: tuple[drawings.Drawing, ...]
    speed: Table | None
    layers: tuple[drawings.Drawing, ...]
    passages: tuple[drawings.Drawing, ...]
    learning: tuple[drawings.Drawing, ...]
    coverage: Table | None
    stories: tuple[Story, ...]
    environment: Table
    hashes: Table
    masked: bool


def report(*folders: str | Path, out: str | Path = "report.html", overwrite: bool = False, emit: Emit = ignore) -> Path:
    """Writes an HTML page of model folders and evaluation folders, given in any order.

    Raises InputError for a folder of neither kind, one that is damaged, or an `out` that exists, ResourceError where it
    cannot be written.
    """
    if not folders:
        raise InputError(
            "There is nothing to report on.",
            hint="Give folders that `prune`, `run`, `tune-state` or `eval --out` wrote.",
        )
    target = _permitted(expanded(out), overwrite)
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
        style=_resource("page.css") + _resource("figures.css"),
        families=families,
        masks=MASKS,
        version=ssmcompress.__version__,
    )


def _members(checkpoints: Sequence[Checkpoint], emit: Emit) -> Iterable[Member]:
    marks: dict[frozenset[str], int] = {}
    for each in checkpoints:
        number = marks.get(each.family, 0 if each.dense else 1)
        marks[each.family] = number + 1
        yield Member(each, number, figures_of(each))
        emit(Advance())


def _families(members: Sequence[Member]) -> list[list[Member]]:
    groups: dict[frozenset[str], list[Member]] = {}
    for member in members:
        groups.setdefault(member.checkpoint.family, []).append(member)
    return list(groups.values())


def _family(members: Sequence[Member]) -> Family:
    text = _common(members, "likelihood")
    return Family(
        name=members[0].label,
        legend=tuple((figures.mark(each.mark), each.label, each.done) for each in members),
        text=text.about if text else "",
        glance=tables.glance(members, text, _hardest(members)),
        quality=tuple(drawings.quality(members, text)) if text else (),
        measures=tables.measures(members),
        accuracies=tuple(drawings.accuracies(members)),
        speed=tables.speed(members),
        layers=(*drawings.layers(members), *drawings.grids(members)),
        passages=tuple(drawings.passages(members)),
        learning=tuple(drawings.learning(members)),
        coverage=tables.covered(members),
        stories=tuple(_story(each) for each in members if each.checkpoint.made),
        environment=tables.environment(members),
        hashes=tables.hashes(members),
        masked=any(each.checkpoint.made and each.checkpoint.made.manifest.sparsity for each in members),
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


def _story(member: Member) -> Story:
    made = member.checkpoint.made
    assert made is not None
    yaml = made.recipe.to_yaml() if made.recipe else ""
    return Story(member.label, figures.mark(member.mark), tuple(words.sentences(made)), yaml)


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
    """Writes the page under another name, and gives it its own when it is whole; ResourceError where it cannot be."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
            partial = Path(work) / target.name
            with partial.open("w", encoding="utf-8", newline="\n") as file:
                file.write(page)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{target.parent} is no folder.", hint="Choose another --out.") from None
    except OSError as error:
        raise ResourceError(f"{target} cannot be written: {error.strerror}.", hint="Choose another --out.") from error
