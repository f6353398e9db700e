"""Cuts the shipped texts from their corpora; the reference checkpoints were trained on none of them.

python -m evals.cut --data DIR
"""

import argparse
import gzip
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from evals.reference.corpus import C4_TRAINED, HELD_OUT_NOVELS, novel, pages

DATA = Path(__file__).parent / "data"
NOVEL_PIECES, NOVEL_PIECE = 24, 4000
BENCHMARKS = {
    "arc_easy.jsonl": "ai2_arc_ARC-Easy_validation.jsonl",
    "arc_challenge.jsonl": "ai2_arc_ARC-Challenge_validation.jsonl",
    "openbookqa.jsonl": "openbookqa_main_validation.jsonl",
    "lambada_openai.jsonl.gz": "lambada_test.jsonl",
}


def main() -> None:
    """Writes the texts and the benchmarks into evals/data, and their hashes to SHA256SUMS."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    wiki = (data / "wikitext-2/wiki.test.raw").read_text(encoding="utf-8")
    texts = {
        "wikipedia.jsonl": pages(wiki),
        "novels.jsonl": [piece for name in HELD_OUT_NOVELS for piece in pieces(novel(data, name))],
        "calibration.jsonl": crawled(data),
    }
    files = {name: lines({"text": text} for text in documents) for name, documents in texts.items()}
    files |= {name: benchmark(data / "benchmarks/validation" / source) for name, source in BENCHMARKS.items()}
    for name, content in files.items():
        packed = gzip.compress(content, mtime=0) if name.endswith(".gz") else content
        (DATA / name).write_bytes(packed)
    sums = (f"{hashlib.sha256((DATA / name).read_bytes()).hexdigest()}  {name}\n" for name in files)
    (DATA / "SHA256SUMS").write_text("".join(sums))


def lines(rows: Iterable[dict]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def benchmark(source: Path) -> bytes:
    """The items of a benchmark with the fields of its source, in the order of its source."""
    return lines(json.loads(line) for line in source.read_text(encoding="utf-8").split("\n") if line)


def pieces(text: str) -> Iterable[str]:
    """Equally spaced pieces of whole paragraphs, about 4,000 characters each."""
    for i in range(NOVEL_PIECES):
        start = text.index("\n\n", len(text) * i // NOVEL_PIECES) + 2
        end = text.find("\n\n", start + NOVEL_PIECE)
        yield text[start : end if end > 0 else None]


def crawled(data: Path) -> list[str]:
    """The C4 documents after those the reference checkpoints were trained on."""
    with gzip.open(data / "c4-sample/c4-sample.00000-of-00001.json.gz", "rt", encoding="utf-8") as crawl:
        return [json.loads(line)["text"] for line in crawl][C4_TRAINED:]


if __name__ == "__main__":
    main()
