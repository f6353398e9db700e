import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from ssmcompress.checkpoint.source import load
from ssmcompress.errors import InputError
from ssmcompress.measure import text
from ssmcompress.measure.exercises import Vocabulary
from ssmcompress.measure.perplexity import perplexity
from ssmcompress.measure.recall import copy_probe, key_value_probe
from ssmcompress.reference import folder, names

FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
}
WIDE = ("A_log", "D", "dt_bias")


def test_both_families_are_shipped():
    assert names() == ["mamba", "mamba2"]
    with pytest.raises(InputError, match="mamba3") as caught:
        folder("mamba3")
    assert "ref:mamba" in caught.value.hint


@pytest.mark.parametrize("name", names())
def test_a_checkpoint_is_whole_small_and_stored_as_its_card_says(name: str):
    found = folder(name)
    assert {path.name for path in found.iterdir()} == FILES
    assert sum(path.stat().st_size for path in found.iterdir()) < 10e6
    config = json.loads((found / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and not config.get("rescale_prenorm_residual")
    with safe_open(found / "model.safetensors", "pt") as weights:
        for key in weights.keys():  # noqa: SIM118
            wide = key.rsplit(".", 1)[-1] in WIDE
            assert weights.get_tensor(key).dtype == (torch.float32 if wide else torch.bfloat16), key


@pytest.mark.parametrize("name", names())
def test_stock_transformers_gives_the_same_logits(name: str):
    stock = AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder(name))
    ids = tokenizer("It was the best of times, it was the worst of times.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        theirs = stock(ids).logits
        ours = load(f"ref:{name}", dtype=torch.float32).model(ids).logits
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("name", names())
def test_a_checkpoint_is_trained(name: str):
    """Well under what its card says, on a few items: a damaged file or a broken kernel fails here."""
    checkpoint = load(f"ref:{name}", dtype=torch.float32)
    words = Vocabulary.of(checkpoint.tokenizer)
    assert copy_probe(checkpoint.model, words, 12, 32, seed=0).accuracy > 0.95
    assert key_value_probe(checkpoint.model, words, 4, 64, seed=0).accuracy > 0.85
    novels = text.documents("novels")[::12]
    assert perplexity(checkpoint.model, checkpoint.tokenizer, novels).bits_per_byte < 1.8


def test_the_tokenizer_reads_every_text_back():
    tokenizer = AutoTokenizer.from_pretrained(folder("mamba"))
    assert len(tokenizer) == 4096 and tokenizer.eos_token_id == 0
    for sample in ("naïve café – ½ £5 ✓ 日本語\n\ttabs  and spaces", text.documents("wikipedia")[0]):
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
    paths = [folder(name) / "tokenizer.json" for name in names()]
    assert len({Path(path).read_bytes() for path in paths}) == 1
