"""In-silico perturbation equals known answers and brute force, samples long cells, and depends on nothing else."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from cells import GENES, make_cells, write_vocab
from helpers import tiny_config, tiny_model
from scipy.sparse import csc_matrix, csr_matrix

from tahoex1_hf import (
    TahoeX1ForPreTraining,
    TahoeX1Model,
    TahoeX1Tokenizer,
    embed_anndata,
    perturb_genes,
)
from tahoex1_hf.cells.encoding import EncodeOptions
from tahoex1_hf.cells.opening import open_cells
from tahoex1_hf.inference.chunks import with_settings
from tahoex1_hf.inference.expression import halves
from tahoex1_hf.perturbation.cells import Change, Pairs, PerturbationEncoder

QUIET: dict[str, Any] = {"null_genes": 0, "device": "cpu", "progress": False}
CLOSE: dict[str, float] = {"rel": 1e-3, "abs": 1e-9}  # of cosine distances, from 1e-5 to 0.1
MEASURES = ["cosine_distance", "euclidean_shift", "n_cells", "n_cells_expressing", "n_cells_changed"]


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocab(tmp_path_factory.mktemp("vocab"))


@pytest.fixture(scope="module")
def tokenizer(vocab: Path) -> TahoeX1Tokenizer:
    return TahoeX1Tokenizer(vocab)


@pytest.fixture(scope="module")
def model(tokenizer: TahoeX1Tokenizer) -> TahoeX1ForPreTraining:
    config = tiny_config(vocab_size=len(tokenizer), scale_targets=True, attention_mask_style="observed_or_self")
    return tiny_model(config, TahoeX1ForPreTraining)


def dense(adata: anndata.AnnData) -> np.ndarray:
    return csr_matrix(adata.X).toarray()


def embedded(counts: np.ndarray, model: Any, tokenizer: TahoeX1Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings of length 1 by `embed_anndata`, and raw ones by a plain forward pass, of explicit counts."""
    adata = anndata.AnnData(csr_matrix(counts), var=pd.DataFrame(index=GENES))
    embed_anndata(adata, model, tokenizer, dtype="float32", device="cpu", progress=False)
    with torch.inference_mode():
        pooled = model.base_model(**tokenizer(adata, padding=True, return_tensors="pt")).pooler_output
    return adata.obsm["X_tahoe_x1"].astype(np.float64), pooled.numpy().astype(np.float64)


def changed_counts(counts: np.ndarray, genes: list[int], mode: str, value: float | None) -> np.ndarray:
    counts = counts.copy()
    if mode == "percentile":
        levels = [np.percentile(row[row > 0], value, method="higher") if row.any() else 0 for row in counts]
        counts[:, genes] = np.maximum(counts[:, genes], np.array(levels)[:, None])
        return counts
    new = {"delete": 0, "overexpress": counts.max(1, keepdims=True), "set": value}[mode]
    counts[:, genes] = new
    return counts


# Against known answers ----------------------------------------------------------------------------


def planted_model(tokenizer: TahoeX1Tokenizer, special: dict[str, int]) -> TahoeX1Model:
    """Make a model whose cell embedding is the mean of one direction per gene: direction 0, or that in `special`."""
    config = tiny_config(
        vocab_size=len(tokenizer), cell_pooling="mean", gene_encoder_norm=False, expression_encoder_norm=False
    )
    model = TahoeX1Model(config).eval()
    # Cosines of different frequencies are orthogonal, with mean 0 and variance 1, so layer norm changes none of them.
    steps = (torch.arange(32) + 0.5) * torch.pi / 32
    directions = torch.stack([2**0.5 * torch.cos(k * steps) for k in range(1, 6)])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name or "expression_encoder" in name:
                parameter.zero_()
        table = model.embeddings.gene_encoder.embedding.weight
        table.copy_(directions[0].expand_as(table))
        for gene, direction in special.items():
            table[tokenizer.get_vocab()[gene]] = directions[direction]
    return model


