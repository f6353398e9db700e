"""What `make regress` says of a run beside its baseline."""

import copy
import json
import math

import numpy as np
import pytest

from evals import regress
from ssmcompress.evaluate.compare import Samples, differences
from ssmcompress.recipes import read, shipped

BASELINES = sorted(regress.BASELINES.glob("*.json"))


@pytest.fixture(params=BASELINES, ids=lambda path: path.stem)
def baseline(request):
    return json.loads(request.param.read_text())


def test_there_is_a_baseline_for_every_run():
    wanted = {
        f"{model.removeprefix('ref:')}-{name.rpartition('/')[2]}"
        for model in regress.MODELS
        for name in regress.RECIPES
    }
    assert {path.stem for path in BASELINES} == wanted
    assert set(regress.RECIPES) == {name for name in shipped() if name.startswith("smoke/")}


def test_a_baseline_is_of_the_recipe_as_it_is(baseline):
    recipe = read(baseline["recipe"], [f"model={baseline['model']}"])
    assert baseline["provenance"]["recipe_sha256"] == recipe.sha256(), "run: make rebase"


def test_the_same_again_passes(baseline):
    rows, failed = regress.judged(baseline, copy.deepcopy(baseline))
    assert not failed and {row[-1] for row in rows} <= {"passes", "not measurable"}


def test_what_got_worse_is_named(baseline):
    now = copy.deepcopy(baseline)
    text = now["measures"]["text/bits_per_byte"]
    text["values"] = [1.05 * value for value in text["values"]]
    _, failed = regress.judged(baseline, now)
    assert len(failed) == 1 and failed[0].startswith("text/bits_per_byte lost 0.05")


def test_a_loss_of_a_fifth_is_caught_on_every_likelihood(baseline):
    for name, kept in baseline["measures"].items():
        assert 0 < kept["tolerance"] <= regress.WIDEST
        if kept["kind"] == "log_likelihood":
            now = copy.deepcopy(baseline)
            worse = math.log(1.2) if name.endswith("perplexity") else 0.2 * kept["figure"]
            weights = kept["weights"] * (1 if len(kept["weights"]) > 1 else len(kept["values"]))
            pairs = zip(kept["values"], weights, strict=True)
            now["measures"][name]["values"] = [value + worse * weight for value, weight in pairs]
            assert any(name in each for each in regress.judged(baseline, now)[1]), name


def test_what_so_few_items_cannot_tell_is_undecided(baseline):
    now = copy.deepcopy(baseline)
    lambada = now["measures"]["lambada_openai_local/perplexity"]
    lambada["values"] = [value + 9 * (-1) ** i for i, value in enumerate(lambada["values"])]
    rows, failed = regress.judged(baseline, now)
    assert not failed
    assert {row[0]: row[-1] for row in rows}["lambada_openai_local/perplexity"] == "undecided"


def test_a_tolerance_is_never_wider_than_a_tenth():
    rng = np.random.default_rng(0)

    def tolerance(kind, items, spread):
        values = rng.integers(0, 2, items).astype(float) if kind == "accuracy" else rng.normal(9, 1, items)
        sides = [
            Samples("a/perplexity", kind, tuple("x" * items), each, np.ones(items))
            for each in (values, values + spread * rng.normal(size=items))
        ]
        return regress._tolerance(*differences(sides[:1], sides[1:]))

    assert tolerance("log_likelihood", 12, 2.0) == tolerance("log_likelihood", 1, 2.0) == regress.WIDEST
    assert 0.001 < tolerance("log_likelihood", 100, 0.03) < 0.02
    assert tolerance("accuracy", 100, 0.0) == 0.01


def test_what_got_better_passes(baseline):
    now = copy.deepcopy(baseline)
    text = now["measures"]["text/bits_per_byte"]
    text["values"] = [0.9 * value for value in text["values"]]
    assert not regress.judged(baseline, now)[1]


def test_what_cannot_be_compared_fails(baseline):
    now = copy.deepcopy(baseline)
    now["exact"]["sparsity"] = 0.1
    now["measures"]["recall/copy-8"]["items_sha256"] = "0"
    del now["measures"]["recall/copy-12"]
    failed = regress.judged(baseline, now)[1]
    assert [words in " ".join(failed) for words in ("sparsity was", "other items", "measured no more")] == [True] * 3
