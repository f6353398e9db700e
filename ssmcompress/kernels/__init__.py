"""Which kernel runs: one choice by name, resolved for each call by the device and dtype of the tensor it is given."""

from collections.abc import Callable
from functools import cached_property
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ssmcompress.errors import BackendError, InputError
from ssmcompress.kernels import cpu, cuda, native, reference

BackendName = Literal["auto", "native", "torch", "cuda", "reference"]
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = ("conv", "selective_scan", "selective_step", "ssd", "ssd_step")


class Backend:
    """The five kernels under one name; `auto` takes the fastest that runs on the tensor's device and dtype."""

    def __init__(self, name: BackendName = "auto") -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"Backend({self.name!r})"

    def conv(self, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Causal depthwise convolution and SiLU (:func:`reference.conv`)."""
        return self._kernel("conv", x, weight.shape[1])(x, weight, *args, **kwargs)

    def selective_scan(self, u: Tensor, dt: Tensor, A: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Mamba-1 scan (:func:`reference.selective_scan`)."""
        return self._kernel("selective_scan", u, A.shape[1])(u, dt, A, *args, **kwargs)

    def selective_step(self, state: Tensor, u: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One token of the Mamba-1 scan, state changed in place (:func:`reference.selective_step`)."""
        return self._kernel("selective_step", u, state.shape[-1])(state, u, *args, **kwargs)

    def ssd(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Mamba-2 scan (:func:`reference.ssd`)."""
        return self._kernel("ssd", x)(x, *args, **kwargs)

    def ssd_step(self, state: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One token of the Mamba-2 scan, state changed in place (:func:`reference.ssd_step`)."""
        return self._kernel("ssd_step", x, state.shape[-1])(state, x, *args, **kwargs)

    def names(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str]:
        """The implementation each kernel resolves to on this device and dtype, for records."""
        device = torch.device(device).type
        return {kernel: label(self._module(kernel, device, dtype)) for kernel in KERNELS}

    def _kernel(self, kernel: str, tensor: Tensor, size: int = 0) -> Callable[..., Any]:
        module = self._module(kernel, tensor.device.type, tensor.dtype)
        if module is native and self.name == "auto" and size > native.MOST.get(kernel, size):
            module = cpu
        return getattr(module, kernel)

    def _module(self, kernel: str, device: str, dtype: torch.dtype) -> ModuleType:
        if self.name == "reference":
            return reference
        fits = device == "cuda" and dtype in CUDA_DTYPES and hasattr(cuda, kernel)
        if self.name in ("auto", "cuda") and fits and self._usable["cuda"]:
            return cuda
        fits = device == "cpu" and dtype in NATIVE_DTYPES and hasattr(native, kernel)
        return native if self.name in ("auto", "native") and fits and self._usable["native"] else cpu

    @cached_property
    def _usable(self) -> dict[str, bool]:
        return {"native": native.available()[0], "cuda": cuda.available()[0]}


AUTO = Backend()


def label(module: ModuleType) -> str:
    """The backend name of an implementation."""
    return "torch" if module is cpu else module.__name__.rsplit(".", 1)[-1]


def choose(name: str) -> Backend:
    """The backend of that name; BackendError where `native` or `cuda` is asked for by name and cannot be had."""
    if name not in get_args(BackendName):
        raise InputError(f"Unknown backend {name!r}.", hint=f"Choose one of {', '.join(get_args(BackendName))}.")
    for wanted in (native, cuda):
        usable, reason = wanted.available() if name == label(wanted) else (True, "")
        if not usable:
            raise BackendError(f"The {name} kernels cannot be used: {reason}.", hint="Run `ssmcompress doctor`.")
    return AUTO if name == "auto" else Backend(name)  # type: ignore[arg-type]
