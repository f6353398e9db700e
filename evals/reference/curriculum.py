"""Exercises that grow harder as the model learns: few words and short lists first, more once nine in ten are right."""

from dataclasses import dataclass, field

import numpy as np

from ssmcompress.measure.exercises import Exercise, Vocabulary, copying, key_value

RECALL = ((4, 2), (8, 3), (16, 4), (32, 6), (64, 8), (64, 10))  # keys, most pairs
COPYING = ((16, 3), (32, 5), (64, 8), (128, 12), (512, 16), (512, 24))  # words, longest
PASSED = 0.92
SMOOTHING = 0.95
TEXT, LOOKED_UP, COPIED = 0, 1, 2  # what a scored position is


@dataclass
class Curriculum:
    """The level of each kind of exercise and a running accuracy at it; both belong to the training state."""

    levels: list[int] = field(default_factory=lambda: [0, 0])
    accuracy: list[float] = field(default_factory=lambda: [0.0, 0.0])

    @property
    def finished(self) -> bool:
        """Whether both kinds are at their last level and passed there."""
        last = [len(RECALL) - 1, len(COPYING) - 1]
        return self.levels == last and min(self.accuracy) > PASSED

    def graded(self, kind: int, accuracy: float) -> None:
        """Takes in one batch's accuracy of LOOKED_UP or COPIED answers and moves on where the level is passed."""
        place, table = (0, RECALL) if kind == LOOKED_UP else (1, COPYING)
        self.accuracy[place] = SMOOTHING * self.accuracy[place] + (1 - SMOOTHING) * accuracy
        if self.accuracy[place] > PASSED and self.levels[place] < len(table) - 1:
            self.levels[place] += 1
            self.accuracy[place] = 0.5

    def row(self, vocabulary: Vocabulary, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Exercises packed, end-of-text between them: length + 1 ids, and the kind of each answer (else 0)."""
        ids, kinds = [0], [0]
        while len(ids) <= length:
            kind = LOOKED_UP if rng.random() < 0.6 else COPIED
            exercise = self._exercise(kind, vocabulary, rng)
            ids += [*exercise.ids.tolist(), 0]
            kinds += [*(exercise.answers * kind).tolist(), 0]
        return np.array(ids[: length + 1]), np.array(kinds[: length + 1])

    def _exercise(self, kind: int, vocabulary: Vocabulary, rng: np.random.Generator) -> Exercise:
        top = self.levels[0 if kind == LOOKED_UP else 1]
        level = top if rng.random() < 0.7 else int(rng.integers(0, top + 1))
        if kind == LOOKED_UP:
            keys, most = RECALL[level]
            pairs = int(rng.integers(max(2, most // 3), most + 1))
            return key_value(vocabulary, pairs, 3 * pairs, rng, keys, last_first=True)
        words, longest = COPYING[level]
        return copying(vocabulary, int(rng.integers(max(2, longest // 3), longest + 1)), rng, words)
