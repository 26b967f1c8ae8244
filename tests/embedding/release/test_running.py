"""Released weights are judged by public embeddings: stand-ins, made by an independent rendering of the original."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import GOLDEN
from original_program import OriginalProgram
from release_stand_in import Shape, StandIn, fill_hub_cache, in_a_circle, make_stand_in, shuffled
from typer.testing import CliRunner, Result

from tahoex1_hf.cli.app import app
from tahoex1_hf.common.digests import json_digest, weights_digest
from tahoex1_hf.embedding.release import running
from tahoex1_hf.embedding.release.running import verify_release
from tahoex1_hf.embedding.release.sources import PublicData
from tahoex1_hf.inference.ragged import ragged_forward

SHAPE = Shape(width=48, layers=3, cells=110, context=140, mean_genes=100)


@pytest.fixture(autouse=True)
def translations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf_home"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Have the original's samples, which no seed of its own decides, be the same in every run of a test."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw figures in one test alone: they take a quarter of each run."""
    if "right_weights" not in request.node.name:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: Path(path).touch())


@pytest.fixture(scope="module")
def forward_passes() -> dict[str, Any]:
    return {}


@pytest.fixture
def shared_forward_passes(forward_passes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the model on the same batch once for all tests: stand-ins of the same cells differ in what is public."""

    def forward(model: Any, *batch: Any, prepared: Any, **options: Any) -> Any:
        kind = (str(model), model.config.to_json_string(), str(prepared), torch.is_autocast_enabled("cpu"), options)
        tensors = [None if each is None else np.asarray(each).tobytes().hex() for each in batch]
        key = json_digest([weights_digest(model), *map(str, kind), tensors])
        if key not in forward_passes:
            forward_passes[key] = ragged_forward(model, *batch, prepared=prepared, **options)
        embeddings, tokens = forward_passes[key]
        assert tokens is None
        return embeddings.clone(), None

    monkeypatch.setattr("tahoex1_hf.inference.encoder.ragged_forward", forward)


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    torch.manual_seed(0)
    return make_stand_in(tmp_path_factory.mktemp("right") / "s", SHAPE)


def data_of(stand_in: StandIn, **changes: str) -> PublicData:
    settings = {"gene_metadata": str(stand_in.gene_table), **changes}
    return PublicData(str(stand_in.cells), str(stand_in.embeddings), **settings)


def verify(stand_in: StandIn, output: Path, **changes: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {"data": data_of(stand_in), "num_cells": 100, "samples": 2, "size": "3b"}
    sentence = verify_release(output, model=stand_in.model, progress=False, **{**usual, **changes})
    report = json.loads((output / "report.json").read_text())
    assert report["sentence"] == sentence
    return report


def test_the_rendering_equals_the_originals_recorded_embeddings() -> None:
    import anndata

    folder = GOLDEN / "b_3b_like_chem"
    program, adata = OriginalProgram(folder / "model", torch.float32), anndata.read_h5ad(folder / "adata.h5ad")
    tokens = np.array([program.vocabulary[gene] for gene in adata.var["ensembl_id"]])
    rows = [adata.X[[cell]] for cell in range(adata.n_obs)]
    found = program.embed([(tokens[row.indices], row.data) for row in rows], [""] * adata.n_obs, batch=8)
    difference = np.abs(found - np.load(folder / "emb_flash.npz")["cell_embs"]).max(1)
    # In each batch the longest cell loses a gene, which no seed decides, and moves by 8e-4 or more. Where a CPU rounds
    # the edges of bins otherwise than that of the recording (in two cells, without AVX), genes on an edge are a bin
    # lower or higher, and cells move by 2e-5.
    assert (difference < 1e-4).sum() == 43
    assert np.median(difference) < 1e-6
    again = program.embed([(tokens[row.indices], row.data) for row in rows], [""] * adata.n_obs, batch=8)
    assert (np.abs(again - found).max(1) > 1e-5).any()


def test_right_weights_are_as_near_as_our_own_floor(right: StandIn, tmp_path: Path, hub_cache: Path) -> None:
    fill_hub_cache(hub_cache, right)
    out = tmp_path / "out"
    result = run(out, "--num-cells", 100, "--samples", 3)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("As near as our own floor: ")
    report = json.loads((out / "report.json").read_text())
    assert (report["verdict"], report["causes"], report["cells_compared"]) == ("floor", None, 100)
    assert (report["model"], report["cells"]) == ("tahoebio/Tahoe-x1", "tahoebio/Tahoe-100M")
    assert {path.name for path in out.iterdir()} == {
        *("report.json", "report.md", "scores.csv", "scores.png", "cosines.csv", "cosines.png", "work")
    }
    cells, scores = pd.read_csv(out / "cosines.csv"), pd.read_csv(out / "scores.csv")
    assert set(cells["key"]) <= set(right.keys)
    assert cells["genes"].between(10, 600).all()
    fits = cells["fits"].to_numpy()
    assert 10 < (~fits).sum() < 90
    # The longest cell of a batch lost a gene in the original; no other that fits lost any.
    assert cells["public"][fits].median() > 1 - 1e-4
    assert cells["public"][~fits].median() < 1 - 1e-3
    assert cells["precision"].min() > 0.999
    known = scores[scores["method"] == "best_known"].set_index("metric")["value"].to_dict()
    assert known == {"median": 0.9948, "mean": 0.9919, "below": 0.0107}
    assert "the public embeddings with ours" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("made", "cause", "said"),
    [
        ({"public_drugs": in_a_circle}, "drug names", "'drug 1' as 'drug 14'"),
        ({"public_drugs": lambda drugs: [""] * len(drugs)}, "drug names", "a drug token without a drug"),
        ({"public_genes": shuffled}, "gene table", "of what we take for true is of no use"),
        ({"public_layer": 2}, "layer", "layer 2 of 3"),
        ({"public_values": "log1p"}, "normalisation", "log1p of normalised counts"),
        ({"public_weights": 7, "public_depth": 2}, "size or weights", "of no use"),  # of another size
    ],
)
@pytest.mark.usefixtures("shared_forward_passes")
def test_wrong_ones_are_found_out_and_the_cause_is_named(
    tmp_path: Path, made: dict[str, Any], cause: str, said: str
) -> None:
    report = verify(make_stand_in(tmp_path / "s", SHAPE, **made), tmp_path / "out")
    # So small a model hardly minds which values it is given.
    assert report["verdict"] == "farther" or (cause == "normalisation" and report["verdict"] == "known")
    first, second = report["causes"][:2]
    assert first["name"] == cause, report["sentence"]
    assert pd.Series([first["sentence"]]).str.contains(said).all(), first["sentence"]
    assert first["sentence"] in report["sentence"]
    assert f"| {cause} |" in (tmp_path / "out" / "report.md").read_text()
    # It is found by a good distance: by a trial that closes the gap, or by a doubt that no other cause comes near.
    assert not second["found"]
    if cause in ("drug names", "layer", "normalisation"):
        assert first["trials"][0]["closed"] > 0.9
    else:
        assert first["doubt"] > 0.8
        assert (second["doubt"] or 0) < 0.5


def test_our_own_gene_table_is_suspected_too(right: StandIn, tmp_path: Path) -> None:
    table = pq.read_table(right.gene_table)
    genes = shuffled(np.array(table["ensembl_id"].to_pylist(), dtype=object)).tolist()
    pq.write_table(table.set_column(1, "ensembl_id", pa.array(genes)), tmp_path / "genes.parquet")
    report = verify(right, tmp_path / "out", data=data_of(right, gene_metadata=str(tmp_path / "genes.parquet")))
    assert report["verdict"] == "farther"
    assert report["causes"][0]["name"] == "gene table"
    assert report["causes"][0]["trials"][0]["assumption"].startswith("the numbers of the cells' genes as ids")
    assert report["causes"][0]["trials"][0]["closed"] > 0.9


def test_a_single_drug_that_was_taken_for_another_is_named(tmp_path: Path) -> None:
    one = Shape(width=48, layers=3, cells=110, context=400, mean_genes=80)
    made = {"public_drugs": lambda drugs: ["drug 5" if drug == "drug 3" else drug for drug in drugs]}
    report = verify(make_stand_in(tmp_path / "s", one, **made), tmp_path / "out", num_cells=110)
    assert report["far_drugs"][0]["drug"] == "drug 3"
    assert report["far_drugs"][0]["public"] < report["far_drugs"][1]["public"]
    assert "'drug 3'" in report["sentence"]
    if report["causes"]:
        drugs = next(cause for cause in report["causes"] if cause["name"] == "drug names")
        assert "('drug 3' as 'drug 5')" in drugs["trials"][0]["assumption"]


def test_a_stopped_run_resumes_and_another_one_is_refused(
    right: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, done = tmp_path / "out", []
    real = running.embed_files

    def stop_at_the_third(*arguments: Any, **options: Any) -> None:
        if len(done) == 2:
            raise OSError("the power is off")
        done.append(arguments[1])
        real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(running, "embed_files", stop_at_the_third)
        with pytest.raises(OSError, match="power"):
            verify(right, out)
    left = {path: path.stat().st_mtime_ns for path in (out / "work").iterdir() if path.name != "run.json"}
    assert len(left) == 4  # the cells, their public embeddings, two runs
    with pytest.raises(ValueError, match=r"holds a run with other settings \(num_cells\): .*--restart"):
        verify(right, out, num_cells=60)
    resumed = verify(right, out)
    assert {path: path.stat().st_mtime_ns for path in left} == left
    assert resumed == verify(right, tmp_path / "other")
    assert verify(right, out, num_cells=60, restart=True)["cells_compared"] == 60


def run(output: Path, *more: object) -> Result:
    return CliRunner().invoke(app, ["verify-release", str(output), *map(str, more)])


def test_what_is_missing_or_does_not_fit_is_said_in_a_sentence(
    right: StandIn, tmp_path: Path, hub_cache: Path
) -> None:
    result = run(tmp_path / "out")
    assert result.exit_code == 1
    for part in (
        "the model: ",
        "the cells (",
        "the embeddings (",
        "the gene table (",
        "hf download tahoebio/Tahoe-x1 ",
    ):
        assert part in result.stderr
    here = ["--model", right.model, "--size", "3b", "--cells", right.cells, "--embeddings", right.embeddings]
    here += ["--gene-metadata", right.gene_table]
    result = run(tmp_path / "out", *here, "--column", "mosaicfm-70m-merged")
    assert result.exit_code == 1
    assert "has embeddings of 8 numbers" in result.stderr
    assert "of 48: it is of another size" in result.stderr
    result = run(tmp_path / "another", *here, "--column", "other")
    assert "have no column 'other', only" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(("width", "said"), [(512, "another size, as the 70m is. "), (2048, "1b"), (48, "size. Name")])
def test_the_size_that_public_embeddings_are_of_is_told_by_their_width(width: int, said: str) -> None:
    settings = {"column": "mosaicfm", "model": "tahoebio/Tahoe-x1", "size": "3b"}
    running._check_width(2560, 2560, settings)
    with pytest.raises(ValueError, match=f"mosaicfm' has embeddings of {width} numbers.*of 2560.*{said}"):
        running._check_width(2560, width, settings)
