import pytest
import torch

from ssmcompress.kernels import native, reference
from tests.unit.kernels import cases

AVAILABLE, REASON = native.available()
needs_library = pytest.mark.skipif(not AVAILABLE, reason=REASON)
SCANS = [(1, 1, 1, 1), (2, 7, 5, 3), (1, 16, 16, 16), (2, 37, 37, 8), (1, 65, 33, 24), (0, 3, 4, 2)]
CONVS = [(1, 1, 3, 4), (2, 9, 37, 4), (1, 6, 2, 1), (2, 2, 16, 8), (1, 65, 5, 3)]


@needs_library
@pytest.mark.parametrize("shape", SCANS)
def test_scan_has_the_values_and_gradients_of_the_reference(shape):
    inputs = cases.scan_inputs(*shape)
    expected = cases.values_and_gradients(reference.selective_scan, inputs, torch.float64)
    cases.assert_same(cases.values_and_gradients(native.selective_scan, inputs, torch.float32), expected, 2e-6)


@needs_library
@pytest.mark.parametrize("shape", CONVS)
def test_conv_has_the_values_and_gradients_of_the_reference(shape):
    inputs = cases.conv_inputs(*shape)
    expected = cases.values_and_gradients(reference.conv, inputs, torch.float64)
    cases.assert_same(cases.values_and_gradients(native.conv, inputs, torch.float32), expected, 2e-6)


@needs_library
def test_no_tokens_leave_the_state_as_it_was():
    inputs = {name: tensor.float() for name, tensor in cases.scan_inputs(2, 0, 20, 4).items()}
    y, state = native.selective_scan(**inputs)
    assert y.shape == (2, 0, 20)
    assert torch.equal(state, inputs["state"])
    convolved = native.conv(torch.zeros(2, 0, 5), torch.ones(5, 4))
    assert convolved.shape == (2, 0, 5)


@needs_library
def test_bfloat16_scan_is_as_near_as_its_input_allows():
    inputs = cases.scan_inputs(2, 33, 20, 8)
    narrow = {name: inputs[name].bfloat16() for name in ("u", "dt", "B", "C", "z")}
    exact = {name: tensor.double() for name, tensor in narrow.items()}
    expected = cases.values_and_gradients(reference.selective_scan, inputs | exact, torch.float64)
    mixed = {name: tensor.float() for name, tensor in inputs.items()} | narrow
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in mixed.items()}
    y, state = native.selective_scan(**leaves)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    loss = (y.double() * cases.normal(20, *y.shape)).sum() + (state.double() * cases.normal(21, *state.shape)).sum()
    found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)) | {"out0": y, "out1": state}
    cases.assert_same(found, expected, 1e-2)
    assert cases.error(state, expected["out1"]) < 2e-6


@needs_library
def test_views_of_wider_rows_need_no_copy():
    inputs = cases.scan_inputs(2, 9, 20, 4)
    wide = torch.cat([inputs["z"], inputs["u"]], dim=-1).float()
    z, u = wide.chunk(2, dim=-1)
    rest = {name: tensor.float() for name, tensor in inputs.items() if name not in ("u", "z")}
    assert not u.is_contiguous()
    assert torch.equal(
        native.selective_scan(u=u, z=z, **rest)[0], native.selective_scan(u=u.contiguous(), z=z.contiguous(), **rest)[0]
    )


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_threads_give_the_same_bits(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs = cases.scan_inputs(2, 40, 50, 6)
        runs = [cases.values_and_gradients(native.selective_scan, inputs, torch.float32) for _ in range(2)]
        assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
        expected = cases.values_and_gradients(reference.selective_scan, inputs, torch.float64)
        cases.assert_same(runs[0], expected, 2e-6)
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("size", [1, 5, 16, 20])
def test_steps_equal_the_scan(size):
    inputs = {name: tensor.float() for name, tensor in cases.scan_inputs(2, 5, 21, size).items()}
    expected, last = reference.selective_scan(**inputs)
    state, rows = inputs["state"].clone(), []
    for t in range(5):
        row = {name: inputs[name][:, t] for name in ("u", "dt", "B", "C", "z")}
        rows.append(native.selective_step(state, A=inputs["A"], D=inputs["D"], dt_bias=inputs["dt_bias"], **row))
    assert cases.error(torch.stack(rows, 1), expected) < 1e-6
    assert cases.error(state, last) < 1e-6


@needs_library
def test_padding_leaves_the_state_untouched():
    inputs = {name: tensor.float() for name, tensor in cases.scan_inputs(2, 9, 20, 4).items()}
    _, state = native.selective_scan(**inputs)
    _, after = native.selective_scan(**cases.padded(inputs, "u"))
    assert torch.equal(state, after)


@needs_library
def test_extreme_steps_stay_finite():
    inputs = {name: tensor.float() for name, tensor in cases.scan_inputs(1, 8, 16, 4).items()}
    inputs["dt"] = torch.linspace(-200, 200, 8)[None, :, None].expand(1, 8, 16)
    y, state = native.selective_scan(**inputs)
    expected, last = reference.selective_scan(**{name: tensor.double() for name, tensor in inputs.items()})
    assert cases.error(y, expected) < 2e-6
    assert cases.error(state, last) < 2e-6


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    library, reason = native._library.__wrapped__()
    assert library is None
    assert "no C compiler" in reason


def test_a_compiler_that_fails_is_told(monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo broken 1.0 && exit 0\necho 'cannot compile' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library, reason = native._library.__wrapped__()
    assert library is None
    assert "cannot compile" in reason
    assert not list((tmp_path / "cache/ssmcompress").glob("*"))


@needs_library
def test_the_built_library_is_kept_and_used_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native._library.__wrapped__()[0] is not None
    built = list((tmp_path / "ssmcompress").iterdir())
    assert len(built) == 1
    stamp = built[0].stat().st_mtime_ns
    assert native._library.__wrapped__()[0] is not None
    assert built[0].stat().st_mtime_ns == stamp


@needs_library
def test_a_damaged_library_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._built("cc").write_bytes(b"not a library")
    library, reason = native._library.__wrapped__()
    assert library is None
    assert "did not build or load" in reason
