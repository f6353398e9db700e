"""The figures of a model and its changes are those of the files, with intervals that hold what they say."""

import numpy as np
import pytest

from ssmcompress.evaluate import results
from ssmcompress.evaluate.compare import differences
from ssmcompress.report.checkpoints import read
from ssmcompress.report.measures import figures
from ssmcompress.report.words import change
from tests.unit.report import outputs


@pytest.fixture
def pair(models, tmp_path):
    """Evaluations of the dense model and of the one pruned by WANDA, and their folders."""
    wanda = models["wanda"]
    outputs.measured(wanda)
    dense = outputs.evaluation(tmp_path / "r0", outputs.source_of(wanda), "source")
    other = outputs.evaluation(tmp_path / "r1", outputs.weights_of(wanda), "w", loss=0.05, accuracy=0.6)
    return *read([wanda, dense, other]), dense, other


def named(found, name):
    return next(figure for measure, figure in found.items() if measure.name == name)


def test_changes_are_those_that_compare_tells(pair):
    _, pruned, dense, other = pair
    found = figures(pruned)
    a, b = results.read(dense), results.read(other)
    names = list(b.samples)
    expected = differences([a.samples[name] for name in names], [b.samples[name] for name in names])
    accuracy = next(each for each in expected if each.measure == "arc_easy_local/acc")
    change = named(found, "arc_easy_local acc").change
    assert (change.value, change.interval, change.verdict) == (accuracy.change, accuracy.interval, "worse")


def test_the_change_of_a_plain_score_is_told_in_its_own_unit(models, pair):
    *_, dense, other = pair
    for folder in (dense, other):
        for name in ("summary.json", "samples.jsonl"):
            told = (folder / name).read_text().replace('"metric":"acc"', '"metric":"bleu"')
            (folder / name).write_text(told.replace("arc_easy_local/acc", "arc_easy_local/bleu"))
    figure = named(figures(read([models["wanda"], dense, other])[1]), "arc_easy_local bleu")
    assert figure.change.value == pytest.approx(-0.2)
    assert change(figure.change, figure.unit).startswith("−0.2000 [")


def test_the_change_in_bits_per_byte_is_absolute_and_paired(pair):
    dense, pruned, *_ = pair
    figure = named(figures(pruned), "bits per byte")
    before = named(figures(dense), "bits per byte")
    assert figure.change.value == pytest.approx(figure.value - before.value) == pytest.approx(0.05)
    low, high = figure.change.interval
    assert low <= figure.change.value <= high and high - low < 0.01 < figure.interval[1] - figure.interval[0]


def test_the_look_of_a_run_is_kept_apart(pair):
    dense, pruned, *_ = pair
    name = "bits per byte, quick look"
    assert named(figures(pruned), name).change.value == pytest.approx(0.7 * 0.1 / np.log(2), rel=1e-6)
    assert named(figures(dense), name).change is None


def test_other_items_are_not_paired(models, tmp_path):
    wanda = models["wanda"]
    dense = outputs.evaluation(tmp_path / "r0", outputs.source_of(wanda), "source")
    other = outputs.evaluation(tmp_path / "r1", outputs.weights_of(wanda), "w")
    samples = (other / "samples.jsonl").read_text().replace('"item":"q', '"item":"another')
    (other / "samples.jsonl").write_text(samples)
    found = figures(read([wanda, dense, other])[1])
    assert named(found, "arc_easy_local acc").change is None
    assert named(found, "bits per byte").change.value == 0.0


def test_one_document_has_no_interval(models, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "DOCUMENTS", 1)
    wanda = models["wanda"]
    dense = outputs.evaluation(tmp_path / "r0", outputs.source_of(wanda), "source")
    other = outputs.evaluation(tmp_path / "r1", outputs.weights_of(wanda), "w", loss=0.05)
    found = figures(read([wanda, dense, other])[1])
    figure = named(found, "bits per byte")
    assert figure.interval is None and figure.change.interval is None and figure.change.value == pytest.approx(0.05)
    assert next(each.about for each in found if each.name == "bits per byte").startswith("1 document of")
