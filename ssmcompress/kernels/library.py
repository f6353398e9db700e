"""A C file as a shared library: built by the system's compiler at first use, checked, and kept in the user's cache."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

COMPILERS = ("cc", "gcc", "clang")  # after the user's own CC


def load(source: Path, flags: Sequence[str], check: Callable[[ctypes.CDLL], str]) -> tuple[ctypes.CDLL | None, str]:
    """The library of a C file, or None and the reason; `check` says what a new build gets wrong, or nothing."""
    compiler = next((found for name in (os.environ.get("CC", ""), *COMPILERS) if (found := shutil.which(name))), None)
    if compiler is None:
        return None, f"there is no C compiler ({', '.join(COMPILERS)}) on the PATH"
    try:
        command = [compiler, *flags]
        kept = _cache() / f"{source.stem}-{_key(source, command)}.so"
        if _sealed(kept):
            return ctypes.CDLL(str(kept)), ""
        folder, shared = _writable(kept.parent)
        with folder as name:
            built = Path(name) / kept.name
            subprocess.run(
                [*command, str(source), *_openmp(), "-o", str(built)], check=True, capture_output=True, text=True
            )
            library = ctypes.CDLL(str(built))
            wrong = check(library)
            if wrong:
                return None, wrong
            if shared:
                _seal(built, kept)
            return library, ""
    except (OSError, subprocess.SubprocessError) as error:
        told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return None, f"{compiler} could not build or load {source.name} ({told[0] if told else type(error).__name__})"


def _writable(cache: Path) -> tuple[tempfile.TemporaryDirectory[str], bool]:
    """A new folder in the cache, where a rename is atomic, or where that is not to be had, a private one."""
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        return tempfile.TemporaryDirectory(dir=cache), True
    except OSError:
        return tempfile.TemporaryDirectory(), False


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path("~/.cache").expanduser()) / "ssmcompress"


def _key(source: Path, command: list[str]) -> str:
    """Changes with the source, the flags and all that the compiler says of itself and of this processor."""
    macros = subprocess.run([*command, "-dM", "-E", "-x", "c", os.devnull], check=True, capture_output=True, text=True)
    parts = (source.read_text(encoding="utf-8"), *command, *_openmp(), macros.stdout)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _openmp() -> list[str]:
    """Torch's own OpenMP runtime where it brings one: two pools of threads would get in each other's way."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return ["-Wl,--as-needed", str(found[0])] if found else []


def _seal(built: Path, kept: Path) -> None:
    """Moves a checked library into place and then its digest: one without the other is not used."""
    note = built.with_suffix(".sha256")
    note.write_text(hashlib.sha256(built.read_bytes()).hexdigest(), encoding="ascii")
    built.replace(kept)
    note.replace(kept.with_suffix(note.suffix))


def _sealed(kept: Path) -> bool:
    note = kept.with_suffix(".sha256")
    if not (kept.exists() and note.exists()):
        return False
    return note.read_bytes() == hashlib.sha256(kept.read_bytes()).hexdigest().encode()
