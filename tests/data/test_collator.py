"""Batches for pretraining have the tokenizer's values and fairly drawn samples and targets; nothing else matters."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cells import write_vocab

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.cells import kernels
from tahoex1_hf.cells.kernels import NO_LABEL
from tahoex1_hf.cells.ragged import RowViews
from tahoex1_hf.data.collator import CellCollator
from tahoex1_hf.encoding_tahoe_x1 import bin_expression, log_normalize

GENES = [f"ENSG{i:011d}" for i in range(3000)]
SPECIAL = {"cls": 1, "drug": 3}


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocab(tmp_path_factory.mktemp("vocab"), GENES, drug_token=True)


def tokenizer(vocab: Path, **settings: Any) -> TahoeX1Tokenizer:
    return TahoeX1Tokenizer(str(vocab), **{"context_length": 64, **settings})


def cells_of(lengths: list[int], seed: int = 0, dtype: Any = np.uint16, largest: int = 60) -> RowViews:
    """Return cells with distinct genes and, as in real cells, geometric counts of which some are large."""
    rng = np.random.default_rng(seed)
    genes = np.concatenate([np.zeros(0, int), *(4 + rng.choice(len(GENES), n, replace=False) for n in lengths)])
    counts = np.minimum(rng.geometric(0.3, len(genes)), largest)
    counts[rng.random(len(counts)) < 0.02] = 300 + rng.integers(5)
    if dtype == np.float32:
        counts = counts * 0.37
    sizes = np.array(lengths, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    return RowViews(genes.astype(np.uint16), starts, counts.astype(dtype), starts, sizes)


def collate(collator: CellCollator, cells: RowViews, seed: int = 0, **kwargs: Any) -> dict[str, Any]:
    number = len(cells.lengths)
    streams = np.arange(seed * 10**6, seed * 10**6 + number, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return collator.collate([(np.arange(number), cells)], streams, **kwargs)


def as_dicts(batch: dict[str, Any], name: str, specials: int = 1) -> list[dict[int, float]]:
    """Return gene -> value for every cell of a padded batch."""
    result = []
    for row in range(len(batch["input_ids"])):
        valid = batch["attention_mask"][row]
        tokens, values = batch["input_ids"][row][valid][specials:], batch[name][row][valid][specials:]
        result.append(dict(zip(tokens.tolist(), values.tolist(), strict=True)))
    return result


def parts_of(cells: RowViews, values: np.ndarray) -> list[dict[int, float]]:
    return [
        dict(zip(cells.genes[a : a + n].tolist(), values[a : a + n].tolist(), strict=True))
        for a, n in zip(cells.gene_starts, cells.lengths, strict=True)
    ]


# Values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("num_bins", [3, 7, 51])
def test_bins_equal_the_tokenizers_bit_for_bit(vocab: Path, dtype: Any, right: bool, num_bins: int) -> None:
    cells = cells_of([0, 1, 2, 3, 7, 40, 500, 2500, 1999], dtype=dtype)
    settings = {"num_bins": num_bins, "right_binning": right, "context_length": 3000}
    collator = CellCollator(tokenizer(vocab, **settings), mlm_probability=None)
    offsets = np.append(cells.gene_starts, cells.lengths.sum())
    expected = bin_expression(cells.counts, offsets, num_bins, right)
    assert as_dicts(collate(collator, cells), "expression_values") == parts_of(cells, expected)


def test_bins_equal_the_golden_recordings(vocab: Path, golden: Path) -> None:
    recorded = np.load(golden / "binning" / "binning.npz")
    checked = 0
    for name in sorted({key.split("/")[0] for key in recorded}):
        row = recorded[f"{name}/row"]
        if not len(row) or not (np.isfinite(row).all() and row.min() > 0):
            continue  # the collator's cells have no zeros, and negative or missing counts were refused earlier
        starts, sizes = np.zeros(1, dtype=np.int64), np.array([len(row)])
        cells = RowViews(np.arange(4, 4 + len(row), dtype=np.uint16), starts, row, starts, sizes)
        for num_bins in (51, 31, 7, 3):
            for right in (0, 1):
                settings = {"num_bins": num_bins, "right_binning": bool(right), "context_length": 3000}
                collator = CellCollator(tokenizer(vocab, **settings), mlm_probability=None)
                values = collate(collator, cells)["expression_values"][0, 1:]
                np.testing.assert_array_equal(values, recorded[f"{name}/bins{num_bins}_right{right}"], err_msg=name)
                checked += 1
    assert checked > 40


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_log1p_and_raw_values(vocab: Path, dtype: Any) -> None:
    cells = cells_of([0, 3, 40, 1200], dtype=dtype)
    offsets = np.append(cells.gene_starts, cells.lengths.sum())
    for encoding, expected in {
        "log1p": log_normalize(cells.counts, offsets, 5000.0),
        "raw": cells.counts.astype(np.float32),
    }.items():
        settings = {"value_encoding": encoding, "target_sum": 5000.0, "context_length": 3000}
        found = as_dicts(
            collate(CellCollator(tokenizer(vocab, **settings), mlm_probability=None), cells), "expression_values"
        )
        for ours, theirs in zip(found, parts_of(cells, expected), strict=True):
            assert ours.keys() == theirs.keys()
            np.testing.assert_allclose(
                list(ours.values()), list(theirs.values()), rtol=1e-7 if encoding == "raw" else 2e-7
            )


def test_arrays_that_can_be_written_to_need_no_loops_of_their_own(vocab: Path) -> None:
    """numba compiles for 5 seconds for each type of array: those of lists are taken as those of files are."""
    CellCollator(tokenizer(vocab))([{"genes": [4, 5, 6], "counts": [1, 2, 3]}])
    compiled = [genes for genes, *_ in kernels.encode_cells.signatures]
    assert compiled
    assert not [genes for genes in compiled if genes.mutable or genes.dtype.bitwidth == 64]


def test_bins_are_those_of_the_whole_cell_not_of_its_sample(vocab: Path) -> None:
    cells = cells_of([700, 900])
    offsets = np.append(cells.gene_starts, cells.lengths.sum())
    whole = parts_of(cells, bin_expression(cells.counts, offsets))
    sampled = as_dicts(collate(CellCollator(tokenizer(vocab), mlm_probability=None), cells), "expression_values")
    for cell, expected in zip(sampled, whole, strict=True):
        assert len(cell) == 63
        assert cell.items() <= expected.items()


def test_the_first_genes_are_kept_where_the_tokenizer_says_so(vocab: Path) -> None:
    cells = cells_of([100, 20])
    batch = collate(CellCollator(tokenizer(vocab, overflow="first"), mlm_probability=None), cells)
    assert batch["input_ids"][0, 1:].tolist() == cells.genes[:63].tolist()
    assert batch["input_ids"][1, 1:21].tolist() == cells.genes[100:120].tolist()


def test_a_cell_that_fits_keeps_its_order(vocab: Path) -> None:
    cells = cells_of([63])
    batch = collate(CellCollator(tokenizer(vocab)), cells)
    assert batch["input_ids"][0, 1:].tolist() == cells.genes.tolist()


# Targets and samples ------------------------------------------------------------------------------


def test_targets_are_hidden_and_labelled(vocab: Path) -> None:
    cells = cells_of([40, 7, 1, 0, 500])
    plain = as_dicts(collate(CellCollator(tokenizer(vocab), mlm_probability=None), cells), "expression_values")
    offsets = np.append(cells.gene_starts, cells.lengths.sum())
    whole = parts_of(cells, bin_expression(cells.counts, offsets))
    batch = collate(CellCollator(tokenizer(vocab), mlm_probability=0.4), cells)
    targets = batch["target_mask"]
    assert targets.dtype == torch.bool
    assert targets.sum(1).tolist() == [16, 2, 0, 0, 25]  # rounded down
    assert (batch["labels"] != NO_LABEL).equal(targets)
    assert (batch["expression_values"][targets] == -1).all()
    assert not targets[:, 0].any()
    assert not targets[~batch["attention_mask"]].any()
    assert (batch["expression_values"][:, 0] == -2).all()
    assert (batch["expression_values"][~batch["attention_mask"]] == -2).all()
    assert (batch["input_ids"][~batch["attention_mask"]] == 0).all()
    assert (batch["input_ids"][:, 0] == SPECIAL["cls"]).all()
    merged = torch.where(targets, batch["labels"], batch["expression_values"])
    for found, expected in zip(as_dicts({**batch, "merged": merged}, "merged"), whole, strict=True):
        assert found.items() <= expected.items()
    assert [len(cell) for cell in plain] == [40, 7, 1, 0, 63]


def test_each_cell_draws_one_of_several_probabilities(vocab: Path) -> None:
    batch = collate(CellCollator(tokenizer(vocab), mlm_probability=[0.1, 0.5, 1.0]), cells_of([50] * 600))
    numbers = Counter(batch["target_mask"].sum(1).tolist())
    assert set(numbers) == {5, 25, 50}
    assert min(numbers.values()) > 150  # of 200; six standard deviations are 69


def chi_square(counts: np.ndarray, expected: float) -> float:
    """Return the chi-square statistic, in standard deviations from its mean."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float((statistic - (len(counts) - 1)) / np.sqrt(2 * (len(counts) - 1)))


