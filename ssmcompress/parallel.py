"""Several processes that do one run together, as torchrun and `accelerate launch` start them.

Each reads its share of the windows, documents or examples, and their sums are those of all; the first process alone
tells and writes. Nothing here costs anything in a single process.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ssmcompress.errors import InputError, ResourceError

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = timedelta(days=1)  # while the first process writes and measures the others wait


def size() -> int:
    """How many processes there are."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """Which of them this is, from 0 on."""
    return _number("RANK", 0) if size() > 1 else 0


def first() -> bool:
    """Whether this is the one that tells and writes."""
    return rank() == 0


def share(items: Any) -> Any:
    """What this process reads of a sequence or of the rows of a tensor: every n-th."""
    return items[rank() :: size()]


def require(count: int, what: str) -> None:
    """InputError unless there is some for every process."""
    if count < size():
        raise InputError(f"{count} {what} cannot be shared out to {size()} processes.", hint="Start fewer of them.")


def total(tensor: "Tensor") -> "Tensor":
    """The sum over the processes, the same bits in each."""
    if size() == 1:
        return tensor
    from torch import distributed

    with _joined():
        summed = tensor.contiguous().clone()
        distributed.all_reduce(summed)
        return summed


def gathered(items: list[Any]) -> list[Any]:
    """The items of all processes, in the order of what `share` gave out."""
    if size() == 1:
        return items
    from torch import distributed

    with _joined():
        parts: list[list[Any]] = [[]] * size()
        distributed.all_gather_object(parts, items)
    return [parts[i % size()][i // size()] for i in range(sum(map(len, parts)))]


def wait() -> None:
    """Goes on when every process is here."""
    if size() == 1:
        return
    from torch import distributed

    with _joined():
        distributed.barrier()


def _number(name: str, usual: int) -> int:
    told = os.environ.get(name) or str(usual)
    if not told.isdecimal():
        raise InputError(f"{name}={told} in the environment is no number.", hint="torchrun sets it; alone, unset it.")
    return int(told)


@contextmanager
def _joined() -> Iterator[None]:
    """With the others at the other end of the line; ResourceError where one of them has ended."""
    import torch
    from torch import distributed

    try:
        if not distributed.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(_number("LOCAL_RANK", 0))
            distributed.init_process_group(None if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
        yield
    except (RuntimeError, ValueError) as error:
        raise ResourceError(
            f"Process {rank() + 1} of {size()} has lost the others: {str(error).strip().splitlines()[0]}",
            hint="What they said tells why; what was finished is kept, and the same command goes on from there.",
        ) from error
