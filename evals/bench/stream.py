"""Peak memory and time of pruning a 2.8B-shaped bfloat16 checkpoint block by block, by WANDA to a half.

python evals/bench/stream.py --work DIR [--layers 64] [--windows 16] [--max-memory 3GB] [--keep]

Random weights; 512 tokens a window. DIR takes twice the checkpoint, 11 GB for all 64 layers, and is left empty.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import MambaConfig

from ssmcompress.arch.registry import arch_for
from ssmcompress.checkpoint import shards
from ssmcompress.checkpoint.output import carry
from ssmcompress.checkpoint.source import resolve, state_dict
from ssmcompress.events import Note, Table, Terminal, size

HERE = Path(__file__).parent
COLUMNS = ("layers", "windows", "checkpoint", "--max-memory", "peak", "minutes", "s a layer")


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the checkpoint, prunes it in a process of its own, and says what that took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--width", type=int, default=2560)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--max-memory", default="3GB")
    parser.add_argument("--keep", action="store_true", help="write results-stream.md")
    given = parser.parse_args(arguments)
    source, out = given.work / "dense", given.work / "pruned"
    with Terminal() as tell:
        if not source.exists():  # else an earlier run did not come to its end
            tell(Note("writing the checkpoint"))
            make(source, given.layers, given.width)
        written = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        command = [sys.executable, "-m", "ssmcompress", "prune", str(source), "--out", str(out), "--overwrite"]
        command += ["--windows", str(given.windows), "--max-memory", given.max_memory, "--no-eval"]
        started = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        row = (str(given.layers), str(given.windows), size(written), given.max_memory, size(peak))
        row += (f"{seconds / 60:.1f}", f"{seconds / given.layers:.1f}")
        tell(Table(f"WANDA 50 %, width {given.width}, one process", COLUMNS, (row,)))
    for folder in (source, out):
        shutil.rmtree(folder)
    if given.keep:
        lines = (COLUMNS, ("---",) * len(COLUMNS), row)
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        (HERE / "results-stream.md").write_text(text + "\n", encoding="utf-8")


def make(folder: Path, layers: int, width: int) -> None:
    """Writes random weights as a checkpoint, a shard at a time, beside the tokenizer of ref:mamba."""
    config = MambaConfig(vocab_size=50280, hidden_size=width, num_hidden_layers=layers, state_size=16)
    model = arch_for(config).build("meta")
    state = {name: torch.empty_like(tensor, dtype=torch.bfloat16) for name, tensor in state_dict(model).items()}
    names = {name: i for i, name in enumerate(state)}

    def value(name: str) -> Tensor:
        draw = torch.Generator().manual_seed(names[name])
        rows = state[name].shape
        if name.endswith("A_log"):
            values = torch.arange(1, rows[1] + 1).float().log().expand(rows)
        elif name.endswith(("norm.weight", "norm_f.weight", ".D")):
            values = torch.ones(rows)
        else:
            values = torch.randn(rows, generator=draw) * (0.02 if len(rows) > 1 else 0.0)
            values = values - 4.0 if name.endswith("dt_proj.bias") else values  # steps of about 0.02
        return values.to(torch.bfloat16)

    folder.mkdir(parents=True)
    shards.save(state, folder, shard_size="500MB", value=value)
    config.architectures, config.dtype = ["MambaForCausalLM"], torch.bfloat16
    (folder / "config.json").write_text(config.to_json_string(), encoding="utf-8")
    carry(resolve("ref:mamba"), folder)


if __name__ == "__main__":
    main()
