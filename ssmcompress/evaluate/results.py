"""summary.json: the figures of one evaluation, typed and versioned, with what they were measured on."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from ssmcompress.checkpoint.manifest import NAME as MANIFEST
from ssmcompress.checkpoint.manifest import SourceRecord, versions
from ssmcompress.checkpoint.manifest import read as read_manifest
from ssmcompress.checkpoint.output import RESULTS as NAME
from ssmcompress.checkpoint.source import Checkpoint, Source, state_dict
from ssmcompress.errors import InputError
from ssmcompress.evaluate.compare import Kind, Samples
from ssmcompress.measure.interval import accuracy_interval
from ssmcompress.measure.perplexity import DocumentScore, Perplexity
from ssmcompress.measure.recall import Recall
from ssmcompress.tokens.schedule import saved

TEXT = "text/bits_per_byte"
SAMPLES = "samples.jsonl"
HINT = "Give a folder that `ssmcompress eval MODEL --out` wrote."
Model = TypeVar("Model", bound=BaseModel)


class TaskScore(BaseModel):
    """A figure of one lm-eval task; `metric` is lm-eval's name without its filter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    metric: str
    filter: str
    value: float
    standard_error: float | None = None
    higher_is_better: bool
    samples: int
    samples_sha256: str
    version: str
    num_fewshot: int
    limit: int | None = None
    chance: float | None = None
    measurable: bool = True

    @property
    def share(self) -> bool:
        """Whether the figure is a share of right answers."""
        return self.metric.startswith(("acc", "exact_match", "em")) and 0 <= self.value <= 1

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of a share of right answers; None for other figures, or without a standard error."""
        error = self.standard_error
        return accuracy_interval(self.value, error, self.samples) if self.share and error is not None else None

    @property
    def measure(self) -> str:
        """What its items are called in samples.jsonl."""
        return f"{self.task}/{self.metric}" + ("" if self.filter == "none" else f",{self.filter}")


class Item(BaseModel):
    """A line of samples.jsonl: what one item gave a measure, whose figure is Σ values / Σ weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    measure: str
    kind: Kind
    item: str
    value: float
    weight: float
    tokens: int | None = None


