"""Weight files: lazy and partial reads, shards written as Hugging Face has them, and refusal of everything crooked."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from ssmcompress.checkpoint import shards
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.errors import InputError, ResourceError

STATE = {f"t{i}": torch.arange(256.0).reshape(16, 16) + i for i in range(4)}


def test_one_file_and_many_hold_the_same(tmp_path: Path) -> None:
    for folder, size in {"one": "5GB", "many": 2100}.items():
        (tmp_path / folder).mkdir()
        shards.save(STATE, tmp_path / folder, shard_size=size)
        read = Shards(tmp_path / folder)
        assert {name: tensor.tolist() for name, tensor in read.items()} == {k: v.tolist() for k, v in STATE.items()}
    assert (tmp_path / "one" / "model.safetensors").exists()
    assert len(read.weight_files) == 2 and (tmp_path / "many" / "model.safetensors.index.json").exists()


def test_lazy_reads(tmp_path: Path) -> None:
    shards.save({"a": STATE["t0"].bfloat16()}, tmp_path)
    read = Shards(tmp_path)
    assert (read.dtype("a"), read.shape("a"), len(read)) == (torch.bfloat16, (16, 16), 1)
    assert torch.equal(read.get_slice("a", (slice(2, 4), slice(0, 3))), STATE["t0"].bfloat16()[2:4, :3])
    read["a"].zero_()
    assert read["a"].count_nonzero() > 0  # an edit in memory never reaches the file
    renamed = read.select({"b": "a"})
    assert list(renamed) == ["b"] and torch.equal(renamed["b"], read["a"]) and renamed.stored_name("b") == "a"
    assert renamed.meta()["b"].is_meta and renamed.meta()["b"].dtype == torch.bfloat16


def test_same_tensors_same_bytes_and_values_asked_for_shard_by_shard(tmp_path: Path) -> None:
    asked: list[str] = []

    def value(name: str) -> torch.Tensor:
        asked.append(name)
        return STATE[name]

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    shards.save(STATE, tmp_path / "a", shard_size=2100)
    shards.save({k: v.to("meta") for k, v in STATE.items()}, tmp_path / "b", shard_size=2100, value=value)
    assert asked == list(STATE)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_more_than_the_disk_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(ResourceError, match=r"kB of weights do not fit on the disk of .*: 100 bytes are free"):
        shards.save(STATE, tmp_path)
    assert not list(tmp_path.iterdir())


def refused(folder: Path, *said: str) -> None:
    with pytest.raises(InputError) as caught:
        Shards(folder)
    for word in said:
        assert word in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize("cut", [8, 500, 1])
def test_truncated(cut: int, tmp_path: Path) -> None:
    shards.save(STATE, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut] if cut > 1 else b"")
    refused(tmp_path, "model.safetensors", "readable")


def test_lfs_pointer(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    refused(tmp_path, "git lfs pull")


def test_no_weights(tmp_path: Path) -> None:
    refused(tmp_path, "model.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize(
    "file", ["../model-00001-of-00001.safetensors", "/etc/passwd", "a/../../b", "C:\\x", "x\\..\\y"]
)
def test_index_that_leaves_its_folder(file: str, tmp_path: Path) -> None:
    index(tmp_path, {"a": file})
    refused(tmp_path, "outside its folder", repr(file))


def test_index_that_is_wrong(tmp_path: Path) -> None:
    save_file({"a": STATE["t0"]}, tmp_path / "one.safetensors")
    save_file({"a": STATE["t0"], "b": STATE["t1"]}, tmp_path / "two.safetensors")
    index(tmp_path, {"a": "one.safetensors", "b": "gone.safetensors"})
    refused(tmp_path, "gone.safetensors", "does not exist")
    index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    refused(tmp_path, "stored twice", "one.safetensors", "two.safetensors")
    index(tmp_path, {"c": "one.safetensors"})
    refused(tmp_path, "lists c")
    for text in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        refused(tmp_path, "model.safetensors.index.json")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}'
    )
    refused(tmp_path, "'a' is given twice")


class Bomb:
    """What a hostile file holds: loading it naively makes a folder."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.target,)


def test_a_file_that_would_run_code(tmp_path: Path) -> None:
    torch.save({"a": Bomb(str(tmp_path / "ran"))}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin", "run code")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[torch.ones(1)], {"model": {"a": torch.ones(1)}}, {"step": 3}])
def test_a_bin_file_of_something_else(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "state dict")


def test_a_damaged_bin_file(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:900])
    refused(tmp_path, "pytorch_model.bin", "damaged")


def test_sharded_bin_files(tmp_path: Path) -> None:
    torch.save({"a": STATE["t0"]}, tmp_path / "pytorch_model-1.bin")
    torch.save({"b": STATE["t1"].half()}, tmp_path / "pytorch_model-2.bin")
    listed = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": listed}))
    read = Shards(tmp_path)
    assert torch.equal(read["a"], STATE["t0"]) and read.dtype("b") == torch.float16 and read.shape("b") == (16, 16)


def index(folder: Path, listed: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
