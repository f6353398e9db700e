"""The trained checkpoints that come with the package."""

from difflib import get_close_matches
from pathlib import Path

from ssmcompress.errors import InputError

HERE = Path(__file__).parent


def names() -> list[str]:
    """The shipped checkpoints, as in `ref:NAME`."""
    return sorted(path.parent.name for path in HERE.glob("*/config.json"))


def folder(name: str) -> Path:
    """The folder of a shipped checkpoint; InputError names the nearest one there is."""
    if name not in names():
        near = get_close_matches(name, names(), n=1)
        hint = f"Did you mean ref:{near[0]}?" if near else f"Shipped: {', '.join(f'ref:{each}' for each in names())}."
        raise InputError(f"There is no shipped checkpoint {name!r}.", hint=hint)
    return HERE / name
