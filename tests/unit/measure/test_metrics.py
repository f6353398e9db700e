"""Metrics of written text, and what is written."""

import pytest
import torch

from ssmcompress.checkpoint.source import load
from ssmcompress.measure.metrics import likeness, plain, right
from ssmcompress.measure.writing import written


def test_what_is_word_for_word_like_one_reference_is_perfect():
    texts = ["the cat sat on the mat", "a dog barks at night now"]
    figures = likeness(texts, [["no such thing here at all", texts[0]], [texts[1]]])
    assert [figure.name for figure in figures] == ["BLEU", "chrF2", "ROUGE-L"]
    assert all(figure.value == pytest.approx(100) for figure in figures)


def test_what_is_unlike_is_worth_little_and_the_interval_holds_the_value():
    texts = ["the cat sat on the mat", "a dog barks at night now", "it is all quite wrong", "rain falls on the town"]
    figures = likeness(texts, [["the cat sat on a mat"], ["a dog barks at the moon"], ["none of this"], ["rain falls"]])
    for figure in figures:
        assert 0 < figure.low <= figure.value <= figure.high < 100
    assert likeness(["x y"], [["a b c"]])[0].value < 20


def test_a_share_has_wilsons_interval():
    figure = right([True] * 9 + [False])
    assert (figure.name, figure.value) == ("accuracy", 90)
    assert figure.low == pytest.approx(59.6, abs=0.1) and figure.high == pytest.approx(98.2, abs=0.1)
    assert right([True] * 5).high == pytest.approx(100)


def test_queries_are_alike_but_for_what_does_not_matter():
    assert plain('SELECT  count( * ) FROM t WHERE a = "x" ;') == plain("select count(*) from t where a='x'")
    assert plain("SELECT a FROM t") != plain("SELECT b FROM t")


def test_what_is_written_does_not_depend_on_the_batch():
    checkpoint = load("ref:mamba2", dtype=torch.float32)
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16], [5, 6]]
    alone = [written(checkpoint.model, checkpoint.tokenizer, [each], most=8, batch=1)[0] for each in prompts]
    assert written(checkpoint.model, checkpoint.tokenizer, prompts, most=8, batch=3) == alone
    assert len(set(alone)) > 1
