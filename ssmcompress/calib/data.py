"""Calibration text becomes token windows: seeded, hashed, and kept in the user's cache."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ssmcompress.calib.rows import LINES, contents, json_rows, names_a_set, set_rows
from ssmcompress.errors import InputError
from ssmcompress.paths import expanded

SHIPPED = "calibration.jsonl"
ABUNDANT = 64  # characters of a data set read for each token asked for: some sixteen times what is needed
CACHED = 1  # the way windows are drawn; a new number lets old caches rest


@dataclass(frozen=True)
class Windows:
    """Token windows [n, length] int64, their sha256 (as little-endian int32), source and its number of documents."""

    ids: Tensor
    sha256: str
    source: str
    documents: int


def windows(
    source: str | None,
    tokenizer: Any,
    *,
    count: int,
    length: int,
    seed: int,
    split: str | None = None,
    column: str | None = None,
    extra: Sequence[str] = (),
    share: float = 0.25,
) -> Windows:
    """Draws `count` windows of `length` tokens from a source (see documents), or all it has if it holds no more.

    Documents come in random order, each giving one random crop (WANDA), short ones joined by the end-of-text token;
    where they run out, windows that do not overlap are drawn from all of the text (all, in order, if no more are held).
    A `share` of the windows comes from the texts in `extra`. Raises InputError for text of less than one window.
    """
    if tokenizer is None:
        raise InputError("The model comes without a tokenizer, so no text can be read.", hint="Add its tokenizer.json.")
    texts = documents(source, split=split, column=column, limit=ABUNDANT * count * length)
    name = source or SHIPPED
    mixed = round(count * share) if extra else 0
    file = _cache_file(tokenizer, texts, extra, (count, mixed, length, seed))
    ids = _recall(file, length)
    if ids is None:
        parts = [_draw(texts, tokenizer, count - mixed, length, seed, name)]
        if mixed:
            parts.append(_draw(extra, tokenizer, mixed, length, seed, "The extra text"))
        ids = torch.from_numpy(np.concatenate(parts))
        _remember(file, ids)
    return Windows(ids, _sha256(ids), name, len(texts))


def shipped(name: str) -> Path:
    """A data file that comes with the package: beside it in a wheel, in `evals/data` of a checkout."""
    package = Path(__file__).parent.parent
    for folder in (package / "_data", package.parent / "evals" / "data"):
        if (folder / name).exists():
            return folder / name
    raise InputError(f"The shipped text {name} is missing.", hint="Install ssmcompress again.")


def documents(
    source: str | None, *, split: str | None = None, column: str | None = None, limit: int | None = None
) -> list[str]:
    """The documents of a plain text file (one), of JSON lines, of a data set `id[:config]`, or the shipped ones (None).

    Files may be gzipped; column is "text" unless given, split "train"; a data set is read for `limit` characters.
    Raises InputError for what is missing, malformed or holds no text, ResourceError where the hub cannot be reached.
    """
    path = shipped(SHIPPED) if source is None else expanded(source)
    if path.is_file():
        if split is not None:
            raise InputError(
                f"{path} is a file: it has no split {split!r}.", hint="Splits are for data sets of the hub."
            )
        lines = path.name.removesuffix(".gz").endswith(tuple(LINES))
        if column is not None and not lines:
            raise InputError(f"{path} is plain text: it has no column {column!r}.", hint="Columns are for JSON lines.")
        rows = json_rows(path) if lines else iter(())
        found = (_cell(row, column or "text", where) for where, row in rows) if lines else iter([contents(path)])
    elif path.is_dir():
        raise InputError(f"{source} is a folder.", hint="Give a text file, JSON lines or the id of a data set.")
    elif names_a_set(str(source)):
        found = _of_set(str(source), split or "train", column or "text", limit)
    else:
        raise InputError(f"There is no file {source}.", hint="Give a text file, JSON lines or the id of a data set.")
    # a lone surrogate, which JSON can hold, is no text that a tokenizer could read
    texts = [text.encode("utf-8", "replace").decode() for text in found if text.strip()]
    if not texts:
        raise InputError(f"{source or path} holds no text.", hint="Give at least one window of text.")
    return texts


def _draw(texts: Sequence[str], tokenizer: Any, count: int, length: int, seed: int, name: str) -> np.ndarray:
    """Windows [≤ count, length] of the texts."""
    rng = np.random.Generator(np.random.PCG64(seed))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    crops: list[list[int]] = []
    short: list[int] = []
    read: dict[int, list[int]] = {}
    for index in rng.permutation(len(texts)).tolist():
        ids = read[index] = tokenizer(texts[index], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= length:
            start = int(rng.integers(len(ids) - length + 1))
            crops.append(ids[start : start + length])
        else:
            short += ids + end
            while len(short) >= length:
                crops.append(short[:length])
                short = short[length:]
        if len(crops) > count:  # one more than needed: the text surely holds more than asked for
            return np.array(crops[:count])
    stream = [token for index in range(len(texts)) for token in (*read[index], *end)]
    stream = stream[: len(stream) - len(end)]
    held = len(stream) // length
    if not held:
        raise InputError(
            f"{name} holds {len(stream)} tokens, less than one window of {length}.",
            hint="Give more text, or a smaller --length.",
        )
    first = int(rng.integers(len(stream) % length + 1)) if held > count else 0
    rows = np.array(stream[first : first + held * length]).reshape(held, length)
    return rows if held <= count else rows[np.sort(rng.choice(held, count, replace=False))]


def _of_set(name: str, split: str, column: str, limit: int | None) -> Iterator[str]:
    size = 0
    for where, row in set_rows(name, split):
        text = _cell(row, column, where)
        yield text
        size += len(text)
        if limit is not None and size >= limit:
            return


def _cell(row: dict[str, Any], column: str, where: str) -> str:
    if not isinstance(row.get(column), str):
        what = "no text in" if column in row else "no"
        found = ", ".join(map(str, row)) or "none"
        raise InputError(
            f"{where} has {what} column {column!r}; its columns: {found}.", hint="Name it: --calib-column."
        )
    return row[column]


def _cache_file(tokenizer: Any, texts: Sequence[str], extra: Sequence[str], arguments: tuple[int, ...]) -> Path | None:
    """Where these windows are kept; None for a tokenizer that cannot be told from others, or without a home."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    key = hashlib.sha256(json.dumps([CACHED, tokenizer.eos_token_id, *arguments]).encode())
    for text in (backend.to_str(), str(len(texts)), *texts, *extra):
        raw = text.encode("utf-8", "replace")
        key.update(len(raw).to_bytes(8, "little") + raw)
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return home / "ssmcompress" / "windows" / f"{key.hexdigest()}.safetensors"


def _recall(file: Path | None, length: int) -> Tensor | None:
    """The windows of a cache file, None if it is not there or not what was written."""
    if file is None:
        return None
    try:
        tensors = load(file.read_bytes())
    except (OSError, SafetensorError):
        return None
    ids = tensors.get("ids")
    digest = tensors.get("sha256")
    if ids is None or digest is None or ids.dtype != torch.int32 or ids.dim() != 2 or ids.shape[1] != length:
        return None
    return ids.long() if bytes(digest.tolist()).hex() == _sha256(ids) else None


def _remember(file: Path | None, ids: Tensor) -> None:
    """Keeps windows for the next run; where the cache cannot be written the next run draws them again."""
    if file is None:
        return
    digest = torch.tensor(list(bytes.fromhex(_sha256(ids))), dtype=torch.uint8)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(save({"ids": ids.int(), "sha256": digest}))
            Path(name).replace(file)
        except OSError:
            Path(name).unlink()


def _sha256(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().astype("<i4").tobytes()).hexdigest()