def planted_cells(num_cells: int = 30, num_genes: int = 20) -> anndata.AnnData:
    """Make cells that all express the first `num_genes` genes with the same counts."""
    counts = np.zeros((num_cells, len(GENES)), dtype=np.float32)
    counts[:, :num_genes] = np.arange(1, num_genes + 1)
    state = np.where(np.arange(num_cells) < num_cells // 2, "sick", "healthy")
    counts[state == "healthy", 0] = 0  # healthy cells do not express the planted gene
    return anndata.AnnData(csr_matrix(counts), obs=pd.DataFrame({"state": state}), var=pd.DataFrame(index=GENES))


def test_planted_gene_is_found_with_the_shift_that_follows_from_geometry(tokenizer: TahoeX1Tokenizer) -> None:
    model, adata = planted_model(tokenizer, {GENES[0]: 1}), planted_cells()
    options = {"cells": 'state == "sick"', "target": 'state == "healthy"', "dtype": "float32", "device": "cpu"}
    table = perturb_genes(adata, model, tokenizer, "all", null_genes=15, progress=False, **options).table
    # A sick cell is 20 times direction 0 (with <cls>) and once direction 1; its length is sqrt(401).
    assert table["gene"][0] == GENES[0]
    assert len(table) == 20
    first, others = table.iloc[0], table.iloc[1:]
    assert first["cosine_distance"] == pytest.approx(1 - 20 / 401**0.5, abs=1e-8)
    assert first["target_change"] == pytest.approx(1 - 20 / 401**0.5, abs=1e-8)
    assert (first["n_cells"], first["n_cells_expressing"], first["n_cells_changed"]) == (15, 15, 15)
    # The mean is over 21 vectors of length sqrt(32) before, over 20 after.
    assert first["euclidean_shift"] == pytest.approx(32**0.5 * ((20 / 21 - 1) ** 2 + 1 / 21**2) ** 0.5, rel=1e-5)
    expected = (19 * 20 + 1) / (362 * 401) ** 0.5
    np.testing.assert_allclose(others["cosine_distance"], 1 - expected, atol=1e-8)
    np.testing.assert_allclose(others["target_change"], 19 / 362**0.5 - 20 / 401**0.5, atol=1e-7)
    assert (others["target_change"] < 0).all()
    assert first["p_value"] == pytest.approx(1 / 16)
    assert first["n_null"] == 15
    assert np.isfinite(first["null_mean"])


@pytest.mark.parametrize(("mode", "value"), [("overexpress", None), ("set", 4.0)])
def test_planted_gene_can_be_switched_on(tokenizer: TahoeX1Tokenizer, mode: Any, value: float | None) -> None:
    model, adata = planted_model(tokenizer, {GENES[0]: 1}), planted_cells()
    genes = [GENES[0], GENES[5], GENES[40]]
    choice = {"cells": 'state == "healthy"', "target": 'state == "sick"', "mode": mode, "value": value}
    table = perturb_genes(adata, model, tokenizer, genes, **choice, **QUIET).table.set_index("gene")
    assert list(table["n_cells_expressing"][genes]) == [0, 15, 0]
    assert list(table["n_cells_changed"][genes]) == [15, 15, 15]
    assert table["rank"][GENES[0]] == 1
    assert table["target_change"][GENES[0]] == pytest.approx(1 - 20 / 401**0.5, abs=1e-8)
    assert table["cosine_distance"][[GENES[5], GENES[40]]].abs().max() < 1e-12  # one more of direction 0
    assert table["cosine_distance_se"][GENES[0]] == pytest.approx(0, abs=1e-8)


# Against brute force -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mode", "value"),
    [
        ("csr", "delete", None),
        ("csr", "overexpress", None),
        ("csr", "set", 7.0),
        ("csr", "percentile", 60.0),
        ("csc", "delete", None),
        ("dense", "overexpress", None),
        ("backed", "overexpress", None),
        ("path", "delete", None),
    ],
)
def test_equals_embedding_a_modified_anndata(
    tokenizer: TahoeX1Tokenizer, model: Any, tmp_path: Path, kind: str, mode: Any, value: float | None
) -> None:
    adata = make_cells(30, seed=3)
    counts = dense(adata)
    genes = [4, 17, 30]
    if kind in ("csc", "dense"):
        adata.X = csc_matrix(counts) if kind == "csc" else counts
    source: Any = adata
    if kind in ("backed", "path"):
        adata.write_h5ad(tmp_path / "cells.h5ad")
        source = tmp_path / "cells.h5ad"
        source = anndata.read_h5ad(source, backed="r") if kind == "backed" else source
    names = [GENES[gene] for gene in genes]
    options: dict[str, Any] = {"mode": mode, "value": value, "groupby": "cell_type", "cells": "n_genes > 12"}
    table = perturb_genes(source, model, tokenizer, names, **options, **QUIET).table
    unit, raw = embedded(counts, model, tokenizer)
    assert len(table) == 9
    checked = 0
    for _, row in table.iterrows():
        gene = GENES.index(row["gene"])
        cells = np.flatnonzero((adata.obs["cell_type"] == row["group"]) & (adata.obs["n_genes"] > 12))
        after = changed_counts(counts, [gene], mode, value)
        moved = cells[after[cells, gene] != counts[cells, gene]]
        unit_after, raw_after = embedded(after, model, tokenizer)
        assert list(row[MEASURES[2:]]) == [len(cells), (counts[cells, gene] > 0).sum(), len(moved)]
        if len(moved) < 2:
            continue
        checked += 1
        distances = ((unit_after - unit)[moved] ** 2).sum(1) / 2
        shifts = np.linalg.norm((raw_after - raw)[moved], axis=1)
        assert row["cosine_distance"] == pytest.approx(distances.mean(), **CLOSE)
        assert row["cosine_distance_se"] == pytest.approx(distances.std(ddof=1) / len(moved) ** 0.5, **CLOSE)
        assert row["euclidean_shift"] == pytest.approx(shifts.mean(), abs=1e-5)
        assert distances.mean() > 1e-6  # otherwise, zeros would pass
    assert checked > 5
    for _, rows in table.groupby("group"):
        assert list(rows["rank"]) == [1, 2, 3]


