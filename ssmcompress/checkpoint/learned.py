"""Adapters in state space (`arch.tunable`): what a method learned in the ports of a model, or of its weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel

from ssmcompress.arch.base import Arch
from ssmcompress.arch.tunable import TUNABLE, install
from ssmcompress.checkpoint.fitting import CONFIG, GIVE, PREFIX, made_for, read_config, require_layers, require_match
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.errors import InputError


def kind(method: str) -> str:
    """What a method is called in an adapter's config, as PEFT calls its own."""
    return method.upper().replace("-", "_")


METHODS = {kind(method): method for method in TUNABLE}
SIZES = {  # where a method, or a form, keeps how much it learned: under PEFT's names where it has some
    "low-rank": "r",
    "additional-scan": "states",
    "prefix": "num_virtual_tokens",
    "prompt": "num_virtual_tokens",
}
Count = Annotated[int, Field(gt=0)]


class Learned(BaseModel):
    """What such an adapter's config says of its tensors."""

    model_config = ConfigDict(extra="ignore")

    peft_type: str
    form: Literal["full", "low-rank", "per-head"] = "full"
    r: Count | None = None
    states: Count | None = None
    num_virtual_tokens: Count | None = None

    @classmethod
    def of(cls, method: str, form: str, size: int | None) -> dict[str, Any]:
        """The config of an adapter."""
        key = _size_key(method, form)
        return {"peft_type": kind(method), "form": form} | ({key: size} if key else {})

    def size(self, path: Path) -> int | None:
        """The rank, the states or the tokens; InputError where there is none, or another than it takes."""
        key = _size_key(METHODS[self.peft_type], self.form)
        given = {other: getattr(self, other) for other in sorted({*SIZES.values()})}
        if {other for other, value in given.items() if value is not None} != ({key} if key else set()):
            told = ", ".join(f"{other} as {value}" for other, value in given.items())
            wanted = f"{key} alone" if key else "none of them"
            raise InputError(f"{path} gives {told}; {self.peft_type} in the form {self.form} has {wanted}.", hint=GIVE)
        return given[key] if key else None


def _size_key(method: str, form: str) -> str | None:
    return SIZES.get(method if form == "full" else form)


@torch.no_grad()
def put(model: PreTrainedModel, arch: Arch, config: Mapping[str, Any], weights: Shards) -> None:
    """Puts what was learned where it belongs; InputError where it does not fit the model."""
    path, hint = weights.folder / CONFIG, made_for(config)
    said = read_config(Learned, config, path)
    size = said.size(path)
    require_layers(weights, arch, hint)
    learned = install(model, arch, METHODS[said.peft_type], said.form, size)
    places = {PREFIX + name: place for name, place in learned.items()}
    require_match(weights, places, places, hint)
    for name, place in places.items():
        place.copy_(weights.finite(name))
