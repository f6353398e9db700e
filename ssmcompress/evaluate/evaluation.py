"""The verb `eval`: likelihood, memory and tasks of a checkpoint, to the terminal and to summary.json."""

import hashlib
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ssmcompress import parallel
from ssmcompress.arch.mixer import mixers
from ssmcompress.checkpoint.adapter import Given, find_all
from ssmcompress.checkpoint.manifest import describe, versions
from ssmcompress.checkpoint.output import RESULTS, output
from ssmcompress.checkpoint.source import Checkpoint, Source, load, require_embedded, resolve
from ssmcompress.errors import BackendError, InputError
from ssmcompress.evaluate import speed as timing
from ssmcompress.evaluate import suites
from ssmcompress.evaluate.finished import Measures
from ssmcompress.evaluate.results import TEXT, Item, Summary, TaskScore, recall_items, recall_measure
from ssmcompress.events import Emit, Finished, Metric, Note, Table, ignore, number
from ssmcompress.measure import recall as probes
from ssmcompress.measure import text
from ssmcompress.measure.perplexity import DocumentScore, Perplexity, summarise
from ssmcompress.measure.perplexity import perplexity as score
from ssmcompress.policy import KEY

HARNESS = "lm_eval"  # the folder of its own files


@dataclass(frozen=True)
class Asked:
    """What is measured, and how."""

    documents: Sequence[str]
    recall: bool
    entries: tuple[suites.Entry, ...]
    harness: Any
    length: int
    batch_size: int
    seed: int
    context: int = 0  # tokens of each window that are read and not scored

    def key(self, **others: Any) -> str:
        """A hash that is equal where the same was asked for: only then may finished measures be taken over."""
        told = {
            "documents": [hashlib.sha256(each.encode()).hexdigest() for each in self.documents],
            "recall": self.recall,
            "tasks": [entry.model_dump() for entry in self.entries],
            "harness": self.harness.identity() if self.harness else None,
            "settings": [self.length, self.batch_size, self.seed],
            "versions": versions(),
        }
        told |= {"context": self.context} if self.context else {}
        return hashlib.sha256(json.dumps(told | others, sort_keys=True).encode()).hexdigest()


def evaluate(
    model: str,
    *,
    adapter: Given = (),
    perplexity: str | None = None,
    recall: bool = False,
    tasks: str | Sequence[str] = (),
    suite: str | None = None,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    speed: bool = False,
    against: str | None = None,
    lengths: str = "128,512",
    length: int = 512,
    context: int | None = None,
    limit: int | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "auto",
    backend: str = "auto",
    emit: Emit = ignore,
) -> Summary:
    """Measures a checkpoint as it lies on disk; with `out`, summary.json and the scores of every item are kept.

    Asked for nothing, it measures perplexity on the shipped text ("default"). `adapter`, a folder in PEFT's format or
    several, is put into the model first.
    Tasks are lm-eval's, one after another; asked for again, an interrupted run goes on after the last finished one.
    A text of them names several with commas.
    Of every window of `length` tokens of the text the first `context` are read and not scored: half of them where the
    model lets tokens leave, which only those may, else none.
    Speed is measured last and told in speed.json; `against` is a second model, timed in turns with this one.
    Raises InputError for a model without a tokenizer or that gives NaN, an adapter of another model, a text or task
    that cannot be read, or an output that exists.
    """
    require_seed(seed)
    timing.parsed(lengths)
    tasks = suites.listed(tasks)
    if not (perplexity or recall or tasks or suite or speed or against):
        perplexity = "default"
    settings = length, batch_size, seed
    chosen, asked = _asked(perplexity, recall, tasks, suite, include_path, limit, num_fewshot, settings)
    if chosen.empty and not (speed or against):
        raise InputError("Nothing is asked for.", hint="Name a text, tasks, or a suite that holds something.")
    perplexity, documents, harness = chosen.perplexity, asked.documents, asked.harness
    parallel.join(device)
    source = resolve(model)
    asked = replace(asked, context=_context(source, length, context))
    if against:
        resolve(against)  # before anything is measured
    record = describe(source, find_all(adapter))
    key = asked.key(model=record.sha256, device=device, dtype=dtype, backend=backend)
    writing = {"marked": RESULTS, "overwrite": overwrite, "source": source, "recipe_hash": key}
    with _folder(out, writing, emit) as folder:
        done = Measures(folder, ignore if out is None else emit)
        with done.kept(HARNESS):
            checkpoint = load(
                source, adapter=adapter, dtype=compute_dtype(dtype, device), device=device, backend=backend
            )
            required_tokenizer(checkpoint)
            likelihood = _likelihood(checkpoint, asked, done, emit) if documents else None
            memory = _memory(checkpoint, asked, done, emit) if asked.recall else []
            scores, items = _tasks(checkpoint, asked, folder, done, emit)
            used = checkpoint.model.dtype
            summary = Summary.of(
                checkpoint,
                likelihood,
                memory,
                source=record,
                text=perplexity,
                context=asked.context if documents else 0,
                asked_sha256=key,
                seed=seed,
                backend=next(mixers(checkpoint.model)).backend.names(device, used),
                dtype=str(used),
                tasks=scores,
                **(harness.record(seed) if harness else {}),
            )
            if parallel.first():
                summary.write(folder, likelihood, recall_items(memory) + items)
            if parallel.first() and (speed or against):
                _speed(checkpoint, against, asked, lengths, folder, emit)
    if out is not None:
        emit(Finished(str(out)))
    return summary


