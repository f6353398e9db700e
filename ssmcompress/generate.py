"""The verb `generate`: a prompt continued by one model, or by two side by side."""

from dataclasses import dataclass
from typing import Any, cast

import torch

from ssmcompress.checkpoint.source import load
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

    Raises InputError for a model without a tokenizer or an empty prompt.
    """
    if not prompt:
        raise InputError("The prompt is empty.", hint='Give some text: --prompt "Once upon a time".')
    require_seed(seed)
    found = []
    for name in [model] if against is None else [model, against]:
        checkpoint = load(name, dtype=compute_dtype(dtype, device), device=device, backend=backend)
        tokenizer = required_tokenizer(checkpoint)
        inputs = tokenizer(prompt, return_tensors="pt").to(device)
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        ids = cast(Any, checkpoint.model).generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )
        text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append(Continuation(name, text))
    emit(Table(prompt, ("model", "continuation"), tuple((each.model, each.text) for each in found)))
    return found
