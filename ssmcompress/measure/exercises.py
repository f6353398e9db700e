"""Memory exercises as token ids: copying word sequences and looking up values by key (Jelassi et al., 2024; Arora et al., 2024)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

WORDS = 512
KEYS = 64
VALUES = 64


@dataclass(frozen=True)
class Vocabulary:
    """Frequent words that are one token with their leading space, and the marks between them."""

    words: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    equals: int
    newline: int

    @classmethod
    def of(cls, tokenizer: Any) -> "Vocabulary":
        """The vocabulary of a byte-level BPE tokenizer: the first words it learned, most frequent first."""
        ranked = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        words = np.array([index for token, index in ranked if re.fullmatch("Ġ[a-z]{3,}", token)][:WORDS])
        if len(words) < KEYS + VALUES:
            raise ValueError(f"the tokenizer has {len(words)} whole words, {KEYS + VALUES} are needed")
        marks = [tokenizer.encode(mark, add_special_tokens=False) for mark in (" =", "\n")]
        return cls(words, words[:KEYS], words[KEYS : KEYS + VALUES], *(ids[-1] for ids in marks))

    def narrowed(self, words: int, keys: int) -> "Vocabulary":
        """The same with its first words, keys and values only."""
        return Vocabulary(self.words[:words], self.keys[:keys], self.values[:keys], self.equals, self.newline)


@dataclass(frozen=True)
class Exercise:
    """Token ids, and which of them follow from what stands before."""

    ids: np.ndarray
    answers: np.ndarray


def copying(vocabulary: Vocabulary, length: int, rng: np.random.Generator) -> Exercise:
    """`w₁ … wₙ = w₁ … wₙ ⏎`: 2·length + 2 tokens."""
    words = rng.choice(vocabulary.words, length)
    ids = np.concatenate([words, [vocabulary.equals], words, [vocabulary.newline]])
    return Exercise(ids, np.arange(len(ids)) > length)


def key_value(vocabulary: Vocabulary, pairs: int, queries: int, rng: np.random.Generator) -> Exercise:
    """`k₁ v₁ ⏎ … kₙ vₙ ⏎ = ⏎`, then `k v ⏎` for each query: 3·(pairs + queries) + 2 tokens.

    Every key is asked for before one is asked again, and the first query is never the last pair.
    """
    keys = rng.choice(vocabulary.keys, pairs, replace=False)
    values = rng.choice(vocabulary.values, pairs, replace=False)
    rounds = [rng.permutation(pairs) for _ in range(-(-queries // pairs))]
    if pairs > 1 and rounds[0][0] == pairs - 1:
        rounds[0] = np.roll(rounds[0], -1)
    asked = np.concatenate(rounds)[:queries]

    def lines(order: np.ndarray) -> np.ndarray:
        return np.stack([keys[order], values[order], np.full(len(order), vocabulary.newline)], axis=1).ravel()

    ids = np.concatenate([lines(np.arange(pairs)), [vocabulary.equals, vocabulary.newline], lines(asked)])
    place = np.arange(len(ids)) - (3 * pairs + 2)
    return Exercise(ids, (place >= 0) & (place % 3 == 1))


def stream(vocabulary: Vocabulary, seed: int, longest: int = 24) -> Iterator[Exercise]:
    """An endless mixture: copies of 3 to `longest` words, lists of 2 to `longest` / 3 pairs; never the seeds of the probes."""
    rng = np.random.Generator(np.random.PCG64([seed, 0x7E57]))
    while True:
        if rng.random() < 0.5:
            yield copying(vocabulary, int(rng.integers(3, longest + 1)), rng)
        else:
            pairs = int(rng.integers(2, longest // 3 + 1))
            yield key_value(vocabulary, pairs, 2 * pairs, rng)


def documents(tokenizer: Any, count: int, seed: int) -> list[str]:
    """Exercises as text, to be mixed into calibration."""
    made = stream(Vocabulary.of(tokenizer), seed)
    return [tokenizer.decode(next(made).ids) for _ in range(count)]
