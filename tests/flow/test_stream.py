"""Pruning within a budget of memory: a block at a time, the residual stream in a file, and the same result."""

import importlib

import pytest
import torch

import ssmcompress
from ssmcompress import budget
from ssmcompress import edits as editing
from ssmcompress.arch.pages import pages
from ssmcompress.calib.stream import Room, Stream
from ssmcompress.checkpoint.source import load
from ssmcompress.errors import InputError, ResourceError, UnsupportedError
from ssmcompress.prune import units
from ssmcompress.recipe import pruning
from tests.flow.conftest import FAMILIES
from tests.flow.test_tune import IDS

RUN = importlib.import_module("ssmcompress.run")  # the package has a function of that name
STEPS = {
    "wanda": ("mamba", {"method": "wanda", "sparsity": 0.6}),
    "magnitude": ("falcon_mamba", {"method": "magnitude", "include": ("in_proj", "lm_head")}),
    "sparsegpt": ("mamba2", {"method": "sparsegpt"}),
    "sparsessm": ("mamba", {"method": "sparsessm"}),
    "channels": ("mamba", {"axis": "channel", "method": "flap", "keep": 0.5, "any_size": True}),
    "states": ("mamba2", {"axis": "state", "method": "joint", "keep": 0.5, "scope": "model", "any_size": True}),
    "heads": ("mamba2-grouped", {"axis": "head", "method": "minitron", "keep": 0.5, "any_size": True}),
    "rotated": ("mamba2", {"axis": "state", "method": "rotate", "keep": 0.5, "any_size": True}),
}


@pytest.mark.parametrize("model", FAMILIES)
def test_a_model_in_pages_computes_the_same_and_holds_one_block(models, model):
    whole, turned = (load(models[model], dtype=torch.float32, in_pages=each) for each in (False, True))
    blocks = pages(turned.model)
    assert blocks is not None and pages(whole.model) is None
    held = []
    for block in blocks:
        held.append([not each.norm.weight.is_meta for each in blocks._modules.values()])
        assert not any(parameter.is_meta for parameter in block.parameters())
    assert held == torch.eye(len(blocks)).bool().tolist()
    with torch.no_grad():
        assert torch.equal(*(each.model(IDS, use_cache=False).logits for each in (whole, turned)))
        assert torch.equal(*(each.model.generate(IDS, max_new_tokens=3, do_sample=False) for each in (whole, turned)))


@pytest.mark.parametrize("name", STEPS)
def test_the_result_is_that_of_a_run_in_memory(models, small, tmp_path, name, monkeypatch):
    model, step = STEPS[name]
    monkeypatch.setattr(RUN, "room", lambda checkpoint, recipe, most, folder: Room(3 * 48 * 32 * 4, folder))
    in_memory, within = tmp_path / "memory", tmp_path / "within"
    ssmcompress.prune(models[model], out=in_memory, **small, **step)
    ssmcompress.prune(models[model], out=within, max_memory="2GB", **small, **step)
    one, two = (editing.load(folder / "edits.safetensors").items for folder in (in_memory, within))
    assert [(each.kind, each.tensor) for each in one] == [(each.kind, each.tensor) for each in two]
    for first, second in zip(one, two, strict=True):
        assert torch.equal(first.pack(), second.pack()), first.tensor
    assert (in_memory / "model.safetensors").read_bytes() == (within / "model.safetensors").read_bytes()
    config = [(folder / "config.json").read_bytes() for folder in (in_memory, within)]
    assert config[0] == config[1] and not list(within.glob(".*"))


def test_what_is_measured_is_the_same_too(models, text, tmp_path):
    given = {"calib": text, "windows": 4, "length": 32}
    one = ssmcompress.prune(models["mamba2"], out=tmp_path / "a", **given)
    two = ssmcompress.prune(models["mamba2"], out=tmp_path / "b", max_memory="2GB", **given)
    for first, second in ((one.before, two.before), (one.after, two.after)):
        assert first is not None and second is not None
        assert second.bits_per_byte == pytest.approx(first.bits_per_byte, rel=1e-9)


def test_a_stream_keeps_what_has_room_and_gives_back_the_rest(tmp_path):
    batches = [torch.randn(1, 5, 4) for _ in range(6)]
    size = batches[0].nbytes
    for most, held in ((0, 0), (2 * size, 2), (2 * size + 1, 2), (6 * size, 6)):
        stream = Stream(iter(batches), Room(most, tmp_path))
        assert len(stream) == 6 and len(stream._held) == held
        assert all(torch.equal(*pair) for pair in zip(stream, batches, strict=True))
        for i in (0, 3, 5):
            stream[i] = batches[i] + 1
        expected = [rows + (i in (0, 3, 5)) for i, rows in enumerate(batches)]
        assert all(torch.equal(*pair) for pair in zip(stream, expected, strict=True))
        assert torch.equal(stream[-1], expected[-1]) and not list(tmp_path.iterdir())
    assert len(Stream(iter(batches))._held) == 6


