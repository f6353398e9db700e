"""The list of families is that of the registry."""

import ssmcompress
from ssmcompress import reference
from ssmcompress.arch.registry import FAMILIES
from ssmcompress.events import Table


def test_every_family_and_every_shipped_checkpoint_is_listed(monkeypatch):
    monkeypatch.setattr(reference, "names", lambda: ["one", "two"])
    events = []
    found = ssmcompress.models(emit=events.append)
    assert [family.model_type for family in found] == list(FAMILIES)
    families, shipped = events
    assert isinstance(families, Table) and [row[0] for row in families.rows] == list(FAMILIES)
    assert shipped.rows == (("ref:one",), ("ref:two",))


def test_what_can_be_done_to_a_family():
    found = {family.model_type: family for family in ssmcompress.models()}
    assert found["mamba"].prunable == ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
    assert found["falcon_mamba"].axes == ("channel", "state", "dt_rank", "width", "layer")
    assert found["mamba"].axes == ("channel", "state", "dt_rank", "width", "ssm", "layer")
    assert found["mamba2"].prunable == ("in_proj", "conv1d", "out_proj")
    assert set(found["mamba2"].stock_axes) <= set(found["mamba2"].axes)
    assert "ssm" not in found["mamba"].stock_axes and "width" in found["mamba"].stock_axes
    assert "width" not in found["mamba2"].stock_axes
    assert "group" in found["mamba2"].axes and "group" not in found["mamba2"].stock_axes
    assert "state" in found["mamba2"].stock_axes and "head_channel" not in found["mamba2"].stock_axes
