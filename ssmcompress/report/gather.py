"""What lies in the folders of a report: compressed models, evaluations, and which belong together."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ssmcompress.checkpoint import manifest
from ssmcompress.checkpoint.card import MASKS, coverage
from ssmcompress.checkpoint.manifest import Manifest, TensorRecord
from ssmcompress.errors import InputError
from ssmcompress.evaluate import results, speed
from ssmcompress.evaluate.compare import Difference, differences
from ssmcompress.evaluate.comparison import aligned
from ssmcompress.evaluate.results import Results
from ssmcompress.evaluate.speed import Speed


@dataclass(frozen=True)
class Subject:
    """A model of the report: dense (no manifest of ours) or compressed, evaluated or not."""

    label: str
    weights: dict[str, str]
    made: Manifest | None = None
    recipe: str = ""
    glance: dict[str, Any] | None = None  # measured.json: the quick figures before and after
    errors: tuple[tuple[int, float], ...] = ()  # of the residual stream, by layer
    evaluated: Results | None = None
    speed: Speed | None = None
    against: tuple[Difference, ...] = ()  # the dense model, measure by measure

    @property
    def params(self) -> int | None:
        """All entries of the weights."""
        if self.made is not None and self.made.tensors:
            return sum(tensor.size for tensor in self.made.tensors)
        return self.evaluated.summary.params if self.evaluated else None

    @property
    def nonzero(self) -> int | None:
        """The entries that are not zero, where they were counted; all of a dense model's."""
        if self.made is None:
            return self.params
        zeros = [tensor.zeros for tensor in self.made.tensors]
        return None if None in zeros or self.params is None else self.params - sum(zero or 0 for zero in zeros)

    @property
    def masked(self) -> bool:
        """Whether zeros were made that are stored like any other value."""
        return self.made is not None and self.made.sparsity > 0

    @property
    def coverage(self) -> list[tuple[str, str, str, str]]:
        """Every kind of tensor, and what happened to it."""
        return coverage(self.made.tensors) if self.made else []

    @property
    def layers(self) -> dict[str, dict[int, float]]:
        """The share that is not zero of each pruned module, by layer."""
        found: dict[str, dict[int, float]] = {}
        for tensor in self.made.tensors if self.made else ():
            place = _place(tensor)
            if tensor.status == "pruned" and place:
                found.setdefault(place[1], {})[place[0]] = tensor.nonzero
        return found


NOTE = MASKS


def gather(folders: Sequence[str | Path]) -> list[Subject]:
    """The models of these folders in their order, each dense one before what was made from it.

    Evaluations below a model's folder are found by themselves. Raises InputError for a folder that is neither.
    """
    paths = [Path(folder).expanduser() for folder in folders]
    inner = [path / manifest.EVALUATION / name for path in paths for name in ("dense", "compressed")]
    compressed = [_model(path) for path in paths if (path / manifest.NAME).exists()]
    evaluated = [_evaluation(path) for path in (*paths, *inner) if (path / results.NAME).exists()]
    for path in paths:
        if not any((path / name).exists() for name in (manifest.NAME, results.NAME)):
            raise InputError(
                f"{path} is neither a model that ssmcompress wrote nor an evaluation.",
                hint="Give folders of `ssmcompress prune --out` and `ssmcompress eval --out`.",
            )
    joined = [_joined(each, evaluated) for each in compressed]
    known = [each.weights for each in joined]
    alone: list[Subject] = []
    for each in evaluated:
        if each.weights not in known:
            known.append(each.weights)
            alone.append(_joined(each, evaluated))
    return [_compared(each, alone) for each in _ordered(alone, joined)]


def _model(folder: Path) -> Subject:
    made = manifest.read(folder)
    recipe, measured, events = folder / "recipe.yaml", folder / "measured.json", folder / "events.jsonl"
    return Subject(
        label=folder.resolve().name,
        weights={name: digest for name, digest in made.files.items() if name in _weight_files(made)},
        made=made,
        recipe=recipe.read_text(encoding="utf-8") if recipe.exists() else "",
        glance=json.loads(measured.read_text(encoding="utf-8")) if measured.exists() else None,
        errors=_errors(events) if events.exists() else (),
    )


def _weight_files(made: Manifest) -> list[str]:
    skipped = ("edits.safetensors",)
    return [name for name in made.files if name.endswith((".safetensors", ".bin")) and name not in skipped]


def _errors(events: Path) -> tuple[tuple[int, float], ...]:
    """The last told error of each layer."""
    found: dict[int, float] = {}
    for line in events.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("event") == "layer_done" and row.get("error") is not None:
            found[row["layer"]] = row["error"]
    return tuple(sorted(found.items()))


def _evaluation(folder: Path) -> Subject:
    found = results.read(folder)
    label = found.summary.label or found.summary.model
    return Subject(label, found.summary.model_sha256, evaluated=found, speed=speed.read(folder))


def _joined(subject: Subject, evaluated: Sequence[Subject]) -> Subject:
    """A model with the evaluation of the most measures, and the speed, of the same weights."""
    same = [each for each in evaluated if each.weights == subject.weights]
    best = max(same, key=lambda each: len(each.evaluated.samples) if each.evaluated else 0, default=None)
    timed = next((each.speed for each in same if each.speed), None)
    return replace(subject, evaluated=best.evaluated if best else None, speed=timed)


def _ordered(alone: Sequence[Subject], compressed: Sequence[Subject]) -> list[Subject]:
    found = []
    for dense in alone:
        found += [dense, *(each for each in compressed if each.made and each.made.source.sha256 == dense.weights)]
    return found + [each for each in compressed if all(each is not other for other in found)]


def _compared(subject: Subject, alone: Sequence[Subject]) -> Subject:
    """A compressed model beside the dense one it was made from, where both were measured on the same items."""
    dense = next((each for each in alone if subject.made and each.weights == subject.made.source.sha256), None)
    if dense is None or dense.evaluated is None or subject.evaluated is None:
        return subject
    try:
        pair = aligned(dense.evaluated, subject.evaluated)
    except InputError:
        return subject
    return replace(subject, against=tuple(differences(*pair)))


def _place(tensor: TensorRecord) -> tuple[int, str] | None:
    """The layer and module of a block's weight."""
    parts = tensor.name.split(".")
    if "layers" not in parts or parts[-1] != "weight":
        return None
    layer = parts[parts.index("layers") + 1]
    return (int(layer), parts[-2]) if layer.isdecimal() else None
