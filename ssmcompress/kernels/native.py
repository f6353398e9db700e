"""The kernels in plain C: built by the system compiler at first use, kept in the user's cache, called through ctypes.

The library's name says what it was built from: source, compiler, flags and CPU. It is used only after it has agreed with
the reference on a small input; where there is no compiler the torch kernels serve and :func:`available` says why.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmcompress.kernels import reference

DTYPES = (torch.float32, torch.bfloat16)
CHUNK = 16  # as in native.c
LANES = 16
MAX_SIZE = 256  # states a channel: the kernels keep them on the stack
MAX_KERNEL = 8
SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi")
WIDE = "-mprefer-vector-width=512"  # only x86 compilers know it


class _Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("row", ctypes.c_int64)]


def _fields(ints: str, rows: str = "", pointers: str = "") -> list[tuple[str, type]]:
    return [
        *((name, ctypes.c_int64) for name in ints.split()),
        *((name, _Rows) for name in rows.split()),
        *((name, ctypes.c_void_p) for name in pointers.split()),
    ]


class _Scan(ctypes.Structure):
    _fields_ = (
        _fields("batch length width size threads half", "u dt z y", "A B C D bias start state kept")
        + _fields("", "grad_y grad_u grad_dt grad_z")
        + _fields("", "", "grad_state grad_A grad_start grad_B grad_C grad_D grad_bias")
    )


class _Convolution(ctypes.Structure):
    _fields_ = (
        _fields("batch length width kernel threads half silu", "x y", "weight bias left")
        + _fields("", "grad_y grad_x")
        + _fields("", "", "grad_pre grad_left grad_weight grad_bias")
    )


def available() -> tuple[bool, str]:
    """Whether the library is built and agrees with the reference, else the reason."""
    library, reason = _library()
    return library is not None, reason


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, left: Tensor | None = None, silu: bool = True) -> Tensor:
    """Causal depthwise convolution, then SiLU: x [B, L, C], weight [C, K], left [B, C, K-1] → [B, L, C]."""
    return _Conv.apply(x, weight, bias, left, silu)


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
    """Mamba-1 scan: u, dt, z [B, L, D], A [D, N], B, C [B, L, N], state [B, D, N] → y [B, L, D], state (Mamba, alg. 2)."""
    return _SelectiveScan.apply(u, dt, A, B, C, D, z, dt_bias, state)


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
    rows = [t if t is None else t[:, None] for t in (u, dt, B, C, z)]
    call = _ScanCall(rows[0], rows[1], A, rows[2], rows[3], D, rows[4], dt_bias)
    held = state if state.dtype == torch.float32 and state.is_contiguous() else state.float().contiguous()
    call.fields["state"] = held
    call.run("scan_step")
    if held is not state:
        state.copy_(held)
    return call.y[:, 0]


class _ScanCall:
    """The arguments of one scan in the types C wants; holds them alive while it runs."""

    def __init__(
        self,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
    ) -> None:
        self.y = torch.empty(u.shape, dtype=u.dtype)
        self.fields: dict[str, object] = {
            "batch": u.shape[0],
            "length": u.shape[1],
            "width": u.shape[2],
            "size": A.shape[1],
            "half": u.dtype == torch.bfloat16,
            "threads": torch.get_num_threads(),
            "u": _last_contiguous(u),
            "dt": _last_contiguous(dt.to(u.dtype)),
            "z": None if z is None else _last_contiguous(z.to(u.dtype)),
            "y": self.y,
            "A": _floats(A),
            "B": _floats(B),
            "C": _floats(C),
            "D": _floats(D),
            "bias": _floats(dt_bias),
        }

    def run(self, function: str) -> None:
        """Calls the C function on the fields."""
        arguments = _arguments(_Scan, self.fields)
        _function(function)(ctypes.byref(arguments))


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, dt, A, B, C, D, z, dt_bias, state):  # type: ignore[no-untyped-def]
        call = _ScanCall(u, dt, A, B, C, D, z, dt_bias)
        batch, length, width = u.shape
        last = torch.empty(batch, width, A.shape[1])
        call.fields |= {"start": _floats(state), "state": last}
        if any(ctx.needs_input_grad):
            call.fields["kept"] = _aligned(batch * -(-length // CHUNK) * -(-width // LANES) * A.shape[1] * LANES)
        call.run("scan_forward")
        ctx.save_for_backward(u, dt, A, B, C, D, z, dt_bias, state, call.fields.get("kept"))
        return call.y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_state):  # type: ignore[no-untyped-def]
        u, dt, A, B, C, D, z, dt_bias, state, kept = ctx.saved_tensors
        call = _ScanCall(u, dt, A, B, C, D, z, dt_bias)
        batch, length, width = u.shape
        size, threads = A.shape[1], torch.get_num_threads()
        like_u = {name: torch.empty(u.shape, dtype=u.dtype) for name in ("grad_u", "grad_dt")}
        sums = {
            "grad_A": torch.empty(batch, width, size),
            "grad_start": torch.empty(batch, width, size),
            "grad_B": torch.empty(threads, batch, length, size),
            "grad_C": torch.empty(threads, batch, length, size),
            "grad_D": torch.empty(batch, width),
            "grad_bias": torch.empty(batch, width),
        }
        grad_z = None if z is None else torch.empty(u.shape, dtype=u.dtype)
        grad_y = _last_contiguous(grad_y.to(u.dtype))
        call.fields |= {"kept": kept, "grad_y": grad_y, "grad_state": _floats(grad_state), "grad_z": grad_z}
        call.fields |= like_u | sums
        call.run("scan_backward")
        gradients = (
            like_u["grad_u"],
            like_u["grad_dt"],
            sums["grad_A"].sum(0),
            sums["grad_B"].sum(0),
            sums["grad_C"].sum(0),
            sums["grad_D"].sum(0),
            grad_z,
            sums["grad_bias"].sum(0),
            sums["grad_start"],
        )
        return _fit(gradients, (u, dt, A, B, C, D, z, dt_bias, state))


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, left, silu):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight, bias, left)
        ctx.silu = silu
        y = torch.empty(x.shape, dtype=x.dtype)
        _run_convolution("conv_forward", _convolution_fields(x, weight, bias, left, silu) | {"y": y})
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        x, weight, bias, left = ctx.saved_tensors
        batch, length, width = x.shape
        kernel, threads = weight.shape[1], torch.get_num_threads()
        grad_x = torch.empty(x.shape, dtype=x.dtype)
        sums = {
            "grad_pre": torch.empty(batch, length, width),
            "grad_left": torch.zeros(batch, kernel - 1, width),
            "grad_weight": torch.zeros(threads, kernel, width),
            "grad_bias": torch.zeros(threads, width),
        }
        fields = _convolution_fields(x, weight, bias, left, ctx.silu) | sums
        fields |= {"grad_y": _last_contiguous(grad_y.to(x.dtype)), "grad_x": grad_x}
        _run_convolution("conv_backward", fields)
        gradients = (
            grad_x,
            sums["grad_weight"].sum(0).T,
            sums["grad_bias"].sum(0),
            sums["grad_left"].transpose(1, 2),
        )
        return *_fit(gradients, (x, weight, bias, left)), None


def _convolution_fields(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor | None, silu: bool
) -> dict[str, object]:
    return {
        "batch": x.shape[0],
        "length": x.shape[1],
        "width": x.shape[2],
        "kernel": weight.shape[1],
        "threads": torch.get_num_threads(),
        "half": x.dtype == torch.bfloat16,
        "silu": silu,
        "x": _last_contiguous(x),
        "weight": _floats(weight.T),
        "bias": _floats(bias),
        "left": None if left is None else left.detach().to(x.dtype).transpose(1, 2).contiguous(),
    }


def _run_convolution(function: str, fields: dict[str, object]) -> None:
    _function(function)(ctypes.byref(_arguments(_Convolution, fields)))


def _fit(gradients: Iterable[Tensor | None], inputs: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Each gradient in the dtype of its input, None where the input was None."""
    return tuple(None if x is None or g is None else g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True))


