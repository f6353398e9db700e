"""What a compression does to a checkpoint, as data: masks, values, tensors, units that stay, in one safetensors file.

Every edit speaks of the source as it was: shapes, indices and layer numbers are its, whatever other edits remove.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, cast

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssmcompress.errors import InputError, ResourceError
from ssmcompress.policy import TokenPolicy

HEADER = "ssmcompress.edits"  # the file's only metadata key: safetensors writes several in random order
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Replace:
    """New values for a whole tensor, of its shape."""

    kind: ClassVar[str] = "replace"
    tensor: str
    values: Tensor

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor it is for."""
        return self.values.shape

    def pack(self) -> Tensor:
        """What is stored."""
        return self.values.detach().cpu().contiguous()

    @classmethod
    def unpack(cls, tensor: str, shape: tuple[int, ...], stored: Tensor) -> Self:
        """The edit from what is stored; ValueError says what is wrong with it."""
        if stored.dtype not in FLOATS:
            raise ValueError(f"its values are {stored.dtype}, not floating point")
        if tuple(stored.shape) != shape:
            raise ValueError(f"its values have the shape {list(stored.shape)}, its header says {list(shape)}")
        if not bool(stored.isfinite().all()):
            raise ValueError("its values are not all finite")
        return cls(tensor, stored)

    def change(self, tensor: Tensor) -> None:
        """Changes a tensor of the right shape in place; its dtype stays."""
        tensor.copy_(self.values)


@dataclass(frozen=True, eq=False)
class Add(Replace):
    """A tensor that the source lacks, whole, in the dtype it is stored in: a bias, the basis of rotated states."""

    kind: ClassVar[str] = "add"


class _Bits:
    """A field of booleans that is held eight to a byte: masks of all weights would take half of a model's memory."""

    def __get__(self, edit: Any, kind: type | None = None) -> Tensor:
        if edit is None:
            raise AttributeError("it has no usual value")
        return _unbits(*vars(edit)["bits"])

    def __set__(self, edit: Any, keep: Tensor) -> None:
        if keep.dtype != torch.bool:
            raise TypeError(f"what is kept is boolean, not {keep.dtype}")
        bits = np.packbits(keep.detach().cpu().flatten().numpy())
        vars(edit)["bits"] = keep.shape, torch.from_numpy(bits)


class _Kept:
    """What edits that hold booleans have in common: they are stored as bits."""

    @property
    def shape(self) -> torch.Size:
        """The shape of what it is for: a tensor's, or the number of units there are."""
        return cast(torch.Size, vars(self)["bits"][0])

    def pack(self) -> Tensor:
        """What is stored: eight entries a byte, the first in the highest bit."""
        return cast(Tensor, vars(self)["bits"][1])


@dataclass(frozen=True, eq=False)
class Mask(_Kept):
    """Which entries of a tensor stay, keep [*shape] bool; the others become +0.0. Stored as bits."""

    kind: ClassVar[str] = "mask"
    fill: ClassVar[float] = 0.0
    tensor: str
    keep: Tensor = _Bits()  # type: ignore[assignment]

    @classmethod
    def unpack(cls, tensor: str, shape: tuple[int, ...], stored: Tensor) -> "Mask":
        """The edit from what is stored; ValueError says what is wrong with it."""
        return cls(tensor, _unbits(shape, stored))

    def change(self, tensor: Tensor) -> None:
        """Changes a tensor of the right shape in place: what is kept keeps its bits."""
        tensor.masked_fill_(~self.keep.to(tensor.device), self.fill)


class Forget(Mask):
    """Which entries of A_log go on remembering, keep [*shape] bool; the others become 20, and their states memoryless.

    There exp(Δ A) is 0 in float32 for every Δ above 2.2e-7, so that h = Δ B x in any kernel. An A_log of 0 would not do
    it: that is A = -1, a state which decays (SparseSSM, 2025, writes it and masks the decay where it evaluates).
    """

    kind: ClassVar[str] = "forget"
    fill: ClassVar[float] = 20.0  # exact in bfloat16, and its exponential is far from overflow


@dataclass(frozen=True, eq=False)
class Keep(_Kept):
    """Which units of an axis stay, keep [units] bool: of one layer, or of the whole model (layers, scans, width)."""

    kind: ClassVar[str] = "keep"
    axis: str
    layer: int | None
    keep: Tensor = _Bits()  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if len(self.shape) != 1:
            raise TypeError(f"units are kept by booleans [units], not {list(self.shape)}")

    @property
    def tensor(self) -> str:
        """What it is about, where other edits name a tensor."""
        return self.axis if self.layer is None else f"layers.{self.layer}.{self.axis}"

    @classmethod
    def unpack(cls, tensor: str, shape: tuple[int, ...], stored: Tensor) -> "Keep":
        """The edit from what is stored; ValueError says what is wrong with it."""
        place = re.fullmatch(r"(?:layers\.(\d+)\.)?([a-z_]+)", tensor)
        if not place or len(shape) != 1:
            raise ValueError("it is about no axis of a layer or a model")
        keep = _unbits(shape, stored)
        if not keep.any():
            raise ValueError("it keeps nothing")
        return cls(place[2], None if place[1] is None else int(place[1]), keep)


