"""Damaged edits files: whatever bytes they hold, loading either works or says so in a sentence."""

import random

import pytest
import torch

from ssmcompress import edits
from ssmcompress.errors import InputError
from tests.unit.damage import damage


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("edits") / "e"
    saved = [
        edits.Mask("a", torch.rand(5, 7) < 0.5),
        edits.Replace("a", torch.randn(5, 7)),
        edits.Mask("b", torch.ones(3) > 0),
    ]
    edits.save(saved, path, {"method": "wanda"})
    return path.read_bytes()


def outcome(path):
    try:
        items, metadata = edits.load(path)
    except InputError as error:
        assert error.message.endswith(".") and error.hint
        return "refused"
    assert all(isinstance(item, edits.Mask | edits.Replace) for item in items)
    assert all(isinstance(word, str) for word in metadata.values())
    return "loaded"


@pytest.mark.parametrize("seed", range(4))
def test_random_damage(raw, tmp_path, seed):
    rng = random.Random(seed)
    header = int.from_bytes(raw[:8], "little")
    outcomes = []
    for attempt in range(250):
        path = tmp_path / str(attempt)  # a new file each time: what was loaded may still be mapped
        path.write_bytes(damage(raw, rng, header))
        outcomes.append(outcome(path))
    assert outcomes.count("refused") > 150


def test_every_truncation_is_refused(raw, tmp_path):
    for size in range(len(raw)):
        path = tmp_path / str(size)
        path.write_bytes(raw[:size])
        assert outcome(path) == "refused"


@pytest.mark.parametrize("dtype", ["F4", "F8_E4M3", "F8_E8M0", "F6_E2M3", "C64", "U64", "BOOL", "F32", "nonsense"])
def test_dtypes_that_edits_do_not_have_are_refused(raw, tmp_path, dtype):
    damaged = raw.replace(b'"dtype":"U8"', b'"dtype":"' + dtype.encode() + b'"')
    grown = int.from_bytes(raw[:8], "little") + len(damaged) - len(raw)
    (tmp_path / "e").write_bytes(grown.to_bytes(8, "little") + damaged[8:])
    assert outcome(tmp_path / "e") == "refused"
