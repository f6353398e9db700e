"""What went wrong, as a sentence on the terminal and an exit code."""

import difflib
import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import typer

from ssmcompress import parallel
from ssmcompress.errors import ResourceError, SsmcompressError, out_of_memory
from ssmcompress.events import Emit, Failed, JsonLines, Terminal, ignore

INTERRUPTED, BROKEN_PIPE = 130, 141
RESOURCES = {
    errno.EACCES: "may not be read or written",
    errno.EPERM: "may not be changed",
    errno.EROFS: "lies on a read-only disk",
    errno.ENOSPC: "does not fit: the disk is full",
    errno.EDQUOT: "does not fit: the quota is used up",
    errno.ENOMEM: "does not fit into memory",
}


@contextmanager
def telling(json: bool) -> Iterator[Emit]:
    """A listener for the work inside, whose errors become sentences and exit codes; the first process alone tells."""
    terminal = Terminal()
    emit: Emit = JsonLines(sys.stdout) if json else terminal
    try:
        if not parallel.first():
            emit = ignore
        with terminal:
            yield emit
            sys.stdout.flush()
    except SsmcompressError as error:
        _fail(error, emit if json else None)
    except KeyboardInterrupt:
        again = "What prune, run, tune-state and eval had finished is kept: the same command goes on from there."
        terminal(Failed("Interrupted: nothing was written under the final name.", again, INTERRUPTED))
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # the reader left: whatever is flushed at exit must not complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(BROKEN_PIPE) from None
    except Exception as error:
        resource = _resource(error)
        if resource is None:
            traceback.print_exc()
            terminal(Failed("This is a bug in ssmcompress.", "Please report it with the lines above."))
            raise typer.Exit(1) from None
        _fail(resource, emit if json else None)


def _fail(error: SsmcompressError, emit: Emit | None) -> NoReturn:
    event = Failed(error.message, error.hint, error.exit_code)
    if emit is not None:
        emit(event)
    Terminal()(event)
    raise typer.Exit(error.exit_code) from None


def _resource(error: Exception) -> ResourceError | None:
    """What the machine did not give, or None where the error is something else."""
    text = str(error)
    rust = re.search(r"Os \{ code: (\d+)", text)  # safetensors passes the system's error on as text
    code = error.errno if isinstance(error, OSError) else int(rust[1]) if rust else None
    if code in RESOURCES:
        name = getattr(error, "filename2", None) or getattr(error, "filename", None) or "A file"
        return ResourceError(f"{name} {RESOURCES[code]}.", hint="Make room, or choose another folder with --out.")
    if out_of_memory(error):
        return ResourceError("Memory ran out.", hint="Lower --windows, --length or --batch-size.")
    return None


def misused(error: typer.TyperException, given: Sequence[str] = ()) -> Failed:
    """What is wrong with a command line that typer refuses, and what was meant."""
    message = error.format_message().replace("Value error, ", "")  # pydantic's words, which typer passes on
    context = getattr(error, "ctx", None)
    hint = f"See `{context.command_path if context else 'ssmcompress'} --help`."
    if "'MODEL'" in message and "--perplexity" in given:
        hint = f"--perplexity takes the word behind it as its text: put MODEL first. {hint}"
    choice = re.search(r"'([^']*)' is not one of (.*)", message)
    if choice and (close := difflib.get_close_matches(choice[1], re.findall(r"'([^']*)'", choice[2]), n=1)):
        hint = f"Did you mean {close[0]!r}? {hint}"
    return Failed(message, hint, error.exit_code)
