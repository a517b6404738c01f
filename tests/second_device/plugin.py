"""A plug-in of pytest: the process has the device `far`, and a model that may choose its device takes it.

Tensors of inference mode cannot be wrapped, so that `torch.inference_mode` is `torch.no_grad` here. Functions are decorated with it
when they are defined: this is imported before anything of evoprune.
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

from evoprune.session.loading import description  # noqa: E402

description.resolve_device = lambda name: far.NAME if name == "auto" else name
