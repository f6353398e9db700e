"""Examples to learn from: a prompt and its completion, on which alone the loss is, or plain text in windows."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from ssmcompress.calib.data import SHIPPED, documents
from ssmcompress.calib.rows import LINES, TABLES, Row, contents, json_rows, names_a_set, set_rows, table_rows
from ssmcompress.errors import InputError
from ssmcompress.paths import expanded
from ssmcompress.tune.tasks import TASKS
from ssmcompress.tuning import TuneState, columns

HELD_OUT, MOST = 0.05, 512  # the share of examples that validate where none are given, and how many ever do
AT_ONCE = 1000  # texts that the tokenizer gets: one by one each costs more than its words
NEAR = 16  # updates that are drawn together, so that examples of like length meet
HINT = 'Give JSON lines with "prompt" and "completion", a table with --completion "{column}", or plain text.'


@dataclass(frozen=True)
class Example:
    """Token ids, of which the last `scored` are learned; their bytes; which text it was, and which prompt."""

    ids: tuple[int, ...]
    scored: int
    bytes: int
    sha256: str
    prompt_sha256: str


@dataclass(frozen=True)
class Examples:
    """The examples of one source, and how many did not fit into the window."""

    items: tuple[Example, ...]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.items)


def read(source: str | None, tokenizer: Any, step: TuneState, limit: int | None = None) -> Examples:
    """The examples of JSON lines, a table, plain text or a data set, in their order; of the first `limit` prompts.

    Plain text, and rows of a column `text`, are cut into windows of `length` tokens, each after an end-of-text token;
    an example that is longer than `length` is left out and counted. Raises InputError for what is missing, malformed,
    or leaves no example, ResourceError where the hub cannot be reached.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise InputError(
            "The tokenizer has no end-of-text token, with which completions end.",
            hint="Set eos_token in its tokenizer_config.json.",
        )
    found = list(_examples(pairs(source, step, limit), tokenizer, end, step.length))
    items = tuple(each for each in found if len(each.ids) <= step.length + 1)
    if not items:
        lacking = f"all {len(found)} are longer than {step.length} tokens" if found else "it is empty"
        raise InputError(f"{source or SHIPPED} gives no example to learn from: {lacking}.", hint=HINT)
    return Examples(items, len(found) - len(items))


def held_out(data: Examples, seed: int) -> tuple[Examples, Examples]:
    """The examples to learn from, and those that validate: all of one prompt fall on one side."""
    unique = sorted({each.prompt_sha256 for each in data.items})
    if len(unique) < 2:
        raise InputError("One prompt cannot be learned from and validate too.", hint="Give --valid, or more data.")
    count = max(1, min(MOST, round(HELD_OUT * len(unique))))
    chosen = np.random.Generator(np.random.PCG64(seed)).choice(len(unique), count, replace=False)
    apart = {unique[index] for index in chosen}
    train, valid = ([each for each in data.items if (each.prompt_sha256 in apart) == side] for side in (False, True))
    return Examples(tuple(train), data.skipped), drawn(Examples(tuple(valid)), seed)


def drawn(data: Examples, seed: int) -> Examples:
    """As many examples as validation needs, drawn where there are more."""
    if len(data) <= MOST:
        return data
    chosen = np.random.Generator(np.random.PCG64(seed)).choice(len(data), MOST, replace=False)
    return Examples(tuple(data.items[index] for index in sorted(chosen)), data.skipped)


def order(lengths: Sequence[int], size: int, updates: int, seed: int) -> list[int]:
    """Which example comes when: every one once, then every one again; those of an update, `size` of them, by length.

    All of a run is drawn at once, so that one that goes on reads what it would have read.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    count = size * updates
    passes = [rng.permutation(len(lengths)) for _ in range(-(-count // len(lengths)))]
    turns = np.concatenate(passes)[:count]
    found: list[int] = []
    for start in range(0, count, NEAR * size):
        near = sorted(turns[start : start + NEAR * size].tolist(), key=lambda index: lengths[index])
        groups = [near[i : i + size] for i in range(0, len(near), size)]
        found += [index for group in rng.permutation(len(groups)) for index in groups[group]]
    return found


def padding(data: Examples, step: TuneState, seed: int) -> float:
    """The share of positions that a run pads: every example has a row of its own, in which its state begins."""
    lengths = [len(each.ids) for each in data.items]
    turns = order(lengths, step.batch_size * step.accumulate, step.steps, seed)
    rows = [[lengths[index] for index in turns[i : i + step.batch_size]] for i in range(0, len(turns), step.batch_size)]
    return 1 - sum(map(sum, rows)) / sum(len(row) * max(row) for row in rows)


def shared(data: Examples, other: Examples) -> int:
    """How many of the other's examples are among the data, word for word."""
    known = {each.sha256 for each in data.items}
    return sum(each.sha256 in known for each in other.items)


