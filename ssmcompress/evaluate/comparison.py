"""The verb `compare`: is what was lost real, and is it more than was allowed?"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from ssmcompress.checkpoint.output import COMPARISON as NAME
from ssmcompress.checkpoint.output import output
from ssmcompress.errors import GateError, InputError
from ssmcompress.evaluate import bounds as allowed
from ssmcompress.evaluate.compare import LEVEL, RESAMPLES, Difference, Interval, Kind, Samples, differences
from ssmcompress.evaluate.evaluation import require_seed
from ssmcompress.evaluate.results import Results, read
from ssmcompress.events import Emit, Finished, Note, Table, ignore, number

LOST = "Compress less, or allow more with --max-drop."
UNCLEAR = "Evaluate on more items, or on tasks that the reference can do."
DAMAGED = "The model is damaged, or overflows in that dtype: evaluate it with --dtype float32."
TASK_SETTINGS = {
    "version": "the task's version",
    "num_fewshot": "the number of examples in the prompt",
    "limit": "--limit",
}
Verdict = Literal["worse", "better", "no difference shown", "not measurable"]
Gate = Literal["passes", "fails", "undecided", "not measurable"]


class Row(BaseModel):
    """A measure of B against A (`compare.Difference`), the loss that was allowed, and what the gate says of it.

    It fails where the difference is significant (Holm-adjusted p ≤ 5 %, and the adjusted interval excludes zero) and
    the loss as measured exceeds the bound. Else it is undecided where the adjusted interval reaches beyond the bound,
    so that such a loss is not excluded, and passes where it does not. What A cannot do is not measurable.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    measure: str
    kind: Kind
    items: int
    a: float
    b: float
    change: float
    interval: Interval | None
    adjusted: Interval | None
    test: Literal["mcnemar", "bootstrap"]
    p: float | None
    p_holm: float | None
    measurable: bool
    verdict: Verdict
    bound: float | None
    gate: Gate | None

    @classmethod
    def of(cls, found: Difference, bound: float | None) -> "Row":
        """The row of a difference under a bound, if there is one."""
        said = None if bound is None else gate(found, bound)
        return cls(**asdict(found), verdict=verdict(found), bound=bound, gate=said)


class Candidate(BaseModel):
    """A model that was compared with the reference."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str
    model_sha256: dict[str, str]
    measures: tuple[Row, ...]


class Comparison(BaseModel):
    """comparison.json: every candidate against the reference; `failures` say why the gate failed, if there is one.

    `resamples` is the number of them on more than a hundred items; up to that ten times as many are drawn.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    reference: str
    reference_sha256: dict[str, str]
    candidates: tuple[Candidate, ...]
    level: float = LEVEL
    resamples: int = RESAMPLES
    seed: int
    max_drop: dict[str, float]
    strict: bool
    passed: bool | None
    failures: tuple[str, ...] = ()


def compare(
    *results: str | Path,
    max_drop: Sequence[str | float] = (),
    strict: bool = False,
    out: str | Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    emit: Emit = ignore,
) -> Comparison:
    """Compares evaluations with the first of them, item by item; with `max_drop` it is a gate.

    A bound is `0.01` for every measure, or `task=0.01` or `task/metric=0.01`: points of an accuracy, or the share by
    which a perplexity or bits per byte may rise. `strict` fails on what is undecided too.
    Raises InputError where the evaluations are not of the same items, GateError once all is told and written.
    """
    require_seed(seed)
    bounds = allowed.read(max_drop)
    if len(results) < 2:
        raise InputError("There is nothing to compare with.", hint="Give two or more folders of `eval --out`.")
    if strict and not bounds:
        raise InputError("--strict has nothing to be strict about.", hint="Say what may be lost: --max-drop 0.01.")
    _require_apart(results, out)
    reference, *others = found = [read(folder) for folder in results]
    pairs = [aligned(reference, other) for other in others]
    allowed.require_known(bounds, list(reference.samples))
    names = labels(found)
    candidates = tuple(
        Candidate(
            label=label,
            model_sha256=other.summary.model_sha256,
            measures=tuple(
                Row.of(each, allowed.nearest(bounds, each.measure)) for each in differences(*pair, seed=seed)
            ),
        )
        for label, other, pair in zip(names[1:], others, pairs, strict=True)
    )
    failures = [line for candidate in candidates for line in _failures(candidate, bounds, strict)]
    comparison = Comparison(
        reference=names[0],
        reference_sha256=reference.summary.model_sha256,
        candidates=candidates,
        seed=seed,
        max_drop=bounds,
        strict=strict,
        passed=not failures if bounds else None,
        failures=tuple(failures),
    )
    _warn(names, found, emit)
    _tell(comparison, emit)
    if out is not None:
        with output(out, marked=NAME, overwrite=overwrite) as folder:
            (folder / NAME).write_text(comparison.model_dump_json(indent=2) + "\n", encoding="utf-8")
        emit(Finished(str(out)))
    if failures:
        lost = any(row.gate == "fails" for candidate in candidates for row in candidate.measures)
        raise GateError(" ".join(failures), hint=LOST if lost else UNCLEAR)
    return comparison


