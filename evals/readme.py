"""Fills the generated parts of README.md and recipes/README.md: the support matrix, and tables from evals/results.

python -m evals.readme
"""

import re
from pathlib import Path

from evals.quality import WAYS
from ssmcompress import recipes
from ssmcompress.models import models

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "evals" / "results"


def main() -> None:
    """Rewrites both in place."""
    for page in (ROOT / "README.md", ROOT / "recipes" / "README.md"):
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """The text with what stands between its `<!-- name -->` and `<!-- end -->` marks made anew."""
    quality = "\n\n".join(_kept(f"quality-{model}.md") for model in ("mamba", "mamba2"))
    parts = {"support": support_matrix(), "quality": quality, "recipes": recipe_table()}
    for name, content in parts.items():
        mark = rf"(?s)(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(mark, lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
    return text


def support_matrix() -> str:
    """A row for each family: what `prune` can zero, what no forward hook would have seen, the axes it knows."""
    lines = ["| family | `prune` zeroes | of these no forward hook sees | axes (a stock config can express) |"]
    lines.append("|---|---|---|---|")
    for family in models():
        unseen = [name for name in family.prunable if name in family.hookless]
        axes = [f"{name} ({'yes' if name in family.stock_axes else 'in part'})" for name in family.axes]
        cells = (f"`{family.model_type}`", _names(family.prunable), _names(unseen), ", ".join(axes))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def recipe_table() -> str:
    """A row for each recipe of prune/: what it does, and what it was measured to cost both reference checkpoints."""
    lines = ["| recipe | what it does | bits per byte, ref:mamba | ref:mamba2 | copy 20, ref:mamba | ref:mamba2 |"]
    lines.append("|---|---|---|---|---|---|")
    measured = {name: way for way, name in WAYS.items()}
    tables = [_rows(f"quality-{model}.md") for model in ("mamba", "mamba2")]
    for name, way in measured.items():
        found = [table.get(way, [""] * 6) for table in tables]
        cells = [f"`{name}`", recipes.read(name).description, *(row[2] for row in found), *(row[3] for row in found)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rows(name: str) -> dict[str, list[str]]:
    """The rows of a kept table by their first cell."""
    lines = (line.strip("| ").split(" | ") for line in _kept(name).splitlines() if line.startswith("| "))
    return {cells[0]: cells for cells in lines}


def _names(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _kept(name: str) -> str:
    path = RESULTS / name
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


if __name__ == "__main__":
    main()
