"""`tahoex1 annotate` transfers labels, says what it does not know, and resumes; slips are told before any work."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from cells import GENES
from finetuning_runs import labelled_cells, make_config, write_base
from scipy.sparse import csc_matrix, csr_matrix
from typer.testing import CliRunner

from tahoex1_hf import annotate_anndata, annotate_files, embed_files, predict_anndata
from tahoex1_hf.annotation import annotating
from tahoex1_hf.annotation.labels import read_label_map
from tahoex1_hf.annotation.methods import methods
from tahoex1_hf.benchmarking import resampling
from tahoex1_hf.cli.app import app
from tahoex1_hf.finetuning.running import finetune

QUIET: dict[str, Any] = {"dtype": "float32", "progress": False}


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw two dimensions as they are, since UMAP takes 8 CPU seconds to compile, and figures in one test alone."""
    monkeypatch.setattr("tahoex1_hf.common.plots.umap_places", lambda embeddings, seed: embeddings[:, :2])
    monkeypatch.setattr(resampling, "REPLICATES", 40)
    if "planted_kinds" not in request.node.name:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: Path(path).touch())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / "base")


def named(adata: anndata.AnnData, prefix: str) -> anndata.AnnData:
    adata.obs_names = [f"{prefix}{number:03d}" for number in range(adata.n_obs)]
    adata.obs["donor"] = adata.obs["donor"].astype(str).map(lambda name: f"{prefix}-{name}")
    return adata


@pytest.fixture(scope="module")
def reference() -> anndata.AnnData:
    return named(labelled_cells(150, noise=0.0), "ref")


@pytest.fixture(scope="module")
def query() -> anndata.AnnData:
    return named(labelled_cells(60, seed=1, noise=0.0), "query")


@pytest.fixture
def files(reference: anndata.AnnData, query: anndata.AnnData, tmp_path: Path) -> dict[str, Path]:
    found = {"query": tmp_path / "query.h5ad", "reference": tmp_path / "ref.h5ad", "output": tmp_path / "out.h5ad"}
    reference.write_h5ad(found["reference"])
    query.write_h5ad(found["query"])
    return found


def test_planted_kinds_are_found_in_files_as_in_memory(
    base: Path, files: dict[str, Path], reference: anndata.AnnData, query: anndata.AnnData
) -> None:
    arguments = [str(files["query"]), "--reference", str(files["reference"]), "--label", "kind", "--batch", "donor"]
    arguments += ["--output", str(files["output"]), "--model", str(base), "--dtype", "float32", "--quiet"]
    result = CliRunner().invoke(app, ["annotate", *arguments])
    assert result.exit_code == 0, result.output
    written = anndata.read_h5ad(files["output"])
    assert (written.obs["tahoex1_kind_nearest"] == written.obs["kind"]).mean() > 0.9
    assert (written.X != query.X).nnz == 0
    classes = written.uns["tahoex1_kind"]["classes"]
    best = written.obsm["tahoex1_kind_probabilities"].argmax(1)
    assert (classes[best] == written.obs["tahoex1_kind_nearest"]).all()
    far = written.obs["tahoex1_kind_distance"] > written.uns["tahoex1_kind"]["threshold"]
    assert ((written.obs["tahoex1_kind"] == "unknown") == far).all()
    folder = files["output"].with_name("out.h5ad.annotation")
    assert {path.name for path in folder.iterdir()} == {
        *("report.json", "report.md", "scores.csv", "scores.png"),
        *("expected.csv", "confusion.csv", "confusion.png", "umap.png"),
    }
    scores = json.loads((folder / "report.json").read_text())["scores"]
    assert {score["method"] for score in scores} == set(methods(15, 0))
    assert {score["split"] for score in scores} == {"batches left out", "query"}
    mine = query.copy()
    annotate_anndata(mine, reference, base, "kind", batch="donor", **QUIET)
    for column in ("tahoex1_kind", "tahoex1_kind_nearest"):
        assert mine.obs[column].tolist() == written.obs[column].tolist()
    np.testing.assert_allclose(mine.obsm["tahoex1_kind_probabilities"], written.obsm["tahoex1_kind_probabilities"])


