"""What this machine offers, and whether every kernel on it computes what the reference computes."""

import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub import constants
from torch import Tensor

import ssmcompress
from ssmcompress.errors import BackendError
from ssmcompress.events import Emit, Table, ignore
from ssmcompress.kernels import KERNELS, Backend, cpu, cuda, label, native, reference

LIMITS = {"cpu": 1e-5, "cuda": 5e-3}  # relative error in float32; the CUDA kernels multiply matrices in TF32
FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "datasets",
    "lm_eval",
    "accelerate",
    "numpy",
    "scipy",
    "pydantic",
)
COMPILERS = ("cc", "gcc", "clang")
SEQUENCES = ("u", "x", "dt", "B", "C", "z")


@dataclass(frozen=True)
class Check:
    """One kernel on small random float32 input against the float64 reference: ‖found - true‖ / ‖true‖."""

    kernel: str
    implementation: str
    device: str
    error: float
    limit: float
    seconds: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the limit."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Diagnosis:
    """The environment by topic, the implementation each kernel resolves to by device, and the parity checks."""

    environment: dict[str, str]
    kernels: dict[str, dict[str, str]]
    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def doctor(*, emit: Emit = ignore) -> Diagnosis:
    """Looks at the machine and checks the kernels; BackendError (exit 4) where one disagrees with the reference."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    resolved = {device: Backend("auto").names(device) for device in devices}
    diagnosis = Diagnosis(environment(), resolved, tuple(parity()))
    _tell(diagnosis, emit)
    wrong = [f"{check.implementation}.{check.kernel}" for check in diagnosis.checks if not check.passed]
    if wrong:
        raise BackendError(
            f"These kernels disagree with the reference: {', '.join(wrong)}.",
            hint="Choose another with --backend torch, and report the table above.",
        )
    return diagnosis


def environment() -> dict[str, str]:
    """Versions, processor, memory, compiler, kernels and caches, each as a phrase."""
    usable = {label(module): module.available() for module in (native, cuda)}
    return {
        "ssmcompress": ssmcompress.__version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": _cores(),
        "memory": _memory(),
        **{name: _version(name) for name in PACKAGES},
        "torch threads": str(torch.get_num_threads()),
        "cuda": _cuda(),
        "mamba-ssm": _version("mamba-ssm"),
        "causal-conv1d": _version("causal-conv1d"),
        "peft": _version("peft"),
        "compiler": _compiler(),
        **{f"{name} kernels": "usable" if works else f"not usable: {why}" for name, (works, why) in usable.items()},
        "hub cache": constants.HF_HUB_CACHE,
        "hub offline": "yes" if constants.HF_HUB_OFFLINE else "no",
    }


def parity() -> list[Check]:
    """Every kernel of every implementation usable here, on the device it is made for."""
    modules = [(cpu, "cpu"), (native, "cpu"), (cuda, "cuda")]
    usable = [(module, device) for module, device in modules if module is cpu or module.available()[0]]
    return [
        _check(module, kernel, device) for module, device in usable for kernel in KERNELS if hasattr(module, kernel)
    ]


def inputs(kernel: str) -> dict[str, Tensor]:
    """Small random float64 input of a kernel: odd sizes, a state to start from, padding at the end."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    batch, length, width, size, heads, groups = 2, 70, 24, 16, 4, 2
    if kernel == "conv":
        values = {"x": normal(batch, length, width), "weight": normal(width, 4), "bias": normal(width)}
        return values | {"left": normal(batch, width, 3)}
    if kernel.startswith("selective"):
        wide, narrow = (batch, length, width), (batch, length, size)
        values = {"u": normal(*wide), "dt": normal(*wide) - 1, "A": -normal(width, size).exp(), "z": normal(*wide)}
        values |= {"B": normal(*narrow), "C": normal(*narrow), "D": normal(width), "dt_bias": normal(width) - 1}
        values["state"] = normal(batch, width, size)
    else:
        values = {"x": normal(batch, length, heads, width), "dt": normal(batch, length, heads) - 1}
        values |= {name: normal(batch, length, groups, size) for name in ("B", "C")}
        values |= {"A": -normal(heads).exp(), "D": normal(heads), "dt_bias": normal(heads) - 1}
        values["state"] = normal(batch, heads, width, size)
    values["dt"][:, -3:] = reference.PAD
    if kernel.endswith("step"):
        return {name: value[:, 0] if name in SEQUENCES else value for name, value in values.items()}
    return values


def _check(module: ModuleType, kernel: str, device: str) -> Check:
    implementation = label(module)
    given = inputs(kernel)
    truth = _outputs(getattr(reference, kernel), given)
    converted = {name: value.to(device, torch.float32) for name, value in given.items()}
    started = time.perf_counter()
    error, reason = float("inf"), ""
    try:
        found = _outputs(getattr(module, kernel), converted)
        error = max(_distance(a, b) for a, b in zip(found, truth, strict=True))
    except Exception as failure:
        # whatever a kernel raises is its diagnosis, and the other kernels are still to be checked
        reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
    return Check(kernel, implementation, device, error, LIMITS[device], time.perf_counter() - started, reason)


def _outputs(function: Callable[..., Any], given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What a kernel returns, with the state that a step changed in place."""
    given = {name: value.clone() for name, value in given.items()}
    with torch.no_grad():
        found = function(**given)
    if isinstance(found, tuple):
        return found
    return (found, given["state"]) if "state" in given else (found,)


def _distance(found: Tensor, truth: Tensor) -> float:
    distance = float((found.double().cpu() - truth).norm() / truth.norm())
    return distance if distance == distance else float("inf")


def _tell(diagnosis: Diagnosis, emit: Emit) -> None:
    emit(Table("Environment", ("what", "found"), tuple(diagnosis.environment.items())))
    devices = tuple(diagnosis.kernels)
    chosen = tuple((kernel, *(diagnosis.kernels[device][kernel] for device in devices)) for kernel in KERNELS)
    emit(Table("Kernels chosen by --backend auto (float32)", ("kernel", *devices), chosen))
    columns = ("kernel", "implementation", "device", "error", "limit", "ms", "verdict")
    emit(Table("Parity with the float64 reference", columns, tuple(_row(check) for check in diagnosis.checks)))


def _row(check: Check) -> tuple[str, ...]:
    verdict = "ok" if check.passed else f"WRONG {check.reason}".strip()
    figures = (f"{check.error:.1e}", f"{check.limit:.0e}", f"{check.seconds * 1e3:.1f}")
    return (check.kernel, check.implementation, check.device, *figures, verdict)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    lines = _lines("/proc/cpuinfo")
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    name = fields.get("model name") or platform.processor() or platform.machine()
    features = [feature for feature in FEATURES if feature in flags]
    return f"{name} ({', '.join(features) or torch.backends.cpu.get_cpu_capability()})"


def _cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{usable} of {os.cpu_count()}{load}"


def _memory() -> str:
    free = [int(line.split()[1]) / 2**20 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{total:.1f} GiB" + "".join(f", {available:.1f} GiB free" for available in free)


def _cuda() -> str:
    if torch.cuda.is_available():
        return f"{torch.version.cuda}, {', '.join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))}"
    return "no device" if torch.version.cuda else "torch is built without it"


def _compiler() -> str:
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    return os.environ.get("CC") or found or f"none of {', '.join(COMPILERS)} on the path"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
