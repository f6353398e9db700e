"""What a model writes after prompts, one token after the likeliest other."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ssmcompress.events import Advance, Emit, Phase, ignore


@torch.no_grad()
def written(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], *, most: int, batch: int, emit: Emit = ignore
) -> list[str]:
    """The text after each prompt (ids), greedy, up to the end-of-text token or `most` tokens."""
    found = [""] * len(prompts)
    emit(Phase("writing", len(prompts)))
    for group in _groups(prompts, batch):
        length = max(len(prompts[i]) for i in group)
        ids = torch.full((len(group), length), tokenizer.eos_token_id)
        mask = torch.zeros_like(ids)
        for b, i in enumerate(group):
            ids[b, length - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[b, length - len(prompts[i]) :] = 1
        whole: Any = model
        device = next(model.parameters()).device
        out = whole.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        for b, i in enumerate(group):
            found[i] = tokenizer.decode(out[b, length:], skip_special_tokens=True).strip()
        emit(Advance(len(group)))
    return found


def _groups(prompts: Sequence[Sequence[int]], batch: int) -> Iterator[list[int]]:
    """Prompts of like length together."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    return (order[start : start + batch] for start in range(0, len(order), batch))