@pytest.mark.parametrize(("length", "kept"), [(90, 63), (64, 63), (1000, 63), (65, 63)])
def test_every_gene_is_sampled_and_hidden_equally_often(vocab: Path, length: int, kept: int) -> None:
    """Pairs of neighbours, which share random bits, occur as often as if drawn apart."""
    collator, repeats = CellCollator(tokenizer(vocab, value_encoding="raw"), mlm_probability=0.3), 4000
    genes = np.arange(4, 4 + length, dtype=np.uint16)
    zeros, sizes = np.zeros(repeats, dtype=np.int64), np.full(repeats, length)
    cells = RowViews(genes, zeros, np.arange(1, 1 + length, dtype=np.uint16), zeros, sizes)
    streams = np.random.default_rng(3).integers(0, 2**63, repeats).astype(np.uint64)
    batch = collator.collate([(np.arange(repeats), cells)], streams)
    kept_flags = np.zeros((repeats, length), dtype=bool)
    target_flags = np.zeros((repeats, length), dtype=bool)
    rows = np.repeat(np.arange(repeats), kept)
    places = batch["input_ids"][:, 1:].numpy() - 4
    kept_flags[rows, places.ravel()] = True
    target_flags[rows, places.ravel()] = batch["target_mask"][:, 1:].numpy().ravel()
    targets = int(0.3 * kept)
    assert (kept_flags.sum(1) == kept).all()
    assert (target_flags.sum(1) == targets).all()
    # The flags of a repeat are not independent (their sum is fixed), which makes the statistic smaller, not larger.
    assert chi_square(kept_flags.sum(0), repeats * kept / length) < 5
    assert chi_square(target_flags.sum(0), repeats * targets / length) < 5
    for distance in (1, 2, 3, 4):
        pairs = (target_flags[:, :-distance] & target_flags[:, distance:]).sum()
        expected = repeats * (length - distance) * targets * (targets - 1) / (length * (length - 1))
        assert abs(pairs - expected) < 6 * np.sqrt(expected) + 1
    # Sampling does not favour targets at the edges: the first and last kept genes are hidden as often as the others.
    shares = target_flags.sum(0) / np.maximum(kept_flags.sum(0), 1)
    assert abs(shares.mean() - targets / kept) < 0.01


