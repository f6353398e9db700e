"""`ssmcompress.json`: what an output is, where it comes from, and how it can be checked.

It holds no times and no paths, so that the same run writes the same bytes.
"""

import contextlib
import hashlib
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from pydantic import BaseModel, ConfigDict, ValidationError

import ssmcompress
from ssmcompress.checkpoint.adapter import Adapter
from ssmcompress.checkpoint.shards import Shards, read_json
from ssmcompress.checkpoint.source import Source
from ssmcompress.checkpoint.verify import Verification
from ssmcompress.errors import InputError
from ssmcompress.policy import KEY, TokenPolicy

NAME = "ssmcompress.json"
UNHASHED = (NAME, "README.md", "events.jsonl", "measured.json")  # itself, what is written from it, what holds times
EVALUATION, ADAPTERS = "eval", "adapters"  # the folders of what was measured, and learned, afterwards


class Record(BaseModel):
    """A part of the manifest: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceRecord(Record):
    """The model that was read: its name, its commit where it came from the hub, the hashes of its weight files."""

    name: str
    revision: str | None
    layout: Literal["hf", "mamba_ssm"]
    sha256: dict[str, str]


class EarlierRecord(Record):
    """A run that made the source, or the source of the source."""

    verb: str
    recipe_sha256: str | None
    source: SourceRecord


class CalibrationRecord(Record):
    """The calibration tokens: where from, how many windows of what length, and the hash of the ids."""

    source: str
    sha256: str
    windows: int
    length: int


class TensorRecord(Record):
    """What happened to one tensor; `kept` is the fraction of entries that masks left, `reason` why it is as it is.

    In a memoryless one the others were not set to zero: their states forget all but the token at hand.

    `zeros` is the number of entries that are zero as written, whatever made them so; None: not counted.
    """

    name: str
    shape: tuple[int, ...]
    status: Literal["pruned", "memoryless", "cut", "added", "kept", "unsupported"]
    kept: float = 1.0
    zeros: int | None = None
    reason: str = ""

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    @property
    def nonzero(self) -> float:
        """The fraction of entries that are not zero, as far as it is known."""
        if self.zeros is None:
            return 1.0 if self.status == "memoryless" else self.kept
        return 1 - self.zeros / max(1, self.size)


class SizeRecord(Record):
    """How large a model is: entries and bytes of its weights, bytes of its state, each axis's size layer by layer.

    `width` is the number of residual dimensions.
    """

    params: int
    weight_bytes: int
    state_bytes: int
    axes: dict[str, tuple[int, ...]]
    width: int | None = None

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return max(map(len, self.axes.values()))

    @property
    def scans(self) -> int:
        """The number of blocks that have a scan: states."""
        return sum(size > 0 for size in self.axes["state"])


class ShapeRecord(Record):
    """The size before and after units were removed, and which of the source's layers stayed."""

    before: SizeRecord
    after: SizeRecord
    layers: tuple[int, ...]

    def changes(self) -> dict[str, tuple[str, str]]:
        """Each axis that changed, as text before and after: one number, or the range and mean of layers that differ."""
        pairs = {
            axis: (str(getattr(self.before, key)), str(getattr(self.after, key)))
            for axis, key in (("layer", "layers"), ("width", "width"))
        }
        if self.after.scans < self.after.layers:
            pairs["ssm"] = (str(self.before.scans), str(self.after.scans))
        for axis, sizes in self.before.axes.items():
            pairs[axis] = (_span(sizes), _span(self.after.axes[axis]))
        return {axis: pair for axis, pair in pairs.items() if pair[0] != pair[1]}


class TokenRecord(Record):
    """How tokens of a prompt leave, and the share of the blocks' work on a long one that this saves.

    `per_layer` is how many tokens each block reads of a prompt of as many as the first one does.
    """

    policy: TokenPolicy
    flops_reduction: float
    per_layer: tuple[int, ...] = ()

    @property
    def table(self) -> str:
        """What every block reads of that prompt, and the share of work that is saved there."""
        if not self.per_layer:
            return ""
        read, first = ", ".join(f"{tokens:,}" for tokens in self.per_layer), self.per_layer[0]
        share = 1 - sum(self.per_layer) / (first * len(self.per_layer))
        return f"Of a prompt of {first:,} tokens, none of them special, the blocks read {read}: {share:.2%} saved."

    @property
    def told(self) -> str:
        """In a sentence."""
        policy, places = self.policy, ", ".join(map(str, self.policy.layers))
        return (
            f"While a prompt is read {1 - policy.keep:.1%} of its tokens leave after each of the blocks {places}, by"
            f" the rule {policy.method}: {self.flops_reduction:.1%} of the blocks' work on a long one is saved."
        )


