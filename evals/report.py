"""A suite on the reference checkpoints dense, pruned by WANDA and by magnitude; the comparison, and the page.

python -m evals.report --limit 20 --out out/report
"""

import argparse
import shutil
from pathlib import Path

import ssmcompress
from ssmcompress.events import Note, Terminal

MODELS = ("mamba", "mamba2")
METHODS = ("wanda", "magnitude")


def main() -> None:
    """Does with functions what the README does with commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    shutil.rmtree(given.out, ignore_errors=True)
    with Terminal() as tell:
        for model in MODELS:
            dense = given.out / "results" / model
            ssmcompress.evaluate(f"ref:{model}", perplexity=None, suite="smoke", limit=given.limit, out=dense)
            results = []
            for method in METHODS:
                folder, name = given.out / f"{model}-{method}", f"{model}-{method}"
                ssmcompress.prune(f"ref:{model}", method=method, out=folder)
                results.append(given.out / "results" / name)
                settings = {"suite": "smoke", "limit": given.limit, "out": results[-1]}
                ssmcompress.evaluate(str(folder), perplexity=None, **settings)
                tell(Note(f"{name} is made and measured."))
            ssmcompress.compare(dense, *results, emit=tell)
        made = [given.out / f"{model}-{method}" for model in MODELS for method in METHODS]
        evaluated = sorted((given.out / "results").iterdir())
        ssmcompress.report(*made, *evaluated, out=given.out / "report.html", emit=tell)


if __name__ == "__main__":
    main()
