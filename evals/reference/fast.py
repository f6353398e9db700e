"""The costly parts of a training step with backward passes of their own: Mamba-2 scan and loss over the vocabulary."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmcompress import kernels

CHUNK = 64
ROWS = 256


class TrainingBackend(kernels.Backend):
    """The automatic backend, with the bfloat16 Mamba-2 scan below: one group, no state carried in, whole chunks."""

    def ssd(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Mamba-2 scan (:func:`ssmcompress.kernels.reference.ssd`); the state it returns is empty."""
        dt, A, B, C, D, dt_bias, _limit, _state = args
        with torch.autocast(x.device.type, enabled=False):
            delta = F.softplus(dt.float() + dt_bias)
            y = _Ssd.apply(x.bfloat16(), delta, A, B.squeeze(2), C.squeeze(2))
            return torch.addcmul(y, x.bfloat16(), D.bfloat16()[:, None]), x.new_empty(0)


class _Ssd(torch.autograd.Function):
    """Chunked scan, bfloat16 matrices, float32 exponents, states: x [b, L, H, P], delta [b, L, H], B, C [b, L, N]."""

    @staticmethod
    def forward(ctx, x, delta, A, B, C):  # type: ignore[no-untyped-def]
        b, length, H, P = x.shape
        N, c, Q, half = B.shape[-1], length // CHUNK, CHUNK, torch.bfloat16
        log = torch.cumsum((delta * A).view(b, c, Q, H).double(), 2).float().permute(0, 1, 3, 2).contiguous()
        xd = (x.reshape(b, c, Q, H, P) * delta.to(half).view(b, c, Q, H, 1)).permute(0, 1, 3, 2, 4)
        xd = xd.reshape(b * c * H, Q, P)
        B, C = B.reshape(b * c, Q, N).to(half), C.reshape(b * c, Q, N).to(half)
        # above the diagonal the exponent is positive: what overflows there is cut off, never multiplied
        decay = torch.sub(log[..., :, None], log[..., None, :]).exp_().tril_().to(half)
        scores = (decay * torch.bmm(C, B.transpose(1, 2)).view(b, c, 1, Q, Q)).view(b * c * H, Q, Q)
        within = torch.bmm(scores, xd).view(b, c, H, Q, P).permute(0, 1, 3, 2, 4)

        total = log[..., -1:]
        into = (total - log).exp_().to(half)
        flow = (xd.view(b, c, H, Q, P) * into[..., None]).permute(0, 1, 3, 2, 4).reshape(b * c, Q, H * P)
        added = torch.bmm(flow.transpose(1, 2), B).float().view(b, c, H, P, N)
        carry = total.exp()[..., None]
        states = torch.zeros_like(added)
        for i in range(1, c):
            states[:, i] = torch.addcmul(added[:, i - 1], states[:, i - 1], carry[:, i - 1])
        start = states.to(half).view(b * c, H * P, N)
        across = torch.bmm(C, start.transpose(1, 2)).view(b, c, Q, H, P)
        outof = log.exp().to(half).permute(0, 1, 3, 2)[..., None]
        ctx.save_for_backward(x, delta, A, B, C, xd, decay, scores, into, flow, carry, states, start, across, outof)
        return torch.addcmul(within, across, outof).reshape(b, length, H, P)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, delta, A, B, C, xd, decay, scores, into, flow, carry, states, start, across, outof = ctx.saved_tensors
        b, length, H, P = x.shape
        N, c, Q, half = B.shape[-1], length // CHUNK, CHUNK, torch.bfloat16
        grad = grad.to(half).view(b, c, Q, H, P)
        rows = grad.permute(0, 1, 3, 2, 4).reshape(b * c * H, Q, P)
        grad_xd = torch.bmm(scores.transpose(1, 2), rows).view(b, c, H, Q, P).permute(0, 1, 3, 2, 4)
        grad_scores = torch.bmm(rows, xd.transpose(1, 2)).view(b, c, H, Q, Q)
        grad_CB = (grad_scores * decay).sum(2).view(b * c, Q, Q)
        grad_C, grad_B = torch.bmm(grad_CB, B), torch.bmm(grad_CB.transpose(1, 2), C)
        exponent = grad_scores.mul_(scores.view(b, c, H, Q, Q))
        # row sums minus column sums of one matrix: what is far apart cancels exactly, whatever the rounding
        grad_log = exponent.sum(-1, dtype=torch.float32) - exponent.sum(-2, dtype=torch.float32)

        out = grad * outof
        grad_log += (out * across).sum(-1, dtype=torch.float32).transpose(2, 3)
        out = out.view(b * c, Q, H * P)
        grad_C += torch.bmm(out, start)
        direct = torch.bmm(out.transpose(1, 2), C).float().view(b, c, H, P, N)
        grad_added = torch.zeros_like(direct)
        grad_total = torch.zeros(b, c, H)
        run = direct[:, c - 1]
        for i in range(c - 1, 0, -1):
            grad_added[:, i - 1] = run
            grad_total[:, i - 1] = (run * states[:, i - 1]).sum((-1, -2)) * carry[:, i - 1, :, 0, 0]
            run = torch.addcmul(direct[:, i - 1], carry[:, i - 1], run)
        grad_added = grad_added.to(half).view(b * c, H * P, N)
        grad_flow = torch.bmm(B, grad_added.transpose(1, 2)).view(b, c, Q, H, P)
        grad_B += torch.bmm(flow, grad_added)
        passed = (flow.view(b, c, Q, H, P) * grad_flow).sum(-1, dtype=torch.float32).transpose(2, 3)
        grad_log -= passed
        grad_log[..., -1] += grad_total + passed.sum(-1)
        grad_xd = torch.addcmul(grad_xd, grad_flow, into.permute(0, 1, 3, 2)[..., None])

        grad_a = grad_log.double().flip(-1).cumsum(-1).flip(-1).float().transpose(2, 3).reshape(b, length, H)
        grad_x = (grad_xd * delta.to(half).view(b, c, Q, H, 1)).reshape(b, length, H, P)
        grad_delta = (grad_xd * x.reshape(b, c, Q, H, P)).sum(-1, dtype=torch.float32).reshape(
            b, length, H
        ) + grad_a * A
        return grad_x, grad_delta, (grad_a * delta).sum((0, 1)), grad_B.view(b, length, N), grad_C.view(b, length, N)


