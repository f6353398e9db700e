"""The shipped documents for lm-eval's tasks, found beside this folder in a checkout and in a wheel."""

import gzip
import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.tasks.wikitext.preprocess_wikitext import process_results as likelihood
from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer as detokenized

__all__ = ["detokenized", "documents", "likelihood", "pages"]
ROOT = Path(__file__).resolve().parents[2]


def documents(file: str, split: str, **_: Any) -> dict[str, Dataset]:
    """The lines of a shipped file as the split of that name."""
    return {split: Dataset.from_list(_rows(file))}


def pages(file: str, split: str, **_: Any) -> dict[str, Dataset]:
    """The texts of a shipped file as pages, as lm-eval's wikitext calls them."""
    return {split: Dataset.from_list([{"page": row["text"]} for row in _rows(file)])}


def _rows(file: str) -> list[dict[str, Any]]:
    path = next(path for folder in ("data", "_data") if (path := ROOT / folder / file).exists())
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    return [json.loads(line) for line in text.split("\n") if line]
