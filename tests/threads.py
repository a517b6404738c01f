import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Compute in one thread in the importing test module or folder. The tensors are too small for a second thread to pay off."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