class VerificationRecord(Record):
    """Largest relative difference of the float32 logits after loading from disk, by loader; None: not tried.

    `trust_remote_code`: transformers ran the code in the folder, which ssmcompress had written.
    """

    tokens: int
    tolerance: float
    transformers: float | None
    ssmcompress: float | None
    trust_remote_code: bool = False


class Manifest(Record):
    """Everything but the times; `files` holds the SHA-256 of the files beside it (:func:`hashes`)."""

    schema_version: Literal[1] = 1
    verb: str
    versions: dict[str, str]
    source: SourceRecord
    earlier: tuple[EarlierRecord, ...] = ()
    seed: int | None = None
    recipe_sha256: str | None = None
    backend: dict[str, str] = {}
    calibration: CalibrationRecord | None = None
    tensors: tuple[TensorRecord, ...] = ()
    shape: ShapeRecord | None = None
    tokens: TokenRecord | None = None
    verification: VerificationRecord | None = None
    files: dict[str, str] = {}

    @property
    def sparsity(self) -> float:
        """The zeroed fraction of all entries of the pruned tensors; 0 where there are none."""
        pruned = [tensor for tensor in self.tensors if tensor.status == "pruned"]
        kept = sum(tensor.size * tensor.nonzero for tensor in pruned)
        return 1 - kept / sum(tensor.size for tensor in pruned) if pruned else 0.0


def _span(sizes: tuple[int, ...]) -> str:
    """The sizes of the blocks that have such units."""
    found = [size for size in sizes if size] or [0]
    if min(found) == max(found):
        return str(found[0])
    return f"{min(found)} to {max(found)} (on average {sum(found) / len(found):.4g})"


def versions() -> dict[str, str]:
    """The versions that decide what is computed."""
    return {
        "ssmcompress": ssmcompress.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def describe(source: Source, adapters: Sequence[Adapter] = ()) -> SourceRecord:
    """The record of a source; reads its weight files, and those of adapters, once for their hashes."""
    hashes = {file: sha256(source.folder / file) for file in Shards(source.folder).weight_files}
    for number, adapter in enumerate(adapters, 1):
        hashes |= {path.name + f" ({number})" * (number > 1): sha256(path) for path in adapter.files}
    if policy := getattr(source.config(), KEY, None):  # which no weight file tells
        hashes[KEY] = TokenPolicy.read(policy).sha256
    return SourceRecord(name=source.label, revision=source.revision, layout=source.layout, sha256=hashes)


def history(source: Source) -> tuple[EarlierRecord, ...]:
    """The runs that made a source, the first one first; none for a model that ssmcompress did not write."""
    with contextlib.suppress(InputError):
        found = read(source.folder)
        return (*found.earlier, EarlierRecord(verb=found.verb, recipe_sha256=found.recipe_sha256, source=found.source))
    return ()


def carried(source: Source) -> tuple[TensorRecord, ...]:
    """What a source's own manifest says of its tensors, for an output that changes none of them."""
    with contextlib.suppress(InputError):
        return read(source.folder).tensors
    return ()


def zeros(folder: Path) -> dict[str, int] | None:
    """The zeros in each weight of a folder, where its manifest has counted them."""
    with contextlib.suppress(InputError):
        counts = {tensor.name: tensor.zeros for tensor in read(folder).tensors}
        if counts and None not in counts.values():
            return {name: count for name, count in counts.items() if count}
    return None


def write(
    folder: Path,
    *,
    verb: str,
    source: Source | SourceRecord,
    verification: Verification | None = None,
    **fields: Any,
) -> Manifest:
    """Writes the manifest of a folder whose other files are all there; `fields` are those of :class:`Manifest`."""
    manifest = Manifest(
        verb=verb,
        versions=versions(),
        source=describe(source) if isinstance(source, Source) else source,
        verification=VerificationRecord(**asdict(verification)) if verification else None,
        files=hashes(folder),
        **fields,
    )
    (folder / NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def read(folder: Path) -> Manifest:
    """The manifest of a folder; InputError where it is missing or not one of ours."""
    content = read_json(folder / NAME)
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{folder / NAME}: {where}: {first['msg']}.",
            hint=f"This version reads schema_version 1; the file says {content.get('schema_version')!r}.",
        ) from error


def changed(folder: Path) -> list[str]:
    """The files of an output that are not as they were written: changed, missing or added."""
    recorded, found = read(folder).files, hashes(folder)
    return sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file by its relative name, but for manifest, card, events, times, evaluations, adapters.

    What is hidden, such as the journal of a run, counts no more.
    """
    names = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    passing = (*UNHASHED, EVALUATION, ADAPTERS)
    lasting = {
        name.as_posix(): path
        for name, path in names.items()
        if name.parts[0] not in passing and not any(part.startswith(".") for part in name.parts)
    }
    return {name: sha256(path) for name, path in lasting.items()}


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
