"""A device `npu`, that torch has through PrivateUse1: tensors of the CPU say that they are there.

torch renames its device for the whole process, so the program runs in one of its own.
"""

import subprocess
import sys

PROGRAM = """
import torch
from torch.overrides import TorchFunctionMode
torch.utils.rename_privateuse1_backend("npu")
from evoprune.backend import devices
from evoprune.backend.expected import expects_host
from evoprune.session.options import ModelOptions

THERE = torch.device("npu", 0)

class OnTheNpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.device.__get__:
            return THERE
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:
            kwargs["device"] = "cpu"
        return func(*("cpu" if isinstance(each, torch.device) else each for each in args), **kwargs)

assert ModelOptions(device=THERE).device == "npu:0" and ModelOptions(device="npu").device == "npu"
with OnTheNpu():
    device = devices.pick_device("npu:0")
    assert device == THERE and torch.zeros(1).device == THERE
assert devices.default_dtype(device) == "fp32" and not expects_host("npu:0")
assert not devices.is_host(device) and devices.holds_values(device) and devices.busy_cores(device) == 1
assert devices.largest_piece(device) == devices.GPU_PIECE_UNITS and devices.launch_bound_units(device) == 0
assert not devices.uses_kernels(device)
with OnTheNpu():
    x = torch.ones(3)
    assert devices.capture_on(device) is None
    assert devices.to_device(x, device).tolist() == [1, 1, 1] and devices.now(device) > 0
print("served")
"""


def test_plain_pytorch_serves_it():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.stdout == "served\n", done.stderr
