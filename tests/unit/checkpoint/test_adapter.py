"""Adapters: what they compute is what plain PEFT computes; those of another model, or damaged, are refused."""

import sys

import pytest
import torch

from ssmcompress.checkpoint.source import load, state_dict
from ssmcompress.errors import BackendError, InputError, UnsupportedError
from tests.unit.arch.models import ours, stock, tokens
from tests.unit.checkpoint import adapters, folders

IDS = tokens(2, 19)
EVERY = ("mamba", "mamba-biased", "falcon_mamba", "mamba2", "mamba2-grouped")


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def same(found, expected):
    return (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture(params=[(name, "in_proj") for name in EVERY] + [(n, "x_proj") for n in EVERY if "mamba2" not in n])
def case(request, tmp_path):
    name, target = request.param
    return folders.save(name, tmp_path / "model"), target


def loaded(tmp_path, **options):
    return load(str(tmp_path / "model"), adapter=tmp_path / "lora", **{"dtype": torch.float32} | options)


def test_the_logits_are_those_of_plain_peft(case, tmp_path):
    model, target = case
    expected = logits(adapters.made(model, tmp_path / "lora", target))
    assert not same(logits(model), expected)
    assert same(logits(loaded(tmp_path).model), expected)


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (("in_proj",), {"use_rslora": True}),
        (("in_proj", "x_proj"), {"rank_pattern": {"x_proj": 2}, "alpha_pattern": {"layers.1.mixer.in_proj": 9}}),
        (("in_proj",), {"modules_to_save": ["norm_f", "lm_head"]}),
        (("in_proj",), {"modules_to_save": ["norm", "embeddings"]}),
        (("in_proj",), {"layers_to_transform": [1], "layers_pattern": "layers"}),
        (("in_proj",), {"use_dora": True}),
        (("in_proj",), {"bias": "all"}),
        ((), {"target_modules": r".*\.0\..*in_proj"}),
        (("embeddings",), {}),
        (("lm_head",), {}),
        (("in_proj", "embeddings", "lm_head"), {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False])
def test_so_they_are_with_all_that_peft_can_do(tmp_path, targets, options, tied):
    model = stock(ours("mamba")) if tied else untied(stock(ours("mamba")))
    model.save_pretrained(tmp_path / "model")
    expected = logits(adapters.made(model, tmp_path / "lora", *targets, **options))
    assert not same(logits(model), expected)
    found = loaded(tmp_path)
    assert same(logits(found.model), expected)
    assert all(parameter.requires_grad for parameter in found.model.parameters())
    assert ("lm_head.weight" in state_dict(found.model)) == (not found.model.config.tie_word_embeddings)


def untied(model):
    config = type(model.config)(**model.config.to_dict() | {"tie_word_embeddings": False})
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    return other


@pytest.mark.parametrize(
    ("name", "target", "by"),
    [
        ("mamba", "dt_proj", {"target_modules": ["dt_proj"]}),
        ("mamba", "dt_proj", {"target_modules": [], "target_parameters": ["dt_proj.weight"]}),
        ("mamba", "out_proj", {"target_modules": ["out_proj"]}),
        ("mamba2", "out_proj", {"target_modules": ["out_proj"]}),
    ],
)
def test_weights_that_plain_peft_passes_by_are_adapted_too(tmp_path, name, target, by):
    """Stock mixers read dt_proj past PEFT's wrapper, and out_proj it refuses: the truth is the sum itself."""
    model = stock(ours(name))
    draw, tensors = torch.Generator().manual_seed(0), {}
    for path, parameter in model.named_parameters():
        if "in_proj" in path or "x_proj" in path:  # else every step is as small as dt_proj's bias makes it
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
    model.save_pretrained(tmp_path / "model")
    before = logits(model)
    for path, module in model.named_modules():
        if path.endswith(target):
            B, A = (
                torch.randn(*shape, generator=draw)
                for shape in ((module.weight.shape[0], 2), (2, module.weight.shape[1]))
            )
            tensors |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
            module.weight.data += 5 / 2 * B @ A
    adapters.written(tmp_path / "lora", tensors, r=2, **by)
    assert not same(before, logits(model))
    assert same(logits(loaded(tmp_path).model), logits(model))


def test_pruned_shapes_take_adapters_of_their_sizes(tmp_path):
    model = folders.save("mamba2", tmp_path / "dense")
    adapters.made(model, tmp_path / "lora", "in_proj")
    small = stock(ours("pruned-mamba2"))
    small.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"in_proj.lora_B.weight in .* has shape \[168, 3\]; .* ask for \[\d+, 3\]"):
        loaded(tmp_path)
    expected = logits(adapters.made(small, tmp_path / "lora", "in_proj", "out_proj"))
    assert same(logits(loaded(tmp_path).model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"])
def test_zero_changes_nothing(tmp_path, dtype):
    model = folders.save("mamba", tmp_path / "model")
    folders.narrow(tmp_path / "model")
    adapters.made(model, tmp_path / "lora", "in_proj", "embeddings")
    stored = adapters.load_file(tmp_path / "lora" / adapters.WEIGHTS)
    zero = {n.removeprefix("base_model.model."): t * ("lora_B" not in n and "_B" not in n) for n, t in stored.items()}
    adapters.change(tmp_path / "lora", **{name.replace(".", "__"): tensor for name, tensor in zero.items()})
    plain, adapted = load(str(tmp_path / "model"), dtype=dtype), loaded(tmp_path, dtype=dtype)
    before, after = state_dict(plain.model), state_dict(adapted.model)
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert torch.equal(logits(plain.model), logits(adapted.model))


def test_a_narrow_model_keeps_its_dtypes(tmp_path):
    model = folders.save("mamba", tmp_path / "model")
    stored = folders.narrow(tmp_path / "model")
    adapters.made(model, tmp_path / "lora", "in_proj", modules_to_save=["norm_f", "dt_proj"])
    found = state_dict(loaded(tmp_path, dtype="auto").model)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        n: t.dtype for n, t in stored.items() if n in found
    }
    wide = state_dict(loaded(tmp_path).model)
    assert all((found[name].float() - wide[name]).abs().max() <= 2**-7 * wide[name].abs().max() for name in found)


@pytest.fixture
def lora(tmp_path):
    """The folder of an adapter of in_proj and x_proj, beside the model that it belongs to."""
    model = folders.save("mamba", tmp_path / "model")
    adapters.made(model, tmp_path / "lora", "in_proj", "x_proj")
    return tmp_path / "lora"


def test_it_is_named_without_its_path(lora, tmp_path):
    found = loaded(tmp_path)
    assert (found.name, found.label) == (f"{tmp_path / 'model'} + {lora}", "model + lora")
    assert load(str(tmp_path / "model")).label == "model"


def test_nothing_that_it_says_is_run(lora, tmp_path, monkeypatch):
    expected = logits(loaded(tmp_path).model)
    (tmp_path / "hostile.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    mapping = {"base_model_class": "X", "parent_library": "hostile"}
    folders.edit_json(
        lora / adapters.CONFIG, auto_mapping=mapping, megatron_core="hostile", runtime_config={"a": 1}, of_tomorrow=3
    )
    assert torch.equal(logits(loaded(tmp_path).model), expected) and "hostile" not in sys.modules


IN_PROJ = "backbone__layers__0__mixer__in_proj__lora_A__weight"


@pytest.mark.parametrize(
    ("spoil", "said", "hint"),
    [
        (lambda path: path.rename(path.with_name("moved")), "lora is not there", "--adapter takes a folder"),
        (lambda path: (path / adapters.CONFIG).unlink(), "has no adapter_config.json", "--adapter takes"),
        (lambda path: (path / adapters.WEIGHTS).unlink(), "has no adapter_model.safetensors.", "--adapter takes"),
        (lambda path: (path / adapters.WEIGHTS).rename(path / "adapter_model.bin"), "may run code", "safetensors"),
        (lambda path: truncate(path / adapters.WEIGHTS), "not a readable safetensors file", "again"),
        (lambda path: (path / adapters.CONFIG).write_text("{"), "not valid JSON", "again"),
        (lambda path: configure(path, peft_type=None), "has no peft_type", "--adapter takes"),
        (lambda path: configure(path, r="3"), "r: Input should be a valid integer", ""),
        (lambda path: configure(path, lora_alpha=float("nan")), "lora_alpha: Input should be a finite number", ""),
        (lambda path: configure(path, r=4), r"has shape \[3, 32\]; .* ask for \[4, 32\]", "another model"),
        (lambda path: configure(path, r=4, base_model_name_or_path="hub/base"), "has shape", "made for hub/base."),
        (lambda path: configure(path, target_modules=["in_proj"]), "holds .*x_proj.* says nothing", "made for"),
        (lambda path: configure(path, target_modules=["in_proj", "x_proj", "dt_proj"]), "lacks .*dt_proj", "made for"),
        (lambda path: adapters.change(path, **{IN_PROJ: None}), "lacks .*in_proj.lora_A", "made for"),
        (lambda path: adapters.change(path, **{IN_PROJ: torch.full((3, 32), torch.nan)}), "96 values", "damaged"),
        (
            lambda path: adapters.change(path, backbone__layers__2__mixer__in_proj__lora_A__weight=torch.ones(3, 32)),
            "adapts layer 2; the model has 2",
            "made for",
        ),
        (
            lambda path: adapters.change(path, backbone__layers__0__mixer__in_prj__lora_A__weight=torch.ones(3, 32)),
            "adapts backbone.layers.0.mixer.in_prj",
            "Did you mean 'in_proj'",
        ),
        (
            lambda path: adapters.change(path, model__layers__0__q_proj__lora_A__weight=torch.ones(3, 32)),
            "q_proj, which a mamba model does not have",
            "made for",
        ),
    ],
)
def test_what_is_wrong_is_said(lora, tmp_path, spoil, said, hint):
    spoil(lora)
    with pytest.raises(InputError, match=said) as told:
        loaded(tmp_path)
    assert hint in told.value.hint


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def configure(path, **changes):
    folders.edit_json(path / adapters.CONFIG, **changes)


@pytest.mark.parametrize(
    ("changes", "said", "hint"),
    [
        ({"peft_type": "LORE"}, "'LORE', which is not supported", "Did you mean 'LORA'"),
        ({"peft_type": "PREFIX_TUNING"}, "'PREFIX_TUNING', which is not supported", "Supported: LORA"),
        ({"layer_replication": [[0, 2]]}, "sets layer_replication", "plain LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which also changes the weights", "conversion"),
        ({"target_modules": "("}, "PEFT cannot put the adapter", "other modules"),
    ],
)
def test_what_is_not_supported_is_said(lora, tmp_path, changes, said, hint):
    configure(lora, **changes)
    with pytest.raises(UnsupportedError, match=said) as told:
        loaded(tmp_path)
    assert hint in told.value.hint


def test_a_short_convolution_is_not_merged(tmp_path):
    """PEFT's factors of a convolution by channels are no sum to its weight."""
    folders.save("mamba", tmp_path / "model")
    tensors = {
        f"backbone.layers.{layer}.mixer.conv1d.lora_{side}.weight": torch.ones(shape)
        for layer in range(2)
        for side, shape in (("A", (64, 64, 4)), ("B", (64, 1, 1)))
    }
    adapters.written(tmp_path / "lora", tensors, r=64, target_modules=["conv1d"])
    with pytest.raises(UnsupportedError, match="PEFT cannot put the adapter"):
        loaded(tmp_path)


def test_sums_that_overflow_are_refused(lora, tmp_path):
    adapters.change(lora, **{IN_PROJ: torch.full((3, 32), 3e38)})
    with pytest.raises(InputError, match="too large"):
        loaded(tmp_path)


@pytest.mark.parametrize("name", ["mamba2", "falcon_mamba"])
def test_an_adapter_of_another_family_is_refused(lora, tmp_path, name):
    stock(ours(name)).save_pretrained(tmp_path / "other")
    if name == "falcon_mamba":  # the same modules, and x_proj of another state
        with pytest.raises(InputError, match="x_proj"):
            load(str(tmp_path / "other"), adapter=lora)
    else:
        with pytest.raises(InputError, match="x_proj, which a mamba2 model does not have"):
            load(str(tmp_path / "other"), adapter=lora)


def test_a_folder_of_the_wrong_kind_is_told(lora, tmp_path):
    with pytest.raises(InputError, match="has no adapter_config") as told:
        load(str(tmp_path / "model"), adapter=tmp_path / "model")
    assert "give it as MODEL" in told.value.hint
    with pytest.raises(InputError, match=r"has no config\.json") as told:
        load(str(lora))
    assert "--adapter" in told.value.hint
    with pytest.raises(InputError, match="is a file"):
        load(str(tmp_path / "model"), adapter=lora / adapters.CONFIG)


def test_without_peft_it_is_said_how_to_get_it(lora, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BackendError, match="needs the package peft") as told:
        loaded(tmp_path)
    assert "ssmcompress[tune]" in told.value.hint
    load(str(tmp_path / "model"))