def _floats(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float().contiguous()


def _last_contiguous(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.detach().contiguous()


def _aligned(count: int) -> Tensor:
    """Float32 memory that starts on a cache line, as the C code's vectors must."""
    space = torch.empty(count + LANES)
    return space[(-space.data_ptr() // 4) % LANES :][:count]


def _arguments(kind: type[ctypes.Structure], fields: dict[str, object]) -> ctypes.Structure:
    filled = kind()
    for name, value in fields.items():
        if isinstance(value, Tensor):
            row = dict(kind._fields_)[name] is _Rows  # type: ignore[arg-type, misc]
            value = _Rows(value.data_ptr(), value.stride(0), value.stride(1)) if row else value.data_ptr()
        if value is not None:
            setattr(filled, name, value)
    return filled


def _function(name: str):  # type: ignore[no-untyped-def]
    library, reason = _library()
    if library is None:
        raise RuntimeError(f"the native kernels are not available: {reason}")
    return getattr(library, name)


@cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None, "no C compiler was found (cc, gcc or clang)"
    try:
        library = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"the C kernels did not build or load with {compiler} ({_told(error)})"
    for function in ("scan_forward", "scan_backward", "scan_step", "conv_forward", "conv_backward"):
        getattr(library, function).restype = None
    wrong = _disagreement(library)
    return (None, wrong) if wrong else (library, "")


def _told(error: Exception) -> str:
    told = getattr(error, "stderr", "") or str(error)
    return told.strip().splitlines()[0] if told.strip() else type(error).__name__


def _built(compiler: str) -> Path:
    """The library for this source, compiler and CPU: from the cache, else built beside it and moved into place."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    flags = (*FLAGS, WIDE) if platform.machine() in ("x86_64", "AMD64") else FLAGS
    key = hashlib.sha256("\0".join([SOURCE.read_text(), version, *flags, _cpu()]).encode()).hexdigest()[:24]
    for folder in (_cache_folder(), Path(tempfile.gettempdir()) / f"ssmcompress-{os.getuid()}"):
        library = folder / f"native-{key}.so"
        if library.exists():
            return library
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, building = tempfile.mkstemp(suffix=".so", dir=folder)
        except OSError:
            continue
        os.close(handle)
        command = [compiler, *flags, "-shared", "-fPIC", "-o", building, str(SOURCE)]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
            os.replace(building, library)
        finally:
            Path(building).unlink(missing_ok=True)
        return library
    raise OSError("no folder to build in could be written")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssmcompress"


def _cpu() -> str:
    """What -march=native depends on: the CPU's features where the system tells them, else its name."""
    told = Path("/proc/cpuinfo")
    if told.exists():
        lines = told.read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines if line.startswith(("flags", "Features", "model name")))[:8192]
    return platform.processor() + platform.machine()


def _disagreement(library: ctypes.CDLL) -> str:
    """What is wrong with the library, found by one small scan and convolution; empty where nothing is."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    u, dt, z = normal(2, 19, 21), normal(2, 19, 21), normal(2, 19, 21)
    A, B, C, D, bias = -normal(21, 5).exp(), normal(2, 19, 5), normal(2, 19, 5), normal(21), normal(21)
    call, last = _ScanCall(u, dt, A, B, C, D, z, bias), torch.empty(2, 21, 5)
    call.fields["state"] = last
    library.scan_forward(ctypes.byref(_arguments(_Scan, call.fields)))
    y, state = reference.selective_scan(u, dt, A, B, C, D, z, bias)
    weight, convolved = normal(21, 4), torch.empty_like(u)
    fields = _convolution_fields(u, weight, D, None, True) | {"y": convolved}
    library.conv_forward(ctypes.byref(_arguments(_Convolution, fields)))
    pairs = ((call.y, y), (last, state), (convolved, reference.conv(u, weight, D)))
    worst = max(float((found - expected).norm() / expected.norm()) for found, expected in pairs)
    return "" if worst < 1e-5 else f"the built library disagrees with the reference (relative error {worst:.1e})"
