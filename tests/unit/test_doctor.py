import pytest
import torch

from ssmcompress import doctor as function
from ssmcompress.doctor import Check, environment, inputs, parity
from ssmcompress.errors import BackendError
from ssmcompress.events import Table
from ssmcompress.kernels import KERNELS, cpu, native, reference


def test_every_kernel_here_agrees_with_the_reference():
    heard = []
    diagnosis = function(emit=heard.append)
    assert diagnosis.healthy
    checked = {(check.implementation, check.kernel) for check in diagnosis.checks}
    assert {("torch", kernel) for kernel in KERNELS} <= checked
    assert (("native", "selective_scan") in checked) == native.available()[0]
    assert set(diagnosis.kernels["cpu"]) == set(KERNELS)
    assert [event.title.split()[0] for event in heard if isinstance(event, Table)] == [
        "Environment",
        "Kernels",
        "Parity",
    ]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda *args, **kwargs: reference.conv(*args, **kwargs) * 1.001, ""),
        (lambda *args, **kwargs: reference.conv(*args, **kwargs) * float("nan"), ""),
        (lambda *args, **kwargs: torch.zeros(()).reshape(3), "RuntimeError"),
    ],
)
def test_a_kernel_that_is_wrong_is_named(monkeypatch, broken, words):
    monkeypatch.setattr(cpu, "conv", broken)
    heard = []
    with pytest.raises(BackendError, match=r"torch\.conv\.") as error:
        function(emit=heard.append)
    assert error.value.exit_code == 4 and error.value.hint
    verdicts = {row[:2]: row[-1] for row in heard[-1].rows}
    assert verdicts[("conv", "torch")].startswith("WRONG") and words in verdicts[("conv", "torch")]
    assert verdicts[("ssd", "torch")] == "ok"


def test_a_step_that_forgets_the_state_is_wrong(monkeypatch):
    def forgetful(state, *args, **kwargs):
        return reference.selective_step(state.clone(), *args, **kwargs)

    monkeypatch.setattr(cpu, "selective_step", forgetful)
    failed = [(check.implementation, check.kernel) for check in parity() if not check.passed]
    assert failed == [("torch", "selective_step")]


def test_padding_and_a_first_state_are_part_of_the_check():
    for kernel in ("selective_scan", "ssd"):
        given = inputs(kernel)
        assert (given["dt"][:, -1] == reference.PAD).all() and given["state"].abs().sum() > 0
    assert inputs("conv")["left"].abs().sum() > 0
    assert inputs("ssd_step")["x"].shape == inputs("ssd")["x"][:, 0].shape


def test_the_verdict_is_the_limit():
    assert Check("conv", "torch", "cpu", error=1e-6, limit=1e-5, seconds=0.0).passed
    assert not Check("conv", "torch", "cpu", error=1e-4, limit=1e-5, seconds=0.0).passed
    assert not Check("conv", "torch", "cpu", error=float("nan"), limit=1e-5, seconds=0.0).passed


def test_the_environment_says_something_of_everything(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: (False, "no C compiler was found"))
    found = environment()
    assert all(found.values())
    assert found["torch"].startswith(torch.__version__.split("+")[0])
    assert found["native kernels"] == "not usable: no C compiler was found"
    assert found["hub offline"] == "yes"
