"""An A_log of 20 is a state without memory in every kernel: beside a float64 model whose decay there is zero."""

import copy

import pytest
import torch

from ssmcompress import kernels
from ssmcompress.arch.mixer import mixers, use_backend
from ssmcompress.edits import Forget, apply
from tests.unit.arch import models

NAMES = ["mamba", "falcon_mamba", "mamba2", "mamba2-grouped"]
STEPS = {"small": 1e-4, "large": 2.0, "mixed": None}


def forgetful(name, step):
    """A model in which about half of A_log forgets, with step sizes near to one value, and the same in float64."""
    model = models.ours(name)
    with torch.no_grad():
        for mixer in mixers(model):
            bias = mixer.dt_bias if hasattr(mixer, "dt_bias") else mixer.dt_proj.bias
            size = torch.tensor(step) if step else torch.logspace(-4, 0.7, len(bias))
            bias.copy_(size.expm1().log())
            mixer.A_log.view(-1)[1] = 0.0  # A = -1, which is no sign of anything
            mixer.D.zero_()  # beside it, what small steps leave in the states would not be seen
    names = [key for key, _ in model.named_parameters() if key.endswith("A_log")]
    state = dict(model.named_parameters())
    found = [Forget(key, torch.arange(state[key].numel()).view(state[key].shape) % 2 == 1) for key in names]
    truth = copy.deepcopy(model).double()
    apply(found, state)
    with torch.no_grad():
        for edit in found:  # A = -inf: the decay is exp(-inf) = 0 whatever the step size
            truth.get_parameter(edit.tensor).masked_fill_(~edit.keep, torch.inf)
    use_backend(truth, kernels.choose("reference"))
    return model, truth


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@torch.no_grad()
def mixed(model, hidden, stepwise=False):
    """The outputs of the first mixer for hidden states [B, L, d], at once or token by token."""
    mixer = model.backbone.layers[0].mixer
    if not stepwise:
        return mixer(hidden)
    cache, rows = model(models.tokens(len(hidden), 1), use_cache=True).cache_params, []
    cache.reset()
    for t in range(hidden.shape[1]):
        rows.append(mixer(hidden[:, t : t + 1], cache_params=cache))
    return torch.cat(rows, 1)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_computes_the_function_whose_decay_is_zero(name, step):
    model, truth = forgetful(name, STEPS[step])
    torch.manual_seed(3)
    hidden = torch.randn(2, 21, 32)
    expected = mixed(truth, hidden.double())
    assert expected.isfinite().all()
    for backend in ("reference", "torch", "auto"):
        use_backend(model, kernels.choose(backend))
        for stepwise in (False, True):
            assert relative(mixed(model, hidden, stepwise), expected) < 1e-6, (backend, stepwise)
    stock = models.stock(model)
    for stepwise in (False, True):
        assert relative(mixed(stock, hidden, stepwise), expected) < 1e-6, ("stock", stepwise)
