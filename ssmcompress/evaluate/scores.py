"""From what lm-eval returns to figures with their errors, and to the items that they are the mean of."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ssmcompress.errors import UnsupportedError
from ssmcompress.evaluate.compare import Kind
from ssmcompress.evaluate.results import Item, TaskScore
from ssmcompress.evaluate.suites import Entry


@dataclass(frozen=True)
class Scored:
    """What a task gave: its figures, and what they are the mean of, item by item."""

    scores: tuple[TaskScore, ...]
    items: tuple[Item, ...]


def scored(found: Any, entry: Entry) -> Scored:
    """The scores of a run of one task or group; UnsupportedError where it has none."""
    scores: list[TaskScore] = []
    items: list[Item] = []
    for task, samples in found["samples"].items():
        for metric, filter_name in _metrics(found["results"][task]):
            rows = [row for row in samples if row["filter"] == filter_name]
            score = _score(found, entry, task, metric, filter_name, rows)
            scores.append(score)
            items += _items(score, rows)
    if not scores:
        raise UnsupportedError(f"The task {entry.task} gives no score.", hint="Choose a task that has a metric.")
    return Scored(tuple(scores), tuple(items))


def _metrics(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The metrics of a task and their filters, as `metric,filter` names them."""
    split = [key.rsplit(",", 1) for key, value in results.items() if "," in key and isinstance(value, int | float)]
    return [(metric, name) for metric, name in split if not metric.endswith("_stderr")]


def _score(found: Any, entry: Entry, task: str, metric: str, filter_name: str, rows: list[Any]) -> TaskScore:
    results = found["results"][task]
    error = results.get(f"{metric}_stderr,{filter_name}")
    error = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
    value = float(results[f"{metric},{filter_name}"])
    chance = _chance(found["configs"][task], metric, rows)
    hashes = "".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in rows)
    return TaskScore(
        task=task,
        metric=metric,
        filter=filter_name,
        value=value,
        standard_error=error,
        higher_is_better=bool(found["higher_is_better"][task].get(metric, True)),
        samples=len(rows),
        samples_sha256=hashlib.sha256(hashes.encode()).hexdigest(),
        version=str(found["versions"].get(task)),
        num_fewshot=int(found["n-shot"].get(task) or 0),
        limit=entry.limit,
        chance=chance,
        measurable=_measurable(value, error, chance, len(rows)),
    )


def _chance(config: dict[str, Any], metric: str, rows: list[Any]) -> float | None:
    """The mean accuracy of guessing, where a task is multiple choice."""
    if config.get("output_type") != "multiple_choice" or not metric.startswith("acc"):
        return None
    if not rows or "acc_mutual_info" in rows[0]["metrics"]:  # each option is asked for twice there
        return None
    return sum(1 / len(row["arguments"]) for row in rows) / len(rows)


def _measurable(value: float, error: float | None, chance: float | None, samples: int) -> bool:
    """Whether a level is four standard errors above chance; the error is at least that of `measure.recall`."""
    if chance is None:
        return True
    return error is not None and value >= chance + 4 * max(error, 0.0625 / math.sqrt(samples))


def _items(score: TaskScore, rows: list[Any]) -> list[Item]:
    """The items of a metric, in the first way whose figure is the one that lm-eval gave; none where no way gives it."""
    values = [row[score.metric] for row in rows]
    for kind, taken, figure in WAYS:
        try:
            pairs = [taken(value) for value in values]
            total, weight = (math.fsum(column) for column in zip(*pairs, strict=True))
            if not math.isclose(figure(total / weight), score.value, rel_tol=1e-9, abs_tol=1e-12):
                continue
        except (TypeError, ValueError, OverflowError, ZeroDivisionError):
            continue
        told: Kind = "cost" if kind == "accuracy" and not score.higher_is_better else kind
        return [
            Item(measure=score.measure, kind=told, item=_identity(row), value=value, weight=weight)
            for row, (value, weight) in zip(rows, pairs, strict=True)
        ]
    return []


def _identity(row: Any) -> str:
    return hashlib.sha256((row["doc_hash"] + row["prompt_hash"] + row["target_hash"]).encode()).hexdigest()


def _weighted(value: Any) -> tuple[float, float]:
    likelihood, weight = value
    return -float(likelihood), float(weight)


# how an item of lm-eval's becomes (value, weight), and its figure the ratio of their sums
WAYS: tuple[tuple[Any, Callable[[Any], tuple[float, float]], Callable[[float], float]], ...] = (
    ("accuracy", lambda value: (float(value), 1.0), lambda mean: mean),
    ("log_likelihood", lambda value: (-float(value), 1.0), math.exp),
    ("log_likelihood", _weighted, math.exp),
    ("log_likelihood", lambda value: (_weighted(value)[0] / math.log(2), _weighted(value)[1]), lambda mean: mean),
)
