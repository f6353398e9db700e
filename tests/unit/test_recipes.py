"""Recipe files: mistakes with their lines, overrides, names."""

import pytest

from ssmcompress.errors import RecipeError, ResourceError
from ssmcompress.recipe import recipe
from ssmcompress.recipes import cp, parse, read, shipped

TEXT = """\
model: ref:mamba
calibrate:
  windows: 8
steps:
  - step: prune
    sparsity: 0.25
  - step: prune
    method: sparsegpt
eval:
  recall: true
"""


def refused(text, *overrides):
    with pytest.raises(RecipeError) as error:
        parse(text, "mine.yaml", overrides)
    return error.value


def test_a_text_is_a_recipe():
    steps = [{"step": "prune", "sparsity": 0.25}, {"step": "prune", "method": "sparsegpt"}]
    fields = {"model": "ref:mamba", "calibrate": {"windows": 8}, "steps": steps, "eval": {"recall": True}}
    assert parse(TEXT) == recipe(**fields)
    assert parse(parse(TEXT).to_yaml()) == parse(TEXT)


def test_every_mistake_is_told_with_its_line():
    text = TEXT.replace("windows: 8", "windws: 8").replace("sparsegpt", "sparsgpt").replace("true", "maybe")
    lines = refused(text + "seed: -1\n").message.splitlines()
    assert lines[0] == "mine.yaml is not valid."
    assert [line.partition(": ")[0] for line in lines[1:]] == ["line 11", "line 3", "line 8", "line 10"]
    assert "did you mean 'windows'?" in lines[2] and "did you mean 'sparsegpt'?" in lines[3]


def test_what_is_missing_is_said():
    assert "model: is missing" in refused("steps: [{step: prune}]").message


def test_a_key_that_is_there_twice_is_refused():
    assert "line 2: model: this key is there twice" in refused("model: a\nmodel: b\nsteps: [{step: prune}]").message
    nested = "model: a\nsteps:\n- step: prune\n  sparsity: 0.5\n  sparsity: 0.6\n"
    assert "line 5: sparsity: this key is there twice" in refused(nested).message
    assert "a: this key is there twice" in refused(TEXT, "gate.max_drop={a: 0.1, a: 0.2}").message


@pytest.mark.parametrize("text", ["", "- a", "a: [", "42", "model: &a [*a]\n", "\t"])
def test_what_is_no_recipe_is_refused(text):
    assert refused(text).exit_code == 2


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("model=ref:mamba2", lambda r: r.model, "ref:mamba2"),
        ("seed=3", lambda r: r.seed, 3),
        ("windows=16", lambda r: r.calibrate.windows, 16),
        ("calibrate.windows=16", lambda r: r.calibrate.windows, 16),
        ("steps.1.sparsity=0.75", lambda r: r.steps[1].sparsity, 0.75),
        ("steps.1.modules.in_proj=0.2", lambda r: r.steps[1].modules, {"in_proj": 0.2}),
        ("recall=false", lambda r: r.eval.recall, False),
        ("max_drop=0.1", lambda r: r.gate.max_drop, {"all": 0.1}),
        ("gate.max_drop.text=0.1", lambda r: r.gate.max_drop, {"text": 0.1}),
        ("mix=null", lambda r: r.calibrate.mix, None),
        ("model=a=b", lambda r: r.model, "a=b"),
    ],
)
def test_overrides_find_their_place(override, where, value):
    assert where(parse(TEXT, overrides=[override])) == value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("windws=3", "'windws'"),
        ("windows", "not key=value"),
        ("sparsity=0.5", "several places"),
        ("length=64", "several places"),
        ("steps.7.sparsity=0.5", "no place"),
        ("steps.x.sparsity=0.5", "no place"),
        ("steps.0.sparsty=0.5", "did you mean 'sparsity'"),
        ("windows=[", "not YAML"),
        ("windows=many", "windows"),
    ],
)
def test_overrides_that_will_not_do(override, words):
    error = refused(TEXT, override)
    assert words in error.message + error.hint


ONE = "model: ref:mamba\nsteps:\n- step: prune\n"


@pytest.mark.parametrize(
    ("said", "overrides", "step"),
    [
        ("sparsity: 0.5", ["pattern=2:4"], {"pattern": "2:4"}),
        ("sparsity: 0.5", ['pattern="1:16"'], {"pattern": "1:16"}),
        ("sparsity: 0.5", ["steps.0.pattern=2:4"], {"pattern": "2:4"}),
        ("sparsity: 0.5\n  scope: tensor", ["pattern=2:4"], {"pattern": "2:4"}),
        ("sparsity: 0.5\n  scope: tensor", ["method=sparsegpt"], {"method": "sparsegpt", "sparsity": 0.5}),
        ("sparsity: 0.5\n  scope: row", ["method=sparsessm"], {"method": "sparsessm", "sparsity": 0.5}),
        ("sparsity: 0.5\n  scope: row", ["method=magnitude"], {"method": "magnitude", "scope": "row"}),
        ('pattern: "2:4"', ["sparsity=0.3"], {"sparsity": 0.3}),
        ('pattern: "2:4"', ["sparsity=null"], {"pattern": "2:4"}),
        ("sparsity: 0.3", ["pattern=null"], {"sparsity": 0.3}),
    ],
)
def test_what_is_said_now_displaces_what_it_contradicts(said, overrides, step):
    assert parse(f"{ONE}  {said}\n", overrides=overrides) == recipe(model="ref:mamba", steps=[step])


def test_overrides_displace_only_in_their_step():
    text = ONE + "  sparsity: 0.3\n- step: prune\n  sparsity: 0.4\n"
    made = parse(text, overrides=["steps.1.pattern=2:4"])
    assert [(step.sparsity, step.pattern) for step in made.steps] == [(0.3, None), (None, "2:4")]


def test_overrides_that_contradict_one_another_are_refused():
    for overrides in (["pattern=2:4", "sparsity=0.3"], ["sparsity=0.3", "pattern=2:4"]):
        assert "exclude one another" in refused(ONE, *overrides).message
    assert "scope has no meaning" in refused(ONE, "pattern=2:4", "scope=row").message


@pytest.mark.parametrize("pattern", ["2:4", "1:16"])
def test_a_pattern_without_quotes_is_explained(pattern):
    said = refused(f"{ONE}  pattern: {pattern}\n").message
    assert f'line 4: steps.0.pattern: must be in quotes: pattern: "{pattern}"' in said


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match="no recipe 'prune/wanda-5'") as error:
        read("prune/wanda-5")
    assert "prune/wanda-50" in error.value.hint
    (tmp_path / "bad.yaml").write_bytes(b"model: \xff")
    with pytest.raises(RecipeError, match="UTF-8"):
        read(str(tmp_path / "bad.yaml"))


def test_a_copy_that_does_not_fit_leaves_nothing(tmp_path, full_disk):
    with full_disk(10), pytest.raises(ResourceError, match="cannot be written") as error:
        cp("prune/wanda-50", tmp_path / "mine.yaml")
    assert "room" in error.value.hint and not list(tmp_path.iterdir())
    with pytest.raises(ResourceError) as error:
        cp("prune/wanda-50", tmp_path / "nowhere" / "mine.yaml")
    assert "folder" in error.value.hint


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_say_what_they_do(name):
    made = read(name)
    assert made.description and made.model.startswith("ref:")
