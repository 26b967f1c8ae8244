"""Test the demo, its checkpoint, and the script that trains it."""

import json
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
from transformers import AutoModel, AutoModelForPreTraining, AutoTokenizer

import tahoex1_hf  # noqa: F401  registers the model type

anndata = pytest.importorskip("anndata")
pytest.importorskip("scanpy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CHECKPOINT = EXAMPLES / "demo_checkpoint"


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def run_example(name: str, *arguments: str | Path) -> str:
    """Run a script as a user does, but offline, so that a download fails."""
    blocked = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    result = forked.run([sys.executable, EXAMPLES / name, *arguments], forked.environment(**blocked))
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_counts_are_recovered() -> None:
    from demo_cells import load_cells, load_gene_symbols

    cells = load_cells()
    assert cells.shape == (700, 765)
    assert cells.X.dtype == np.int32
    assert cells.X.data.min() == 1
    assert cells.X.max() == 259
    # A subset of genes cannot hold more counts than the cell. (n_counts is the file's own, over all genes.)
    assert (cells.X.sum(axis=1).A1 <= cells.obs["n_counts"].to_numpy()).all()
    assert sum(gene in load_gene_symbols() for gene in cells.var_names) == 744


def test_recovering_counts_refuses_another_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    import demo_cells

    other = demo_cells.sc.datasets.pbmc68k_reduced()
    other.obs["n_counts"] *= 1.01
    monkeypatch.setattr(demo_cells.sc.datasets, "pbmc68k_reduced", lambda: other)
    with pytest.raises(ValueError, match="cannot be recovered"):
        demo_cells.load_cells()


def test_the_checkpoint_loads_complete_and_is_small() -> None:
    model, report = AutoModelForPreTraining.from_pretrained(CHECKPOINT, output_loading_info=True)
    assert not any(report.values()), report
    base, report = AutoModel.from_pretrained(CHECKPOINT, output_loading_info=True)
    # The base model has no place for the decoders; nothing is missing.
    assert {name.split(".")[0] for name in report.pop("unexpected_keys")} <= {"expression_decoder", "cell_decoder"}
    assert not any(report.values()), report
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    assert len(tokenizer) == model.config.vocab_size == base.config.vocab_size
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 5e6


def test_the_training_log_is_of_this_checkpoint_and_better_than_constants() -> None:
    """The shipped weights give the recorded loss on the held-out cells again."""
    from train_demo_checkpoint import losses, split_cells, tokenize, validation_masking

    log = json.loads((CHECKPOINT / "training_log.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    training, held_out = split_cells(tokenize(tokenizer), log["held_out_cells"], seed=0)
    assert len(training) == log["training_cells"]
    batch = validation_masking(tokenizer, absent=1.0)(held_out.cells)
    measured = losses(AutoModelForPreTraining.from_pretrained(CHECKPOINT), batch)
    assert measured == pytest.approx(log["final"], abs=2e-4)
    assert max(measured.values()) < log["baselines"]["mean_bin_of_each_gene"]


@pytest.mark.slow
def test_the_demo_runs_and_training_helped(tmp_path: Path) -> None:
    output = run_example("demo.py", "--output-dir", tmp_path)
    assert "744 of 765 genes" in output
    assert "trained on 630 of these same 700 cells" in " ".join(output.split())
    rows = [line for line in output.splitlines() if line.startswith(("trained model", "same, untrained"))]
    accuracy = {line[:15].strip(): float(line[15:].split()[0]) for line in rows}  # of kNN, the first column
    assert accuracy["trained model"] > accuracy["same, untrained"] + 0.1
    cells = anndata.read_h5ad(tmp_path / "pbmc68k_tahoe_x1.h5ad")
    embeddings = cells.obsm["X_tahoe_x1"]
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert cells.uns["tahoe_x1"]["matched_genes"] == 744
    assert cells.obsm["X_umap_tahoe_x1"].shape == cells.obsm["X_umap_pca"].shape == (700, 2)
    from matplotlib.image import imread

    picture = imread(tmp_path / "umap.png")
    assert min(picture.shape[:2]) > 800
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 100


def test_the_text_agrees_with_the_numbers() -> None:
    from demo import caveats, comparison

    better = {("kNN", "accuracy"): np.array([0.8, 0.81, 0.8, 0.79, 0.8]), ("kNN", "macro-F1"): np.full(5, 0.5)}
    worse = {("kNN", "accuracy"): np.array([0.7, 0.71, 0.7, 0.69, 0.71]), ("kNN", "macro-F1"): np.full(5, 0.5)}
    text = comparison(better, worse, "PCA")
    assert "is ahead in kNN accuracy (+0.098)" in text
    assert "differs by no more than chance may do in kNN macro-F1 (+0.000)" in text
    assert "is behind in kNN accuracy (-0.098)" in comparison(worse, better, "PCA")
    assert "was trained on" in caveats(True, 700)
    assert "was trained on" not in caveats(False, 700)


@pytest.mark.slow
def test_training_runs_and_its_output_loads(tmp_path: Path) -> None:
    run_example("train_demo_checkpoint.py", tmp_path, "--max-steps", "3", "--batch-size", "4", "--hidden-size", "32")
    model, report = AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.hidden_size == 32
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(CHECKPOINT).get_vocab()
    assert json.loads((tmp_path / "training_log.json").read_text())["steps"] == 3


def test_masking_hides_the_targets() -> None:
    from train_demo_checkpoint import NOT_A_TARGET, MaskingCollator, build_tokenizer

    tokenizer = build_tokenizer()
    collator = MaskingCollator(tokenizer, (0.5,), max_genes=8, absent=1.0, seed=0)
    genes = np.arange(3, 23)
    cell = {
        "input_ids": np.concatenate([[tokenizer.cls_token_id], genes]),
        "expression_values": np.concatenate([[-2], genes]).astype(np.float32),
    }
    batch = collator([cell, {name: values[:4] for name, values in cell.items()}])
    targets = batch["target_mask"]
    assert targets.sum(1).tolist() == [8, 4]  # half of the genes, and as many that the cell does not express
    assert batch["attention_mask"].sum(1).tolist() == [13, 6]
    assert (batch["labels"][~targets] == NOT_A_TARGET).all()
    present = targets & (batch["labels"] > 0)
    assert (batch["labels"][present] == batch["input_ids"][present]).all()
    assert not np.isin(batch["input_ids"][0][targets[0] & (batch["labels"][0] == 0)], genes).any()
    assert (batch["input_ids"][:, 0] == tokenizer.cls_token_id).all()
