"""The kernels of native.c: built by the system's C compiler at first use, checked against the reference, kept in the cache."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmcompress.errors import BackendError, UnsupportedError
from ssmcompress.kernels import reference

LANES, SPAN = 64, 16  # channels of a task; tokens between two kept states
MAX_TAPS, MAX_STATES = 8, 256
SOURCE = Path(__file__).with_suffix(".c")
FLAGS = (
    *("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
    *(f"-D{name}={value}" for name, value in (("LANES", LANES), ("SPAN", SPAN), ("MAX_TAPS", MAX_TAPS), ("MAX_STATES", MAX_STATES))),
)


def available() -> tuple[bool, str]:
    """Whether the native kernels can be used here, and why, in words for the user."""
    library, reason = _library()
    return library is not None, reason


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, left: Tensor | None = None, silu: bool = True) -> Tensor:
    """Causal depthwise convolution, then SiLU: x [B, L, C], weight [C, K ≤ 8], left [B, C, K-1] → [B, L, C]; differentiable."""
    if weight.shape[1] > MAX_TAPS:
        raise UnsupportedError(f"The native convolution takes at most {MAX_TAPS} taps, not {weight.shape[1]}.")
    dtype = _memory_type(x)
    past = None if left is None else left.to(dtype).transpose(1, 2).contiguous()
    inputs = (x.to(dtype), weight.float().contiguous(), _vector(bias), past)
    y = _Conv.apply(*inputs, silu) if _differentiated(inputs) else _conv_forward(*inputs, silu)
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
    """Mamba-1 scan: u, dt, z [B, L, D], A [D, N ≤ 256], B, C [B, L, N] → y [B, L, D], state [B, D, N]; differentiable."""
    inputs = _scan_inputs(u, dt, A, B, C, D, z, dt_bias, state)
    y, last, _ = _Scan.apply(*inputs) if _differentiated(inputs) else _scan_forward(*inputs, keep=False)
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
    """One token of :func:`selective_scan`: u, dt, z [B, D], B, C [B, N]; state [B, D, N] changes in place → y [B, D]."""
    rows = [None if row is None else row[:, None] for row in (u, dt, B, C, z)]
    inputs = _scan_inputs(rows[0], rows[1], A, rows[2], rows[3], D, rows[4], dt_bias, state)
    if _differentiated(inputs):
        y, last, _ = _Scan.apply(*inputs)
        state.copy_(last)
        return y[:, 0].to(u.dtype)
    work = inputs[-1]
    y = torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
    _call("ssm_scan_step", _scan_job(*inputs[:-1], None, y=_rows(y), final=work.data_ptr()))
    if work.data_ptr() != state.data_ptr():
        state.copy_(work)
    return y[:, 0].to(u.dtype)


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
    """One token of the Mamba-2 scan: x [B, H, P], dt [B, H], B, C [B, G, N ≤ 256]; state [B, H, P, N] in place → y [B, H, P]."""
    if _differentiated((state, x, dt, A, B, C, D, dt_bias)):
        return reference.ssd_step(state, x, dt, A, B, C, D, dt_bias, dt_limit)
    batch, heads, width, size = state.shape
    _check_states(size)
    dtype = _memory_type(x, dt, B, C)
    x_, dt_, B_, C_ = (_inner(row.to(dtype)) for row in (x, dt, B, C))
    work, A_, D_, bias = state.float().contiguous(), A.float().contiguous(), _vector(D), _vector(dt_bias)
    y = torch.empty(batch, heads, width, dtype=dtype)
    low, high = dt_limit
    job = _SsdJob(
        *(batch, heads, width, size, B.shape[1], dtype == torch.bfloat16, torch.get_num_threads()),
        *(_rows(x_), _rows(dt_), _rows(B_), _rows(C_), _rows(y)),
        *(A_.data_ptr(), _pointer(D_), _pointer(bias), work.data_ptr(), low, high),
    )
    _call("ssm_ssd_step", job)
    if work.data_ptr() != state.data_ptr():
        state.copy_(work)
    return y.to(x.dtype)


# ---- tensors as C sees them ----


class _Rows(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("time", ctypes.c_int64))


def _fields(integers: str, **groups: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_int64) for name in integers.split()]


def _struct(layout: Sequence[tuple[Any, str]]) -> list[tuple[str, Any]]:
    return [(name, kind) for kind, names in layout for name in names.split()]


class _ScanJob(ctypes.Structure):
    _fields_ = _struct(
        [
            (ctypes.c_int64, "batch length width size bf16 threads"),
            (_Rows, "u dt B C z y"),
            (ctypes.c_void_p, "A D dt_bias initial final saved"),
            (_Rows, "grad_y grad_u grad_dt grad_z"),
            (ctypes.c_void_p, "grad_final grad_initial grad_A grad_D grad_dt_bias grad_B grad_C scratch"),
        ]
    )


class _ConvJob(ctypes.Structure):
    _fields_ = _struct(
        [
            (ctypes.c_int64, "batch length width taps silu bf16 threads"),
            (_Rows, "x left y"),
            (ctypes.c_void_p, "weight bias"),
            (_Rows, "grad_y grad_x grad_left"),
            (ctypes.c_void_p, "grad_weight grad_bias"),
        ]
    )


class _SsdJob(ctypes.Structure):
    _fields_ = _struct(
        [
            (ctypes.c_int64, "batch heads width size groups bf16 threads"),
            (_Rows, "x dt B C y"),
            (ctypes.c_void_p, "A D dt_bias state"),
            (ctypes.c_float, "low high"),
        ]
    )


def _rows(tensor: Tensor | None) -> _Rows:
    return _Rows() if tensor is None else _Rows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _inner(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _memory_type(*tensors: Tensor | None) -> torch.dtype:
    narrow = all(tensor is None or tensor.dtype == torch.bfloat16 for tensor in tensors)
    return torch.bfloat16 if narrow else torch.float32


def _differentiated(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _check_states(size: int) -> None:
    if size > MAX_STATES:
        raise UnsupportedError(f"The native kernels take at most {MAX_STATES} states, not {size}.", hint="--backend torch")


def _call(function: str, job: ctypes.Structure) -> None:
    library, reason = _library()
    if library is None:
        raise BackendError(f"The native kernels cannot be used: {reason}", hint="--backend torch runs without a compiler.")
    library[function](ctypes.byref(job))


# ---- convolution ----


def _conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor | None, silu: bool) -> Tensor:
    x = _inner(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _call("ssm_conv_forward", _conv_job(x, weight, bias, left, silu, y=_rows(y)))
    return y


def _conv_job(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor | None, silu: bool, **fields: Any
) -> _ConvJob:
    sizes = (*x.shape, weight.shape[1], silu, x.dtype == torch.bfloat16, torch.get_num_threads())
    return _ConvJob(*sizes, _rows(x), _rows(left), weight=weight.data_ptr(), bias=_pointer(bias), **fields)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, left, silu):  # type: ignore[no-untyped-def]
        ctx.silu = silu
        ctx.save_for_backward(x, weight, bias, left)
        return _conv_forward(x, weight, bias, left, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        x, weight, bias, left = ctx.saved_tensors
        x, grad_y = _inner(x), _inner(grad_y)
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        grad_left = None if left is None else torch.empty_like(left)
        grad_weight = weight.new_empty(x.shape[0], *weight.shape)
        grad_bias = weight.new_empty(x.shape[0], weight.shape[0])
        job = _conv_job(
            *(x, weight, bias, left, ctx.silu),
            grad_y=_rows(grad_y),
            grad_x=_rows(grad_x),
            grad_left=_rows(grad_left),
            grad_weight=grad_weight.data_ptr(),
            grad_bias=grad_bias.data_ptr(),
        )
        _call("ssm_conv_backward", job)
        return grad_x, grad_weight.sum(0), None if bias is None else grad_bias.sum(0), grad_left, None


# ---- selective scan ----


def _scan_inputs(u, dt, A, B, C, D, z, dt_bias, state):  # type: ignore[no-untyped-def]
    """u, dt, B, C, z in one memory type, the rest in float32, as the C code reads them."""
    _check_states(A.shape[1])
    dtype = _memory_type(u, dt, B, C, z)
    u, dt, B, C, z = (None if row is None else row.to(dtype) for row in (u, dt, B, C, z))
    return u, dt, _vector(A), B, C, _vector(D), z, _vector(dt_bias), _vector(state)


def _scan_job(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    **fields: Any,
) -> _ScanJob:
    sizes = (*u.shape, A.shape[1], u.dtype == torch.bfloat16, torch.get_num_threads())
    pointers = {"A": A.data_ptr(), "D": _pointer(D), "dt_bias": _pointer(dt_bias), "initial": _pointer(state)}
    return _ScanJob(*sizes, *(_rows(row) for row in (u, dt, B, C, z)), **pointers, **fields)


def _scan_forward(u, dt, A, B, C, D, z, dt_bias, state, *, keep):  # type: ignore[no-untyped-def]
    """y, final state and, where kept for the backward, the state before each span."""
    u, dt, B, C = (_inner(row) for row in (u, dt, B, C))
    z = None if z is None else _inner(z)
    batch, length, width = u.shape
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    last = A.new_empty(batch, *A.shape)
    saved = None
    if keep:
        saved = A.new_empty(batch * -(-width // LANES), -(-length // SPAN), A.shape[1], LANES)
    job = _scan_job(
        u, dt, A, B, C, D, z, dt_bias, state, y=_rows(y), final=last.data_ptr(), saved=_pointer(saved)
    )
    _call("ssm_scan_forward", job)
    return y, last, saved


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, dt, A, B, C, D, z, dt_bias, state):  # type: ignore[no-untyped-def]
        y, last, saved = _scan_forward(u, dt, A, B, C, D, z, dt_bias, state, keep=True)
        ctx.save_for_backward(u, dt, A, B, C, D, z, dt_bias, state, saved)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved)
        return y, last, saved

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_last, _):  # type: ignore[no-untyped-def]
        u, dt, A, B, C, D, z, dt_bias, state, saved = ctx.saved_tensors
        u, dt, B, C = (_inner(row) for row in (u, dt, B, C))
        z = None if z is None else _inner(z)
        grad_y = u.new_zeros(u.shape) if grad_y is None else _inner(grad_y)
        grad_last = None if grad_last is None else grad_last.contiguous()
        batch, length, width = u.shape
        blocks, size = -(-width // LANES), A.shape[1]
        grad_u, grad_dt = torch.empty(2, *u.shape, dtype=u.dtype)
        grad_z = None if z is None else torch.empty(u.shape, dtype=u.dtype)
        grad_A, grad_state = A.new_empty(2, batch, width, size)
        grad_D, grad_bias = A.new_empty(2, batch, width)
        grad_B, grad_C = A.new_empty(2, batch, blocks, length, size)
        scratch = A.new_empty(torch.get_num_threads(), 2 * SPAN + 4, size, LANES)
        rows = {"grad_y": grad_y, "grad_u": grad_u, "grad_dt": grad_dt, "grad_z": grad_z}
        pointers = {
            "saved": saved,
            "grad_final": grad_last,
            "grad_initial": grad_state,
            "grad_A": grad_A,
            "grad_D": grad_D,
            "grad_dt_bias": grad_bias,
            "grad_B": grad_B,
            "grad_C": grad_C,
            "scratch": scratch,
        }
        fields = {name: _rows(row) for name, row in rows.items()} | {k: _pointer(t) for k, t in pointers.items()}
        _call("ssm_scan_backward", _scan_job(u, dt, A, B, C, D, z, dt_bias, state, **fields))
        return (
            grad_u,
            grad_dt,
            grad_A.sum(0),
            grad_B.sum(1).to(B.dtype),
            grad_C.sum(1).to(C.dtype),
            None if D is None else grad_D.sum(0),
            grad_z,
            None if dt_bias is None else grad_bias.sum(0),
            None if state is None else grad_state,
        )


# ---- building ----


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        return None, "no C compiler (cc, gcc or clang) on the PATH"
    try:
        key = _key(compiler)
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssmcompress" / "native"
        path = folder / f"{key}.so"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=folder, suffix=".so")
            os.close(descriptor)
            subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", name], check=True, capture_output=True, text=True)
            os.replace(name, path)
        return ctypes.CDLL(str(path)), f"{path}"
    except (OSError, subprocess.SubprocessError) as error:
        return None, str(getattr(error, "stderr", "") or error)


def _key(compiler: str) -> str:
    """Names the library: source, flags, and all that the compiler says of itself and of this processor."""
    command = [compiler, *FLAGS, "-dM", "-E", "-x", "c", os.devnull]
    macros = subprocess.run(command, check=True, capture_output=True).stdout
    return hashlib.sha256(b"\0".join((SOURCE.read_bytes(), " ".join(FLAGS).encode(), macros))).hexdigest()[:32]
