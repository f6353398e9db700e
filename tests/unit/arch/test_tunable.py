"""What is learned in state space: nothing changes at first, and then it does what the papers' equations say."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import Mamba2Config, MambaConfig

from ssmcompress import kernels
from ssmcompress.arch.mixer import mixers, use_backend
from ssmcompress.arch.registry import arch_for
from ssmcompress.arch.tunable import DRAWN, TUNABLE, install
from ssmcompress.errors import UnsupportedError
from tests.unit.arch import models

ALL = list(models.ALL)
HEADS = [name for name in ALL if "mamba2" in name]
FORMS = {"full": None, "low-rank": 2, "per-head": None}
SIZES = {"additional-scan": 3, "prefix": 2, "prompt": 3}
PORTS = [method for method, tunable in TUNABLE.items() if not (tunable.weights or tunable.whole)]


def adapted(name, method, form="full", scale=0.3):
    """A model with something learned in it, and its tensors."""
    model = models.ours(name)
    learned = install(model, arch_for(model.config), method, form, SIZES.get(method, FORMS[form]))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in learned.values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=draw))
    return model, learned


def forms(name):
    return [form for form in FORMS if form != "per-head" or name in HEADS]


def cases(methods=PORTS):
    for name in ALL:
        yield from ((name, method, "full") for method in methods if method != "state-offset")
        yield from ((name, "state-offset", form) for form in forms(name))


@torch.no_grad()
def logits(model, ids, **options):
    return model(ids, use_cache=False, **options).logits


@pytest.mark.parametrize(
    ("name", "method", "form"), cases(method for method in TUNABLE if method not in (*DRAWN, "additional-scan"))
)
def test_at_first_it_changes_no_bit(name, method, form):
    model, ids = models.ours(name), models.tokens(2, 23)
    expected = logits(model, ids)
    install(model, arch_for(model.config), method, form, FORMS[form])
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("name", ALL)
def test_more_states_are_not_read_at_first(name):
    model, ids = models.ours(name), models.tokens(2, 23)
    expected = logits(model, ids)
    install(model, arch_for(model.config), "additional-scan", size=3)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_a_prompt_is_read_as_if_it_stood_before_the_text(name):
    model, ids = models.ours(name), models.tokens(2, 11)
    install(model, arch_for(model.config), "prompt", size=4)
    prompt, model.backbone.prompt = model.backbone.prompt, None
    whole = torch.cat([prompt.expand(2, -1, -1), model.backbone.embeddings(ids)], 1)
    expected = model(inputs_embeds=whole, use_cache=False).logits[:, 4:]
    model.backbone.prompt = prompt
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_a_prefix_is_what_a_mixer_reads_before_its_input(name):
    model, _ = adapted(name, "prefix")
    mixer = next(mixers(model))
    x = torch.randn(2, 7, mixer.in_proj.in_features, generator=torch.Generator().manual_seed(1))
    found, prefix, mixer.prefix = mixer(x), mixer.prefix, None
    expected = mixer(torch.cat([prefix.expand(2, -1, -1), x], 1))[:, 2:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_what_stands_before_a_text_stands_in_a_row(name):
    """A prompt begins after prefixes, and both after the initial state."""
    model, ids = models.ours(name), models.tokens(1, 9)
    arch = arch_for(model.config)
    for method in ("prompt", "prefix", "initial-state"):
        for parameter in install(model, arch, method, size=3).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    prompt = model.backbone.prompt
    whole = torch.cat([prompt[None], model.backbone.embeddings(ids)], 1)
    found = logits(model, ids)
    model.backbone.prompt = None
    for mixer in mixers(model):
        mixer.start = None
    expected = model(inputs_embeds=whole, use_cache=False).logits[:, 3:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def read_out(seen, mixer, z):
    """What is gated, in float64: the states of the recurrence, to which h' is added only where they are read."""
    scan = seen["scan"]
    heads = scan.x.shape[2] // scan.B.shape[2]
    C = scan.C.repeat_interleave(heads, 2)
    offset = mixer.offset.state
    if mixer.offset.reading is not None:
        offset = offset @ mixer.offset.reading
    offset = offset.view(scan.x.shape[2], -1, C.shape[-1])  # [H, P or 1, N]
    y = torch.stack(
        [((state + offset) * C[:, t, :, None]).sum(-1) for t, state in enumerate(scan.states())], dim=1
    )  # [B, L, H, P]
    y = y + scan.x * mixer.D[:, None]
    return y.flatten(2) * F.silu(z)


