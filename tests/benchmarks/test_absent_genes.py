"""The trial of absent genes prepares cells and sums up its results; what it trains is tested in tests/training."""

import json
from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy.sparse import csr_matrix
from transformers import AutoTokenizer

from benchmarks import absent_genes
from tahoex1_hf import embed_anndata
from tahoex1_hf.hub.loading import load_model_and_tokenizer
from tahoex1_hf.training.config import read_pretrain_config

CHECKPOINT = Path(__file__).parents[2] / "examples" / "absent_genes_checkpoint"

GENES = [f"ENSG{number:011d}" for number in range(70)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the dataset of two small files."""
    path = tmp_path_factory.mktemp("absent")
    counts = np.tile(np.arange(1, 71), (12, 1))
    counts[3:, 60:] = 0  # the last ten genes are in three cells of each file
    files = []
    for name in ("a", "b"):
        files.append(path / f"{name}.h5ad")
        cells = anndata.AnnData(csr_matrix(counts.astype(np.float32)))
        cells.var_names = GENES
        cells.obs_names = [f"{name}{number}" for number in range(12)]
        cells.write_h5ad(files[-1])
    absent_genes.make_dataset(path, files, least_cells=7)
    return path


def test_the_vocabulary_has_the_genes_of_enough_cells(folder: Path) -> None:
    tokens = json.loads((folder / "vocab.json").read_text())
    assert [token for token in tokens if token.startswith("ENSG")] == GENES[:60]
    assert list(tokens)[:3] == ["<pad>", "<cls>", "<eoc>"]
    assert len(tokens) % 64 == 0
    manifest = json.loads((folder / "cells" / "manifest.json").read_text())
    assert manifest["totals"]["cells_out"] == 24


def test_training_in_stages_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("global_batch_size=4", "microbatch_size=4", "eval_cells=0", "save_steps=1", "model.hidden_size=16")
    stages = {2: (*small, "context_length=16"), 4: (*small, "context_length=32")}
    monkeypatch.setattr(absent_genes, "STAGES", stages)
    absent_genes.train(folder)
    state = json.loads((folder / "until-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    assert state["max_steps"] == 4
    assert json.loads((folder / "until-4" / "run_status.json").read_text())["status"] == "finished"
    assert AutoTokenizer.from_pretrained(folder / "until-4").context_length == 32
    weights = (folder / "until-4" / "model.safetensors").read_bytes()
    absent_genes.train(folder)
    assert (folder / "until-4" / "model.safetensors").read_bytes() == weights


def test_no_set_is_both_trained_on_and_tested() -> None:
    assert not set(absent_genes.CORPUS) & set(absent_genes.TESTS)


def test_the_shipped_checkpoint_embeds_cells_and_says_what_it_saw() -> None:
    model, tokenizer = load_model_and_tokenizer(CHECKPOINT)
    assert tokenizer.value_encoding == "log1p"
    genes = [token for token in tokenizer.get_vocab() if token.startswith("ENSG")][:300]
    cells = anndata.AnnData(csr_matrix(np.random.default_rng(0).poisson(0.5, (4, 300)).astype(np.float32)))
    cells.var_names = genes
    found = embed_anndata(cells, model, tokenizer, dtype="float32", return_array=True)
    assert found.shape == (4, 64)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    assert np.linalg.norm(found[0] - found[1]) > 1e-3
    log = json.loads((CHECKPOINT / "training_log.json").read_text())
    assert log["cells_from"] == [f"{name}.h5ad" for name in absent_genes.CORPUS]


def test_trials_differ_in_their_targets_alone() -> None:
    given = {"absent_targets", "cell_targets", "value_encoding", "packed", "unexpressed_padding", "model"}
    usual = read_pretrain_config("absent-genes").model_dump()
    for changes in absent_genes.ARMS.values():
        trial = read_pretrain_config("absent-genes", [*absent_genes.PLAIN, *changes]).model_dump()
        assert {key for key in trial if trial[key] != usual[key]} <= given
    first = [arm for arm, seed in absent_genes.runs() if seed == 0]
    assert first == list(absent_genes.ARMS)  # a trial that is cut short has the same seeds of all


def test_the_table_has_intervals_over_seeds() -> None:
    names = list(absent_genes.ARMS)
    rows = [
        {"arm": names[0], "seed": seed, "cpu_seconds": 10.0, "gut_crohn_scp1884": value}
        for seed, value in enumerate((0.1, 0.2, 0.3))
    ]
    rows[0]["gut_crohn_scp1884 untrained"] = 0.05
    lines = absent_genes.table(rows).splitlines()
    # Student's t with two degrees of freedom: 4.303 x 0.1 / sqrt(3).
    assert lines[2] == f"| {names[0]} | 0.200 ± 0.248 | 3 | 10 |"
    assert lines[-1] == "| untrained, bins | 0.050 | 1 | 0 |"
    assert absent_genes.interval([0.1])[0] == pytest.approx(0.1)
