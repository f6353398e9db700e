"""The folder that is written: under another name until it is whole, then renamed; one writer at a time."""

import contextlib
import copy
import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from ssmcompress import parallel
from ssmcompress.arch.pruned import CODE, auto_map
from ssmcompress.checkpoint import shards
from ssmcompress.checkpoint.layout import EMBEDDING
from ssmcompress.checkpoint.manifest import NAME as CHECKPOINT
from ssmcompress.checkpoint.source import Checkpoint, Source, state_dict
from ssmcompress.errors import InputError, ResourceError, SsmcompressError, out_of_memory
from ssmcompress.events import Emit, Note, ignore
from ssmcompress.paths import expanded

# with a schema_version, one of them marks a folder as an output
RESULTS, COMPARISON, TUNING = "summary.json", "comparison.json", "tuning.json"
OURS = {
    CHECKPOINT: "a checkpoint",
    RESULTS: "results of an evaluation",
    COMPARISON: "a comparison",
    TUNING: "an adapter",
}
MARKER = ".recipe"  # marks an unfinished folder as ours: the hash of the recipe that may go on with it, if any
CARRIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template.*",
    "LICENSE*",
    "NOTICE*",
)
LACKING = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EFBIG: "the file is too large for this disk",
    errno.ENAMETOOLONG: "the name is too long",
}


@contextmanager
def output(
    folder: str | Path,
    *,
    marked: str = CHECKPOINT,
    overwrite: bool = False,
    recipe_hash: str = "",
    resumable: bool = False,
    whatever_fails: bool = False,
    together: bool = False,
    source: Source | None = None,
    emit: Emit = ignore,
) -> Iterator[Path]:
    """Yields the empty folder `DIR.partial` to write into: it becomes DIR when the block ends, vanishes when it fails.

    Resumable, it stays after an interrupt or where the machine ran out of something, or indeed `whatever_fails`, or
    where it went on with what it found, and a later call of the same recipe hash finds it as it was left. `marked` is
    the file by which an output of this kind is known: only another of the same kind is replaced. Several processes may
    be in the block `together`: the first, which alone may write there, prepares and renames it, and the others wait.
    Raises InputError where DIR exists and may not be replaced, ResourceError for a second writer, a full disk or no
    permission.
    """
    final = expanded(folder).resolve()
    if final == final.parent or any(parent.exists() and not parent.is_dir() for parent in final.parents):
        raise InputError(f"{folder} cannot be a folder of its own.", hint="Choose another --out.")
    if parallel.size() > 1 and not together:
        raise InputError("One process does this alone.", hint="Start it without torchrun or accelerate.")
    partial, aside = final.with_name(final.name + ".partial"), final.with_name(final.name + ".replaced")
    if not parallel.first():
        parallel.follow()
        yield partial
        parallel.wait()
        return
    with _lacking(final), contextlib.ExitStack() as held:
        with parallel.leading():
            _make(final.parent)
            held.enter_context(_lock(final))
            if aside.exists():  # a run was killed between its last two renames
                _kind(aside)
                shutil.rmtree(aside) if final.exists() else aside.rename(final)
            _permit(final, marked, overwrite, source)
            resumed = _prepare(partial, recipe_hash if resumable else "", emit)
        try:
            yield partial
            _replace(final, partial, aside)
            (final / MARKER).unlink(missing_ok=True)  # only now: without it nobody could go on with the folder
        except BaseException as error:
            worth = any(path.name != MARKER for path in partial.iterdir()) if partial.exists() else False
            if not (resumable and recipe_hash and worth and (whatever_fails or resumed or _passing(error))):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        with contextlib.suppress(ResourceError):  # whoever is gone misses nothing
            parallel.wait()


@contextmanager
def kept(store: Path, *beside: str) -> Iterator[None]:
    """When the work inside is whole `store` goes; when it fails only it and `beside` stay, where it holds anything.

    Half-written weights are of no use to the run that goes on from there, and may be what filled the disk: those of one
    that was killed go before the work begins.
    """
    if not parallel.first():
        yield
        return
    worth = {MARKER, store.name, *beside}
    try:
        _clear(store.parent, worth)
        yield
    except BaseException:
        _clear(store.parent, worth if any(store.iterdir()) else {MARKER})
        raise
    shutil.rmtree(store)


def write(
    checkpoint: Checkpoint,
    folder: Path,
    state: Mapping[str, Tensor] | None = None,
    *,
    shard_size: int | str = shards.SHARD_SIZE,
    value: Callable[[str], Tensor] | None = None,
) -> None:
    """Writes what stock transformers loads: weights, config, and the source's tokenizer and generation files.

    Where its config is none of transformers', the code that reads it lies beside it, for `trust_remote_code=True`.
    `state` defaults to the model's tensors in their dtypes; with `value` it may hold meta tensors (`shards.save`).
    """
    tensors = state_dict(checkpoint.model) if state is None else state
    shards.save(tensors, folder, shard_size=shard_size, value=value)
    config = copy.deepcopy(checkpoint.model.config)
    config.architectures = [type(checkpoint.model).__name__]
    config.dtype = tensors[EMBEDDING["hf"]].dtype
    config.rescale_prenorm_residual = False
    if not checkpoint.arch.stock:
        config.auto_map = auto_map(checkpoint.model)
        shutil.copyfile(CODE, folder / CODE.name)
    (folder / "config.json").write_text(config.to_json_string(use_diff=True), encoding="utf-8")
    carry(checkpoint.source, folder)


