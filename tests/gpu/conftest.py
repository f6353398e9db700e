"""What runs on a card runs on the CPU as well, so that these tests are right when a card is there: `make test-gpu`."""

from types import ModuleType
from typing import NamedTuple

import pytest

from ssmcompress.kernels import cpu, cuda


class Machine(NamedTuple):
    """Where the kernels run, and which."""

    device: str
    kernels: ModuleType


USABLE, REASON = cuda.available()
MACHINES = [
    pytest.param(Machine("cpu", cpu), id="cpu"),
    pytest.param(
        Machine("cuda", cuda), id="cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not USABLE, reason=REASON)]
    ),
]


@pytest.fixture(params=MACHINES)
def machine(request) -> Machine:
    """The card, and the CPU in its place."""
    return request.param
