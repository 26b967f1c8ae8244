"""The tokenizer and the training collator give the original's recorded collations, value for value."""

import json

import anndata as ad
import numpy as np
import pytest
import yaml
from golden_tokenizers import VARIANTS, examples, make, same_batch

from tahoex1_hf.data.collator import CellCollator

SETTINGS = {
    "bin": {},
    "bin_right": {"flip": True},
    "log": {"value_encoding": "log1p"},
    "raw": {"value_encoding": "raw"},
    "truncate": {"context_length": 24, "overflow": "first"},
}


@pytest.mark.parametrize("by", ["tokenizer", "training collator"])
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_collations_equal_the_originals(golden, variant, kind, by):
    config = yaml.safe_load((golden / variant / "model" / "collator_config.yml").read_text())
    options = {"num_bins": config["num_bins"], "right_binning": config["right_binning"], **SETTINGS[kind]}
    if options.pop("flip", False):  # the file of c is binned to the left, though its configuration bins to the right
        options["right_binning"] = not options["right_binning"]
    tokenizer = make(golden, variant, **options)
    drugs = None
    if variant == "b_3b_like_chem":
        names = json.loads((golden / variant / "examples_drugs.json").read_text())
        # The original reads an unknown drug as no drug; here it is an error.
        drugs = [name if name in tokenizer.drug_to_id else None for name in names]
    if by == "tokenizer":
        batch = tokenizer(examples(golden, variant), drugs=drugs, padding=True, return_tensors="np")
    else:
        rows = [{"genes": genes, "counts": counts} for genes, counts in examples(golden, variant)]
        rows = rows if drugs is None else [{**row, "drug": drug} for row, drug in zip(rows, drugs, strict=True)]
        batch = CellCollator(tokenizer, mlm_probability=None)(rows)
        batch = {name: tensor.numpy() for name, tensor in batch.items()}
    wanted = np.load(golden / variant / f"collate_{kind}.npz")
    special = 1 if drugs is None else 2
    for i, (genes, _) in enumerate(examples(golden, variant)):
        # Expected is the original's row without padding ...
        real = wanted["gene"][i] != tokenizer.pad_token_id
        ids, values = wanted["gene"][i][real], wanted["expr"][i][real]
        raw = wanted["expr_raw"][i][real]
        # ... and without explicit zeros (example 1), which the original keeps as genes of bin 1 and we drop by design.
        ids, values = ids[raw != 0], values[raw != 0]
        ours = batch["attention_mask"][i].sum()
        got_ids, got_values = batch["input_ids"][i][:ours], batch["expression_values"][i][:ours]
        if kind == "truncate":
            # Where the original's 24 tokens hold zeros, ours hold genes that the original cut off.
            got_ids, got_values = got_ids[: len(ids)], got_values[: len(ids)]
        elif len(genes) + special > real.sum():
            # b: the original's batch length forgets the drug token, so its longest example loses the last gene.
            assert variant == "b_3b_like_chem"
            assert i == 2
            assert len(got_ids) == len(ids) + 1
            got_ids, got_values = got_ids[:-1], got_values[:-1]
        np.testing.assert_array_equal(got_ids, ids)
        if kind == "log":
            np.testing.assert_allclose(got_values, values, rtol=1e-6)
        else:
            np.testing.assert_array_equal(got_values, values)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
    assert (batch["expression_values"][batch["attention_mask"] == 0] == -2).all()
    if drugs is not None:
        np.testing.assert_array_equal(batch["drug_ids"], wanted["drug_ids"])


def test_first_gene_raw_equals_the_original_without_drugs(golden):
    wanted = np.load(golden / "b_3b_like_chem" / "collate_bin_nochem.npz")
    cells = examples(golden, "b_3b_like_chem")
    batch = make(golden, "b_3b_like_chem", first_gene_raw=True)(cells, padding=True, return_tensors="np")
    plain = make(golden, "b_3b_like_chem")(cells, padding=True, return_tensors="np")
    assert "drug_ids" not in batch
    differs = 0
    for i, (_, counts) in enumerate(cells):
        keep = np.concatenate([[True], counts != 0])
        n = keep.sum()
        np.testing.assert_array_equal(batch["input_ids"][i, :n], wanted["gene"][i, : len(keep)][keep])
        np.testing.assert_array_equal(batch["expression_values"][i, :n], wanted["expr"][i, : len(keep)][keep])
        differs += (plain["expression_values"][i] != batch["expression_values"][i]).any()
    assert differs == len(cells)


def test_first_gene_raw_leaves_drug_cells_alone_and_survives_sampling(golden):
    cells = examples(golden, "b_3b_like_chem")
    raw, plain = (make(golden, "b_3b_like_chem", first_gene_raw=f, context_length=8) for f in (True, False))
    same_batch(raw(cells, drugs="Drug 1"), plain(cells, drugs="Drug 1"))
    for overflow in ("sample", "first", "top"):
        tokenizer = make(golden, "b_3b_like_chem", first_gene_raw=True, context_length=8, overflow=overflow)
        for (genes, counts), ids, values in zip(
            cells, *map(tokenizer(cells).get, ("input_ids", "expression_values")), strict=True
        ):
            assert (ids[1], values[1]) == (genes[counts != 0][0], counts[counts != 0][0])


@pytest.mark.parametrize("variant", VARIANTS[:2])
def test_match_genes_equals_the_original(golden, variant):
    var = ad.read_h5ad(golden / variant / "adata.h5ad").var
    match = make(golden, variant).match_genes(var["ensembl_id"])
    np.testing.assert_array_equal(match.token_ids, var["id_in_vocab"])
    assert match.num_unknown == (var["id_in_vocab"] < 0).sum()
