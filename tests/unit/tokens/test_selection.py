import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmcompress.arch import backbone
from ssmcompress.arch.backbone import dense, protect
from ssmcompress.arch.scan import stride
from ssmcompress.checkpoint.source import Checkpoint, load
from ssmcompress.kernels import reference
from ssmcompress.policy import RULES, TokenPolicy
from ssmcompress.tokens.schedule import lengths
from ssmcompress.tokens.selection import install

LAYERS = (1, 2, 4)


@pytest.fixture(params=["mamba", "mamba2"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return load(f"ref:{request.param}", dtype=torch.float32)


def policy(method: str = "utrc", **more: Any) -> TokenPolicy:
    return TokenPolicy.model_validate({"method": method, "layers": LAYERS, "keep": 0.8, "special": (0,)} | more)


def prompt(length: int, rows: int = 1) -> Tensor:
    return torch.randint(1, 4096, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(ids, attention_mask=mask, use_cache=False).logits


def test_keeping_all_is_the_dense_model_bit_for_bit(checkpoint: Checkpoint) -> None:
    model, ids = checkpoint.model, prompt(40, 2)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    before = logits(model, ids, mask)
    install(model, policy(keep=1.0))
    assert torch.equal(logits(model, ids, mask), before)


@pytest.mark.parametrize("method", RULES)
def test_what_is_left_stays_in_order_and_is_counted(checkpoint: Checkpoint, method: str) -> None:
    model, ids = checkpoint.model, prompt(50)
    chosen = policy(method)
    install(model, chosen)
    found = logits(model, ids)
    kept = model.backbone.kept
    assert [each.shape[1] for each in kept[:-1]] == lengths(50, 6, chosen)
    assert all(bool((each[0].diff() > 0).all()) for each in kept)
    gone = torch.ones(50, dtype=torch.bool)
    gone[kept[-1][0]] = False
    assert torch.equal(found[0].isnan().all(-1), gone)
    with dense(model):
        assert logits(model, ids).isfinite().all()


@pytest.mark.parametrize("decay", ["drop", "carry"])
@pytest.mark.parametrize("method", RULES)
def test_every_row_is_that_of_the_prompt_alone(checkpoint: Checkpoint, method: str, decay: str) -> None:
    model, ids = checkpoint.model, prompt(41, 2)
    install(model, policy(method, decay=decay))
    for padded in (slice(0, 9), slice(32, 41)):  # in front, and behind
        mask = torch.ones_like(ids)
        mask[0, padded] = 0
        both = logits(model, ids, mask)
        alone = logits(model, ids[:1, mask[0].bool()])
        torch.testing.assert_close(both[:1, mask[0].bool()], alone, rtol=1e-4, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(both[1:], logits(model, ids[1:]), rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("padded", [slice(0, 9), slice(32, 41), slice(0, 0)])
def test_a_prompt_read_in_pieces_is_the_prompt(
    checkpoint: Checkpoint, padded: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = checkpoint.model, prompt(41, 2)
    mask = torch.ones_like(ids)
    mask[0, padded] = 0
    install(model, policy("stride", decay="carry"))

    @torch.no_grad()
    def read() -> tuple[Tensor, Tensor]:
        found = model(ids, attention_mask=mask, use_cache=True)
        longer = torch.cat([mask, mask[:, -1:]], 1)
        after = model(ids[:, :1], attention_mask=longer, cache_params=found.cache_params, use_cache=True)
        return found.logits, after.logits

    whole, kept = read(), model.backbone.kept
    monkeypatch.setattr(backbone, "PIECE", 7)
    with torch.no_grad():
        assert [len(stage) for stage in model.backbone._stages(41)] == [2, 1, 1, 1, 1]
    assert [len(stage) for stage in model.backbone._stages(41)] == [1] * 6
    for got, want in zip(read(), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert all(torch.equal(a, b) for a, b in zip(model.backbone.kept, kept, strict=True))
    torch.testing.assert_close(logits(model, ids, mask), whole[0], rtol=1e-4, atol=1e-4, equal_nan=True)


def test_special_and_protected_tokens_never_leave(checkpoint: Checkpoint) -> None:
    model, ids = checkpoint.model, prompt(30)
    ids[0, 3] = 0
    scored = torch.zeros_like(ids, dtype=torch.bool)
    scored[0, 10:20] = True
    install(model, policy("drop-earliest", keep=0.3))
    with protect(model, scored):
        found = logits(model, ids)[0].isnan().any(-1)
    assert not found[[3, 29]].any()
    assert not found[10:20].any()
    assert found[[0, 1, 2]].all()


@pytest.mark.parametrize("method", RULES)
def test_tokens_that_are_scored_have_no_say_in_earlier_predictions(checkpoint: Checkpoint, method: str) -> None:
    model, ids = checkpoint.model, prompt(60)
    other, scored = ids.clone(), torch.zeros_like(ids, dtype=torch.bool)
    other[:, 50:] = prompt(70)[:, 60:]
    scored[:, 29:] = True
    install(model, policy(method, keep=0.6))
    with protect(model, scored):
        assert torch.equal(*(logits(model, each)[:, 29:50] for each in (ids, other)))


@pytest.mark.parametrize("decay", ["drop", "carry"])
def test_decoding_goes_on_from_what_is_left(checkpoint: Checkpoint, decay: str) -> None:
    """Prompt and a token in one, where the prompt alone may lose tokens, and one after the other."""
    model, ids = checkpoint.model, prompt(33)
    for method in RULES:
        install(model, policy(method, decay=decay))
        cache = model(ids[:, :32], use_cache=True).cache_params
        stepwise = model(ids[:, 32:], cache_params=cache, use_cache=True).logits[:, -1]
        scored = torch.zeros_like(ids, dtype=torch.bool)
        scored[:, 31:] = True
        with protect(model, scored):
            torch.testing.assert_close(stepwise, logits(model, ids)[:, -1], rtol=1e-4, atol=1e-4)


def test_generation_starts_from_the_reduced_prompt(checkpoint: Checkpoint) -> None:
    model, ids = checkpoint.model, prompt(30, 2)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    install(model, policy())
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    both = model.generate(ids, attention_mask=mask, **how)
    for row, start in ((0, 6), (1, 0)):
        alone = model.generate(ids[row : row + 1, start:], attention_mask=mask[row : row + 1, start:], **how)
        assert torch.equal(both[row, 30:], alone[0, -4:])


def test_carried_decay_is_that_of_tokens_that_only_decay() -> None:
    """Where steps are equal, dropping tokens and carrying their steps is silencing them."""
    random = torch.Generator().manual_seed(0)
    A, keep = -torch.rand(4, generator=random), torch.tensor([0, 1, 4, 7])
    x, dt = torch.randn(1, 8, 4, 2, generator=random), torch.randn(1, 1, 4, generator=random).expand(1, 8, 4)
    B, C = torch.randn(1, 8, 1, 3, generator=random), torch.randn(1, 8, 1, 3, generator=random)
    silent = x.clone()
    silent[:, [2, 3, 5, 6]] = 0
    want = reference.ssd(silent, dt, A, B, C)[0][:, keep]
    longer, smaller, limit = stride(dt[:, keep], B[:, keep], torch.tensor([[1, 1, 3, 3]]), None)
    got = reference.ssd(x[:, keep], longer, A, smaller, C[:, keep], dt_limit=limit)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def chosen(output: Tensor, free: list[int], how: TokenPolicy) -> tuple[list[int], dict[int, int], set[int]]:
    """Which of the free tokens leave, one after the other; into which each merges; and which do so in the residual."""
    count = len(free) - math.ceil(len(free) * how.keep - 1e-9)
    important = sorted(free, key=lambda i: float(output[i].clamp_min(0).mean()))
    if how.method == "drop-earliest" or not count:
        return free[:count], {}, set()
    if how.method == "evit":
        return important[:count], {}, set()
    half = len(free) // 2
    sources, targets = (important[:half], important[half:]) if how.method == "utrc" else (free[::2], free[1::2])
    near = {a: max((float(torch.cosine_similarity(output[a], output[b], 0)), -b) for b in targets) for a in sources}
    gone = sorted(sources, key=lambda a: -near[a][0])[:count]
    lost = gone[count - int(how.pruned * count + 0.5) :] if how.method == "utrc" else []
    return gone, {a: -near[a][1] for a in gone}, set(lost)


def mean(x: Tensor, i: int, into: dict[int, int]) -> Tensor:
    return torch.stack([x[i], *(x[a] for a, b in into.items() if b == i)]).mean(0)


@torch.no_grad()
def by_a_loop(model: Any, ids: Tensor, how: TokenPolicy) -> tuple[Tensor, list[int]]:
    """Logits of the tokens that are left of one prompt, and where they stood."""
    hidden, positions = model.backbone.embeddings(ids)[0], list(range(ids.shape[1]))
    for layer, block in enumerate(model.backbone.layers):
        output = block.mixer(block.norm(hidden[None]))[0]
        stays, into, lost = list(range(len(hidden))), dict[int, int](), set[int]()
        if layer in how.layers:
            free = [i for i in stays[:-1] if int(ids[0, positions[i]]) not in how.special]
            gone, into, lost = chosen(output, free, how)
            stays = [i for i in stays if i not in gone]
        seen = {a: b for a, b in into.items() if a not in lost}
        hidden = torch.stack([mean(hidden, i, into) + mean(output, i, seen) for i in stays])
        positions = [positions[i] for i in stays]
    return model.lm_head(model.backbone.norm_f(hidden)), positions


LOOPED = [
    ("tome", {}),
    ("pumer", {}),
    ("evit", {}),
    ("drop-earliest", {}),
    *(("utrc", {"pruned": q}) for q in (0.0, 0.3, 1.0)),
]


@pytest.mark.parametrize(("method", "more"), LOOPED)
@pytest.mark.parametrize("length", [2, 3, 24])
def test_the_whole_model_is_that_of_a_loop(checkpoint: Checkpoint, method: str, more: dict, length: int) -> None:
    how, ids = policy(method, keep=0.7, **more), prompt(length)
    expected, positions = by_a_loop(checkpoint.model, ids, how)
    install(checkpoint.model, how)
    found = logits(checkpoint.model, ids)
    install(checkpoint.model, None)
    assert (~found[0].isnan().any(-1)).nonzero().flatten().tolist() == positions
    torch.testing.assert_close(found[0, positions], expected, rtol=1e-4, atol=1e-4)
