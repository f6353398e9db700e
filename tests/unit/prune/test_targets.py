"""Which modules a step touches, by how much, and what is refused."""

import pytest

from ssmcompress.arch.registry import arch_for
from ssmcompress.errors import InputError, UnsupportedError
from ssmcompress.prune.targets import Target, targets, written_out
from ssmcompress.recipe import recipe
from ssmcompress.recipes import parse
from ssmcompress.steps import Prune
from tests.unit.arch.models import CONFIGS

MAMBA, MAMBA2 = arch_for(CONFIGS["mamba"]), arch_for(CONFIGS["mamba2"])


def test_the_projections_are_the_default():
    assert list(targets(MAMBA, Prune())) == ["in_proj", "x_proj", "dt_proj", "out_proj"]
    assert list(targets(MAMBA2, Prune())) == ["in_proj", "out_proj"]
    assert set(targets(MAMBA, Prune()).values()) == {Target(0.5, None, "tensor")}
    assert set(targets(MAMBA, Prune(scope="row")).values()) == {Target(0.5, None, "row")}


def test_the_scope_may_be_said_by_module():
    found = targets(MAMBA, Prune(scope={"in_proj": "row", "out_proj": "tensor"}))
    assert {name: target.scope for name, target in found.items()} == {
        "in_proj": "row",
        "x_proj": "tensor",
        "dt_proj": "tensor",
        "out_proj": "tensor",
    }
    with pytest.raises(InputError, match="'outproj'"):
        targets(MAMBA, Prune(scope={"outproj": "row"}))


def test_include_is_all_there_is_and_exclude_takes_from_it():
    assert list(targets(MAMBA, Prune(include=("out_proj", "conv1d")))) == ["conv1d", "out_proj"]
    assert list(targets(MAMBA, Prune(exclude=("x_proj", "dt_proj")))) == ["in_proj", "out_proj"]
    assert list(targets(MAMBA, Prune(include=("in_proj", "x_proj"), exclude=("x_proj",)))) == ["in_proj"]


def test_ratios_by_module_add_it_to_the_default():
    found = targets(MAMBA2, Prune(sparsity=0.3, modules={"conv1d": 0.1, "out_proj": 0.7}))
    assert {name: target.sparsity for name, target in found.items()} == {"in_proj": 0.3, "conv1d": 0.1, "out_proj": 0.7}


def test_scopes_by_method():
    assert targets(MAMBA, Prune(method="magnitude"))["in_proj"].scope == "tensor"
    assert targets(MAMBA, Prune(method="magnitude", scope="row"))["in_proj"].scope == "row"
    assert targets(MAMBA, Prune(method="wanda", scope="tensor"))["in_proj"].scope == "tensor"
    # four taps of a channel are too few to rank among themselves
    assert targets(MAMBA, Prune(include=("conv1d",), scope="row"))["conv1d"].scope == "tensor"


HEAD = {"include": ["in_proj", "lm_head"]}


@pytest.mark.parametrize(
    ("step", "scope"),
    [
        ({}, "tensor"),
        ({"method": "magnitude"} | HEAD, "tensor"),
        (HEAD, {"in_proj": "tensor", "lm_head": "row"}),
        (HEAD | {"exclude": ["lm_head"]}, "tensor"),
        ({"include": ["lm_head"]}, {"lm_head": "row"}),
        ({"modules": {"lm_head": 0.2}, "include": ["lm_head"]}, {"lm_head": "row"}),
        ({"scope": "row", "include": ["in_proj", "conv1d"]}, "row"),
        ({"scope": "row", "exclude": ["in_proj"]}, "row"),
        ({"scope": {"in_proj": "row"}, "include": ["in_proj", "out_proj"]}, {"in_proj": "row", "out_proj": "tensor"}),
        ({"scope": {"conv1d": "row"}, "include": ["conv1d"]}, {"conv1d": "row"}),
        ({"scope": "tensor"} | HEAD, "tensor"),
        ({"pattern": "2:4"}, None),
        ({"method": "sparsegpt"}, None),
        ({"method": "sparsessm"}, None),
        ({"axis": "state", "keep": 0.5}, "layer"),
        ({"axis": "state", "keep": 0.5, "scope": "layer"}, "layer"),
        ({"axis": "state", "keep": 0.5, "scope": "model"}, "model"),
        ({"axis": "layer", "keep": 0.5}, None),
    ],
)
def test_the_usual_scope_is_written_out_and_changes_nothing(step, scope):
    given = recipe(model="m", steps=[step])
    told = written_out(MAMBA, given)
    assert told.steps[0].scope == scope
    assert told.sha256() == given.sha256() and parse(told.to_yaml()) == told == written_out(MAMBA, told)
    if "axis" not in step:
        assert targets(MAMBA, told.steps[0]) == targets(MAMBA, given.steps[0])


