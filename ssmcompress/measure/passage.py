"""How far each token of a real text goes in a model that lets tokens of a prompt leave."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ssmcompress.arch.backbone import reduces


@dataclass(frozen=True)
class Passage:
    """A prompt token by token, the number of blocks that read each, and how many there are."""

    tokens: tuple[str, ...]
    seen: tuple[int, ...]
    depth: int


@torch.no_grad()
def passage(model: nn.Module, tokenizer: Any, documents: Sequence[str], length: int) -> Passage | None:
    """The first document's first tokens after one end-of-text token, `length` in all; None where none leave."""
    if not reduces(model):
        return None
    backbone = cast(Any, model).backbone
    start, text = tokenizer.eos_token_id, tokenizer(documents[0], add_special_tokens=False)["input_ids"]
    ids = [start, *text][:length]
    backbone(torch.tensor([ids], device=next(model.parameters()).device), use_cache=False)
    *before, _ = backbone.kept
    seen = sum((torch.isin(torch.arange(len(ids)), each[0].cpu()) for each in before), torch.zeros(len(ids)))
    return Passage(tuple(map(tokenizer.decode, ids)), tuple(map(int, seen.tolist())), len(before))