def test_a_classifier_is_written_beside_and_scored_in_the_same_table(
    base: Path, files: dict[str, Path], reference: anndata.AnnData, query: anndata.AnnData, tmp_path: Path
) -> None:
    """A probe that was fitted to the reference says of the query what `predict` says, under the joined names."""
    probe = tmp_path / "probe"
    finetune(make_config(base, files["reference"], probe, method="linear_probe", folds=1, head_start=None))
    mine, predicted = query.copy(), query.copy()
    predict_anndata(predicted, probe, **QUIET)
    joined = {"NK": "natural killer"}
    found = annotate_anndata(mine, reference, base, "kind", classifier=probe, label_map=joined, **QUIET)
    said = predicted.obs["tahoex1_kind"].astype(str).map(lambda name: joined.get(name, name))
    assert mine.obs["tahoex1_kind_classifier"].tolist() == said.tolist()
    assert "natural killer" in set(said)
    truth = mine.obs["kind"].astype(str).map(lambda name: joined.get(name, name))
    scores = found.report.means("query")["fine-tuned classifier"]
    assert scores["accuracy"].value == pytest.approx((said == truth).mean())
    assert scores["assigned"].value == 1
    annotate_files(
        *(files[name] for name in ("query", "reference", "output")), base, "kind", classifier=probe, **QUIET
    )
    written = anndata.read_h5ad(files["output"])
    assert written.obs["tahoex1_kind_classifier"].tolist() == predicted.obs["tahoex1_kind"].tolist()
    other = {name: f"{name}!" for name in set(reference.obs["kind"])}
    renamed = reference.copy()
    renamed.obs["kind"] = renamed.obs["kind"].astype(str).map(other)
    with pytest.raises(ValueError, match=r"classifier=.* knows the classes .*: none is the same"):
        annotate_anndata(mine, renamed, base, "kind", query_label="donor", classifier=probe, **QUIET)


def test_order_and_batch_change_nothing(base: Path, reference: anndata.AnnData, query: anndata.AnnData) -> None:
    one, other = query.copy(), query[::-1].copy()
    first = annotate_anndata(one, reference, base, "kind", **QUIET)
    order = np.random.default_rng(0).permutation(reference.n_obs)
    second = annotate_anndata(other, reference[order].copy(), base, "kind", batch_tokens=100, **QUIET)
    assert second.threshold == pytest.approx(first.threshold, abs=1e-5)
    other = other[::-1]
    assert one.obs["tahoex1_kind"].tolist() == other.obs["tahoex1_kind"].tolist()
    np.testing.assert_allclose(one.obs["tahoex1_kind_probability"], other.obs["tahoex1_kind_probability"], atol=1e-3)


def test_a_kind_that_the_reference_lacks_is_unknown(
    base: Path, reference: anndata.AnnData, query: anndata.AnnData
) -> None:
    mine = query.copy()
    less = reference[reference.obs["kind"] != "NK"].copy()
    found = annotate_anndata(mine, less, base, "kind", **QUIET)
    scores = found.report.means("query")["Tahoe-x1 + kNN"]
    assert scores["novel_auroc"].value > 0.9
    assert any("of the query is unknown, and 5.0% of the reference was" in note for note in found.notes)
    unknown = mine.obs["tahoex1_kind"] == "unknown"
    novel = mine.obs["kind"] == "NK"
    assert unknown[novel].mean() == scores["novel_unknown"].value > 0.5
    assert unknown[~novel].mean() < 0.25