def test_another_scope_is_another_recipe():
    said = [
        {},
        {"scope": "row"},
        {"scope": {"in_proj": "row"}},
        HEAD,
        HEAD | {"scope": "tensor"},
        HEAD | {"scope": "row"},
        {"axis": "state", "keep": 0.5},
        {"axis": "state", "keep": 0.5, "scope": "model"},
    ]
    assert len({recipe(model="m", steps=[step]).sha256() for step in said}) == len(said)


def test_patterns_are_numbers():
    assert targets(MAMBA, Prune(pattern="2:4"))["in_proj"].pattern == (2, 4)


@pytest.mark.parametrize("field", ["include", "exclude", "modules"])
def test_an_unknown_module_names_the_nearest(field):
    value = {"out_prj": 0.5} if field == "modules" else ("out_prj",)
    with pytest.raises(InputError, match="'out_prj'") as refused:
        targets(MAMBA, Prune(**{field: value}))
    assert refused.value.hint == "Did you mean 'out_proj'?"
    with pytest.raises(InputError, match="no prunable module") as refused:
        targets(MAMBA2, Prune(include=("zzz",)))
    assert "in_proj, conv1d, out_proj" in refused.value.hint


def test_a_family_has_only_its_own_modules():
    with pytest.raises(InputError, match="mamba2 has no prunable module 'x_proj'"):
        targets(MAMBA2, Prune(include=("x_proj",)))


def test_nothing_left_is_refused():
    with pytest.raises(InputError, match="Nothing is left"):
        targets(MAMBA2, Prune(exclude=("in_proj", "out_proj")))


def test_what_a_method_has_no_form_for_is_refused():
    with pytest.raises(UnsupportedError, match="short convolution"):
        targets(MAMBA, Prune(method="sparsegpt", include=("conv1d",)))
    with pytest.raises(UnsupportedError, match="embeddings"):
        targets(MAMBA, Prune(method="wanda", include=("embeddings",)))
    assert "embeddings" in targets(MAMBA, Prune(method="magnitude", include=("embeddings",)))


@pytest.mark.parametrize("method", ["sparsessm", "sparsessm_v2"])
def test_sparsessm_scores_a_log_and_nothing_else(method):
    for arch in (MAMBA, MAMBA2):
        assert targets(arch, Prune(method=method)) == {"A_log": Target(0.5, None, "tensor")}
    assert targets(MAMBA, Prune(method=method, pattern="2:4"))["A_log"].pattern == (2, 4)
    assert targets(MAMBA, Prune(method=method, modules={"A_log": 0.25}))["A_log"].sparsity == 0.25
    for step in ({"include": ("in_proj",)}, {"include": ("A_log", "embeddings")}, {"modules": {"out_proj": 0.2}}):
        with pytest.raises(UnsupportedError, match=r"has no form for (in_proj|embeddings|out_proj): it scores"):
            targets(MAMBA, Prune(method=method, **step))
    with pytest.raises(InputError, match="Nothing is left"):
        targets(MAMBA, Prune(method=method, exclude=("A_log",)))


def test_a_log_has_a_form_for_some_methods_only():
    assert "A_log" not in targets(MAMBA, Prune(method="magnitude"))
    found = targets(MAMBA, Prune(method="magnitude", include=("A_log", "in_proj"), scope="row"))
    assert found == {"in_proj": Target(0.5, None, "row"), "A_log": Target(0.5, None, "row")}
    for method in ("wanda", "sparsegpt"):
        with pytest.raises(UnsupportedError, match=f"{method} has no form for A_log") as error:
            targets(MAMBA, Prune(method=method, include=("A_log",)))
        assert "sparsessm" in error.value.hint
    for method in ("magnitude", "sparsessm"):
        with pytest.raises(UnsupportedError, match="no row of states") as error:
            targets(MAMBA2, Prune(method=method, include=("A_log",), pattern="2:4"))
        assert "--sparsity" in error.value.hint


def test_a_tied_weight_is_named_once():
    assert MAMBA.config.tie_word_embeddings
    with pytest.raises(InputError, match="one tied weight"):
        targets(MAMBA, Prune(method="magnitude", include=("embeddings", "lm_head")))


@pytest.mark.parametrize("left_out", [{"include": ("in_proj",)}, {"exclude": ("out_proj",)}])
def test_a_ratio_for_a_module_that_is_left_out_is_refused(left_out):
    with pytest.raises(InputError, match="gives out_proj a ratio"):
        targets(MAMBA, Prune(modules={"out_proj": 0.7}, **left_out))
