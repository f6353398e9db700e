"""Paths as users write them."""

from pathlib import Path

from ssmcompress.errors import InputError


def expanded(path: str | Path) -> Path:
    """The path with its ~ or ~user replaced; InputError where that is no home directory."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path} begins with a home directory that there is not.", hint="Write it out.") from error
