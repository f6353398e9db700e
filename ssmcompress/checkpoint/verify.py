"""Whether what was written is what was meant: loaded again from disk, logits beside those of the model in memory."""

import errno
import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from ssmcompress.arch.backbone import dense, reduces
from ssmcompress.arch.pages import pages
from ssmcompress.arch.pruned import CODE, auto_map
from ssmcompress.arch.registry import arch_for
from ssmcompress.checkpoint.shards import read_json
from ssmcompress.checkpoint.source import Checkpoint, load
from ssmcompress.errors import InputError, ResourceError, SsmcompressError, UnsupportedError

Loader = Literal["transformers", "ssmcompress"]
TOLERANCE = 1e-4  # largest difference of a logit, relative to the largest logit
ROWS, LENGTH = 2, 48
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Verification:
    """Largest relative difference of the logits in float32, by loader; None where that loader was not asked."""

    tokens: int
    tolerance: float
    transformers: float | None
    ssmcompress: float | None
    trust_remote_code: bool = False  # whether transformers ran the code that lies in the folder

    @property
    def loaders(self) -> tuple[Loader, ...]:
        """The loaders that give the same logits."""
        names: tuple[Loader, ...] = ("transformers", "ssmcompress")
        return tuple(name for name in names if getattr(self, name) is not None)


def verify(folder: Path, model: PreTrainedModel, *, stock: bool = True) -> Verification:
    """Loads the folder in float32 with `AutoModelForCausalLM` (where `stock`) and with `load`, and compares logits.

    A model that is read in pages is compared with the folder read in pages, for all of it may not fit into memory.

    Where the config is none of transformers', that runs the code in the folder, which must be what this package writes.
    SsmcompressError where a loader fails, leaves a weight to chance, or differs by more than 1e-4 of the largest logit.
    """
    in_pages = pages(model) is not None
    stock = stock and not in_pages
    wanted, own = logits(model), stock and not arch_for(model.config).stock
    reduced = logits(model, reduce=True) if reduces(model) else None
    if own:
        _require_own(folder, model)
    with _quiet():  # the stock model would tell, every time, which kernels it does without
        theirs = _difference("transformers", _stock(folder, own), wanted) if stock else None
    gc.collect()  # models are circles of references, and here there would be three of them
    try:
        ours = load(str(folder), dtype=torch.float32, device=model.device, in_pages=in_pages).model
    except (InputError, UnsupportedError) as error:
        raise _failed("ssmcompress", error.message) from error
    tokens, difference = wanted.shape[0] * wanted.shape[1], _difference("ssmcompress", ours, wanted)
    if reduced is not None:
        difference = max(difference, _difference("ssmcompress", ours, reduced, reduce=True))
    del ours
    gc.collect()
    return Verification(tokens, TOLERANCE, theirs, difference, trust_remote_code=own)


def agree(loaded: PreTrainedModel, model: PreTrainedModel) -> float:
    """The largest relative difference of the logits of a model as it was loaded and of the one it was written from.

    SsmcompressError beyond 1e-4.
    """
    return _difference("ssmcompress", loaded, logits(model))


def _require_own(folder: Path, model: PreTrainedModel) -> None:
    """Code is run only where it is ours, byte for byte, and config.json names no other."""
    if (folder / CODE.name).read_bytes() != CODE.read_bytes():
        raise _failed("transformers", f"{CODE.name} is not as this version of ssmcompress writes it")
    if read_json(folder / "config.json").get("auto_map") != auto_map(model):
        raise _failed("transformers", "the auto_map in config.json is not as this version of ssmcompress writes it")


def require_finite(checkpoint: Checkpoint) -> None:
    """InputError where the model as it was read computes no numbers, before hours are spent on it."""
    if not logits(checkpoint.model).isfinite().all():
        raise InputError(
            f"{checkpoint.source.name} computes logits that are not finite.",
            hint="Its weights are finite but overflow in float32: the checkpoint is damaged, or was scaled wrongly.",
        )


@torch.no_grad()
def logits(model: PreTrainedModel, *, reduce: bool = False) -> Tensor:
    """The logits [2, 48, vocabulary] of a fixed token window, computed in float32 whatever the model's dtypes.

    Every token stays; with `reduce` those leave that the model lets leave, and what remains has logits.
    """
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    with _float32(model), nullcontext() if reduce else dense(model):
        return model(ids.to(model.device), use_cache=False).logits.float().cpu()


@contextmanager
def _float32(model: PreTrainedModel) -> Iterator[None]:
    if (blocks := pages(model)) is not None:
        blocks.widen(True)
    stored = [(parameter, parameter.data) for parameter in model.parameters()]
    training = model.training
    model.float().eval()
    try:
        yield
    finally:
        if blocks is not None:
            blocks.widen(False)
        for parameter, data in stored:
            parameter.data = data
        model.train(training)


@contextmanager
def _quiet() -> Iterator[None]:
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _stock(folder: Path, trust: bool) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, trust_remote_code=trust
        )
    except Exception as error:  # whatever stock transformers raises, the folder must not get its name
        if trust and isinstance(error, OSError) and error.errno in READ_ONLY:
            raise ResourceError(
                f"transformers cannot copy the code of the model to where it runs it from: {error.filename}.",
                hint="Set HF_MODULES_CACHE to a folder that can be written.",
            ) from error
        raise _failed("transformers", str(error).strip().splitlines()[-1]) from error
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise _failed("transformers", f"it reports {kind.replace('_', ' ')}: {min(map(str, info[kind]))}")
    return model


def _difference(loader: Loader, model: PreTrainedModel, wanted: Tensor, *, reduce: bool = False) -> float:
    found = logits(model, reduce=reduce)
    if reduce and torch.equal(found.isnan(), wanted.isnan()):  # there tokens left
        found, wanted = found.nan_to_num(), wanted.nan_to_num()
    scale = wanted.abs().max().clamp_min(torch.finfo(wanted.dtype).tiny)  # weights may be all zero
    difference = float((found - wanted).abs().max() / scale)
    if not difference <= TOLERANCE:  # NaN is no agreement either
        raise _failed(
            loader, f"its logits differ by {difference:.2e} of the largest; at most {TOLERANCE:.0e} is allowed"
        )
    return difference


def _failed(loader: Loader, reason: str) -> SsmcompressError:
    return SsmcompressError(
        f"What was written does not load again with {loader} as the model in memory: {reason}.",
        hint="Nothing was written under the final name. Please report this.",
    )
