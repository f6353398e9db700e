"""The bench's pieces at a tiny shape: equal contestants, an honest rival, real peaks, and a whole quick run."""

import importlib
import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from xml.etree.ElementTree import fromstring

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "evals" / "bench"


@pytest.fixture(scope="module")
def cpu() -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module("cpu")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def rivals(cpu: ModuleType) -> ModuleType:
    return cpu.rivals


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_contestants_share_weights_and_give_the_same_logits(cpu: ModuleType, rivals: ModuleType, family: str):
    ours, others = cpu.contestants(cpu.QUICK, family, "float32")
    ids = rivals.tokens(cpu.QUICK.shape.arch(family), 2, 70)
    expected = rivals.forward(ours, ids)
    assert list(others) == ["ours", *rivals.RIVALS[family]]
    for name, model in others.items():
        assert type(model) is (type(ours) if name == "ours" else rivals.STOCK[family])
        pointers = [weight.data_ptr() for weight in model.parameters()]
        assert pointers == [weight.data_ptr() for weight in ours.parameters()]
        torch.testing.assert_close(rivals.forward(model, ids), expected, rtol=1e-4, atol=1e-4)


def test_only_the_chunk_of_the_second_mamba2_rival_differs(cpu: ModuleType):
    _, others = cpu.contestants(cpu.QUICK, "mamba2", "float32")
    chunks = {name: model.config.chunk_size for name, model in others.items()}
    assert chunks == {"ours": 256, "stock": 256, "stock, chunk 64": 64}


def test_the_default_shape_has_130m_parameters(cpu: ModuleType, rivals: ModuleType):
    counts = [rivals.Shape().arch(family).build().num_parameters() / 1e6 for family in rivals.STOCK]
    assert counts == pytest.approx([129, 129], abs=1)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_the_hook_wanda_makes_our_masks_except_where_no_hook_fires(cpu: ModuleType, rivals: ModuleType, family: str):
    arch = cpu.QUICK.shape.arch(family)
    torch.manual_seed(0)
    ours = rivals.build(arch, "ours")
    stock = rivals.build(arch, "stock")
    stock.load_state_dict(ours.state_dict())
    windows = rivals.tokens(arch, 3, 40)
    rivals.our_wanda(arch, ours, windows)
    rivals.hook_wanda(arch, stock, windows)
    theirs = dict(stock.named_parameters())
    for module in arch.projections:
        name = arch.weight(0, module)
        mine = ours.get_parameter(name) == 0
        assert mine.float().mean() == pytest.approx(0.5, abs=0.05)
        differing = (mine != (theirs[name] == 0)).float().mean()
        assert differing > 0.4 if module == "dt_proj" else differing < 0.01


def test_a_child_reports_what_it_allocated(cpu: ModuleType):
    def prepare(bench: object):
        return lambda: torch.ones(50_000_000).sum()

    taken, peak, before = cpu.child(cpu.QUICK, prepare)
    assert taken > 0
    assert 190e6 < peak - before < 260e6


def test_rounds_take_turns_and_drop_the_first(cpu: ModuleType):
    calls: list[str] = []
    asked = {name: lambda name=name: calls.append(name) for name in "AB"}
    times = cpu.rounds(cpu.QUICK, asked)
    assert calls == list("ABBA")
    assert [len(taken) for taken in times.values()] == [1, 1]


def test_a_row_gives_the_least_times_and_the_spread_of_rounds(cpu: ModuleType):
    times = {"ours": [2.0, 1.0, 4.0], "stock": [8.0, 6.0, 8.0], "linears": [0.5]}
    [row] = cpu.compared("forward", "mamba", "float32", times)
    assert row[2:] == ("stock", "1.000 (2.000)", "6.000 (8.000)", "6.00", "2.00–6.00", "3.2", "0.50")


def test_a_quick_run_prints_every_table(cpu: ModuleType, capsys: pytest.CaptureFixture[str]):
    cpu.main(["--quick"])
    printed = capsys.readouterr().out
    for expected in (
        "load before",
        "Peak memory",
        "WANDA",
        "Mamba-1 forward",
        "Mamba-2 training step",
        "chunk 64",
        "decoding",
    ):
        assert expected in printed


def test_a_quick_run_of_the_cuts_measures_every_one(cpu: ModuleType, capsys: pytest.CaptureFixture):
    sys.path.insert(0, str(SCRIPTS))
    try:
        cuts = importlib.import_module("cuts")
    finally:
        sys.path.remove(str(SCRIPTS))
    cuts.main(["--quick"])
    told = capsys.readouterr().out
    for family, made in cuts.CUTS.items():
        assert all(f"{family}, {step.axis} keep {step.keep:g}" in " ".join(told.split()) for step in made)


def test_a_quick_run_of_the_tokens_measures_both_families(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.syspath_prepend(str(SCRIPTS))  # its processes inherit the path
    importlib.import_module("tokens").main(["--quick"])
    told = " ".join(capsys.readouterr().out.split())
    assert "mamba 32 anywhere" in told
    assert "mamba2 32 256" in told


def test_a_quick_run_of_tuning_measures_every_method(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("bench_tuning", SCRIPTS / "tuning.py")
    assert spec and spec.loader
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    bench.main(["--quick"])
    told = " ".join(capsys.readouterr().out.split())
    for method in (bench.STOCK, *bench.METHODS):
        assert f"mamba, 2 layers, no head {method}" in told and f"mamba2 {method}" in told


def test_a_quick_run_of_growth_measures_its_curves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    bench = importlib.import_module("growth")
    with monkeypatch.context() as patch:  # processes of its own take seconds each
        patch.setattr(bench, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
        panels = ("forward", "matching", "WANDA by text")
        few = [each for each in bench.curves(True) if each.panel in panels]
        patch.setattr(bench, "curves", lambda quick: few)
        patch.setattr(bench, "PANELS", panels)
        patch.setattr(bench, "HERE", tmp_path)
        bench.main(["--quick", "--keep"])
    told = " ".join(capsys.readouterr().out.split())
    assert "forward, mamba 32 to 64 tokens" in told
    assert "WANDA by text, mamba2 1 to 2 windows" in told and "matching, anywhere" in told
    drawn = fromstring((tmp_path / "results-growth.svg").read_text(encoding="utf-8"))
    assert len([each for each in drawn if each.get("role") == "img"]) == 2 * len(panels)


def test_a_quick_run_of_the_card_measures_on_the_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    bench = importlib.import_module("gpu")
    monkeypatch.setattr(bench, "HALF", {"mamba2": bench.HALF["mamba2"]})
    bench.main(["--quick", "--repeats", "1", "--dtypes", "float32"])
    told = " ".join(capsys.readouterr().out.split())
    for way in ("dense", "half", "30% of the work less by tokens", "2 x 32"):
        assert f"mamba2, tiny float32 {way}" in told
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no CUDA device"):
            bench.main([])
