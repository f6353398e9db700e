"""How much memory a run may take: a block of the model at a time, and of the residual stream what there is room for."""

import re
from collections import Counter
from pathlib import Path

import torch

from ssmcompress.calib.stream import Room
from ssmcompress.checkpoint.source import LAYER, Checkpoint
from ssmcompress.errors import InputError, ResourceError, UnsupportedError
from ssmcompress.evaluate.peak import resident
from ssmcompress.events import size
from ssmcompress.recipe import Recipe
from ssmcompress.steps import WHOLE, Cut, Prune, ReduceTokens

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BLOCKS = 3  # a block as it was read, its statistics and scores, and what is made of it
MASKS = 3  # as bits: held, and packed twice when they are written
NEW = 2  # as values: held, and packed when they are written
SHARDS = 10  # of a budget: a shard is in memory twice while it is written


def budget(text: str) -> int:
    """The bytes of "3GB"; InputError for what is no number of them."""
    told = re.fullmatch(r"(\d+) ?([KMGT]?)B", text.strip().upper())
    if told is None or not int(told[1]):
        raise InputError(f"{text!r} is no amount of memory.", hint="Give it as 3GB or 800MB.")
    return int(told[1]) * UNITS[told[2]]


def within(recipe: Recipe, most: int) -> int:
    """The bytes of shards that are small enough to be written within so many.

    Raises UnsupportedError for a step that needs the whole model at once.
    """
    for step in recipe.made:
        if isinstance(step, Cut) and (step.axis in WHOLE or step.criterion == "taylor"):
            what = "the method taylor" if step.criterion == "taylor" else f"the axis {step.axis}"
            raise UnsupportedError(
                f"For {what} the whole model is needed at once.", hint="Leave out --max-memory, or take another."
            )
    return min(budget(recipe.save.shard_size), max(UNITS["K"], most // SHARDS))


def room(checkpoint: Checkpoint, recipe: Recipe, most: int, folder: Path) -> Room:
    """What is left of so many bytes for the residual stream; ResourceError where the rest alone takes more."""
    entries: Counter[int] = Counter()
    new = 0
    for name, tensor in checkpoint.stored.meta().items():
        inside = LAYER.match(name)
        entries[int(inside[1]) if inside else -1] += tensor.numel()
        new += tensor.nbytes * any(inside and _renewed(step, name) for step in recipe.made)
    blocks = [count for layer, count in entries.items() if layer >= 0]
    need = int(resident("VmRSS")) + BLOCKS * max(blocks) * torch.float32.itemsize + MASKS * sum(blocks) // 8
    need += NEW * new
    if need > most:
        rest = f", of which new values are {size(NEW * new)}" if new else ""
        raise ResourceError(
            f"A block at a time takes {size(need)}{rest}, more than the {size(most)} of --max-memory.",
            hint="Take a method that only removes, such as wanda, or give more." if new else "Give more.",
        )
    return Room(most - need, folder)


def _renewed(step: Prune | Cut | ReduceTokens, name: str) -> bool:
    """Whether a step keeps new values for a tensor of a block: all of them are held until they are written."""
    if isinstance(step, Cut):
        return step.merges or (step.correction == "refit" and name.endswith("out_proj.weight"))
    return step.new_values and name.endswith(".weight") and ".norm." not in name