@torch.no_grad()
@pytest.mark.parametrize(("name", "form"), [(name, form) for name in ALL for form in forms(name)])
def test_an_offset_is_added_to_the_state_where_it_is_read(name, form):
    model, _ = adapted(name, "state-offset", form)
    model.double()
    use_backend(model, kernels.choose("reference"))
    seen = {}
    mixer = list(mixers(model))[-1]  # which has a scan in all of them
    mixer.taps = lambda module, value: seen.__setitem__(module, value)
    logits(model, models.tokens(2, 17))
    projected = mixer.in_proj(seen["in_proj"])
    z = projected[..., : seen["scan"].x[0, 0].numel()] if name in HEADS else projected.chunk(2, -1)[1]
    found = seen["norm" if name in HEADS else "out_proj"]
    torch.testing.assert_close(found, read_out(seen, mixer, z), rtol=1e-10, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(("name", "method", "form"), cases())
def test_decoding_step_by_step_equals_reading_at_once(name, method, form):
    model, _ = adapted(name, method, form)
    ids, cache, pieces = models.tokens(2, 12), None, []
    for piece in ids.split((1, 1, 4, 1, 1, 1, 3), dim=1):
        out = model(piece, cache_params=cache, use_cache=True)
        cache = out.cache_params
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), logits(model, ids), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("name", "method", "form"), cases())
def test_rows_do_not_depend_on_padding(name, method, form):
    model, _ = adapted(name, method, form)
    rows = [models.tokens(1, length, seed=length)[0] for length in (9, 2, 1)]
    for side in ("left", "right"):
        ids = torch.zeros(3, 9, dtype=torch.long)
        mask = torch.zeros(3, 9, dtype=torch.long)
        for b, row in enumerate(rows):
            where = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
            ids[b, where], mask[b, where] = row, 1
        found = logits(model, ids, attention_mask=mask)
        for b, row in enumerate(rows):
            torch.testing.assert_close(found[b][mask[b].bool()], logits(model, row[None])[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_padded_prompts_go_on_from_their_own_inputs(name):
    model, _ = adapted(name, "conv-state")
    row = models.tokens(1, 2, seed=5)
    ids, mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), row], 1), torch.tensor([[0] * 4 + [1] * 2])
    after = models.tokens(1, 1, seed=6)
    cache = model(ids, attention_mask=mask, use_cache=True).cache_params
    padded = model(after, cache_params=cache, attention_mask=F.pad(mask, (0, 1), value=1), use_cache=True).logits
    cache = model(row, use_cache=True).cache_params
    torch.testing.assert_close(padded, model(after, cache_params=cache, use_cache=True).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_initial_inputs_are_what_the_convolution_read_before(name):
    """Given the inputs and the state that earlier tokens left, a model goes on as after them."""
    model, ids = models.ours(name), models.tokens(1, 20)
    cache = model(ids[:, :8], use_cache=True).cache_params
    expected = model(ids[:, 8:], cache_params=copy.deepcopy(cache), use_cache=True).logits
    for layer, mixer in enumerate(mixers(model)):
        kept = cache.layers[layer]
        mixer.initial_inputs = kept.conv_states[0][0, :, 1:].clone()
        if (state := kept.recurrent_states[0]) is not None:
            mixer.initial_state = state[0].clone()
    torch.testing.assert_close(logits(model, ids[:, 8:]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "method", "form"), cases())
def test_gradients_are_those_of_the_float64_reference(name, method, form):
    model, learned = adapted(name, method, form)
    truth = copy.deepcopy(model).double()
    use_backend(truth, kernels.choose("reference"))
    ids = models.tokens(2, 19)
    for each in (model, truth):
        each(ids, labels=ids, use_cache=False).loss.backward()
    expected = dict(truth.named_parameters())
    for key, parameter in learned.items():
        assert parameter.grad is not None and bool(parameter.grad.any()), key
        error = (parameter.grad - expected[key].grad).norm() / expected[key].grad.norm()
        assert error < 1e-3, key


SHAPES = {  # of the Mamba-1 checkpoints whose counts are known (methods.md 5.6)
    "130m": MambaConfig(hidden_size=768, num_hidden_layers=24, vocab_size=50280),
    "1.4b": MambaConfig(hidden_size=2048, num_hidden_layers=48, vocab_size=50280),
}
COUNTS = {
    ("output-offset", "full", None): (36_864, 196_608),
    ("state-offset", "full", None): (589_824, 3_145_728),
    ("state-offset", "low-rank", 1): (37_248, 197_376),
    ("initial-state", "full", None): (589_824, 3_145_728),
    ("conv-state", "full", None): (110_592, 589_824),
    ("additional-scan", "full", 8): (884_736, 4_718_592),
    ("a-log", "full", None): (589_824, 3_145_728),
    ("bitfit", "full", None): (73_728, 393_216),
    ("full", "full", None): (129_135_360, 1_372_178_432),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", COUNTS)
def test_the_real_shapes_have_the_parameters_that_are_known(shape, case):
    arch = arch_for(SHAPES[shape])
    method, form, rank = case
    learned = install(arch.build("meta"), arch, method, form, rank)
    assert sum(each.numel() for each in learned.values()) == COUNTS[case][list(SHAPES).index(shape)]


def test_an_offset_of_heads_is_a_state_for_each():
    arch = arch_for(Mamba2Config(hidden_size=768, num_hidden_layers=24, num_heads=24, n_groups=1))
    count = {form: install(arch.build("meta"), arch, "state-offset", form, FORMS[form]) for form in FORMS}
    totals = {form: sum(each.numel() for each in learned.values()) for form, learned in count.items()}
    assert totals == {
        "full": 24 * 24 * 64 * 128,
        "low-rank": 24 * 2 * (24 * 64 + 128),
        "per-head": 24 * 24 * 128,
    }


def test_a_family_without_heads_has_no_offset_of_heads():
    model = models.ours("mamba")
    with pytest.raises(UnsupportedError, match="no heads"):
        install(model, arch_for(model.config), "state-offset", "per-head")


def test_a_block_without_a_scan_has_no_state_to_offset():
    model = models.ours("gated-mamba")
    learned = install(model, arch_for(model.config), "state-offset")
    assert [key.split(".")[2] for key in learned] == ["1"]
    assert len(install(models.ours("gated-mamba"), arch_for(model.config), "conv-state")) == 2
