"""Cells are read from a SOMA experiment and from the census."""

import itertools
import json
import multiprocessing
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.cells.readers.base import INDEX, BadInput
from tahoex1_hf.data.config import CensusSource
from tahoex1_hf.data.sources import census
from tahoex1_hf.data.sources.census import CensusExperiment
from tahoex1_hf.encoding_tahoe_x1 import GeneRows

tiledbsoma = pytest.importorskip("tiledbsoma", reason="tiledbsoma is not installed (extra census)")
soma_io = pytest.importorskip("tiledbsoma.io")

NUM_GENES, NUM_CELLS = 40, 60
GENES = [f"ENSG{number:011d}" for number in range(NUM_GENES)]
IN_VOCABULARY = GENES[:-3]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TahoeX1Tokenizer:
    path = tmp_path_factory.mktemp("vocab") / "vocab.json"
    path.write_text(
        json.dumps({token: i for i, token in enumerate(["<cls>", *IN_VOCABULARY[::-1], "<eoc>", "<pad>"])})
    )
    return TahoeX1Tokenizer(path)


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    """Return cells of which 0, 7 and 59 have no counts."""
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 9, (NUM_CELLS, NUM_GENES)) * (generator.random((NUM_CELLS, NUM_GENES)) < 0.3)
    counts[[0, 7, 59]] = 0
    obs = pd.DataFrame(
        {
            "tissue": pd.Categorical(["heart", "lung", "heart"] * 20),
            "n": np.arange(NUM_CELLS),
            "is_primary_data": np.arange(NUM_CELLS) % 5 > 0,
        },
        index=[f"cell{i}" for i in range(NUM_CELLS)],
    )
    var = pd.DataFrame({"feature_id": GENES, "nnz": (counts > 0).sum(0)}, index=[f"g{i}" for i in range(NUM_GENES)])
    return anndata.AnnData(csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


def write(adata: anndata.AnnData, folder: Path) -> str:
    soma_io.from_anndata(str(folder), adata, measurement_name="RNA", X_layer_name="raw")
    return str(folder)


@pytest.fixture(scope="module")
def uri(cells: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(cells, tmp_path_factory.mktemp("soma") / "experiment")


Make = Callable[..., CensusExperiment]


@pytest.fixture
def source(tmp_path: Path, tokenizer: TahoeX1Tokenizer) -> Make:
    def make(uri: str | None, **options: Any) -> CensusExperiment:
        return CensusExperiment(CensusSource(kind="census", uri=uri, **options), tokenizer, tmp_path / "spool")

    return make


def together(chunks: Iterator[GeneRows], tokenizer: TahoeX1Tokenizer) -> tuple[np.ndarray, pd.DataFrame, float]:
    """Return cells x genes of the vocabulary, the metadata, and the sum of unknown counts."""
    parts = list(chunks)
    shapes = [(len(part.offsets) - 1, tokenizer.vocab_size) for part in parts]
    dense = [
        csr_matrix((part.counts, part.tokens, part.offsets), shape=shape).toarray()
        for part, shape in zip(parts, shapes, strict=True)
    ]
    metadata = pd.concat([part.obs for part in parts], ignore_index=True)
    columns = tokenizer.convert_tokens_to_ids(IN_VOCABULARY)
    return np.concatenate(dense)[:, columns], metadata, sum(part.unknown_counts for part in parts)


def test_cells_come_back_as_they_were_written(uri: str, source: Make, cells, tokenizer) -> None:
    experiment = source(uri)
    assert experiment.list_files() == [uri]
    report = experiment.inspect(uri)
    assert (report.num_cells, report.num_genes, report.num_genes_known) == (NUM_CELLS, NUM_GENES, NUM_GENES - 3)
    assert report.unknown_genes == GENES[-3:]
    assert not report.by_gene
    found, metadata, unknown = together(experiment.read(uri, 0, NUM_CELLS, ["tissue", INDEX, "n"]), tokenizer)
    counts = cells.X.toarray()
    assert np.array_equal(found, counts[:, :-3])
    assert unknown == counts[:, -3:].sum() > 0
    assert metadata.columns.tolist() == ["tissue", INDEX, "n"]
    assert metadata["tissue"].tolist() == cells.obs["tissue"].tolist()
    assert metadata["n"].tolist() == list(range(NUM_CELLS))
    assert metadata[INDEX].tolist() == [str(i) for i in range(NUM_CELLS)]


@pytest.mark.parametrize(
    ("elements", "query_cells", "buffer_bytes"),
    [
        (census.CHUNK_ELEMENTS, census._QUERY_CELLS, census._BUFFER_BYTES),
        (census.CHUNK_ELEMENTS, 7, 64),
        (40, census._QUERY_CELLS, census._BUFFER_BYTES),
        (40, census._QUERY_CELLS, 64),
        (1, 7, 64),
    ],
)
def test_every_range_equals_that_part_of_the_whole_and_chunks_are_bounded(
    uri: str, source: Make, cells, tokenizer, monkeypatch, elements: int, query_cells: int, buffer_bytes: int
) -> None:
    monkeypatch.setattr(census, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(census, "_QUERY_CELLS", query_cells)
    monkeypatch.setattr(census, "_BUFFER_BYTES", buffer_bytes)  # less than the elements of some cells
    experiment, counts = source(uri), cells.X.toarray()
    for start, stop in [(0, 60), (0, 1), (6, 8), (7, 8), (13, 15), (59, 60), (5, 45)]:
        chunks = list(experiment.read(uri, start, stop, ["n"]))
        found, metadata, _ = together(iter(chunks), tokenizer)
        assert np.array_equal(found, counts[start:stop, :-3]), (start, stop)
        assert metadata["n"].tolist() == list(range(start, stop))
        for chunk in chunks:
            stored = (counts[chunk.obs["n"]] > 0).sum()
            assert stored <= elements or len(chunk.obs) == 1
            assert chunk.obs.index[0] == 0
    assert list(experiment.read(uri, 20, 20, [])) == []
    assert all(chunk.obs.shape == (len(chunk.offsets) - 1, 0) for chunk in experiment.read(uri, 3, 30, []))


def test_the_source_uses_the_given_buffer(uri: str, source: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above relies on it: TileDB's tables then really split some cells."""
    monkeypatch.setattr(census, "_BUFFER_BYTES", 64)
    experiment = source(uri)._opened()
    tables = list(experiment.matrix.read((slice(None), slice(None)), result_order="row-major").tables())
    assert max(table.num_rows for table in tables) <= 8
    rows = [table["soma_dim_0"].to_numpy() for table in tables if table.num_rows]
    assert any(before[-1] == after[0] for before, after in itertools.pairwise(rows))


def test_filters_choose_cells_and_genes(uri: str, source: Make, cells, tokenizer) -> None:
    keep = ((cells.obs["tissue"] == "heart") & cells.obs["is_primary_data"]).to_numpy()
    genes = (cells.var["nnz"] >= 17).to_numpy()
    assert 5 < genes.sum() < 35
    experiment = source(uri, value_filter='tissue == "heart" and is_primary_data == True', var_filter="nnz >= 17")
    report = experiment.inspect(uri)
    assert (report.num_cells, report.num_genes) == (keep.sum(), genes.sum())
    expected = cells.X.toarray() * genes
    for start, stop in [(0, int(keep.sum())), (3, 20)]:
        found, metadata, unknown = together(experiment.read(uri, start, stop, ["n", INDEX]), tokenizer)
        numbers = np.flatnonzero(keep)[start:stop]
        assert metadata["n"].tolist() == numbers.tolist()
        assert metadata[INDEX].tolist() == [str(number) for number in numbers]
        assert np.array_equal(found, expected[numbers][:, :-3])
        assert unknown == expected[numbers][:, -3:].sum()


@pytest.mark.parametrize("with_dataset", [False, True])
def test_the_name_of_a_cell_is_its_observation_joinid(tmp_path: Path, source: Make, cells, with_dataset: bool) -> None:
    """Two datasets of the census may have cells of the same name, so the dataset's name comes first."""
    adata = cells.copy()
    adata.obs["observation_joinid"] = [f"o{i % 30}" for i in range(NUM_CELLS)]
    expected = adata.obs["observation_joinid"].tolist()
    if with_dataset:
        adata.obs["dataset_id"] = pd.Categorical(["A"] * 30 + ["B"] * 30)
        expected = [f"{'AB'[i // 30]}:o{i % 30}" for i in range(NUM_CELLS)]
    uri = write(adata, tmp_path / "experiment")
    chunks = list(source(uri).read(uri, 0, NUM_CELLS, [INDEX]))
    assert [name for chunk in chunks for name in chunk.obs[INDEX]] == expected


def test_only_the_columns_asked_for_are_read(uri: str, source: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    read = tiledbsoma.DataFrame.read

    def noting(self: Any, coords: Any = (), column_names: Any = None, **options: Any) -> Any:
        asked.append(list(column_names))
        return read(self, coords, column_names, **options)

    monkeypatch.setattr(tiledbsoma.DataFrame, "read", noting)
    experiment = source(uri)
    list(experiment.read(uri, 0, 10, []))
    assert sorted(asked) == [["soma_joinid"], ["soma_joinid", "feature_id"]]
    list(experiment.read(uri, 0, 10, ["tissue"]))
    assert asked[2:] == [["soma_joinid", "tissue"]]


# Errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"measurement": "ATAC"}, r"measurement='ATAC' is not there, only \['RNA'\]"),
        ({"layer": "normalized"}, r"layer='normalized' is not there, only \['raw'\]"),
        ({"gene_id_column": "ensembl"}, r"gene_id_column='ensembl' is not a column of var; .*'feature_id'"),
        ({"gene_id_column": "var_id"}, "look like gene symbols"),
        ({"value_filter": 'organ == "heart"'}, r"value_filter=.*Column organ does not exist"),
        ({"value_filter": 'tissue = "heart"'}, r"value_filter=.*cannot be applied: .*parse"),
        ({"var_filter": "nnz >"}, r"var_filter='nnz >' cannot be applied"),
        ({"value_filter": 'tissue == "kidney"'}, "value_filter='tissue == \"kidney\"' keeps none of its cells"),
        ({"var_filter": "nnz > 1000"}, "var_filter='nnz > 1000' keeps none of its genes"),
        ({"min_known_genes": 0.99}, r"37 of 40 genes are in the vocabulary, less than min_known_genes=0\.99"),
    ],
)
def test_settings_that_do_not_fit_the_experiment(uri: str, source: Make, options: dict, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        source(uri, **options).inspect(uri)


def test_columns_and_ranges_that_are_not_there(uri: str, source: Make) -> None:
    with pytest.raises(BadInput, match=r"obs has no columns \['organ'\], only .*'tissue'"):
        list(source(uri).read(uri, 0, 2, ["tissue", "organ"]))
    with pytest.raises(ValueError, match="cells 0 to 61 of an experiment with 60"):
        list(source(uri).read(uri, 0, 61, []))


def test_places_without_an_experiment_are_refused(tmp_path: Path, uri: str, source: Make) -> None:
    for path in (str(tmp_path / "none"), f"{uri}/obs"):
        with pytest.raises(BadInput, match="it is not a SOMA experiment, or does not exist"):
            source(path).inspect(path)


def test_damaged_counts_are_bad_input(tmp_path: Path, uri: str, source: Make) -> None:
    copy = str(shutil.copytree(uri, tmp_path / "copy"))
    for file in Path(copy).glob("ms/RNA/X/raw/__fragments/*/a0.tdb"):
        file.write_bytes(b"\xff" * file.stat().st_size)
    experiment = source(copy)
    experiment.inspect(copy)
    with pytest.raises(BadInput, match="cannot be read"):
        list(experiment.read(copy, 0, NUM_CELLS, []))


def test_a_broken_connection_is_not_a_bad_experiment(uri: str, source: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise tiledbsoma.SOMAError("S3: Could not connect")

    monkeypatch.setattr(tiledbsoma.Experiment, "open", fails)
    with pytest.raises(ConnectionError, match="s3://bucket/x could not be read: S3: Could not connect"):
        source("s3://bucket/x").inspect("s3://bucket/x")
    with pytest.raises(BadInput, match="S3: Could not connect"):
        source(uri).inspect(uri)


@pytest.mark.parametrize(("value", "said"), [(-1.0, "negative"), (np.nan, "NaN")])
def test_values_that_cannot_be_counts(tmp_path: Path, source: Make, cells, value: float, said: str) -> None:
    adata = cells.copy()
    adata.X[20, 3] = value
    uri = write(adata, tmp_path / "experiment")
    experiment = source(uri, value_filter="n >= 10")
    with pytest.raises(BadInput, match=f"cell 10, gene {GENES[3]} .*{said}"):
        list(experiment.read(uri, 5, 30, []))


def test_a_missing_package_is_named(uri: str, source: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiledbsoma", None)
    monkeypatch.setitem(sys.modules, "cellxgene_census", None)
    for given in (uri, None):
        experiment = source(given)
        with pytest.raises(ImportError, match=r"pip install 'tahoex1_hf\[census\]'"):
            experiment.inspect(experiment.list_files()[0])


# Processes, fingerprints, the census ------------------------------------------------------------------


def test_nothing_is_opened_by_the_constructor_nor_by_listing_and_nothing_travels(
    uri: str, source: Make, tokenizer, cells, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    open_ = census._open
    monkeypatch.setattr(census, "_open", lambda config: opened.append(config) or open_(config))
    experiment = source(uri)
    experiment.list_files()
    assert opened == []
    experiment.inspect(uri)
    list(experiment.read(uri, 0, 2, []))
    assert len(opened) == 1
    copy = pickle.loads(pickle.dumps(experiment))
    assert len(opened) == 1
    assert np.array_equal(together(copy.read(uri, 0, 60, []), tokenizer)[0], cells.X.toarray()[:, :-3])
    assert len(opened) == 2


def _sum_of_counts(experiment: CensusExperiment, uri: str, answers: Any) -> None:
    answers.put(sum(float(chunk.counts.sum()) for chunk in experiment.read(uri, 10, 50, [INDEX])))


def test_a_process_makes_one_context_for_its_experiments(
    uri: str, source: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TileDB's threads belong to a context; it crashed where contexts came and went.
    made, plain = [], tiledbsoma.SOMATileDBContext

    def noting(**options: Any) -> Any:
        made.append(options)
        return plain(**options)

    monkeypatch.setattr(tiledbsoma, "SOMATileDBContext", noting)
    monkeypatch.setattr(census, "_CONTEXTS", {})
    for _ in range(3):
        assert source(uri).inspect(uri).num_cells == NUM_CELLS
    assert made == [{"tiledb_config": {"soma.init_buffer_bytes": 2**25}}]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_reads_after_its_parent_did(uri: str, source: Make, cells) -> None:
    experiment = source(uri)
    expected = sum(float(chunk.counts.sum()) for chunk in experiment.read(uri, 10, 50, []))
    assert expected == cells.X.toarray()[10:50, :-3].sum()
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    processes = [context.Process(target=_sum_of_counts, args=(experiment, uri, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=600)
        hangs = process.is_alive()
        if hangs:
            process.kill()
        assert not hangs, "the process waits for threads that its parent has"
        assert process.exitcode == 0
    assert [answers.get(), answers.get()] == [expected, expected]


def test_cells_are_searched_for_once(uri: str, source: Make, tmp_path: Path) -> None:
    heart = source(uri, value_filter='tissue == "heart"')
    heart.inspect(uri)
    [file] = (tmp_path / "spool").iterdir()
    np.save(file, np.array([4, 9]))  # another process uses the cells that it finds here
    assert source(uri, value_filter='tissue == "heart"').inspect(uri).num_cells == 2
    assert source(uri, value_filter='tissue == "lung"').inspect(uri).num_cells == 20
    assert len(list((tmp_path / "spool").iterdir())) == 2


def test_the_fingerprint_changes_when_counts_are_written(tmp_path: Path, uri: str, source: Make, cells) -> None:
    copy = str(shutil.copytree(uri, tmp_path / "copy"))
    first = source(copy).inspect(copy).fingerprint
    assert source(copy).inspect(copy).fingerprint == first
    with tiledbsoma.Experiment.open(copy, "w") as experiment:
        import pyarrow as pa

        # an element that is there already, so that nothing is counted differently
        row, column = (int(places[0]) for places in cells.X.nonzero())
        table = pa.table({"soma_dim_0": [row], "soma_dim_1": [column], "soma_data": pa.array([99.0], pa.float32())})
        experiment.ms["RNA"].X["raw"].write(table)
    assert source(copy).inspect(copy).fingerprint != first


def test_the_census_is_opened_by_release_and_organism(
    uri: str, source: Make, tokenizer, cells, monkeypatch: pytest.MonkeyPatch
) -> None:
    cellxgene_census = pytest.importorskip("cellxgene_census", reason="cellxgene-census is not installed")
    asked = []

    def open_soma(**options: Any) -> dict[str, Any]:
        asked.append(options["census_version"])
        if options["census_version"] == "1999-01-01":
            raise ValueError('The "1999-01-01" Census version is not valid.')
        assert int(options["context"].tiledb_config["soma.init_buffer_bytes"]) == 2**25
        assert options["context"].tiledb_config["vfs.s3.no_sign_request"] == "true"  # the census's own setting stays
        return {"census_data": {"homo_sapiens": tiledbsoma.Experiment.open(uri, context=options["context"])}}

    monkeypatch.setattr(cellxgene_census, "open_soma", open_soma)
    experiment = source(None, census_version="2025-01-30")
    [path] = experiment.list_files()
    assert path == "census:2025-01-30/homo_sapiens"
    assert experiment.inspect(path).num_cells == NUM_CELLS
    assert np.array_equal(together(experiment.read(path, 0, 60, []), tokenizer)[0], cells.X.toarray()[:, :-3])
    assert asked == ["2025-01-30"]
    with pytest.raises(BadInput, match=r"organism='danio_rerio' is not there, only \['homo_sapiens'\]"):
        source(None, organism="danio_rerio").inspect(path)
    with pytest.raises(BadInput, match="census_version='1999-01-01' cannot be opened"):
        source(None, census_version="1999-01-01").inspect(path)
