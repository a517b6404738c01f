"""Facts about this process."""

import mmap
import sys

import pytest

from evoprune.backend.devices import memory_in_use


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mapped_files_are_not_the_processs_own_memory(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"1" * 2**26)
    own, mapped = memory_in_use("cpu")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        assert sum(view[:: mmap.PAGESIZE]) > 0
        own_then, mapped_then = memory_in_use("cpu")
    assert mapped_then - mapped > 0.9 * 2**26 and own_then - own < 2**25


def test_nothing_is_said_of_a_gpu():
    assert memory_in_use("cuda:0") == (None, None)
