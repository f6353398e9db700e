"""Cuts the shipped texts from their corpora; the reference checkpoints were trained on none of them.

python evals/data/cut.py --data DIR
"""

import argparse
import gzip
import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "reference"))

from corpus import C4_TRAINED, HELD_OUT_NOVELS, novel, pages  # noqa: E402

NOVEL_PIECES, NOVEL_PIECE = 24, 4000


def main() -> None:
    """Writes wikipedia.jsonl, novels.jsonl and calibration.jsonl beside this file, and their hashes to SHA256SUMS."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    wiki = (data / "wikitext-2/wiki.test.raw").read_text(encoding="utf-8")
    texts = {
        "wikipedia.jsonl": pages(wiki),
        "novels.jsonl": [piece for name in HELD_OUT_NOVELS for piece in pieces(novel(data, name))],
        "calibration.jsonl": crawled(data),
    }
    sums = []
    for name, documents in texts.items():
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
        (HERE / name).write_text(lines, encoding="utf-8")
        sums.append(f"{hashlib.sha256(lines.encode()).hexdigest()}  {name}\n")
    (HERE / "SHA256SUMS").write_text("".join(sums))


def pieces(text: str) -> Iterable[str]:
    """Equally spaced pieces of whole paragraphs, about 4,000 characters each."""
    for i in range(NOVEL_PIECES):
        start = text.index("\n\n", len(text) * i // NOVEL_PIECES) + 2
        end = text.find("\n\n", start + NOVEL_PIECE)
        yield text[start : end if end > 0 else None]


def crawled(data: Path) -> list[str]:
    """The C4 documents after those the reference checkpoints were trained on."""
    with gzip.open(data / "c4-sample/c4-sample.00000-of-00001.json.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines][C4_TRAINED:]


if __name__ == "__main__":
    main()
