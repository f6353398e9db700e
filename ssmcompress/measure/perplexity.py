"""Likelihood of held-out text: bits per byte and token perplexity, with an interval over documents."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ssmcompress import parallel
from ssmcompress.arch.backbone import passed, protect, reduces
from ssmcompress.errors import InputError
from ssmcompress.events import Advance, Emit, Note, Phase, ignore

RESAMPLES = 2000
CHUNK = 2**21  # resampled documents in memory at a time


@dataclass(frozen=True)
class DocumentScore:
    """Negative log-likelihood of one document in nats, what it is spread over, and which text it was."""

    nats: float
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Perplexity:
    """Bits per byte and token perplexity of a text; intervals are 95 % bootstrap over documents, None for one.

    `tokens_read` is the share of the text's tokens that each block read, where some leave on their way.
    """

    bits_per_byte: float
    bits_per_byte_interval: tuple[float, float] | None
    perplexity: float
    perplexity_interval: tuple[float, float] | None
    length: int
    documents: tuple[DocumentScore, ...]
    tokens_read: tuple[float, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, documents included, for paired tests later."""
        return asdict(self)


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[str],
    *,
    length: int = 512,
    windows: int | None = None,
    context: int = 0,
    batch: int = 8,
    seed: int = 0,
    emit: Emit = ignore,
) -> Perplexity:
    """Scores every byte of every document once, in fixed windows of `length` tokens; at most `windows` of a document.

    Each window is read after one end-of-text token: its first token counts too, and windows are independent.
    With `context` the first so many tokens of a window are read and not scored; of these alone tokens may leave, where
    the model lets them. Windows that hold no more are left out.
    Raises InputError for text that holds no token.
    """
    start = tokenizer.eos_token_id
    if start is None:
        raise InputError(
            "The tokenizer has no end-of-text token to start a window with.",
            hint="Set eos_token in its tokenizer_config.json.",
        )
    parts: list[tuple[list[int], int]] = []
    owner: list[int] = []
    sizes: list[tuple[int, int, str]] = []
    for text in documents:
        ids = _whole(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], windows and windows * length)
        cut = [ids[i : i + length] for i in range(0, len(ids), length)]
        heads = [len(_whole(tokenizer, part, context)) for part in cut]
        tails = [part[head:] for part, head in zip(cut, heads, strict=True) if len(part) > head]
        if tails:
            owner += [len(sizes)] * len(tails)
            parts += [(part, head) for part, head in zip(cut, heads, strict=True) if len(part) > head]
            whole = tokenizer.decode(ids) if windows else text
            scored = ("".join(map(tokenizer.decode, tails)) if context else whole).encode()
            sizes.append((sum(map(len, tails)), len(scored), hashlib.sha256(scored).hexdigest()))
    if not parts:
        lacking = f"no window of more than {context} tokens" if context else "no token"
        raise InputError(f"The evaluation text holds {lacking}.", hint="Give a text file with more in it.")
    nats = np.zeros(len(sizes))
    device = next(model.parameters()).device
    # windows of one length share a batch, so that nothing is padded and no row depends on its batch
    order = sorted(range(len(parts)), key=lambda i: (-len(parts[i][0]), i))
    read_by = np.zeros(len(cast(Any, model).backbone.layers)) if reduces(model) else None
    mine = parallel.share(_groups(order, parts, -(-batch // parallel.size())))
    emit(Phase("perplexity", sum(map(len, mine))))
    for group in mine:
        rows = torch.tensor([[start, *parts[i][0]] for i in group], device=device)
        read = torch.tensor([parts[i][1] for i in group], device=device)
        scored = torch.arange(rows.shape[1] - 1, device=device) >= read[:, None]
        with protect(model, scored):
            logits = model(rows[:, :-1], use_cache=False).logits.float()
        if read_by is not None:
            read_by += passed(model)
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        losses = losses.double().view_as(scored).masked_fill(~scored, 0.0)
        for i, loss in zip(group, losses.sum(1).tolist(), strict=True):
            nats[owner[i]] += loss
        emit(Advance(len(group)))
    if len(sizes) == 1:
        emit(Note("One document: no interval.", "warning"))
    nats = parallel.total(torch.from_numpy(nats)).numpy()
    scores = tuple(DocumentScore(float(n), *size) for n, size in zip(nats, sizes, strict=True))
    if read_by is None:
        return summarise(scores, length, seed)
    counts = parallel.total(torch.from_numpy(read_by))
    return summarise(scores, length, seed, tuple((counts / counts[0]).tolist()))


def summarise(
    documents: Sequence[DocumentScore], length: int, seed: int = 0, tokens_read: Sequence[float] | None = None
) -> Perplexity:
    """The figures of a text from its documents' scores."""
    table = np.array([(d.nats, d.tokens, d.bytes) for d in documents])
    draws = _resample(table, seed)

    def bits(sums: np.ndarray) -> np.ndarray:
        return sums[..., 0] / math.log(2) / sums[..., 2]

    def token_perplexity(sums: np.ndarray) -> np.ndarray:
        return np.exp(np.minimum(sums[..., 0] / sums[..., 1], 700))

    total = table.sum(0)
    return Perplexity(
        float(bits(total)),
        _interval(bits(draws)) if len(table) > 1 else None,
        float(token_perplexity(total)),
        _interval(token_perplexity(draws)) if len(table) > 1 else None,
        length,
        tuple(documents),
        None if tokens_read is None else tuple(tokens_read),
    )


def paired_difference(
    a: Sequence[DocumentScore], b: Sequence[DocumentScore], seed: int = 0
) -> tuple[float, float, float]:
    """Bits per byte of b minus a on the same documents, with its paired 95 % bootstrap interval."""
    if [(d.sha256, d.tokens) for d in a] != [(d.sha256, d.tokens) for d in b]:
        raise InputError("The two results were not measured on the same documents.")
    table = np.array([(y.nats - x.nats, x.tokens, x.bytes) for x, y in zip(a, b, strict=True)])
    total, draws = table.sum(0), _resample(table, seed)
    low, high = _interval(draws[:, 0] / math.log(2) / draws[:, 2])
    return float(total[0] / math.log(2) / total[2]), low, high


def _whole(tokenizer: Any, ids: list[int], most: int | None) -> list[int]:
    """The first `most` ids, less those of a character that the cut went through: its bytes could not be counted."""
    if most is None or len(ids) <= most:
        return ids
    end = most
    while end and tokenizer.decode(ids[:end]).endswith("\ufffd"):
        end -= 1
    return ids[: end or most]


def _groups(order: list[int], parts: list[tuple[list[int], int]], batch: int) -> list[list[int]]:
    groups: list[list[int]] = []
    for i in order:
        if groups and len(groups[-1]) < batch and len(parts[groups[-1][0]][0]) == len(parts[i][0]):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _resample(table: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(seed))
    most = max(1, CHUNK // len(table))
    sizes = [min(most, RESAMPLES - start) for start in range(0, RESAMPLES, most)]
    return np.concatenate([table[rng.integers(len(table), size=(size, len(table)))].sum(1) for size in sizes])


def _interval(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
