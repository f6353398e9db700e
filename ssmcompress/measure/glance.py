"""What a compression is seen to cost while it runs: likelihood of the shipped pages, and two probes of memory."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ssmcompress.errors import UnsupportedError
from ssmcompress.events import Emit, Metric, Note, Table, ignore
from ssmcompress.measure import recall, text
from ssmcompress.measure.exercises import Vocabulary
from ssmcompress.measure.passage import Passage, passage
from ssmcompress.measure.perplexity import Perplexity, paired_difference, perplexity

ON = "the first 512 tokens of each of 62 Wikipedia pages (the test split of WikiText-2)"
CONTEXT = 256  # of the 512, where tokens may leave: a prompt that is read and not scored
COPIES, LOOKUPS = 64, 256  # items of the probes: a few seconds, and errors of some percent


@dataclass(frozen=True)
class Glance:
    """Likelihood of the shipped pages, the probes that this tokenizer has words for, a passage that loses tokens."""

    likelihood: Perplexity
    memory: tuple[recall.Recall, ...]
    passage: Passage | None = None

    @property
    def bits_per_byte(self) -> float:
        """Of the shipped pages."""
        return self.likelihood.bits_per_byte

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        told = self.likelihood.to_dict() | {"recall": [probe.to_dict() for probe in self.memory]}
        return told | ({"passage": asdict(self.passage)} if self.passage else {})


def glance(model: nn.Module, tokenizer: Any, seed: int = 0, emit: Emit = ignore, *, context: int = 0) -> Glance:
    """Looks at a model once; the first `context` tokens of each page are read and not scored."""
    pages = text.documents()
    likelihood = perplexity(model, tokenizer, pages, windows=1, context=context, emit=emit)
    read = passage(model, tokenizer, pages, CONTEXT)
    try:
        words = Vocabulary.of(tokenizer)
    except UnsupportedError as error:
        emit(Note(f"Memory is not measured: {error.message}"))
        return Glance(likelihood, (), read)
    memory = (
        recall.copy_probe(model, words, 20, COPIES, seed),
        recall.key_value_probe(model, words, 4, LOOKUPS, seed),
    )
    return Glance(likelihood, memory, read)


def tell_change(before: Glance, after: Glance, emit: Emit) -> None:
    """The two side by side, and the paired interval of the change in bits per byte."""
    old, new = before.likelihood, after.likelihood
    change, low, high = paired_difference(old.documents, new.documents)
    rows = [
        ("bits per byte", f"{old.bits_per_byte:.4f}", f"{new.bits_per_byte:.4f}", f"{change:+.4f}"),
        (
            "token perplexity",
            f"{old.perplexity:.2f}",
            f"{new.perplexity:.2f}",
            f"{new.perplexity - old.perplexity:+.2f}",
        ),
    ]
    for was, now in zip(before.memory, after.memory, strict=True):
        name = "copying 20 words" if was.probe == "copy" else "4 key-value pairs"
        told = f"{100 * (now.accuracy - was.accuracy):+.1f} points" if was.measurable else "not measurable"
        rows.append((name, _percent(was), _percent(now), told))
    emit(Table("before and after", ("", "before", "after", "change"), tuple(rows)))
    emit(Metric("change in bits per byte", change, low, high))


def _percent(probe: recall.Recall) -> str:
    low, high = probe.interval
    return f"{probe.accuracy:.1%} [{low:.1%}, {high:.1%}]"
