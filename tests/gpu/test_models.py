"""Small models of every family where the kernels are, against the recurrences on the CPU."""

import pytest
import torch

from ssmcompress import kernels
from ssmcompress.arch.mixer import use_backend
from ssmcompress.arch.registry import arch_for
from ssmcompress.prune.apply import find_edits
from ssmcompress.steps import Prune
from tests.unit.arch.models import CONFIGS, PRUNED, ours, tokens

NEAR = 1e-3  # of the largest logit; Triton multiplies float32 as TF32
IDS = tokens(2, 23)


def models(name, machine):
    """The model where the kernels are, and its twin that computes the recurrences."""
    fast, slow = ours(name).to(machine.device), ours(name)
    use_backend(slow, kernels.choose("reference"))
    return fast, slow


@pytest.mark.parametrize("name", [*CONFIGS, *PRUNED])
@torch.no_grad()
def test_prefill_steps_and_generation(machine, name):
    fast, slow = models(name, machine)
    expected, ids = slow(IDS).logits, IDS.to(machine.device)
    near = NEAR * float(expected.abs().max())
    assert float((fast(ids).logits.cpu() - expected).abs().max()) < near
    out = fast(ids[:, :9], use_cache=True)
    for t in range(9, IDS.shape[1]):
        out = fast(ids[:, t : t + 1], cache_params=out.cache_params, use_cache=True)
        assert float((out.logits[:, 0].cpu() - expected[:, t]).abs().max()) < near
    written = [
        model.generate(given[:, :5], max_new_tokens=8, do_sample=False, pad_token_id=0)
        for model, given in ((fast, ids), (slow, IDS))
    ]
    assert torch.equal(written[0].cpu(), written[1])


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_rows_of_unlike_length_are_those_alone(machine, name):
    fast, _ = models(name, machine)
    ids, short = IDS.to(machine.device), IDS[1:, :14].to(machine.device)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0  # padded on the left
    rows = torch.cat([ids[:1], torch.cat([torch.zeros_like(ids[1:, :9]), short], 1)])
    found, alone = fast(rows, attention_mask=mask).logits[1, 9:], fast(short).logits[0]
    assert float((found - alone).abs().max()) < NEAR * float(alone.abs().max())


@pytest.mark.parametrize("name", ["mamba", "mamba2", "pruned-mamba2"])
def test_the_gradients_of_every_weight(machine, name):
    fast, slow = (model.train() for model in models(name, machine))
    for model, ids in ((fast, IDS.to(machine.device)), (slow, IDS)):
        model(ids, labels=ids, use_cache=False).loss.backward()
    expected = dict(slow.named_parameters())
    for weight, parameter in fast.named_parameters():
        error = (parameter.grad.cpu() - expected[weight].grad).norm() / expected[weight].grad.norm()
        assert float(error) < 1e-2, weight


@pytest.mark.parametrize("name", ["mamba", "mamba2-grouped"])
def test_masks_are_those_of_the_cpu(machine, name):
    fast, slow = models(name, machine)
    found = [
        find_edits(model, arch_for(CONFIGS[name]), Prune(method="wanda"), ids)
        for model, ids in ((fast, IDS.to(machine.device)), (slow, IDS))
    ]
    for one, other in zip(*found, strict=True):
        differ = (one.pack() != other.pack()).float().mean()
        assert one.tensor == other.tensor and float(differ) < 0.01, one.tensor


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@torch.no_grad()
def test_bfloat16_is_as_near_as_its_rounding(machine, name):
    fast, slow = models(name, machine)
    expected = slow(IDS).logits
    found = fast.bfloat16()(IDS.to(machine.device)).logits.float().cpu()
    assert float((found - expected).norm() / expected.norm()) < 0.05
