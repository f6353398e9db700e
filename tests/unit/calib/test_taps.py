"""The port is opened and closed as it was found."""

import pytest
import torch

from ssmcompress.arch.mixer import mixers
from ssmcompress.calib.taps import observe
from tests.unit.arch import models


@pytest.fixture
def mixer():
    return next(mixers(models.ours("mamba")))


def test_every_prunable_input_is_shown_while_inside_and_none_outside(mixer):
    seen = []
    with observe(mixer, lambda module, x: seen.append((module, tuple(getattr(x, "shape", ()))))):
        mixer(torch.randn(2, 5, 32))
    mixer(torch.randn(2, 5, 32))
    assert seen == [
        ("in_proj", (2, 5, 32)),
        ("conv1d", (2, 5, 64)),
        ("x_proj", (2, 5, 64)),
        ("dt_proj", (2, 5, 2)),
        ("scan", ()),
        ("out_proj", (2, 5, 64)),
    ]
    assert mixer.taps is None


def test_the_port_is_closed_after_an_exception(mixer):
    def broken(module, x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), observe(mixer, broken):
        mixer(torch.randn(1, 3, 32))
    assert mixer.taps is None
    assert mixer(torch.randn(1, 3, 32)).isfinite().all()


def test_another_watcher_comes_back_when_the_inner_one_leaves(mixer):
    outer, inner = [], []
    with observe(mixer, lambda module, _: outer.append(module)):
        with observe(mixer, lambda module, _: inner.append(module)):
            mixer(torch.randn(1, 3, 32))
        assert inner and not outer
        mixer(torch.randn(1, 3, 32))
    assert outer == inner


def test_watching_changes_no_output(mixer):
    x = torch.randn(2, 5, 32)
    with observe(mixer, lambda *_: None):
        watched = mixer(x)
    assert torch.equal(watched, mixer(x))
