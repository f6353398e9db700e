"""Rows of JSON lines, of a table of separated values, or of a data set of the hub, each with where it stands."""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HTTPError

from ssmcompress.errors import InputError, ResourceError

Row = tuple[str, dict[str, Any]]  # where it stands, for messages; its columns
LINES = frozenset({".jsonl", ".ndjson", ".json"})
TABLES = {".csv": ",", ".tsv": "\t"}
TEXTS = (".txt", ".md")
ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


def names_a_set(source: str) -> bool:
    """Whether this can be the id of a data set, `id[:config]`, and not a file."""
    suffixes = (*LINES, *TABLES, *TEXTS)
    return bool(ID.fullmatch(source)) and not source.removesuffix(".gz").endswith(suffixes)


def contents(path: Path) -> str:
    """The whole of a file, gunzipped where its name says so."""
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: byte {error.start} cannot be read.", hint="Save it as UTF-8 text or JSON lines."
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a sound gzip file: {error}.", hint="Fetch or pack it again.") from error
    except OSError as error:
        raise ResourceError(f"{path} cannot be read: {error.strerror}.") from error


def json_rows(path: Path) -> Iterator[Row]:
    """The objects of JSON lines; InputError for a line that is none."""
    for number, line in enumerate(contents(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"Line {number} of {path}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{where} is not JSON: {error}.", hint='Each line is one object, like {"text": "…"}.'
            ) from error
        if not isinstance(row, dict):
            raise InputError(f"{where} is not an object.", hint='Each line is one object, like {"text": "…"}.')
        yield where, row


def table_rows(path: Path, separator: str) -> Iterator[Row]:
    """The rows of a table whose first line names the columns; InputError for one of another width."""
    # in tab-separated text a quote is but a quote
    marks: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if separator == "\t" else {"strict": True}
    reader = csv.DictReader(contents(path).splitlines(keepends=True), delimiter=separator, **marks)
    try:
        for row in reader:
            where = f"Line {reader.line_num} of {path}"
            if None in row or None in row.values():
                raise InputError(
                    f"{where} has {'more' if None in row else 'fewer'} columns than the first line names.",
                    hint="Put quotes around cells that hold a separator.",
                )
            yield where, row
    except csv.Error as error:
        raise InputError(f"{path} cannot be read after line {reader.line_num}: {error}.") from error


def set_rows(name: str, split: str) -> Iterator[Row]:
    """The rows of a split; InputError for what is not there, ResourceError where the hub cannot be reached."""
    import datasets

    name, _, config = name.partition(":")
    try:
        # offline only what was fetched before is there, and that cannot be streamed
        streaming = not datasets.config.HF_HUB_OFFLINE
        for row in datasets.load_dataset(name, config or None, split=split, streaming=streaming):
            yield f"The {split} split of {name}", row
    except datasets.exceptions.DatasetNotFoundError as error:
        raise InputError(
            f"There is no file {name}, and no data set of this name on the hub.",
            hint="Check the spelling; a private data set needs `hf auth login`.",
        ) from error
    except (ValueError, RuntimeError) as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise InputError(
            f"The data set {name} cannot be read: {why}.", hint="A config is given as id:config."
        ) from error
    except (OSError, HTTPError) as error:
        raise ResourceError(
            f"There is no file {name}; the hub cannot be reached, and its cache does not hold a data set of this name.",
            hint="Connect and unset HF_HUB_OFFLINE, or give a text file; without one the shipped text is taken.",
        ) from error