@dataclass(frozen=True, eq=False)
class Reduce:
    """Tokens of a prompt leave by a policy, whose layers are the source's."""

    kind: ClassVar[str] = "reduce"
    tensor: ClassVar[str] = "tokens"  # what it is about, where other edits name a tensor
    shape: ClassVar[tuple[int, ...]] = ()
    policy: TokenPolicy

    def pack(self) -> Tensor:
        """What is stored: the policy as JSON, a byte an entry."""
        return torch.tensor(list(self.policy.model_dump_json().encode()), dtype=torch.uint8)

    @classmethod
    def unpack(cls, tensor: str, shape: tuple[int, ...], stored: Tensor) -> "Reduce":
        """The edit from what is stored; ValueError says what is wrong with it."""
        if tensor != cls.tensor or shape != () or stored.dtype != torch.uint8 or stored.dim() != 1:
            raise ValueError("it is no policy in bytes")
        return cls(TokenPolicy.read(bytes(stored.tolist())))


TensorEdit = Replace | Mask
Structural = Add | Keep | Reduce
Edit = TensorEdit | Structural
KINDS: dict[str, type[Replace] | type[Mask] | type[Keep] | type[Reduce]] = {  # in the order they apply
    kind.kind: kind for kind in (Replace, Mask, Forget, Add, Keep, Reduce)
}


class Edits(NamedTuple):
    """What a file holds: the edits in their order, and what was said about them."""

    items: tuple[Edit, ...]
    metadata: dict[str, str]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    kind: str
    tensor: Annotated[str, Field(min_length=1)]
    shape: tuple[Annotated[int, Field(ge=0)], ...]


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    version: Literal[1] = 1
    edits: tuple[_Entry, ...]
    metadata: dict[str, str]