@pytest.mark.parametrize("mode", ["delete", "overexpress"])
def test_genes_together_equal_a_modified_anndata(tokenizer: TahoeX1Tokenizer, model: Any, mode: Any) -> None:
    adata = make_cells(25, seed=4)
    counts, genes = dense(adata), [2, 9, 33, 50]
    names = [GENES[gene] for gene in genes]
    row = perturb_genes(adata, model, tokenizer, names, mode=mode, together=True, **QUIET).table.iloc[0]
    after = changed_counts(counts, genes, mode, None)
    moved = (after != counts).any(1)
    unit, unit_after = embedded(counts, model, tokenizer)[0], embedded(after, model, tokenizer)[0]
    distances = ((unit_after - unit)[moved] ** 2).sum(1) / 2
    assert row["cosine_distance"] == pytest.approx(distances.mean(), **CLOSE)
    assert row["n_cells_changed"] == moved.sum()
    assert row["n_cells_expressing"] == (counts[:, genes] > 0).any(1).sum()
    assert row["gene"] == "+".join(names)


def test_drugs_stay_with_their_cells(tmp_path: Path) -> None:
    drugs = {"none": 0, "a": 1, "b": 2}
    tokenizer = TahoeX1Tokenizer(write_vocab(tmp_path, drug_token=True), drug_to_id=drugs)
    config = tiny_config(
        vocab_size=len(tokenizer), num_drugs=3, drug_fingerprint_size=16, drug_token_id=tokenizer.get_vocab()["<drug>"]
    )
    model, adata = tiny_model(config, TahoeX1Model), make_cells(20, seed=6)
    adata.obs["drug"] = ["a", "b"] * 10
    after = adata.copy()
    after.X = csr_matrix(changed_counts(dense(adata), [8], "delete", None))
    before = adata.copy()
    for cells in (before, after):
        embed_anndata(cells, model, tokenizer, drugs="drug", dtype="float32", device="cpu", progress=False)
    moved = dense(adata)[:, 8] > 0
    distances = ((before.obsm["X_tahoe_x1"] - after.obsm["X_tahoe_x1"])[moved].astype(np.float64) ** 2).sum(1) / 2
    table = perturb_genes(adata, model, tokenizer, [GENES[8]], drugs="drug", **QUIET).table
    assert table["cosine_distance"][0] == pytest.approx(distances.mean(), **CLOSE)
    wrong = perturb_genes(adata, model, tokenizer, [GENES[8]], drugs="a", **QUIET).table
    assert wrong["cosine_distance"][0] != pytest.approx(distances.mean(), rel=0.01)
    adata.obs["drug"] = ["a", "DMSO_TF"] * 10
    with pytest.raises(ValueError, match="'DMSO_TF' is not in the drug table"):
        perturb_genes(adata, model, tokenizer, [GENES[8]], drugs="drug", **QUIET)
    treated = perturb_genes(adata, model, tokenizer, [GENES[8]], drugs="drug", cells='drug == "a"', **QUIET).table
    assert treated["n_cells"][0] == 10  # the drugs of other cells do not matter
    padded = perturb_genes(adata, model, tokenizer, [GENES[8]], drugs="drug", unknown_drugs="pad", **QUIET).table
    none = perturb_genes(adata, model, tokenizer, [GENES[8]], drugs=["a", None] * 10, **QUIET).table
    assert padded["cosine_distance"][0] == none["cosine_distance"][0]


