"""A recipe: defaults written out, unknown keys refused, every mistake told at once."""

import pytest
import yaml

from ssmcompress.errors import RecipeError
from ssmcompress.recipe import Calibration, Recipe, pruning, recipe
from ssmcompress.steps import Prune


def test_every_default_is_written_out():
    made = pruning("ref:mamba", {})
    assert yaml.safe_load(made.to_yaml()) == {
        "description": "",
        "model": "ref:mamba",
        "seed": 0,
        "backend": "auto",
        "device": "cpu",
        "dtype": "auto",
        "calibrate": {"text": None, "split": None, "column": None, "mix": None, "windows": 64, "length": 512},
        "steps": [
            {
                "step": "prune",
                "method": "wanda",
                "sparsity": 0.5,
                "pattern": None,
                "scope": None,
                "include": [],
                "exclude": [],
                "modules": {},
            }
        ],
        "save": {"shard_size": "5GB"},
        "eval": None,
        "gate": None,
    }


def test_options_find_their_places():
    made = pruning(
        "m",
        {
            "method": "magnitude",
            "include": ("in_proj",),
            "calib": "text.jsonl",
            "calib_mix": "recall",
            "calib_split": "train",
            "calib_column": "body",
            "windows": 3,
            "length": 7,
            "seed": 5,
            "backend": "torch",
        },
    )
    assert made.calibrate == Calibration(
        text="text.jsonl", split="train", column="body", mix="recall", windows=3, length=7
    )
    assert made.steps == (Prune(method="magnitude", include=("in_proj",)),)
    assert (made.seed, made.backend) == (5, "torch")


def test_yaml_comes_back_as_the_same_recipe():
    made = pruning("m", {"modules": {"out_proj": 0.7}, "seed": 4})
    assert recipe(**yaml.safe_load(made.to_yaml())) == made


def test_the_hash_follows_what_is_said():
    made = pruning("m", {})
    assert made.sha256() == pruning("m", {"sparsity": 0.5, "seed": 0}).sha256()
    assert len({pruning("m", {"seed": seed}).sha256() for seed in range(3)} | {made.sha256()}) == 3
    assert made.sha256() != pruning("n", {}).sha256()
    half = {"axis": "state", "keep": 0.5}
    told = "176a"  # a recipe of an earlier version, which knew no scope of units
    assert pruning("m", half).sha256().startswith(told) and pruning("m", half | {"scope": "layer"}).sha256()[:4] == told


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.5, float("nan"), "half"])
def test_ratios_lie_in_the_half_open_interval(sparsity):
    with pytest.raises(RecipeError, match="sparsity"):
        pruning("m", {"sparsity": sparsity})
    with pytest.raises(RecipeError, match=r"modules\.out_proj"):
        pruning("m", {"modules": {"out_proj": sparsity}})


@pytest.mark.parametrize("pattern", ["4:2", "4:4", "0:4", "2-4", "2:4:8", ":", "2:", "a:b", "-2:4", "²:4", ""])
def test_patterns_are_n_of_m(pattern):
    with pytest.raises(RecipeError, match="N:M"):
        pruning("m", {"pattern": pattern})


def test_the_borders_are_allowed():
    assert pruning("m", {"sparsity": 0}).steps[0].sparsity == 0
    assert pruning("m", {"pattern": "1:16"}).steps[0].pattern == "1:16"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pattern": "2:4", "modules": {"in_proj": 0.5}}, "exclude one another"),
        ({"pattern": "2:4", "sparsity": 0.5}, "exclude one another"),
        ({"pattern": "2:4", "scope": "row"}, "scope has no meaning with a pattern"),
        ({"method": "sparsegpt", "scope": "tensor"}, "scope has no meaning with sparsegpt"),
    ],
)
def test_options_that_contradict_one_another(options, words):
    with pytest.raises(RecipeError, match=words):
        pruning("m", options)