def measures(
    *,
    perplexity: str | None = None,
    recall: bool = False,
    tasks: Sequence[str] = (),
    suite: str | None = None,
    include_path: str | Path | None = None,
    **_: Any,
) -> list[str]:
    """What `evaluate` would measure, as samples.jsonl calls it, without a model; InputError where it would refuse."""
    chosen, asked = _asked(perplexity, recall, tasks, suite, include_path)
    if chosen.empty:
        raise InputError("The eval section measures nothing.", hint="Name a text, tasks or a suite, or leave it out.")
    found = [TEXT] * bool(asked.documents) + [recall_measure(*probe) for probe in probes.PROBES] * asked.recall
    return found + [name for names in (asked.harness.measures.values() if asked.harness else ()) for name in names]


def identity(
    model: str,
    *,
    adapter: Given = (),
    length: int,
    batch_size: int,
    seed: int,
    device: str,
    dtype: str,
    backend: str,
    **measured: Any,
) -> str:
    """The `asked_sha256` of the results that `evaluate` would give now, asked for these measures."""
    context = measured.pop("context", None)
    _, asked = _asked(**measured, settings=(length, batch_size, seed))
    source = resolve(model)
    asked = replace(asked, context=_context(source, length, context))
    return asked.key(model=describe(source, find_all(adapter)).sha256, device=device, dtype=dtype, backend=backend)


def _context(source: Source, length: int, context: int | None) -> int:
    """How many tokens of a window are read and not scored; InputError where none is left to score."""
    if context is None:
        return 0 if getattr(source.config(), KEY, None) is None else length // 2
    if not 0 <= context < length:
        raise InputError(f"--context {context} leaves nothing of a window of {length} tokens.", hint="Give less.")
    return context


def _asked(
    perplexity: str | None,
    recall: bool,
    tasks: Sequence[str],
    suite: str | None,
    include_path: str | Path | None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    settings: tuple[int, int, int] = (512, 8, 0),
) -> tuple[suites.Suite, Asked]:
    """What is asked for, the suite's and one's own, and its texts and tasks, read."""
    chosen = (suites.read(suite) if suite else suites.Suite()).with_tasks(tasks)
    more = {"perplexity": perplexity or chosen.perplexity, "recall": recall or chosen.recall}
    chosen = chosen.model_copy(update=more)
    entries = chosen.entries(limit, num_fewshot)
    documents = text.documents(chosen.perplexity, limit or chosen.limit) if chosen.perplexity else []
    harness = _harness(entries, include_path) if entries else None
    return chosen, Asked(documents, chosen.recall, entries, harness, *settings)


def _harness(entries: Sequence[suites.Entry], include_path: str | Path | None) -> Any:
    from ssmcompress.evaluate.harness import Harness  # lm-eval takes seconds to import

    return Harness([entry.task for entry in entries], include_path)


@contextmanager
def _folder(out: str | Path | None, writing: dict[str, Any], emit: Emit) -> Iterator[Path]:
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        with output(out, resumable=True, whatever_fails=True, together=True, emit=emit, **writing) as folder:
            yield folder


def _likelihood(checkpoint: Checkpoint, asked: Asked, done: Measures, emit: Emit) -> Perplexity:
    settings: dict[str, Any] = {"length": asked.length, "batch": asked.batch_size, "seed": asked.seed}
    settings["context"] = asked.context

    def measure() -> dict[str, Any]:
        found = score(checkpoint.model, checkpoint.tokenizer, asked.documents, **settings, emit=emit)
        _require_numbers(checkpoint, "the text", [document.nats for document in found.documents])
        return {"documents": [vars(document) for document in found.documents], "tokens_read": found.tokens_read}

    kept = done.get("perplexity", measure)
    documents = [DocumentScore(**row) for row in kept["documents"]]
    found = summarise(documents, asked.length, asked.seed, kept["tokens_read"])
    tell_perplexity(found, emit)
    return found


def _memory(checkpoint: Checkpoint, asked: Asked, done: Measures, emit: Emit) -> list[probes.Recall]:
    def measure() -> list[dict[str, Any]]:
        found = probes.recall(checkpoint.model, checkpoint.tokenizer, seed=asked.seed)
        _require_numbers(checkpoint, "the memory probes", [probe.log_probability for probe in found])
        return [asdict(probe) for probe in found]

    lists = ("hits", "item_sha256")
    rows = [row | {name: tuple(row[name]) for name in lists} for row in done.get("recall", measure)]
    found = [probes.Recall(**row) for row in rows]
    tell_recall(found, emit)
    return found


