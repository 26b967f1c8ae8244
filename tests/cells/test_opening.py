"""Cells of every kind of input are opened in one place and become the same encoded cells, bit for bit."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from cells import GENES, NUM_GENES, make_cells, write_cells, write_vocab
from preparing import run, source

import tahoex1_hf
from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.cells import compilation
from tahoex1_hf.cells.encoding import ChunkEncoder, EncodeOptions
from tahoex1_hf.cells.genes import GeneOptions
from tahoex1_hf.cells.opening import Source, find_sources, open_cells
from tahoex1_hf.cells.readers.base import INDEX, CellInput, cell_names

KINDS = ["csr", "csc", "dense", "zarr", "zarr_csc", "10x_h5", "10x_mtx"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> TahoeX1Tokenizer:
    return TahoeX1Tokenizer(str(write_vocab(tmp_path)), context_length=None)


def encoded(cells: CellInput) -> dict[str, tuple[bytes, bytes]]:
    """Return the token ids and values of each cell, by name."""
    cells.sort_by_cell()
    found = {}
    encoder = ChunkEncoder(cells, EncodeOptions(cells.tokenizer))
    for chunk in encoder.chunks(0, cells.num_cells, [INDEX]):
        for name, a, b in zip(cell_names(chunk.obs), chunk.offsets, chunk.offsets[1:], strict=False):
            assert name not in found
            found[name] = chunk.input_ids[a:b].tobytes(), chunk.expression_values[a:b].tobytes()
    assert len(found) == cells.num_cells
    return found


@pytest.fixture(params=["plain", "compiled"])
def ways(request: pytest.FixtureRequest) -> Iterator[None]:
    before = compilation.is_ready()
    compilation._ready.clear()
    if request.param == "compiled":
        compilation.use_now()
    yield
    (compilation._ready.set if before else compilation._ready.clear)()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_and_the_dataset_prepared_from_it_are_the_same_cells(
    tmp_path: Path, tokenizer: TahoeX1Tokenizer, kind: str, ways: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tahoex1_hf.cells.encoding.CHUNK_CELLS", 7)
    monkeypatch.setattr("tahoex1_hf.cells.readers.base._ELEMENTS_FOR_CHUNKS", 300)
    adata = make_cells(67, largest=900)
    path = write_cells(adata, tmp_path / "cells", kind)
    settings = {"metadata": {"_index": "_index"}, "kind": "10x" if "10x" in kind else "anndata"}
    folder = run(tmp_path, [source(path, **settings)], piece_cells=20)
    splits = [encoded(open_cells(each, tokenizer)) for each in find_sources([str(folder)])]
    from_file = encoded(open_cells(path, tokenizer, spool=tmp_path / "spool"))
    assert len(splits) == 2
    assert splits[0] | splits[1] == from_file == encoded(open_cells(adata, tokenizer))


@pytest.mark.parametrize("kind", KINDS)
def test_selected_cells_equal_those_of_the_whole(tmp_path: Path, tokenizer: TahoeX1Tokenizer, kind: str) -> None:
    adata = make_cells(40)
    cells = open_cells(write_cells(adata, tmp_path / "cells", kind), tokenizer, spool=tmp_path / "spool")
    assert cells.column(INDEX).tolist() == adata.obs_names.tolist()
    numbers = np.array([0, 3, 4, 39])
    if "10x" in kind:
        with pytest.raises(ValueError, match="read in order"):
            cells.rows_at(numbers)
        return
    some, every = cells.rows_at(numbers), open_cells(adata, tokenizer).rows_at(np.arange(40))
    for row, number in enumerate(numbers):
        for ours, all_ in ((some.tokens, every.tokens), (some.counts, every.counts)):
            mine, other = some.offsets[row : row + 2], every.offsets[number : number + 2]
            np.testing.assert_array_equal(ours[mine[0] : mine[1]], all_[other[0] : other[1]])
    assert cells.obs_columns == list(adata.obs.columns)
    assert cells.column("cell_type").tolist() == adata.obs["cell_type"].tolist()


def with_places(folder: Path) -> tuple[anndata.AnnData, Path]:
    """Write cells whose counts are in a layer and, for other genes, in raw; X holds no counts."""
    adata = make_cells(30)
    whole = adata.copy()
    whole.var["ensembl"] = GENES
    whole.var_names = [f"SYMBOL{i}" for i in range(NUM_GENES)]
    new = whole[:, : NUM_GENES // 2].copy()
    new.layers["counts"] = new.X.copy()
    new.X = new.X * np.float32(0.5)
    new.raw = whole
    new.write_h5ad(folder / "places.h5ad")
    return new, folder / "places.h5ad"


@pytest.mark.parametrize("layer", ["counts", "raw"])
def test_counts_and_genes_are_found_in_the_same_places_in_memory_and_on_disk(
    tmp_path: Path, tokenizer: TahoeX1Tokenizer, layer: str
) -> None:
    adata, path = with_places(tmp_path)
    symbols = dict(zip(adata.raw.var_names, GENES, strict=True))
    table = tmp_path / "symbols.csv"
    table.write_text("symbol,id\n" + "".join(f"{name},{gene}\n" for name, gene in symbols.items()))
    expected = encoded(
        open_cells(make_cells(30) if layer == "raw" else make_cells(30)[:, : NUM_GENES // 2], tokenizer)
    )
    for options in (
        GeneOptions("ensembl", layer=layer),
        GeneOptions(layer=layer),
        GeneOptions(gene_symbols=symbols, layer=layer),
        GeneOptions(gene_symbols=table, layer=layer),
    ):
        for each in (adata, path, anndata.read_h5ad(path, backed="r")):
            assert encoded(open_cells(each, tokenizer, options)) == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (GeneOptions("ensembl", layer="spliced"), r"spliced.*counts.*"),
        (GeneOptions("id", layer="raw"), r"gene_id_column='id'.*ensembl"),
        (
            GeneOptions(),
            r"""X holds no counts.*layer="counts" and raw hold some.*which are not the same.*'counts' or 'raw'""",
        ),
        (GeneOptions(layer="raw"), None),
    ],
)
def test_errors_about_missing_parts_name_the_file_and_the_way_out(
    tmp_path: Path, tokenizer: TahoeX1Tokenizer, options: GeneOptions, said: str | None
) -> None:
    _, path = with_places(tmp_path)
    if said is None:
        assert open_cells(path, tokenizer, options).num_cells == 30
        return
    with pytest.raises(ValueError, match=rf"places\.h5ad: .*{said}"):
        open_cells(path, tokenizer, options)


def test_errors_about_values_that_are_no_counts_name_the_file_and_where_counts_are(
    tmp_path: Path, tokenizer: TahoeX1Tokenizer
) -> None:
    adata, path = with_places(tmp_path)
    adata.X.data[3] = -1
    adata.write_h5ad(path)
    leave = GeneOptions("ensembl", other_counts="leave")
    with pytest.raises(ValueError, match=r'places\.h5ad: counts: cell 0, gene .* -1.0: negative.*layer="counts"'):
        encoded(open_cells(path, tokenizer, leave))
    with pytest.raises(ValueError, match=r'negative.*layer="counts"'):
        encoded(open_cells(adata, tokenizer, leave))


def test_a_cut_off_index_is_reported_when_the_file_is_opened(tmp_path: Path, tokenizer: TahoeX1Tokenizer) -> None:
    import h5py

    path = write_cells(make_cells(20), tmp_path / "cells", "csr")
    with h5py.File(path, "r+") as file:
        file["X/indptr"][5] = 10**6
    with pytest.raises(ValueError, match=r"cells\.h5ad: the index of its sparse counts"):
        open_cells(path, tokenizer)


def test_a_path_of_several_files_is_refused_by_name(tmp_path: Path, tokenizer: TahoeX1Tokenizer) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):
        write_cells(make_cells(5, number), tmp_path / "in" / str(number), "csr")
    with pytest.raises(ValueError, match="in stands for 2 files: name one"):
        open_cells(tmp_path / "in", tokenizer)
    with pytest.raises(FileNotFoundError, match=r"none\.h5ad does not exist"):
        open_cells(tmp_path / "none.h5ad", tokenizer)
    assert find_sources([str(tmp_path / "in" / "0.h5ad")]) == [Source(str(tmp_path / "in" / "0.h5ad"), "anndata")]


OPENERS = {
    "read_h5ad",
    "read_elem",
    "read_frame",
    "open_store",
    "read_anndata",
    "open_group",
    "read_10x_h5",
    "read_10x_mtx",
    "read_zarr",
}
# The tokenizer takes an AnnData that is already open.
# The pipeline, which travels with a model, asks its tokenizer to open an AnnData.
MAY_OPEN = ("cells/", "tokenization_tahoe_x1.py", "pipeline_tahoe_x1.py")


def test_cells_are_opened_in_one_place() -> None:
    package = Path(tahoex1_hf.__file__).parent
    found: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        names: set[Any] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                names.add(getattr(node.func, "attr", getattr(node.func, "id", None)))
        name = path.relative_to(package).as_posix()
        if names & OPENERS and not name.startswith(MAY_OPEN):
            found[name] = names & OPENERS
    assert not found


@pytest.mark.parametrize("kind", ["csr", "zarr"])
@pytest.mark.parametrize("index", ["string", "category"])
def test_names_that_are_no_plain_array(tmp_path: Path, tokenizer: TahoeX1Tokenizer, kind: str, index: str) -> None:
    """anndata 0.13 with pandas 3 writes names as nullable strings; older versions can be told to."""
    adata = make_cells(20)
    path = write_cells(adata, tmp_path / "cells", kind)
    store = h5py.File(path, "r+") if kind == "csr" else zarr.open_group(path, mode="r+", use_consolidated=False)
    with anndata.settings.override(allow_write_nullable_strings=True):
        for frame, names in (("obs", adata.obs_names), ("var", adata.var_names)):
            del store[frame]["_index"]
            anndata.io.write_elem(store[frame], "_index", pd.array(list(names), dtype=index))
    if kind == "csr":
        store.close()
    else:
        zarr.consolidate_metadata(path)
    cells = open_cells(path, tokenizer)
    assert cells.num_cells == 20
    assert encoded(cells) == encoded(open_cells(adata, tokenizer))


@pytest.mark.parametrize("dtype", ["float16", ">i4", ">f4"])
def test_dense_counts_of_types_that_scipy_lacks(tokenizer: TahoeX1Tokenizer, dtype: str) -> None:
    adata = make_cells(10)
    adata.X = adata.X.toarray().astype(dtype)
    (rows,) = open_cells(adata, tokenizer).rows(0, 10)
    assert rows.counts.sum() == adata.X.sum(dtype=np.float64)