class VocabularyLoss(torch.autograd.Function):
    """Mean cross-entropy of hidden [T, d] under a head [V, d], a few rows at a time to stay in the cache."""

    @staticmethod
    def forward(ctx, hidden, head, targets, graded):  # type: ignore[no-untyped-def]
        """Loss, and for each graded row whether the target ranked first."""
        half, hidden = head.to(torch.bfloat16), hidden.to(torch.bfloat16)
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
        loss, right = torch.zeros(()), []
        blocks = (hidden.split(ROWS), targets.split(ROWS), graded.split(ROWS), grad_hidden.split(ROWS))
        for rows, gold, asked, out in zip(*blocks, strict=True):
            logits = (rows @ half.T).float()
            at = torch.arange(len(gold))
            right.append(logits[asked].argmax(1) == gold[asked])
            norm = logits.logsumexp(1)
            loss += (norm - logits[at, gold]).sum()
            share = logits.sub_(norm[:, None]).exp_()
            share[at, gold] -= 1
            share = share.div_(len(targets)).to(torch.bfloat16)
            torch.mm(share, half, out=out)
            grad_head += (share.T @ rows).float()
        ctx.save_for_backward(grad_hidden, grad_head)
        right = torch.cat(right)
        ctx.mark_non_differentiable(right)
        return loss / len(targets), right

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_head * grad, None, None