def test_unexpressed_genes_fill_up_the_context(vocab: Path) -> None:
    cells = cells_of([20, 63, 200, 0])
    collator = CellCollator(tokenizer(vocab), unexpressed_padding=True, mlm_probability=0.5)
    batch = collate(collator, cells)
    assert batch["attention_mask"].all()
    assert batch["target_mask"].sum(1).tolist() == [31] * 4
    values = torch.where(batch["target_mask"], batch["labels"], batch["expression_values"])
    for row, (start, length) in enumerate(zip(cells.gene_starts, cells.lengths, strict=True)):
        own = set(cells.genes[start : start + length].tolist())
        tokens, found = batch["input_ids"][row, 1:], values[row, 1:]
        assert len(set(tokens.tolist())) == 63
        for token, value in zip(tokens.tolist(), found.tolist(), strict=True):
            assert (value > 0) == (token in own)
            assert token >= 4
    assert (values[0, 1:] > 0).sum() == 20
    assert batch["target_mask"][0, 21:].any()  # unexpressed genes are targets too
    again = collate(collator, cells_of([20]))
    assert batch["input_ids"][0].equal(again["input_ids"][0])  # a cell does not depend on its batch


def test_a_small_vocabulary_leaves_some_padding(tmp_path: Path) -> None:
    few = TahoeX1Tokenizer(str(write_vocab(tmp_path, GENES[:30])), context_length=64)
    starts, sizes = np.zeros(1, dtype=np.int64), np.array([10])
    cells = RowViews(np.arange(3, 13, dtype=np.uint16), starts, np.ones(10, dtype=np.uint16), starts, sizes)
    batch = collate(CellCollator(few, unexpressed_padding=True), cells)
    assert batch["attention_mask"].sum() == 31
    assert sorted(batch["input_ids"][0, 1:31].tolist()) == list(range(3, 33))


