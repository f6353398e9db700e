"""Finished layers: there whole or not at all, and all that stays of a run that failed."""

import pytest
import torch

from ssmcompress.edits import Mask
from ssmcompress.journal import Journal


def mask(name="w"):
    return Mask(name, torch.tensor([True, False, True]))


def test_a_step_is_a_mapping_of_its_own(tmp_path):
    journal = Journal(tmp_path)
    first, second = journal.step(0), journal.step(1)
    first[0], first[3] = [mask("a")], [mask("b"), mask("c")]
    assert (list(first), len(first), list(second), 3 in first, 1 in first) == ([0, 3], 2, [], True, False)
    assert [edit.tensor for edit in first[3]] == ["b", "c"] and torch.equal(first[0][0].keep, mask().keep)
    again = Journal(tmp_path).step(0)
    assert list(again) == [0, 3]
    del again[0]
    assert list(first) == [3]
    with pytest.raises(KeyError):
        first[0]


def test_half_a_layer_is_none(tmp_path):
    journal = Journal(tmp_path)
    journal.step(0)[0] = [mask()]
    (journal.folder / "none-step-0-layer-0001.part").write_bytes(b"half")
    assert list(journal.step(0)) == [0]


def test_a_damaged_layer_is_none(tmp_path):
    journal = Journal(tmp_path)
    layers = journal.step(0)
    layers[0] = layers[1] = [mask()]
    (journal.folder / "none-step-0-layer-0001.safetensors").write_bytes(b"")
    again = Journal(tmp_path).step(0)
    assert list(again) == [0] and 1 not in again


def test_weights_that_a_killed_run_left_go_first(tmp_path):
    journal = Journal(tmp_path)
    journal.step(0)[0] = [mask()]
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with journal.kept():
        assert [path.name for path in tmp_path.iterdir()] == [".journal"]


def test_layers_found_with_other_calibration_tokens_are_dropped(tmp_path):
    journal = Journal(tmp_path)
    assert journal.calibrate("a" * 64) == 0
    journal.step(0)[0] = journal.step(1)[2] = [mask()]
    again = Journal(tmp_path)
    assert again.calibrate("a" * 64) == 0
    assert (list(again.step(0)), list(again.step(1))) == ([0], [2])
    assert again.calibrate("b" * 64) == 2
    assert (list(again.step(0)), list(again.step(1)), list(again.folder.iterdir())) == ([], [], [])


def test_a_whole_run_leaves_nothing_of_it(tmp_path):
    with Journal(tmp_path).kept():
        (tmp_path / "model.safetensors").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("begun", [True, False])
def test_a_failed_run_leaves_the_journal_alone(tmp_path, begun):
    journal = Journal(tmp_path)
    (tmp_path / ".recipe").touch()
    with pytest.raises(ZeroDivisionError), journal.kept():
        if begun:
            journal.step(0)[0] = [mask()]
        for name in ("model.safetensors", "events.jsonl", "config.json"):
            (tmp_path / name).touch()
        raise ZeroDivisionError
    assert {path.name for path in tmp_path.iterdir()} == {".recipe"} | (
        {".journal", "events.jsonl"} if begun else set()
    )
