import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are so small that a second thread only costs time. For every test of the module or folder that imports this."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