def _examples(texts: Iterator[tuple[str, str]], tokenizer: Any, end: int, length: int) -> Iterator[Example]:
    while some := list(islice(texts, AT_ONCE)):
        unique = list({text: None for pair in some for text in pair})
        found = tokenizer(unique, add_special_tokens=False, verbose=False)["input_ids"]
        ids: dict[str, list[int]] = dict(zip(unique, found, strict=True))
        for prompt, completion in some:
            answer = ids[completion]
            if prompt:
                yield _example([*(ids[prompt] or [end]), *answer, end], len(answer) + 1, prompt, completion)
                continue
            for start in range(0, len(answer), length):
                part = answer[start : start + length]
                text = completion if len(answer) <= length else tokenizer.decode(part)
                yield _example([end, *part], len(part), "", text)


def _example(ids: list[int], scored: int, prompt: str, completion: str) -> Example:
    whole = f"{len(prompt)} {prompt}{completion}"
    return Example(tuple(ids), scored, len(completion.encode()), _sha256(whole), _sha256(prompt or completion))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def pairs(source: str | None, step: TuneState, limit: int | None = None) -> Iterator[tuple[str, str]]:
    """Prompts and completions, of the first `limit` prompts; that of plain text is empty. InputError as of `read`."""
    seen: set[str] = set()
    for prompt, completion in _pairs(source, step):
        if prompt in seen or limit is None or len(seen) < limit:
            seen.add(prompt)
            yield prompt, completion


def _pairs(source: str | None, step: TuneState) -> Iterator[tuple[str, str]]:
    if source is None:
        yield from (("", text) for text in documents(None))
        return
    path = expanded(source)
    name = path.name.removesuffix(".gz")
    table = next((separator for suffix, separator in TABLES.items() if name.endswith(suffix)), None)
    if path.is_dir():
        raise InputError(f"{source} is a folder.", hint=HINT)
    if not path.is_file() and (step.task is not None or not names_a_set(source)):
        raise InputError(f"There is no file {source}.", hint=HINT)
    if path.is_file() and step.task is None and table is None and not name.endswith(tuple(LINES)):
        if step.completion is not None:
            raise InputError(f"{path} is plain text: it has no columns for a template.", hint=HINT)
        yield "", contents(path)
        return
    rows: Iterable[Row]
    prompt, completion = step.prompt, step.completion
    if step.task is not None:
        task = TASKS[step.task]
        rows, prompt, completion = task.rows(path), task.prompt, task.completion
    elif path.is_file():
        rows = json_rows(path) if table is None else table_rows(path, table)
    else:
        rows = set_rows(source, step.split or "train")
    for where, row in rows:
        yield _pair(where, row, prompt, completion)


def _pair(where: str, row: dict[str, Any], prompt: str | None, completion: str | None) -> tuple[str, str]:
    if completion is None and not ("completion" in row or "prompt" in row):
        return "", _filled(where, row, "{text}")
    asked = _filled(where, row, (prompt or "") if completion else "{prompt}")
    answer = _filled(where, row, completion or "{completion}")
    if not answer.strip():
        raise InputError(f"{where} has an empty completion: there is nothing to learn.", hint=HINT)
    return asked, answer


def _filled(where: str, row: dict[str, Any], template: str) -> str:
    values = {}
    for column in columns(template):
        if not isinstance(row.get(column), str | int | float):
            what = "no text in the" if column in row else "no"
            found = ", ".join(map(str, row)) or "none"
            raise InputError(f"{where} has {what} column {column!r}; its columns: {found}.", hint=HINT)
        values[column] = str(row[column]).encode("utf-8", "replace").decode()
    return template.format(**values)
