"""Folders of models whose blocks differ in size: written, loaded by us and, without this package, by transformers."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from ssmcompress.arch.pruned import CODE
from ssmcompress.arch.registry import arch_for
from ssmcompress.checkpoint import card, manifest
from ssmcompress.checkpoint.convert import convert
from ssmcompress.checkpoint.output import write
from ssmcompress.checkpoint.source import Checkpoint, Source, load
from ssmcompress.checkpoint.verify import verify
from ssmcompress.errors import InputError, ResourceError, SsmcompressError, UnsupportedError
from tests.unit.arch.models import PRUNED, ours, tokens
from tests.unit.arch.test_pruned import DAMAGED, damage
from tests.unit.checkpoint.folders import edit_json, save_tokenizer

ELSEWHERE = """
import sys, torch
sys.modules["ssmcompress"] = None  # whoever imports it fails
from transformers import AutoModelForCausalLM, AutoTokenizer
ids, folders = torch.load(sys.argv[1], weights_only=True), sys.argv[2:]
for folder in folders:
    model, told = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    assert len(AutoTokenizer.from_pretrained(folder, trust_remote_code=True)) == 61
    steps = []
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        whole = model(ids[:, :7], use_cache=True)
        for t in range(7, ids.shape[1]):
            whole = model(ids[:, t : t + 1], cache_params=whole.cache_params, use_cache=True)
            steps.append(whole.logits)
    written = model.generate(ids[:, :5], max_new_tokens=12, do_sample=False, pad_token_id=0)
    model.save_pretrained(folder + "-again")
    torch.save({"logits": logits, "steps": torch.cat(steps, 1), "written": written}, folder + "-told.pt")
"""


def put(name: str, folder: Path) -> Checkpoint:
    """Writes a random model as a run does, with a tokenizer beside it."""
    model, origin = ours(name), folder.with_name("origin")
    origin.mkdir(exist_ok=True)
    save_tokenizer(origin)
    folder.mkdir()
    checkpoint = Checkpoint(model, None, arch_for(model.config), Source(name, origin, "hf"), None)  # type: ignore[arg-type]
    write(checkpoint, folder)
    return checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of every pruned configuration, by its name."""
    written = {name: tmp_path_factory.mktemp("pruned") / name for name in PRUNED}
    for name, folder in written.items():
        put(name, folder)
    return written


@pytest.fixture(params=PRUNED)
def folder(request, folders):
    """One of them."""
    return folders[request.param]


@pytest.fixture(scope="module")
def elsewhere(folders, tmp_path_factory):
    """What a process from another place, which has no ssmcompress, makes of each: it lies beside the folder."""
    root = tmp_path_factory.mktemp("elsewhere")
    torch.save(tokens(2, 23), root / "ids.pt")
    command = [sys.executable, "-c", ELSEWHERE, str(root / "ids.pt"), *map(str, folders.values())]
    done = subprocess.run(command, cwd=root, env=_bare(root), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_it_loads_with_us_as_it_was(folder):
    loaded, model, ids = load(str(folder)), ours(folder.name), tokens(2, 23)
    assert loaded.arch.sizes == arch_for(PRUNED[folder.name]).sizes and loaded.tokenizer is not None
    assert not hasattr(loaded.model.config, "auto_map")
    assert torch.equal(loaded.model(ids).logits, model(ids).logits)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.model.state_dict().items())


def test_it_loads_without_us(folder, elsewhere):
    """Logits, steps and written tokens are ours."""
    ids, found = tokens(2, 23), torch.load(f"{folder}-told.pt", weights_only=True)
    model = load(str(folder)).model
    with torch.no_grad():
        logits = model(ids).logits
    scale = logits.abs().max()
    assert (found["logits"] - logits).abs().max() <= 1e-5 * scale
    assert (found["steps"] - logits[:, 7:]).abs().max() <= 1e-5 * scale
    written = model.generate(ids[:, :5], max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(found["written"], written)
    again = load(str(folder) + "-again")  # what save_pretrained makes of it is still a checkpoint
    assert again.arch.sizes == arch_for(PRUNED[folder.name]).sizes


def _bare(folder: Path) -> dict[str, str]:
    return {"PATH": "", "HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def test_both_loaders_are_asked_and_the_card_says_how(folder):
    model = load(str(folder)).model
    verified = verify(folder, model)
    assert verified.loaders == ("transformers", "ssmcompress") and verified.trust_remote_code
    assert verified.ssmcompress == 0 and verified.transformers is not None and verified.transformers < 1e-5
    source = Source("it", folder, "hf")
    made = manifest.write(folder, verb="prune", source=source, verification=verified)
    assert manifest.read(folder).verification.trust_remote_code and CODE.name in made.files
    card.write(folder, title="It", summary="", manifest=made)
    text = (folder / "README.md").read_text()
    assert text.count('from_pretrained("FOLDER", trust_remote_code=True)') == 2 and CODE.name in text
    for extra in ("README.md", "ssmcompress.json"):
        (folder / extra).unlink()


@pytest.mark.parametrize("name", ["pruned-mamba", "pruned-mamba2"])
def test_config_and_code_lie_beside_the_weights(name, tmp_path):
    put(name, tmp_path / "out")
    assert (tmp_path / "out" / CODE.name).read_bytes() == CODE.read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    kind = type(PRUNED[name]).__name__
    assert config["auto_map"] == {
        "AutoConfig": f"modeling_ssmcompress.{kind}",
        "AutoModelForCausalLM": f"modeling_ssmcompress.{kind.replace('Config', 'ForCausalLM')}",
    }
    assert config["architectures"] == [kind.replace("Config", "ForCausalLM")]
    assert config["block_sizes"] == PRUNED[name].block_sizes and config["dtype"] == "float32"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)) == 61


