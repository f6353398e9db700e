"""Watches the input of every prunable module of a block, and of its scan, through its mixer's port."""

from collections.abc import Iterator
from contextlib import contextmanager

from ssmcompress.arch.mixer import Mixer, Taps


@contextmanager
def observe(mixer: Mixer, watch: Taps) -> Iterator[None]:
    """Calls watch(module, input [B, L, width]) for each prunable module, and watch("scan", Scan), while inside."""
    before, mixer.taps = mixer.taps, watch
    try:
        yield
    finally:
        mixer.taps = before
