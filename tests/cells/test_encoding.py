"""Encoding the cells of inputs: drugs that the model does not know."""

import logging
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from cells import NUM_GENES, make_cells, write_vocab
from helpers import tiny_config, tiny_model

from tahoex1_hf import TahoeX1Model, TahoeX1Tokenizer, embed_anndata, embed_files
from tahoex1_hf.cells.encoding import ChunkEncoder, EncodeOptions
from tahoex1_hf.cells.opening import open_cells

KEY = "X_tahoe_x1"


def embedded(cells: anndata.AnnData, model: Any, tokenizer: TahoeX1Tokenizer, drugs: str) -> np.ndarray:
    copy = cells.copy()
    embed_anndata(copy, model, tokenizer, drugs=drugs, progress=False)
    return copy.obsm[KEY]


def test_unknown_drugs_are_told_once_for_all_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They count as no drug; known ones are found without the blanks around their names."""
    model = tiny_model(tiny_config(vocab_size=NUM_GENES + 4, num_drugs=3, drug_token_id=3), TahoeX1Model)
    vocab = write_vocab(tmp_path, drug_token=True)
    parts = model, TahoeX1Tokenizer(str(vocab), context_length=None, drug_to_id={"<pad>": 0, "s1": 1, "s2": 2})
    cells = make_cells(60)
    names = np.array(["s1 ", "s2", "DMSO_TF"])[np.arange(60) % 3]
    cells.obs["drug"] = names
    known = cells.copy()
    known.obs["drug"] = [{"s1 ": "s1", "DMSO_TF": ""}.get(name, name) for name in names]
    values = embedded(known, *parts, drugs="drug")
    assert not np.array_equal(values, embedded(known, *parts, drugs="s1"))
    files = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    for path in files:
        cells.write_h5ad(path)
    with caplog.at_level(logging.WARNING):
        embed_files(files, tmp_path / "out.npy", *parts, drugs="drug", progress=False)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), np.concatenate([values, values]))
    (record,) = [record for record in caplog.records if "drug table" in record.getMessage()]
    assert f"'DMSO_TF' ({2 * 20})" in record.getMessage()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        embedded(cells, *parts, drugs="drug")  # another run tells it again
    assert "'DMSO_TF' (20)" in caplog.text
    with pytest.raises(ValueError, match=r"is not in the drug table.*--unknown-drugs pad"):
        embed_files(files, tmp_path / "x.npy", *parts, drugs="drug", unknown_drugs="error", progress=False)
    assert not (tmp_path / "x.npy.shards").exists()


def test_further_samples_are_those_of_long_cells(tmp_path: Path) -> None:
    cells = make_cells(300)
    expressed = np.asarray((cells.X > 0).sum(axis=1)).ravel()
    tokenizer = TahoeX1Tokenizer(str(write_vocab(tmp_path)), context_length=1 + int(np.median(expressed)))
    chunks = ChunkEncoder(open_cells(cells, tokenizer), EncodeOptions(tokenizer, draws=3)).chunks(0, 300)
    done = 0
    for chunk in chunks:
        mine = expressed[done : done + chunk.num_cells]
        assert chunk.cell_numbers.tolist() == list(range(done, done + len(mine)))
        long = np.flatnonzero(mine >= tokenizer.context_length)
        assert 0 < len(long) < len(mine)
        assert len(chunk.samples) == 2
        for sample in chunk.samples:
            assert np.array_equal(sample.cell_numbers, chunk.cell_numbers[long])
            assert not np.array_equal(sample.input_ids, chunk.samples[0].input_ids) or sample is chunk.samples[0]
        done += len(mine)
    assert done == 300
    assert not next(ChunkEncoder(open_cells(cells, tokenizer), EncodeOptions(tokenizer)).chunks(0, 256)).samples
