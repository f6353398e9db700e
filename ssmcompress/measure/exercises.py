"""Memory exercises as token ids: copying (Jelassi et al., 2024) and looking up values by key (Arora et al., 2024)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssmcompress.errors import UnsupportedError

WORDS = 512
KEYS = 64
VALUES = 64
MOST_PAIRS = 10
MOST_COPIED = 24


@dataclass(frozen=True)
class Vocabulary:
    """Frequent words that are one token with their leading space, and the marks between them."""

    words: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    equals: int
    newline: int
    start: int  # end-of-text: what stands before every document

    @classmethod
    def of(cls, tokenizer: Any) -> "Vocabulary":
        """The vocabulary of a byte-level BPE tokenizer: the first words it learned, most frequent first.

        Raises UnsupportedError where the tokenizer knows too few whole words.
        """
        ranked = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        words = np.array([index for token, index in ranked if re.fullmatch("Ġ[a-z]{3,}", token)][:WORDS])
        if len(words) < KEYS + VALUES:
            raise UnsupportedError(
                f"The tokenizer has {len(words)} whole words; the memory exercises need {KEYS + VALUES}.",
                hint="Memory can be measured with byte-level BPE tokenizers of a few thousand entries or more.",
            )
        if tokenizer.eos_token_id is None:
            raise UnsupportedError(
                "The tokenizer has no end-of-text token, with which every memory exercise begins.",
                hint="Set eos_token in its tokenizer_config.json.",
            )
        equals, newline = (tokenizer.encode(mark, add_special_tokens=False)[-1] for mark in (" =", "\n"))
        values = words[KEYS : KEYS + VALUES]
        return cls(words, words[:KEYS], values, equals, newline, tokenizer.eos_token_id)


@dataclass(frozen=True)
class Exercise:
    """Token ids, and which of them follow from what stands before."""

    ids: np.ndarray
    answers: np.ndarray


def copying(vocabulary: Vocabulary, length: int, rng: np.random.Generator, words: int = WORDS) -> Exercise:
    """`w₁ … wₙ = w₁ … wₙ ⏎` over the first `words` words: 2·length + 2 tokens."""
    drawn = rng.choice(vocabulary.words[:words], length)
    ids = np.concatenate([drawn, [vocabulary.equals], drawn, [vocabulary.newline]])
    return Exercise(ids, np.arange(len(ids)) > length)


def key_value(
    vocabulary: Vocabulary,
    pairs: int,
    queries: int,
    rng: np.random.Generator,
    keys: int = KEYS,
    last_first: bool = False,
) -> Exercise:
    """`k₁ v₁ ⏎ … kₙ vₙ ⏎ = ⏎`, then `k v ⏎` for each query: 3·(pairs + queries) + 2 tokens.

    Keys and values are drawn without replacement from the first `keys` of each. The first query is never the last pair,
    which a short memory would find, unless `last_first` allows it.
    """
    key = rng.choice(vocabulary.keys[:keys], pairs, replace=False)
    value = rng.choice(vocabulary.values[:keys], pairs, replace=False)
    asked = rng.integers(0, pairs, queries)
    if not last_first:
        asked[:1] = rng.integers(0, max(pairs - 1, 1))

    def lines(order: np.ndarray) -> np.ndarray:
        return np.stack([key[order], value[order], np.full(len(order), vocabulary.newline)], axis=1).ravel()

    ids = np.concatenate([lines(np.arange(pairs)), [vocabulary.equals, vocabulary.newline], lines(asked)])
    place = np.arange(len(ids)) - (3 * pairs + 2)
    return Exercise(ids, (place >= 0) & (place % 3 == 1))


def stream(vocabulary: Vocabulary, seed: int) -> Iterator[Exercise]:
    """An endless mixture of exercises of all loads, for calibration; never the seeds of the probes."""
    rng = np.random.Generator(np.random.PCG64([seed, 0x7E57]))
    while True:
        if rng.random() < 0.5:
            yield copying(vocabulary, int(rng.integers(4, MOST_COPIED + 1)), rng)
        else:
            pairs = int(rng.integers(2, MOST_PAIRS + 1))
            yield key_value(vocabulary, pairs, 2 * pairs, rng)


def exercise_documents(tokenizer: Any, count: int, seed: int) -> list[str]:
    """Exercises as text, to be mixed into calibration: one a document."""
    made = stream(Vocabulary.of(tokenizer), seed)
    return [tokenizer.decode(next(made).ids) for _ in range(count)]
