"""FNet, arXiv:2105.03824, §3.2, eq. 3."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, wrong

from attnzoo.core import Layout
from attnzoo.mechanisms.mixing.fourier import Fourier
from attnzoo.testing import against


@against(Fourier)
def test_oracle(options, x):
    """Re Σ_a Σ_b x[a, b] e^{-2πi (k a / n + l b / c)}, over √(n c) with `ortho`: the double sum."""
    _, n, c = x.shape
    scale = 1 / math.sqrt(n * c) if options["norm"] == "ortho" else 1.0
    tokens, channels = torch.arange(n)[:, None], torch.arange(c)
    out = torch.zeros_like(x)
    for k in range(n):
        for l_ in range(c):
            angle = 2 * math.pi * (k * tokens.double() / n + l_ * channels.double() / c)
            out[:, k, l_] = scale * (x * torch.cos(angle)).sum((1, 2))
    return out


def mixing(change):
    """Another transform of x."""
    return wrong(Fourier, mix=lambda self, x, source, *, mask, layout: change(x, self.norm, layout))


MUTANTS = {
    "the imaginary part": mixing(lambda x, norm, layout: torch.fft.fft2(x, norm=norm).imag),
    "absolute values": mixing(lambda x, norm, layout: torch.fft.fft2(x, norm=norm).abs()),
    "tokens only": mixing(lambda x, norm, layout: torch.fft.fft(x, dim=1, norm=norm).real),
    "never scaled": mixing(lambda x, norm, layout: torch.fft.fft2(x).real),
    "the inverse's scale": mixing(lambda x, norm, layout: torch.fft.fft2(x, norm="forward").real),
    "without special tokens": mixing(
        lambda x, norm, layout: torch.cat(
            [x[:, : layout.prefix], torch.fft.fft2(x[:, layout.prefix :], norm=norm).real], 1
        )
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def test_hand_two_by_two():
    out = Fourier(place(2))(torch.tensor([[[1.0, 2], [3, 4]]], dtype=torch.float64), layout=Layout((2,)))
    near(out, [[10, -2], [-4, 0]])


def test_hand_a_delta_and_ones():
    part, layout = Fourier(place(4, tokens=3)), Layout((3,))
    delta = torch.zeros(1, 3, 4, dtype=torch.float64)
    delta[0, 0, 0] = 1
    near(part(delta, layout=layout), torch.ones(1, 3, 4))
    near(part(torch.ones(1, 3, 4, dtype=torch.float64), layout=layout), 12 * delta)


def test_hand_it_has_no_parameters():
    assert count(Fourier(place(4))) == 0


# Identities


def test_identity_cosines_minus_sines_symmetric_and_nearly_its_own_inverse():
    n, c = 5, 6
    x = normal(1, n, c)
    part, layout = Fourier(place(c, tokens=n)), Layout((n,))
    out = part(x, layout=layout)
    angles = [2 * math.pi * torch.outer(torch.arange(k), torch.arange(k)).double() / k for k in (n, c)]
    near(out, angles[0].cos() @ x[0] @ angles[1].cos() - angles[0].sin() @ x[0] @ angles[1].sin())
    back = out.flip(1, 2).roll((1, 1), (1, 2))  # (-n, -c)
    near(out, back.tolist())
    near(part(out, layout=layout), n * c * (x + x.flip(1, 2).roll((1, 1), (1, 2))) / 2, 1e-11)
    ortho = Fourier(place(c, tokens=n), norm="ortho")(x, layout=layout)
    near(ortho * math.sqrt(n * c), out.tolist())


def test_narrow_numbers_stay_near():
    narrow(Fourier, [(2, 7, 12)], site=place(12, 3, 7), norm="ortho")
