import pytest
import torch
import torch.nn.functional as F

from ssmcompress.errors import InputError, UnsupportedError
from ssmcompress.kernels import library, native, reference
from tests.unit.kernels import cases

AVAILABLE, REASON = native.available()
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=REASON)
SCANS = [(1, 1, 1, 1), (2, 7, 5, 3), (1, 16, 64, 16), (2, 37, 37, 8), (2, 65, 70, 24), (1, 5, 2, 256), (0, 3, 4, 2)]
CONVS = [(1, 1, 3, 4), (2, 9, 37, 4), (1, 6, 2, 1), (2, 2, 64, 8), (2, 65, 70, 3), (0, 3, 4, 2)]


def floats(inputs):
    return {name: tensor.float() for name, tensor in inputs.items()}


def at(inputs, t, timed):
    return {name: tensor[:, t] if name in timed else tensor for name, tensor in inputs.items() if name != "state"}


@pytest.mark.parametrize("shape", SCANS)
def test_scan_has_the_values_and_gradients_of_the_reference(shape):
    inputs = cases.scan_inputs(*shape)
    expected = cases.values_and_gradients(reference.selective_scan, inputs, torch.float64)
    cases.assert_same(cases.values_and_gradients(native.selective_scan, inputs, torch.float32), expected, 2e-6)


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "state"])
def test_scan_without_an_optional_input(absent):
    inputs = {name: tensor for name, tensor in cases.scan_inputs(2, 19, 5, 3).items() if name != absent}
    expected = cases.values_and_gradients(reference.selective_scan, inputs, torch.float64)
    cases.assert_same(cases.values_and_gradients(native.selective_scan, inputs, torch.float32), expected, 2e-6)


@pytest.mark.parametrize("output", [0, 1])
def test_scan_passes_back_the_gradient_of_either_output_alone(output):
    inputs = cases.scan_inputs(2, 19, 5, 3)

    def gradients(kernel, dtype):
        leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}
        loss = kernel(**leaves)[output].sum()  # a gradient without memory of its own
        found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    expected = gradients(reference.selective_scan, torch.float64)
    cases.assert_same(gradients(native.selective_scan, torch.float32), expected, 2e-6)


@pytest.mark.parametrize("shape", CONVS)
@pytest.mark.parametrize("silu", [True, False])
def test_conv_has_the_values_and_gradients_of_the_reference(shape, silu):
    inputs = cases.conv_inputs(*shape)
    expected = cases.values_and_gradients(lambda **k: reference.conv(**k, silu=silu), inputs, torch.float64)
    found = cases.values_and_gradients(lambda **k: native.conv(**k, silu=silu), inputs, torch.float32)
    cases.assert_same(found, expected, 2e-6)


@pytest.mark.parametrize("absent", ["bias", "left"])
def test_conv_without_an_optional_input(absent):
    inputs = {name: tensor for name, tensor in cases.conv_inputs(2, 19, 5, 4).items() if name != absent}
    expected = cases.values_and_gradients(reference.conv, inputs, torch.float64)
    cases.assert_same(cases.values_and_gradients(native.conv, inputs, torch.float32), expected, 2e-6)


def test_no_tokens_leave_the_state_as_it_was():
    inputs = floats(cases.scan_inputs(2, 0, 20, 4))
    y, state = native.selective_scan(**inputs)
    assert y.shape == (2, 0, 20)
    assert torch.equal(state, inputs["state"])
    assert native.conv(torch.zeros(2, 0, 5), torch.ones(5, 4)).shape == (2, 0, 5)


def test_bfloat16_is_as_near_as_its_rounding_allows():
    inputs = cases.scan_inputs(2, 33, 70, 8)
    narrow = {name: inputs[name].bfloat16() for name in ("u", "dt", "B", "C", "z")}
    exact = {name: tensor.double() for name, tensor in narrow.items()}
    expected = cases.values_and_gradients(reference.selective_scan, inputs | exact, torch.float64)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in (floats(inputs) | narrow).items()}
    y, state = native.selective_scan(**leaves)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    loss = (y.double() * cases.normal(20, *y.shape)).sum() + (state.double() * cases.normal(21, *state.shape)).sum()
    found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    cases.assert_same(found | {"out0": y.detach(), "out1": state.detach()}, expected, 1e-2)
    assert cases.error(state.detach(), expected["out1"]) < 2e-6
    assert cases.error(found["D"], expected["D"]) < 1e-2


def test_bfloat16_is_rounded_to_nearest_even():
    x = torch.cat([cases.normal(1, 1, 64, 80).float(), torch.tensor([[[float("nan")] * 80]])], dim=1).bfloat16()
    doubled = native.conv(x, torch.full((80, 1), 1.0 / 3), silu=False)
    assert torch.equal(doubled[:, :-1], (x.float() * torch.tensor(1.0 / 3)).bfloat16()[:, :-1])
    assert doubled[:, -1].isnan().all()


