"""Recipes whose last steps learn adapters: prune, repair, measure, in one go."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import ssmcompress
from ssmcompress.checkpoint import manifest
from ssmcompress.errors import InputError, RecipeError, UnsupportedError
from ssmcompress.events import Note
from ssmcompress.recipes import parse

PRUNE = {"step": "prune", "method": "magnitude", "sparsity": 0.6}
OFFSET = {"step": "tune-state", "method": "output-offset", "objective": "distill", "steps": 2, "length": 64}
LORA = {"step": "tune-state", "method": "lora", "rank": 1, "targets": ["out_proj"], "steps": 2, "length": 64}


def recipe(*steps: dict[str, object], **rest: object) -> str:
    return yaml.safe_dump({"model": "ref:mamba", "steps": list(steps)} | rest)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("repair") / "out"
    asked = parse(recipe(PRUNE, OFFSET, LORA, eval={"perplexity": None, "recall": True}))
    result = ssmcompress.run(asked, out=out)
    assert [path.name for path in result.adapters] == ["1-output-offset", "2-lora"]
    return out


def test_what_was_learned_lies_beside_the_model_and_is_measured_with_it(made: Path) -> None:
    assert manifest.changed(made) == []
    tuning = json.loads((made / "adapters" / "1-output-offset" / "tuning.json").read_text())
    assert tuning["base"]["name"] == "out" and tuning["examples"]["train"] > 100
    config = json.loads((made / "adapters" / "2-lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "out + 1-output-offset"
    said = yaml.safe_load((made / "adapters" / "1-output-offset" / "recipe.yaml").read_text())
    assert said["steps"][0]["teacher"] == "ref:mamba"  # the model of the recipe
    summary = json.loads((made / "eval" / "tuned" / "summary.json").read_text())
    assert summary["adapter"] == "1-output-offset + 2-lora"
    comparison = json.loads((made / "eval" / "comparison" / "comparison.json").read_text())
    assert len(comparison["candidates"]) == 2
    assert "tune-state" in (made / "recipe.yaml").read_text()
    adapters = [made / "adapters" / name for name in ("1-output-offset", "2-lora")]
    pruned, repaired = (ssmcompress.load(str(made), adapter=each, dtype=torch.float32).model for each in ((), adapters))
    weight = "backbone.layers.1.mixer.in_proj.weight"
    assert torch.equal(pruned.get_parameter(weight), repaired.get_parameter(weight))


def test_the_report_shows_how_the_learning_went(made: Path, tmp_path: Path) -> None:
    page = ssmcompress.report(made, out=tmp_path / "run.html").read_text(encoding="utf-8")
    assert "What was learned" in page and "Learning 1-output-offset" in page and "Learning 2-lora" in page
    assert "Its divergence from the teacher went from" in page and "The line without marks" in page
    assert "Then output-offset was learned from the shipped text in 2 updates" in page
    page = ssmcompress.report(made / "adapters" / "2-lora", out=tmp_path / "one.html").read_text(encoding="utf-8")
    assert "Learning 2-lora" in page and "lora on out + 1-output-offset" not in page
    (made / "adapters" / "2-lora" / "measured.json").rename(tmp_path / "kept.json")
    with pytest.raises(InputError, match=r"measured\.json cannot be read"):
        ssmcompress.report(made / "adapters" / "2-lora", out=tmp_path / "none.html")
    (tmp_path / "kept.json").rename(made / "adapters" / "2-lora" / "measured.json")


def test_a_run_goes_on_where_it_was(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = parse(recipe(PRUNE, OFFSET, LORA, eval={"perplexity": None, "recall": True}))
    first = {path: path.read_bytes() for path in made.rglob("*.safetensors")}
    shutil.rmtree(made / "adapters" / "2-lora")  # as if it had been killed before
    notes: list[str] = []
    ssmcompress.run(asked, out=made, emit=lambda event: notes.append(event.text) if isinstance(event, Note) else None)
    assert any("holds this model already" in note for note in notes)
    assert (
        sum(note.startswith("Examples:") for note in notes) == 1
    )  # the first adapter stays, the second is learned anew
    assert {path: path.read_bytes() for path in made.rglob("*.safetensors")} == first


@pytest.mark.parametrize(
    ("steps", "error", "words"),
    [
        ((OFFSET,), RecipeError, "no step makes a model"),
        ((OFFSET, PRUNE), RecipeError, "tune-state comes after all other steps"),
        ((PRUNE, OFFSET | {"objectiv": "ce"}), RecipeError, "did you mean 'objective'"),
        ((PRUNE, OFFSET | {"data": "./nowhere.jsonl"}), InputError, "There is no file"),
        ((PRUNE, {"step": "tune-state", "form": "per-head"}), UnsupportedError, "no heads"),
        ((PRUNE, LORA | {"targets": ["conv1d"]}), UnsupportedError, "cannot be trained on conv1d"),
    ],
)
def test_what_cannot_be_learned_is_said_before_anything_is_done(
    tmp_path: Path, steps: tuple[dict[str, object], ...], error: type[Exception], words: str
) -> None:
    for verb in (
        lambda: ssmcompress.plan(parse(recipe(*steps))),
        lambda: ssmcompress.run(parse(recipe(*steps)), out=tmp_path / "a"),
    ):
        with pytest.raises(error, match=words):
            verb()
    assert list(tmp_path.iterdir()) == []


def test_plan_says_how_much_is_learned() -> None:
    notes: list[str] = []
    ssmcompress.plan(
        parse(recipe({"step": "prune", "axis": "state", "keep": 0.5}, {"step": "tune-state"})),
        emit=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    assert "Then state-offset is learned: 24,576 parameters." in notes  # 6 layers, 512 channels, 8 of 16 states