def masked_predictions(model: Any, cell: dict[str, torch.Tensor], hidden: np.ndarray) -> np.ndarray:
    mask = torch.from_numpy(np.concatenate([[False], hidden]))[None]
    with torch.inference_mode():
        predicted = model(**cell, target_mask=mask).expression_predictions[0, 1:].numpy()
    return predicted * 49 / 2  # targets are scaled to -1..1 over 50 bins


def plain_predictions(
    model: Any, tokenizer: TahoeX1Tokenizer, counts: np.ndarray, token: int, ids: np.ndarray, content: Any, seed: int
) -> dict[int, float]:
    """Predict the half of one cell without the perturbed gene `token`; the model sees only the genes `ids`."""
    there = np.flatnonzero(counts)
    tokens = np.array([tokenizer.get_vocab()[GENES[gene]] for gene in there])
    batch = with_settings(tokenizer, 1024)([(tokens, counts[there])], return_tensors="pt")
    stay = np.isin(batch["input_ids"][0].numpy(), ids)
    batch = {key: tensor[:, torch.from_numpy(stay)] for key, tensor in batch.items()}
    tokens = batch["input_ids"][0, 1:].numpy()
    side = halves(np.zeros(len(tokens), dtype=int), tokens, content, seed)
    own = halves(np.zeros(1, dtype=int), np.array([token]), content, seed)[0]
    hidden = side != own
    values = masked_predictions(model, batch, hidden)
    return dict(zip(tokens[hidden].tolist(), values[hidden], strict=True))


