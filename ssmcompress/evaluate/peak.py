"""Reading and writing tokens, as it is timed, and the memory that this takes at most."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssmcompress.arch.mixer import mixers
from ssmcompress.checkpoint.source import Checkpoint, load
from ssmcompress.errors import ResourceError

CHILD = "import sys; from ssmcompress.evaluate.peak import report; report(*sys.argv[1:])"


@torch.no_grad()
def prefill(model: nn.Module, ids: Tensor) -> None:
    """Reads ids [B, L]: the backbone, and the logits of the last token."""
    model(ids, use_cache=False, logits_to_keep=1)


@torch.no_grad()
def first_token(model: nn.Module, ids: Tensor) -> tuple[Tensor, Any]:
    """The likeliest token [B, 1] after ids [B, L], and the cache to go on from."""
    read = model(ids, use_cache=True, logits_to_keep=1)
    token = read.logits[:, -1:].argmax(-1)
    token.cpu()
    return token, read.cache_params


@torch.no_grad()
def decode(model: nn.Module, token: Tensor, cache: Any, tokens: int) -> Tensor:
    """Writes so many tokens after token [B, 1], one at a time, each the likeliest; returns the last."""
    for _ in range(tokens):
        token = model(token, cache_params=cache, use_cache=True).logits[:, -1:].argmax(-1)
    return token


def peak(checkpoint: Checkpoint, length: int, decode_tokens: int, batch: int) -> tuple[int, int]:
    """Bytes in use at most, and before the work: reading `length` tokens, then decoding.

    On CUDA what torch allocated, without other models there; on a CPU the resident size of a process of its own, which
    loads the checkpoint again from its folder. Raises ResourceError where that process fails.
    """
    model = checkpoint.model
    if model.device.type == "cuda":
        own = in_memory(checkpoint)
        others = torch.cuda.memory_allocated(model.device) - own
        torch.cuda.reset_peak_memory_stats(model.device)
        _work(model, length, decode_tokens, batch)
        return torch.cuda.max_memory_allocated(model.device) - others, own
    dtype, backend = str(model.dtype).removeprefix("torch."), next(mixers(model)).backend.name
    adapters = os.pathsep.join(str(adapter.folder) for adapter in checkpoint.adapters)
    given = (checkpoint.source.folder, adapters, dtype, backend, length, decode_tokens, batch, torch.get_num_threads())
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, given)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or [f"it ended with {ran.returncode}"])[-1]
        raise ResourceError(
            f"Memory could not be measured in a process of its own: {last}.",
            hint="Make room, or give shorter --lengths.",
        )
    most, before = json.loads(ran.stdout.splitlines()[-1])
    return most, before


def report(folder: str, adapters: str, dtype: str, backend: str, *sizes: str) -> None:
    """The part of `peak` in the process of its own: loads, works, and writes both figures to stdout."""
    length, decode_tokens, batch, threads = map(int, sizes)
    torch.set_num_threads(threads)
    given = adapters.split(os.pathsep) if adapters else ()
    model = load(folder, adapter=given, dtype=getattr(torch, dtype), backend=backend).model
    before = resident("VmRSS")
    forget()
    _work(model, length, decode_tokens, batch)
    sys.stdout.write(json.dumps([int(resident("VmHWM")), int(before)]) + "\n")


def in_memory(checkpoint: Checkpoint) -> int:
    """Bytes of the weights as they are computed with, tied ones once."""
    return sum(weight.numel() * weight.element_size() for weight in checkpoint.model.parameters())


def resident(field: str) -> float:
    """Bytes of a field of /proc/self/status; where there is none, the peak that the system kept."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024.0 * next(int(row.split()[1]) for row in status.read_text().splitlines() if row.startswith(field))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def forget() -> None:
    """Lets the peak start from what is resident now (Linux)."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def _work(model: Any, length: int, decode_tokens: int, batch: int) -> None:
    ids = torch.zeros(batch, length, dtype=torch.long, device=model.device)
    prefill(model, ids)
    decode(model, *first_token(model, ids), decode_tokens)
