"""The kernels of native.c behind the names of :mod:`reference`: differentiable, on the CPU, in float32 and bfloat16."""

import ctypes
import functools
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmcompress.errors import BackendError, InputError, UnsupportedError
from ssmcompress.kernels import library, reference
from ssmcompress.kernels.jobs import ConvJob, ScanJob, SsdJob, fill

LIMITS = {"LANES": 64, "SPAN": 16, "MAX_TAPS": 8, "MAX_STATES": 256}
LANES, SPAN, MAX_TAPS, MAX_STATES = LIMITS.values()
MOST = {"conv": MAX_TAPS, "selective_scan": MAX_STATES, "selective_step": MAX_STATES, "ssd_step": MAX_STATES}
PORTABLE = "The torch kernels run everywhere: `--backend torch`."
SOURCE = Path(__file__).with_suffix(".c")
FLAGS = (
    *("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
    *(f"-D{name}={value}" for name, value in LIMITS.items()),
)


def available() -> tuple[bool, str]:
    """Whether the native kernels can be used here, and if not, why."""
    loaded, reason = _library()
    return loaded is not None, reason


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, left: Tensor | None = None, silu: bool = True
) -> Tensor:
    """Causal depthwise convolution, then SiLU: x [B, L, C], weight [C, K ≤ 8], left [B, C, K-1] → [B, L, C]."""
    (batch, _, width), taps = x.shape, weight.shape[1]
    _limit("taps", taps, MAX_TAPS)
    _expect((width, taps), weight=weight)
    _expect((width,), bias=bias)
    _expect((batch, width, taps - 1), left=left)
    dtype = _memory_type(x)
    past = None if left is None else left.to(dtype).transpose(1, 2).contiguous()
    inputs = _ConvInputs(_inner(x.to(dtype)), weight.float().contiguous(), _floats(bias), past)
    y = _Conv.apply(silu, *inputs) if _differentiated(inputs) else _conv_forward(inputs, silu)
    return y.to(x.dtype)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-1 scan: u, dt, z [B, L, D], A [D, N ≤ 256] negative, B, C [B, L, N] → y [B, L, D], state [B, D, N]."""
    inputs = _ready(_ScanInputs(u, dt, A, B, C, D, z, dt_bias, state))
    y, last = _Scan.apply(*inputs) if _differentiated(inputs) else _scan_forward(inputs)
    return y.to(u.dtype), last


def selective_step(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> Tensor:
    """One token of :func:`selective_scan`: u, dt, z [B, D], B, C [B, N], state [B, D, N] in place → y [B, D]."""
    given = _ScanInputs(u, dt, A, B, C, D, z, dt_bias, state)
    if _differentiated(given):
        gate = None if z is None else z[:, None]
        before = state.clone()  # the backward needs it as it was
        rows, last = selective_scan(u[:, None], dt[:, None], A, B[:, None], C[:, None], D, gate, dt_bias, before)
        state.copy_(last)
        return rows[:, 0]
    inputs = _ready(given)
    y = torch.empty_like(inputs.u, memory_format=torch.contiguous_format)
    sizes = {"batch": u.shape[0], "length": 1, "width": u.shape[1], "size": A.shape[1]}
    with _in_place(state) as last:
        _run("ssm_scan_step", ScanJob, _common(y.dtype) | sizes | inputs._asdict() | {"y": y, "last": last})
    return y.to(u.dtype)


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> Tensor:
    """One token of the Mamba-2 scan: x [B, H, P], dt [B, H], B, C [B, G, N], state [B, H, P, N] in place → y."""
    if _differentiated((state, x, dt, A, B, C, D, dt_bias)):
        before = state.clone()
        y, last = reference.ssd(x[:, None], dt[:, None], A, B[:, None], C[:, None], D, dt_bias, dt_limit, before)
        state.copy_(last)
        return y[:, 0]
    (batch, heads, width, size), groups = state.shape, B.shape[1]
    _limit("states", size, MAX_STATES)
    _expect((batch, heads, width), x=x)
    _expect((batch, heads), dt=dt)
    _expect((heads,), A=A, D=D, dt_bias=dt_bias)
    _expect((batch, groups, size), B=B, C=C)
    if heads % groups:
        raise InputError(f"{heads} heads cannot be shared out to {groups} groups.")
    dtype = _memory_type(x, dt, B, C)
    rows = {name: _inner(row.to(dtype)) for name, row in (("x", x), ("dt", dt), ("B", B), ("C", C))}
    sizes = {"batch": batch, "heads": heads, "width": width, "size": size, "groups": groups}
    vectors = {"A": _floats(A), "D": _floats(D), "dt_bias": _floats(dt_bias), "low": dt_limit[0], "high": dt_limit[1]}
    y = x.new_empty(batch, heads, width, dtype=dtype)
    with _in_place(state) as work:
        _run("ssm_ssd_step", SsdJob, _common(dtype) | sizes | rows | vectors | {"y": y, "state": work})
    return y.to(x.dtype)


# ---- convolution ----


class _ConvInputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    left: Tensor | None  # [B, K-1, C]


def _conv_fields(inputs: _ConvInputs, silu: bool) -> dict[str, Any]:
    batch, length, width = inputs.x.shape
    sizes = {"batch": batch, "length": length, "width": width, "taps": inputs.weight.shape[1], "silu": silu}
    return _common(inputs.x.dtype) | sizes | inputs._asdict()


def _conv_forward(inputs: _ConvInputs, silu: bool, used: ctypes.CDLL | None = None) -> Tensor:
    y = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
    _run("ssm_conv_forward", ConvJob, _conv_fields(inputs, silu) | {"y": y}, used)
    return y


def _conv_backward(
    inputs: _ConvInputs, silu: bool, grad_y: Tensor, used: ctypes.CDLL | None = None
) -> tuple[Tensor | None, ...]:
    """Gradients in the order of the inputs."""
    x, weight, bias, left = inputs
    to_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    to_left = None if left is None else torch.empty_like(left)
    to_weight, to_bias = weight.new_empty(x.shape[0], *weight.shape), weight.new_empty(x.shape[0], weight.shape[0])
    gradients = {"grad_x": to_x, "grad_left": to_left, "grad_weight": to_weight, "grad_bias": to_bias}
    fields = _conv_fields(inputs, silu) | {"grad_y": _inner(grad_y)} | gradients
    _run("ssm_conv_backward", ConvJob, fields, used)
    return to_x, to_weight.sum(0), None if bias is None else to_bias.sum(0), to_left


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, silu, *inputs):  # type: ignore[no-untyped-def]
        ctx.silu = silu
        ctx.save_for_backward(*inputs)
        return _conv_forward(_ConvInputs(*inputs), silu)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        return None, *_conv_backward(_ConvInputs(*ctx.saved_tensors), ctx.silu, grad_y)


# ---- selective scan ----


class _ScanInputs(NamedTuple):
    u: Tensor  # u, dt, z [B, L, D], B, C [B, L, N]; without L for a step
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    state: Tensor | None


def _ready(given: _ScanInputs) -> _ScanInputs:
    """What C reads: the sequences in one memory type with their channels contiguous, the rest in float32."""
    u, dt, A, B, C, D, z, dt_bias, state = given
    outer, (width, size) = u.shape[:-1], A.shape
    _limit("states", size, MAX_STATES)
    _expect((*outer, width), u=u, dt=dt, z=z)
    _expect((*outer, size), B=B, C=C)
    _expect((width,), D=D, dt_bias=dt_bias)
    _expect((outer[0], width, size), state=state)
    dtype = _memory_type(u, dt, B, C, z)
    gate = None if z is None else _inner(z.to(dtype))
    u, dt, B, C = (_inner(u.to(dtype)), _inner(dt.to(dtype)), _inner(B.to(dtype)), _inner(C.to(dtype)))
    return _ScanInputs(u, dt, A.float().contiguous(), B, C, _floats(D), gate, _floats(dt_bias), _floats(state))


def _scan_fields(inputs: _ScanInputs) -> dict[str, Any]:
    batch, length, width = inputs.u.shape
    sizes = {"batch": batch, "length": length, "width": width, "size": inputs.A.shape[1]}
    return _common(inputs.u.dtype) | sizes | inputs._asdict()


def _kept(inputs: _ScanInputs) -> Tensor:
    """Room for the states before each span, which the backward starts from."""
    return _planes(inputs, -(-inputs.u.shape[1] // SPAN))


def _planes(inputs: _ScanInputs, count: int) -> Tensor:
    """Room for so many states of each block of LANES channels."""
    batch, _, width = inputs.u.shape
    return inputs.A.new_empty(batch * -(-width // LANES), count, inputs.A.shape[1], LANES)


def _scan_forward(
    inputs: _ScanInputs, saved: Tensor | None = None, used: ctypes.CDLL | None = None
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(inputs.u, memory_format=torch.contiguous_format)
    last = inputs.A.new_empty(inputs.u.shape[0], *inputs.A.shape)
    scratch = _planes(inputs, 2)
    fields = {"y": y, "last": last, "saved": saved, "scratch": scratch}
    _run("ssm_scan_forward", ScanJob, _scan_fields(inputs) | fields, used)
    return y, last


def _scan_backward(
    inputs: _ScanInputs,
    saved: Tensor,
    grad_y: Tensor | None,
    grad_last: Tensor | None,
    used: ctypes.CDLL | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients in the order of the inputs."""
    u, A = inputs.u, inputs.A
    (batch, length, width), size = u.shape, A.shape[1]
    grad_y = torch.zeros_like(u) if grad_y is None else _inner(grad_y)
    to_u, to_dt, to_z = (torch.empty_like(u, memory_format=torch.contiguous_format) for _ in range(3))
    to_A, to_state = (A.new_empty(batch, width, size) for _ in range(2))
    to_B, to_C = (A.new_empty(batch, -(-width // LANES), length, size) for _ in range(2))
    to_D, to_bias = (A.new_empty(batch, width) for _ in range(2))
    scratch = A.new_empty(torch.get_num_threads(), 2 * SPAN + 4, size, LANES)
    fields = _scan_fields(inputs) | {"saved": saved, "scratch": scratch}
    fields |= {"grad_y": grad_y, "grad_u": to_u, "grad_dt": to_dt, "grad_z": to_z, "grad_last": _floats(grad_last)}
    fields |= {"grad_A": to_A, "grad_state": to_state, "grad_D": to_D, "grad_dt_bias": to_bias}
    _run("ssm_scan_backward", ScanJob, fields | {"grad_B": to_B, "grad_C": to_C}, used)
    shared_B, shared_C = to_B.sum(1).to(u.dtype), to_C.sum(1).to(u.dtype)
    gradients = (to_u, to_dt, to_A.sum(0), shared_B, shared_C, to_D.sum(0), to_z, to_bias.sum(0), to_state)
    return tuple(None if given is None else found for given, found in zip(inputs, gradients, strict=True))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        inputs = _ScanInputs(*inputs)
        saved = _kept(inputs)
        ctx.save_for_backward(*inputs, saved)
        ctx.set_materialize_grads(False)
        return _scan_forward(inputs, saved)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_last):  # type: ignore[no-untyped-def]
        *inputs, saved = ctx.saved_tensors
        return _scan_backward(_ScanInputs(*inputs), saved, grad_y, grad_last)


# ---- calls ----


def _run(function: str, kind: type[ctypes.Structure], fields: dict[str, Any], used: ctypes.CDLL | None = None) -> None:
    if used is None:
        used, reason = _library()
        if used is None:
            raise BackendError(f"The native kernels cannot be used: {reason}.", hint=PORTABLE)
    used[function](ctypes.byref(fill(kind, fields)))


def _common(dtype: torch.dtype) -> dict[str, Any]:
    return {"bf16": dtype == torch.bfloat16, "threads": torch.get_num_threads()}


def _memory_type(*sequences: Tensor | None) -> torch.dtype:
    narrow = all(row is None or row.dtype == torch.bfloat16 for row in sequences)
    return torch.bfloat16 if narrow else torch.float32


def _inner(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def _floats(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _differentiated(tensors: Iterable[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _expect(shape: tuple[int, ...], **tensors: Tensor | None) -> None:
    """C trusts what it is told, so every shape is looked at before; InputError names the tensor."""
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.shape != shape or tensor.device.type != "cpu"):
            found = f"{list(tensor.shape)} on {tensor.device.type}"
            raise InputError(f"{name} is {found}, but the native kernel needs {list(shape)} on cpu.")


def _limit(what: str, number: int, most: int) -> None:
    if number > most:
        raise UnsupportedError(f"The native kernels take at most {most} {what}, not {number}.", hint=PORTABLE)


@contextmanager
def _in_place(state: Tensor) -> Iterator[Tensor]:
    """The state as C can change it; autograd is told, since it cannot see writes through an address."""
    work = state.float().contiguous()
    yield work
    if work is not state:
        state.copy_(work)
    elif not state.is_inference():
        torch.autograd.graph.increment_version(state)


# ---- library ----


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    return library.load(SOURCE, FLAGS, _disagreement)


def _disagreement(built: ctypes.CDLL) -> str:
    """Compares values and gradients on one small case with the reference in float64."""
    batch, length, width, size, taps = 2, SPAN + 3, LANES + 5, 3, 4

    def wave(step: float, *shape: int) -> Tensor:
        points = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
        return (points * step).sin().reshape(shape).requires_grad_()

    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        row, states = (batch, length, width), (batch, length, size)
        A = wave(0.9, width, size).detach().exp().neg().requires_grad_()
        scan = [wave(0.7, *row), wave(0.3, *row), A, wave(1.1, *states), wave(1.3, *states)]
        scan += [wave(0.6, width), wave(0.8, *row), wave(0.4, width), wave(1.7, batch, width, size)]
        y, last = reference.selective_scan(*scan)
        expected = [y, last, *torch.autograd.grad((y, last), scan, (y.detach(), last.detach()))]
        inputs = _ScanInputs(*(tensor.detach().float() for tensor in scan))
        saved = _kept(inputs)
        found: list[Tensor | None] = [*_scan_forward(inputs, saved, built)]
        found += _scan_backward(inputs, saved, y.detach().float(), last.detach().float(), built)

        window = [wave(0.7, *row), wave(1.9, width, taps), wave(0.6, width), wave(0.5, batch, taps - 1, width)]
        y = reference.conv(window[0], window[1], window[2], window[3].transpose(1, 2))
        expected += [y, *torch.autograd.grad(y, window, y.detach())]
        convolved = _ConvInputs(*(tensor.detach().float() for tensor in window))
        found += [_conv_forward(convolved, True, built), *_conv_backward(convolved, True, y.detach().float(), built)]

        errors = [(f - e).norm() / e.norm() for f, e in zip(found, expected, strict=True) if f is not None]
        worst = float(torch.stack(errors).detach().max())
    return "" if worst < 1e-5 else f"the library that was built is off by {worst:.1e} from the reference"
