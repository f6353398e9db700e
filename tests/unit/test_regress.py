"""What `make regress` says of a run beside its baseline."""

import copy
import json

import pytest

from evals import regress
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
