"""The checkpoints that a page speaks of: what their folders say of how they were made, and how they were evaluated."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ssmcompress.checkpoint import manifest
from ssmcompress.checkpoint.manifest import Manifest
from ssmcompress.checkpoint.output import TUNING
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.errors import InputError
from ssmcompress.evaluate import results, speed
from ssmcompress.evaluate.results import Results, Summary
from ssmcompress.evaluate.speed import Speed
from ssmcompress.measure.passage import Passage
from ssmcompress.measure.perplexity import DocumentScore
from ssmcompress.paths import expanded
from ssmcompress.recipe import Recipe
from ssmcompress.recipes import parse

Model = TypeVar("Model", bound=BaseModel)
KINDS = "Give folders that `ssmcompress prune`, `run`, `tune-state` or `eval --out` wrote."


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Probe(_Lenient):
    """A probe of memory at one load."""

    probe: str
    load: int
    items: int
    accuracy: float
    standard_error: float
    chance: float
    items_sha256: str
    measurable: bool


class _Memory(_Lenient):
    recall: tuple[Probe, ...] = ()


class Look(_Lenient):
    """What a run measured of a model itself: likelihood of the first tokens of each page, and probes of memory."""

    bits_per_byte: float
    bits_per_byte_interval: tuple[float, float] | None
    perplexity: float
    length: int
    documents: tuple[DocumentScore, ...]
    recall: tuple[Probe, ...] = ()
    passage: Passage | None = None

    @property
    def identity(self) -> str:
        """Equal where the same text was read by the same tokenizer; never that of an evaluation of whole pages."""
        sizes = [(each.sha256, each.tokens, each.bytes) for each in self.documents]
        return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()


class Looks(_Lenient):
    """measured.json: before and after, and the paired change in bits per byte with its 95 % interval."""

    before: Look
    after: Look
    change: float
    interval: tuple[float, float]


class _Layer(_Lenient):
    """A line of events.jsonl, where it tells of a finished layer."""

    event: str
    name: str = ""
    layer: int = -1
    error: float | None = None


@dataclass(frozen=True)
class Made:
    """How a checkpoint came to be: manifest, recipe, relative error by layer, and the figures of the run itself."""

    manifest: Manifest
    recipe: Recipe | None
    errors: Mapping[int, float]
    looks: Looks | None


@dataclass(frozen=True)
class Evaluation:
    """What `eval --out` wrote."""

    results: Results
    memory: tuple[Probe, ...]
    speed: Speed | None

    @property
    def summary(self) -> Summary:
        """The figures."""
        return self.results.summary


class Course(_Lenient):
    """measured.json of an adapter: (update, loss) of training and, in nats a token, of validation."""

    loss: tuple[tuple[int, float], ...]
    validation: tuple[tuple[int, float], ...]


class _Tuning(_Lenient):
    method: str
    trainable: int
    best_step: int
    base: manifest.SourceRecord


@dataclass(frozen=True)
class Learned:
    """An adapter: its name, its method and parameters, the update that was kept, and how the learning went."""

    label: str
    base: manifest.SourceRecord
    method: str
    trainable: int
    best: int
    distilled: bool
    course: Course


@dataclass(frozen=True)
class Checkpoint:
    """A model: its name on the page, the hashes of its weights, how it was made and what it is worth.

    `params` counts all parameters, zeros too; `dense` where nothing tells of a compression. `source` is the dense one
    that it was made from; None for a dense one, and where no folder tells of it.
    """

    label: str
    weights: frozenset[str]
    folder: Path | None = None
    made: Made | None = None
    looks: tuple[Look, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    learned: tuple[Learned, ...] = ()
    params: int | None = None
    weight_bytes: int | None = None
    dense: bool = False
    source: "Checkpoint | None" = field(default=None, compare=False)

    @property
    def family(self) -> frozenset[str]:
        """The weights of the dense model that this one and its siblings were made from."""
        return self.source.weights if self.source else self.weights

    @property
    def nonzero(self) -> int | None:
        """Parameters that are not zero as stored; None where no manifest counted them."""
        if not (self.made and self.made.manifest.tensors):
            return None
        return sum(round(tensor.size * tensor.nonzero) for tensor in self.made.manifest.tensors)


def read(folders: Sequence[str | Path]) -> list[Checkpoint]:
    """The checkpoints that folders tell of, dense ones before what was made from them.

    An evaluation belongs to the model folder with the same weights, an adapter to the one that it was learned on.
    Raises InputError for a folder of neither kind.
    """
    models: dict[Path, Made] = {}
    evaluations: dict[Path, Evaluation] = {}
    adapters: dict[Path, Learned] = {}
    for folder in map(Path, folders):
        _sort(folder, models, evaluations, adapters)
    known: dict[frozenset[str], Checkpoint] = {}
    for each in (_compressed(folder, made) for folder, made in models.items()):
        twin = known.get(each.weights)
        known[each.weights] = replace(twin, label=f"{twin.label} = {each.label}") if twin else each
    for found in evaluations.values():
        weights = frozenset(found.summary.model_sha256.values())
        known.setdefault(weights, _unmade(found, weights))
        known[weights] = replace(known[weights], evaluations=(*known[weights].evaluations, found))
    for learned in adapters.values():
        base = frozenset(learned.base.sha256.values())
        models_below = [weights for weights in known if weights <= base and not _adapted(known[weights])]
        weights = max(models_below, key=len, default=base)
        owner = known.get(weights) or Checkpoint(learned.base.name, base, dense=True)
        known[weights] = replace(owner, learned=(*owner.learned, learned))
    return _named(_with_sources(known))


def _adapted(each: Checkpoint) -> bool:
    """Whether it is known from an evaluation with an adapter."""
    return any(found.summary.adapter for found in each.evaluations)


def _sort(
    folder: Path, models: dict[Path, Made], evaluations: dict[Path, Evaluation], adapters: dict[Path, Learned]
) -> None:
    place = expanded(folder).resolve()
    if (place / manifest.NAME).exists():
        models[place] = _made(place)
        inner = place / manifest.EVALUATION
        parts = sorted(each.parent for each in inner.glob(f"*/{results.NAME}"))
        evaluations |= {each: _evaluation(each) for each in parts}
        for each in sorted((place / manifest.ADAPTERS).glob(f"*/{TUNING}")):
            adapters[each.parent] = _learned(each.parent)
    elif (place / results.NAME).exists():
        evaluations[place] = _evaluation(place)
    elif (place / TUNING).exists():
        adapters[place] = _learned(place)
    else:
        if not place.is_dir():
            raise InputError(f"{folder} is {'no folder' if place.exists() else 'not there'}.", hint=KINDS)
        neither = (
            f"neither a compressed model ({manifest.NAME}), an evaluation ({results.NAME}) nor an adapter ({TUNING})"
        )
        raise InputError(f"{folder} holds {neither}.", hint=KINDS)


def _made(folder: Path) -> Made:
    told = manifest.read(folder)
    text = _text(folder / "recipe.yaml")
    looks = _text(folder / "measured.json")
    return Made(
        manifest=told,
        recipe=None if text is None else parse(text, str(folder / "recipe.yaml")),
        errors=_errors(folder / "events.jsonl"),
        looks=None if looks is None else _valid(Looks, looks, folder / "measured.json"),
    )


def _learned(folder: Path) -> Learned:
    told = _valid(_Tuning, _text(folder / TUNING) or "", folder / TUNING)
    measured = folder / "measured.json"
    course = _valid(Course, _text(measured) or "", measured)
    distilled = "objective: distill" in (_text(folder / "recipe.yaml") or "")
    return Learned(folder.name, told.base, told.method, told.trainable, told.best_step, distilled, course)


def _errors(path: Path) -> dict[int, float]:
    """The relative error of each layer; of several steps, and of runs that went on, the last one that measured it."""
    found: dict[int, float] = {}
    for line in (_text(path) or "").splitlines():
        event = _valid(_Layer, line, path)
        if event.event == "layer_done" and event.error is not None:
            found[event.layer] = event.error
    return dict(sorted(found.items()))


def _evaluation(folder: Path) -> Evaluation:
    path = folder / results.NAME
    text = _text(path) or ""
    memory = _valid(_Memory, text, path).recall
    if (folder / results.SAMPLES).exists():
        return Evaluation(results.read(folder), memory, speed.read(folder))
    return Evaluation(Results(folder, _valid(Summary, text, path), {}), memory, speed.read(folder))


def _compressed(folder: Path, made: Made) -> Checkpoint:
    weights = Shards(folder)
    files = {made.manifest.files.get(name, name) for name in weights.weight_files}
    files |= {made.manifest.tokens.policy.sha256} if made.manifest.tokens else set()
    sizes = {name: weights.shape(name).numel() for name in weights}
    stored = sum(size * weights.dtype(name).itemsize for name, size in sizes.items())
    looks = (made.looks.after,) if made.looks else ()
    # a layout may store a tied weight twice
    size = sum(tensor.size for tensor in made.manifest.tensors) or sum(sizes.values())
    return Checkpoint(folder.name, frozenset(files), folder, made, looks, params=size, weight_bytes=stored)


def _unmade(found: Evaluation, weights: frozenset[str]) -> Checkpoint:
    """A checkpoint of which only an evaluation is known."""
    told = found.summary
    name, folder, dense = told.label or told.model, found.results.folder, told.source is None
    return Checkpoint(name, weights, folder, params=told.params, weight_bytes=told.weight_bytes, dense=dense)


def _with_sources(known: dict[frozenset[str], Checkpoint]) -> list[Checkpoint]:
    """Puts what runs measured before they began with the dense model, and every model after its source."""
    for each in list(known.values()):
        if each.made:
            origin = each.made.manifest.source
            weights = frozenset(origin.sha256.values())
            params, size = _size_before(each, each.made)
            dense = not each.made.manifest.earlier
            unseen = Checkpoint(origin.name, weights, params=params, weight_bytes=size, dense=dense)
            before = known.get(weights, unseen)
            looks = (each.made.looks.before,) if each.made.looks and not before.made else ()
            known[weights] = replace(before, looks=_distinct((*before.looks, *looks)))
    roots = [each for each in known.values() if _origin(each, known) is None]
    ordered: list[Checkpoint] = []

    def add(each: Checkpoint, source: Checkpoint | None) -> None:
        placed = replace(each, source=source)
        ordered.append(placed)
        for other in known.values():
            if _origin(other, known) is each:
                add(other, source or placed)

    for root in roots:
        add(root, None)
    return ordered


def _size_before(each: Checkpoint, made: Made) -> tuple[int | None, int | None]:
    """Parameters and bytes of what one was made from: its own where only masks were set, which change neither."""
    if (shape := made.manifest.shape) is not None:
        return shape.before.params, shape.before.weight_bytes
    return each.params, None if made.manifest.verb == "convert" else each.weight_bytes


def _origin(each: Checkpoint, known: Mapping[frozenset[str], Checkpoint]) -> Checkpoint | None:
    """The model that one was made from: by the weights in its manifest, else by the name in its evaluation."""
    if each.made:
        found = known.get(frozenset(each.made.manifest.source.sha256.values()))
        return None if found is each else found
    name = next((found.summary.source for found in each.evaluations if found.summary.source), None)
    named = [other for other in known.values() if name and other is not each and other.dense]
    same = [other for other in named if any(found.summary.model == name for found in other.evaluations)]
    return same[0] if len(same) == 1 else None


def _distinct(looks: Iterable[Look]) -> tuple[Look, ...]:
    return tuple({look.identity: look for look in looks}.values())


def _named(ordered: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The same with names that differ within a family: by as many parent folders as that takes."""
    found: list[Checkpoint] = []
    for each in ordered:
        rivals = [other for other in ordered if other.family == each.family and other is not each]
        name, depth = each.label, 1
        while depth < 8 and each.folder and any(_named_by(other, depth, each.label) == name for other in rivals):
            depth += 1
            name = _named_by(each, depth, each.label)
        found.append(replace(each, label=name))
    return found


def _named_by(each: Checkpoint, depth: int, rival: str) -> str:
    return "/".join(each.folder.parts[-depth:]) if each.folder and depth > 1 and each.label == rival else each.label


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text.", hint="Write the folder anew.") from None


def _valid(kind: type[Model], text: str, path: Path) -> Model:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{path} cannot be read: {f'{where}: ' if where else ''}{first['msg']}.", hint="Write the folder anew."
        ) from None