def verdict(found: Difference) -> Verdict:
    """What a difference shows, whatever was allowed."""
    if not found.measurable:
        return "not measurable"
    if not found.significant:
        return "no difference shown"
    return "worse" if found.loss > 0 else "better"


def gate(found: Difference, bound: float) -> Gate:
    """What the gate says of a difference, where a loss of `bound` is allowed (see Row)."""
    if not found.measurable:
        return "not measurable"
    if found.significant and found.loss > bound:
        return "fails"
    return "undecided" if found.worst > bound else "passes"


def aligned(a: Results, b: Results) -> tuple[list[Samples], list[Samples]]:
    """The samples of both, measure by measure, item beside item; InputError where they are not of the same items."""
    where = f"{a.folder} and {b.folder}"
    if not a.samples or not b.samples:
        raise InputError(f"{(b if a.samples else a).folder} holds no scored items.", hint="Evaluate the model again.")
    for name in sorted(a.samples.keys() ^ b.samples.keys()):
        has, lacks = (a, b) if name in a.samples else (b, a)
        raise InputError(
            f"{name} was measured in {has.folder} and not in {lacks.folder}.", hint="Evaluate both on the same tasks."
        )
    for name in a.samples:
        for side in (a, b):
            if not np.isfinite(side.samples[name].values).all():
                raise InputError(f"{name}: {side.folder} holds scores that are NaN or infinite.", hint=DAMAGED)
        for what, one, other in _settings(name, a, b):
            if one != other:
                raise InputError(
                    f"{name}: {where} differ in {what}: {one} and {other}.", hint="Evaluate both in the same way."
                )
    pairs = [_paired(a.samples[name], b.samples[name], where) for name in a.samples]
    return [one for one, _ in pairs], [other for _, other in pairs]


def labels(found: Sequence[Results]) -> list[str]:
    """What each is called in tables: its label where that tells them apart, else its folder."""
    names = [each.summary.label or each.summary.model for each in found]
    return names if len(set(names)) == len(names) else [str(each.folder) for each in found]


def _settings(name: str, a: Results, b: Results) -> list[tuple[str, object, object]]:
    """What must be equal for a measure to be the same: a name, and its value in both."""
    one, other = a.samples[name], b.samples[name]
    found: list[tuple[str, object, object]] = [("kind", one.kind, other.kind)]
    task = name.partition("/")[0]
    if task == "text":
        found.append(("the length of windows", a.summary.length, b.summary.length))
        found.append(("--context", a.summary.context, b.summary.context))
    for field, words in TASK_SETTINGS.items():
        found.append((words, _setting(a, task, field), _setting(b, task, field)))
    return [*found, ("the number of items", len(one.items), len(other.items))]


def _setting(results: Results, task: str, field: str) -> object:
    return next((getattr(score, field) for score in results.summary.tasks if score.task == task), None)


def _paired(a: Samples, b: Samples, where: str) -> tuple[Samples, Samples]:
    a, b = (each if a.items == b.items else _sorted(each) for each in (a, b))
    if a.items != b.items:
        differing = (Counter(a.items) - Counter(b.items)).total()
        raise InputError(
            f"{a.measure}: {where} were not measured on the same prompts: {differing} of {len(a.items)} items differ.",
            hint="Evaluate both on the same data, with the same --limit and number of examples.",
        )
    if not np.array_equal(a.weights, b.weights):
        raise InputError(
            f"{a.measure}: {where} weigh the same items differently.", hint="Evaluate both in the same way."
        )
    return a, b


