"""The blocks in turn, and the port between them: tokens of a prompt may leave after a block."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import ModelOutput

from ssmcompress.arch.mixer import Mixer, Record
from ssmcompress.arch.scan import Scan
from ssmcompress.errors import UnsupportedError

GONE = -1  # the position of padding
PIECE = 1024  # tokens that blocks read at a time before any has left


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch between a mixer and the residual sum, each row's last one at the end.

    output and residual [B, L, d], positions [B, L] in the prompt (-1: padding), free [B, L] bool: those that may leave;
    scan is what the mixer's scan took in, where it was asked for.
    """

    output: Tensor
    residual: Tensor
    positions: Tensor
    free: Tensor
    scan: Scan | None = None


class Select(Protocol):
    """Which tokens go on (`ssmcompress.tokens`)."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks after which it is asked."""

    @property
    def special(self) -> tuple[int, ...]:
        """Ids of tokens that never leave."""

    @property
    def watches(self) -> bool:
        """Whether it looks into the scan."""

    @property
    def carries(self) -> bool:
        """Whether a token takes over the decay of those that left before it."""

    def __call__(self, layer: int, tokens: Tokens) -> Tokens:
        """The tokens that go on, in their order."""


class Backbone(nn.Module):
    """A stock backbone whose prompts may lose tokens on the way; without `select` it is the stock one.

    With `select`, a prompt comes out as long as it went in: the positions of tokens that left hold NaN, so that nobody
    takes them for a prediction, and padding holds zeros. What stays may depend on tokens behind it, which had a say in
    what left: only the last one, and those that `protect` names, are predictions. Decoding from a cache is dense.
    """

    select: Select | None = None
    protected: Tensor | None = None  # [B, L] bool: more tokens that must not leave (`protect`)
    prompt: Tensor | None  # [k, d]: embeddings that are read before every text (set by `lead`)
    kept: tuple[Tensor, ...] = ()  # of the last prompt: positions [B, L] before each block and after the last
    output_type: type[ModelOutput]

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Ids [B, L] or embeddings [B, L, d], of which none is known to be special → hidden states [B, L, d]."""
        read = cache_params is not None and cache_params.has_previous_state()
        if self.prompt is not None and not read:
            self._begin(self.prompt)
        given = input_ids if inputs_embeds is None else inputs_embeds
        if self.select is None or read or (given is not None and not given.shape[1]):
            return super().forward(
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                cache_params=cache_params,
                use_cache=use_cache,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
                attention_mask=attention_mask,
                **kwargs,
            )
        if output_hidden_states or (output_hidden_states is None and cast(Any, self.config).output_hidden_states):
            raise UnsupportedError("A model that reduces tokens has no hidden states of one length.")
        hidden = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = cast(Any, self.config).use_cache and not self.training
        if use_cache and cache_params is None:
            cache_params = DynamicCache(config=cast(Any, self.config))
        positions = _positions(hidden, attention_mask)
        hidden = self._reduced(hidden, positions, self._free(input_ids, positions), cache_params)
        found = self.output_type(last_hidden_state=hidden, cache_params=cache_params if use_cache else None)
        return found if return_dict is None or return_dict else found.to_tuple()

    def _begin(self, prompt: Tensor) -> None:
        """Lets every mixer start from what the prompt leaves behind: causal, it is as if it stood before the text."""
        record, hidden, mixers = Record(), prompt[None], [block.mixer for block in cast(Any, self.layers)]
        positions = torch.arange(len(prompt), device=prompt.device)[None]
        for layer, mixer in enumerate(mixers):
            mixer.start = None
            output, residual = self._mix(layer, hidden, positions, cast(Cache, record), None)
            hidden = residual + output
            mixer.start = record.past(layer)  # it stays: blocks that are computed again in the backward need it

    def _free(self, ids: Tensor | None, positions: Tensor) -> Tensor:
        """Which tokens may leave [B, L]: neither padding, nor each row's last, nor special, nor protected."""
        free = (positions != GONE) & (positions < positions.amax(1, keepdim=True))
        special = cast(Select, self.select).special
        if ids is not None and special:
            free &= ~torch.isin(ids, torch.tensor(special, device=ids.device))
        return free if self.protected is None else free & ~self.protected

    def _reduced(self, hidden: Tensor, positions: Tensor, free: Tensor, cache: Cache | None) -> Tensor:
        """What comes out of the blocks and the last norm, [B, L, d], laid back to where it came from."""
        start, kept = positions, [positions]
        for stage in self._stages(hidden.shape[1]):
            kept += [positions] * (len(stage) - 1)
            hidden, positions, free = self._stage(stage, hidden, positions, free, cache, positions is start)
            kept.append(positions)
        self.kept = tuple(kept)
        # who names the tokens that are wanted reads no others, and NaN would spoil the gradients of the head
        nothing = 0.0 if self.protected is not None and torch.is_grad_enabled() else float("nan")
        return _laid_back(self.norm_f(hidden), positions, start, nothing)

    def _stage(
        self, stage: range, hidden: Tensor, positions: Tensor, free: Tensor, cache: Cache | None, whole: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What comes out of blocks that run together, [B, L, d], positions and free: of all tokens or those that stay.

        `whole` where none has left before.
        """
        select, last = cast(Select, self.select), stage[-1]
        strides = _strides(positions) if select.carries and not whole else None
        with _watch(cast(Any, self.layers)[last].mixer, select.watches and last in select.layers) as seen:
            output, residual = self._run(stage, hidden, positions, cache, strides)
        if last not in select.layers:
            return residual + output, positions, free
        tokens = select(last, Tokens(output, residual, positions, free, seen.get("scan")))
        return tokens.residual + tokens.output, tokens.positions, tokens.free

    def _stages(self, length: int) -> list[range]:
        """Blocks that run together: those of a long prompt up to where tokens first leave, then each by itself."""
        select, depth = cast(Select, self.select), len(cast(Any, self.layers))
        first = 1 + min(select.layers, default=0)
        if length <= PIECE or select.watches or torch.is_grad_enabled():
            first = 1
        return [range(first), *(range(layer, layer + 1) for layer in range(first, depth))]

    def _run(
        self, stage: range, hidden: Tensor, positions: Tensor, cache: Cache | None, strides: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The output of the last mixer of a stage, and what it adds to.

        Blocks that run together read a piece of the prompt after the other: they see all of it, and would need the most
        memory otherwise.
        """
        if len(stage) == 1:
            return self._mix(stage[0], hidden, positions, cache, strides)
        cache = DynamicCache(config=cast(Any, self.config)) if cache is None else cache
        outputs, residuals = [], []
        for part, where in zip(hidden.split(PIECE, 1), positions.split(PIECE, 1), strict=True):
            for layer in stage:
                output, residual = self._mix(layer, part, where, cache, None)
                part = residual + output
            outputs.append(output)
            residuals.append(residual)
        return torch.cat(outputs, 1), torch.cat(residuals, 1)

    def _mix(
        self, layer: int, hidden: Tensor, positions: Tensor, cache: Cache | None, strides: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The output of one mixer, and what it adds to."""
        block, real = cast(Any, self.layers)[layer], positions != GONE
        output = block.mixer(
            block.norm(hidden.to(block.norm.weight.dtype)),
            cache_params=cache,
            attention_mask=None if bool(real.all()) else real,
            strides=strides,
        )
        return output, hidden.float() if block.residual_in_fp32 else hidden


def lead(model: Any, kind: type[Backbone]) -> None:
    """Gives a stock model our backbone: the same parameters under the same names."""
    model.backbone.__class__ = kind
    model.backbone.prompt = None  # of its own, for a class's None would hide the parameter that is put there


@contextmanager
def protect(model: nn.Module, tokens: Tensor) -> Iterator[None]:
    """Keeps tokens [B, L] bool of the prompts inside from leaving: those whose predictions are wanted."""
    if not reduces(model):
        yield
        return
    backbone = cast(Any, model).backbone
    backbone.protected = tokens
    try:
        yield
    finally:
        backbone.protected = None


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Lets every token stay inside."""
    if not reduces(model):
        yield
        return
    backbone = cast(Any, model).backbone
    select, backbone.select = backbone.select, None
    try:
        yield
    finally:
        backbone.select = select


def passed(model: nn.Module) -> np.ndarray:
    """How many tokens of the last prompts each block read."""
    kept: Sequence[Tensor] = cast(Any, model).backbone.kept
    return np.array([int((positions != GONE).sum()) for positions in kept[:-1]])


def reduces(model: nn.Module) -> bool:
    """Whether prompts lose tokens on their way through a model."""
    return getattr(getattr(model, "backbone", None), "select", None) is not None


def _positions(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Where each token stands [B, L], -1 for padding."""
    batch, length, _ = hidden.shape
    positions = torch.arange(length, device=hidden.device).expand(batch, length)
    return positions if mask is None else positions.masked_fill(~mask.bool(), GONE)


def _strides(positions: Tensor) -> Tensor:
    """How many tokens of the prompt each stands for: itself and those that left just before it, [B, L]."""
    before = torch.cat([torch.full_like(positions[:, :1], GONE), positions[:, :-1]], dim=1)
    return torch.where(before == GONE, 1, positions - before)


@contextmanager
def _watch(mixer: Mixer, watched: bool) -> Iterator[dict[str, Any]]:
    """What the taps of a mixer see inside."""
    seen: dict[str, Any] = {}
    if not watched:
        yield seen
        return
    taps = mixer.taps
    mixer.taps = seen.__setitem__
    try:
        yield seen
    finally:
        mixer.taps = taps


def _laid_back(hidden: Tensor, positions: Tensor, start: Tensor, nothing: float) -> Tensor:
    """Hidden states of the tokens that are left [B, l, d] at their places in the prompts [B, L, d], else nothing."""
    batch, length = start.shape
    if positions is start:
        return hidden
    whole = hidden.new_full((batch, length + 1, hidden.shape[2]), nothing)
    places = positions.where(positions != GONE, length)[..., None].expand_as(hidden)
    return whole.scatter(1, places, hidden)[:, :length].masked_fill((start == GONE)[..., None], 0.0)