@pytest.mark.parametrize("packed", [False, True])
def test_absent_genes_are_targets_and_nothing_else(vocab: Path, packed: bool) -> None:
    cells = cells_of([20, 200, 0, 2990])
    collator = CellCollator(tokenizer(vocab), absent_targets=0.25, mlm_probability=0.5, packed=packed)
    batch = collate(collator, cells)
    num_own, num_absent = [20, 47, 0, 47], [7, 16, 0, 10]  # the last cell lacks only ten genes
    lengths = collator.lengths(cells.lengths).tolist()
    assert lengths == [1 + a + b for a, b in zip(num_own, num_absent, strict=True)]
    names = ("input_ids", "expression_values", "labels", "target_mask")
    for row, (start, length) in enumerate(zip(cells.gene_starts, cells.lengths, strict=True)):
        own = cells.genes[start : start + length]
        low, line = (int(batch["cu_seq_lens_q"][row]), 0) if packed else (0, row)
        tokens, values, labels, targets = (batch[name][line, low + 1 : low + lengths[row]].numpy() for name in names)
        expressed = np.isin(tokens, own)
        assert len(set(tokens)) == len(tokens) == num_own[row] + num_absent[row]
        assert expressed.sum() == num_own[row]
        assert targets[~expressed].all()
        assert (labels[~expressed] == 0).all()
        assert (targets & expressed).sum() == num_own[row] // 2
        assert (values[~targets] > 0).all()  # a cell sees only what it expresses
        assert (labels[targets & expressed] > 0).all()
    alone = collate(collator, cells_of([20]))
    assert batch["input_ids"][0, :28].equal(alone["input_ids"][0, :28])


@pytest.mark.parametrize("encoding", ["bins", "log1p"])
def test_labels_of_all_genes_are_the_whole_cells(vocab: Path, encoding: str) -> None:
    cells = cells_of([20, 500, 0])
    settings = {"value_encoding": encoding, "context_length": 3000}
    whole = collate(CellCollator(tokenizer(vocab, **settings), mlm_probability=None), cells)
    for form in ({"packed": True}, {"absent_targets": 0.3}):
        short = CellCollator(tokenizer(vocab, **settings), context_length=64, cell_targets="all", **form)
        labels = collate(short, cells)["cell_labels"]
        assert labels.shape == (3, 4 + len(GENES))
        assert (labels[:, :4] == NO_LABEL).all()
        for row, expected in enumerate(as_dicts(whole, "expression_values")):
            genes = torch.tensor(list(expected), dtype=torch.int64)
            assert labels[row, genes].tolist() == list(expected.values())
            assert (labels[row, 4:] != 0).sum() == len(expected)


# Cells depend on nothing else ---------------------------------------------------------------------


def rows_of(batch: dict[str, Any]) -> list[tuple[list[float], ...]]:
    names = ("input_ids", "expression_values", "target_mask", "labels")
    masks = batch["attention_mask"]
    return [tuple(batch[name][row][masks[row]].tolist() for name in names) for row in range(len(masks))]


def test_a_cell_does_not_depend_on_batch_order_or_padding(vocab: Path) -> None:
    cells = cells_of([10, 500, 63, 0, 900, 30])
    streams = np.arange(6, dtype=np.uint64) + np.uint64(77)
    for settings in ({}, {"pad_to_multiple_of": 50}):
        collator = CellCollator(tokenizer(vocab), **settings)
        whole = rows_of(collator.collate([(np.arange(6), cells)], streams))
        order = np.array([4, 0, 3, 5, 1, 2])
        turned = RowViews(
            cells.genes, cells.gene_starts[order], cells.counts, cells.count_starts[order], cells.lengths[order]
        )
        assert rows_of(collator.collate([(np.arange(6), turned)], streams[order])) == [whole[i] for i in order]
        for i in range(6):
            one = RowViews(
                cells.genes, cells.gene_starts[[i]], cells.counts, cells.count_starts[[i]], cells.lengths[[i]]
            )
            assert rows_of(collator.collate([(np.zeros(1, dtype=int), one)], streams[[i]])) == [whole[i]]
    # In two parts, as the cells of two shards arrive.
    parts = [(order[:2], order[:2]), (order[2:], order[2:])]
    split = [
        (rows, RowViews(cells.genes, cells.gene_starts[c], cells.counts, cells.count_starts[c], cells.lengths[c]))
        for rows, c in parts
    ]
    assert rows_of(CellCollator(tokenizer(vocab)).collate(split, streams)) == whole


