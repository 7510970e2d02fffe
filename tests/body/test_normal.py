"""The random numbers of random states and of noise: standard normal, and the same in every batch."""

from __future__ import annotations

import noise
import pytest
import torch

from patchscope_nn.body.random import in_mixed, in_normal


def normal(seeds, draws, width, dtype=torch.float32):
    like = torch.empty(0, width, dtype=dtype)
    return in_normal(torch.tensor(seeds), torch.tensor(draws), like)


def moments(numbers):
    """The mean, the variance, the skewness and the kurtosis."""
    numbers = numbers.double().flatten()
    centred = numbers - numbers.mean()
    variance = centred.square().mean()
    third, fourth = (centred**power / variance ** (power / 2) for power in (3, 4))
    return [part.item() for part in (numbers.mean(), variance, third.mean(), fourth.mean())]


#: Seeds as the sweep makes them, small neighbours, draws of one seed, and many seeds of narrow states.
SAMPLES = {
    "neighbouring seeds": (range(200), [0] * 200, 1000),
    "wide seeds": ([number * 0x5DEECE66D1CE4E5 % 2**56 for number in range(200)], [0] * 200, 1000),
    "neighbouring draws": ([7] * 200, range(200), 1000),
    "narrow": (range(100_000), [3] * 100_000, 2),
    "one column": (range(200_000), [0] * 200_000, 1),
    "one row": ([5], [0], 200_000),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_they_are_standard_normal(sample):
    """Within five standard errors: of n numbers sqrt(1 / n), sqrt(2 / n), sqrt(6 / n) and sqrt(24 / n)."""
    seeds, draws, width = SAMPLES[sample]
    numbers = normal(list(seeds), list(draws), width)
    count = numbers.numel()
    assert count == 200_000
    assert numbers.isfinite().all()
    for found, expected, spread in zip(moments(numbers), (0, 1, 0, 3), (1, 2, 6, 24), strict=True):
        assert found == pytest.approx(expected, abs=5 * (spread / count) ** 0.5)
    tails = [(numbers.abs() > limit).double().mean().item() for limit in (1, 2, 3)]
    assert tails == pytest.approx([0.3173, 0.0455, 0.0027], abs=0.005)
    assert len(numbers.unique()) > 0.99 * count


@pytest.mark.parametrize("sample", ["neighbouring seeds", "wide seeds", "neighbouring draws"])
def test_rows_and_columns_are_not_correlated(sample):
    seeds, draws, width = SAMPLES[sample]
    numbers = normal(list(seeds), list(draws), width).double()
    rows, columns = torch.corrcoef(numbers), torch.corrcoef(numbers.T)
    for found, count in ((rows, numbers.shape[1]), (columns, numbers.shape[0])):
        found.fill_diagonal_(0)
        assert found.abs().max() < 7 / count**0.5
    # The two numbers that one hash gives.
    first, second = numbers[:, : width // 2].flatten(), numbers[:, width // 2 :].flatten()
    for one, other in ((first, second), (first.square(), second.square())):
        assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs() < 5 / len(first) ** 0.5


@pytest.mark.parametrize("width", [1, 2, 7, 32, 33])
def test_a_row_depends_only_on_its_seed_and_draw(width):
    seeds, draws = [3, 2**55 + 1, 3, 9, 0], [0, 4, 1, 0, 0]
    together = normal(seeds, draws, width)
    assert together.shape == (5, width)
    for row, (seed, draw) in enumerate(zip(seeds, draws, strict=True)):
        assert torch.equal(normal([seed], [draw], width)[0], together[row])
    order = [4, 2, 0, 1, 3, 2]
    mixed = normal([seeds[row] for row in order], [draws[row] for row in order], width)
    assert torch.equal(mixed, together[order])


@pytest.mark.parametrize("width", [1, 2, 7, 32, 33])
def test_draws_seeds_and_columns_differ(width):
    grid = [(seed, draw) for seed in (0, 1, 2, 2**55, 2**55 + 1) for draw in range(5)]
    numbers = normal([seed for seed, _ in grid], [draw for _, draw in grid], width)
    assert len(numbers.unique()) == numbers.numel()


def test_a_seed_and_its_next_draw_are_not_the_next_seed():
    """Seed and draw are not added up."""
    assert not torch.equal(normal([4], [1], 8), normal([5], [0], 8))
    assert not torch.equal(normal([5], [0], 8)[0, 1:4], normal([4], [1], 8)[0, :3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_they_are_those_of_single_precision_in_the_models_dtype(dtype):
    numbers = normal([1, 2], [0, 0], 9, dtype)
    assert numbers.dtype == dtype
    assert torch.equal(numbers, normal([1, 2], [0, 0], 9).to(dtype))


def test_no_rows_are_no_numbers():
    empty = torch.empty(0, dtype=torch.int64)
    assert in_normal(empty, empty, torch.empty(3, 8)).shape == (0, 8)


def test_they_are_the_same_on_every_machine():
    """Runs can be repeated: these numbers are part of the format."""
    expected = [0.4487550, 1.0606022, -0.2083969, 0.0046954]
    assert normal([1], [0], 4)[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_the_hash_is_that_of_splitmix64():
    """The first numbers of SplitMix64 with the seeds 0 and 1234567 (its reference implementation)."""
    known = {0: 0xE220A8397B1DCDAF, 1234567: 6457827717110365317}
    found = in_mixed(torch.tensor(list(known)))
    assert [number % 2**64 for number in found.tolist()] == list(known.values())


def test_the_hash_is_one_to_one():
    numbers = torch.arange(-50_000, 50_000)
    assert len(in_mixed(numbers).unique()) == len(numbers)


@pytest.mark.parametrize("width", [1, 2, 7, 64])
def test_they_are_those_of_plain_python(width):
    seeds, draws = [0, 1, 2**56 - 1], [0, 3, 1]
    expected = torch.stack([noise.normal(*pair, width) for pair in zip(seeds, draws, strict=True)])
    torch.testing.assert_close(normal(seeds, draws, width), expected, atol=1e-5, rtol=1e-5)
