"""The weight files of a folder: read lazily and without running anything, written as Hugging Face shards."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssmcompress.errors import InputError, ResourceError, UnsupportedError
from ssmcompress.events import size

SAFETENSORS = "model.safetensors"
BIN = "pytorch_model.bin"
INDEX = ".index.json"
SHARD_SIZE = "5GB"
MAPPED = 2**26  # bytes of the files that stay mapped once they are read
LFS_POINTER = b"version https://git-lfs"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Shards(Mapping[str, Tensor]):
    """The tensors of a folder by name; nothing is read before it is asked for, and every read is a fresh tensor.

    Raises InputError for a missing, truncated or contradictory file, UnsupportedError for a dtype that is no float.
    """

    def __init__(self, folder: Path, names: Sequence[str] = (SAFETENSORS, BIN)) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}
        self._stored: Mapping[str, str] = {}
        main = next((name for name in names if _present(folder, name)), None)
        if main is None:
            raise InputError(
                f"{folder} holds no weights: neither {' nor '.join(names)}, nor an index of shards.",
                hint="Give the folder of a checkpoint, with config.json beside its weights.",
            )
        self._open = _open_bin if main == BIN else _open_safetensors
        self._shards: dict[str, Any] = {}
        self._read: dict[str, int] = {}
        listed = None if (folder / main).exists() else _read_index(folder / (main + INDEX))
        self.weight_files: tuple[str, ...] = tuple(sorted(set(listed.values()))) if listed else (main,)
        for file in self.weight_files:
            self._add(file)
        for name, file in (listed or self.files).items():
            if self.files.get(name) != file:
                raise InputError(
                    f"{folder / (main + INDEX)} lists {name} in {file}, which does not hold it.",
                    hint="The download or copy is incomplete or mixed up: fetch it again.",
                )

    def __getitem__(self, name: str) -> Tensor:
        # a copy, for what the file's mapping hands out is shared: an edit would show in the next read
        tensor = self._shard(name).get_tensor(self.stored_name(name)).clone()
        self._let_go(self.files[name], tensor.nbytes)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def finite(self, name: str) -> Tensor:
        """A tensor; InputError where it holds values that are NaN or infinite."""
        tensor = self[name]
        if not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise InputError(
                f"{self.stored_name(name)} in {self.path(name)} holds {bad} values that are NaN or infinite,"
                f" of {tensor.numel()}.",
                hint="The checkpoint is damaged or its training diverged: use another.",
            )
        return tensor

    def get_slice(self, name: str, index: slice | tuple[slice, ...]) -> Tensor:
        """Part of a tensor, reading no more than it."""
        return self._slice(name)[index].clone()

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor, without reading it."""
        return torch.Size(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of a tensor, without reading it; UnsupportedError where it is not floating point."""
        stored = self._slice(name).get_dtype()
        if stored not in DTYPES:
            known = ", ".join(DTYPES)
            raise UnsupportedError(
                f"{self.stored_name(name)} in {self.path(name)} is stored as {stored}; expected one of {known}.",
                hint="Quantised checkpoints are not supported: start from the original weights.",
            )
        return DTYPES[stored]

    def meta(self) -> dict[str, Tensor]:
        """Every tensor's shape and dtype, as tensors on the meta device."""
        return {name: torch.empty(self.shape(name), dtype=self.dtype(name), device="meta") for name in self}

    def select(self, names: Mapping[str, str]) -> "Shards":
        """The same files under other names: new name → the name here."""
        view = copy.copy(self)
        view._stored = {name: self.stored_name(here) for name, here in names.items()}
        view.files = {name: self.files[here] for name, here in names.items()}
        return view

    def stored_name(self, name: str) -> str:
        """The name of a tensor in its file."""
        return self._stored.get(name, name)

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.folder / self.files[name]

    def _shard(self, name: str) -> Any:
        return self._shards[self.files[name]]

    def _let_go(self, file: str, count: int) -> None:
        """Maps files anew from time to time: what was read of them counts as this process's memory until then."""
        self._read[file] = self._read.get(file, 0) + count
        if sum(self._read.values()) > MAPPED:
            self._shards |= {read: self._open(self.folder / read) for read in self._read}
            self._read.clear()

    def _slice(self, name: str) -> Any:
        return self._shard(name).get_slice(self.stored_name(name))

    def _add(self, file: str) -> None:
        shard = self._shards[file] = self._open(self.folder / file)
        for name in shard.keys():  # noqa: SIM118 - a safetensors file is not iterable
            if name in self.files:
                raise InputError(
                    f"{name} is stored twice, in {self.files[name]} and {file} of {self.folder}.",
                    hint="Keep the shards of one save only.",
                )
            self.files[name] = file


def save(
    state: Mapping[str, Tensor],
    folder: Path,
    *,
    shard_size: int | str = SHARD_SIZE,
    value: Callable[[str], Tensor] | None = None,
) -> None:
    """Writes tensors as Hugging Face safetensors shards, with an index where there is more than one.

    With `value` the state may be meta tensors: each shard's values are asked for when it is written, so that one shard
    is in memory at a time. The same tensors in the same order give the same bytes. ResourceError when the disk is full.
    """
    plan = split_torch_state_dict_into_shards(dict(state), max_shard_size=shard_size)
    require_space(folder, sum(tensor.nbytes for tensor in state.values()))
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: (value or state.__getitem__)(name).detach().contiguous().cpu() for name in names}
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # its OSError, spelt out
            raise ResourceError(f"Cannot write {folder / file}: {error}.", hint="Free some space.") from error
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / (SAFETENSORS + INDEX)).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def require_space(folder: Path, need: int) -> None:
    """ResourceError where fewer than `need` bytes are free on the disk of a folder."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise ResourceError(
            f"{size(need)} of weights do not fit on the disk of {folder}: {size(free)} are free.",
            hint="Free some space or choose another --out.",
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; InputError for anything else, or for a key given twice."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.", hint="Fetch or write the file again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}; expected an object.")
    return content


class _Bin:
    """A file written by `torch.save`, with the interface of a safetensors file."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def get_slice(self, name: str) -> "_BinSlice":
        return _BinSlice(self._tensors[name])