def test_packed_and_padded_hold_the_same(vocab: Path) -> None:
    cells = cells_of([10, 500, 63, 0, 30])
    padded = rows_of(collate(CellCollator(tokenizer(vocab)), cells))
    packed = collate(CellCollator(tokenizer(vocab), packed=True), cells)
    bounds = packed["cu_seq_lens_q"].tolist()
    assert "attention_mask" not in packed
    assert packed["input_ids"].shape == (1, bounds[-1])
    assert packed["cu_seq_lens_k"].tolist() == bounds
    assert packed["max_length_q"] == packed["max_length_k"] == 64
    names = ("input_ids", "expression_values", "target_mask", "labels")
    for row, (start, stop) in enumerate(pairwise(bounds)):
        assert tuple(packed[name][0, start:stop].tolist() for name in names) == padded[row]


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_the_input_is_not_changed(vocab: Path, dtype: Any) -> None:
    cells = cells_of([10, 500, 63], dtype=dtype)
    copies = [getattr(cells, name).copy() for name in ("genes", "counts", "lengths")]
    for settings in ({}, {"unexpressed_padding": True}, {"packed": True}):
        first = collate(CellCollator(tokenizer(vocab), **settings), cells)
        again = collate(CellCollator(tokenizer(vocab), **settings), cells)
        assert all(np.array_equal(first[name], again[name]) for name in first)
    for name, copy in zip(("genes", "counts", "lengths"), copies, strict=True):
        np.testing.assert_array_equal(getattr(cells, name), copy)


def test_other_streams_give_other_samples_and_targets(vocab: Path) -> None:
    cells, collator = cells_of([500, 40]), CellCollator(tokenizer(vocab))
    first, second = collate(collator, cells, seed=1), collate(collator, cells, seed=2)
    assert not first["input_ids"][0].equal(second["input_ids"][0])
    assert not first["target_mask"][1].equal(second["target_mask"][1])


# Drugs --------------------------------------------------------------------------------------------


def test_the_drug_token_stands_second_and_takes_one_place(vocab: Path) -> None:
    table = {"<pad>": 0, "aspirin": 1, "Selinexor": 2}
    with_drugs = tokenizer(vocab, drug_to_id=table)
    collator = CellCollator(with_drugs)
    cells = cells_of([500, 10, 0])
    batch = collate(collator, cells, drug_ids=np.array([2, 0, 1]))
    assert batch["drug_ids"].tolist() == [2, 0, 1]
    assert (batch["input_ids"][:, :2] == torch.tensor([1, 3])).all()
    assert (batch["expression_values"][:, :2] == -2).all()
    assert not batch["target_mask"][:, :2].any()
    assert batch["attention_mask"].sum(1).tolist() == [64, 12, 2]
    assert batch["target_mask"].sum(1).tolist() == [31, 5, 0]
    with pytest.raises(ValueError, match="drug_ids is missing"):
        collate(collator, cells)
    names = ("Selinexor ", None, "", "DMSO_TF")  # a name with a blank, and the control, which is no drug
    features = [{"genes": [9, 8], "counts": [1, 2], "drug": name} for name in names]
    assert collator(features)["drug_ids"].tolist() == [2, 0, 0, 0]
    refuses = CellCollator(tokenizer(vocab, drug_to_id=table, unknown_drugs="error"))
    with pytest.raises(ValueError, match="'DMSO_TF' is not in the drug table"):
        refuses(features)


# Rows of datasets ---------------------------------------------------------------------------------


def test_a_seed_makes_samples_and_targets_follow_from_the_cell_alone(vocab: Path) -> None:
    cells, random = cells_of([500, 40, 300]), np.random.default_rng(0)
    rows = []
    for start, length in zip(cells.gene_starts, cells.lengths, strict=True):
        order = random.permutation(length)
        genes, counts = (values[start : start + length] for values in (cells.genes, cells.counts))
        rows.append(({"genes": genes, "counts": counts}, {"genes": genes[order], "counts": counts[order]}))

    def content(seed: int, features: list[dict[str, Any]]) -> list[set[tuple[float, ...]]]:
        batch = CellCollator(tokenizer(vocab), seed=seed)(features)
        tensors = (batch["input_ids"], batch["expression_values"], batch["labels"], batch["attention_mask"])
        return [set(zip(*(tensor[row].tolist() for tensor in tensors), strict=True)) for row in range(len(features))]

    whole = content(3, [row for row, _ in rows])
    cut = [{entry for entry in cell if entry[3]} for cell in whole]
    for place, (row, mixed) in enumerate(rows):  # alone, in another order of the genes, at another place
        assert {entry for entry in content(3, [mixed])[0] if entry[3]} == cut[place]
        assert {entry for entry in content(3, [rows[1][0], row])[1] if entry[3]} == cut[place]
    assert content(4, [rows[0][0]]) != content(3, [rows[0][0]])
    with pytest.raises(ValueError, match="seed=-1: pass a non-negative integer"):
        CellCollator(tokenizer(vocab), seed=-1)


