"""A plug-in of pytest: the process has the device `far`, and a model that may choose its device takes it."""

import torch

from evoprune.pipeline.loading import found
from tests.second_device import far

far.register()
_pick = found.pick_device


def pick_device(name: str) -> torch.device:
    return _pick(far.NAME if name == "auto" else name)


found.pick_device = pick_device
