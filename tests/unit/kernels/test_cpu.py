import pytest
import torch

from ssmcompress.kernels import cpu, reference
from tests.unit.kernels import cases

SCANS = [(1, 1, 1, 1), (2, 7, 5, 3), (1, 16, 4, 16), (2, 37, 6, 8)]
SSDS = [(1, 1, 1, 1, 1, 1), (2, 7, 4, 3, 2, 5), (1, 64, 2, 4, 1, 8), (2, 131, 4, 5, 4, 6)]


@pytest.mark.parametrize("shape", [(1, 1, 3, 4), (2, 9, 5, 4), (1, 6, 2, 1), (2, 2, 3, 3)])
def test_conv_has_the_values_and_gradients_of_the_reference(shape):
    inputs = cases.conv_inputs(*shape)
    expected = cases.values_and_gradients(reference.conv, inputs, torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        cases.assert_same(cases.values_and_gradients(cpu.conv, inputs, dtype), expected, tolerance)


@pytest.mark.parametrize("shape", SCANS)
def test_scan_has_the_values_and_gradients_of_the_reference(shape):
    inputs = cases.scan_inputs(*shape)
    expected = cases.values_and_gradients(reference.selective_scan, inputs, torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        cases.assert_same(cases.values_and_gradients(cpu.selective_scan, inputs, dtype), expected, tolerance)


@pytest.mark.parametrize("shape", SSDS)
def test_ssd_has_the_values_and_gradients_of_the_reference(shape):
    inputs = cases.ssd_inputs(*shape)
    expected = cases.values_and_gradients(reference.ssd, inputs, torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        cases.assert_same(cases.values_and_gradients(cpu.ssd, inputs, dtype), expected, tolerance)


@pytest.mark.parametrize("limit", [(0.0, 0.1), (0.05, 0.2)])
def test_ssd_limits_the_step_as_the_reference_does(limit):
    inputs = cases.ssd_inputs(2, 70, 4, 3, 2, 5)
    y, state = cpu.ssd(**inputs, dt_limit=limit)
    expected, last = reference.ssd(**inputs, dt_limit=limit)
    assert cases.error(y, expected) < 1e-12
    assert cases.error(state, last) < 1e-12


@pytest.mark.parametrize("kernels", [cpu, reference])
def test_steps_equal_the_scan(kernels):
    inputs = cases.scan_inputs(2, 5, 3, 4)
    expected, last = reference.selective_scan(**inputs)
    state, rows = inputs["state"].clone(), []
    for t in range(5):
        row = {name: inputs[name][:, t] for name in ("u", "dt", "B", "C", "z")}
        rows.append(kernels.selective_step(state, A=inputs["A"], D=inputs["D"], dt_bias=inputs["dt_bias"], **row))
    assert cases.error(torch.stack(rows, 1), expected) < 1e-12
    assert cases.error(state, last) < 1e-12


@pytest.mark.parametrize("kernels", [cpu, reference])
def test_steps_equal_the_ssd(kernels):
    inputs = cases.ssd_inputs(2, 5, 4, 3, 2, 6)
    expected, last = reference.ssd(**inputs)
    state, rows = inputs["state"].clone(), []
    for t in range(5):
        row = {name: inputs[name][:, t] for name in ("x", "dt", "B", "C")}
        rows.append(kernels.ssd_step(state, A=inputs["A"], D=inputs["D"], dt_bias=inputs["dt_bias"], **row))
    assert cases.error(torch.stack(rows, 1), expected) < 1e-12
    assert cases.error(state, last) < 1e-12


@pytest.mark.parametrize("cut", [1, 16, 30])
def test_two_calls_that_carry_the_state_equal_one(cut):
    for kernel, inputs, key in (
        (cpu.selective_scan, cases.scan_inputs(2, 37, 3, 4), "u"),
        (cpu.ssd, cases.ssd_inputs(2, 37, 4, 3, 2, 6), "x"),
    ):
        timed = [name for name in (key, "dt", "B", "C", "z") if name in inputs]
        head = inputs | {name: inputs[name][:, :cut] for name in timed}
        tail = inputs | {name: inputs[name][:, cut:] for name in timed}
        first, state = kernel(**head)
        second, last = kernel(**(tail | {"state": state}))
        whole, final = kernel(**inputs)
        assert cases.error(torch.cat([first, second], 1), whole) < 1e-12
        assert cases.error(last, final) < 1e-12


def test_padding_passes_the_state_through():
    for kernel, inputs, key in (
        (cpu.selective_scan, cases.scan_inputs(2, 9, 3, 4), "u"),
        (cpu.ssd, cases.ssd_inputs(2, 9, 4, 3, 2, 6), "x"),
    ):
        _, state = kernel(**inputs)
        _, after = kernel(**cases.padded(inputs, key))
        assert torch.equal(state, after) or cases.error(after, state) < 1e-14


def test_bfloat16_input_keeps_a_float32_state():
    inputs = cases.ssd_inputs(1, 70, 4, 8, 1, 16)
    expected, last = reference.ssd(**inputs)
    narrow = {name: inputs[name].bfloat16() for name in ("x", "dt", "B", "C")}
    y, state = cpu.ssd(**(inputs | narrow))
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert cases.error(y, expected) < 1e-2
    assert cases.error(state, last) < 1e-2
