"""Edits: what they do to tensors, that they survive a file, and every way a file can be wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssmcompress import edits
from ssmcompress.edits import HEADER, Forget, Mask, Replace
from ssmcompress.errors import InputError, ResourceError

SHAPES = [(3, 8), (5, 7), (1,), (2, 1, 4), (0, 4), (17,)]


def mask(name="w", shape=(5, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Mask(name, torch.rand(shape, generator=generator) < 0.5)


def forget(name="w", shape=(5, 7), seed=0):
    return Forget(name, mask(name, shape, seed).keep)


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_mask_writes_plus_zero_and_keeps_the_other_bits(dtype):
    tensor = torch.randn(5, 7).to(dtype)
    tensor[0, :4] = torch.tensor([-0.0, torch.nan, -torch.inf, 1e-45])
    before, edit = tensor.clone(), mask()
    edits.apply_edit(edit, tensor)
    assert tensor.dtype == dtype
    assert torch.equal(bits(tensor)[edit.keep], bits(before)[edit.keep])
    assert not bits(tensor)[~edit.keep].any()
    again = tensor.clone()
    edits.apply_edit(edit, again)
    assert torch.equal(bits(again), bits(tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_forgets_becomes_20_in_every_dtype(tmp_path, dtype):
    tensor = torch.randn(5, 7).to(dtype)
    before, edit = tensor.clone(), forget()
    edits.save([edit], tmp_path / "e")
    (loaded,) = edits.load(tmp_path / "e").items
    assert type(loaded) is Forget
    edits.apply_edit(loaded, tensor)
    assert torch.equal(tensor, torch.where(edit.keep, before, torch.tensor(20.0, dtype=dtype)))


def test_a_mask_reaches_parameters_and_views():
    weight = torch.nn.Parameter(torch.ones(7, 5))
    edit = mask()
    edits.apply([edit], {"w": weight.T})
    assert torch.equal(weight.T != 0, edit.keep)


def test_replace_writes_values_in_the_dtype_of_the_tensor():
    tensor = torch.zeros(3, 2, dtype=torch.bfloat16)
    values = torch.randn(3, 2)
    edits.apply_edit(Replace("w", values), tensor)
    assert tensor.dtype == torch.bfloat16
    assert torch.equal(tensor, values.bfloat16())


@pytest.mark.parametrize("order", [1, -1])
def test_new_values_come_before_the_mask_in_whatever_order_they_stand(order):
    values, edit = torch.randn(5, 7), mask()
    state = {"w": torch.ones(5, 7), "other": torch.ones(2)}
    edits.apply([Replace("w", values), edit][::order], state)
    assert torch.equal(state["w"], torch.where(edit.keep, values, 0.0))
    assert torch.equal(state["other"], torch.ones(2))
    assert [type(e) for e in edits.by_tensor([edit, Replace("w", values)])["w"]] == [Replace, Mask]


def test_an_unknown_tensor_is_refused_before_anything_changes():
    state = {"layers.0.w": torch.ones(5, 7)}
    with pytest.raises(InputError, match=r"change layers\.0\.v, which the model does not have") as told:
        edits.apply([mask("layers.0.w"), mask("layers.0.v")], state)
    assert "layers.0.w" in told.value.hint
    assert (state["layers.0.w"] == 1).all()


def test_a_wrong_shape_names_both_and_changes_nothing():
    state = {"v": torch.ones(5, 7), "w": torch.ones(7, 5)}
    with pytest.raises(InputError, match=r"mask of w has the shape \[5, 7\], the tensor \[7, 5\]"):
        edits.apply([mask("v"), mask("w")], state)
    assert (state["v"] == 1).all()
    with pytest.raises(InputError, match=r"replace of w has the shape \[2\], the tensor \[1, 2\]"):
        edits.apply_edit(Replace("w", torch.ones(2)), torch.ones(1, 2))


def test_a_mask_is_boolean():
    with pytest.raises(TypeError, match="boolean"):
        Mask("w", torch.ones(2, 2))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_file_gives_back_what_was_saved(tmp_path, shape):
    saved = [
        mask("a.weight", shape),
        Replace("a.weight", torch.randn(shape).bfloat16()),
        Replace("ü, µ", torch.randn(*shape, 2).double()[..., 1]),
    ]
    words = {"method": "wanda", "note": 'a "quoted" ü', "a": "1", "z": "2"}
    edits.save(saved, tmp_path / "edits.safetensors", words)
    items, metadata = edits.load(tmp_path / "edits.safetensors")
    assert metadata == words
    assert [(type(item), item.tensor) for item in items] == [(type(item), item.tensor) for item in saved]
    for item, original in zip(items, saved, strict=True):
        found, wanted = (e.keep if isinstance(e, Mask) else e.values for e in (item, original))
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


def test_a_mask_takes_a_bit_an_entry(tmp_path):
    edits.save([mask(shape=(33, 31))], tmp_path / "e")
    assert load_file(tmp_path / "e")["mask:w"].shape == (-(-33 * 31 // 8),)


def test_the_same_edits_are_the_same_bytes(tmp_path):
    found = set()
    for attempt in range(8):
        words = {str(key): "x" for key in sorted(range(9), key=lambda key: key * attempt % 9)}
        edits.save([mask("b"), mask("a"), Replace("a", torch.ones(2))], tmp_path / str(attempt), words)
        found.add((tmp_path / str(attempt)).read_bytes())
    assert len(found) == 1


def test_no_edits_are_edits(tmp_path):
    edits.save([], tmp_path / "e")
    assert edits.load(tmp_path / "e") == ((), {})


def test_two_masks_of_one_tensor_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="compose"):
        edits.save([mask(), mask(seed=1)], tmp_path / "e")


def test_composed_steps_do_what_the_steps_do_in_turn():
    steps = [
        [mask("a"), mask("b"), Replace("c", torch.randn(5, 7))],
        [mask("a", seed=1), Replace("b", torch.randn(5, 7)), mask("c", seed=2)],
        [Replace("a", torch.randn(5, 7)), mask("a", seed=3), mask("b", seed=4), mask("c", seed=5), forget("d")],
        [forget("a", seed=6), forget("b", seed=7), forget("d", seed=8)],
        [mask("a", seed=9), Replace("b", torch.randn(5, 7)), forget("c", seed=10), mask("d", seed=11)],
    ]
    for length in range(1, 6):
        start = {name: torch.randn(5, 7) for name in "abcd"}
        in_turn = {name: tensor.clone() for name, tensor in start.items()}
        for step in steps[:length]:
            edits.apply(step, in_turn)
        composed = edits.compose(*steps[:length])
        assert all(len(group) <= 3 for group in edits.by_tensor(composed).values())
        edits.apply(composed, start)
        assert all(torch.equal(start[name], in_turn[name]) for name in start)


def header(*entries, **fields):
    return {HEADER: json.dumps({"version": 1, "edits": entries, "metadata": {}} | fields)}


def entry(kind="mask", tensor="w", shape=(2, 4)):
    return {"kind": kind, "tensor": tensor, "shape": list(shape)}


BYTE = torch.tensor([255], dtype=torch.uint8)
WRONG = {
    "no header": ({"w": BYTE}, {"format": "pt"}, "holds no edits"),
    "no metadata": ({"w": BYTE}, None, "holds no edits"),
    "not JSON": ({}, {HEADER: "{"}, "Invalid JSON"),
    "deep JSON": ({}, {HEADER: "[" * 100_000}, "Invalid JSON"),
    "a list": ({}, {HEADER: "[]"}, "header: "),
    "another version": ({}, header(version=2), "version: "),
    "unknown field": ({}, header(more=1), "more: "),
    "metadata of numbers": ({}, header(metadata={"seed": 1}), "metadata.seed: "),
    "shape of words": ({}, header(entry(shape=("2", 4))), "edits.0.shape.0: "),
    "negative shape": ({}, header(entry(shape=(-2, -4))), "edits.0.shape.0: "),
    "no name": ({}, header(entry(tensor="")), "edits.0.tensor: "),
    "unknown kind": ({"turn:w": BYTE}, header(entry("turn")), "'turn', known are replace, mask, forget, add, keep"),
    "units of nothing": ({"keep:w.1": BYTE}, header(entry("keep", "w.1", (8,))), "about no axis"),
    "no units": ({"keep:layer": BYTE * 0}, header(entry("keep", "layer", (8,))), "keeps nothing"),
    "array missing": ({}, header(entry()), "differ .mask:w"),
    "array too many": ({"mask:w": BYTE, "x": BYTE.clone()}, header(entry()), "differ .x"),
    "listed twice": ({"mask:w": BYTE}, header(entry(), entry()), "listed twice"),
    "too few bits": ({"mask:w": BYTE}, header(entry(shape=(3, 4))), r"mask of w: the shape \[3, 4\] takes \[2\]"),
    "too many bits": ({"mask:w": BYTE.repeat(2)}, header(entry()), r"takes \[1\] of torch.uint8 in bits, found \[2\]"),
    "bits without end": ({"mask:w": BYTE}, header(entry(shape=(2**62, 2**62))), "takes"),
    "bits of another dtype": ({"mask:w": BYTE.int()}, header(entry()), "found .1. of torch.int32"),
    "bits in two dimensions": ({"mask:w": BYTE[None]}, header(entry()), r"found \[1, 1\]"),
    "bits behind the end": ({"mask:w": BYTE}, header(entry(shape=(7,))), "behind its last entry"),
    "values of another shape": (
        {"replace:w": torch.ones(4, 2)},
        header(entry("replace")),
        r"replace of w: its values have the shape \[4, 2\], its header says \[2, 4\]",
    ),
    "values that are integers": ({"replace:w": torch.ones(2, 4).int()}, header(entry("replace")), "not floating"),
    "values that are not finite": ({"replace:w": torch.full((2, 4), torch.nan)}, header(entry("replace")), "finite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_is_not_sound_is_refused_in_a_sentence(tmp_path, case):
    tensors, metadata, sentence = WRONG[case]
    save_file(tensors, tmp_path / "e.safetensors", metadata)
    with pytest.raises(InputError, match=sentence) as told:
        edits.load(tmp_path / "e.safetensors")
    assert "e.safetensors" in told.value.message
    assert told.value.hint


def test_a_file_that_is_not_there_and_one_that_is_no_safetensors(tmp_path):
    with pytest.raises(InputError, match="There is no edits file"):
        edits.load(tmp_path / "e")
    with pytest.raises(InputError, match="There is no edits file"):
        edits.load(tmp_path)
    for content in (b"", b"hello", b"\x80\x04K\x01."):
        (tmp_path / "e").write_bytes(content)
        with pytest.raises(InputError, match="not a sound edits file"):
            edits.load(tmp_path / "e")


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(ResourceError, match="cannot be written"):
        edits.save([mask()], tmp_path / "no" / "folder")
