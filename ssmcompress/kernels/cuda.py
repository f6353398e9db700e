"""The fused kernels of mamba-ssm and causal-conv1d, in our layout. The only importer of both packages."""

import importlib
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmcompress.kernels import reference

SPAN = 64
ALIGNED = 8  # entries: of what causal_conv1d wants its channels and the steps between tokens to be multiples
PACKAGES = {
    "mamba_ssm.ops.selective_scan_interface": "mamba-ssm",
    "mamba_ssm.ops.triton.selective_state_update": "mamba-ssm",
    "mamba_ssm.ops.triton.ssd_combined": "mamba-ssm",
    "causal_conv1d": "causal-conv1d",
}


@cache
def available() -> tuple[bool, str]:
    """Whether both packages import and a CUDA device is there, else the reason."""
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device"
    for module, package in PACKAGES.items():
        try:
            importlib.import_module(module)
        except (
            ImportError,
            OSError,
            RuntimeError,
        ) as error:  # an extension built for another torch raises any of these
            return False, f"{package} does not import ({error})"
    return True, ""


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, left: Tensor | None = None, silu: bool = True
) -> Tensor:
    """Causal depthwise convolution, then SiLU (:func:`reference.conv`), by causal_conv1d_fn."""
    channels, lacking = x.shape[2], -x.shape[2] % ALIGNED
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    left = None if left is None else left.to(x.dtype).transpose(1, 2)
    if lacking:
        x, weight = F.pad(x, (0, lacking)), F.pad(weight, (0, 0, 0, lacking))
        bias, left = (None if each is None else F.pad(each, (0, lacking)) for each in (bias, left))
    y = _module("causal_conv1d").causal_conv1d_fn(
        _aligned(x).transpose(1, 2),
        weight,
        bias,
        initial_states=None if left is None else _aligned(left).transpose(1, 2),
        activation="silu" if silu else None,
    )
    return y.transpose(1, 2)[..., :channels]


def _aligned(rows: Tensor) -> Tensor:
    """Rows [B, L, C] themselves where the convolution takes them, or a copy: parts of what a cut in_proj gives."""
    fits = rows.stride(2) == 1 and not any(stride % ALIGNED for stride in rows.stride()[:2])
    # contiguous() would leave odd strides of a single token as they are
    return rows if fits and not rows.data_ptr() % 16 else rows.clone(memory_format=torch.contiguous_format)


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
    """Mamba-1 scan (:func:`reference.selective_scan`), by selective_scan_fn.

    The kernel has no initial state: one is added to its output as C_t · (exp(A ΣΔ) ⊙ h₀), which is exact. Nor does it
    pass on a gradient of the last state, which therefore has none.
    """
    scan = _module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    u_, dt_, B_, C_ = (tensor.transpose(1, 2).contiguous() for tensor in (u, dt, B, C))
    gate = z if state is None else None
    y, last = scan(
        u_,
        dt_,
        A.float(),
        B_,
        C_,
        None if D is None else D.float(),
        None if gate is None else gate.transpose(1, 2).contiguous(),
        None if dt_bias is None else dt_bias.float(),
        delta_softplus=True,
        return_last_state=True,
    )
    y = y.transpose(1, 2)
    if state is None:
        return y, last.detach()
    elapsed = torch.cumsum(reference.step_size(dt.float(), dt_bias), dim=1)
    faded = [
        torch.einsum("bldn,bln->bld", torch.exp(span[..., None] * A) * state[:, None], read.float())
        for span, read in zip(elapsed.split(SPAN, dim=1), C.split(SPAN, dim=1), strict=True)
    ]
    y = y.float() + torch.cat(faded, dim=1)
    if z is not None:
        y = y * torch.nn.functional.silu(z.float())
    return y.to(u.dtype), (last + torch.exp(elapsed[:, -1, :, None] * A) * state).detach()


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
    """One token of the Mamba-1 scan (:func:`reference.selective_step`), by selective_state_update."""
    update = _module("mamba_ssm.ops.triton.selective_state_update").selective_state_update
    bias = torch.zeros_like(A[:, 0]) if dt_bias is None else dt_bias.float()
    return update(state, u, dt, A.float(), B, C, D, z=z, dt_bias=bias, dt_softplus=True)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-2 scan (:func:`reference.ssd`), by mamba_chunk_scan_combined.

    The kernel would lift Δ to its lower limit at padded positions too: with a limit, Δ is computed here.
    """
    scan = _module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    limited = dt_limit != (0.0, float("inf"))
    if limited:
        dt, dt_bias = reference.step_size(dt.float(), dt_bias, dt_limit), None
    return scan(
        x,
        dt,
        A.float(),
        B,
        C,
        chunk_size=256,
        D=None if D is None else D.float(),
        dt_bias=None if dt_bias is None else dt_bias.float(),
        initial_states=state,
        dt_softplus=not limited,
        return_final_states=True,
    )


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
    """One token of the Mamba-2 scan (:func:`reference.ssd_step`), by selective_state_update.

    The kernel cannot limit Δ, so Δ is computed here; it ties the step over a head's channels by strides of zero.
    """
    update = _module("mamba_ssm.ops.triton.selective_state_update").selective_state_update
    heads, width, size = state.shape[1:]
    delta = reference.step_size(dt.float(), dt_bias, dt_limit)[..., None].expand(-1, -1, width)
    zero = torch.zeros(heads, dtype=torch.float32, device=x.device)[:, None].expand(-1, width)
    decay = A.float()[:, None, None].expand(heads, width, size)
    skip = None if D is None else D[:, None].expand(-1, width)
    return update(state, x, delta, decay, B, C, skip, dt_bias=zero, dt_softplus=False)


def _module(name: str) -> ModuleType:
    return importlib.import_module(name)
