"""summary.json: versioned, typed, and nothing unknown in it."""

import json
import math

import numpy as np
import pytest
from pydantic import ValidationError

from ssmcompress.errors import InputError
from ssmcompress.evaluate.evaluation import tell_tasks
from ssmcompress.evaluate.results import Summary, TaskScore, documents, read
from tests.unit.evaluate.folders import LEAST, results


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


ACC = {"task/acc": np.array([1.0, 0.0, 1.0])}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: lines[:2], "2 items of task/acc, and summary.json tells of 3"),
        (lambda lines: [*lines, "{"], "line 4: Invalid JSON"),
        (lambda lines: [lines[0].replace('"weight": 1.0', '"weight": -1.0'), *lines[1:]], "weights of task/acc"),
        (lambda lines: [line.replace('"weight": 1.0', '"weight": 0') for line in lines], "weights of task/acc"),
        (lambda lines: [*lines[:2], lines[2].replace('"weight": 1.0', '"weight": NaN')], "weights of task/acc"),
        (lambda lines: [*lines[:2], lines[2].replace('"weight": 1.0', '"weight": Infinity')], "weights of task/acc"),
        (lambda lines: [lines[0].replace('"value"', '"valu"'), *lines[1:]], "line 1: value: Field required"),
    ],
)
def test_damaged_items_are_refused_and_named(tmp_path, change, said):
    path = tmp_path / "samples.jsonl"
    results(tmp_path, ACC)
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    with pytest.raises(InputError, match=said):
        read(tmp_path)


def test_a_damaged_summary_is_refused_and_named(tmp_path):
    results(tmp_path, ACC)
    whole = (tmp_path / "summary.json").read_text()
    (tmp_path / "summary.json").write_text(whole.replace('"schema_version":1', '"schema_version":2'))
    with pytest.raises(InputError, match=r"summary.json cannot be read: schema_version: Input should be 1"):
        read(tmp_path)
    (tmp_path / "summary.json").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"summary.json cannot be read: it is not text"):
        read(tmp_path)


@pytest.mark.parametrize(("value", "figure"), [(math.exp(3), math.exp(3)), (3.0, 3.0)])
@pytest.mark.parametrize("name", ["ppl", "perplexity,strict"])
def test_a_perplexity_is_one_whatever_its_name(tmp_path, name, value, figure):
    results(tmp_path, {f"t/acc_{name}": np.array([2.0, 4.0])}, task={"value": value})
    lines = (tmp_path / "samples.jsonl").read_text()
    (tmp_path / "samples.jsonl").write_text(lines.replace('"accuracy"', '"log_likelihood"'))
    [samples] = read(tmp_path).samples.values()
    assert samples.figure == pytest.approx(figure)


def test_documents_come_back_from_their_items(tmp_path):
    text = {"text/bits_per_byte": np.array([8.0, 16.0])}
    results(tmp_path, text | ACC, weights={"text/bits_per_byte": np.array([4.0, 5.0])})
    found = documents(tmp_path)
    assert [document.nats for document in found] == pytest.approx([8 * math.log(2), 16 * math.log(2)])
    assert [document.bytes for document in found] == [4, 5]
