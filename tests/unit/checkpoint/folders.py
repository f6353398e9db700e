"""Checkpoint folders as others write them: stock Hugging Face ones, mixed dtypes, and the mamba-ssm layout."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.unit.arch.models import CONFIGS, ours, stock

NARROW_EXCEPT = ("A_log", "D", "dt_bias")
WORDS = ["<end>", *(f"w{i}" for i in range(60))]
ORIGINAL = {
    "mamba": {"d_model": 32, "n_layer": 2, "vocab_size": 57, "ssm_cfg": {"d_state": 5}, "pad_vocab_size_multiple": 8},
    "mamba2": {
        "d_model": 32,
        "d_intermediate": 0,
        "n_layer": 2,
        "vocab_size": 50,
        "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 16, "chunk_size": 8},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    },
}


def save(name: str, folder: Path, *, tokenizer: bool = False) -> PreTrainedModel:
    """Saves a small random model of `CONFIGS` as stock transformers does, and returns it."""
    model = stock(ours(name))
    model.save_pretrained(folder)
    if tokenizer:
        save_tokenizer(folder)
    return model


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of 61 words."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", bos_token="<end>").save_pretrained(folder)


def narrow(folder: Path) -> dict[str, torch.Tensor]:
    """Stores a folder in bfloat16 but for the state space's own parameters, and returns what it holds."""
    state = load_file(folder / "model.safetensors")
    state = {
        name: tensor if name.rsplit(".", 1)[-1] in NARROW_EXCEPT else tensor.bfloat16()
        for name, tensor in state.items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", dtype="bfloat16")
    return state


def save_original(name: str, folder: Path) -> PreTrainedModel:
    """Writes a mamba-ssm folder, and returns the stock model of the same weights."""
    config = ORIGINAL[name]
    padded = {"mamba": 64, "mamba2": 64}[name]
    torch.manual_seed(3)
    model = stock(ours(name)).__class__(type(CONFIGS[name])(**CONFIGS[name].to_dict() | _same(padded))).eval()
    state = {key.replace("embeddings", "embedding"): tensor for key, tensor in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return model


def edit_json(path: Path, **changes: object) -> None:
    """Changes keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replaces, adds or (None) removes tensors of a folder; `__` stands for a dot in names."""
    state = load_file(folder / "model.safetensors")
    for key, tensor in tensors.items():
        name = key.replace("__", ".")
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _same(vocabulary: int) -> dict[str, object]:
    return {"vocab_size": vocabulary, "tie_word_embeddings": True}
