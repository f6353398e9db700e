"""Adapters in state space (`arch.tunable`): what a method learned in the ports of a model, or of its weights."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedModel

from ssmcompress.arch.base import Arch
from ssmcompress.arch.tunable import TUNABLE, install
from ssmcompress.checkpoint.fitting import CONFIG, GIVE, PREFIX, made_for, require_layers, require_match
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.errors import InputError


def kind(method: str) -> str:
    """What a method is called in an adapter's config, as PEFT calls its own."""
    return method.upper().replace("-", "_")


METHODS = {kind(method): method for method in TUNABLE}


class Learned(BaseModel):
    """What such an adapter's config says of its tensors; `r` is the rank of a form that is low-rank."""

    model_config = ConfigDict(extra="ignore")

    peft_type: str
    form: Literal["full", "low-rank", "per-head"] = "full"
    r: int | None = Field(default=None, gt=0)


@torch.no_grad()
def put(model: PreTrainedModel, arch: Arch, config: Mapping[str, Any], weights: Shards) -> None:
    """Puts what was learned where it belongs; InputError where it does not fit the model."""
    path, hint = weights.folder / CONFIG, made_for(config)
    try:
        said = Learned.model_validate(config, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{path}: {first['loc'][0]}: {first['msg']}.", hint=GIVE) from None
    if (said.form == "low-rank") != (said.r is not None):
        raise InputError(f"{path} gives form as {said.form!r} and r as {said.r}; a rank is for low-rank.", hint=GIVE)
    require_layers(weights, arch, hint)
    places = {
        PREFIX + name: place for name, place in install(model, arch, METHODS[said.peft_type], said.form, said.r).items()
    }
    require_match(weights, places, places, hint)
    for name, place in places.items():
        place.copy_(weights.finite(name))
