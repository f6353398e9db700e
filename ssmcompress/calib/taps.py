"""Watches the input of every prunable module of a block through its mixer's port."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from ssmcompress.arch.base import Mixer

Watch = Callable[[str, Tensor], None]


@contextmanager
def observe(mixer: Mixer, watch: Watch) -> Iterator[None]:
    """Calls watch(module, input [B, L, width]) for each prunable module while inside."""
    before, mixer.taps = mixer.taps, watch
    try:
        yield
    finally:
        mixer.taps = before
