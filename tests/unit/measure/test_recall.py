import math

import numpy as np
import pytest
import torch

from ssmcompress.measure.exercises import Vocabulary
from ssmcompress.measure.recall import Recall, copy_probe, key_value_probe, recall
from tests.unit.measure.fakes import TOKENIZER, VOCABULARY, Forgetful, Seer

WORDS = Vocabulary.of(TOKENIZER)


def test_a_model_that_knows_scores_one_and_its_log_probability():
    lead = 9.0
    expected = lead - math.log(math.exp(lead) + VOCABULARY - 1)
    for probe in (copy_probe(Seer(lead), WORDS, 8, 16, 0), key_value_probe(Seer(lead), WORDS, 4, 16, 0)):
        assert probe.accuracy == 1 and probe.standard_error == 0
        assert probe.log_probability == pytest.approx(expected, rel=1e-4)
        assert probe.measurable


def test_a_model_that_says_nothing_scores_nothing():
    assert copy_probe(Seer(0.0), WORDS, 8, 16, 0).accuracy == 0
    found = key_value_probe(Seer(0.0), WORDS, 4, 16, 0)
    assert found.accuracy == 0, "a tie between all values is no answer"
    assert not found.measurable


def test_wrong_answers_are_counted_per_item():
    found = copy_probe(Forgetful(9.0), WORDS, 6, 64, 3)
    rng = np.random.Generator(np.random.PCG64([3, 1, 6]))
    first = np.array([rng.choice(WORDS.words, 6)[0] for _ in range(64)])
    share = float((first % 2 == 1).mean())
    assert 0 < share < 1
    assert found.accuracy == pytest.approx(share)
    assert found.standard_error == pytest.approx(math.sqrt(share * (1 - share) / 63), rel=1e-6)


def test_items_depend_on_the_seed_alone():
    a, b = (key_value_probe(Seer(1.0), WORDS, 4, 32, seed=5, batch=batch) for batch in (32, 7))
    assert a == b
    assert a.items_sha256 != key_value_probe(Seer(1.0), WORDS, 4, 32, seed=6).items_sha256


def test_all_loads_are_probed():
    found = [(probe.probe, probe.load, probe.items) for probe in recall(Seer(1.0), TOKENIZER, items=8)]
    assert found == [("copy", n, 2) for n in (8, 12, 16, 20)] + [("key-value", n, 8) for n in (2, 4, 8)]


@pytest.mark.parametrize(
    ("accuracy", "error", "measurable"), [(0.4, 0.03, True), (0.3, 0.02, False), (0.25, 0.0, False)]
)
def test_below_four_standard_errors_above_chance_nothing_is_measured(accuracy, error, measurable):
    assert Recall("key-value", 4, 512, accuracy, error, 0.25, -1.0, "").measurable == measurable


def test_probing_keeps_no_gradients():
    torch.set_grad_enabled(True)
    model = Seer(1.0)
    copy_probe(model, WORDS, 4, 4, 0)
    assert model.lead.grad is None and torch.is_grad_enabled()
