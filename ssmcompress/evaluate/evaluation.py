"""The verb `eval`: likelihood and memory of a checkpoint, to the terminal and to summary.json."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from ssmcompress.arch.base import mixers
from ssmcompress.checkpoint.output import output
from ssmcompress.checkpoint.source import Checkpoint, load, resolve
from ssmcompress.errors import BackendError, InputError
from ssmcompress.evaluate.results import Summary
from ssmcompress.events import Emit, Finished, Metric, Note, Table, ignore
from ssmcompress.measure import recall as probes
from ssmcompress.measure import text
from ssmcompress.measure.perplexity import Perplexity
from ssmcompress.measure.perplexity import perplexity as score


def evaluate(
    model: str,
    *,
    perplexity: str | None = "default",
    recall: bool = False,
    length: int = 512,
    limit: int | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "auto",
    backend: str = "auto",
    emit: Emit = ignore,
) -> Summary:
    """Measures a checkpoint as it lies on disk; with `out`, summary.json and the scores of every document are kept.

    Raises InputError for a model without a tokenizer, a text that cannot be read, or an output that exists.
    """
    require_seed(seed)
    documents = text.documents(perplexity, limit) if perplexity else []
    source = resolve(model)
    with nullcontext() if out is None else output(out, overwrite=overwrite, source=source) as folder:
        checkpoint = load(source, dtype=compute_dtype(dtype, device), device=device, backend=backend)
        tokenizer = required_tokenizer(checkpoint)
        used = checkpoint.model.dtype
        names = next(mixers(checkpoint.model)).backend.names(device, used)
        likelihood = memory = None
        if documents:
            settings: dict[str, Any] = {"length": length, "batch": batch_size, "seed": seed}
            likelihood = score(checkpoint.model, tokenizer, documents, **settings, emit=emit)
            tell_perplexity(likelihood, emit)
        if recall:
            memory = probes.recall(checkpoint.model, tokenizer, seed=seed)
            tell_recall(memory, emit)
        summary = Summary.of(checkpoint, likelihood, memory, text=perplexity, seed=seed, backend=names, dtype=str(used))
        if folder is not None:
            summary.write(folder, likelihood)
    if out is not None:
        emit(Finished(str(out)))
    return summary


def compute_dtype(name: str, device: str) -> torch.dtype | Literal["auto"]:
    """The dtype to compute in: what was asked for, else float32 on a CPU and the stored one elsewhere.

    Raises InputError for a device there is no such kind of, BackendError for one that this machine does not have.
    """
    kind = _known_device(device).type
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if kind == "cpu" else "auto"


def _known_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"There is no device {name!r}.", hint="Choose cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"The device {name!r} is not supported.", hint="Choose cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendError(f"This machine has no device {name!r}.", hint="Run `ssmcompress doctor`.")
    return device


def require_seed(seed: int) -> None:
    """InputError for a number that no generator takes."""
    if not 0 <= seed < 2**63:
        raise InputError(f"The seed {seed} is out of range.", hint="Give a whole number of at least 0.")


def required_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer; InputError where it has none."""
    if checkpoint.tokenizer is None:
        raise InputError(
            f"{checkpoint.source.name} has no tokenizer, so no text can be read to it.",
            hint="Put its tokenizer.json and tokenizer_config.json into the folder.",
        )
    return checkpoint.tokenizer


def tell_perplexity(found: Perplexity, emit: Emit) -> None:
    """The figures of a text as events."""
    emit(Metric("bits per byte", found.bits_per_byte, *found.bits_per_byte_interval))
    emit(Metric("token perplexity", found.perplexity, *found.perplexity_interval))


def tell_recall(found: list[probes.Recall], emit: Emit) -> None:
    """The memory probes as a table."""
    rows = tuple(
        (
            probe.probe,
            str(probe.load),
            f"{probe.accuracy:.3f} ± {probe.standard_error:.3f}",
            f"{probe.chance:.3f}",
            f"{probe.log_probability:.2f}",
            "" if probe.measurable else "not measurable",
        )
        for probe in found
    )
    emit(Table("memory", ("probe", "load", "accuracy", "chance", "log p", ""), rows))
    if not any(probe.measurable for probe in found):
        emit(Note("No memory probe is measurable on this model: nothing can be said about damage to it."))
