import torch
from torch import Tensor

from ssmcompress.policy import TokenPolicy
from ssmcompress.tokens.rules import RULES, Removal, Row
from ssmcompress.tokens.selection import merged

LENGTH, WIDTH = 21, 8


def row(seed: int = 0) -> Row:
    output = torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))
    return Row(3, output, torch.arange(LENGTH))


def policy(method: str, **more: object) -> TokenPolicy:
    return TokenPolicy.model_validate({"method": method, "layers": (3,), "keep": 0.7} | more)


def similarity(output: Tensor, a: int, b: int) -> float:
    return float(output[a] @ output[b] / output[a].norm() / output[b].norm())


def closest(output: Tensor, sources: list[int], targets: list[int], count: int) -> list[tuple[int, int]]:
    best = {a: max(targets, key=lambda b: similarity(output, a, b)) for a in sources}
    return sorted(best.items(), key=lambda pair: -similarity(output, *pair))[:count]


def test_utrc_by_a_loop() -> None:
    given = row()
    scores = given.output.clamp_min(0).mean(1)
    order = sorted(range(LENGTH), key=lambda t: float(scores[t]))
    expected = closest(given.output, sorted(order[: LENGTH // 2]), sorted(order[LENGTH // 2 :]), 6)
    found = RULES["utrc"](given, 6, policy("utrc", pruned=0.5))
    assert list(zip(found.gone.tolist(), found.into.tolist(), strict=True)) == expected
    assert found.lost.tolist() == [False] * 3 + [True] * 3


def test_tome_by_a_loop() -> None:
    given = row()
    expected = closest(given.output, list(range(0, LENGTH, 2)), list(range(1, LENGTH, 2)), 5)
    found = RULES["tome"](given, 5, policy("tome"))
    assert list(zip(found.gone.tolist(), found.into.tolist(), strict=True)) == expected
    assert not found.lost.any()


def test_the_released_rule_takes_even_positions_whatever_the_text() -> None:
    for seed in range(3):
        found = RULES["utrc-released"](row(seed), 4, policy("utrc-released"))
        assert found.gone.tolist() == [0, 2, 4, 6]
        assert set(found.into.tolist()) == {1}


def test_evit_drops_the_least_important_ones() -> None:
    given = row()
    scores = given.output.clamp_min(0).mean(1)
    expected = sorted(sorted(range(LENGTH), key=lambda t: float(scores[t]))[:6])
    assert RULES["evit"](given, 6, policy("evit")).gone.tolist() == expected


def test_controls_do_not_look_at_the_text() -> None:
    for method in ("drop-earliest", "stride", "random"):
        first, second = (RULES[method](row(seed), 6, policy(method)).gone.tolist() for seed in (0, 1))
        assert first == second == sorted(set(first))
        assert len(first) == 6
    assert RULES["drop-earliest"](row(), 3, policy("drop-earliest")).gone.tolist() == [0, 1, 2]
    other = RULES["random"](row(), 6, policy("random", seed=1)).gone.tolist()
    assert other != RULES["random"](row(), 6, policy("random")).gone.tolist()


def removal(topmost: bool = False) -> Removal:
    """1 and 4 merge into 2; 3 merges into 6, in the residual alone."""
    return Removal(torch.tensor([4, 1, 3]), torch.tensor([2, 2, 6]), torch.tensor([False, False, True]), topmost)


def test_merging_by_hand() -> None:
    x, places = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)), torch.arange(1, 8)
    a, b, c, d, e = (x[places[i]] for i in (1, 4, 2, 3, 6))
    for merge, whole, expected in (
        ("mean", False, {2: (a + b + c) / 3}),
        ("mean", True, {2: (a + b + c) / 3, 6: (d + e) / 2}),
        ("sequential", False, {2: ((c + a) / 2 + b) / 2}),
    ):
        want = x.clone()
        for place, value in expected.items():
            want[places[place]] = value
        stays = torch.ones(9, dtype=torch.bool)
        torch.testing.assert_close(merged(x, places, removal(), stays, merge, whole), want)
        stays[places[removal().gone]] = False
        torch.testing.assert_close(merged(x, places, removal(), stays, merge, whole), want[stays])


def test_the_released_rule_merges_the_larger_half_of_every_channel() -> None:
    x, places = torch.tensor([[1.0, 8.0], [0.0, 0.0], [5.0, 1.0]]), torch.arange(3)
    gone = Removal(torch.tensor([0, 2]), torch.tensor([1, 1]), torch.tensor([False, False]), topmost=True)
    stays = torch.tensor([False, True, False])
    assert merged(x, places, gone, stays, "mean", False).tolist() == [[2.5, 4.0]]
    assert merged(x, places, gone, stays, "mean", True).tolist() == [[2.0, 3.0]]
