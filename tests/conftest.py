"""Every test runs offline, on one torch thread, and writes no cache of its own into the user's home."""

import atexit
import os
import resource
import shutil
import tempfile
from contextlib import contextmanager

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")  # transformers copies trusted code there
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
torch.set_num_threads(1)


@pytest.fixture
def full_disk():
    """Lets files grow to so many bytes only: beyond, writing fails as it does where a disk is full."""

    @contextmanager
    def limited(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
