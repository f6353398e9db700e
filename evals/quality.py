"""What the shipped recipes cost the reference checkpoints, measured on the written folders.

python evals/quality.py             the whole table, kept in evals/results/ (half an hour on one core)
python evals/quality.py --missing   only the ways that are not in it yet
python evals/quality.py --demo OUT  dense, magnitude and WANDA from folders that `make demo` has just written
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ssmcompress
from ssmcompress.errors import UnsupportedError
from ssmcompress.evaluate.results import documents
from ssmcompress.events import Emit, Note, Table, Terminal
from ssmcompress.measure.perplexity import DocumentScore, paired_difference

RESULTS = Path(__file__).parent / "results"
MODELS = ("mamba", "mamba2")
WAYS = {
    "magnitude 50 %": "prune/magnitude-50",
    "magnitude 50 %, by row": "prune/magnitude-50-by-row",
    "WANDA 50 %": "prune/wanda-50",
    "WANDA 50 %, by row": "prune/wanda-50-by-row",
    "WANDA 50 %, recall in calibration": "prune/wanda-50-recall",
    "WANDA 2:4": "prune/wanda-2-4",
    "SparseGPT 50 %": "prune/sparsegpt-50",
    "SparseGPT 2:4": "prune/sparsegpt-2-4",
    "half of A_log memoryless, SparseSSM": "prune/sparsessm-50",
    "half of the states": "prune/states-50",
    "half of the states, rotated": "prune/states-50-rotated",
    "half of the states, recall in calibration": "prune/states-50-recall",
    "half of the states, then WANDA 50 %": "prune/states-50-wanda-50",
    "half of the channels": "prune/channels-50",
    "half of the heads": "prune/heads-50",
    "half of the scans": "prune/scans-50",
    "four of six layers": "prune/layers-75",
}
CONTESTS = (
    ("magnitude 50 %", "WANDA 50 %"),
    ("magnitude 50 %, by row", "WANDA 50 %, by row"),
    ("WANDA 50 %, by row", "WANDA 50 %"),
    ("WANDA 50 %", "SparseGPT 50 %"),
    ("WANDA 50 %", "WANDA 2:4"),
)
COLUMNS = ("", "bits per byte", "against dense", "copy 20", "2 pairs", "4 pairs", "8 pairs")


@dataclass(frozen=True)
class Measured:
    """A way of pruning and what evaluation of its folder found."""

    way: str
    summary: dict[str, Any]
    documents: list[DocumentScore]


def main() -> None:
    """Measures, prints, and keeps the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--demo", type=Path)
    options = parser.parse_args()
    with Terminal() as tell:
        if options.demo:
            demo(options.demo, tell)
            return
        for model in options.models:
            there, said = kept(model) if options.missing else ({}, [])
            found = measure(model, [way for way in WAYS if way not in there], tell)
            lines = there | {line[0]: line for line in rows(found)}
            said = said or verdicts(found)
            tell(Table(f"ref:{model}", COLUMNS, tuple(lines.values())))
            for sentence in said:
                tell(Note(sentence))
            keep(model, found, [lines[way] for way in ("dense", *WAYS) if way in lines], said)


def measure(model: str, ways: Sequence[str], tell: Emit) -> list[Measured]:
    """Dense and some ways of pruning one reference checkpoint, each evaluated from disk."""
    found = [_evaluated("dense", f"ref:{model}")]
    with tempfile.TemporaryDirectory() as work:
        for way in ways:
            recipe = WAYS[way]
            folder = Path(work) / Path(recipe).name
            try:
                ssmcompress.run(recipe, [f"model=ref:{model}"], out=folder, no_eval=True)
            except UnsupportedError:  # channels are Mamba-1's, heads and rotated states Mamba-2's
                continue
            found.append(_evaluated(way, str(folder)))
            tell(Note(f"ref:{model}, {way}: {found[-1].summary['bits_per_byte']:.4f} bits per byte"))
    return found


