"""summary.json: versioned, typed, and nothing unknown in it."""

import json

import pytest
from pydantic import ValidationError

from ssmcompress.errors import InputError
from ssmcompress.evaluate.evaluation import tell_tasks
from ssmcompress.evaluate.results import Summary, TaskScore, read
from tests.unit.evaluate.folders import LEAST


def test_what_was_not_measured_is_null():
    found = json.loads(Summary(**LEAST).model_dump_json())
    assert found["schema_version"] == 1
    assert found["bits_per_byte"] is None and found["perplexity_interval"] is None and found["recall"] == []


def test_unknown_fields_and_versions_are_refused():
    for wrong in ({"schema_version": 2}, {"bits_per_bite": 1.0}, {"params": "many"}):
        with pytest.raises(ValidationError):
            Summary(**LEAST | wrong)


def test_it_comes_back_from_json():
    made = Summary(**LEAST, bits_per_byte=1.5, bits_per_byte_interval=(1.4, 1.6), recall=({"probe": "copy"},))
    assert Summary.model_validate_json(made.model_dump_json()) == made


def test_a_probe_that_says_too_little_is_refused(tmp_path):
    (tmp_path / "summary.json").write_text(Summary(**LEAST | {"recall": ({"probe": "copy"},)}).model_dump_json())
    (tmp_path / "samples.jsonl").touch()
    with pytest.raises(InputError, match="a memory probe without"):
        read(tmp_path)


def test_only_shares_of_right_answers_have_an_interval():
    told = {
        "task": "t",
        "filter": "none",
        "higher_is_better": True,
        "samples": 20,
        "samples_sha256": "",
        "version": "1",
    }
    scores = [
        TaskScore(metric=metric, value=1.0, standard_error=error, num_fewshot=0, **told)
        for metric, error in (("acc", 0.0), ("acc", None), ("perplexity", 0.5))
    ]
    assert [score.interval for score in scores[1:]] == [None, None]
    low, high = scores[0].interval
    assert 0.8 < low < 0.9 and high == 1
    told = []
    tell_tasks(scores, told.append)
    assert [row[2] for row in told[0].rows] == [f"1.000 [{low:.3f}, 1.000]", "1.000", "1.000 ± 0.5000"]
