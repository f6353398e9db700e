"""Whatever lies in a file that comes from outside: it is read, or refused in a sentence; nothing is run or written."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import ssmcompress
from ssmcompress import recipes
from ssmcompress.checkpoint import manifest
from ssmcompress.checkpoint.source import load, resolve
from ssmcompress.errors import SsmcompressError
from ssmcompress.evaluate.results import read as read_results
from ssmcompress.tune import examples
from ssmcompress.tuning import TuneState
from tests.unit.checkpoint import folders
from tests.unit.damage import damage, spoil

TIMES = 60
RECIPE = {
    "model": "ref:mamba",
    "seed": 3,
    "calibrate": {"windows": 4, "length": 32, "mix": "recall"},
    "steps": [
        {"step": "prune", "method": "wanda", "sparsity": 0.5, "modules": {"in_proj": 0.4}},
        {"step": "prune", "axis": "state", "keep": 0.5},
        {"step": "reduce-tokens", "flops": 0.2},
        {"step": "tune-state", "method": "lora", "targets": ["in_proj"]},
    ],
    "save": {"shard_size": "1GB"},
    "eval": {"perplexity": "default", "tasks": ["lambada_openai_local"]},
    "gate": {"max_drop": {"perplexity": 0.1}},
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in shards, one cut to sizes of its own, an adapter, results, and a recipe."""
    root = tmp_path_factory.mktemp("sound")
    model = folders.save("mamba", root / "plain", tokenizer=True)
    model.save_pretrained(root / "shards", max_shard_size="20KB")
    folders.save_tokenizer(root / "shards")
    generation = {"eos_token_id": [0, 1], "temperature": 0.7, "suppress_tokens": [3], "max_new_tokens": 5}
    (root / "plain/generation_config.json").write_text(json.dumps(generation))
    (root / "text").write_text("w1 w2 w3 w4 w5 w6 w7 w8 " * 60)
    lines = [{"prompt": f"w{i}", "completion": f" w{i + 1} w{i + 2}"} for i in range(9)]
    (root / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    few = {"calib": str(root / "text"), "windows": 2, "length": 8, "no_eval": True, "any_size": True}
    ssmcompress.prune(str(root / "plain"), axis="channel", keep=0.5, correct="bias", out=root / "cut", **few)
    ssmcompress.tune_state(str(root / "plain"), data=str(root / "data.jsonl"), steps=1, out=root / "adapter")
    ssmcompress.evaluate(str(root / "plain"), perplexity=str(root / "text"), out=root / "results")
    (root / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return root


def computes(folder: Path) -> None:
    model = load(str(folder)).model
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), use_cache=False)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "config": ("plain/config.json", lambda root: computes(root / "plain")),
    "own config": ("cut/config.json", lambda root: computes(root / "cut")),
    "index": ("shards/model.safetensors.index.json", lambda root: computes(root / "shards")),
    "manifest": ("cut/ssmcompress.json", lambda root: manifest.read(root / "cut")),
    "adapter": ("adapter/adapter_config.json", lambda root: load(str(root / "plain"), adapter=root / "adapter")),
    "results": ("results/summary.json", lambda root: read_results(root / "results")),
    "recipe": ("recipe.yaml", lambda root: recipes.read(str(root / "recipe.yaml"))),
    "generation": ("plain/generation_config.json", lambda root: load(str(root / "plain"))),
    "tokenizer": ("plain/tokenizer_config.json", lambda root: load(str(root / "plain"))),
}
BYTES: dict[str, tuple[str, int, Callable[[Path], object]]] = {
    "weights": ("plain/model.safetensors", 1500, lambda root: load(str(root / "plain"))),
    "adapter weights": (
        "adapter/adapter_model.safetensors",
        150,
        lambda root: load(str(root / "plain"), adapter=root / "adapter"),
    ),
    "recipe": ("recipe.yaml", 900, lambda root: recipes.read(str(root / "recipe.yaml"))),
    "config": ("plain/config.json", 900, lambda root: load(str(root / "plain"))),
    "lines": (
        "data.jsonl",
        300,
        lambda root: examples.read(str(root / "data.jsonl"), folders_tokenizer(root), TuneState(data="x")),
    ),
    "items": ("results/samples.jsonl", 300, lambda root: read_results(root / "results")),
}