def save(edits: Sequence[Edit], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Writes edits, at most one of a kind per tensor (see compose), and a few words about them: same edits, same bytes.

    Raises ResourceError where the file cannot be written.
    """
    arrays = {_key(edit.kind, edit.tensor): edit.pack() for edit in edits}
    if len(arrays) < len(edits):
        raise ValueError("two edits of one kind for one tensor: compose them first")
    entries = tuple(_Entry(kind=edit.kind, tensor=edit.tensor, shape=tuple(edit.shape)) for edit in edits)
    header = _Header(edits=entries, metadata=dict(metadata or {})).model_dump()
    try:
        save_file(arrays, path, {HEADER: json.dumps(header, sort_keys=True)})
    except (SafetensorError, OSError) as error:
        raise ResourceError(f"{path} cannot be written: {error}.", hint="Is there room and permission?") from error


def load(path: str | os.PathLike[str]) -> Edits:
    """Reads what `save` wrote. Raises InputError for a file that is not sound, ResourceError for one out of reach."""
    if not Path(path).is_file():
        raise InputError(f"There is no edits file {path}.", hint="Every output folder holds one: edits.safetensors.")
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(path, file.metadata() or {})
            names = [_key(entry.kind, entry.tensor) for entry in header.edits]
            if sorted(names) != sorted(file.keys()):
                odd = ", ".join(sorted(set(names) ^ set(file.keys()))) or "one listed twice"
                raise _unsound(path, f"its header and its arrays differ ({odd})")
            items = [
                _unpack(path, entry, file.get_tensor(name)) for entry, name in zip(header.edits, names, strict=True)
            ]
    except (SafetensorError, TypeError, RuntimeError) as error:  # the last two: dtypes that this torch does not have
        raise _unsound(path, str(error)) from error
    except OSError as error:
        raise ResourceError(f"{path} cannot be read: {error}.") from error
    return Edits(tuple(items), header.metadata)


@torch.no_grad()
def apply(edits: Iterable[Edit], state: Mapping[str, Tensor]) -> None:
    """Changes the tensors of a state dict in place, Replace before Mask, and nothing at all if one edit does not fit.

    Units to remove and tensors to add are left to `arch.surgery`. Raises InputError for a tensor that is not there or
    has another shape.
    """
    groups = by_tensor(edits)
    for name, group in groups.items():
        if name not in state:
            near = get_close_matches(name, state, n=1)
            hint = f"The closest is {near[0]}." if near else "Are these the edits of another model?"
            raise InputError(f"The edits change {name}, which the model does not have.", hint=hint)
        for edit in group:
            _check(edit, state[name])
    for name, group in groups.items():
        for edit in group:
            edit.change(state[name])


@torch.no_grad()
def apply_edit(edit: TensorEdit, tensor: Tensor) -> None:
    """Changes one tensor in place; InputError if its shape is not the edit's."""
    _check(edit, tensor)
    edit.change(tensor)


def by_tensor(edits: Iterable[Edit]) -> dict[str, list[TensorEdit]]:
    """The edits of each tensor in the order they apply, for writing shard by shard."""
    ranks = list(KINDS)
    groups: dict[str, list[TensorEdit]] = {}
    present = (edit for edit in edits if not isinstance(edit, Structural))
    for edit in sorted(present, key=lambda edit: ranks.index(edit.kind)):
        groups.setdefault(edit.tensor, []).append(edit)
    return groups


def reshaping(edits: Iterable[Edit]) -> list[Structural]:
    """The edits that change what tensors there are, or their shapes, or what is done with them: the config."""
    return [edit for edit in edits if isinstance(edit, Structural)]


def compose(*steps: Iterable[Edit]) -> list[Edit]:
    """One list that does what the steps do one after the other, with at most one edit of a kind per tensor.

    Units that a step removes are gone for all: one Keep per axis and layer is left, of those that every step keeps. Of
    a tensor that was added twice the last is left, and of two policies.
    """
    found: dict[str, dict[str, TensorEdit]] = {}
    units: dict[str, Structural] = {}
    for step in map(tuple, steps):
        for some in reshaping(step):
            before = units.get(some.tensor)
            if isinstance(some, Keep) and isinstance(before, Keep):
                some = replace(some, keep=before.keep & some.keep)
            units[some.tensor] = some
        for name, group in by_tensor(step).items():
            for edit in group:
                earlier = found.setdefault(name, {})
                if isinstance(edit, Replace):
                    found[name] = {edit.kind: edit}  # whatever came before is overwritten
                    continue
                for kind, mask in earlier.items():
                    if isinstance(mask, Mask):  # of another kind: what is filled anew is no longer its own
                        same = kind == edit.kind
                        earlier[kind] = replace(mask, keep=mask.keep & edit.keep if same else mask.keep | ~edit.keep)
                earlier.setdefault(edit.kind, edit)
    return [*(edit for group in found.values() for edit in group.values()), *units.values()]


def _unbits(shape: Sequence[int], stored: Tensor) -> Tensor:
    """Booleans of a shape from eight a byte; ValueError says what is wrong with them."""
    entries = math.prod(shape)
    wanted = -(-entries // 8)
    if stored.dtype != torch.uint8 or tuple(stored.shape) != (wanted,):
        found = f"{list(stored.shape)} of {stored.dtype}"
        raise ValueError(f"the shape {list(shape)} takes [{wanted}] of torch.uint8 in bits, found {found}")
    bits = np.unpackbits(stored.numpy())
    if bits[entries:].any():
        raise ValueError("bits are set behind its last entry")
    return torch.from_numpy(bits[:entries].view(bool)).view(shape)


def _key(kind: str, tensor: str) -> str:
    return f"{kind}:{tensor}"


def _header(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> _Header:
    if HEADER not in metadata:
        raise InputError(
            f"{path} holds no edits.", hint="Give the edits.safetensors of an output, not a model's shard."
        )
    try:
        header = _Header.model_validate_json(metadata[HEADER])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "header"
        raise _unsound(path, f"{where}: {first['msg']}") from error
    for entry in header.edits:
        if entry.kind not in KINDS:
            raise _unsound(path, f"the edit of {entry.tensor} is a {entry.kind!r}, known are {', '.join(KINDS)}")
    return header


def _unpack(path: str | os.PathLike[str], entry: _Entry, stored: Tensor) -> Edit:
    try:
        return KINDS[entry.kind].unpack(entry.tensor, entry.shape, stored)
    except ValueError as error:
        raise _unsound(path, f"the {entry.kind} of {entry.tensor}: {error}") from error


def _unsound(path: str | os.PathLike[str], why: str) -> InputError:
    hint = "It is damaged, or a newer version wrote it: make it again."
    return InputError(f"{path} is not a sound edits file: {why}.", hint=hint)


def _check(edit: TensorEdit, tensor: Tensor) -> None:
    if edit.shape != tensor.shape:
        raise InputError(
            f"The {edit.kind} of {edit.tensor} has the shape {list(edit.shape)}, the tensor {list(tensor.shape)}.",
            hint="Are these the edits of another model?",
        )
