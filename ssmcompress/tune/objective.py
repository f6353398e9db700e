"""What is made small: the likelihood of completions, or the distance to a teacher's distribution of them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmcompress.arch.backbone import protect, reduces

IGNORED = -100  # the label of what is not learned


class Objective(nn.Module):
    """The loss of a batch, summed over its scored tokens.

    Without a teacher it is their negative log-likelihood; with one, KL(teacher ‖ model) of the distributions there, and
    `hidden` times the squared distance of the last hidden states, relative to the teacher's.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None = None, hidden: float = 0.0) -> None:
        super().__init__()
        self.model, self.hidden = model, hidden
        self._teacher = [teacher]  # in a list it is no part of what is trained

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """ids and labels [B, L], padded behind, where nothing that counts can see it → a sum over tokens."""
        gold, scored = labels[:, 1:], labels[:, 1:] != IGNORED
        hidden, logits = _read(self.model, input_ids, scored)
        teacher = self._teacher[0]
        if teacher is None:
            return F.cross_entropy(logits, gold[scored], reduction="sum")
        with torch.no_grad():
            target, wanted = _read(teacher, input_ids, scored)
        loss = F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True)
        if self.hidden:
            apart = (hidden.float() - target.float()).square().sum(-1) / target.float().square().sum(-1)
            loss = loss + self.hidden * apart.sum()
        return loss


def _read(model: Any, ids: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
    """Last hidden states and logits of the tokens before those that are scored, and of no others."""
    mask = None
    if reduces(model):  # padding must not be among what a row chooses from
        ends = scored.shape[1] - scored.flip(1).int().argmax(1)
        mask = torch.arange(scored.shape[1], device=ids.device) < ends[:, None]
    with protect(model, scored):
        hidden = model.backbone(ids[:, :-1], attention_mask=mask, use_cache=False).last_hidden_state[scored]
    return hidden, model.lm_head(hidden.to(model.lm_head.weight.dtype)).float()