def folders_tokenizer(root: Path) -> object:
    return resolve(str(root / "plain")).tokenizer()


def outcome(read: Callable[[Path], object], root: Path) -> str:
    before = set(root.rglob("*"))
    try:
        read(root)
        found = "read"
    except SsmcompressError as error:
        assert error.exit_code in (2, 3, 4), error.message
        assert error.message and "Traceback" not in error.message
        found = "refused"
    assert set(root.rglob("*")) == before
    return found


@pytest.mark.parametrize("read", [each[-1] for each in (*READERS.values(), *BYTES.values())])
def test_what_is_sound_is_read(sound: Path, read: Callable[[Path], object]) -> None:
    assert outcome(read, sound) == "read"


@pytest.mark.parametrize("name", READERS)
def test_values_of_another_kind(sound: Path, tmp_path: Path, name: str) -> None:
    file, read = READERS[name]
    rng, found = random.Random(name), []
    shutil.copytree(sound, tmp_path / "root")
    place = tmp_path / "root" / file
    told = yaml.safe_load(place.read_text())
    for _ in range(TIMES):
        spoilt = spoil(told, rng)
        place.write_text(json.dumps(spoilt) if place.suffix == ".json" else yaml.safe_dump(spoilt))
        found.append(outcome(read, tmp_path / "root"))
    assert found.count("refused") > TIMES / 10 or name == "generation"  # transformers takes much of it


@pytest.mark.parametrize("name", BYTES)
def test_bytes_that_are_damaged(sound: Path, tmp_path: Path, name: str) -> None:
    file, header, read = BYTES[name]
    rng, found = random.Random(name), []
    raw = (sound / file).read_bytes()
    shutil.copytree(sound, tmp_path / "root")
    place = tmp_path / "root" / file
    for _ in range(TIMES):
        place.unlink()  # a new file each time: what was loaded may still be mapped
        place.write_bytes(damage(raw, rng, header))
        found.append(outcome(read, tmp_path / "root"))
    assert found.count("refused") > TIMES / 4


def test_tensors_that_are_missing_twice_or_elsewhere_are_refused(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound / "shards", tmp_path / "shards")
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    names = sorted(index["weight_map"])
    first = load_file(tmp_path / "shards" / index["weight_map"][names[0]])
    save_file(first, tmp_path / "outside.safetensors")
    for file in ("../outside.safetensors", "/etc/passwd", "..\\outside.safetensors", "C:outside.safetensors"):
        changed = index | {"weight_map": index["weight_map"] | {names[0]: file}}
        (tmp_path / "shards/model.safetensors.index.json").write_text(json.dumps(changed))
        with pytest.raises(SsmcompressError, match="outside its folder"):
            load(str(tmp_path / "shards"))


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"to_dict": 1}', '{"cache_implementation": "../../x"}', "\udcff"])
def test_a_generation_config_that_is_none_is_refused(sound: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(sound / "plain", tmp_path / "plain")
    (tmp_path / "plain/generation_config.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    assert outcome(lambda root: load(str(root / "plain")), tmp_path) == "refused"


@pytest.mark.parametrize("file", ["plain/config.json", "shards/model.safetensors.index.json"])
def test_json_that_is_nested_too_deeply_is_refused(sound: Path, tmp_path: Path, file: str) -> None:
    shutil.copytree(sound, tmp_path / "root")
    (tmp_path / "root" / file).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    assert outcome(lambda root: load(str(root / Path(file).parent)), tmp_path / "root") == "refused"


@pytest.mark.parametrize(
    "value", ["2026-13-45", "!!int x", "!!timestamp x", "!!float", "9" * 5000, "!!python/name:os.x"]
)
def test_yaml_values_that_are_none_are_refused(sound: Path, tmp_path: Path, value: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text((sound / "recipe.yaml").read_text() + f"description: {value}\n")
    assert outcome(lambda root: recipes.read(str(path)), tmp_path) == "refused"
