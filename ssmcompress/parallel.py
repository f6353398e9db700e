"""Several processes that do one run together, as torchrun and `accelerate launch` start them.

Each reads its share of the windows, documents or examples, and their sums are those of all; the first process alone
tells and writes. Nothing here costs anything in a single process.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ssmcompress.errors import InputError, ResourceError, SsmcompressError

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = timedelta(days=1)  # while the first process writes and measures the others wait
_alone: ContextVar[bool] = ContextVar("alone", default=False)


def size() -> int:
    """How many processes there are."""
    return 1 if _alone.get() else _number("WORLD_SIZE", 1)


def rank() -> int:
    """Which of them this is, from 0 on."""
    return _number("RANK", 0) if size() > 1 else 0


@contextmanager
def alone() -> Iterator[None]:
    """What is done inside one process does, as if there were no others."""
    before = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(before)


def join(device: str) -> None:
    """Meets the others, where there are any; each computes on a card of its own where it is to be `cuda`.

    Raises InputError for one card for all, ResourceError where the others are not to be found.
    """
    if size() == 1:
        return
    import torch
    from torch import distributed

    cuda = device.startswith("cuda") and torch.cuda.is_available()
    if cuda and device != "cuda":
        raise InputError(f"{size()} processes cannot share {device}.", hint="With --device cuda each takes its own.")
    with not_lost():
        if cuda:
            torch.cuda.set_device(_number("LOCAL_RANK", 0))
        if not distributed.is_initialized():
            distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)


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

    with not_lost():
        summed = tensor.contiguous().clone()
        distributed.all_reduce(summed)
        return summed


def gathered(items: list[Any]) -> list[Any]:
    """The items of all processes, in the order of what `share` gave out."""
    if size() == 1:
        return items
    from torch import distributed

    with not_lost():
        parts: list[list[Any]] = [[]] * size()
        distributed.all_gather_object(parts, items)
    return [parts[i % size()][i // size()] for i in range(sum(map(len, parts)))]


def wait() -> None:
    """Goes on when every process is here."""
    if size() == 1:
        return
    from torch import distributed

    with not_lost():
        distributed.barrier()


def told(item: Any) -> Any:
    """What the first process has for all of them: JSON's types."""
    if size() == 1:
        return item
    from torch import distributed

    with not_lost():
        parts = [item]
        distributed.broadcast_object_list(parts)
    return parts[0]


@contextmanager
def leading() -> Iterator[None]:
    """What the first process does for all: where it fails, so do those that `follow`, with the same sentence."""
    try:
        yield
    except Exception as error:
        with suppress(ResourceError):
            said = error if isinstance(error, SsmcompressError) else ResourceError(f"The first process failed: {error}")
            told((said.message, said.hint, said.exit_code))
        raise
    told(None)


def follow() -> None:
    """Waits for what the first process does; SsmcompressError, as it has it, where that fails."""
    if (failed := told(None)) is not None:
        message, hint, code = failed
        error = SsmcompressError(message, hint=hint)
        error.exit_code = code
        raise error


def _number(name: str, usual: int) -> int:
    number = os.environ.get(name) or str(usual)
    if not number.isdecimal():
        raise InputError(f"{name}={number} in the environment is no number.", hint="torchrun sets it; alone, unset it.")
    return int(number)


@contextmanager
def not_lost() -> Iterator[None]:
    """ResourceError where the work inside needs the other processes and one of them has ended."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if size() == 1 or not _of_the_line(error):
            raise
        raise ResourceError(
            f"Process {rank() + 1} of {size()} has lost the others: {str(error).strip().splitlines()[0]}",
            hint="What they said tells why; what was finished is kept, and the same command goes on from there.",
        ) from error


def _of_the_line(error: Exception) -> bool:
    """Whether an error is one of the connection: gloo's are no class of their own."""
    from torch import distributed

    said = str(error).lower()
    return isinstance(error, distributed.DistError) or any(
        word in said for word in ("gloo", "nccl", "connection", "rendezvous", "process group", "timed out", "peer")
    )
