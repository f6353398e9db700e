"""Every figure that folders hold of a checkpoint, with its interval, and its change against the dense model."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ssmcompress.errors import InputError
from ssmcompress.evaluate.compare import Difference, Samples, differences
from ssmcompress.evaluate.comparison import Verdict, aligned, verdict
from ssmcompress.evaluate.results import TEXT, Results, TaskScore
from ssmcompress.measure.glance import ON
from ssmcompress.measure.interval import accuracy_interval
from ssmcompress.measure.perplexity import DocumentScore, paired_difference
from ssmcompress.report.checkpoints import Checkpoint, Evaluation, Look, Probe

Unit = Literal["bits", "share", "own", "plain"]
PROBES = {"copy": "copying {} words", "key-value": "{} key-value pairs"}


@dataclass(frozen=True)
class Change:
    """Against the dense model on the same items: in bits, points (share), its own unit, or relative (plain), with 95 %
    interval."""

    value: float
    interval: tuple[float, float] | None
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Figure:
    """A number of one measure: 95 % interval, or only a standard error where no interval can be told from it."""

    value: float
    unit: Unit
    interval: tuple[float, float] | None = None
    standard_error: float | None = None
    chance: float | None = None
    measurable: bool = True
    change: Change | None = None


@dataclass(frozen=True)
class Measure:
    """What was measured: its group, what tells it from all others, and its name and settings for people."""

    group: Literal["likelihood", "memory", "tasks"]
    key: tuple[Any, ...]
    name: str = field(compare=False)
    about: str = field(default="", compare=False)


Figures = Mapping[Measure, Figure]


def figures(each: Checkpoint) -> dict[Measure, Figure]:
    """All figures of a checkpoint, those of its evaluations first; its change is told in what it was made from."""
    own, dense = _likelihoods(each), {} if each.source is None else _likelihoods(each.source)
    tested = {} if each.source is None else _tested(each.source, each)
    found: dict[Measure, Figure] = {}
    for measure, (figure, documents) in own.items():
        if measure in dense and documents and dense[measure][1]:
            value, *interval = paired_difference(dense[measure][1], documents)
            said = tested.get(TEXT) if measure.key[0] == "text" else None
            held = (interval[0], interval[1]) if len(documents) > 1 else None
            change = Change(value, held, verdict(said) if said else None)
            figure = replace(figure, change=change)
        found[measure] = figure
    for evaluation in each.evaluations:
        for probe in evaluation.memory:
            measure, figure = _probe(probe, "eval")
            found.setdefault(measure, _changed(figure, tested.get(f"recall/{probe.probe}-{probe.load}")))
        for score in evaluation.summary.tasks:
            measure, figure = _task(score)
            found.setdefault(measure, _changed(figure, tested.get(score.measure)))
    for look in each.looks:
        for probe in look.recall:
            found.setdefault(*_probe(probe, "look"))
    return found


def _likelihoods(each: Checkpoint) -> dict[Measure, tuple[Figure, list[DocumentScore]]]:
    found: dict[Measure, tuple[Figure, list[DocumentScore]]] = {}
    for evaluation in each.evaluations:
        summary = evaluation.summary
        if summary.bits_per_byte is not None:
            documents = _documents(evaluation.results)
            held = summary.bits_per_byte_interval if len(documents) != 1 else None
            figure = Figure(summary.bits_per_byte, "bits", held)
            key = ("text", summary.text_sha256, summary.length)
            about = _text_words(evaluation, len(documents))
            found.setdefault(Measure("likelihood", key, "bits per byte", about), (figure, documents))
    for look in each.looks:
        found.setdefault(_look_measure(look), (_look_figure(look), list(look.documents)))
    return found


def _look_measure(look: Look) -> Measure:
    return Measure("likelihood", ("look", look.identity, look.length), "bits per byte, quick look", ON)


def _look_figure(look: Look) -> Figure:
    return Figure(look.bits_per_byte, "bits", look.bits_per_byte_interval)


def _documents(results: Results) -> list[DocumentScore]:
    samples = results.samples.get(TEXT)
    if samples is None:
        return []
    rows = zip(samples.items, samples.values, samples.weights, strict=True)
    return [DocumentScore(float(bits) * math.log(2), 0, int(size), item) for item, bits, size in rows]


def _text_words(evaluation: Evaluation, documents: int) -> str:
    summary = evaluation.summary
    text = "the shipped Wikipedia pages (test split of WikiText-2)" if summary.text == "default" else summary.text
    count = f"{documents} document{'s' * (documents > 1)} of " if documents else ""
    read = f", of which the first {summary.context} are read and not scored" if summary.context else ""
    return f"{count}{text}, every byte, in windows of {summary.length} tokens{read}"


def _probe(probe: Probe, where: str) -> tuple[Measure, Figure]:
    name = PROBES.get(probe.probe, probe.probe + ", load {}").format(probe.load)
    words = name if where == "eval" else f"{name}, quick look"
    held = accuracy_interval(probe.accuracy, probe.standard_error, probe.items)
    figure = Figure(probe.accuracy, "share", held, chance=probe.chance, measurable=probe.measurable)
    key = (where, probe.probe, probe.load, probe.items_sha256)
    return Measure("memory", key, words, f"{probe.items} items"), figure


def _task(score: TaskScore) -> tuple[Measure, Figure]:
    figure = Figure(
        score.value,
        "share" if score.share else "plain",
        score.interval,
        None if score.interval else score.standard_error,
        score.chance,
        score.measurable,
    )
    filtered = "" if score.filter == "none" else f", {score.filter}"
    shots = f"{score.num_fewshot} examples in the prompt, " if score.num_fewshot else ""
    better = "" if score.higher_is_better else ", lower is better"
    key = (score.task, score.metric, score.filter, score.version, score.num_fewshot, score.samples_sha256)
    about = f"{shots}{score.samples:,} items{better}"
    return Measure("tasks", key, f"{score.task} {score.metric}{filtered}", about), figure


def _changed(figure: Figure, found: Difference | None) -> Figure:
    if found is None:
        return figure
    unit = "own" if figure.unit == "plain" and found.kind != "log_likelihood" else figure.unit
    return replace(figure, unit=unit, change=Change(found.change, found.interval, verdict(found)))


def _tested(dense: Checkpoint, each: Checkpoint) -> dict[str, Difference]:
    """The paired differences of all measures that both were scored on, item by item, as `compare` tells them."""
    pairs: list[tuple[Samples, Samples]] = []
    for name in dict.fromkeys(name for found in each.evaluations for name in found.results.samples):
        for one, other in _both(dense.evaluations, each.evaluations, name):
            try:
                (a,), (b,) = aligned(one, other)
            except InputError:  # other items or settings: nothing to pair
                continue
            pairs.append((a, b))
            break
    found = differences([a for a, _ in pairs], [b for _, b in pairs]) if pairs else []
    return {each.measure: each for each in found}


def _both(dense: Sequence[Evaluation], own: Sequence[Evaluation], name: str) -> Iterable[tuple[Results, Results]]:
    for other in own:
        for one in dense:
            if name in one.results.samples and name in other.results.samples:
                yield _only(one.results, name), _only(other.results, name)


def _only(results: Results, name: str) -> Results:
    return Results(Path(results.folder), results.summary, {name: results.samples[name]})
