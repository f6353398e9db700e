"""The kernels of mamba-ssm and causal-conv1d against the recurrences in float64: values, gradients, steps, states."""

from functools import partial

import pytest
import torch

from ssmcompress.kernels import reference
from tests.unit.kernels import cases

CONVS = [(2, 9, 24, 4), (1, 1, 16, 4), (2, 40, 18, 3), (1, 300, 64, 2)]
SCANS = [(1, 1, 8, 4), (2, 70, 24, 16), (1, 300, 37, 5)]
SSDS = [(1, 1, 2, 16, 1, 16), (2, 131, 4, 64, 2, 64), (1, 300, 2, 64, 1, 128)]
TOLERANCE = {torch.float32: {"conv": 1e-5, "scan": 1e-4, "ssd": 5e-3}}  # Triton multiplies float32 as TF32
TOLERANCE[torch.bfloat16] = {"conv": 2e-2, "scan": 2e-2, "ssd": 5e-2}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]
SEQUENCES = ("x", "u", "z", "dt", "B", "C", "left")  # what comes in the model's dtype; the rest is float32


def on(machine, inputs, dtype=torch.float32):
    """The inputs where the kernels are, sequences in this dtype; and in float64 what they are after that rounding."""
    narrow = {name: each.to(dtype if name in SEQUENCES else torch.float32) for name, each in inputs.items()}
    given = {name: each.to(machine.device) for name, each in narrow.items()}
    return given, {name: each.double() for name, each in narrow.items()}


def near(found, expected, tolerance):
    """Within the relative tolerance, on the CPU."""
    cases.assert_same({name: each.cpu() for name, each in found.items() if name in expected}, expected, tolerance)


def differentiated(kernel, given):
    """y and its gradients to all that it is given, in float32, of a fixed random projection of y."""
    leaves = {name: each.requires_grad_() for name, each in given.items()}
    y = kernel(**leaves)
    loss = (y.double() * cases.normal(20, *y.shape).to(y.device)).sum()
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CONVS)
def test_the_convolution(machine, shape, dtype):
    given, exact = on(machine, cases.conv_inputs(*shape), dtype)
    expected = differentiated(reference.conv, exact)
    near(differentiated(machine.kernels.conv, given), expected, TOLERANCE[dtype]["conv"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("shape", SCANS)
def test_the_selective_scan(machine, shape, begun, dtype):
    given, exact = on(machine, _begun(cases.scan_inputs(*shape), begun), dtype)
    near({"last": machine.kernels.selective_scan(**given)[1]}, {"last": reference.selective_scan(**exact)[1]}, 2e-2)
    expected = differentiated(lambda **each: reference.selective_scan(**each)[0], exact)
    found = differentiated(lambda **each: machine.kernels.selective_scan(**each)[0], given)
    near(found, expected, TOLERANCE[dtype]["scan"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("shape", SSDS)
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.05, 0.2)])
def test_the_ssd(machine, shape, begun, dtype, limit):
    given, exact = on(machine, _begun(cases.ssd_inputs(*shape), begun), dtype)
    ours, truth = (partial(kernels.ssd, dt_limit=limit) for kernels in (machine.kernels, reference))
    near({"last": ours(**given)[1]}, {"last": truth(**exact)[1]}, 2e-2)
    expected = differentiated(lambda **each: truth(**each)[0], exact)
    near(differentiated(lambda **each: ours(**each)[0], given), expected, TOLERANCE[dtype]["ssd"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["selective", "ssd"])
def test_steps_go_on_where_a_scan_ended(machine, kind, dtype):
    inputs = cases.scan_inputs(2, 9, 24, 16) if kind == "selective" else cases.ssd_inputs(2, 9, 4, 64, 2, 64)
    scan, step = ("selective_scan", "selective_step") if kind == "selective" else ("ssd", "ssd_step")
    given, exact = on(machine, inputs, dtype)
    timed = [name for name in ("u", "x", "dt", "B", "C", "z") if name in inputs]
    _, state = getattr(machine.kernels, scan)(**(given | {name: given[name][:, :5] for name in timed}))
    rows = [
        getattr(machine.kernels, step)(**(given | {"state": state} | {name: given[name][:, t] for name in timed}))
        for t in range(5, 9)
    ]
    expected, last = getattr(reference, scan)(**exact)
    found = {"y": torch.stack(rows, 1), "last": state}
    near(found, {"y": expected[:, 5:], "last": last}, 2e-2 if dtype == torch.bfloat16 else 5e-3)


def test_padding_passes_the_state_through(machine):
    for kind, inputs, key in (
        ("selective_scan", cases.scan_inputs(2, 9, 24, 16), "u"),
        ("ssd", cases.ssd_inputs(2, 9, 4, 64, 2, 64), "x"),
    ):
        kernel = getattr(machine.kernels, kind)
        short, long = (on(machine, each)[0] for each in (inputs, cases.padded(inputs, key)))
        near({"last": kernel(**long)[1]}, {"last": kernel(**short)[1].cpu().double()}, 1e-6)


def _begun(inputs, begun):
    return inputs if begun else {name: each for name, each in inputs.items() if name != "state"}