@pytest.mark.parametrize("context", [1024, 12])
def test_predicted_expression_equals_a_plain_forward_pass(
    tokenizer: TahoeX1Tokenizer, model: Any, context: int
) -> None:
    adata = make_cells(12, seed=8)
    counts, gene, seed = dense(adata), 21, 5
    result = perturb_genes(
        adata,
        model,
        tokenizer,
        [GENES[gene]],
        expression=True,
        max_length=context,
        seed=seed,
        num_affected=60,
        **QUIET,
    )
    token = tokenizer.get_vocab()[GENES[gene]]
    absolute, signed, by_gene = [], [], {}
    source = PerturbationEncoder(
        open_cells(adata, tokenizer), EncodeOptions(with_settings(tokenizer, context), seed=seed)
    )
    for number in np.flatnonzero(counts[:, gene]):
        cells = source.read(np.array([number]))
        pairs = Pairs(cells, np.array([0]), np.array([[token]]), Change("delete"))
        kept = pairs.tokens[pairs.keep]
        ids = np.concatenate([[tokenizer.cls_token_id], kept])
        if context > 100:  # nothing is sampled: the sets follow from the counts alone
            expected = {tokenizer.get_vocab()[GENES[g]] for g in np.flatnonzero(counts[number])}
            assert set(kept.tolist()) == expected
        predicted = {
            name: plain_predictions(model, tokenizer, now, token, ids, cells.contents, seed)
            for name, now in (
                ("before", counts[number]),
                ("after", changed_counts(counts, [gene], "delete", None)[number]),
            )
        }
        assert predicted["before"].keys() == predicted["after"].keys()
        assert token not in predicted["before"]
        change = {key: predicted["after"][key] - predicted["before"][key] for key in predicted["after"]}
        if change:
            absolute.append(np.abs(list(change.values())).mean())
            signed.append(np.mean(list(change.values())))
        for key, step in change.items():
            by_gene.setdefault(key, []).append(step)
    row = result.table.iloc[0]
    assert row["predicted_abs_change"] == pytest.approx(np.mean(absolute), abs=2e-4)
    assert row["predicted_change"] == pytest.approx(np.mean(signed), abs=2e-4)
    assert np.mean(absolute) > 0.01
    assert result.affected is not None
    ids = tokenizer.get_vocab()
    listed = {
        ids[name]: (mean, n)
        for name, mean, n in result.affected[["affected_gene_id", "mean_change", "n_cells"]].values
    }
    assert listed.keys() == {key for key, steps in by_gene.items() if len(steps) >= 3}
    for key, (mean, number) in listed.items():
        assert number == len(by_gene[key])
        assert mean == pytest.approx(np.mean(by_gene[key]), abs=5e-4)
    assert (result.affected["mean_change"].abs().diff().dropna() <= 1e-12).all()


# Sampling of long cells ------------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", ["sample", "first", "highest"])
@pytest.mark.parametrize("mode", ["delete", "overexpress"])
@pytest.mark.parametrize("genes", [1, 3])
def test_long_cells_keep_the_same_other_genes(vocab: Path, overflow: str, mode: Any, genes: int) -> None:
    short = TahoeX1Tokenizer(vocab, context_length=9, overflow=overflow)
    whole = TahoeX1Tokenizer(vocab, context_length=None)
    adata = make_cells(40, seed=1)
    counts, ids = dense(adata), short.get_vocab()
    source = PerturbationEncoder(open_cells(adata, short), EncodeOptions(short, seed=3))
    cells = source.read(np.arange(40))
    standard = short(adata, seed=3)["input_ids"]
    rng = np.random.default_rng(0)
    seen_in_sample = seen_sampled_out = 0
    for _ in range(4):
        chosen_genes = rng.choice(60, genes, replace=False)
        members = np.array([ids[GENES[gene]] for gene in chosen_genes])
        after_counts = changed_counts(counts, chosen_genes.tolist(), mode, None)
        moved = np.flatnonzero((after_counts != counts).any(1))
        pairs = Pairs(cells, moved, np.tile(members, (len(moved), 1)), Change(mode))
        after, _ = pairs.perturbed()
        before, _ = pairs.unperturbed(np.ones(len(moved), dtype=bool))
        full = whole(anndata.AnnData(csr_matrix(after_counts), var=pd.DataFrame(index=GENES)))
        for row, cell in enumerate(moved.tolist()):
            old = before.input_ids[before.offsets[row] : before.offsets[row + 1]].tolist()
            new = after.input_ids[after.offsets[row] : after.offsets[row + 1]].tolist()
            assert len(old) <= 9
            assert len(new) <= 9
            assert [t for t in old if t not in members] == [t for t in new if t not in members]
            expressed = {ids[GENES[gene]] for gene in chosen_genes if counts[cell, gene]}
            assert set(old) & set(members.tolist()) == expressed
            assert set(new) & set(members.tolist()) == (set() if mode == "delete" else set(members.tolist()))
            assert new == [token for token in full["input_ids"][cell] if token in new]  # in the order of the columns
            # Bins are those of the whole changed cell, the sample taken from it afterwards.
            values = dict(zip(full["input_ids"][cell], full["expression_values"][cell], strict=True))
            assert [values[t] for t in new] == after.expression_values[
                after.offsets[row] : after.offsets[row + 1]
            ].tolist()
            assert pairs.own_before[row] == (old != standard[cell])
            if mode == "delete" and genes == 1 and len(standard[cell]) == 9:
                seen_in_sample += members[0] in standard[cell]
                seen_sampled_out += members[0] not in standard[cell]
                assert (old == standard[cell]) == (members[0] in standard[cell])
    if mode == "delete" and genes == 1:
        assert min(seen_in_sample, seen_sampled_out) > 3


