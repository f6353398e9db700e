"""The text the reference checkpoints are trained on, and what is kept out of it: tokenizer, token files, hashes.

python evals/reference/corpus.py --data DIR --out BUILD
"""

import argparse
import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
EOS = "<|endoftext|>"
VALIDATION_NOVELS = ("Jane-Eyre_1260",)
HELD_OUT_NOVELS = ("Great-Expectations_1400", "Emma_158")
C4_TRAINED = 800  # the documents after these are the shipped calibration text
BENCHMARK_ITEMS = 1000


def main() -> None:
    """Writes BUILD/tokenizer, BUILD/{train,valid,test}.bin (uint16) and BUILD/corpus.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    documents = {
        "train": list(training_documents(options.data)),
        "valid": [novel(options.data, name) for name in VALIDATION_NOVELS],
        "test": [novel(options.data, name) for name in HELD_OUT_NOVELS],
    }
    tokenizer = train_tokenizer(documents["train"])
    tokenizer.save_pretrained(options.out / "tokenizer")
    record = {"vocabulary": VOCABULARY, "held_out": HELD_OUT_NOVELS, "validation": VALIDATION_NOVELS}
    for split, texts in documents.items():
        ids = [i for text in texts for i in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
        np.array(ids, dtype=np.uint16).tofile(options.out / f"{split}.bin")
        joined = "\0".join(texts).encode()
        record[split] = {
            "documents": len(texts),
            "bytes": len(joined),
            "tokens": len(ids),
            "sha256": hashlib.sha256(joined).hexdigest(),
        }
    (options.out / "corpus.json").write_text(json.dumps(record, indent=2) + "\n")


def training_documents(data: Path) -> Iterator[str]:
    """Novels, WikiText-2 train, most of the C4 sample, TinyStories and a few benchmark train items."""
    kept_out = {*VALIDATION_NOVELS, *HELD_OUT_NOVELS}
    for path in sorted((data / "gutenberg").glob("*.txt")):
        if path.stem not in kept_out:
            yield novel(data, path.stem)
    wiki = (data / "wikitext-2/train.txt").read_text(encoding="utf-8").replace("<unk> ", "").replace("<unk>", "")
    yield from (page for page in pages(wiki) if len(page) > 200)
    with gzip.open(data / "c4-sample/c4-sample.00000-of-00001.json.gz", "rt", encoding="utf-8") as lines:
        yield from [json.loads(line)["text"] for line in lines][:C4_TRAINED]
    stories = (data / "tinystories/tinystories_sample_2MB.txt").read_text(encoding="utf-8")
    yield from (story.strip() for story in stories.split(EOS) if story.strip())
    yield from benchmark_documents(data / "benchmarks/train")


def benchmark_documents(folder: Path) -> Iterator[str]:
    """A few questions with their right answers, in the form the evaluation asks them."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines()[:BENCHMARK_ITEMS]:
            item = json.loads(line)
            if "choices" in item:
                yield f"{item['query']} {item['choices'][item['gold']]}"


def novel(data: Path, name: str) -> str:
    """A Project Gutenberg book without head and foot, its lines joined into paragraphs."""
    text = (data / "gutenberg" / f"{name}.txt").read_text(encoding="utf-8-sig")
    start = re.search(r"\*\*\* ?START OF.*?\*\*\*", text, re.DOTALL)
    end = re.search(r"\*\*\* ?END OF", text)
    body = text[start.end() if start else 0 : end.start() if end else None].replace("\r\n", "\n")
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", body))
    return "\n\n".join(part for part in paragraphs if part)


def pages(text: str) -> list[str]:
    """Wikipedia pages of a WikiText file, cut before every top-level heading ` = Title = `."""
    return [page.strip() + "\n" for page in re.split(r"(?m)^(?= = [^=].* = \n)", text) if page.strip()]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the end-of-text token at id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token=EOS)


if __name__ == "__main__":
    main()