def test_rows_of_datasets_are_collated_with_torchs_random_numbers(vocab: Path) -> None:
    cells = cells_of([500, 40])
    features = [
        {"genes": cells.genes[a : a + n].tolist(), "counts": cells.counts[a : a + n].tolist()}
        for a, n in zip(cells.gene_starts, cells.lengths, strict=True)
    ]
    collator = CellCollator(tokenizer(vocab))
    torch.manual_seed(5)
    first = collator(features)
    assert not collator(features)["input_ids"].equal(first["input_ids"])
    torch.manual_seed(5)
    again = collator(features)
    assert all(first[name].equal(again[name]) for name in first)
    offsets = np.append(cells.gene_starts, cells.lengths.sum())
    values = torch.where(first["target_mask"], first["labels"], first["expression_values"])
    whole = parts_of(cells, bin_expression(cells.counts, offsets))
    for found, expected in zip(as_dicts({**first, "v": values}, "v"), whole, strict=True):
        assert found.items() <= expected.items()


def test_stored_zeros_and_empty_cells(vocab: Path) -> None:
    batch = CellCollator(tokenizer(vocab), mlm_probability=None)(
        [{"genes": [5, 6, 7], "counts": [3, 0, 2]}, {"genes": [], "counts": []}]
    )
    assert batch["input_ids"].tolist() == [[1, 5, 7], [1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[True] * 3, [True, False, False]]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"genes": [5]}, r"has no 'counts', only \['genes'\]"),
        ({"genes": [5, 6], "counts": [1]}, r"genes of the shape \(2,\)"),
        ({"genes": [5], "counts": [-1]}, "negative, NaN or infinite"),
        ({"genes": [5], "counts": [float("nan")]}, "negative, NaN or infinite"),
        ({"genes": [1], "counts": [1]}, "not a gene's: leave <cls> out"),
        ({"genes": [10**6], "counts": [1]}, "not a gene's"),
        ({"genes": [-5], "counts": [1]}, "not a gene's"),
        ({"genes": ["ENSG"], "counts": [1]}, "not a gene's|invalid"),
    ],
)
def test_wrong_rows_are_refused(vocab: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CellCollator(tokenizer(vocab))([row])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mlm_probability": 1.5}, "mlm_probability=1.5"),
        ({"mlm_probability": 0}, "mlm_probability=0"),
        ({"mlm_probability": []}, "mlm_probability"),
        ({"mlm_probability": [0.5, -1]}, "mlm_probability"),
        ({"context_length": 1}, "context_length=1"),
        ({"packed": True, "unexpressed_padding": True}, "packed=True"),
        ({"packed": True, "pad_to_multiple_of": 8}, "packed=True"),
        ({"drug_token": True}, "drug_to_id"),
        ({"absent_targets": 1.0}, "absent_targets=1.0"),
        ({"absent_targets": 0.5, "unexpressed_padding": True}, "leave out unexpressed_padding"),
        ({"absent_targets": 0.999}, "no room"),
        ({"cell_targets": "every"}, "cell_targets='every'"),
    ],
)
def test_settings_that_cannot_be_used(vocab: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CellCollator(tokenizer(vocab), **settings)


def test_tokenizers_that_cannot_train(vocab: Path) -> None:
    for settings in ({"overflow": "highest"}, {"first_gene_raw": True}, {"context_length": None}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            CellCollator(tokenizer(vocab, **settings))


def test_a_model_takes_the_batch(vocab: Path) -> None:
    from helpers import tiny_config, tiny_model

    cells = cells_of([10, 500, 63])
    model = tiny_model(tiny_config(vocab_size=3004))
    losses = [
        model(**collate(CellCollator(tokenizer(vocab), **settings), cells)).loss.item()
        for settings in ({}, {"packed": True}, {"pad_to_multiple_of": 100})
    ]
    assert np.isfinite(losses).all()
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
