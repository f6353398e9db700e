import pytest

from ssmcompress.errors import UnsupportedError
from ssmcompress.policy import TokenPolicy
from ssmcompress.tokens.schedule import anchors, keep_for, lengths, removable, saved, shares


@pytest.mark.parametrize(
    ("depth", "flops", "keep", "final"),
    [
        (64, 0.1, 0.9729, 0.825),
        (64, 0.2, 0.9415, 0.656),
        (64, 0.3, 0.9043, 0.495),
        (48, 0.1, 0.9651, 0.808),
        (48, 0.2, 0.9248, 0.626),
        (48, 0.3, 0.8768, 0.455),
    ],
)
def test_the_papers_depths_and_levels(depth: int, flops: float, keep: float, final: float) -> None:
    layers = anchors(depth)
    found = keep_for(flops, depth, layers)
    assert found == pytest.approx(keep, abs=5e-5)
    assert shares(depth, layers, found)[-1] == pytest.approx(final, abs=6e-4)
    assert saved(depth, layers, found) == pytest.approx(flops, abs=1e-5)


def test_other_depths_have_anchors_at_the_same_share_of_depth() -> None:
    assert anchors(24) == (5, 8, 10, 12, 15, 18)
    assert anchors(8) == (2, 3, 4, 5, 6)
    assert anchors(6) == (1, 2, 3, 4)


def test_what_cannot_be_saved_is_refused_with_what_can() -> None:
    with pytest.raises(UnsupportedError, match="cannot save 90%") as refused:
        keep_for(0.9, 6, anchors(6))
    assert "It saves less than" in refused.value.hint


def test_lengths_count_every_block() -> None:
    policy = TokenPolicy(layers=(1, 3), keep=0.7)
    assert removable(10, policy) == 3
    assert lengths(11, 5, policy) == [11, 11, 8, 8, 6]


def test_anchors_follow_the_blocks_that_are_left() -> None:
    policy = TokenPolicy(layers=(1, 2, 4), keep=0.9)
    assert policy.within((0, 2, 3, 5)).layers == (0, 1, 2)
    assert policy.within((2, 5)).layers == (0,)