def test_shift_of_long_cells_does_not_come_from_another_sample(tokenizer: TahoeX1Tokenizer, model: Any) -> None:
    adata = make_cells(60, seed=2)
    counts = dense(adata)
    exact = perturb_genes(adata, model, tokenizer, "all", max_length=10, **QUIET).table
    resampled = anndata.AnnData(csr_matrix(counts), var=pd.DataFrame(index=GENES))
    embeddings = []
    for seed in (0, 1):
        embed_anndata(
            resampled, model, tokenizer, max_length=10, seed=seed, dtype="float32", device="cpu", progress=False
        )
        embeddings.append(resampled.obsm["X_tahoe_x1"].astype(np.float64))
    noise = (((embeddings[1] - embeddings[0]) ** 2).sum(1) / 2).mean()
    assert exact["cosine_distance"].mean() < noise / 2
    # The shifts lie between the same cells whose sampling the test above checks.
    source = PerturbationEncoder(open_cells(adata, tokenizer), EncodeOptions(with_settings(tokenizer, 10)))
    cells = source.read(np.arange(60))
    for gene in (3, 30):
        moved = np.flatnonzero(counts[:, gene])
        members = np.full((len(moved), 1), tokenizer.get_vocab()[GENES[gene]])
        pairs = Pairs(cells, moved, members, Change("delete"))
        assert 0 < pairs.own_before.sum() < len(moved)
        pooled = []
        for encoded, _ in (pairs.unperturbed(np.ones(len(moved), dtype=bool)), pairs.perturbed()):
            batch = encoded.padded(pad_token_id=tokenizer.pad_token_id, pad_value=tokenizer.pad_value)
            with torch.inference_mode():
                pooled.append(torch.nn.functional.normalize(model.tahoe(**batch).pooler_output.double(), dim=1))
        distances = 1 - (pooled[0] * pooled[1]).sum(1)
        row = exact[exact["gene"] == GENES[gene]].iloc[0]
        assert row["cosine_distance"] == pytest.approx(distances.mean().item(), **CLOSE)


# Things that must not matter ---------------------------------------------------------------------------


def run_all(adata: Any, model: Any, tokenizer: TahoeX1Tokenizer, **options: Any) -> pd.DataFrame:
    settings: dict[str, Any] = {"null_genes": 5, "min_cells": 4, "groupby": "cell_type", "expression": True}
    settings |= {"device": "cpu", "progress": False, "target": "passed == True", "max_length": 16}
    return perturb_genes(adata, model, tokenizer, **{**settings, **options}).table


