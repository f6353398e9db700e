"""The Mamba-2 chunk algorithm (SSD) with a backward of its own: attention within a chunk, a state between chunks.

Letters: b batch, c chunks, Q tokens a chunk, G groups, R heads a group, P channels a head, N states. Matrices are
multiplied in the dtype of x; exponents and states are float32 (float64 for float64). Cumulative sums are float64: their
differences are exponents, and lose digits otherwise.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FORGOTTEN = 1e-20  # a decay below is zero: no sum would notice, and products of subnormal numbers are ten times slower


class ChunkScan(torch.autograd.Function):
    """x [b, c, Q, G, R, P], delta [b, c, Q, G, R], A [G, R], B, C [b, c, Q, G, N], state [b, G, R, P, N] → y, state."""

    @staticmethod
    def forward(ctx, x, delta, A, B, C, state):  # type: ignore[no-untyped-def]
        b, c, Q, G, R, P = x.shape
        narrow, work = x.dtype, delta.dtype
        B, C = (t.transpose(2, 3).reshape(b * c * G, Q, -1).to(narrow) for t in (B, C))
        scaled = (x * delta.to(narrow)[..., None]).permute(0, 1, 3, 4, 2, 5).reshape(-1, Q, P)
        log = torch.cumsum((delta * A).double(), 2).permute(0, 1, 3, 4, 2).contiguous()
        decay = _decay(log, narrow)
        scores = (decay * torch.bmm(C, B.transpose(1, 2)).view(b, c, G, 1, Q, Q)).view(-1, Q, Q)
        within = torch.bmm(scores, scaled).view(b, c, G, R, Q, P).transpose(3, 4)

        total = log[..., -1:]
        into = _exp(total - log).to(narrow)
        flow = (scaled.view(b, c, G, R, Q, P) * into[..., None]).transpose(3, 4).reshape(b * c * G, Q, R * P)
        # states lie as [N, R, P]: products with B and C then need no transposed wide matrix, which are slow
        added = torch.bmm(B.transpose(1, 2), flow).to(work).view(b, c, G, -1, R, P)
        carry = _exp(total).to(work)[:, :, :, None]
        state = state.permute(0, 1, 4, 2, 3)
        states = torch.empty_like(added)
        for i in range(c):
            states[:, i] = state
            state = torch.addcmul(added[:, i], state, carry[:, i])
        start = states.to(narrow).view(b * c * G, -1, R * P)
        across = torch.bmm(C, start).view(b, c, G, Q, R, P)
        outof = _exp(log).to(narrow).transpose(3, 4)[..., None]
        ctx.save_for_backward(x, delta, A, B, C, scaled, decay, scores, into, flow, carry, states, start, across, outof)
        return torch.addcmul(within, across, outof).transpose(2, 3), state.permute(0, 1, 3, 4, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_state):  # type: ignore[no-untyped-def]
        x, delta, A, B, C, scaled, decay, scores, into, flow, carry, states, start, across, outof = ctx.saved_tensors
        b, c, Q, G, R, P = x.shape
        narrow, work = x.dtype, delta.dtype
        grad = grad_y.to(narrow).transpose(2, 3)
        rows = grad.transpose(3, 4).reshape(-1, Q, P)
        grad_scaled = torch.bmm(scores.transpose(1, 2), rows).view(b, c, G, R, Q, P)
        grad_scores = torch.bmm(rows, scaled.transpose(1, 2)).view(b, c, G, R, Q, Q)
        grad_CB = (grad_scores * decay).sum(3).view(-1, Q, Q)
        grad_C, grad_B = torch.bmm(grad_CB, B), torch.bmm(grad_CB.transpose(1, 2), C)
        exponent = grad_scores.mul_(scores.view(b, c, G, R, Q, Q))
        # row sums minus column sums of one matrix: what is far apart cancels exactly, whatever the rounding
        grad_log = exponent.sum(-1, dtype=work) - exponent.sum(-2, dtype=work)

        out = grad * outof
        grad_log += (out * across).sum(-1, dtype=work).transpose(3, 4)
        out = out.reshape(b * c * G, Q, R * P)
        grad_C += torch.bmm(out, start.transpose(1, 2))
        direct = torch.bmm(C.transpose(1, 2), out).to(work).view(states.shape)
        grad_added, grad_total = torch.empty_like(direct), torch.empty_like(carry[:, :, :, 0, :, 0])
        run = grad_state.permute(0, 1, 4, 2, 3)
        for i in reversed(range(c)):
            grad_added[:, i] = run
            grad_total[:, i] = (run * states[:, i]).sum((2, 4)) * carry[:, i, :, 0, :, 0]
            run = torch.addcmul(direct[:, i], carry[:, i], run)
        grad_added = grad_added.to(narrow).view(b * c * G, -1, R * P)
        grad_flow = torch.bmm(B, grad_added).view(b, c, G, Q, R, P).transpose(3, 4)
        grad_B += torch.bmm(flow, grad_added.transpose(1, 2))
        passed = (flow.view(b, c, G, Q, R, P).transpose(3, 4) * grad_flow).sum(-1, dtype=work)
        grad_log -= passed
        grad_log[..., -1] += grad_total + passed.sum(-1)
        grad_scaled = torch.addcmul(grad_scaled, grad_flow, into[..., None]).permute(0, 1, 4, 2, 3, 5)

        # every later cumulative sum holds a step's exponent
        grad_a = grad_log.flip(-1).cumsum(-1, dtype=torch.float64).flip(-1).to(work).permute(0, 1, 4, 2, 3)
        grad_x = grad_scaled * delta.to(narrow)[..., None]
        grad_delta = (grad_scaled * x).sum(-1, dtype=work) + grad_a * A
        grad_B, grad_C = (t.view(b, c, G, Q, -1).transpose(2, 3) for t in (grad_B, grad_C))
        return grad_x, grad_delta, (grad_a * delta).sum((0, 1, 2)), grad_B, grad_C, run.permute(0, 1, 3, 4, 2)


def _decay(log: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(log_i - log_j) for j ≤ i, else 0: [..., Q] → [..., Q, Q]."""
    if dtype.itemsize < 4:  # a bfloat16 result keeps fewer digits than a float32 difference loses
        log = log.float()
    apart = torch.sub(log[..., :, None], log[..., None, :])
    apart = apart if dtype.itemsize < 4 else apart.to(dtype)
    return _exp(apart).to(dtype).tril_()


def _exp(log: Tensor) -> Tensor:
    """exp of exponents that are at most zero where they matter; the bounds spare exp its slow extremes."""
    return torch.threshold_(log.clamp(math.log(FORGOTTEN) - 1, 0).exp_(), FORGOTTEN, 0.0)
