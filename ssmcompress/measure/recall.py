"""Memory as a score: how much of a random word sequence is copied, how many values are found by key (probes A1, A3)."""

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ssmcompress.arch.backbone import protect
from ssmcompress.measure.exercises import Exercise, Vocabulary, copying, key_value
from ssmcompress.measure.interval import accuracy_interval

COPY_LENGTHS = (8, 12, 16, 20)
PAIRS = (2, 4, 8)
PROBES = (*(("copy", length) for length in COPY_LENGTHS), *(("key-value", pairs) for pairs in PAIRS))


@dataclass(frozen=True)
class Recall:
    """One probe at one load: accuracy with its standard error, chance, and mean log-probability of the right token.

    `hits` is the share of right tokens of each item, `item_sha256` says which item it was.
    """

    probe: str
    load: int
    items: int
    accuracy: float
    standard_error: float
    chance: float
    log_probability: float
    items_sha256: str
    hits: tuple[float, ...] = ()
    item_sha256: tuple[str, ...] = ()

    @property
    def measurable(self) -> bool:
        """Whether the accuracy is at least four standard errors above chance: below that no damage can be seen."""
        return self.accuracy >= self.chance + 4 * max(self.standard_error, math.sqrt(0.25 / self.items) / 8)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return accuracy_interval(self.accuracy, self.standard_error, self.items)

    def to_dict(self) -> dict[str, Any]:
        """The figures and whether the level is measurable, without the items."""
        figures = {name: value for name, value in asdict(self).items() if name not in ("hits", "item_sha256")}
        return figures | {"measurable": self.measurable}


def recall(model: nn.Module, tokenizer: Any, *, items: int = 512, seed: int = 0, batch: int = 64) -> list[Recall]:
    """All copying and key-value probes of a model, on items that depend on the seed alone."""
    vocabulary = Vocabulary.of(tokenizer)
    scores = [copy_probe(model, vocabulary, length, items // 4, seed, batch) for length in COPY_LENGTHS]
    return scores + [key_value_probe(model, vocabulary, pairs, items, seed, batch) for pairs in PAIRS]


def copy_probe(model: nn.Module, vocabulary: Vocabulary, length: int, items: int, seed: int, batch: int = 64) -> Recall:
    """Greedy token accuracy on the second half of `w₁ … wₙ = w₁ … wₙ`, teacher-forced; the error is over items."""
    rng = _generator(seed, 1, length)
    rows = _rows(vocabulary, [copying(vocabulary, length, rng) for _ in range(items)])
    right, logp = [], []
    asked = length + 1
    for ids, logits in _batches(model, rows, asked, batch):
        scores = logits[:, asked : asked + length].log_softmax(-1)
        gold = ids[:, asked + 1 : asked + 1 + length]
        right.append((scores.argmax(-1) == gold).float().mean(1))
        logp.append(scores.gather(-1, gold[..., None])[..., 0].mean(1))
    return _summary("copy", length, rows, right, logp, 1 / len(vocabulary.words))


def key_value_probe(
    model: nn.Module, vocabulary: Vocabulary, pairs: int, items: int, seed: int, batch: int = 64
) -> Recall:
    """Share of items whose right value ranks first among the values in context; the query is never the last pair."""
    rows = key_value_items(vocabulary, pairs, items, seed)
    right, logp = [], []
    asked = 3 * pairs + 3
    for ids, logits in _batches(model, rows, asked, batch):
        scores = logits[:, asked].log_softmax(-1)
        gold = ids[:, asked + 1, None]
        among = scores.gather(-1, ids[:, 2 : 3 * pairs + 1 : 3])
        right.append(((among >= scores.gather(-1, gold)).sum(-1) == 1).float())  # a tie is no answer
        logp.append(scores.gather(-1, gold)[:, 0])
    return _summary("key-value", pairs, rows, right, logp, 1 / pairs)


def key_value_items(vocabulary: Vocabulary, pairs: int, items: int, seed: int) -> np.ndarray:
    """The items of that probe [items, 1 + tokens], which depend on the seed alone."""
    rng = _generator(seed, 2, pairs)
    return _rows(vocabulary, [key_value(vocabulary, pairs, 1, rng) for _ in range(items)])


def _rows(vocabulary: Vocabulary, exercises: list[Exercise]) -> np.ndarray:
    """The exercises [items, 1 + tokens], each after one end-of-text token."""
    ids = np.stack([exercise.ids for exercise in exercises])
    return np.concatenate([np.full((len(ids), 1), vocabulary.start), ids], axis=1)


@torch.no_grad()
def _batches(model: nn.Module, rows: np.ndarray, asked: int, batch: int):  # type: ignore[no-untyped-def]
    """Ids and logits; tokens from `asked` on do not leave."""
    device = next(model.parameters()).device
    for ids in torch.from_numpy(rows).long().split(batch):
        ids = ids.to(device)
        with protect(model, (torch.arange(ids.shape[1], device=device) >= asked).expand_as(ids)):
            logits = model(ids, use_cache=False).logits.float()
        yield ids, logits


def _summary(
    probe: str, load: int, rows: np.ndarray, right: list[torch.Tensor], logp: list[torch.Tensor], chance: float
) -> Recall:
    hits = torch.cat(right).double()
    error = float(hits.std(correction=1) / math.sqrt(len(hits)))
    ids = rows.astype("<i8")
    return Recall(
        probe,
        load,
        len(hits),
        float(hits.mean()),
        error,
        chance,
        float(torch.cat(logp).double().mean()),
        hashlib.sha256(ids.tobytes()).hexdigest(),
        tuple(hits.tolist()),
        tuple(hashlib.sha256(row.tobytes()).hexdigest() for row in ids),
    )


def _generator(seed: int, probe: int, load: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, probe, load]))
