"""Token reduction as data: which rule, after which blocks, and how many tokens stay; it is stored in config.json."""

import hashlib
import json
from collections.abc import Collection
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

KEY = "token_policy"  # of config.json
Rule = Literal[
    "utrc",
    "utrc-released",
    "evit",
    "tome",
    "pumer",
    "simba",
    "hidden-attention",
    "drop-earliest",
    "stride",
    "random",
]
RULES: tuple[Rule, ...] = get_args(Rule)
Importance = Literal["clip", "l1", "l2", "mean"]
Merge = Literal["mean", "sequential"]
Decay = Literal["drop", "carry"]
LEAST = 0.01  # the share of tokens that stays at least: else hardly any prompt would keep one
HALVING = ("utrc", "tome", "pumer", "utrc-released")  # rules that take tokens from one half only
RANKING = ("utrc", "evit")  # rules with an importance
MATCHING = ("utrc", "tome", "pumer")  # rules that find each token its most similar one
WATCHING = ("simba", "hidden-attention")  # rules that look into the scan


class TokenPolicy(BaseModel):
    """Which tokens leave while a prompt is read: after each block of `layers` a share `keep` of those that may stays.

    `pruned` is the share of the removed tokens that leave no trace in the mixer's output (UTRC's q); `match_window` is
    how far apart, in tokens of the prompt, two may lie that are matched (None: anywhere); `decay` says whether the
    steps of removed tokens go with them or the next one, whose step is then as many times as long, decays for them too.
    Tokens of the ids `special` never leave.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    method: Rule = "utrc"
    layers: tuple[Annotated[int, Field(ge=0)], ...]
    keep: Annotated[float, Field(ge=LEAST, le=1)]
    pruned: Annotated[float, Field(ge=0, le=1)] = 0.5
    importance: Importance = "clip"
    merge: Merge = "mean"
    match_window: Annotated[int, Field(ge=1)] | None = None
    decay: Decay = "drop"
    special: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = ()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @model_validator(mode="after")
    def _possible(self) -> "TokenPolicy":
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers {list(self.layers)} must rise, each named once")
        if self.method in HALVING and self.keep < 0.5:
            raise ValueError(f"{self.method} takes at most half of the tokens at a time: keep must be at least 0.5")
        return self

    @property
    def sha256(self) -> str:
        """What tells models apart whose weights are the same."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    @classmethod
    def read(cls, stored: bytes | dict[str, Any]) -> "TokenPolicy":
        """The policy of a JSON text or its values; ValueError says in a sentence what is wrong with them."""
        try:
            return cls.model_validate_json(stored) if isinstance(stored, bytes) else cls.model_validate(stored)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}") from None

    def within(self, kept: Collection[int]) -> "TokenPolicy":
        """The policy where only these blocks are left, in their order: after the last one before each that went.

        Where none is left before, or none behind, no token leaves.
        """
        order = sorted(kept)
        places = (sum(layer <= anchor for layer in order) - 1 for anchor in self.layers)
        left = {place for place in places if 0 <= place < len(order) - 1}
        return self.model_copy(update={"layers": tuple(sorted(left))})

    @property
    def details(self) -> dict[str, Any]:
        """What its rule looks at, beside blocks and share."""
        unused = {"version", "method", "layers", "keep", "special"}
        unused |= set() if self.method == "utrc" else {"pruned"}
        unused |= set() if self.method in RANKING else {"importance"}
        unused |= set() if self.method in MATCHING else {"merge", "match_window"}
        unused |= set() if self.method == "random" else {"seed"}
        return self.model_dump(exclude=unused)
