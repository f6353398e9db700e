"""Numbers and recipes in words."""

import pytest

from ssmcompress.events import size
from ssmcompress.recipe import recipe
from ssmcompress.report import words
from ssmcompress.report.measures import Change, Figure


@pytest.mark.parametrize(
    ("step", "brief", "part"),
    [
        ({"method": "wanda"}, "WANDA 50%", "sets 50% of every projection to zero; scores compete within each tensor"),
        ({"method": "wanda", "scope": "row"}, "WANDA 50% by row", "within each row"),
        ({"method": "wanda", "pattern": "2:4"}, "WANDA 2:4", "keeps 2 of every 4 inputs"),
        ({"method": "sparsegpt", "sparsity": 0.6}, "SparseGPT 60%", "make up for those that go"),
        ({"method": "magnitude", "include": ["in_proj", "conv1d"]}, "Magnitude 50%", "of in_proj and conv1d to zero"),
        ({"method": "magnitude", "exclude": ["x_proj"]}, "Magnitude 50%", "every projection but x_proj"),
        ({"method": "sparsessm"}, "SparseSSM 50%", "SparseSSM makes 50% of the entries of A_log memoryless."),
        (
            {"method": "sparsessm_v2", "pattern": "2:4"},
            "SparseSSM v2 2:4",
            "makes all but 2 of every 4 entries of A_log",
        ),
        ({"method": "magnitude", "include": ["A_log"]}, "Magnitude 50%", "Magnitude makes 50% of the entries of A_log"),
        (
            {"method": "magnitude", "include": ["in_proj", "A_log"]},
            "Magnitude 50%",
            "sets 50% of in_proj to zero; scores compete within each tensor. Magnitude makes 50% of the entries",
        ),
        ({"modules": {"out_proj": 0.3}}, "WANDA 50% and ratios by module", "(out_proj 30%)"),
        ({"axis": "head", "keep": 0.5}, "heads by taylor, 50%", "Of the heads, 50% stay"),
        (
            {"axis": "state", "keep": 12, "scope": "model"},
            "states by ghost, 12 over the whole model",
            "12 over the whole",
        ),
        (
            {"axis": "state", "target": "state=50%"},
            "states by ghost, as many as state=50% allows",
            "state=50% allows stay",
        ),
    ],
)
def test_a_step_in_words(step, brief, part):
    made = recipe(model="m", steps=[{"step": "prune"} | step])
    assert words.brief(made, "prune") == brief
    assert part in words._sentence(made.steps[0])


def test_numbers_in_words():
    assert words.count(2_397_696) == "2.40 million" and words.count(999) == "999"
    assert size(7_458_304) == "7.46 MB" and size(12) == "12 bytes"
    assert words.value(Figure(1.85861, "bits", (1.7825, 1.9706))) == "1.8586 [1.7825, 1.9706]"
    assert words.value(Figure(0.361, "share", (0.345, 0.378))) == "36.1% [34.5%, 37.8%]"
    assert words.value(Figure(48500.6, "plain", None, 66755.4)) == "48,501 ± 66,755"


def test_changes_in_words():
    assert words.change(Change(-0.605, (-0.62, -0.59)), "share") == "−60.5 [−62.0, −59.0]"
    assert words.change(Change(0.0391, (0.0348, 0.045)), "bits") == "+0.0391 [+0.0348, +0.0450]"
    assert words.change(Change(6.206, None), "plain") == "+620.6 %"
    assert words.change(Change(-0.0, (0.0, 0.0001)), "share") == "0.0 [0.0, 0.0]"
