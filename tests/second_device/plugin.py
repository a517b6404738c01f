"""A pytest plugin that registers the device `far` and makes it the default device of models.

Inference-mode tensors cannot be wrapped, so `torch.inference_mode` is replaced by `torch.no_grad`. Functions are decorated with it
when they are defined, so this plugin must be imported before evoprune.
"""

from contextlib import contextmanager

import torch

from tests.second_device import far


@contextmanager
def no_gradients(mode: bool = True):
    with torch.set_grad_enabled(not mode and torch.is_grad_enabled()):
        yield


torch.inference_mode = no_gradients
far.register()

from evoprune.backend import limits  # noqa: E402

limits.DeviceName.resolve = lambda self: far.NAME if self.name == "auto" else self.name
