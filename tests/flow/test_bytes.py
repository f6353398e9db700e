"""Byte for byte: the same seed twice, edits applied again, and nothing changed where nothing was to be."""

import pytest
import torch

import ssmcompress
from ssmcompress import edits
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.checkpoint.source import resolve
from tests.flow.conftest import FAMILIES, MODELS, NARROW, SHIPPED

TIMED = ("events.jsonl", "measured.json")


def contents(folder):
    """Every file of a folder but those that hold times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in TIMED}


def lasting(folder):
    """Weights, config, recipe, tokenizer and generation files."""
    return {
        name: content
        for name, content in contents(folder).items()
        if name.endswith((".safetensors", ".yaml")) or name in ("config.json", "generation_config.json")
        or name.startswith("tokenizer")
    }  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
def test_applying_the_edits_again_gives_the_same_bytes(models, small, tmp_path, name, method):
    ssmcompress.prune(models[name], out=tmp_path / "first", method=method, **small)
    again = ssmcompress.apply(tmp_path / "first" / "edits.safetensors", models[name], out=tmp_path / "again")
    first = lasting(tmp_path / "first")
    assert {"model.safetensors", "edits.safetensors", "recipe.yaml", "tokenizer.json", "config.json"} <= first.keys()
    assert lasting(again) == first


@pytest.mark.parametrize("name", MODELS)
def test_the_same_seed_gives_the_same_bytes(models, small, tmp_path, name):
    for out in ("first", "second"):
        ssmcompress.prune(models[name], out=tmp_path / out, method="wanda", seed=3, **small)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_another_seed_reads_other_windows(models, small, tmp_path):
    for seed in (3, 4):
        ssmcompress.prune(models["mamba"], out=tmp_path / str(seed), seed=seed, **small)
    assert contents(tmp_path / "3")["model.safetensors"] != contents(tmp_path / "4")["model.safetensors"]


def test_the_cache_of_windows_changes_no_byte(models, small, tmp_path, monkeypatch):
    for cache in ("cold", "cold-too"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        ssmcompress.prune(models["mamba2"], out=tmp_path / f"{cache}-out", seed=9, **small)
    ssmcompress.prune(models["mamba2"], out=tmp_path / "warm-out", seed=9, **small)
    assert contents(tmp_path / "cold-out") == contents(tmp_path / "cold-too-out") == contents(tmp_path / "warm-out")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
def test_sparsity_zero_writes_the_bits_of_the_source(models, small, tmp_path, name, method):
    ssmcompress.prune(models[name], out=tmp_path / "out", method=method, sparsity=0.0, **small)
    before, after = Shards(resolve(models[name]).folder), Shards(tmp_path / "out")
    assert set(before) == set(after)
    for key in before:
        assert before.dtype(key) == after.dtype(key)
        raw = [weights[key].contiguous().view(torch.uint8) for weights in (before, after)]
        assert torch.equal(*raw), key
    kinds = {before.dtype(key) for key in before}
    assert kinds == {torch.float32, torch.bfloat16} or name not in (*NARROW, *SHIPPED)


@pytest.mark.parametrize("name", FAMILIES)
def test_negative_zeros_and_what_is_kept_keep_their_bits(models, small, tmp_path, name):
    """A pruned weight keeps every bit of what stays, in whatever dtype it is stored."""
    result = ssmcompress.prune(models[name], out=tmp_path / "out", include=("out_proj",), **small)
    before, after = Shards(resolve(models[name]).folder), Shards(tmp_path / "out")
    for edit in result.edits:
        assert isinstance(edit, edits.Mask)
        assert torch.equal(before[edit.tensor][edit.keep], after[edit.tensor][edit.keep])
        assert after.dtype(edit.tensor) == before.dtype(edit.tensor)


def test_the_working_dtype_leaves_the_stored_one_alone(models, small, tmp_path):
    ssmcompress.prune(models["mamba2"], out=tmp_path / "out", dtype="bfloat16", **small)
    before, after = Shards(resolve(models["mamba2"]).folder), Shards(tmp_path / "out")
    for key in before:
        assert after.dtype(key) == before.dtype(key) == torch.float32
        assert torch.equal(after[key][after[key] != 0], before[key][after[key] != 0])
