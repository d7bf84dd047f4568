"""Rotary positions: golden numbers, distances, half precision."""

import math

import torch

from attnzoo.core.rotary import Rotation, rotate

F64 = torch.float64


def turned(vector: list[float], position: int) -> torch.Tensor:
    return rotate(torch.tensor(vector, dtype=F64)[None, None, None], position)[0, 0, 0]


def test_rotary_golden_numbers():
    torch.testing.assert_close(
        turned([1.0, 0.0], 1), torch.tensor([0.5403, 0.8415], dtype=F64), rtol=0, atol=5e-5
    )
    torch.testing.assert_close(
        turned([0.3, -2.0, 1.0, 5.0], 0), torch.tensor([0.3, -2.0, 1.0, 5.0], dtype=F64)
    )
    c, s = math.cos, math.sin  # four channels: θ = (1, 0.01)
    expected = torch.tensor([c(3), s(3), -s(0.03), c(0.03)], dtype=F64)
    torch.testing.assert_close(turned([1.0, 0.0, 0.0, 1.0], 3), expected, rtol=0, atol=1e-14)


def test_rotary_keeps_norms_and_sees_distances_only():
    q, k = torch.randn(2, 3, 1, 8, dtype=F64), torch.randn(2, 3, 1, 8, dtype=F64)
    for i, j in ((0, 0), (5, 2), (2, 9)):
        torch.testing.assert_close(rotate(q, i).norm(dim=-1), q.norm(dim=-1))
        near, far = (rotate(q, i + by) @ rotate(k, j + by).mT for by in (0, 13))
        torch.testing.assert_close(near, far, rtol=0, atol=1e-12)
        if i != j:
            assert not torch.allclose(near, q @ k.mT)
    tokens = torch.randn(1, 1, 6, 8, dtype=F64)  # a run of tokens is the tokens one by one
    one_by_one = torch.cat([rotate(tokens[:, :, p : p + 1], p + 4) for p in range(6)], dim=2)
    torch.testing.assert_close(rotate(tokens, 4), one_by_one, rtol=0, atol=1e-14)


def test_rotary_angles_are_not_in_half_precision():
    x = torch.tensor([1.0, 0.0])[None, None, None]
    wanted = torch.tensor([math.cos(1001), math.sin(1001)])
    torch.testing.assert_close(rotate(x.bfloat16(), 1001)[0, 0, 0].float(), wanted, rtol=0, atol=0.005)
    assert rotate(x.half()).dtype == torch.float16


def test_both_pairings_are_one_function_of_channels_in_another_order():
    """Pairs (2i, 2i + 1) of a vector are pairs (i, i + d/2) of [evens, odds]; with the same order they are not the same."""
    x, evens_odds = torch.randn(2, 3, 5, 8, dtype=F64), [0, 2, 4, 6, 1, 3, 5, 7]
    angles = torch.arange(5, dtype=F64)[:, None] * 10_000.0 ** (-torch.arange(0, 8, 2, dtype=F64) / 8)
    twice = torch.cat([angles, angles], dim=-1)
    halves = Rotation(torch.cat([twice.sin(), twice.cos()], dim=-1), half=True)
    found = halves.turn(x[..., evens_odds], 0)
    torch.testing.assert_close(found, rotate(x)[..., evens_odds], rtol=0, atol=1e-12)
    assert (halves.turn(x, 0) - rotate(x)).abs().max() > 0.1