@pytest.mark.parametrize("again", ["2GB", "3GB", None])
def test_a_killed_run_within_a_budget_goes_on(models, small, tmp_path, monkeypatch, again):
    def interrupted(*given, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RUN, "verify", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ssmcompress.prune(models["mamba"], out=tmp_path / "a", max_memory="2GB", **small)
    heard = []
    ssmcompress.prune(models["mamba"], out=tmp_path / "a", max_memory=again, emit=heard.append, **small)
    assert any("2 of 2 layers are done" in getattr(event, "text", "") for event in heard)
    ssmcompress.prune(models["mamba"], out=tmp_path / "b", **small)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"max_memory": "much"}, InputError, "'much' is no amount of memory"),
        ({"max_memory": "0GB"}, InputError, "no amount of memory"),
        ({"max_memory": "1MB"}, ResourceError, r"more than the 1\.00 MB of --max-memory"),
        ({"max_memory": "2GB", "axis": "layer", "keep": 0.5}, UnsupportedError, "For the axis layer the whole model"),
        (
            {"max_memory": "2GB", "axis": "channel", "method": "taylor", "keep": 0.5},
            UnsupportedError,
            "For the method taylor the whole model",
        ),
    ],
)
def test_what_a_budget_cannot_hold_is_refused(models, small, tmp_path, given, error, said):
    with pytest.raises(error, match=said):
        ssmcompress.prune(models["mamba"], out=tmp_path / "a", **small, **given)
    assert not list(tmp_path.iterdir())


def test_a_recipe_makes_its_model_within_a_budget_too(models, text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {models['mamba2']}\ncalibrate: {{text: {text}, windows: 4, length: 32}}\n"
        "steps: [{step: prune, axis: state, method: joint, keep: 0.5, any_size: true}, {step: prune, method: wanda}]\n"
        f"eval: {{perplexity: {text}}}\n",
        encoding="utf-8",
    )
    with pytest.raises(UnsupportedError, match="What the recipe evaluates needs the whole model at once"):
        ssmcompress.run(str(path), out=tmp_path / "a", max_memory="2GB")
    for name, most in (("a", None), ("b", "2GB")):
        ssmcompress.run(str(path), out=tmp_path / name, max_memory=most, no_eval=True)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    heard = []
    ssmcompress.run(str(path), out=tmp_path / "b", emit=heard.append)  # where it has room
    assert any("holds this model already" in getattr(event, "text", "") for event in heard)


def test_computed_in_less_than_is_stored_it_writes_the_same(models, small, tmp_path):
    for name, most in (("a", None), ("b", "2GB")):
        given = {"method": "magnitude", "dtype": "bfloat16", "max_memory": most}
        ssmcompress.prune(models["mamba2"], out=tmp_path / name, **small, **given)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_of_the_cut_blocks_one_is_in_memory(models, small, tmp_path, monkeypatch):
    made, cutter = [], units._Cutter

    def watched(*given):
        made.append(cutter(*given))
        return made[-1]

    monkeypatch.setattr(units, "_Cutter", watched)
    ssmcompress.prune(
        models["mamba2"],
        out=tmp_path / "a",
        axis="state",
        method="joint",
        keep=0.5,
        max_memory="2GB",
        any_size=True,
        **small,
    )
    blocks = made[0].arch.blocks(made[0].small)
    assert [any(not each.is_meta for each in block.parameters()) for block in blocks] == [False, True]


def test_new_values_are_reckoned_with(models, tmp_path):
    checkpoint = load(models["mamba2"], in_pages=True)
    told = []
    for method in ("wanda", "sparsegpt"):
        recipe = pruning(models["mamba2"], {"method": method})
        with pytest.raises(ResourceError) as refused:
            budget.room(checkpoint, recipe, 1, tmp_path)
        told.append(refused.value.message)
    assert "new values" not in told[0] and "of which new values are" in told[1]


def test_shards_are_as_small_as_asked_for(models):
    recipe = pruning(models["mamba2"], {})
    assert budget.within(recipe, 3 * 10**9) == 3 * 10**8
    small = recipe.model_copy(update={"save": recipe.save.model_copy(update={"shard_size": "10MB"})})
    assert budget.within(small, 3 * 10**9) == 10**7


def test_a_budget_is_read_as_people_write_it():
    assert [budget.budget(text) for text in ("3GB", "800 mb", "12 KB", "7B")] == [3 * 10**9, 8 * 10**8, 12_000, 7]
