"""The walls between the modules, read from the source itself."""

import ast
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ssmcompress"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
ONLY = {
    "mamba_ssm": ("kernels/cuda.py",),
    "causal_conv1d": ("kernels/cuda.py",),
    "triton": ("kernels/cuda.py",),
    "transformers.models": ("arch/",),
    "lm_eval": ("evaluate/harness.py",),
    "peft": ("checkpoint/lora.py",),
    "datasets": ("calib/rows.py",),
    "typer": ("cli.py", "exits.py", "options.py", "tuning_options.py"),
    "matplotlib": ("report/",),
    "plotly": ("report/",),
    "jinja2": ("report/",),
    "rich": ("events.py",),
    "pickle": (),
}
PURE = ("prune/scores.py", "prune/masks.py", "tokens/matching.py", "evaluate/compare.py")
PURE_MAY_KNOW = {"torch", "numpy", "scipy", "ssmcompress.errors"}


def tree(name: str) -> ast.Module:
    return parsed(FILES[name])


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(name: str) -> set[str]:
    """Every name a file imports, by its whole path, also those given to import_module as text."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            assert all(alias.name != "*" for alias in node.names), f"{name}: import * from {node.module}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "importlib.import_module", "__import__"):
            found |= {item.value for item in node.args if isinstance(item, ast.Constant)}
    return found


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_the_layers_are_kept():
    lint = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    # apart, for it closes handlers of logging, and with those of absl the files that pytest captures into
    ran = subprocess.run([sys.executable, "-c", lint], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("package", ONLY)
def test_a_package_is_imported_only_where_it_belongs(package):
    users = [name for name in FILES if any(within(module, package) for module in imports(name))]
    assert [name for name in users if not name.startswith(ONLY[package])] == []


def test_the_wall_sees_an_import(monkeypatch, tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "def f():\n    from transformers.models.mamba import modeling_mamba\n    import_module('peft.utils')\n"
    )
    monkeypatch.setitem(FILES, "x.py", path)
    assert any(within(module, "transformers.models") for module in imports("x.py"))
    assert any(within(module, "peft") for module in imports("x.py"))


@pytest.mark.parametrize("name", [name for name in PURE if name in FILES])
def test_arithmetic_knows_only_arithmetic(name):
    foreign = {
        module
        for module in imports(name)
        if module.split(".")[0] not in sys.stdlib_module_names
        and not any(within(module, known) for known in PURE_MAY_KNOW)
    }
    assert foreign == set()


def test_every_foreign_package_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {plain(item) for items in lists for item in items}
    distributions = packages_distributions()
    undeclared = {
        (name, module)
        for name in FILES
        for module in imports(name)
        if (top := module.split(".")[0]) not in sys.stdlib_module_names and top != "ssmcompress"
        if not declared & {plain(item) for item in [*distributions.get(top, ()), top]}
    }
    assert undeclared == set()


def plain(requirement: str) -> str:
    name = "".join(letter if letter.isalnum() or letter in "-_." else " " for letter in requirement).split()[0]
    return name.lower().replace("_", "-")


@pytest.mark.parametrize("name", FILES)
def test_nothing_prints_evaluates_or_unpickles(name):
    for node in ast.walk(tree(name)):
        if not isinstance(node, ast.Call):
            continue
        where, function = f"{name}:{node.lineno}", called(node)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        assert function != "print" or name == "events.py", where
        assert function not in ("eval", "exec", "os.system", "os.popen"), where
        assert (
            not function.endswith("torch.load") or ast.unparse(keywords.get("weights_only", ast.Name(""))) == "True"
        ), where
        for risky in ("trust_remote_code", "shell"):
            assert ast.unparse(keywords.get(risky, ast.Constant(False))) != "True", where


def test_every_folder_of_modules_is_a_package():
    folders = {path.parent for path in FILES.values()}
    assert [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_files_fit_the_mind():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