class Summary(BaseModel):
    """Figures of a checkpoint; bytes are those of the weights as stored and of one sequence's recurrent state.

    Of every window of `length` tokens of the text the first `context` were read and not scored. `flops_reduction` is
    the share of the blocks' work on a long prompt that is not done, where tokens leave, and `tokens_read` the share of
    this text's tokens that each block read.
    The files of an adapter that was merged into it are among those of `model_sha256`; its `source` is then `model`,
    unless that has one itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    model: str
    model_sha256: dict[str, str]
    versions: dict[str, str]
    backend: dict[str, str]
    dtype: str
    seed: int
    params: int
    weight_bytes: int
    state_bytes: int
    flops_reduction: float | None = None
    text: str | None = None
    text_sha256: str | None = None
    length: int | None = None
    context: int = 0
    tokens_read: tuple[float, ...] | None = None
    bits_per_byte: float | None = None
    bits_per_byte_interval: tuple[float, float] | None = None
    perplexity: float | None = None
    perplexity_interval: tuple[float, float] | None = None
    recall: tuple[dict[str, Any], ...] = ()
    label: str = ""
    adapter: str | None = None
    source: str | None = None
    recipe_sha256: str | None = None
    asked_sha256: str | None = None  # equal where the same was asked of the same model, in the same versions
    tasks: tuple[TaskScore, ...] = ()
    harness_versions: dict[str, str] = {}
    seeds: dict[str, int] = {}
    speed: dict[str, Any] | None = None

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        likelihood: Perplexity | None,
        memory: Sequence[Recall] | None,
        *,
        source: SourceRecord,
        text: str | None,
        **fields: Any,
    ) -> "Summary":
        """The summary of what was measured."""
        weights, adapters, policy = checkpoint.stored, checkpoint.adapters, checkpoint.arch.policy
        if likelihood is not None:
            fields |= {
                "text": Path(text or "").name,
                "text_sha256": _identity(likelihood),
                "length": likelihood.length,
                "tokens_read": likelihood.tokens_read,
                "bits_per_byte": likelihood.bits_per_byte,
                "bits_per_byte_interval": likelihood.bits_per_byte_interval,
                "perplexity": likelihood.perplexity,
                "perplexity_interval": likelihood.perplexity_interval,
            }
        return cls(
            model=source.name,
            label=checkpoint.label,
            adapter=" + ".join(adapter.label for adapter in adapters) or None,
            model_sha256=source.sha256,
            versions=versions(),
            params=sum(tensor.numel() for tensor in state_dict(checkpoint.model).values()),
            weight_bytes=sum(weights.shape(name).numel() * weights.dtype(name).itemsize for name in weights),
            state_bytes=checkpoint.arch.state_bytes(),
            flops_reduction=saved(checkpoint.arch.layers, policy.layers, policy.keep) if policy else None,
            recall=tuple(probe.to_dict() for probe in memory or ()),
            **(({"source": source.name} if adapters else {}) | _origin(checkpoint.source) | fields),
        )

    def write(self, folder: Path, likelihood: Perplexity | None, items: Sequence[Item] = ()) -> None:
        """Writes summary.json, and what each measure gave item by item for paired tests."""
        (folder / NAME).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        found = [*text_items(likelihood), *items]
        lines = "".join(item.model_dump_json(exclude_none=True) + "\n" for item in found)
        (folder / SAMPLES).write_text(lines, encoding="utf-8")


def text_items(likelihood: Perplexity | None) -> list[Item]:
    """The documents of a text: bits over bytes."""
    return [
        Item(
            measure=TEXT,
            kind="log_likelihood",
            item=document.sha256,
            value=document.nats / math.log(2),
            weight=document.bytes,
            tokens=document.tokens,
        )
        for document in (likelihood.documents if likelihood else ())
    ]


def recall_measure(probe: str, load: int) -> str:
    """What the items of a memory probe are called."""
    return f"recall/{probe}-{load}"


def recall_items(memory: Sequence[Recall]) -> list[Item]:
    """The items of the memory probes: the share of right tokens of each."""
    return [
        Item(measure=recall_measure(probe.probe, probe.load), kind="accuracy", item=item, value=hit, weight=1)
        for probe in memory
        for item, hit in zip(probe.item_sha256, probe.hits, strict=True)
    ]


def _origin(source: Source) -> dict[str, Any]:
    """The dense model that a compressed one was made from, and the recipe, where its manifest tells."""
    if not (source.folder / MANIFEST).exists():
        return {}
    made = read_manifest(source.folder)
    return {"source": made.source.name, "recipe_sha256": made.recipe_sha256}


def _identity(likelihood: Perplexity) -> str:
    """A hash that is equal where the same documents were read by the same tokenizer."""
    sizes = json.dumps([(d.sha256, d.tokens, d.bytes) for d in likelihood.documents])
    return hashlib.sha256(sizes.encode()).hexdigest()


@dataclass(frozen=True)
class Results:
    """An evaluation folder, read: its summary, and what each measure scored on each item."""

    folder: Path
    summary: Summary
    samples: Mapping[str, Samples]


def read(folder: str | Path) -> Results:
    """Reads what `eval --out` wrote; InputError where it is missing or damaged."""
    folder = Path(folder)
    summary = _valid(Summary, _text(folder / NAME), folder / NAME)
    scores = {score.measure: score for score in summary.tasks}
    chances = {name: score.chance for name, score in scores.items()}
    try:
        chances |= {recall_measure(probe["probe"], probe["load"]): probe["chance"] for probe in summary.recall}
    except KeyError as error:
        raise InputError(f"{folder / NAME} has a memory probe without {error}.", hint=HINT) from None
    found: dict[str, list[Item]] = {}
    for item in _items(folder):
        found.setdefault(item.measure, []).append(item)
    for name, rows in found.items():
        if name in scores and len(rows) != scores[name].samples:
            told = f"{len(rows)} items of {name}, and {NAME} tells of {scores[name].samples}"
            raise InputError(f"{folder / SAMPLES} holds {told}.", hint=HINT)
        if min(row.weight for row in rows) < 0 or not 0 < math.fsum(row.weight for row in rows) < math.inf:
            raise InputError(f"{folder / SAMPLES} has weights of {name} that are no weights.", hint=HINT)
    samples = {name: _samples(rows, chances.get(name), scores.get(name)) for name, rows in found.items()}
    return Results(folder, summary, samples)


def documents(folder: str | Path) -> list[DocumentScore]:
    """The scores of the text's documents, as `measure.perplexity` takes them."""
    return [
        DocumentScore(item.value * math.log(2), item.tokens or 0, int(item.weight), item.item)
        for item in _items(Path(folder))
        if item.measure == TEXT
    ]


def _items(folder: Path) -> list[Item]:
    path = folder / SAMPLES
    lines = enumerate(_text(path).split("\n"), 1)  # a name may hold what splitlines takes for the end of a line
    return [_valid(Item, line, path, f"line {number}: ") for number, line in lines if line]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}.", hint=HINT) from None
    except UnicodeDecodeError:
        raise InputError(f"{path} cannot be read: it is not text.", hint=HINT) from None


def _valid(kind: type[Model], text: str, path: Path, where: str = "") -> Model:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = where + "".join(f"{part}: " for part in first["loc"])
        raise InputError(f"{path} cannot be read: {place}{first['msg']}.", hint=HINT) from None


def _samples(rows: list[Item], chance: float | None, score: TaskScore | None) -> Samples:
    made = Samples(
        rows[0].measure,
        rows[0].kind,
        tuple(row.item for row in rows),
        np.array([row.value for row in rows], float),
        np.array([row.weight for row in rows], float),
        chance,
    )
    if score is None or made.kind != "log_likelihood":
        return made
    plain = math.isclose(made.values.sum() / made.weights.sum(), score.value, rel_tol=1e-6)
    return replace(made, perplexity=not plain)