def rows(found: list[Measured]) -> list[tuple[str, ...]]:
    """A line for each way: bits per byte, its paired change from dense with the 95 % interval, and memory."""
    lines = []
    for each in found:
        change, low, high = paired_difference(found[0].documents, each.documents)
        against = "" if each is found[0] else f"{change:+.4f} [{low:+.4f}, {high:+.4f}]"
        recall = {(probe["probe"], probe["load"]): probe for probe in each.summary["recall"]}
        loads = (("copy", 20), ("key-value", 2), ("key-value", 4), ("key-value", 8))
        memory = (f"{recall[load]['accuracy']:.1%}" for load in loads)
        lines.append((each.way, f"{each.summary['bits_per_byte']:.4f}", against, *memory))
    return lines


def verdicts(found: list[Measured]) -> list[str]:
    """WANDA against its rivals and the pattern against the free choice, each paired on the same documents."""
    by_way = {each.way: each.documents for each in found}
    sentences = []
    for first, second in CONTESTS:
        change, low, high = paired_difference(by_way[first], by_way[second])
        sentences.append(f"{second} minus {first}: {change:+.4f} bits per byte [{low:+.4f}, {high:+.4f}].")
    return sentences


def kept(model: str) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The lines of the kept table by way, and what was said below it."""
    text = (RESULTS / f"quality-{model}.md").read_text(encoding="utf-8").splitlines()
    lines = [tuple(line[2:-2].split(" | ")) for line in text if line.startswith("| ")]
    return {line[0]: line for line in lines[2:]}, [line[2:] for line in text if line.startswith("- ")]


def keep(model: str, found: list[Measured], lines: Sequence[tuple[str, ...]], said: Sequence[str]) -> None:
    """Writes the summaries as JSON, beside those that are there, and the table as Markdown."""
    path = RESULTS / f"quality-{model}.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content |= {each.way: each.summary for each in found} | {"verdicts": list(said)}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    table = "\n".join("| " + " | ".join(line) + " |" for line in (COLUMNS, ("---",) * len(COLUMNS), *lines))
    told = "\n".join(f"- {each}" for each in said)
    (RESULTS / f"quality-{model}.md").write_text(f"### ref:{model}\n\n{table}\n\n{told}\n", encoding="utf-8")


def demo(folder: Path, tell: Emit) -> None:
    """The figures that `prune` measured before and after, of both checkpoints and both methods, in one table."""
    lines = []
    for model in MODELS:
        runs = {
            way: json.loads((folder / f"{model}-{way}" / "measured.json").read_text()) for way in ("magnitude", "wanda")
        }
        scores = {"dense": runs["magnitude"]["before"]} | {way: run["after"] for way, run in runs.items()}
        for way, score in scores.items():
            low, high = score["bits_per_byte_interval"]
            interval = f"{score['bits_per_byte']:.4f} [{low:.3f}, {high:.3f}]"
            lines.append((f"ref:{model}", way, f"{score['perplexity']:.2f}", interval))
        change, low, high = paired_difference(*(_documents(run["after"]) for run in runs.values()))
        tell(
            Note(
                f"ref:{model}: WANDA minus magnitude {change:+.4f} bits per byte, paired 95 % [{low:+.4f}, {high:+.4f}]"
            )
        )
    tell(Table("half of the weights zero", ("model", "method", "token perplexity", "bits per byte"), tuple(lines)))


def _evaluated(way: str, model: str) -> Measured:
    with tempfile.TemporaryDirectory() as work:
        ssmcompress.evaluate(model, perplexity="default", recall=True, out=Path(work) / "results")
        summary = json.loads((Path(work) / "results/summary.json").read_text())
        return Measured(way, summary, documents(Path(work) / "results"))


def _documents(score: dict[str, Any]) -> list[DocumentScore]:
    return [DocumentScore(**document) for document in score["documents"]]


if __name__ == "__main__":
    main()
