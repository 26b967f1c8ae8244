"""Quantile bins and log1p values equal the original's output bit for bit, and have the right properties."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from tahoex1_hf.encoding_tahoe_x1 import (
    GeneRows,
    _checked_lengths,
    _distinct_values,
    _fused_multiply_add,
    _quantile_edges,
    bin_expression,
    content_numbers,
    log_normalize,
    unit_quantiles,
)

GOLDEN = np.load(Path(__file__).parent / "golden" / "binning" / "binning.npz")
CASES = sorted({name.split("/")[0] for name in GOLDEN})


def join(rows):
    """Return rows as (values, offsets)."""
    return np.concatenate(rows), np.cumsum([0, *(len(row) for row in rows)])


def split(values, offsets):
    return np.split(values, offsets[1:-1])


def torch_is_as_recorded() -> bool:
    """Return whether this torch, on this processor, gives the recorded quantiles.

    It does not from torch 2.15 on, nor on processors without a fused multiply-add.
    """
    places = torch.linspace(0, 1, 50)
    for case in CASES:
        row = torch.from_numpy(GOLDEN[f"{case}/row"])
        row = row[row != 0]
        if len(row) and not np.array_equal(torch.quantile(row, places).numpy(), GOLDEN[f"{case}/quantiles51"]):
            return False
    return True


def by_torch(row, num_bins, right):
    """Bin one cell by the definition."""
    row = torch.from_numpy(row)
    edges = torch.quantile(row[row != 0], torch.linspace(0, 1, num_bins - 1))
    return (torch.searchsorted(edges, row, side="right" if right else "left") + (not right)).float().numpy()


def random_rows(seed, count):
    """Return cells of 1 to 3,000 values: small or large counts, uniform, log-normalised, or a few values repeated."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        n = int(np.exp(rng.uniform(0, np.log(3000)))) if i % 2 else int(rng.integers(1, 3001))
        kinds = (
            rng.poisson(2, n) + 1,
            rng.integers(1, 10**6, n),
            rng.random(n) * 100 + 1e-6,
            np.log1p((rng.poisson(1, n) + 1) * 1e4 / 3777),
            rng.choice([0.1, 0.3, 0.7], n),
        )
        rows.append(kinds[i % len(kinds)].astype(np.float32))
    return rows


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("num_bins", [51, 31, 7, 3, 2])
@pytest.mark.parametrize("case", CASES)
def test_bins_equal_the_originals(case, num_bins, right):
    row = GOLDEN[f"{case}/row"]
    bins = bin_expression(row, np.array([0, len(row)]), num_bins, right)
    assert bins.dtype == np.float32
    np.testing.assert_array_equal(bins, GOLDEN[f"{case}/bins{num_bins}_right{int(right)}"])


@pytest.mark.parametrize("case", CASES)
def test_edges_equal_the_originals(case):
    row = GOLDEN[f"{case}/row"]
    lengths = _checked_lengths(np.array([0, len(row)]), len(row))
    _, values, cells, counts = _distinct_values(row, lengths)
    counts[values == 0] = 0
    edges = _quantile_edges(values, cells, counts, 1, 50)
    np.testing.assert_array_equal(edges.view(np.int32), GOLDEN[f"{case}/quantiles51"].view(np.int32))


@pytest.mark.parametrize("case", [case for case in CASES if (GOLDEN[f"{case}/row"] >= 0).all()])
def test_log1p_equals_the_originals(case):
    # The original sums in float32; sums in float64 differ by at most a rounding or two.
    row = GOLDEN[f"{case}/row"]
    np.testing.assert_allclose(
        log_normalize(row, np.array([0, len(row)])), GOLDEN[f"{case}/log10000"], rtol=3e-7, atol=1e-7
    )


@pytest.mark.parametrize("right", [False, True])
def test_cases_in_one_batch_equal_each_case_alone(right):
    # Integer and fractional cells together take the sorting path, integer cells alone the histogram: same bits.
    rows = [GOLDEN[f"{case}/row"] for case in CASES]
    values, offsets = join([*rows, np.zeros(0, np.float32)])
    for case, bins in zip(CASES, split(bin_expression(values, offsets, 51, right), offsets), strict=False):
        np.testing.assert_array_equal(bins, GOLDEN[f"{case}/bins51_right{int(right)}"], err_msg=case)


@pytest.mark.skipif(not torch_is_as_recorded(), reason="this torch rounds quantiles differently from the recording")
@pytest.mark.parametrize(("num_bins", "right"), [(51, False), (51, True), (31, True), (7, False)])
def test_bins_equal_torch_quantile_on_random_cells(num_bins, right):
    rows = random_rows(num_bins + right, 300)
    for start in range(0, len(rows), 100):
        values, offsets = join(rows[start : start + 100])
        wanted = [by_torch(row, num_bins, right) for row in rows[start : start + 100]]
        np.testing.assert_array_equal(bin_expression(values, offsets, num_bins, right), np.concatenate(wanted))


def test_histogram_and_sorting_agree():
    rows = [row for i, row in enumerate(random_rows(5, 100)) if i % 5 == 0]  # small counts
    values, offsets = join(rows)
    # One far outlier makes the histogram too large, so that the other cells are sorted.
    outlier = np.array([2.0**23], dtype=np.float32)
    with_outlier = bin_expression(*join([outlier, *rows]))
    np.testing.assert_array_equal(with_outlier[1:], bin_expression(values, offsets))