def test_every_mistake_is_told_at_once():
    with pytest.raises(RecipeError) as refused:
        pruning("m", {"sparsity": 2, "method": "wnda", "windows": 0, "backend": "fast"})
    message = refused.value.message
    assert all(word in message for word in ("sparsity", "method", "--windows", "--backend", "'wnda'"))
    assert "there are no steps" not in message and "pydantic" not in message and message.count("\n") == 0
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"sparsity": 2}, "--sparsity: "),
        ({"method": "wnda"}, "--method: "),
        ({"calib": 5}, "--calib: "),
        ({"calib_mix": "songs"}, "--calib-mix: "),
        ({"length": 0}, "--length: "),
        ({"seed": -1}, "--seed: "),
        ({"include": (5,)}, "--include: "),
        ({"modules": {"in_proj": 2}}, "modules.in_proj: "),
        ({"scope": "tensr"}, "--scope: must be row or tensor where weights become zero, did you mean 'tensor'?"),
        (
            {"axis": "state", "keep": 1, "scope": "modl"},
            "--scope: Input should be 'layer' or 'model', found 'modl', did",
        ),
        ({"axis": "layer", "keep": 1, "scope": "model"}, "scope has no meaning with the axis layer"),
        ({"pattern": "2:4", "sparsity": 0.5}, "pattern 2:4 and sparsity 0.5"),
    ],
)
def test_mistakes_in_options_are_told_by_the_option_and_those_in_recipes_by_the_key(options, where):
    with pytest.raises(RecipeError) as refused:
        pruning("m", options)
    assert refused.value.message.startswith(where)
    if where == "--sparsity: ":
        with pytest.raises(RecipeError, match=r"^steps\.0\.sparsity: "):
            recipe(model="m", steps=[options])


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(RecipeError, match="'sparsty'") as refused:
        pruning("m", {"sparsty": 0.5})
    assert refused.value.hint == "Did you mean 'sparsity'?"


def test_unknown_keys_are_refused_everywhere():
    for fields in (
        {"steps": [{"step": "prune", "ratio": 0.5}]},
        {"steps": [], "calibrate": {"texts": "x"}},
        {"steps": [], "sead": 1},
        {"steps": [{"step": "distil"}]},
    ):
        with pytest.raises(RecipeError):
            recipe(model="m", **fields)


def test_a_recipe_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        pruning("m", {}).seed = 1
    assert isinstance(pruning("m", {}), Recipe)


def test_half_is_the_share_where_neither_a_share_nor_a_pattern_is_said():
    assert pruning("m", {"sparsity": None}).steps[0].sparsity == 0.5
    assert pruning("m", {"pattern": "2:4"}).steps[0].sparsity is None


def test_one_module_may_be_a_string():
    assert pruning("m", {"include": "in_proj", "exclude": "x_proj"}).steps[0].include == ("in_proj",)


def test_a_gate_needs_something_measured_and_takes_one_bound_for_all():
    step = [{"step": "prune"}]
    with pytest.raises(RecipeError, match="a gate needs an eval section"):
        recipe(model="m", steps=step, gate={"max_drop": 0.1})
    assert recipe(model="m", steps=step, eval={}, gate={"max_drop": 0.1}).gate.max_drop == {"all": 0.1}
    with pytest.raises(RecipeError, match=r"gate\.max_drop\.all"):
        recipe(model="m", steps=step, eval={}, gate={"max_drop": -0.1})
    assert recipe(model="m", steps=step, eval={}, gate={"max_drop": "1e-2"}).gate.max_drop == {"all": 0.01}


@pytest.mark.parametrize("bound", [True, {"text": True}])
def test_yes_is_no_bound(bound):
    with pytest.raises(RecipeError, match=r"gate\.max_drop\.(all|text): must be a number, found True"):
        recipe(model="m", steps=[{"step": "prune"}], eval={}, gate={"max_drop": bound})


def test_a_recipe_without_steps_is_none():
    with pytest.raises(RecipeError, match="there are no steps"):
        recipe(model="m", steps=[])


def test_records_name_no_paths(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("text")
    made = pruning(str(tmp_path), {"calib": str(text)}).portable("model")
    assert (made.model, made.calibrate.text) == ("model", "mine.txt")
    assert pruning("m", {"calib": "c4:en"}).portable("m").calibrate.text == "c4:en"


def test_the_description_does_not_change_what_is_done():
    made = pruning("m", {})
    assert made.model_copy(update={"description": "words"}).sha256() == made.sha256()


@pytest.mark.parametrize(
    ("method", "axes"), [("rotate", "state"), ("shedder", "ssm, layer"), ("flap", "channel, head")]
)
def test_a_method_of_axes_says_which(method, axes):
    with pytest.raises(RecipeError, match=f"The method {method} needs an axis") as refused:
        pruning("ref:mamba2", {"method": method})
    assert f"Its axes are {axes}" in refused.value.hint
    assert pruning("ref:mamba2", {"method": "sparsessm"}).steps[0].method == "sparsessm"
