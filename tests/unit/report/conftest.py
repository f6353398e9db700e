import shutil

import pytest

import ssmcompress
from tests.unit.checkpoint import folders


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A tiny model pruned by magnitude and, with calibration, by WANDA."""
    root = tmp_path_factory.mktemp("report")
    folders.save("mamba", root / "source", tokenizer=True)
    text = root / "text.txt"
    text.write_text(" ".join(f"w{i * i % 59}" for i in range(900)))
    ssmcompress.prune(str(root / "source"), method="magnitude", out=root / "magnitude", no_eval=True)
    wanda = {"method": "wanda", "sparsity": 0.25, "calib": str(text), "windows": 4, "length": 32}
    ssmcompress.prune(str(root / "source"), **wanda, out=root / "wanda", no_eval=True)
    return root


@pytest.fixture
def models(made, tmp_path):
    """A copy of both to change: {name: folder}."""
    for name in ("magnitude", "wanda"):
        shutil.copytree(made / name, tmp_path / name)
    return {name: tmp_path / name for name in ("magnitude", "wanda")}
