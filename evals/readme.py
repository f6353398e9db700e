"""Fills the generated parts of README.md: the support matrix from the registry, the tables from evals/results.

python evals/readme.py
"""

import re
from pathlib import Path

from ssmcompress.models import models

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "evals" / "results"


def main() -> None:
    """Rewrites README.md in place."""
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """The text with what stands between its `<!-- name -->` and `<!-- end -->` marks made anew."""
    quality = "\n\n".join(_kept(f"quality-{model}.md") for model in ("mamba", "mamba2"))
    parts = {"support": support_matrix(), "quality": quality}
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
        axes = [f"{name} ({'yes' if name in family.stock_axes else 'no'})" for name in family.axes]
        cells = (f"`{family.model_type}`", _names(family.prunable), _names(unseen), ", ".join(axes))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _names(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _kept(name: str) -> str:
    path = RESULTS / name
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


if __name__ == "__main__":
    main()
