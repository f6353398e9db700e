"""Texts to measure on: those that come with the package by name, and a user's own."""

import re
from pathlib import Path

from ssmcompress.calib import data

SHIPPED = {"default": "wikipedia.jsonl", "wikipedia": "wikipedia.jsonl", "novels": "novels.jsonl"}
BLOCK = 4000  # characters a document where a plain text has no headings


def documents(source: str = "default", limit: int | None = None) -> list[str]:
    """The documents of a shipped text, or of what calibration could read too; at most `limit` of them.

    One long text is cut at WikiText's top-level headings where it has them, else into blocks of whole paragraphs.
    Raises InputError for what cannot be read or holds no text.
    """
    path = data.shipped(SHIPPED[source]) if source in SHIPPED else Path(source)
    found = data.documents(str(path))
    if len(found) == 1:
        found = [part for part in _parts(found[0]) if part.strip()]
    return found[:limit]


def _parts(text: str) -> list[str]:
    pages = re.split(r"(?m)^(?= = [^=].* = $)", text)
    if len(pages) > 1:
        return pages
    blocks = [""]
    for paragraph in re.split(r"(?<=\n)(?=\s*\n)", text):
        if len(blocks[-1]) >= BLOCK:
            blocks.append("")
        blocks[-1] += paragraph
    return blocks
