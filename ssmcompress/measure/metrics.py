"""How good written text is: BLEU, chrF and ROUGE-L against references, and shares that are exactly right."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssmcompress.errors import BackendError
from ssmcompress.measure.interval import accuracy_interval

RESAMPLES = 1000


@dataclass(frozen=True)
class Figure:
    """A metric in percent, with its 95 % interval over prompts."""

    name: str
    value: float
    low: float
    high: float


def likeness(written: Sequence[str], references: Sequence[Sequence[str]]) -> list[Figure]:
    """BLEU and chrF of the corpus (sacrebleu), and the mean ROUGE-L (rouge-score) of the best reference of each.

    BackendError where these packages are not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise BackendError(
            f"Text is judged by sacrebleu and rouge-score: {error}.",
            hint="Install them: pip install 'ssmcompress[tune]'.",
        ) from error
    most = max(map(len, references))
    streams = [[each[i] if i < len(each) else None for each in references] for i in range(most)]
    found = [_corpus(metric, list(written), streams) for metric in (BLEU(), CHRF())]
    scorer = RougeScorer(["rougeL"])
    pairs = zip(references, written, strict=True)
    values = np.array([100 * scorer.score_multi(list(each), text)["rougeL"].fmeasure for each, text in pairs])
    draws = np.random.Generator(np.random.PCG64(0)).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return [*found, Figure("ROUGE-L", float(values.mean()), float(low), float(high))]


def right(hits: Sequence[bool], name: str = "accuracy") -> Figure:
    """The share of hits, with Wilson's interval."""
    share = sum(hits) / len(hits)
    error = (share * (1 - share) / max(1, len(hits) - 1)) ** 0.5
    low, high = accuracy_interval(share, error, len(hits))
    return Figure(name, 100 * share, 100 * low, 100 * high)


def plain(query: str) -> str:
    """A query without what does not matter: case, blanks, the kind of quotes and a semicolon at its end."""
    spaced = re.sub(r"\s+", " ", query.replace('"', "'").lower()).strip().rstrip(";").strip()
    return re.sub(r"\s*([(),=<>!]+)\s*", r"\1", spaced)


def _corpus(metric: Any, written: list[str], streams: list[list[str | None]]) -> Figure:
    """The score of a corpus, with a bootstrap interval over its prompts from sacrebleu's own sums of each."""
    sums = np.array(metric._extract_corpus_statistics(written, streams), dtype=np.float64)
    draws = np.random.Generator(np.random.PCG64(0)).integers(len(sums), size=(RESAMPLES, len(sums)))
    found = metric.corpus_score(written, streams)
    scores = [float(metric._compute_score_from_stats(sums[draw].sum(0).tolist()).score) for draw in draws]
    low, high = np.percentile(scores, [2.5, 97.5])
    return Figure(
        found.name, float(found.score), min(float(low), float(found.score)), max(float(high), float(found.score))
    )
