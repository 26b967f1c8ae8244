"""`tahoex1 annotate --index` labels cells by those of a saved index, and refuses an index of another model."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from finetuning_runs import labelled_cells, write_base
from typer.testing import CliRunner

from tahoex1_hf import annotate_files, build_index, embed_files
from tahoex1_hf.annotation import saved_index
from tahoex1_hf.annotation.saved_index import annotate_from_index
from tahoex1_hf.benchmarking import resampling
from tahoex1_hf.cli.app import app

QUIET: dict[str, Any] = {"dtype": "float32", "progress": False}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw two dimensions as they are: UMAP takes 8 CPU seconds to compile, and has its test elsewhere."""
    monkeypatch.setattr("tahoex1_hf.common.plots.umap_places", lambda embeddings, seed: embeddings[:, :2])
    monkeypatch.setattr(resampling, "REPLICATES", 40)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, a reference, its index, and a query of other donors."""
    place = tmp_path_factory.mktemp("world")
    base = write_base(place / "base")
    for name, number, seed in (("ref", 150, 0), ("query", 60, 1)):
        cells = labelled_cells(number, seed=seed, noise=0.0)
        cells.obs_names = [f"{name}{row:03d}" for row in range(number)]
        cells.obs["donor"] = [f"{name}-{donor}" for donor in cells.obs["donor"]]
        cells.write_h5ad(place / f"{name}.h5ad")
    embed_files(place / "ref.h5ad", place / "ref.parquet", base, obs="kind,donor", **QUIET)
    build_index(place / "ref.parquet", place / "index", progress=False)
    return place


def test_labels_are_those_that_the_reference_itself_gives(world: Path, tmp_path: Path) -> None:
    arguments = [str(world / "query.h5ad"), "--index", str(world / "index"), "--label", "kind", "--batch", "donor"]
    arguments += ["--output", str(tmp_path / "out.h5ad"), "--model", str(world / "base"), "--dtype", "float32", "-q"]
    result = CliRunner().invoke(app, ["annotate", *arguments])
    assert result.exit_code == 0, result.output
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    files = (world / "query.h5ad", world / "ref.h5ad", tmp_path / "usual.h5ad")
    usual = annotate_files(*files, world / "base", "kind", batch="donor", **QUIET)
    whole = anndata.read_h5ad(tmp_path / "usual.h5ad")
    assert found.obs["tahoex1_kind"].tolist() == whole.obs["tahoex1_kind"].tolist()
    assert found.uns["tahoex1_kind"]["threshold"] == pytest.approx(usual.threshold, abs=1e-5)
    np.testing.assert_allclose(found.obsm["X_tahoe_x1"], whole.obsm["X_tahoe_x1"], atol=1e-6)
    assert (found.obs["tahoex1_kind_nearest"] == found.obs["kind"]).mean() > 0.9
    folder = tmp_path / "out.h5ad.annotation"
    assert {"report.md", "expected.csv", "confusion.csv", "umap.png"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.glob("embeddings*"))
    assert "An index holds no counts" in (folder / "report.md").read_text()


def test_slips_are_told_before_any_computing(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def computing(*_: Any, **__: Any) -> None:
        raise AssertionError("embedded before the slip was told")

    monkeypatch.setattr(saved_index, "embed_inputs", computing)
    (write_base(tmp_path / "other")).rename(tmp_path / "another")
    given = (world / "query.h5ad", world / "index", tmp_path / "out.h5ad")
    for model, label, options, said in (
        ("base", "tissue", {}, r"label=tissue .--label. is no column of .*; there are kind, donor"),
        ("base", "kind", {"batch": "study"}, r"batch=study .--batch. is no column of"),
        ("base", "kind", {"min_cells": 60}, "3 classes have fewer than 60 cells"),
        ("base", "kind", {"query_label": "type"}, "query_label=type is not a column of obs"),
    ):
        with pytest.raises(ValueError, match=rf"{said}"):
            annotate_from_index(*given, world / model, label, **options, **QUIET)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"another .--model. is not that of .* model another where the index has base"
    ):
        annotate_from_index(*given, tmp_path / "another", "kind", **QUIET)
    arguments = [str(given[0]), "--output", str(given[2]), "--label", "kind", "--model", str(world / "base")]
    for more, said in (
        ([], "Name a reference (--reference) or an index (--index), one of the two"),
        (["--index", str(given[1]), "--max-length", "20"], "--max-length: not with --index"),
    ):
        result = CliRunner().invoke(app, ["annotate", *arguments, *more])
        assert result.exit_code == 1
        assert said in result.output
    assert not given[2].exists()
