"""Adapters become part of the weights where they only change those, and say so where they do not."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import ssmcompress
from ssmcompress.arch.masked import mask
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.checkpoint.source import load
from ssmcompress.cli import main
from ssmcompress.errors import InputError, UnsupportedError
from ssmcompress.events import Note
from tests.flow.test_tune import IDS, logits


@pytest.fixture(scope="module")
def tune(text: str) -> dict[str, object]:
    """Options that keep a run short."""
    return {"steps": 1, "length": 64, "data": text}


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
def test_a_folded_adapter_computes_what_it_did(
    tmp_path: Path, model: str, method: str, lr: float, tune: dict[str, object]
) -> None:
    ssmcompress.tune_state(model, method=method, lr=lr, out=tmp_path / "a", **tune)
    assert ssmcompress.apply(tmp_path / "a", model, out=tmp_path / "folded") == tmp_path / "folded"
    dense, expected, found = logits(model), logits(model, tmp_path / "a"), logits(tmp_path / "folded")
    assert (found - expected).norm() < 0.2 * (expected - dense).norm()  # rounded to bfloat16, as weights are stored
    folders = (tmp_path / "folded", load(model).source.folder)
    first, second = ({name: weights.dtype(name) for name in weights} for weights in map(Shards, folders))
    assert first == second
    manifest = json.loads((tmp_path / "folded" / "ssmcompress.json").read_text())
    assert manifest["verb"] == "apply" and "adapter_model.safetensors" in manifest["source"]["sha256"]


@pytest.mark.parametrize(
    ("model", "form"),
    [("mamba", "full"), ("mamba", "low-rank"), ("mamba2", "per-head"), ("mamba2-grouped", "full")],
)
def test_an_offset_can_be_a_weight_of_a_config_of_our_own(
    models: dict[str, str], tmp_path: Path, model: str, form: str, tune: dict[str, object]
) -> None:
    source = models[model]
    ssmcompress.tune_state(source, form=form, lr=0.5, out=tmp_path / "a", **tune)
    out = ssmcompress.apply(tmp_path / "a", source, out=tmp_path / "own", own_config=True)
    expected, found = logits(source, tmp_path / "a"), logits(out)
    assert not torch.allclose(expected, logits(source), atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    stock = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32).eval()
    assert type(stock).__module__.endswith("modeling_ssmcompress")
    with torch.no_grad():
        torch.testing.assert_close(stock(IDS).logits, found, rtol=1e-4, atol=1e-4)
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ours = load(str(out), dtype=torch.float32).model
    assert torch.equal(stock.generate(IDS, **greedy), ours.generate(IDS, **greedy))


@pytest.mark.parametrize(
    ("model", "axis"),
    [
        ("mamba", "state"),
        ("mamba", "channel"),
        ("mamba2", "head"),
        ("mamba2", "head_channel"),
        ("mamba2", "state"),
        ("mamba2", "ssm"),
    ],
)
def test_a_model_with_an_offset_is_cut_as_others_are(
    models: dict[str, str], text: str, tmp_path: Path, model: str, axis: str, tune: dict[str, object]
) -> None:
    source = models[model]
    ssmcompress.tune_state(source, lr=0.5, out=tmp_path / "a", **tune)
    own = ssmcompress.apply(tmp_path / "a", source, out=tmp_path / "own", own_config=True)
    given = {"calib": text, "windows": 4, "length": 32, "any_size": True, "no_eval": True, "correct": "none"}
    cut = ssmcompress.prune(str(own), axis=axis, method="random", keep=0.5, out=tmp_path / "cut", **given)
    masked = load(str(own), dtype=torch.float32)
    mask(masked.model, masked.arch, cut.edits)
    with torch.no_grad():
        expected = masked.model(IDS, use_cache=False).logits
    torch.testing.assert_close(logits(cut.folder), expected, rtol=1e-4, atol=1e-4)
    again = ssmcompress.apply(cut.folder / "edits.safetensors", str(own), out=tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (cut.folder / "model.safetensors").read_bytes()


def test_an_offset_and_rotated_states_are_refused(
    models: dict[str, str], tmp_path: Path, tune: dict[str, object]
) -> None:
    ssmcompress.tune_state(models["mamba2"], lr=0.5, out=tmp_path / "a", **tune)
    own = ssmcompress.apply(tmp_path / "a", models["mamba2"], out=tmp_path / "own", own_config=True)
    with pytest.raises(UnsupportedError, match="offset"):
        ssmcompress.prune(str(own), axis="state", method="rotate", keep=0.5, out=tmp_path / "cut")
    with pytest.raises(UnsupportedError, match="where state-offset belongs"):
        ssmcompress.tune_state(str(own), out=tmp_path / "b", **tune)
    ssmcompress.tune_state(str(own), method="a-log", out=tmp_path / "c", **tune)
    ssmcompress.apply(tmp_path / "c", str(own), out=tmp_path / "both")
    with pytest.raises(UnsupportedError, match="falcon_mamba has no config of our own"):
        ssmcompress.tune_state(models["falcon_mamba"], out=tmp_path / "f", **tune)
        ssmcompress.apply(tmp_path / "f", models["falcon_mamba"], out=tmp_path / "g", own_config=True)


@pytest.mark.parametrize("method", ["state-offset", "prompt"])
def test_what_does_not_fold_is_refused_and_nothing_is_written(
    tmp_path: Path, method: str, capsys: pytest.CaptureFixture, tune: dict[str, object]
) -> None:
    ssmcompress.tune_state("ref:mamba", method=method, out=tmp_path / "a", **tune)
    with pytest.raises(UnsupportedError, match="does not fold into the weights"):
        ssmcompress.apply(tmp_path / "a", "ref:mamba", out=tmp_path / "folded")
    with pytest.raises(SystemExit, match="3"):
        main(["apply", str(tmp_path / "a"), "ref:mamba", "--out", str(tmp_path / "folded")])
    told = " ".join(capsys.readouterr().err.split())
    assert "Keep it beside the model" in told and ("--own-config" in told) == (method == "state-offset")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_zeros_that_are_filled_are_told(tmp_path: Path, tune: dict[str, object]) -> None:
    ssmcompress.prune("ref:mamba", method="magnitude", sparsity=0.6, out=tmp_path / "pruned", no_eval=True)
    notes: list[str] = []
    for method, filled in (("lora", True), ("full", False)):
        out, folded = tmp_path / method, tmp_path / f"{method}-folded"
        ssmcompress.tune_state(str(tmp_path / "pruned"), method=method, out=out, **tune)
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


def test_edits_of_a_model_make_its_adapter_smaller(tmp_path: Path, tune: dict[str, object]) -> None:
    ssmcompress.prune("ref:mamba", axis="state", keep=0.5, windows=4, length=64, out=tmp_path / "small", no_eval=True)
    edits = tmp_path / "small" / "edits.safetensors"
    for method in ("state-offset", "lora"):
        ssmcompress.tune_state("ref:mamba", method=method, out=tmp_path / method, **tune)
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


def test_edits_of_another_model_are_refused(tmp_path: Path, tune: dict[str, object]) -> None:
    ssmcompress.prune(
        "ref:mamba2", axis="head", keep=0.5, method="random", windows=4, length=64, out=tmp_path / "small", no_eval=True
    )
    ssmcompress.tune_state("ref:mamba", out=tmp_path / "a", **tune)
    with pytest.raises(UnsupportedError, match="has no axis 'head'"):
        ssmcompress.apply(tmp_path / "small" / "edits.safetensors", str(tmp_path / "a"), out=tmp_path / "b")
    assert not (tmp_path / "b").exists()
