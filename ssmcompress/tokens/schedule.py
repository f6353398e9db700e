"""After which blocks tokens leave, and how many, so that a share of the work is saved (Zhan et al., 2024)."""

import math
from collections.abc import Collection

from ssmcompress.arch.base import Arch
from ssmcompress.errors import UnsupportedError
from ssmcompress.policy import HALVING, LEAST, TokenPolicy
from ssmcompress.steps import ReduceTokens

ANCHORS = {64: (12, 17, 22, 27, 32, 37, 42), 48: (10, 15, 20, 25, 30, 35)}  # the paper's, by depth
DIGITS = 6
LONG = 2048  # tokens of the prompt by which it is told what every block reads


def anchors(depth: int) -> tuple[int, ...]:
    """The blocks after which tokens leave, in a model of so many: the paper's, or those at the same share of depth."""
    found = ANCHORS.get(depth) or (round(depth * (10 + 5 * k) / 48) for k in range(6))
    return tuple(sorted({layer for layer in found if layer < depth - 1}))


def shares(depth: int, layers: tuple[int, ...], keep: float) -> list[float]:
    """The share of tokens that each block sees."""
    return [keep ** sum(anchor < layer for anchor in layers) for layer in range(depth)]


def saved(depth: int, layers: tuple[int, ...], keep: float) -> float:
    """The share of the blocks' work that is not done."""
    return 1 - sum(shares(depth, layers, keep)) / depth


def keep_for(flops: float, depth: int, layers: tuple[int, ...], method: str = "utrc") -> float:
    """The share to keep after each of these blocks, so that this share of the work is saved.

    UnsupportedError where so much cannot be.
    """
    low, high = 0.5 if method in HALVING else LEAST, 1.0
    if not layers or saved(depth, layers, low) <= flops:
        most = saved(depth, layers, low) if layers else 0.0
        after = f"after {len(layers)} of {depth} blocks" if layers else f"in a model of {depth} block{'s'[: depth - 1]}"
        raise UnsupportedError(
            f"{method} {after} cannot save {flops:.0%} of the work.",
            hint=f"It saves less than {math.floor(1000 * most) / 1000:.1%}; earlier --layers save more.",
        )
    while high - low > 10**-DIGITS / 4:
        middle = (low + high) / 2
        low, high = (middle, high) if saved(depth, layers, middle) > flops else (low, middle)
    return round(high, DIGITS)


def resolved(step: ReduceTokens, arch: Arch, special: Collection[int] = (), seed: int = 0) -> TokenPolicy:
    """The policy of a step for one model: its blocks and the share that stays after each.

    UnsupportedError for blocks that the model does not have, that have no scan to look into, or that save too little.
    """
    depth = arch.layers
    layers = anchors(depth) if step.layers is None else step.layers
    if layers:  # else there are too few blocks, which is said with what could be saved
        try:
            arch.require_anchors(layers, step.method)
        except UnsupportedError as error:
            usual = ",".join(map(str, anchors(depth)))
            raise UnsupportedError(error.message, hint=f"Without --layers they leave after {usual}.") from None
    keep = step.keep or keep_for(step.flops or 0.0, depth, layers, step.method)
    return TokenPolicy(layers=layers, keep=keep, special=tuple(sorted(special)), seed=seed, **step.details)


def removable(free: int, policy: TokenPolicy) -> int:
    """How many of the tokens that may leave do."""
    return free - math.ceil(free * policy.keep - 1e-9)  # 0.7 · 10 is 7, whatever a double makes of it


def lengths(length: int, depth: int, policy: TokenPolicy) -> list[int]:
    """How many tokens of a prompt each block sees, where all but its last may leave."""
    found, left = [], length
    for layer in range(depth):
        found.append(left)
        if layer in policy.layers:
            left -= removable(left - 1, policy)
    return found
