"""Texts to measure on: those that come with the package by name, and a user's own files."""

import json
import re
from pathlib import Path

from ssmcompress.errors import InputError

SHIPPED = {"default": "wikipedia.jsonl", "wikipedia": "wikipedia.jsonl", "novels": "novels.jsonl"}
BLOCK = 4000  # characters a document where a plain text has no headings


def shipped(name: str) -> Path:
    """A data file that comes with the package: beside it in a wheel, in `evals/data` of a checkout."""
    package = Path(__file__).parent.parent
    for folder in (package / "_data", package.parent / "evals" / "data"):
        if (folder / name).exists():
            return folder / name
    raise InputError(f"The shipped text {name} is missing.", hint="Install ssmcompress again.")


def documents(source: str = "default", limit: int | None = None) -> list[str]:
    """The documents of a shipped text, a JSON lines file (field `text`) or a plain text file; at most `limit` of them.

    A plain text is cut at WikiText's top-level headings where it has them, else into blocks of whole paragraphs.
    Raises InputError for what cannot be read or holds no text.
    """
    path = shipped(SHIPPED[source]) if source in SHIPPED else Path(source).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = f"Give a text or JSON lines file, or one of {', '.join(SHIPPED)}."
        raise InputError(f"There is no text {source}.", hint=hint) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from None
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from None
    found = _json_lines(path, text) if path.suffix in (".jsonl", ".ndjson") else _plain(text)
    found = [document for document in found if document.strip()][:limit]
    if not found:
        raise InputError(f"{path} holds no text.", hint="Give a file with something in it.")
    return found


def _json_lines(path: Path, text: str) -> list[str]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line)["text"])
        except (ValueError, TypeError, KeyError):
            raise InputError(
                f"{path}, line {number}: expected a JSON object with a field `text`.", hint=f"Found {line[:60]!r}."
            ) from None
        if not isinstance(found[-1], str):
            raise InputError(f"{path}, line {number}: `text` is not a string.")
    return found


def _plain(text: str) -> list[str]:
    pages = re.split(r"(?m)^(?= = [^=].* = $)", text)
    if len(pages) > 1:
        return pages
    blocks = [""]
    for paragraph in re.split(r"(?<=\n)(?=\s*\n)", text):
        if len(blocks[-1]) >= BLOCK:
            blocks.append("")
        blocks[-1] += paragraph
    return blocks
