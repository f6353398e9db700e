"""Loading: the right logits, the stored bits, no code run, and a clear sentence for everything that is wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MambaForCausalLM

from ssmcompress.checkpoint import hub, source
from ssmcompress.checkpoint.output import write
from ssmcompress.checkpoint.source import load, resolve, state_dict
from ssmcompress.errors import InputError, ResourceError, SsmcompressError, UnsupportedError
from tests.unit.arch.models import CONFIGS, tokens
from tests.unit.checkpoint.folders import change, edit_json, narrow, save, save_original, save_tokenizer

OUT_PROJ = "backbone.layers.0.mixer.out_proj.weight"
FAMILIES = ("mamba", "falcon_mamba", "mamba2")


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_stock(name: str, tmp_path: Path) -> None:
    stock = save(name, tmp_path)
    checkpoint = load(str(tmp_path), dtype=torch.float32)
    ids = tokens(2, 21)
    torch.testing.assert_close(logits(checkpoint.model, ids), logits(stock, ids), atol=1e-5, rtol=0)
    assert checkpoint.source.layout == "hf" and checkpoint.source.label == tmp_path.name
    assert not checkpoint.model.training and checkpoint.tokenizer is None
    assert not any(parameter.is_meta for parameter in checkpoint.model.parameters())
    buffers = dict(checkpoint.model.named_buffers())
    assert buffers.keys() == dict(stock.named_buffers()).keys()
    assert all(torch.equal(buffers[name], buffer) for name, buffer in stock.named_buffers())


@pytest.mark.parametrize("name", FAMILIES)
def test_mixed_dtypes_survive_bit_for_bit(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / "in")
    stored = narrow(tmp_path / "in")
    checkpoint = load(str(tmp_path / "in"))
    loaded = state_dict(checkpoint.model)
    (tmp_path / "out").mkdir()
    write(checkpoint, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {"torch.bfloat16", "torch.float32"}
    for name, tensor in stored.items():
        for other in (loaded[name], written[name]):
            assert other.dtype == tensor.dtype and torch.equal(other, tensor), name
    assert written.keys() == stored.keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.isfinite(logits(checkpoint.model, tokens(1, 9))).all()


def test_dtypes_on_request(tmp_path: Path) -> None:
    save("mamba2", tmp_path)
    narrow(tmp_path)
    wide = load(str(tmp_path), dtype=torch.float32).model
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    half = dict(load(str(tmp_path), dtype=torch.float16).model.named_parameters())
    assert half[OUT_PROJ].dtype == torch.float16
    assert half["backbone.layers.0.mixer.A_log"].dtype == torch.float32


@pytest.mark.parametrize("name", FAMILIES)
def test_rescaled_residuals_are_not_divided_again(name: str, tmp_path: Path) -> None:
    stock = save(name, tmp_path / "in")
    edit_json(tmp_path / "in" / "config.json", rescale_prenorm_residual=True)
    spoilt = AutoModelForCausalLM.from_pretrained(tmp_path / "in").state_dict()[OUT_PROJ]
    torch.testing.assert_close(spoilt, stock.state_dict()[OUT_PROJ] / 2**0.5)  # the bug of stock this guards against
    checkpoint = load(str(tmp_path / "in"))
    assert checkpoint.model.config.rescale_prenorm_residual is False
    assert torch.equal(checkpoint.model.state_dict()[OUT_PROJ], stock.state_dict()[OUT_PROJ])
    (tmp_path / "out").mkdir()
    write(checkpoint, tmp_path / "out")
    mended = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()[OUT_PROJ]
    assert torch.equal(mended, stock.state_dict()[OUT_PROJ])


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_original_layout_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    stock = save_original(name, tmp_path)
    checkpoint = load(str(tmp_path))
    ids = tokens(2, 21)
    torch.testing.assert_close(logits(checkpoint.model, ids), logits(stock, ids), atol=1e-5, rtol=0)
    assert checkpoint.source.layout == "mamba_ssm" and checkpoint.model.config.vocab_size == 64
    assert checkpoint.model.lm_head.weight is checkpoint.model.backbone.embeddings.weight


def test_original_layout_takes_special_tokens_from_its_tokenizer(tmp_path: Path) -> None:
    save_original("mamba", tmp_path)
    save_tokenizer(tmp_path)
    checkpoint = load(str(tmp_path))
    assert checkpoint.tokenizer is not None and checkpoint.tokenizer("w3 w5").input_ids == [4, 6]
    assert checkpoint.model.config.eos_token_id == checkpoint.tokenizer.eos_token_id == 0


def test_old_embedding_name_in_a_hugging_face_folder(tmp_path: Path) -> None:
    stock = save("mamba", tmp_path)
    old = stock.state_dict()["backbone.embeddings.weight"].clone()
    change(tmp_path, backbone__embeddings__weight=None, backbone__embedding__weight=old)
    assert torch.equal(load(str(tmp_path)).model.backbone.embeddings.weight, old)


def test_tokenizer_and_generation_config(tmp_path: Path) -> None:
    save("mamba", tmp_path, tokenizer=True)
    edit_json(tmp_path / "generation_config.json", max_new_tokens=7)
    checkpoint = load(str(tmp_path))
    assert checkpoint.model.generation_config.max_new_tokens == 7
    assert checkpoint.tokenizer is not None and checkpoint.tokenizer.decode([1, 2]) == "w0 w1"


def test_code_in_the_folder_never_runs(tmp_path: Path) -> None:
    save("mamba", tmp_path)
    edit_json(
        tmp_path / "config.json",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit")
    checkpoint = load(str(tmp_path))
    assert not (tmp_path / "ran").exists()
    assert not hasattr(checkpoint.model.config, "auto_map")


def test_backend_and_reference_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("mamba", tmp_path)
    monkeypatch.setattr(source.reference, "HERE", tmp_path.parent)
    checkpoint = load(f"ref:{tmp_path.name}", backend="reference")
    assert checkpoint.source.label == f"ref:{tmp_path.name}"
    assert checkpoint.model.backbone.layers[1].mixer.backend.name == "reference"
    with pytest.raises(InputError) as caught:
        resolve(f"ref:{tmp_path.name[:-1]}")
    assert f"Did you mean ref:{tmp_path.name}?" in caught.value.hint


def refused(folder: Path, error: type[SsmcompressError], *said: str) -> None:
    """Loading fails with this error, in one line that says these words."""
    with pytest.raises(error) as caught:
        load(str(folder))
    message = f"{caught.value.message} {caught.value.hint}"
    for word in said:
        assert word in message
    assert "\n" not in message


BAD_WEIGHTS = {
    "missing": ({"backbone__layers__1__mixer__A_log": None}, ("A_log", "[64, 5]")),
    "unexpected": ({"backbone__layers__1__mixer__E": torch.ones(3)}, ("mixer.E", "model.safetensors")),
    "shape": ({"backbone__layers__1__mixer__D": torch.ones(63)}, ("mixer.D", "[63]", "[64]", "model.safetensors")),
    "nan": ({"backbone__layers__0__mixer__D": torch.full((64,), torch.nan)}, ("mixer.D", "64 values", "NaN")),
    "infinite": ({"backbone__norm_f__weight": torch.tensor([torch.inf] + [1.0] * 31)}, ("norm_f", "1 values")),
    "layers": ({"backbone__layers__2__mixer__D": torch.ones(64)}, ("3 layers", "says 2")),
    "head": ({"lm_head__weight": torch.ones(61, 32)}, ("lm_head.weight", "ties")),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights(case: str, tmp_path: Path) -> None:
    save("mamba", tmp_path)
    tensors, said = BAD_WEIGHTS[case]
    change(tmp_path, **tensors)
    refused(tmp_path, InputError, *said)


BAD_CONFIGS = {
    "foreign": ({"model_type": "llama"}, UnsupportedError, ("llama", "mamba")),
    "typo": ({"model_type": "mamba3"}, UnsupportedError, ("mamba3", "Did you mean")),
    "none": ({"model_type": None}, InputError, ("model_type",)),
    "text": ({"hidden_size": "wide"}, InputError, ("hidden_size", "config.json")),
    "negative": ({"state_size": -1}, InputError, ("state_size", "-1")),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedError, ("quantised",)),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config(case: str, tmp_path: Path) -> None:
    save("mamba", tmp_path)
    changes, error, said = BAD_CONFIGS[case]
    edit_json(tmp_path / "config.json", **changes)
    refused(tmp_path, error, *said)


def test_integer_weights_are_unsupported(tmp_path: Path) -> None:
    save("mamba", tmp_path)
    change(tmp_path, backbone__layers__0__mixer__D=torch.ones(64, dtype=torch.int8))
    refused(tmp_path, UnsupportedError, "mixer.D", "I8", "BF16")


def test_damaged_tokenizer(tmp_path: Path) -> None:
    save("mamba", tmp_path, tokenizer=True)
    (tmp_path / "tokenizer.json").write_text("{")
    refused(tmp_path, InputError, "tokenizer")


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for name, said in {
        "file": "is a file",
        "empty": "no config.json",
        "adapter": "--adapter",
        "none": "no folder",
    }.items():
        refused(tmp_path / name, InputError, said)


def test_a_model_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ResourceError) as caught:
        resolve("somebody/no-such-model@v1")
    assert "somebody/no-such-model@v1" in caught.value.message and "HF_HUB_OFFLINE" in caught.value.hint


def test_hub_revision_is_the_commit_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "a" * 40
    save("mamba", tmp_path / commit)
    asked: list[dict] = []

    def download(name: str, **options: object) -> str:
        asked.append({"name": name, **options})
        return str(tmp_path / commit)

    monkeypatch.setattr(hub, "snapshot_download", download)
    found = source.resolve("somebody/model@v2")
    assert (found.name, found.revision, found.label) == ("somebody/model", commit, "somebody/model")
    assert asked == [
        {"name": "somebody/model", "revision": "v2", "allow_patterns": [*hub.BESIDE, *hub.SAFETENSORS]}
    ]  # no second call: what runs code on loading is fetched only where there is nothing else
    assert isinstance(load(found).model, MambaForCausalLM)