def test_a_stopped_run_resumes_to_the_same_result(
    base: Path, reference: anndata.AnnData, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_gene = reference.copy()
    by_gene.X = csc_matrix(by_gene.X)
    by_gene.write_h5ad(files["reference"])
    given = (files["query"], files["reference"], files["output"], base, "kind")

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(annotating, "transfer", stop)
        with pytest.raises(KeyboardInterrupt):
            annotate_files(*given, **QUIET)
    assert not files["output"].exists()
    with monkeypatch.context() as patch:  # what is embedded is not embedded again
        patch.setattr("tahoex1_hf.embedding.embedder.embed_files", stop)
        annotate_files(*given, **QUIET)
        resumed = anndata.read_h5ad(files["output"])
        with pytest.raises(KeyboardInterrupt):  # and is forgotten when the run has ended
            annotate_files(*given, **QUIET)
    files["output"].unlink()
    annotate_files(*given, **QUIET)
    whole = anndata.read_h5ad(files["output"])
    assert resumed.obs.equals(whole.obs)
    assert not files["output"].with_name("out.h5ad.annotation").joinpath("by_cell").exists()
    assert (resumed.obsm["X_tahoe_x1"] == whole.obsm["X_tahoe_x1"]).all()


def test_embeddings_that_are_there_are_taken_if_they_were_made_alike(base: Path, files: dict[str, Path]) -> None:
    usual = annotate_files(*(files[name] for name in ("query", "reference", "output")), base, "kind", **QUIET)
    embedded = files["reference"].with_name("embedded.h5ad")
    embed_files(files["reference"], embedded, base, dtype="float32", progress=False)
    taken = annotate_files(files["query"], embedded, files["output"], base, "kind", key="X_tahoe_x1", **QUIET)
    assert taken.threshold == pytest.approx(usual.threshold, abs=1e-5)
    embed_files(files["reference"], embedded, base, dtype="float32", max_length=20, progress=False)
    with pytest.raises(ValueError, match=r"made otherwise .max_length 20 where this run has 48.*leave key"):
        annotate_files(files["query"], embedded, files["output"], base, "kind", key="X_tahoe_x1", **QUIET)
    lost = anndata.read_h5ad(embedded)
    del lost.uns["tahoe_x1"]
    lost.write_h5ad(embedded)
    with pytest.raises(ValueError, match="says how it was made"):
        annotate_files(files["query"], embedded, files["output"], base, "kind", key="X_tahoe_x1", **QUIET)


def test_embeddings_of_the_query_stay_as_they_are_with_their_record(
    base: Path, files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    embedded = files["query"].with_name("embedded.h5ad")
    embed_files(files["query"], embedded, base, dtype="float32", progress=False)
    before = anndata.read_h5ad(embedded)
    annotate_files(embedded, files["reference"], files["output"], base, "kind", key="X_tahoe_x1", **QUIET)
    after = anndata.read_h5ad(files["output"])
    assert (after.obsm["X_tahoe_x1"] == before.obsm["X_tahoe_x1"]).all()
    assert after.uns["tahoe_x1"] == before.uns["tahoe_x1"]
    assert after.uns["tahoe_x1"]["matched_genes"] > 0
    assert "is replaced in the output" not in caplog.text


def test_shared_donors_and_shared_cells_are_told_of(
    base: Path, reference: anndata.AnnData, query: anndata.AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    both = anndata.concat([query[:40], reference[:20]])
    with caplog.at_level(logging.WARNING):
        found = annotate_anndata(both, reference, base, "kind", batch="donor", **QUIET)
    assert "20 of 60 cells of the query have a donor that the reference has too" in caplog.text
    assert "20 cells of the query have the embedding of a cell of the reference" in caplog.text
    assert sum(note.startswith("**Warning**") for note in found.notes) == 2
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        annotate_anndata(query.copy(), reference, base, "kind", batch="donor", **QUIET)
    assert "reference" not in caplog.text


def test_few_shared_genes_are_told_of_and_lost_counts_once(
    base: Path, files: dict[str, Path], query: anndata.AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    less = query.copy()
    less.var_names = [*GENES[:40], *(f"ENSG{number:011d}" for number in range(9_000, 9_000 + less.n_vars - 40))]
    less.write_h5ad(files["query"])
    with caplog.at_level(logging.WARNING):
        found = annotate_files(*(files[name] for name in ("query", "reference", "output")), base, "kind", **QUIET)
    said = "**Warning**: Reference and query share 40 of the 60 and 40 genes that the model knows"
    assert sum(note.startswith(said) for note in found.notes) == 1
    assert said in found.text
    assert sum("are not in the vocabulary and are left out" in each.message for each in caplog.records) == 1


def test_a_label_map_joins_names(
    base: Path, reference: anndata.AnnData, query: anndata.AnnData, tmp_path: Path
) -> None:
    mine = query.copy()
    mine.obs["kind"] = mine.obs["kind"].astype(str).map({"B cell": "b", "NK": "nk", "T cell": "T cell"})
    table = tmp_path / "map.tsv"
    table.write_text("label\tjoined\nb\tB cell\nNK\t\nnk\t\n")
    found = annotate_anndata(mine, reference, base, "kind", label_map=table, **QUIET)
    assert set(mine.uns["tahoex1_kind"]["classes"]) == {"B cell", "T cell"}
    accuracy = found.report.means("query")["Tahoe-x1 + kNN"]["accuracy"]
    assert (accuracy.n, accuracy.value > 0.9) == (40, True)
    with pytest.raises(ValueError, match="no cell of reference or query has the label 'B'"):
        annotate_anndata(mine, reference, base, "kind", label_map={"B": "B cell"}, **QUIET)
    table.write_text("from,to\nb,B cell\n")
    with pytest.raises(ValueError, match=r"map.tsv has the columns from, to: it needs label and joined"):
        read_label_map(table)


def _few(adata: anndata.AnnData) -> None:
    adata.obs["kind"] = adata.obs["kind"].astype(str)
    adata.obs.iloc[:2, adata.obs.columns.get_loc("kind")] = "rare"


def _confounded(adata: anndata.AnnData) -> None:
    adata.obs["donor"] = adata.obs["kind"].astype(str)


def _values(adata: anndata.AnnData) -> None:
    adata.X = csr_matrix(np.log1p(adata.X.toarray()))


def _other_genes(adata: anndata.AnnData) -> None:
    half = len(GENES) // 12
    adata.var_names = [*GENES[:half], *(f"ENSG{number:011d}" for number in range(9_000, 9_000 + adata.n_vars - half))]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, {"label": "type"}, "label=type is not a column of obs of .*; there are .*kind"),
        (None, {"label": "kind", "batch": "plate"}, "batch=plate is not a column of obs"),
        (None, {"label": "kind", "query_label": "type"}, "query_label=type is not a column of obs"),
        (_confounded, {"label": "kind", "batch": "donor"}, "every class lies in one batch alone"),
        (None, {"label": "a/b"}, "label='a/b': .h5ad files take a slash for a folder"),
        (None, {"label": "kind", "neighbours": 0}, "neighbours=0: pass at least 1"),
        (None, {"label": "kind", "unknown_share": 1.0}, "unknown_share=1.0: pass a share"),
        (_few, {"label": "kind"}, r"1 classes have fewer than 5 cells: rare \(2\)"),
        (_values, {"label": "kind"}, r"\(reference\): no raw counts"),
        (_other_genes, {"label": "kind"}, r"share \d+ of the genes"),
    ],
)
def test_slips_are_told_before_any_computing(
    change: Callable[[anndata.AnnData], None] | None,
    arguments: dict[str, Any],
    message: str,
    base: Path,
    files: dict[str, Path],
    reference: anndata.AnnData,
    query: anndata.AnnData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def computing(*_: Any, **__: Any) -> None:
        raise AssertionError("embedded before the slip was told")

    monkeypatch.setattr("tahoex1_hf.embedding.embedder.embed_files", computing)
    monkeypatch.setattr(annotating, "embed_anndata", computing)
    changed = reference.copy()
    if change is not None:
        change(changed)
        changed.write_h5ad(files["reference"])
    given: dict[str, Any] = {**QUIET, **arguments}
    with pytest.raises(ValueError, match=message):
        annotate_files(files["query"], files["reference"], files["output"], base, **given)
    with pytest.raises(ValueError, match=message):
        annotate_anndata(query.copy(), changed, base, **given)


def test_files_that_cannot_be_used_are_told(base: Path, files: dict[str, Path]) -> None:
    query, reference, output = files["query"], files["reference"], files["output"]
    with pytest.raises(FileNotFoundError, match=r"none.h5ad does not exist"):
        annotate_files(query, reference.with_name("none.h5ad"), output, base, "kind")
    with pytest.raises(ValueError, match=r"The output must be an .h5ad file"):
        annotate_files(query, reference, output.with_suffix(".csv"), base, "kind")
    with pytest.raises(ValueError, match="is the reference, which would be lost"):
        annotate_files(query, reference, reference, base, "kind")
    with pytest.raises(ValueError, match="is query and reference"):
        annotate_files(query, query, output, base, "kind")


def test_cells_of_another_protocol(shared_data: Callable[[str], Path]) -> None:
    """Cell lines of one protocol are found by PCA in cells of another; that the toy model loses is said."""
    cells = anndata.read_h5ad(shared_data("h5ad/lung_lines_sc_mixology.h5ad"))
    drops = (cells.obs["protocol"] == "Drop-seq").to_numpy()
    query, reference = cells[drops].copy(), cells[~drops][::3].copy()
    demo = Path(__file__).parents[2] / "examples" / "demo_checkpoint"
    found = annotate_anndata(query, reference, demo, "cell_line", batch="batch", max_length=256, **QUIET)
    scores = {name: each["accuracy"].value for name, each in found.report.means("query").items()}
    assert scores["PCA + kNN"] > 0.9
    assert scores["logistic regression"] > 0.9
    assert 0.2 < scores["Tahoe-x1 + kNN"] < scores["PCA + kNN"]  # five lines: 0.2 by chance
