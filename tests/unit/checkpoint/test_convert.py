"""The two layouts: every tensor the same bits both ways, the fields of one config in the other, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FalconMambaConfig, Mamba2Config, MambaConfig

from ssmcompress.checkpoint import layout, manifest
from ssmcompress.checkpoint.convert import convert
from ssmcompress.checkpoint.source import load
from ssmcompress.errors import InputError, UnsupportedError
from ssmcompress.events import Event, Finished, Metric
from tests.unit.arch.models import CONFIGS, tokens
from tests.unit.checkpoint.folders import edit_json, narrow, save, save_original

DENSE = {"d_model": 32, "n_layer": 2}
SIZES = ("hidden_size", "num_hidden_layers", "state_size", "conv_kernel", "use_bias", "use_conv_bias", "time_step_rank")
SIZES += ("intermediate_size", "num_heads", "head_dim", "n_groups", "chunk_size", "vocab_size", "tie_word_embeddings")


@pytest.mark.parametrize("name", ["mamba", "mamba-biased", "mamba-narrow", "mamba2", "mamba2-grouped"])
def test_round_trip_from_hugging_face(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / "hf", tokenizer=True)
    stored = narrow(tmp_path / "hf")
    events: list[Event] = []
    convert(str(tmp_path / "hf"), to="mamba-ssm", out=tmp_path / "original", emit=events.append)
    convert(str(tmp_path / "original"), to="hf", out=tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == stored.keys()
    for key, tensor in stored.items():
        assert back[key].dtype == tensor.dtype and torch.equal(back[key], tensor), key
    first, second = (load(str(tmp_path / folder)).model.config for folder in ("hf", "back"))
    assert {key: getattr(first, key, None) for key in SIZES} == {key: getattr(second, key, None) for key in SIZES}
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "hf" / file).read_bytes() == (tmp_path / "back" / file).read_bytes()
    assert [event.name for event in events if isinstance(event, Metric)] == ["logit difference, ssmcompress"]
    assert events[-1] == Finished(str(tmp_path / "original"))


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_round_trip_from_the_original(name: str, tmp_path: Path) -> None:
    stock = save_original(name, tmp_path / "original")
    convert(str(tmp_path / "original"), to="hf", out=tmp_path / "hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = tokens(2, 17)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, stock(ids).logits, atol=1e-5, rtol=0)
    convert(str(tmp_path / "hf"), to="mamba-ssm", out=tmp_path / "back")
    first, second = (
        torch.load(tmp_path / folder / "pytorch_model.bin", weights_only=True) for folder in ("original", "back")
    )
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert second["lm_head.weight"].data_ptr() == second["backbone.embedding.weight"].data_ptr()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config.keys() == layout.TOP.keys()  # the fields of mamba_ssm's MambaConfig, which takes no others
    record = manifest.read(tmp_path / "hf")
    assert record.source.layout == "mamba_ssm" and record.verification is not None
    assert record.verification.transformers is not None and manifest.changed(tmp_path / "hf") == []


def test_same_input_same_bytes(tmp_path: Path) -> None:
    save("mamba", tmp_path / "hf")
    for to in ("mamba-ssm", "hf"):
        for out in ("a", "b"):
            convert(str(tmp_path / "hf"), to=to, out=tmp_path / f"{to}-{out}")  # type: ignore[arg-type]
        for path in (tmp_path / f"{to}-a").iterdir():
            assert path.read_bytes() == (tmp_path / f"{to}-b" / path.name).read_bytes(), path


@pytest.mark.parametrize(("hidden", "width"), [(48, 7), (48, 96), (32, 37), (13, 15), (22, 49)])
def test_any_width_is_expressible_as_a_factor(hidden: int, width: int) -> None:
    config = layout.original_config(MambaConfig(hidden_size=hidden, num_hidden_layers=1, intermediate_size=width))
    assert int(config["ssm_cfg"].get("expand", 2) * hidden) == width  # 15 / 13 * 13 is less than 15
    assert layout.hf_config(json.loads(json.dumps(config))).intermediate_size == width


def test_published_configs() -> None:
    first = layout.hf_config({"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True})
    assert (first.model_type, first.vocab_size, first.intermediate_size) == ("mamba", 50280, 1536)
    assert (first.time_step_rank, first.state_size, first.tie_word_embeddings) == (48, 16, True)
    second = layout.hf_config(
        {
            "d_model": 768,
            "n_layer": 24,
            "vocab_size": 50277,
            "ssm_cfg": {"layer": "Mamba2"},
            "pad_vocab_size_multiple": 16,
        }
    )
    assert (second.model_type, second.vocab_size, second.num_heads, second.head_dim) == ("mamba2", 50288, 24, 64)
    assert (second.n_groups, second.state_size, second.tie_word_embeddings) == (1, 128, True)


def test_step_limits_survive() -> None:
    limited = layout.original_config(CONFIGS["mamba2-limited"])
    assert limited["ssm_cfg"]["dt_limit"] == [0.01, 0.2]
    assert tuple(layout.hf_config(limited).time_step_limit) == (0.01, 0.2)


INEXPRESSIBLE_IN_HF = {
    "attention": {"attn_layer_idx": [9, 18]},
    "mlp": {"d_intermediate": 64},
    "layernorm": {"rms_norm": False},
    "layer": {"ssm_cfg": {"layer": "Mamba3"}},
    "field": {"rope": True},
    "ssm field": {"ssm_cfg": {"bimamba_type": "v2"}},
    "wrong family": {"ssm_cfg": {"layer": "Mamba1", "headdim": 64}},
    "head skip": {"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "D_has_hdim": True}},
    "no gated norm": {"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "rmsnorm": False}},
    "norm first": {"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "norm_before_gate": True}},
    "part ssm": {"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_ssm": 32}},
    "broken expand": {"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "expand": 1.5}},
}


@pytest.mark.parametrize("case", INEXPRESSIBLE_IN_HF)
def test_what_hugging_face_cannot_express(case: str) -> None:
    with pytest.raises(UnsupportedError, match="cannot express"):
        layout.hf_config(DENSE | INEXPRESSIBLE_IN_HF[case])


@pytest.mark.parametrize(
    "config",
    [
        FalconMambaConfig(hidden_size=32, num_hidden_layers=1),
        MambaConfig(hidden_size=32, num_hidden_layers=1, layer_norm_epsilon=1e-6),
        MambaConfig(hidden_size=32, num_hidden_layers=1, hidden_act="gelu"),
        Mamba2Config(hidden_size=32, num_heads=8, head_dim=8, num_hidden_layers=1, layer_norm_epsilon=1e-6),
    ],
    ids=["falcon", "epsilon", "activation", "epsilon2"],
)
def test_what_mamba_ssm_cannot_express(config: object) -> None:
    with pytest.raises(UnsupportedError, match="mamba-ssm"):
        layout.original_config(config)  # type: ignore[arg-type]


BAD = {
    "text": {"d_model": "wide"},
    "zero": {"n_layer": 0},
    "ssm": {"ssm_cfg": [1]},
    "heads": {"ssm_cfg": {"layer": "Mamba2", "headdim": 7}},
    "headdim": {"ssm_cfg": {"layer": "Mamba2", "headdim": 0}},
    "state": {"ssm_cfg": {"d_state": "many"}},
    "negative": {"ssm_cfg": {"d_state": -4}},
    "limit": {"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "dt_limit": 3}},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_original_config(case: str, tmp_path: Path) -> None:
    save_original("mamba", tmp_path)
    edit_json(tmp_path / "config.json", **BAD[case])
    with pytest.raises(InputError) as caught:
        load(str(tmp_path))
    assert "config.json" in caught.value.message


def test_nothing_is_written_where_the_other_layout_fails(tmp_path: Path) -> None:
    save("falcon_mamba", tmp_path / "in")
    with pytest.raises(UnsupportedError):
        convert(str(tmp_path / "in"), to="mamba-ssm", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_unknown_layout_and_output_over_the_input(tmp_path: Path) -> None:
    save("mamba", tmp_path / "in")
    with pytest.raises(InputError, match="layout"):
        convert(str(tmp_path / "in"), to="gguf", out=tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds the model"):
        convert(str(tmp_path / "in"), to="mamba-ssm", out=tmp_path / "in", overwrite=True)
    assert load_file(tmp_path / "in" / "model.safetensors")
