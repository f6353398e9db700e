"""Adapters become part of the weights where they only change those, and say so where they do not."""

import json
from pathlib import Path

import pytest
import torch

import ssmcompress
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.checkpoint.source import load
from ssmcompress.cli import main
from ssmcompress.errors import InputError, UnsupportedError
from ssmcompress.events import Note
from tests.flow.test_tune import logits

TUNE = {"steps": 1, "length": 64}


@pytest.mark.parametrize(
    ("model", "method", "lr"),
    [
        ("ref:mamba", "lora", 0.02),
        ("ref:mamba2", "lora", 0.02),
        ("ref:mamba2", "bitfit", 0.05),
        ("ref:mamba", "a-log", 0.3),
        ("ref:mamba", "sdt", 0.05),
    ],
)
def test_a_folded_adapter_computes_what_it_did(tmp_path: Path, model: str, method: str, lr: float) -> None:
    ssmcompress.tune_state(model, method=method, lr=lr, out=tmp_path / "a", **TUNE)
    assert ssmcompress.apply(tmp_path / "a", model, out=tmp_path / "folded") == tmp_path / "folded"
    dense, expected, found = logits(model), logits(model, tmp_path / "a"), logits(tmp_path / "folded")
    assert (found - expected).norm() < 0.2 * (expected - dense).norm()  # rounded to bfloat16, as weights are stored
    folders = (tmp_path / "folded", load(model).source.folder)
    first, second = ({name: weights.dtype(name) for name in weights} for weights in map(Shards, folders))
    assert first == second
    manifest = json.loads((tmp_path / "folded" / "ssmcompress.json").read_text())
    assert manifest["verb"] == "apply" and "adapter_model.safetensors" in manifest["source"]["sha256"]


@pytest.mark.parametrize("method", ["state-offset", "prompt"])
def test_what_does_not_fold_is_refused_and_nothing_is_written(
    tmp_path: Path, method: str, capsys: pytest.CaptureFixture
) -> None:
    ssmcompress.tune_state("ref:mamba", method=method, out=tmp_path / "a", **TUNE)
    with pytest.raises(UnsupportedError, match="does not fold into the weights"):
        ssmcompress.apply(tmp_path / "a", "ref:mamba", out=tmp_path / "folded")
    with pytest.raises(SystemExit, match="3"):
        main(["apply", str(tmp_path / "a"), "ref:mamba", "--out", str(tmp_path / "folded")])
    assert "Keep it beside the model" in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_zeros_that_are_filled_are_told(tmp_path: Path) -> None:
    ssmcompress.prune("ref:mamba", method="magnitude", sparsity=0.6, out=tmp_path / "pruned", no_eval=True)
    notes: list[str] = []
    for method, filled in (("lora", True), ("full", False)):
        out, folded = tmp_path / method, tmp_path / f"{method}-folded"
        ssmcompress.tune_state(str(tmp_path / "pruned"), method=method, out=out, **TUNE)
        notes.clear()
        ssmcompress.apply(
            out,
            str(tmp_path / "pruned"),
            out=folded,
            emit=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
        )
        assert any("fills zeros" in note for note in notes) == filled
        records = json.loads((folded / "ssmcompress.json").read_text())["tensors"]
        weights = load(str(folded), dtype=torch.float32).model.state_dict()
        for record in records:
            if record["status"] == "pruned":
                assert record["zeros"] == int((weights[record["name"]] == 0).sum())


def test_edits_of_a_model_make_its_adapter_smaller(tmp_path: Path) -> None:
    ssmcompress.prune("ref:mamba", axis="state", keep=0.5, out=tmp_path / "small", no_eval=True)
    edits = tmp_path / "small" / "edits.safetensors"
    for method in ("state-offset", "lora"):
        ssmcompress.tune_state("ref:mamba", method=method, out=tmp_path / method, **TUNE)
        out = ssmcompress.apply(edits, str(tmp_path / method), out=tmp_path / f"{method}-small")
        before, after = (entries(folder) for folder in (tmp_path / method, out))
        assert after < before
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "small"
        changed = logits(tmp_path / "small", out) - logits(tmp_path / "small")
        assert bool(changed.any())
    with pytest.raises(InputError, match="has shape"):
        load(str(tmp_path / "small"), adapter=tmp_path / "state-offset")


def entries(folder: Path) -> int:
    weights = Shards(folder, ("adapter_model.safetensors",))
    return sum(weights.shape(name).numel() for name in weights)


def test_edits_of_another_model_are_refused(tmp_path: Path) -> None:
    ssmcompress.prune("ref:mamba2", axis="head", keep=0.5, method="random", out=tmp_path / "small", no_eval=True)
    ssmcompress.tune_state("ref:mamba", out=tmp_path / "a", **TUNE)
    with pytest.raises(UnsupportedError, match="has no axis 'head'"):
        ssmcompress.apply(tmp_path / "small" / "edits.safetensors", str(tmp_path / "a"), out=tmp_path / "b")
    assert not (tmp_path / "b").exists()
