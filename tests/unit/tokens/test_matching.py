import pytest
import torch
import torch.nn.functional as F

from ssmcompress.tokens import matching
from ssmcompress.tokens.matching import match


@pytest.mark.parametrize("window", [None, 3, 40])
@pytest.mark.parametrize("block", [4, 512])
def test_the_best_target_is_that_of_a_loop(window: int | None, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "BLOCK", block)
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(50) * 2
    sources, targets = torch.arange(0, 50, 3), torch.tensor([i for i in range(50) if i % 3])
    best, cosine = match(features, sources, targets, positions, window)
    for i, source in enumerate(sources.tolist()):
        near = [t for t in targets.tolist() if window is None or abs(positions[t] - positions[source]) <= window]
        found = [float(F.cosine_similarity(features[source], features[t], dim=0)) for t in near]
        assert best[i] == near[max(range(len(near)), key=found.__getitem__)]
        assert cosine[i] == pytest.approx(max(found), abs=1e-6)


def test_a_source_with_no_target_in_reach_has_none() -> None:
    best, cosine = match(torch.ones(4, 2), torch.tensor([0]), torch.tensor([3]), torch.arange(4), 2)
    assert best.tolist() == [-1]
    assert cosine.tolist() == [float("-inf")]
