"""What native.c is told of tensors: sizes, addresses and strides, in the layouts of its structs."""

import ctypes
from typing import Any

from torch import Tensor


class _Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("time", ctypes.c_int64)]


def _layout(*groups: tuple[Any, str]) -> list[tuple[str, Any]]:
    return [(name, kind) for kind, names in groups for name in names.split()]


class ConvJob(ctypes.Structure):
    """conv_job."""

    _fields_ = _layout(
        (ctypes.c_int64, "batch length width bf16 threads taps silu"),
        (_Rows, "x left y"),
        (ctypes.c_void_p, "weight bias"),
        (_Rows, "grad_y grad_x grad_left"),
        (ctypes.c_void_p, "grad_weight grad_bias"),
    )


class ScanJob(ctypes.Structure):
    """scan_job."""

    _fields_ = _layout(
        (ctypes.c_int64, "batch length width bf16 threads size"),
        (_Rows, "u dt B C z y"),
        (ctypes.c_void_p, "A D dt_bias state last saved"),
        (_Rows, "grad_y grad_u grad_dt grad_z"),
        (ctypes.c_void_p, "grad_last grad_A grad_state grad_D grad_dt_bias grad_B grad_C scratch"),
    )


class SsdJob(ctypes.Structure):
    """ssd_job."""

    _fields_ = _layout(
        (ctypes.c_int64, "batch heads width bf16 threads size groups"),
        (_Rows, "x dt B C y"),
        (ctypes.c_void_p, "A D dt_bias state"),
        (ctypes.c_float, "low high"),
    )


JOBS = (ConvJob, ScanJob, SsdJob)
WALKED = frozenset(name for job in JOBS for name, kind in job._fields_ if kind is _Rows)


def fill(kind: type[ctypes.Structure], fields: dict[str, Any]) -> ctypes.Structure:
    """A job of that kind; None becomes null, and the tensors must outlive the call."""
    job = kind()
    for name, value in fields.items():
        if isinstance(value, Tensor):
            walked = name in WALKED
            value = _Rows(value.data_ptr(), value.stride(0), value.stride(1)) if walked else value.data_ptr()
        if value is not None:
            setattr(job, name, value)
    return job
