"""State tuning from the verb to the adapter's folder, and what the other verbs make of it."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, MambaConfig, TrainerCallback
from transformers.integrations import integration_utils

import ssmcompress
from ssmcompress.arch.registry import arch_for
from ssmcompress.checkpoint.source import load
from ssmcompress.cli import main
from ssmcompress.errors import BackendError, InputError, RecipeError, UnsupportedError
from ssmcompress.tune import sdt
from ssmcompress.tune.lora import wrap
from ssmcompress.tuning import TuneState

IDS = torch.arange(5, 45)[None]
KEYS = ("red", "blue", "green", "small", "large", "old", "new", "warm", "cold")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, first in (("train", 0), ("test", 60)):
        rows = [
            {"prompt": f"The {KEYS[i % 9]} {KEYS[i // 9 % 9]} house {i} is", "completion": f" {KEYS[-i % 9]}."}
            for i in range(first, first + 60)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tuned(data: Path, out: Path, model: str = "ref:mamba", **options: object) -> Path:
    ssmcompress.tune_state(model, data=str(data / "train.jsonl"), out=out, **{"steps": 4, "every": 2} | options)
    return out


@torch.no_grad()
def logits(model: str | Path, adapter: Path | tuple[()] = ()) -> torch.Tensor:
    return load(str(model), adapter=adapter, dtype=torch.float32).model(IDS, use_cache=False).logits


@pytest.mark.parametrize("model", ["ref:mamba", "ref:mamba2"])
def test_the_folder_holds_an_adapter_that_changes_the_model(data: Path, tmp_path: Path, model: str) -> None:
    made = ssmcompress.tune_state(
        model, data=str(data / "train.jsonl"), test=str(data / "test.jsonl"), out=tmp_path / "a", steps=8, every=4
    )
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("STATE_OFFSET", model)
    assert made.change.split == "test" and made.change.difference[2] < 0  # they became likelier, surely
    assert made.tuning.examples == {"train": 57, "valid": 3, "test": 60, "skipped": 0}
    assert not torch.equal(logits(model, tmp_path / "a"), logits(model))
    record = json.loads((tmp_path / "a" / "tuning.json").read_text())
    assert record["trainable"] == sum(torch.Size(shape).numel() for shape in record["tensors"].values())
    card = (tmp_path / "a" / "README.md").read_text()
    assert f"{record['trainable']:,} parameters" in card and f'load("{model}", adapter="FOLDER")' in card
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "events.jsonl",
        "measured.json",
        "recipe.yaml",
        "tuning.json",
    ]


@pytest.mark.parametrize("method", ["state-offset", "prompt", "lora", "full"])
def test_the_same_run_writes_the_same_bytes(data: Path, tmp_path: Path, method: str) -> None:
    first, second = (tuned(data, tmp_path / name, method=method, steps=2) for name in ("a", "b"))
    for name in ("adapter_config.json", "adapter_model.safetensors", "tuning.json", "recipe.yaml"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_lora_is_what_plain_peft_reads(data: Path, tmp_path: Path) -> None:
    out = tuned(data, tmp_path / "a", method="lora", targets=("in_proj", "x_proj"), rank=3, alpha=5.0)
    ssmcompress.convert("ref:mamba", to="hf", out=tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        theirs = PeftModel.from_pretrained(stock, out)(IDS, use_cache=False).logits
    torch.testing.assert_close(logits("ref:mamba", out), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rank", "targets", "expected"),
    [
        (8, ("dt_proj", "x_proj"), (614_400, 3_256_320)),
        (8, ("in_proj", "out_proj"), (1_179_648, 6_291_456)),
        (8, (), (1_794_048, 9_547_776)),
        (2, ("out_proj", "x_proj", "dt_proj"), (264_192, 1_403_904)),
        (3, ("out_proj", "x_proj"), (282_240, 1_497_600)),
        (5, ("out_proj", "dt_proj"), (466_560, 2_488_320)),
    ],
)
def test_lora_has_the_parameters_that_are_known(rank: int, targets: tuple[str, ...], expected: tuple[int, int]) -> None:
    for (width, layers), count in zip(((768, 24), (2048, 48)), expected, strict=True):
        arch = arch_for(MambaConfig(hidden_size=width, num_hidden_layers=layers, vocab_size=50280))
        learned, _ = wrap(arch.build("meta"), arch, TuneState(method="lora", data="-", rank=rank, targets=targets))
        assert sum(each.numel() for each in learned.values()) == count


@pytest.mark.parametrize("method", ["prefix", "additional-scan"])
def test_eval_and_generate_take_it(data: Path, tmp_path: Path, method: str) -> None:
    out = tuned(data, tmp_path / "a", method=method)
    summary = ssmcompress.evaluate("ref:mamba", adapter=out, recall=True, out=tmp_path / "results")
    assert summary.adapter == "a"
    found = ssmcompress.generate("ref:mamba", adapter=out, prompt="The red house is", max_new_tokens=4)
    assert found[0].text
    assert "adapter" in (tmp_path / "results" / "summary.json").read_text()


def test_adapters_stand_one_on_another(data: Path, tmp_path: Path) -> None:
    first = tuned(data, tmp_path / "lora", method="lora", targets=("in_proj",))
    second = tuned(data, tmp_path / "offset", adapter=first)
    config = json.loads((second / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "ref:mamba + lora"
    checkpoint = load("ref:mamba", adapter=[first, second], dtype=torch.float32)
    assert checkpoint.label == "ref:mamba + lora + offset"
    apart = [logits("ref:mamba", each) for each in (first, second)]
    with torch.no_grad():
        both = checkpoint.model(IDS, use_cache=False).logits
    assert not any(torch.equal(both, each) for each in apart)
    summary = ssmcompress.evaluate("ref:mamba", adapter=[first, second], recall=True, out=tmp_path / "results")
    assert summary.adapter == "lora + offset"
    assert len(summary.model_sha256) == 5
    with pytest.raises(UnsupportedError, match="There is an adapter"):
        load("ref:mamba", adapter=[second, second])


def test_a_pruned_model_is_repaired_by_its_dense_one(data: Path, tmp_path: Path) -> None:
    ssmcompress.prune("ref:mamba", method="magnitude", sparsity=0.6, out=tmp_path / "pruned", no_eval=True)
    out = tuned(data, tmp_path / "a", str(tmp_path / "pruned"), method="full", objective="distill", hidden=0.1)
    weight = "backbone.layers.2.mixer.in_proj.weight"
    before, after = (load(str(tmp_path / "pruned"), adapter=each).model.get_parameter(weight) for each in ((), out))
    assert not torch.equal(before, after)
    assert torch.equal(before == 0, after == 0)  # what is pruned stays so
    assert json.loads((out / "tuning.json").read_text())["base"]["name"] == "pruned"


def test_an_adapter_of_another_model_says_what_differs(data: Path, tmp_path: Path) -> None:
    out = tuned(data, tmp_path / "a", steps=1)
    with pytest.raises(InputError, match=r"offset.state in .* has shape \[512, 16\]") as error:
        load("ref:mamba2", adapter=out)
    assert "made for ref:mamba" in error.value.hint
    ssmcompress.prune("ref:mamba", axis="layer", keep=4, method="random", out=tmp_path / "short", no_eval=True)
    with pytest.raises(InputError, match=r"adapts layer 4; the model has 4"):
        load(str(tmp_path / "short"), adapter=out)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"form": "low-rank"}, "r as None, .* in the form low-rank has r alone"),
        ({"form": "round"}, "form: "),
        ({"r": 2}, "r as 2, .* in the form full has none of them"),
        ({"peft_type": "PREFIX"}, "num_virtual_tokens as None, .* has num_virtual_tokens alone"),
        ({"peft_type": "ADDITIONAL_SCAN", "states": 0}, "states: "),
        ({"peft_type": "STATE_OFSET"}, "STATE_OFSET"),
        ({"peft_type": "OUTPUT_OFFSET"}, "lacks .*output"),
    ],
)
def test_a_damaged_config_is_named(data: Path, tmp_path: Path, change: dict[str, object], words: str) -> None:
    out = tuned(data, tmp_path / "a", steps=1)
    config = json.loads((out / "adapter_config.json").read_text()) | change
    (out / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises((InputError, UnsupportedError), match=words):
        load("ref:mamba", adapter=out)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"method": "state-ofset"}, RecipeError, "did you mean 'state-offset'"),
        ({"rank": 2}, RecipeError, "rank has no meaning with the method state-offset: it is for lora, sdt, low-rank"),
        ({"method": "prefix", "states": 2}, RecipeError, "states has no meaning .*: it is for additional-scan"),
        ({"method": "lora", "form": "full"}, RecipeError, "form has no meaning with the method lora"),
        ({"method": "bitfit", "targets": ("in_proj",)}, RecipeError, "targets has no meaning"),
        ({"teacher": "ref:mamba"}, RecipeError, "no meaning without the objective distill"),
        ({"prompt": "{a}"}, RecipeError, "needs one of the completion"),
        ({"completion": "{a!r}"}, RecipeError, "names columns as"),
        ({"completion": "{a.b}"}, RecipeError, "names columns as"),
        ({"steps": 0}, RecipeError, "--steps"),
        ({"lr": float("nan")}, RecipeError, "--lr"),
        ({"stepz": 3}, RecipeError, "Did you mean 'steps'|no option"),
        ({"form": "per-head"}, UnsupportedError, "no heads"),
        ({"method": "lora", "targets": ("conv1d",)}, UnsupportedError, "cannot be trained on conv1d"),
        ({"method": "bitfit", "dtype": "bfloat16"}, UnsupportedError, "too coarse"),
        ({"objective": "distill", "teacher": "./nowhere"}, InputError, "The teacher cannot be loaded"),
        ({"length": 3}, InputError, "all 60 are longer than 3"),
        ({"lr": 1e9, "method": "full"}, InputError, "The loss is"),
        ({"seed": -1}, InputError, "seed"),
    ],
)
def test_odd_requests_are_refused_and_nothing_is_written(
    data: Path, tmp_path: Path, options: dict[str, object], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        tuned(data, tmp_path / "a", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_tells_what_is_learned(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = ["tune-state", "ref:mamba2", "--data", str(data / "train.jsonl"), "--out", str(tmp_path / "a")]
    more = ["--method", "state-offset", "--form", "per-head", "--steps", "2", "--every", "1", "--batch-size", "4"]
    with pytest.raises(SystemExit) as end:
        main([*given, *more])
    told = capsys.readouterr()
    assert not end.value.code
    assert "state-offset: 3,072 parameters, 0.084%, in 6 of 6 layers" in told.err.replace("\n", " ")
    assert "bits per byte" in told.out and "written:" in told.out
    with pytest.raises(SystemExit) as end:
        main([*given, *more])
    assert end.value.code == 2
    assert "exists already" in capsys.readouterr().err


def test_what_is_in_bfloat16_stays_so_and_what_is_learned_does_not(data: Path, tmp_path: Path) -> None:
    out = tuned(data, tmp_path / "a", dtype="bfloat16")
    model = load("ref:mamba", adapter=out, dtype=torch.bfloat16).model
    assert model.get_parameter("backbone.layers.0.mixer.in_proj.weight").dtype == torch.bfloat16
    assert model.get_parameter("backbone.layers.0.mixer.offset.state").dtype == torch.float32


def test_sdt_changes_the_entries_that_it_chose_and_no_others(data: Path, tmp_path: Path) -> None:
    options = {"method": "sdt", "sdt_channels": 0.02, "sdt_states": 0.2, "warm_up": 2, "rank": 2, "lr": 0.01}
    out, again = (tuned(data, tmp_path / name, **options) for name in ("a", "b"))
    for name in ("adapter_config.json", "adapter_model.safetensors", "tuning.json"):
        assert (out / name).read_bytes() == (again / name).read_bytes(), name
    dense, found = (load("ref:mamba", adapter=each, dtype=torch.float32).model for each in ((), out))
    before, after = dict(dense.named_parameters()), dict(found.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split("mixer.")[-1] for name in moved} == {"A_log", "x_proj.weight", "out_proj.weight"}
    for layer in range(6):
        name = f"backbone.layers.{layer}.mixer.A_log"
        changed = before[name] != after[name]
        assert 0 < int(changed.any(1).sum()) <= 10 and int(changed.sum(1).max()) <= 3  # of 512 channels, 16 states
        columns = (before[name.replace("A_log", "x_proj.weight")] != after[name.replace("A_log", "x_proj.weight")]).any(
            0
        )
        assert int(columns.sum()) <= 10
    record = json.loads((out / "tuning.json").read_text())
    assert record["trainable"] == learned_by(options)
    with pytest.raises(UnsupportedError, match="has one a head"):
        tuned(data, tmp_path / "c", "ref:mamba2", method="sdt")


def learned_by(options: dict[str, object]) -> int:
    return sdt.count(load("ref:mamba").arch, TuneState.model_validate(options))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"channels": [4096, 1, 2, 3, 4, 5]}, "names no entries"),
        ({"states": [[0, 1]]}, "names no entries"),
        ({"channels": [-1]}, "entries: "),
        ({"channels": [0], "states": [[0, 1]]}, "has shape"),
    ],
)
def test_a_damaged_sdt_adapter_is_named(data: Path, tmp_path: Path, change: dict[str, object], words: str) -> None:
    out = tuned(data, tmp_path / "a", method="sdt", warm_up=1, steps=1)
    config = json.loads((out / "adapter_config.json").read_text())
    config["entries"]["backbone.layers.1.mixer.A_log"] |= change
    (out / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=words):
        load("ref:mamba", adapter=out)


def test_a_tracker_hears_of_the_run_and_what_it_writes_is_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Heard(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
            place = Path(args.output_dir) / "runs"
            place.mkdir(exist_ok=True)
            with (place / "log").open("a") as file:
                file.write(f"{state.global_step} {sorted(logs)}\n")

    with pytest.raises(BackendError, match="There is no tracker 'tensorbored'"):
        tuned(data, tmp_path / "a", tracker="tensorbored")
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Heard)
    monkeypatch.setattr("ssmcompress.tune.fit.get_available_reporting_integrations", lambda: ["tensorboard"])
    tuned(data, tmp_path / "a", tracker="tensorboard")
    heard = (tmp_path / "a" / "runs" / "log").read_text()
    assert "0 ['epoch', 'eval_loss']" in heard and "4 ['epoch', 'grad_norm', 'learning_rate', 'loss'" in heard
