"""Test that every part of the kernel benchmark runs, at sizes that take milliseconds."""

import sys

import pytest
import torch

from evoprune.backend import Quantization
from evoprune.model import Config
from experiments.speed import kernels
from tests.threads import one_thread  # noqa: F401
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def sizes():
    config = Config.parse(tiny_config().to_dict())
    return kernels.Sizes(config, product=(128, 256), copies=2, read_bytes=2**16)


@pytest.fixture(scope="module")
def needs_bytes_and_bf16():
    try:
        Quantization("int4").check(kernels.CPU)
    except kernels.UsageError:
        pytest.skip("no products with 4 bits here")
    if not kernels.Packing.supports(torch.empty(1, dtype=kernels.DTYPE)):
        pytest.skip("no products in bf16 here")


def test_the_command_prints_all_tables(monkeypatch, capsys, sizes, needs_bytes_and_bf16):
    monkeypatch.setattr(kernels, "Sizes", lambda config: sizes)
    monkeypatch.setattr(kernels, "matmul_rate", lambda dtype: 1e11)
    monkeypatch.setattr(sys, "argv", ["kernels", "--repeat", "1"])
    kernels.main()
    out = capsys.readouterr().out
    tables = [block.splitlines() for block in out.split("\n\n") if block.startswith("|")]
    assert [len(table) - 2 for table in tables] == [7, 10]
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    assert "100 GFLOP/s" in out and "GB/s" in out and "Error" not in out