def test_without_trust_transformers_refuses_it(tmp_path):
    put("pruned-mamba", tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=False)


def test_no_code_in_a_folder_is_run_or_passed_on(tmp_path):
    put("pruned-mamba2", tmp_path / "in")
    (tmp_path / "in" / CODE.name).write_text("raise SystemExit('it ran')\n")
    edit_json(tmp_path / "in" / "config.json", auto_map={"AutoConfig": "modeling_ssmcompress.PrunedMamba2Config"})
    (tmp_path / "out").mkdir()
    checkpoint = load(str(tmp_path / "in"))
    write(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / CODE.name).read_bytes() == CODE.read_bytes()
    with pytest.raises(SsmcompressError, match=r"modeling_ssmcompress\.py is not as this version"):
        verify(tmp_path / "in", checkpoint.model)


def test_another_code_is_not_run_by_verify(tmp_path):
    """Not even where config.json names it and ours lies there too."""
    put("pruned-mamba2", tmp_path / "in")
    (tmp_path / "in" / "other.py").write_text("raise SystemExit('it ran')\n")
    edit_json(tmp_path / "in" / "config.json", auto_map={"AutoConfig": "other.PrunedMamba2Config"})
    with pytest.raises(SsmcompressError, match="auto_map"):
        verify(tmp_path / "in", load(str(tmp_path / "in")).model)


@pytest.mark.parametrize("name", ["pruned-mamba", "pruned-mamba2-grouped"])
@pytest.mark.parametrize(("change", "message"), DAMAGED)
def test_damaged_block_sizes_are_refused(name, change, message, tmp_path):
    put(name, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()), change)))
    with pytest.raises(InputError, match=message) as caught:
        load(str(tmp_path / "out"))
    assert str(path) in caught.value.message and "\n" not in caught.value.message


def test_missing_block_sizes_and_sizes_of_other_weights_are_refused(tmp_path):
    put("pruned-mamba", tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in whole.items() if key != "block_sizes"}))
    with pytest.raises(InputError, match="block_sizes is None; expected a list of 2"):
        load(str(tmp_path / "out"))
    path.write_text(json.dumps(damage(whole, {"state": 4})))
    with pytest.raises(InputError, match=r"layers\.1\.mixer\.A_log .* has shape \[37, 5\]"):
        load(str(tmp_path / "out"))
    path.write_text(json.dumps(whole | {"out_proj_bias": False}))
    with pytest.raises(InputError, match=r"out_proj\.bias"):
        load(str(tmp_path / "out"))


def test_a_place_for_code_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(name):
        raise PermissionError(13, "Permission denied", "/home/nobody/modules")

    checkpoint = put("pruned-mamba", tmp_path / "out")
    monkeypatch.setattr("transformers.dynamic_module_utils.create_dynamic_module", refuse)
    with pytest.raises(ResourceError, match="/home/nobody/modules") as caught:
        verify(tmp_path / "out", checkpoint.model)
    assert "HF_MODULES_CACHE" in caught.value.hint


def test_the_tokenizer_is_found_without_a_word(tmp_path, caplog):
    put("pruned-mamba", tmp_path / "out")
    transformers_log = logging.getLogger("transformers")
    transformers_log.addHandler(caplog.handler)
    try:
        assert len(load(str(tmp_path / "out")).tokenizer) == 61
    finally:
        transformers_log.removeHandler(caplog.handler)
    assert not caplog.records


def test_mixed_dtypes_stay(tmp_path):
    put("pruned-mamba2", tmp_path / "in")
    weights = tmp_path / "in" / "model.safetensors"
    state = {
        name: tensor if name.endswith(("A_log", "D", "dt_bias")) else tensor.bfloat16()
        for name, tensor in load_file(weights).items()
    }
    save_file(state, weights, metadata={"format": "pt"})
    checkpoint = load(str(tmp_path / "in"))
    (tmp_path / "out").mkdir()
    write(checkpoint, tmp_path / "out")
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(again[name], state[name]) and again[name].dtype == state[name].dtype for name in state)
    assert verify(tmp_path / "out", checkpoint.model).transformers < 1e-5


def test_convert(tmp_path):
    put("pruned-mamba", tmp_path / "in")
    with pytest.raises(UnsupportedError, match="no layout for the model type 'ssmcompress_mamba'") as caught:
        convert(str(tmp_path / "in"), to="mamba-ssm", out=tmp_path / "original")
    assert caught.value.exit_code == 3 and "Hugging Face layout" in caught.value.hint
    assert not (tmp_path / "original").exists()
    convert(str(tmp_path / "in"), to="hf", out=tmp_path / "hf")
    assert manifest.read(tmp_path / "hf").verification.trust_remote_code
    assert (tmp_path / "hf" / CODE.name).exists() and manifest.changed(tmp_path / "hf") == []