def test_the_other_cells_and_their_order_do_not_matter():
    rows = random_rows(1, 60)
    values, offsets = join(rows)
    bins = split(bin_expression(values, offsets), offsets)
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled_values, shuffled_offsets = join([rows[i] for i in order])
    shuffled = split(bin_expression(shuffled_values, shuffled_offsets), shuffled_offsets)
    for place, i in enumerate(order):
        np.testing.assert_array_equal(shuffled[place], bins[i])
        np.testing.assert_array_equal(bin_expression(*join([rows[i]])), bins[i])


def test_the_order_of_genes_does_not_matter():
    row = random_rows(2, 3)[2]
    order = np.random.default_rng(0).permutation(len(row))
    np.testing.assert_array_equal(bin_expression(*join([row[order]])), bin_expression(*join([row]))[order])


def test_zeros_and_cells_without_values():
    rows = [np.zeros(0), np.array([0.0, -0.0]), np.array([0, 3, 0, 5]), np.zeros(0)]
    values, offsets = join(rows)
    np.testing.assert_array_equal(bin_expression(values, offsets, 51), [1, 1, 1, 1, 1, 50])
    np.testing.assert_array_equal(bin_expression(values, offsets, 51, right=True), [0, 0, 0, 1, 0, 50])
    assert bin_expression(np.zeros(0), np.zeros(3, np.int64)).shape == (0,)


def test_bins_stay_in_range_and_rise_with_the_value():
    values, offsets = join(random_rows(3, 50))
    for row, bins in zip(split(values, offsets), split(bin_expression(values, offsets), offsets), strict=True):
        assert bins.min() >= 1
        assert bins.max() <= 50
        assert (np.diff(bins[np.argsort(row, kind="stable")]) >= 0).all()


@pytest.mark.parametrize("function", [bin_expression, log_normalize])
def test_values_are_left_alone(function):
    values = np.array([3, 0, 1, 2], dtype=np.float32)
    values.setflags(write=False)
    assert function(values, np.array([0, 2, 4])).dtype == np.float32


@pytest.mark.parametrize("function", [bin_expression, log_normalize])
@pytest.mark.parametrize("offsets", [[], [0, 2], [1, 3], [0, 3, 2, 3]])
def test_offsets_must_partition_the_values(function, offsets):
    with pytest.raises(ValueError, match=r"offsets must rise from 0 to the number of values \(3\)"):
        function(np.ones(3, np.float32), np.array(offsets, dtype=np.int64))


def test_refused_arguments():
    with pytest.raises(ValueError, match="num_bins=1"):
        bin_expression(np.ones(3), np.array([0, 3]), num_bins=1)
    with pytest.raises(ValueError, match="NaN"):
        bin_expression(np.array([1, np.nan]), np.array([0, 2]))


def test_log1p_of_cells_without_values():
    values, offsets = join([np.zeros(0), np.array([1.0, 3.0]), np.array([0.0])])
    np.testing.assert_allclose(log_normalize(values, offsets, 4.0), np.log1p([1, 3, 0]), rtol=1e-6)


def test_products_and_sums_are_rounded_once() -> None:
    """Results equal exact fractions; the last two would come out wrong if float64 rounded them first."""
    random = np.random.default_rng(0)
    a, b, c = random.standard_normal((3, 2000)) * 2.0 ** random.integers(-20, 20, (3, 2000))
    # This lies below the middle of two float32 numbers by less than float64 can resolve beside 1: float64 sees the
    # middle itself, from which a second rounding goes to the even number above.
    a, b, c = np.append(a, [1 + 2**-15, -1 - 2**-15]), np.append(b, [(1 - 2**-15) / 2**24] * 2), np.append(c, [1, -1])
    c[-2:] *= 1 + 2**-23
    a, b, c = a.astype(np.float32), b.astype(np.float32), c.astype(np.float32)
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (twice != _fused_multiply_add(a, b, c))[-2:].all()
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    found = _fused_multiply_add(a, b, c)
    for value, wanted in zip(found, exact, strict=True):
        neighbours = [Fraction(float(np.nextafter(value, np.float32(side)))) for side in (-np.inf, np.inf)]
        error = abs(Fraction(float(value)) - wanted)
        assert all(error <= abs(each - wanted) for each in neighbours)


@pytest.mark.parametrize("count", [1, 2, 3, 30, 50, 51, 255])
def test_unit_quantiles(count: int) -> None:
    found = unit_quantiles(count)
    assert found.dtype == np.float32
    assert found[0] == 0
    assert count == 1 or found[-1] == 1
    assert np.abs(found - np.linspace(0, 1, count)).max() <= 2**-24
    if torch_is_as_recorded():
        assert np.array_equal(found, torch.linspace(0, 1, count).numpy())


def test_number_of_a_cell_is_its_content() -> None:
    random = np.random.default_rng(0)
    tokens, counts = random.permutation(1000)[:30], random.integers(1, 9, 30).astype(np.float32)
    offsets = np.array([0, 10, 10, 30])
    numbers = content_numbers(GeneRows(tokens, counts, offsets))
    assert len(set(numbers.tolist())) == 3
    assert numbers[1] == 0  # an empty cell
    alone = content_numbers(GeneRows(tokens[10:], counts[10:], np.array([0, 20])))
    assert alone[0] == numbers[2]
    turned = content_numbers(GeneRows(tokens[::-1], counts[::-1], np.array([0, 20, 20, 30])))
    assert turned[0] == numbers[2]
    counts[0] += 1
    assert content_numbers(GeneRows(tokens, counts, offsets))[0] != numbers[0]
