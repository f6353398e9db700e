import math

import numpy as np
import pytest
import torch

from ssmcompress.errors import InputError
from ssmcompress.evaluate.evaluation import tell_perplexity
from ssmcompress.events import Note
from ssmcompress.measure import perplexity as module
from ssmcompress.measure.perplexity import paired_difference, perplexity, summarise
from tests.unit.measure.fakes import TOKENIZER, VOCABULARY, Seer

TEXTS = [
    "It was the best of times, it was the worst of times.",
    "Call me Ishmael. Some years ago – never mind how long.",
    "a",
]


def test_a_uniform_model_pays_the_vocabulary_for_every_token():
    found = perplexity(Seer(0.0), TOKENIZER, TEXTS, length=8)
    counts = [len(TOKENIZER.encode(text, add_special_tokens=False)) for text in TEXTS]
    assert [d.tokens for d in found.documents] == counts
    assert [d.bytes for d in found.documents] == [len(text.encode()) for text in TEXTS]
    assert found.perplexity == pytest.approx(VOCABULARY, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(sum(counts) * 12 / sum(len(t.encode()) for t in TEXTS), rel=1e-6)


@pytest.mark.parametrize("length", [1, 3, 8, 512])
def test_every_token_is_scored_once_whatever_the_windows(length):
    lead = 7.0
    unknown, known = math.log(VOCABULARY), math.log(math.exp(lead) + VOCABULARY - 1) - lead
    found = perplexity(Seer(lead), TOKENIZER, TEXTS, length=length, batch=2)
    for document in found.documents:
        # the fake sees one token ahead, so only the last token of a window is a surprise
        windows = -(-document.tokens // length)
        assert document.nats == pytest.approx(windows * unknown + (document.tokens - windows) * known, rel=1e-5)


def test_scores_do_not_depend_on_batch_or_order():
    model = Noisy()
    whole = perplexity(model, TOKENIZER, TEXTS, length=6, batch=8)
    single = perplexity(model, TOKENIZER, TEXTS[::-1], length=6, batch=1)
    assert [d.nats for d in whole.documents] == pytest.approx([d.nats for d in single.documents[::-1]], rel=1e-6)


class Noisy(Seer):
    """Logits that depend on the token alone."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))

    def forward(self, ids, **_):
        found = super().forward(ids)
        found.logits = self.table[ids]
        return found


def test_the_interval_holds_the_figure_and_repeats_with_its_seed():
    found = perplexity(Noisy(), TOKENIZER, [word * 9 for text in TEXTS for word in text.split()], length=16)
    low, high = found.bits_per_byte_interval
    assert low < found.bits_per_byte < high
    assert summarise(found.documents, 16) == found
    assert summarise(found.documents, 16, seed=1).bits_per_byte_interval != found.bits_per_byte_interval


def test_one_document_has_no_interval():
    told = []
    found = perplexity(Noisy(), TOKENIZER, TEXTS[:1], length=16, emit=told.append)
    assert (found.bits_per_byte_interval, found.perplexity_interval) == (None, None)
    assert Note("One document: no interval.", "warning") in told
    told.clear()
    tell_perplexity(found, told.append)
    assert [(event.name, event.low, event.high) for event in told] == [
        ("bits per byte", None, None),
        ("token perplexity", None, None),
    ]


def test_a_paired_difference_sees_what_the_intervals_hide():
    dense = perplexity(Noisy(), TOKENIZER, TEXTS * 4, length=16).documents
    worse = [type(d)(d.nats * 1.01, d.tokens, d.bytes, d.sha256) for d in dense]
    difference, low, high = paired_difference(dense, worse)
    assert 0 < low <= difference <= high
    spread = np.ptp(summarise(dense, 16).bits_per_byte_interval)
    assert difference < spread


def test_results_on_different_texts_are_not_compared():
    a = perplexity(Seer(0.0), TOKENIZER, TEXTS[:2]).documents
    b = perplexity(Seer(0.0), TOKENIZER, TEXTS[1:]).documents
    with pytest.raises(InputError, match="same documents"):
        paired_difference(a, b)


def test_a_text_without_tokens_is_refused():
    with pytest.raises(InputError, match="no token"):
        perplexity(Seer(0.0), TOKENIZER, [""])


def test_resampling_in_parts_draws_the_same(monkeypatch):
    table = np.random.default_rng(0).random((37, 3))
    whole = module._resample(table, 5)
    monkeypatch.setattr(module, "CHUNK", 37 * 3)
    assert np.array_equal(module._resample(table, 5), whole) and whole.shape == (module.RESAMPLES, 3)