def _tasks(
    checkpoint: Checkpoint, asked: Asked, folder: Path, done: Measures, emit: Emit
) -> tuple[tuple[TaskScore, ...], list[Item]]:
    scores: list[TaskScore] = []
    items: list[Item] = []
    for entry in asked.entries:

        def measure(entry: suites.Entry = entry) -> dict[str, Any]:
            place = folder / HARNESS / entry.task.replace("/", "__")
            found = asked.harness.run(checkpoint, entry, place, batch_size=asked.batch_size, seed=asked.seed, emit=emit)
            return {name: [row.model_dump() for row in getattr(found, name)] for name in ("scores", "items")}

        found = done.get(f"task-{entry.task}", measure)
        scores += [TaskScore(**row) for row in found["scores"]]
        items += [Item(**row) for row in found["items"]]
    if scores:
        tell_tasks(scores, emit)
    return tuple(scores), items


def _speed(checkpoint: Checkpoint, against: str | None, asked: Asked, lengths: str, folder: Path, emit: Emit) -> None:
    model = checkpoint.model
    how: dict[str, Any] = {"device": model.device, "backend": next(mixers(model)).backend.name}
    other = load(against, dtype=model.dtype, **how) if against else None
    found = timing.speed(checkpoint, lengths=timing.parsed(lengths), against=other, seed=asked.seed, emit=emit)
    timing.tell(found, emit)
    found.write(folder)


def _require_numbers(checkpoint: Checkpoint, what: str, values: Sequence[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise InputError(
            f"{checkpoint.name} gives NaN or infinite log-likelihoods on {what}: there is no score.",
            hint="Its weights are finite, but their products are not: use another checkpoint, or --dtype float32.",
        )


def compute_dtype(name: str, device: str) -> torch.dtype | Literal["auto"]:
    """The dtype to compute in: what was asked for, else float32 on a CPU and the stored one elsewhere.

    Raises InputError for a device there is no such kind of, BackendError for one that this machine does not have.
    """
    kind = _known_device(device).type
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if kind == "cpu" else "auto"


def _known_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"There is no device {name!r}.", hint="Choose cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"The device {name!r} is not supported.", hint="Choose cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendError(f"This machine has no device {name!r}.", hint="Run `ssmcompress doctor`.")
    return device


def require_seed(seed: int) -> None:
    """InputError for a number that no generator takes."""
    if not 0 <= seed < 2**63:
        raise InputError(f"The seed {seed} is out of range.", hint="Give a whole number of at least 0.")


def required_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer; InputError where it has none, or one of another model."""
    if checkpoint.tokenizer is None:
        raise InputError(
            f"{checkpoint.source.name} has no tokenizer, so no text can be read to it.",
            hint="Put its tokenizer.json and tokenizer_config.json into the folder.",
        )
    require_embedded(checkpoint)
    return checkpoint.tokenizer


def tell_perplexity(found: Perplexity, emit: Emit) -> None:
    """The figures of a text as events."""
    emit(Metric("bits per byte", found.bits_per_byte, *(found.bits_per_byte_interval or ())))
    emit(Metric("token perplexity", found.perplexity, *(found.perplexity_interval or ())))
    if found.tokens_read is not None:
        read = ", ".join(f"{share:.1%}" for share in found.tokens_read)
        work = 1 - sum(found.tokens_read) / len(found.tokens_read)
        emit(Note(f"Of this text's tokens the blocks read {read}: {work:.1%} of their work was not done."))


def tell_recall(found: list[probes.Recall], emit: Emit) -> None:
    """The memory probes as a table."""
    rows = tuple(
        (
            probe.probe,
            str(probe.load),
            "{:.3f} [{:.3f}, {:.3f}]".format(probe.accuracy, *probe.interval),
            f"{probe.chance:.3f}",
            f"{probe.log_probability:.2f}",
            "" if probe.measurable else "not measurable",
        )
        for probe in found
    )
    emit(Table("memory", ("probe", "load", "accuracy", "chance", "log p", ""), rows))
    if not any(probe.measurable for probe in found):
        emit(Note("No memory probe is measurable on this model: nothing can be said about damage to it."))


def tell_tasks(found: Sequence[TaskScore], emit: Emit) -> None:
    """The figures of the tasks as a table."""
    rows = tuple(
        (
            each.task,
            each.metric if each.filter == "none" else f"{each.metric} ({each.filter})",
            number(each.value) + _spread(each),
            str(each.samples),
            "" if each.measurable else "not measurable",
        )
        for each in found
    )
    emit(Table("tasks", ("task", "metric", "value", "samples", "note"), rows))


def _spread(score: TaskScore) -> str:
    if score.interval is not None:
        return " [{:.3f}, {:.3f}]".format(*score.interval)
    return "" if score.standard_error is None else f" ± {number(score.standard_error)}"
