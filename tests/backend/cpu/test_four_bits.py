"""Test 4-bit weights: their layout, their errors, and their products."""

import pytest
import torch

from evoprune.backend.cpu import four_bits
from tests.compiled import compiled, library  # noqa: F401
from tests.threads import one_thread  # noqa: F401

SHAPES = [(1, 32), (3, 96), (40, 256), (64, 2048), (33, 11008)]


def random_weights(outputs, length, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, length, generator=random) * torch.rand(outputs, 1, generator=random) * 0.1


def by_hand(packed, length):
    """Read packed weights byte by byte, as four_bits.py describes the layout. Returns float64 `[N, length]`."""
    rows = []
    for row in packed:
        numbers = []
        for chunk in row.split(144):
            scales = chunk[128:].clone().view(torch.bfloat16).tolist()
            for block, scale in enumerate(scales):
                both = chunk[block // 2 * 32 :][:32].tolist()
                numbers += [((byte >> 4 if block % 2 else byte & 15) - 8) * scale for byte in both]
        assert not any(numbers[length:])
        rows.append(numbers[:length])
    return torch.tensor(rows, dtype=torch.float64)


def rounded(x):
    """Round rows in blocks of 32 to 127 steps on either side of zero."""
    blocks = x.double().unflatten(-1, (-1, 32))
    step = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((blocks / step).round() * step).flatten(-2)


@pytest.mark.parametrize(("outputs", "length"), SHAPES)
def test_each_weight_is_rounded_to_one_of_sixteen(outputs, length):
    weights = random_weights(outputs, length)
    packed, _ = four_bits.pack(weights)
    assert packed.shape == (outputs, four_bits.packed_bytes(length)) and packed.dtype == torch.uint8
    near = by_hand(packed, length)
    blocks, error = weights.unflatten(1, (-1, 32)), (near - weights).unflatten(1, (-1, 32))
    # If the largest weight is -8.5 steps, one at the other end may be 8.5 steps, of which 7 can be stored.
    largest = blocks.abs().amax(-1, keepdim=True)
    assert (error.abs() <= largest * 1.51 / 8.5).all()
    if outputs > 9:
        assert error.square().mean() < 0.0072 * weights.square().mean()


def test_no_end_would_give_a_smaller_error():
    weights = random_weights(64, 2048)
    squares = [((by_hand(four_bits.pack(weights)[0], 2048) - weights) ** 2).unflatten(1, (-1, 32)).sum(-1)]
    ends = four_bits.ENDS
    for end in ends:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(four_bits, "ENDS", (end,))
            packed, _ = four_bits.pack(weights)
        squares.append(((by_hand(packed, 2048) - weights) ** 2).unflatten(1, (-1, 32)).sum(-1))
    torch.testing.assert_close(squares[0], torch.stack(squares[1:]).amin(0), rtol=1e-4, atol=0)
    assert all((squares[0] < each).any() for each in squares[1:])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize(("outputs", "length"), SHAPES)
def test_the_product_is_right_and_each_row_is_independent(compiled, outputs, length, count):  # noqa: F811
    packed, _ = four_bits.pack(random_weights(outputs, length))
    x = torch.randn(count, length, generator=torch.Generator().manual_seed(count)) * 3
    y = four_bits.product(x, packed)
    exact = rounded(x) @ by_hand(packed, length).T
    assert y.dtype == torch.float32 and (y - exact).abs().max() < 1e-5 * exact.abs().max()
    assert all(torch.equal(four_bits.product(x[row : row + 1], packed)[0], y[row]) for row in range(count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_threads_and_the_layout_of_the_rows_change_nothing(compiled, dtype):  # noqa: F811
    packed, scale = four_bits.pack(random_weights(96, 320))
    x = torch.randn(4, 640, generator=torch.Generator().manual_seed(1)).to(dtype)[:, ::2]
    made = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made.append((four_bits.product(x, packed), four_bits.unpack(packed, scale, 320)))
    finally:
        torch.set_num_threads(before)
    expected = rounded(x) @ by_hand(packed, 320).T
    torch.testing.assert_close(made[0][0].double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert all(torch.equal(one, first) for each in made[1:] for one, first in zip(each, made[0], strict=True))


@pytest.mark.parametrize(("outputs", "length"), SHAPES)
def test_unpacked_weights_are_the_nearest_of_eight_bits(compiled, outputs, length):  # noqa: F811
    packed, scale = four_bits.pack(random_weights(outputs, length))
    whole, near = four_bits.unpack(packed, scale, length), by_hand(packed, length)
    assert whole.shape == near.shape and whole.dtype == torch.int8 and whole.abs().max() == 127
    assert ((whole * scale[:, None].double() - near).abs() <= 0.5001 * scale[:, None]).all()


def test_zeros_constants_and_tiny_weights(compiled):  # noqa: F811
    weights = torch.zeros(4, 512)
    weights[1] = 2.5
    weights[2, :32] = -1e-41  # too small for a scale in bf16
    weights[3, 40] = 7.0
    packed, scale = four_bits.pack(weights)
    ones = torch.ones(1, 512)
    torch.testing.assert_close(four_bits.product(ones, packed), weights.sum(1)[None], rtol=5e-3, atol=1e-6)
    assert not four_bits.product(torch.zeros(2, 512), packed).any()
    whole = four_bits.unpack(packed, scale, 512)
    torch.testing.assert_close(whole * scale[:, None], weights, rtol=5e-3, atol=1e-6)
