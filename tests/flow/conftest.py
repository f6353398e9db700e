"""Small random models of every family with a tokenizer of their own, beside the shipped checkpoints where they are."""

import itertools
import random

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import FalconMambaConfig, Mamba2Config, MambaConfig, PreTrainedTokenizerFast

from ssmcompress import cli, reference
from ssmcompress.arch.registry import arch_for
from tests.unit.checkpoint.folders import narrow

END = "<|endoftext|>"
WORDS = ["".join(letters) for letters in itertools.product("bdklmnst", "aeo", "klmnrt")]
VOCABULARY = 512
SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
CONFIGS = {
    "mamba": MambaConfig(**SHARED, state_size=6),
    "falcon_mamba": FalconMambaConfig(**SHARED, state_size=8),
    "mamba2": Mamba2Config(**SHARED, num_heads=8, head_dim=8, n_groups=1, state_size=16, chunk_size=16),
    "mamba2-grouped": Mamba2Config(**SHARED, num_heads=4, head_dim=16, n_groups=2, state_size=7, chunk_size=16),
}
NARROW = ("mamba", "mamba2-grouped")  # stored in bfloat16 but for A_log, D and dt_bias
FAMILIES = tuple(CONFIGS)
SHIPPED = tuple(f"ref:{name}" for name in reference.names())
MODELS = FAMILIES + SHIPPED


def prose(words: int, seed: int) -> str:
    """Random words in lines."""
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice((" ", " ", " ", ", ", ".\n")) for _ in range(words))


def save_tokenizer(folder) -> None:
    """A byte-level BPE tokenizer that knows most of the words by one token each."""
    made = ByteLevelBPETokenizer()
    made.train_from_iterator([" " + " ".join(WORDS)] * 4 + [prose(3000, 1)], VOCABULARY, 2, special_tokens=[END])
    PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token=END, bos_token=END).save_pretrained(folder)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """Keeps caches out of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """What to call each model: a folder, or ref:NAME."""
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        torch.manual_seed(7)
        model = arch_for(config).build("cpu")
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "in_proj" in key or "x_proj" in key or key.endswith(("dt_bias", "D")):
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            embedding = model.get_input_embeddings().weight  # words that share features, as learned ones do
            embedding.copy_(embedding @ (torch.randn(32, 32) * torch.logspace(0.5, -1.5, 32)[:, None]))
        model.save_pretrained(root / name)
        save_tokenizer(root / name)
        if name in NARROW:
            narrow(root / name)
    return {name: str(root / name) for name in CONFIGS} | {name: name for name in SHIPPED}


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A plain text file of a few thousand tokens."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(prose(2500, 2))
    return str(path)


@pytest.fixture(scope="session")
def small(text):
    """Options that keep a run short: ten windows of 48 tokens, nothing measured."""
    return {"calib": text, "windows": 10, "length": 48, "no_eval": True}


@pytest.fixture
def run(capsys):
    """Runs a command line; returns its exit code, standard output and standard error."""

    def runner(*arguments):
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in arguments])
        return left.value.code or 0, *capsys.readouterr()

    return runner
