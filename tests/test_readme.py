"""The README does what it says: its commands and its Python run, in order, offline, in one empty folder.

A command that needs a network or a GPU ends with `# not run: reason`.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from ssmcompress.calib import data
from ssmcompress.checkpoint.source import load
from ssmcompress.cli import main
from ssmcompress.measure import glance, recall, text
from tests.unit.checkpoint import adapters

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = ("bash", "console", "sh", "shell")


@dataclass(frozen=True)
class Step:
    language: str
    text: str


def steps(markdown: str) -> list[Step]:
    """The commands (one each, prompts and outputs taken away) and Python blocks of a page, in order."""
    found = []
    for language, block in FENCE.findall(markdown):
        if language == "python":
            found.append(Step("python", block))
        elif language in SHELL:
            lines = block.replace("\\\n", " ").splitlines()
            if language == "console":
                lines = [line[2:] for line in lines if line.startswith("$ ")]
            found += [Step("shell", line.strip()) for line in lines if line.strip() and not line.startswith("#")]
    return found


def runnable(step: Step) -> bool:
    return step.language == "python" or (step.text.startswith("ssmcompress ") and "# not run: " not in step.text)


def command(step: Step) -> list[str]:
    if step.language == "python":
        return [sys.executable, "-c", step.text]
    return [sys.executable, "-m", "ssmcompress", *shlex.split(step.text, comments=True)[1:]]


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_steps_are_read_from_a_page():
    page = "text\n```bash\n# why\nssmcompress prune M \\\n  --out o  # twice\nmake test\n```\n"
    page += "```console\n$ ssmcompress models\nmamba\n```\n```python\nimport ssmcompress\n```\n"
    page += "```bash\nssmcompress eval hub/id  # not run: needs the hub\n```\n```json\n{}\n```\n"
    found = steps(page)
    assert [step.text.split()[0] for step in found] == ["ssmcompress", "make", "ssmcompress", "import", "ssmcompress"]
    assert [runnable(step) for step in found] == [True, False, True, True, False]
    assert command(found[0])[2:] == ["ssmcompress", "prune", "M", "--out", "o"]


@pytest.fixture
def brief(monkeypatch):
    """Calibrates on few windows and measures few items: what figures come to is for tests of theirs."""
    few = lambda *args, count, all=data.windows, **rest: all(*args, count=min(count, 4), **rest)  # noqa: E731
    monkeypatch.setattr(data, "windows", few)
    monkeypatch.setattr(text, "documents", lambda *args, all=text.documents: all(*args)[:4])
    monkeypatch.setattr(recall, "recall", partial(recall.recall, items=16))
    monkeypatch.setattr(glance, "COPIES", 8)
    monkeypatch.setattr(glance, "LOOKUPS", 16)


@pytest.mark.usefixtures("brief")
def test_the_readme_runs(readme, tmp_path, monkeypatch, capsys):
    """Commands run in this process, which has imported all that they need: most of them take less time than that."""
    todo = [step for step in steps(readme) if runnable(step)]
    assert {step.language for step in todo} == {"shell", "python"}
    adapters.made(load("ref:mamba", dtype=torch.float32).model, tmp_path / "lora", "in_proj")  # as a reader has one
    rows = ({"prompt": f"The house {i} is", "completion": f" {('red', 'blue')[i % 2]}."} for i in range(60))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    for step in todo:
        if step.language == "shell":
            with pytest.raises(SystemExit) as ended:
                main(command(step)[3:])
            assert not ended.value.code, f"{step.text}\n{capsys.readouterr()}"
        else:
            ran = subprocess.run(command(step), env=environment, capture_output=True, text=True, timeout=300)
            assert ran.returncode == 0, f"{step.text}\n{ran.stdout}\n{ran.stderr}"


def test_make_targets_of_the_readme_exist(readme):
    named = {
        word for step in steps(readme) if step.text.startswith("make ") for word in step.text.split("#")[0].split()[1:]
    }
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_the_files_it_links_to_exist(readme):
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", readme) if "://" not in link]
    assert [link for link in links if link and not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "recipes/README.md"])
def test_the_generated_parts_are_current(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    made = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from evals import readme; sys.stdout.write(readme.filled(sys.stdin.read()))",
        ],
        input=text,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout == text, "run: python -m evals.readme"