def carry(source: Source, folder: Path) -> None:
    """Copies the tokenizer, generation config and licence of a source, byte for byte."""
    for path in sorted({path for pattern in CARRIED for path in source.folder.glob(pattern)}):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def _passing(error: BaseException) -> bool:
    """Whether the same run may succeed another time."""
    return (
        isinstance(error, KeyboardInterrupt | BrokenPipeError | ResourceError)
        or (isinstance(error, OSError) and error.errno in LACKING)
        or out_of_memory(error)
    )


@contextmanager
def _lock(final: Path) -> Iterator[None]:
    path = final.with_name(f".{final.name}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        if not path.exists():  # the lock takes a folder that refuses new files for a busy one
            raise ResourceError(f"{final.parent} takes no new files.", hint="Choose another --out.") from error
        raise ResourceError(
            f"Another run is writing {final}.", hint="Wait for it to end, or choose another --out."
        ) from error
    except OSError as error:
        if error.errno in LACKING:
            raise
        raise InputError(
            f"{path} is in the way: it is no lock.", hint="Move it away, or choose another --out."
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def _lacking(final: Path) -> Iterator[None]:
    try:
        yield
    except SsmcompressError:
        raise
    except OSError as error:
        if error.errno not in LACKING:
            raise
        raise ResourceError(
            # of a copy the second name is the one that is written
            f"Cannot write {error.filename2 or error.filename or final}: {LACKING[error.errno]}.",
            hint="Make room, or choose another folder with --out.",
        ) from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:
        raise ResourceError(f"The folder {folder} cannot be made.", hint="Choose another --out.") from error


def _permit(final: Path, marked: str, overwrite: bool, source: Source | None) -> None:
    if source is not None and source.folder.resolve().is_relative_to(final):
        raise InputError(f"{final} holds the model that is read.", hint="Choose another --out.")
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not overwrite:
        raise InputError(f"{final} exists already.", hint="Choose another --out, or replace it with --overwrite.")
    if (found := _kind(final)) != marked:
        raise InputError(
            f"{final} holds {OURS[found]}, and is not replaced by {OURS[marked]}.",
            hint="Choose another --out, or remove it yourself.",
        )


def _kind(folder: Path) -> str:
    """The file that says what ssmcompress wrote there; InputError where none does: a config.json may be anybody's."""
    for name in OURS:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            if isinstance(found, dict) and "schema_version" in found:
                return name
    raise InputError(
        f"{folder} does not look like something ssmcompress wrote, and is not replaced.",
        hint="Choose another --out, or remove it yourself.",
    )


def _prepare(partial: Path, resume: str, emit: Emit) -> bool:
    """Whether there is anything to go on with; what another run has left unfinished goes."""
    marker = partial / MARKER
    strange = partial.is_symlink() or (partial.exists() and not partial.is_dir())
    if strange or (partial.exists() and any(partial.iterdir()) and not marker.is_file()):
        raise InputError(
            f"{partial} is in the way: it is no unfinished output.", hint="Move it away, or choose another --out."
        )
    worth = partial.exists() and any(path.name != MARKER for path in partial.iterdir())
    if resume and marker.exists() and marker.read_bytes() == resume.encode():
        return worth
    if partial.exists():
        if worth and resume:
            emit(
                Note(f"What lay unfinished in {partial} was of another recipe, input or version, and goes.", "warning")
            )
        marker.write_text("", encoding="utf-8")  # nobody goes on with it; last to go, it says whose the rest is
        _clear(partial, {MARKER})
    partial.mkdir(exist_ok=True)
    marker.write_text(resume, encoding="utf-8")
    return False


def _clear(folder: Path, worth: Container[str]) -> None:
    for path in folder.iterdir():
        if path.name not in worth:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _open_up(folder: Path) -> None:
    """Gives every file the mode the umask grants: safetensors writes its own for the owner alone."""
    probe = folder / ".mode"
    probe.touch(mode=0o666)
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _replace(final: Path, partial: Path, aside: Path) -> None:
    _open_up(partial)
    for path in partial.rglob("*"):
        sync(path)
    sync(partial)
    old = final.exists()
    if old:
        final.rename(aside)
    try:
        partial.rename(final)
    except BaseException:
        if old:
            aside.rename(final)
        raise
    sync(final.parent)
    if old:
        shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        # some network disks cannot sync a folder
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)
