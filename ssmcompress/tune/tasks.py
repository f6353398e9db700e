"""Tasks that people tune on, as their authors publish them: how rows are read to a model, and how it is judged."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ssmcompress.calib.rows import Row, contents, table_rows
from ssmcompress.errors import InputError


@dataclass(frozen=True)
class Task:
    """Templates of prompt and completion over the rows of its files, and how completions are judged.

    "likeness" to all references of a prompt, "label": which of `labels` is likeliest, "query": equal but for blanks.
    """

    rows: Callable[[Path], Iterator[Row]]
    prompt: str
    completion: str
    judged: Literal["likeness", "label", "query"]
    tokens: int = 96
    labels: tuple[str, ...] = ()


def _objects(path: Path) -> Iterator[Row]:
    """The objects of a JSON array; InputError for anything else."""
    try:
        found = json.loads(contents(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise InputError(f"{path} is no list of objects.", hint="Give the file as its authors publish it.")
    yield from ((f"Object {number} of {path}", each) for number, each in enumerate(found, 1))


def _dart(path: Path) -> Iterator[Row]:
    """A row for every text that tells the triples (Nan et al., 2021)."""
    for where, row in _objects(path):
        triples, texts = row.get("tripleset"), row.get("annotations")
        if not (_are(triples, list) and _are(texts, dict)):
            raise InputError(f"{where} has no tripleset and annotations.", hint="Give DART's JSON files.")
        told = " | ".join(" : ".join(map(str, triple)) for triple in triples or ())
        yield from ((where, {"triples": told, "text": each.get("text")}) for each in texts or ())


def _spider(path: Path) -> Iterator[Row]:
    """Questions with the tables and columns of their database, from tables.json beside the file (Yu et al., 2018)."""
    tables = path.with_name("tables.json")
    if not tables.is_file():
        raise InputError(f"Spider's tables.json is not beside {path}.", hint="Put it there: it holds the schemas.")
    schemas = {row.get("db_id"): _schema(where, row) for where, row in _objects(tables)}
    for where, row in _objects(path):
        if row.get("db_id") not in schemas:
            raise InputError(f"{where} asks a database that {tables} does not know: {row.get('db_id')!r}.")
        question = row.get("question", row.get("SpiderQuestion"))
        yield where, {"schema": schemas[row["db_id"]], "question": question, "query": row.get("query")}


def _schema(where: str, row: dict[str, Any]) -> str:
    try:
        names, columns = row["table_names_original"], row["column_names_original"]
        each = (f"{name}({', '.join(column for at, column in columns if at == i)})" for i, name in enumerate(names))
        return " ".join(each)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where} is no schema.", hint="Give Spider's tables.json.") from error


def _named(path: Path, column: str, names: dict[str, str]) -> Iterator[Row]:
    """Rows of a tab-separated file whose labels become words."""
    for where, row in table_rows(path, "\t"):
        label = row.get(column)
        if label not in names:
            raise InputError(f"{where} has the {column} {label!r}; expected one of {', '.join(names)}.")
        yield where, row | {column: names[label]}


TASKS = {
    "e2e": Task(lambda path: table_rows(path, ","), "{mr} =", " {ref}", "likeness"),
    "dart": Task(_dart, "{triples} =", " {text}", "likeness"),
    "spider": Task(_spider, "{schema}\n{question} =", " {query}", "query", tokens=128),
    "sst2": Task(
        lambda path: _named(path, "label", {"0": "bad", "1": "good"}),
        "{sentence}. It was",
        " {label}",
        "label",
        labels=(" bad", " good"),
    ),
    "rte": Task(
        lambda path: _named(path, "label", {"not_entailment": "no", "entailment": "yes"}),
        "{sentence1} Does it follow that {sentence2}",
        " {label}",
        "label",
        labels=(" no", " yes"),
    ),
}


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, Sequence) and all(isinstance(each, kind) for each in values)
