"""Memory-mapped weights are brought into memory before they are used."""

import re
from pathlib import Path

import pytest
import torch

from evoprune.cpu.machine import madvise_cold, page_in


def resident(file: Path) -> int:
    """Bytes of a mapped file in this process's memory."""
    _, _, after = Path("/proc/self/smaps").read_text().partition(f" {file}\n")
    return 1024 * int(re.search(r"^Rss: +(\d+) kB", after, re.M)[1])


def test_pages_are_read_without_being_used(tmp_path):
    if not Path("/proc/self/smaps").is_file():
        pytest.skip("no /proc here")
    file, size = tmp_path / "weights", 2**24
    file.write_bytes(bytes(range(256)) * (size // 256))
    weights = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    assert resident(file) < size // 4
    first, second = weights[100 : size // 2], weights[size // 2 :]
    thread = page_in(part for part in (first, second))
    if thread is None:
        pytest.skip("not on this system")
    thread.join()
    if resident(file) < size:
        pytest.skip("an older system")
    assert int(second[1]) == 1


def test_cool_pages_stay_as_they_are(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(range(256)) * 256)
    weights = torch.from_file(str(file), shared=False, size=2**16, dtype=torch.uint8)
    before = weights.clone()
    madvise_cold(weights[10:-10])
    assert weights.equal(before)