def test_views_are_read_where_they_lie():
    inputs = floats(cases.scan_inputs(2, 9, 20, 4))
    wide = torch.cat([inputs["z"], inputs["u"]], dim=-1)
    z, u = wide.repeat_interleave(2, dim=1)[:, ::2].chunk(2, dim=-1)
    B, C = torch.cat([inputs["B"], inputs["C"]], dim=-1).chunk(2, dim=-1)
    views = {"z": z, "u": u, "B": B, "C": C}
    ready = native._ready(native._ScanInputs(**(inputs | views)))
    assert all(getattr(ready, name).data_ptr() == view.data_ptr() for name, view in views.items())
    assert torch.equal(native.selective_scan(**(inputs | views))[0], native.selective_scan(**inputs)[0])
    transposed = {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("u", "dt", "z")}
    assert torch.equal(native.selective_scan(**(inputs | transposed))[0], native.selective_scan(**inputs)[0])


def test_every_number_of_threads_gives_the_same_bits():
    inputs = cases.scan_inputs(2, 40, 200, 6)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            runs.append(cases.values_and_gradients(native.selective_scan, inputs, torch.float32))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(run[name], runs[0][name]) for run in runs for name in run)


def test_without_autograd_the_values_are_the_same():
    inputs = floats(cases.scan_inputs(2, 20, 5, 3))
    learned = native.selective_scan(**{name: tensor.clone().requires_grad_() for name, tensor in inputs.items()})
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert all(torch.equal(*pair) for pair in zip(native.selective_scan(**inputs), learned, strict=True))


@pytest.mark.parametrize("size", [1, 5, 16, 20])
def test_steps_equal_the_scan(size):
    inputs = floats(cases.scan_inputs(2, 5, 70, size))
    expected, last = reference.selective_scan(**inputs)
    state = inputs["state"].clone()
    rows = [native.selective_step(state, **at(inputs, t, ("u", "dt", "B", "C", "z"))) for t in range(5)]
    assert cases.error(torch.stack(rows, 1), expected) < 1e-6
    assert cases.error(state, last) < 1e-6


@pytest.mark.parametrize("shape", [(2, 5, 4, 70, 2, 5), (1, 5, 2, 3, 1, 16)])
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.05, 0.2)])
def test_steps_equal_the_ssd(shape, limit):
    inputs = floats(cases.ssd_inputs(*shape))
    inputs["dt"][:, 2], inputs["x"][:, 2] = reference.PAD, 0.0
    expected, last = reference.ssd(**inputs, dt_limit=limit)
    state = inputs["state"].clone()
    rows = [native.ssd_step(state, **at(inputs, t, ("x", "dt", "B", "C")), dt_limit=limit) for t in range(5)]
    assert cases.error(torch.stack(rows, 1), expected) < 1e-6
    assert cases.error(state, last) < 1e-6


@pytest.mark.parametrize("kind", ["selective_step", "ssd_step"])
def test_a_step_changes_the_state_it_is_given(kind):
    inputs = floats(cases.scan_inputs(2, 1, 7, 4) if kind == "selective_step" else cases.ssd_inputs(2, 1, 4, 3, 2, 5))
    row = at(inputs, 0, ("u", "x", "dt", "B", "C", "z"))
    expected = inputs["state"].clone()
    getattr(reference, kind)(expected, **row)
    for state in (
        inputs["state"].clone(),
        inputs["state"].transpose(0, 1).contiguous().transpose(0, 1),
        inputs["state"].double(),
    ):
        getattr(native, kind)(state, **row)
        assert cases.error(state, expected.double()) < 1e-6


@pytest.mark.parametrize("kind", ["selective_step", "ssd_step"])
def test_autograd_goes_through_a_step_and_sees_the_state_change(kind):
    inputs = floats(cases.scan_inputs(2, 1, 7, 4) if kind == "selective_step" else cases.ssd_inputs(2, 1, 4, 3, 2, 5))
    row = at(inputs, 0, ("u", "x", "dt", "B", "C", "z"))
    A = row["A"].clone().requires_grad_()
    (found,) = torch.autograd.grad(getattr(native, kind)(inputs["state"].clone(), **(row | {"A": A})).sum(), A)
    scan = reference.selective_scan if kind == "selective_step" else reference.ssd
    (expected,) = torch.autograd.grad(scan(**(inputs | {"A": A}))[0].sum(), A)
    assert cases.error(found, expected.double()) < 1e-5

    factor, state = torch.ones((), requires_grad=True), inputs["state"].clone()
    product = (factor * state).sum()
    with torch.no_grad():
        getattr(native, kind)(state, **row)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("cut", [1, 16, 30])
