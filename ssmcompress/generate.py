"""The verb `generate`: a prompt continued by one model, or by two side by side."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ssmcompress.checkpoint.adapter import Given
from ssmcompress.checkpoint.source import load, require_embedded
from ssmcompress.errors import InputError
from ssmcompress.evaluate.evaluation import compute_dtype, require_seed, required_tokenizer
from ssmcompress.events import Emit, Table, ignore


@dataclass(frozen=True)
class Continuation:
    """What one model wrote after the prompt."""

    model: str
    text: str


def generate(
    model: str,
    *,
    prompt: str,
    adapter: Given = (),
    against: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "auto",
    backend: str = "auto",
    emit: Emit = ignore,
) -> list[Continuation]:
    """Continues a prompt with a model and, where given, with another; temperature 0 takes the likeliest token.

    `adapter`, a folder in PEFT's format or several, belongs to the first. Raises InputError for a model without a
    tokenizer or whose logits are NaN, for an adapter of another model, and for a prompt that is no text.
    """
    if not prompt:
        raise InputError("The prompt is empty.", hint='Give some text: --prompt "Once upon a time".')
    if any(0xD800 <= ord(character) <= 0xDFFF for character in prompt):
        raise InputError("The prompt holds bytes that are not text.", hint="Give it as UTF-8.")
    require_seed(seed)
    found = []
    for name, own in [(model, adapter)] + ([] if against is None else [(against, ())]):
        checkpoint = load(name, adapter=own, dtype=compute_dtype(dtype, device), device=device, backend=backend)
        tokenizer = required_tokenizer(checkpoint)
        inputs = tokenizer(prompt, return_tensors="pt").to(device)
        require_embedded(checkpoint, inputs["input_ids"].flatten().tolist())
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        ids = cast(Any, checkpoint.model).generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            logits_processor=LogitsProcessorList([_Numbers(checkpoint.name)]),
            **sampling,
        )
        text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append(Continuation(checkpoint.name, text))
    emit(Table(prompt, ("model", "continuation"), tuple((each.model, each.text) for each in found)))
    return found


class _Numbers(LogitsProcessor):
    """Passes logits on; InputError where they are none, which would be taken for the end of the text."""

    def __init__(self, model: str) -> None:
        self.model = model

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if bool((scores.isnan() | scores.isposinf()).any()):
            raise InputError(
                f"{self.model} computes logits that are NaN or infinite on this prompt: there is no next token.",
                hint="Its weights are finite, but their products are not: use another checkpoint, or --dtype float32.",
            )
        return scores
