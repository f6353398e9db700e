"""Log-likelihoods of continuations under a model that reduces tokens: of the context alone, each row by itself."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ssmcompress.arch.backbone import protect
from ssmcompress.errors import InputError

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context, and of what comes after it


@torch.no_grad()
def likelihoods(
    model: nn.Module, pairs: Sequence[Pair], *, batch: int, longest: int
) -> Iterator[tuple[int, float, bool]]:
    """The place of each pair, its log-likelihood in nats, and whether it is the greedy one; long pairs first.

    No token whose prediction is scored leaves. Contexts lose their beginning beyond `longest` tokens, as in lm-eval.
    """
    for context, continuation in pairs:
        if not context or not 0 < len(continuation) <= longest:
            raise InputError(
                f"A continuation of {len(continuation)} tokens after {len(context)} cannot be scored in {longest}.",
                hint="It needs a token before it, and a window that holds it.",
            )
    rows = [([*context, *after][-(longest + 1) :], len(after)) for context, after in pairs]
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i][0]), i))
    device = next(model.parameters()).device
    for start in range(0, len(order), batch):
        group = order[start : start + batch]
        length = len(rows[group[0]][0]) - 1
        ids = torch.zeros(len(group), length, dtype=torch.long)
        mask, scored = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
        for b, i in enumerate(group):  # rows end together, so that the last logits are those asked for
            tokens, after = rows[i]
            ids[b, length + 1 - len(tokens) :] = torch.tensor(tokens[:-1])
            mask[b, length + 1 - len(tokens) :] = True
            scored[b, length - after :] = True
        most = max(rows[i][1] for i in group)
        whole: Any = model
        with protect(model, scored.to(device)):
            given = None if bool(mask.all()) else mask.long().to(device)
            logits = whole(ids.to(device), attention_mask=given, use_cache=False, logits_to_keep=most).logits
        for b, i in enumerate(group):
            tokens, after = rows[i]
            scores = logits[b, most - after :].float().log_softmax(-1)
            gold = torch.tensor(tokens[-after:], device=device)
            likelihood = scores.gather(1, gold[:, None]).sum()
            yield i, float(likelihood), bool((scores.argmax(-1) == gold).all())
