"""What can go wrong for a user, each with an exit code and a hint."""


class SsmcompressError(Exception):
    """A sentence for the user and a hint what to do next."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(SsmcompressError):
    """What was given is wrong: usage, data or checkpoint unreadable, output exists."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe that cannot be read."""


class UnsupportedError(SsmcompressError):
    """A model, axis or shape that is not supported."""

    exit_code = 3


class BackendError(SsmcompressError):
    """A kernel or package that is asked for and cannot be had."""

    exit_code = 4


class ResourceError(SsmcompressError):
    """Disk, memory, permission or lock."""

    exit_code = 4


class GateError(SsmcompressError):
    """A quality gate that failed."""

    exit_code = 5


def out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch or its allocator found no memory."""
    named = type(error).__name__ == "OutOfMemoryError"  # torch's, which is not imported for it
    return isinstance(error, MemoryError) or named or "can't allocate memory" in str(error)