class _BinSlice:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        return self._tensor[index]

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        known = {dtype: name for name, dtype in DTYPES.items()}
        return known.get(self._tensor.dtype, str(self._tensor.dtype))


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(_existing(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}.", hint=_repair(path)) from error


def _open_bin(path: Path) -> _Bin:
    try:
        content = torch.load(_existing(path), map_location="cpu", weights_only=True, mmap=True)
    except InputError:
        raise
    except Exception as error:  # whatever a damaged or hostile file makes the unpickler raise
        raise InputError(
            f"{path} cannot be read as plain tensors: it is damaged or holds objects that would run code on loading.",
            hint=_repair(path) + " A file that holds more than tensors is refused whoever wrote it.",
        ) from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise InputError(
            f"{path} holds something other than a state dict (names and their tensors).",
            hint="Save `model.state_dict()` by itself, without optimiser or training state.",
        )
    return _Bin(content)


def _present(folder: Path, name: str) -> bool:
    return (folder / name).exists() or (folder / (name + INDEX)).exists()


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path} does not exist, though the index of its folder lists it.", hint="Fetch it again.")
    return path


def _repair(path: Path) -> str:
    with path.open("rb") as file:
        pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    return "It is a Git LFS pointer: run `git lfs pull`." if pointer else "Download or copy the file again."


def _read_index(path: Path) -> dict[str, str]:
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise InputError(f"{path} has no weight_map of tensor names to file names.")
    for file in set(listed.values()):
        parts = PurePosixPath(file).parts
        if not parts or PurePosixPath(file).is_absolute() or ".." in parts or "\\" in file or ":" in file:
            raise InputError(
                f"{path} points to {file!r}, outside its folder; expected the name of a file beside it.",
                hint="Do not load this checkpoint: its index was tampered with.",
            )
    return listed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return content