def _sorted(samples: Samples) -> Samples:
    order = sorted(range(len(samples.items)), key=samples.items.__getitem__)
    items = tuple(samples.items[i] for i in order)
    values, weights = samples.values[order], samples.weights[order]
    return replace(samples, items=items, values=values, weights=weights)


def _require_apart(results: Sequence[str | Path], out: str | Path | None) -> None:
    """InputError where the output would take the place of what is compared."""
    for folder in results if out is not None else ():
        if Path(folder).expanduser().resolve().is_relative_to(Path(str(out)).expanduser().resolve()):
            raise InputError(f"{out} holds the results that are compared.", hint="Choose another --out.")


def _failures(candidate: Candidate, bounds: dict[str, float], strict: bool) -> list[str]:
    """A sentence for each reason why the gate fails."""
    if not bounds:
        return []
    gated = [row for row in candidate.measures if row.gate is not None]
    if not any(row.measurable for row in gated):
        return [f"{candidate.label}: nothing that has a bound is measurable: the reference is at chance."]
    found = [
        f"{candidate.label}: {row.measure} {'lost' if row.gate == 'fails' else 'may have lost'} more than allowed:"
        f" {_change(row)}, bound {_allowed(row)}."
        for row in gated
        if row.gate == "fails" or (strict and row.gate == "undecided")
    ]
    for key in bounds:
        named = [row for row in gated if key in (row.measure, row.measure.partition("/")[0])]
        if named and not any(row.measurable for row in named):
            found.append(f"{candidate.label}: {key} is not measurable: the reference is at chance.")
    return found


def _warn(names: Sequence[str], found: Sequence[Results], emit: Emit) -> None:
    """Says what cannot be compared, and what was computed in another way than the reference was."""
    first, reference = names[0], found[0].summary
    if lone := [score.measure for score in reference.tasks if score.measure not in found[0].samples]:
        told = f"{', '.join(lone)}: lm-eval tells a figure that is no mean of items, so it is not compared."
        emit(Note(told, "warning"))
    for name, summary in zip(names[1:], (each.summary for each in found[1:]), strict=True):
        rest = "part of a difference may come from that."
        if summary.dtype != reference.dtype:
            told = f"{name} was evaluated in {summary.dtype}, {first} in {reference.dtype}: {rest}"
            emit(Note(told, "warning"))
        if summary.backend != reference.backend:
            emit(Note(f"{name} was evaluated with other kernels than {first}: {rest}", "warning"))


def _tell(found: Comparison, emit: Emit) -> None:
    gated = bool(found.max_drop)
    for candidate in found.candidates:
        columns = ("measure", "items", found.reference, candidate.label, "difference [interval]", "p (Holm)", "verdict")
        rows = tuple(_cells(row) + ((_allowed(row), row.gate or "") if gated else ()) for row in candidate.measures)
        title = f"{candidate.label} against {found.reference}"
        emit(Table(title, columns + (("allowed", "gate") if gated else ()), rows))
    emit(
        Note(
            "Accuracies and other scores differ in points, perplexities and bits per byte in percent. Intervals are"
            " paired over items: 95 %, and wider as Holm's correction asks."
        )
    )


def _cells(row: Row) -> tuple[str, ...]:
    p = "" if row.p_holm is None else f"{row.p_holm:.2g}"
    return row.measure, str(row.items), number(row.a), number(row.b), _change(row), p, row.verdict


def _change(row: Row) -> str:
    """A change with its interval: points of an accuracy or another score, else percent."""
    percent = row.kind == "log_likelihood"

    def say(change: float) -> str:
        return f"{100 * change:+.2f}" if percent else f"{change:+.4f}"

    held = row.interval if row.p_holm is None else row.adjusted
    told = say(row.change) + (" %" if percent else "")
    return told if held is None else f"{told} [{say(held[0])}, {say(held[1])}]"


def _allowed(row: Row) -> str:
    if row.bound is None:
        return ""
    return f"{100 * row.bound:g} %" if row.kind == "log_likelihood" else f"{row.bound:g}"
