"""What a tuning step would learn, before it costs anything."""

from ssmcompress.arch.base import Arch
from ssmcompress.arch.tunable import install
from ssmcompress.tune import sdt
from ssmcompress.tune.examples import pairs
from ssmcompress.tune.lora import wrap
from ssmcompress.tuning import TuneState


def planned(step: TuneState, arch: Arch) -> int:
    """How many parameters a step would learn of a model.

    Raises InputError for examples that are not there, or begin with one that will not do, and UnsupportedError for a
    model that has nothing to learn so, as the step itself would.
    """
    for source in (step.data, step.valid, step.test):
        if source is not None:
            next(pairs(source, step), None)
    if step.method == "sdt":
        return sdt.count(arch, step)
    model = arch.build("meta")
    if step.method == "lora":
        learned = wrap(model, arch, step)[0]
    else:
        learned = install(model, arch, step.method, step.form or "full", step.size)
    return sum(each.numel() for each in learned.values())
