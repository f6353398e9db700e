"""Figures and items from what lm-eval returns."""

import math

import pytest

from ssmcompress.errors import UnsupportedError
from ssmcompress.evaluate.scores import scored
from ssmcompress.evaluate.suites import Entry


def returned(values, figure, error="N/A", *, metric="acc", options=4, kind="multiple_choice"):
    """What lm-eval returns of one task with these values an item."""
    rows = [
        {
            "filter": "none",
            "arguments": [("question", "answer")] * options,
            "metrics": [metric],
            "doc_hash": str(i),
            "prompt_hash": "p",
            "target_hash": "t",
            metric: value,
        }
        for i, value in enumerate(values)
    ]
    return {
        "samples": {"task": rows},
        "results": {"task": {"name": "task", f"{metric},none": figure, f"{metric}_stderr,none": error}},
        "configs": {"task": {"output_type": kind}},
        "higher_is_better": {"task": {metric: True}},
        "versions": {"task": 1.0},
        "n-shot": {"task": 0},
    }


@pytest.mark.parametrize(
    ("right", "measurable"),
    [(25, False), (40, False), (44, False), (46, True), (100, True)],  # 0.25 + 4 √(0.46 · 0.54 / 99) = 0.45
)
def test_a_level_below_four_standard_errors_above_chance_is_not_measurable(right, measurable):
    values = [1.0] * right + [0.0] * (100 - right)
    error = math.sqrt(right / 100 * (1 - right / 100) / 99)
    (score,) = scored(returned(values, right / 100, error), Entry(task="task")).scores
    assert (score.chance, score.measurable) == (0.25, measurable)
    assert score.standard_error == error


def test_one_item_measures_nothing():
    (score,) = scored(returned([1.0], 1.0), Entry(task="task")).scores
    assert score.standard_error is None and not score.measurable


def test_where_chance_is_not_known_a_level_counts():
    (score,) = scored(returned([0.0, 1.0], 0.5, 0.5, kind="generate_until"), Entry(task="task")).scores
    assert score.chance is None and score.measurable


@pytest.mark.parametrize(
    ("values", "figure", "kind", "pairs"),
    [
        ([1, 0, True], 2 / 3, "accuracy", [(1, 1), (0, 1), (1, 1)]),
        ([-2.0, -4.0], math.exp(3), "log_likelihood", [(2, 1), (4, 1)]),
        ([(-6.0, 2), (-2.0, 6)], math.e, "log_likelihood", [(6, 2), (2, 6)]),
        ([(-6.0, 2), (-2.0, 6)], 1 / math.log(2), "log_likelihood", [(6 / math.log(2), 2), (2 / math.log(2), 6)]),
    ],
)
def test_items_are_those_whose_ratio_is_the_figure(values, figure, kind, pairs):
    items = scored(returned(values, figure, metric="m"), Entry(task="task")).items
    assert [item.kind for item in items] == [kind] * len(values)
    assert [(item.value, item.weight) for item in items] == [pytest.approx(pair) for pair in pairs]
    assert len({item.item for item in items}) == len(items) and items[0].measure == "task/m"


def test_a_mean_of_which_less_is_better_is_a_cost():
    found = returned([1, 0], 0.5, metric="pct_stereotype")
    found["higher_is_better"]["task"] = {"pct_stereotype": False}
    assert [item.kind for item in scored(found, Entry(task="task")).items] == ["cost", "cost"]


def test_a_figure_that_is_no_mean_of_items_has_none():
    found = scored(returned([1.0, 0.0], 0.9, metric="f1"), Entry(task="task"))
    assert found.items == () and found.scores[0].value == 0.9


def test_a_task_without_a_score_is_refused():
    empty = returned([1.0], 1.0)
    empty["results"]["task"] = {"name": "task"}
    with pytest.raises(UnsupportedError, match="no score"):
        scored(empty, Entry(task="task"))
