"""Which kernel computes causal attention, and what it computes."""

import pytest
import torch

from evoprune.backend.attention import causal_attention
from evoprune.backend.devices import uses_kernels


def test_a_whole_prompt_and_its_end():
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 20, 16, generator=random) for _ in range(3))
    whole = causal_attention(q, k, v, None)
    weights = (q @ k.transpose(2, 3) / 4).masked_fill(~torch.ones(20, 20).tril().bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(whole, weights @ v)
    assert causal_attention(q[:, :, 5:], k, v, None) is None  # a mask serves as well on a CPU
    assert not uses_kernels(torch.device("cpu")) and uses_kernels(torch.device("cuda"))


def test_plain_takes_masks(monkeypatch):
    monkeypatch.setenv("EVOPRUNE_PLAIN", "1")
    assert not uses_kernels(torch.device("cuda"))


@pytest.mark.cuda
@pytest.mark.parametrize("dim", [128, 136])
@pytest.mark.parametrize("rows", [2, 64, 500, 700])
def test_the_end_of_a_prompt_on_a_gpu(rows, dim):
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 1, 700, dim, generator=random).to("cuda", torch.bfloat16) for _ in range(3))
    k, v = k.expand(-1, 8, -1, -1), v.expand(-1, 8, -1, -1)
    q = q.repeat(1, 8, 1, 1)[:, :, 700 - rows :]
    made = causal_attention(q, k, v, 0.1)
    scores = (q.float() @ k.float().transpose(2, 3) * 0.1).masked_fill(
        ~torch.ones(rows, 700, device="cuda").tril(700 - rows).bool(), -torch.inf
    )
    assert made is not None
    torch.testing.assert_close(made.float(), scores.softmax(-1) @ v.float(), atol=0.02, rtol=0.02)