def test_two_calls_that_carry_the_state_equal_one(cut):
    inputs = floats(cases.scan_inputs(2, 37, 70, 4))
    timed = ("u", "dt", "B", "C", "z")
    head = inputs | {name: inputs[name][:, :cut] for name in timed}
    tail = inputs | {name: inputs[name][:, cut:] for name in timed}
    first, state = native.selective_scan(**head)
    second, last = native.selective_scan(**(tail | {"state": state}))
    whole, final = native.selective_scan(**inputs)
    assert torch.equal(torch.cat([first, second], 1), whole)
    assert torch.equal(last, final)

    inputs = floats(cases.conv_inputs(2, 37, 70, 4))
    x, left = inputs["x"], inputs["left"]
    first = native.conv(**(inputs | {"x": x[:, :cut]}))
    past = torch.cat([left, x[:, :cut].transpose(1, 2)], dim=2)[..., -3:]
    second = native.conv(**(inputs | {"x": x[:, cut:], "left": past}))
    assert torch.equal(torch.cat([first, second], 1), native.conv(**inputs))


def test_padding_leaves_the_state_untouched():
    inputs = floats(cases.scan_inputs(2, 9, 20, 4))
    _, state = native.selective_scan(**inputs)
    assert torch.equal(native.selective_scan(**cases.padded(inputs, "u"))[1], state)
    narrow = {name: inputs[name].bfloat16() for name in ("u", "dt", "B", "C", "z")}
    _, state = native.selective_scan(**(inputs | narrow))
    assert torch.equal(native.selective_scan(**cases.padded(inputs | narrow, "u"))[1], state)


def test_extreme_steps_are_right_and_nan_is_not_hidden():
    inputs = floats(cases.scan_inputs(1, 8, 16, 4))
    inputs["dt"] = torch.linspace(-200, 200, 8)[None, :, None].expand(1, 8, 16)
    inputs["z"] = torch.linspace(200, -200, 8)[None, :, None].expand(1, 8, 16)
    expected, last = reference.selective_scan(**{name: tensor.double() for name, tensor in inputs.items()})
    y, state = native.selective_scan(**inputs)
    assert cases.error(y, expected) < 2e-6
    assert cases.error(state, last) < 2e-6
    for name in ("u", "dt", "A", "B", "C", "z", "state"):
        spoilt = inputs[name].clone()
        spoilt[0, 0] = float("nan")
        assert native.selective_scan(**(inputs | {name: spoilt}))[0].isnan().any(), name


@pytest.mark.parametrize("dt", [-80.0, -30.0, -9.6, -3.0, -0.1, 0.0, 0.1, 3.0, 30.0])
def test_step_sizes_keep_their_digits(dt):
    one, raw = torch.ones(1, 1, 1), torch.full((1, 1, 1), dt)
    _, state = native.selective_scan(one, raw, -torch.ones(1, 1), one, one)
    expected = F.softplus(torch.tensor(float(raw), dtype=torch.float64))
    assert state.item() == pytest.approx(expected.item(), rel=2e-7 + 1e-7 * abs(dt))


def test_denormals_are_torch_s_own_again_afterwards():
    native.selective_scan(**floats(cases.scan_inputs(1, 3, 2, 2)))
    assert (torch.full((64,), 1e-40) * 1.0 > 0).all()


def test_what_is_too_wide_is_refused():
    with pytest.raises(UnsupportedError, match="256 states"):
        native.selective_scan(**floats(cases.scan_inputs(1, 2, 3, 257)))
    with pytest.raises(UnsupportedError, match="8 taps"):
        native.conv(**floats(cases.conv_inputs(1, 2, 3, 9)))


def test_shapes_that_do_not_fit_are_refused_by_name():
    scan, window = floats(cases.scan_inputs(2, 3, 5, 4)), floats(cases.conv_inputs(2, 3, 5, 4))
    for name in ("u", "dt", "B", "C", "D", "z", "dt_bias", "state"):
        with pytest.raises(InputError, match=f"^{name} is"):
            native.selective_scan(**(scan | {name: scan[name][..., 1:]}))
    for name in ("weight", "bias", "left"):
        with pytest.raises(InputError, match=f"^{name} is"):
            native.conv(**(window | {name: window[name][1:]}))
    inputs = floats(cases.ssd_inputs(2, 1, 4, 3, 2, 5))
    state, row = inputs["state"], at(inputs, 0, ("x", "dt", "B", "C"))
    for name in row:
        with pytest.raises(InputError, match=f"^{name} is"):
            native.ssd_step(state, **(row | {name: row[name][..., 1:]}))
    with pytest.raises(InputError, match="4 heads"):
        native.ssd_step(state, **(row | {name: torch.ones(2, 3, 5) for name in ("B", "C")}))


def test_a_library_that_computes_something_else_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wrong = tmp_path / "native.c"
    wrong.write_text(native.SOURCE.read_text().replace("0.24022648f", "0.24032648f"))
    loaded, reason = library.load(wrong, native.FLAGS, native._disagreement)
    assert loaded is None
    assert "from the reference" in reason
    assert not list((tmp_path / "cache").glob("*/*"))