def assert_same(ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    key = ["group", "gene"]
    ours, theirs = ours.sort_values(key).reset_index(drop=True), theirs.sort_values(key).reset_index(drop=True)
    assert list(ours["gene_id"]) == list(theirs["gene_id"])
    for name in ("cosine_distance", "target_change", "predicted_abs_change", "null_mean"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-7)
    pd.testing.assert_frame_equal(ours[MEASURES[2:]], theirs[MEASURES[2:]])


@pytest.mark.parametrize("batch_tokens", [1, 100_000])
def test_does_not_depend_on_the_batches(tokenizer: TahoeX1Tokenizer, model: Any, batch_tokens: int) -> None:
    adata = make_cells(40, seed=5)
    genes = GENES[:6]
    reference = run_all(adata, model, tokenizer, genes=genes)
    assert_same(run_all(adata, model, tokenizer, genes=genes, batch_tokens=batch_tokens), reference)


def test_does_not_depend_on_chunks_and_pieces(
    tokenizer: TahoeX1Tokenizer, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adata = make_cells(40, seed=5)
    reference = run_all(adata, model, tokenizer)
    monkeypatch.setattr("tahoex1_hf.perturbation.plan.CHUNK_CELLS", 7)
    monkeypatch.setattr("tahoex1_hf.perturbation.measures.PIECE_TOKENS", 50)
    monkeypatch.setattr("tahoex1_hf.perturbation.plan._BLOCK_EVERY_GENE", 3)
    monkeypatch.setattr("tahoex1_hf.perturbation.plan._BLOCK_CELLS", 10)
    assert_same(run_all(adata, model, tokenizer), reference)


def test_does_not_depend_on_the_order_of_cells_and_genes(tokenizer: TahoeX1Tokenizer, model: Any) -> None:
    adata = make_cells(40, seed=5)
    rng = np.random.default_rng(0)
    shuffled = adata[rng.permutation(40)][:, rng.permutation(60)].copy()
    options: dict[str, Any] = {"max_length": 1024, "expression": False, "genes": GENES[:8]}
    ours, theirs = (run_all(cells, model, tokenizer, **options) for cells in (shuffled, adata))
    assert ours["null_mean"].notna().any()
    key = ["group", "gene"]
    pd.testing.assert_frame_equal(
        ours.sort_values(key).reset_index(drop=True)[["gene", "cosine_distance", "target_change", "null_mean"]],
        theirs.sort_values(key).reset_index(drop=True)[["gene", "cosine_distance", "target_change", "null_mean"]],
        atol=1e-7, rtol=1e-3,
    )  # fmt: skip


def test_other_genes_do_not_matter_and_nothing_is_written_into_the_anndata(
    tokenizer: TahoeX1Tokenizer, model: Any
) -> None:
    adata = make_cells(40, seed=5)
    before = adata.copy()
    some = run_all(adata, model, tokenizer, genes=GENES[:2], null_genes=0)
    more = run_all(adata, model, tokenizer, genes=GENES[:9], null_genes=0)
    assert_same(some, more[more["gene"].isin(GENES[:2])])
    np.testing.assert_array_equal(dense(adata), dense(before))
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    pd.testing.assert_frame_equal(adata.var, before.var)
    assert not adata.obsm
    assert not adata.uns


def test_an_adapter_that_does_nothing_changes_nothing(tokenizer: TahoeX1Tokenizer, model: Any) -> None:
    peft = pytest.importorskip("peft")
    adata = make_cells(20, seed=5)
    genes = GENES[:3]
    reference = run_all(adata, model, tokenizer, genes=genes)
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    adapted = peft.get_peft_model(twin, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    assert_same(run_all(adata, adapted, tokenizer, genes=genes), reference)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    moved = run_all(adata, adapted, tokenizer, genes=genes)["cosine_distance"].dropna().to_numpy()
    assert not np.allclose(np.sort(moved), np.sort(reference["cosine_distance"].dropna()), rtol=0.1)
