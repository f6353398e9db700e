"""Verification: agreement is measured with both loaders, and every kind of disagreement is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ssmcompress.checkpoint.output import write
from ssmcompress.checkpoint.source import load
from ssmcompress.checkpoint.verify import logits, require_finite, verify
from ssmcompress.errors import InputError, SsmcompressError
from tests.unit.arch.models import CONFIGS
from tests.unit.checkpoint.folders import change, edit_json, narrow, save

D = "backbone.layers.0.mixer.D"


@pytest.mark.parametrize("name", CONFIGS)
def test_both_loaders_agree_with_a_mixed_model(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / "in")
    narrow(tmp_path / "in")
    checkpoint = load(str(tmp_path / "in"))
    before = {key: tensor.clone() for key, tensor in checkpoint.model.state_dict().items()}
    (tmp_path / "out").mkdir()
    write(checkpoint, tmp_path / "out")
    verified = verify(tmp_path / "out", checkpoint.model)
    assert verified.loaders == ("transformers", "ssmcompress")
    assert verified.ssmcompress == 0 and verified.transformers is not None and verified.transformers < 1e-5
    after = checkpoint.model.state_dict()
    assert all(after[key].dtype == before[key].dtype and torch.equal(after[key], before[key]) for key in before)
    if checkpoint.model.config.tie_word_embeddings:
        assert checkpoint.model.lm_head.weight is checkpoint.model.backbone.embeddings.weight


def test_stock_may_be_left_out(tmp_path: Path) -> None:
    save("mamba", tmp_path)
    verified = verify(tmp_path, load(str(tmp_path)).model, stock=False)
    assert verified.loaders == ("ssmcompress",) and verified.transformers is None


def test_a_changed_weight_is_refused(tmp_path: Path) -> None:
    save("mamba", tmp_path)
    model = load(str(tmp_path)).model
    change(tmp_path, **{D.replace(".", "__"): load_file(tmp_path / "model.safetensors")[D] + 0.5})
    with pytest.raises(SsmcompressError, match="logits differ") as caught:
        verify(tmp_path, model)
    assert caught.value.exit_code == 1


def test_nan_is_no_agreement(tmp_path: Path) -> None:
    save("mamba", tmp_path)
    model = load(str(tmp_path)).model
    with torch.no_grad():
        model.backbone.norm_f.weight[0] = torch.nan
    with pytest.raises(SsmcompressError, match="differ by nan"):
        verify(tmp_path, model)


def test_a_model_of_zeros_loads_again(tmp_path: Path) -> None:
    save("mamba", tmp_path)
    change(tmp_path, **{"backbone__norm_f__weight": torch.zeros(32)})
    assert verify(tmp_path, load(str(tmp_path)).model).transformers == 0


def test_a_source_without_numbers_is_refused(tmp_path: Path) -> None:
    save("mamba", tmp_path)
    checkpoint = load(str(tmp_path))
    require_finite(checkpoint)
    with torch.no_grad():
        checkpoint.model.backbone.norm_f.weight[0] = 3e38
    with pytest.raises(InputError, match="not finite"):
        require_finite(checkpoint)


def test_what_stock_leaves_to_chance_is_refused(tmp_path: Path) -> None:
    save("mamba2", tmp_path)
    model = load(str(tmp_path)).model
    change(tmp_path, **{D.replace(".", "__"): None})
    with pytest.raises(SsmcompressError, match=r"transformers.*missing keys.*mixer\.D"):
        verify(tmp_path, model)


def test_what_does_not_load_is_refused(tmp_path: Path) -> None:
    save("mamba2", tmp_path)
    model = load(str(tmp_path)).model
    edit_json(tmp_path / "config.json", num_heads=7)
    for stock in (True, False):
        with pytest.raises(SsmcompressError, match="does not load again"):
            verify(tmp_path, model, stock=stock)


def test_logits_of_a_window_that_never_changes(tmp_path: Path) -> None:
    save("mamba", tmp_path)
    narrow(tmp_path)
    model = load(str(tmp_path)).model
    first = logits(model)
    assert first.shape == (2, 48, 61) and first.dtype == torch.float32
    assert torch.equal(first, logits(model))
    assert torch.equal(first, logits(load(str(tmp_path), dtype=torch.float32).model))
