"""SDT chooses the entries that moved most, and learns as many as the paper says."""

import pytest
import torch
from transformers import Mamba2Config, MambaConfig

from ssmcompress.arch.registry import arch_for
from ssmcompress.errors import UnsupportedError
from ssmcompress.tune.sdt import choose, count
from ssmcompress.tuning import TuneState


def test_the_entries_that_moved_most_are_chosen():
    before = {"A_log": torch.zeros(4, 3)}
    moved = torch.tensor([[0.0, 0.1, 0.0], [0.9, 0.0, -1.0], [0.0, 0.0, 0.0], [0.0, -2.0, 0.1]])
    step = TuneState(method="sdt", sdt_channels=0.5, sdt_states=0.34)
    found = choose(before, {"A_log": moved}, step)
    assert found["A_log.channels"].tolist() == [1, 3]
    assert found["A_log.states"].tolist() == [[2], [1]]


@pytest.mark.parametrize(("width", "layers", "expected"), [(768, 24, 454_608), (2048, 48, 2_426_208)])
def test_the_real_shapes_have_the_counts_that_are_known(width, layers, expected):
    arch = arch_for(MambaConfig(hidden_size=width, num_hidden_layers=layers, vocab_size=50280))
    assert count(arch, TuneState(method="sdt")) == expected


def test_a_family_without_decays_of_states_is_refused():
    arch = arch_for(Mamba2Config(hidden_size=768, num_hidden_layers=2, num_heads=24, n_groups=1))
    with pytest.raises(UnsupportedError, match="has one a head"):
        count(arch, TuneState(method="sdt"))
