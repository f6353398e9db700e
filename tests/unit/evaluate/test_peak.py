"""Reading and writing as generate does it, and peaks that are those of the work."""

from dataclasses import replace

import pytest
import torch

from ssmcompress.checkpoint.source import load
from ssmcompress.errors import ResourceError
from ssmcompress.evaluate.peak import decode, first_token, in_memory, peak, prefill
from tests.unit.checkpoint import folders


@pytest.fixture(scope="module", params=["mamba", "mamba2"])
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    folders.save(request.param, path)
    return load(str(path), dtype=torch.float32)


def test_what_is_timed_writes_the_tokens_of_generate(checkpoint):
    model = checkpoint.model
    ids = torch.randint(1, 60, (2, 11), generator=torch.Generator().manual_seed(0))
    expected = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None)[:, 11:]
    token, cache = first_token(model, ids)
    assert torch.equal(token, expected[:, :1])
    assert torch.equal(decode(model, token, cache, 5), expected[:, 5:])


def test_a_prefill_gives_logits_to_the_last_token_alone(checkpoint):
    seen = []
    hook = checkpoint.model.lm_head.register_forward_hook(lambda *given: seen.append(given[2].shape))
    prefill(checkpoint.model, torch.ones(2, 9, dtype=torch.long))
    hook.remove()
    assert seen == [(2, 1, 61)]


def test_tied_weights_are_in_memory_once(checkpoint):
    tensors = {weight.data_ptr(): weight.nbytes for weight in checkpoint.model.parameters()}
    assert in_memory(checkpoint) == sum(tensors.values())


@pytest.mark.slow
def test_a_longer_prompt_takes_more_memory(tmp_path):
    folders.save("mamba", tmp_path)
    checkpoint = load(str(tmp_path), dtype=torch.float32)
    above = []
    for length in (16, 60_000):
        most, before = peak(checkpoint, length, 2, 1)
        assert most >= before > in_memory(checkpoint)
        above.append(most - before)
    assert above[1] - above[0] > 60_000 * 128 * 4  # what in_proj alone gives


def test_a_process_that_fails_is_an_error(tmp_path):
    folders.save("mamba", tmp_path)
    checkpoint = load(str(tmp_path), dtype=torch.float32)
    gone = replace(checkpoint, source=replace(checkpoint.source, folder=tmp_path / "gone"))
    with pytest.raises(ResourceError, match="could not be measured in a process of its own"):
        peak(gone, 8, 1, 1)
