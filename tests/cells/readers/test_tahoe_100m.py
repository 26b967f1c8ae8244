"""Cells in the layout of Tahoe-100M are read from local and remote Parquet and Arrow files."""

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from scipy.sparse import csr_matrix
from tahoe_100m import NUM_CELLS, NUM_GENES, SHA256, cell_table, fill_cache, write_parquet

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.cells.readers import tables, tahoe_100m
from tahoex1_hf.cells.readers.base import INDEX, BadInput, gene_rows
from tahoex1_hf.data.config import Tahoe100MSource
from tahoex1_hf.data.sources.opened import OpenedFiles
from tahoex1_hf.encoding_tahoe_x1 import GeneRows

GENES = [f"ENSG{number:011d}" for number in range(NUM_GENES)]
IN_VOCABULARY = GENES[:-3]


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    """Return counts; cell 7 has none, every other cell has some."""
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 9, (NUM_CELLS, NUM_GENES)) * (generator.random((NUM_CELLS, NUM_GENES)) < 0.3)
    counts[:, 0] += 1
    counts[7] = 0
    return counts.astype(np.float32)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TahoeX1Tokenizer:
    """Return a tokenizer whose ids differ from the gene table's: in reverse order, behind other special tokens."""
    path = tmp_path_factory.mktemp("vocab") / "vocab.json"
    path.write_text(
        json.dumps({token: i for i, token in enumerate(["<cls>", *IN_VOCABULARY[::-1], "<eoc>", "<pad>"])})
    )
    return TahoeX1Tokenizer(path)


def replaced(table: pa.Table, name: str, cell: int, value: Any) -> pa.Table:
    rows = table[name].to_pylist()
    rows[cell] = value
    return table.set_column(table.schema.get_field_index(name), name, pa.array(rows, table[name].type))


@pytest.fixture
def gene_metadata(tmp_path: Path) -> Path:
    path = tmp_path / "metadata" / "gene_metadata.parquet"
    path.parent.mkdir(exist_ok=True)
    table = pa.table(
        {"gene_symbol": [f"g{i}" for i in range(NUM_GENES)], "ensembl_id": GENES, "token_id": range(3, 43)}
    )
    pq.write_table(table, path)
    return path


@pytest.fixture
def source(tmp_path: Path, gene_metadata: Path, tokenizer: TahoeX1Tokenizer):
    """Return a function that opens paths as a source."""

    def make(*paths: object, **options: Any) -> OpenedFiles:
        values = {
            "kind": "tahoe-100m",
            "paths": [str(p) for p in paths],
            "gene_metadata": str(gene_metadata),
            **options,
        }
        return OpenedFiles(Tahoe100MSource(**values), tokenizer, tmp_path / "spool")

    return make


def write_arrow(table: pa.Table, path: str | Path, kind: str, rows: int = 12) -> str:
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return str(path)


WRITERS = {
    "parquet": lambda table, folder: write_parquet(table, folder / "cells.parquet"),
    "one row group": lambda table, folder: write_parquet(table, folder / "cells.parquet", rows=1000),
    "file": lambda table, folder: write_arrow(table, folder / "cells.arrow", "file"),
    "stream": lambda table, folder: write_arrow(table, folder / "cells.arrow", "stream"),
}


def together(chunks: Iterator[GeneRows], tokenizer: TahoeX1Tokenizer) -> tuple[np.ndarray, pd.DataFrame, float]:
    """Return cells x genes in the order of `IN_VOCABULARY`, the metadata, and the sum of unknown counts."""
    parts = list(chunks)
    dense = []
    for rows in parts:
        assert len(np.unique(rows.cells() * 10**6 + rows.tokens)) == len(rows.tokens), "a gene stands twice"
        assert (rows.counts > 0).all()
        shape = (len(rows.offsets) - 1, tokenizer.vocab_size)
        dense.append(csr_matrix((rows.counts, rows.tokens, rows.offsets), shape=shape).toarray())
    columns = tokenizer.convert_tokens_to_ids(IN_VOCABULARY)
    everything = np.concatenate(dense)
    assert everything.sum() == everything[:, columns].sum(), "a special token has counts"
    metadata = pd.concat([part.obs for part in parts], ignore_index=True)
    return everything[:, columns], metadata, sum(part.unknown_counts for part in parts)


@pytest.mark.parametrize("kind", WRITERS)
def test_cells_come_back_as_they_were_written(tmp_path: Path, source, counts, tokenizer, kind: str) -> None:
    path = WRITERS[kind](cell_table(counts), tmp_path)
    cells = source(path)
    assert cells.list_files() == [path]
    report = cells.inspect(path)
    assert (report.num_cells, report.num_genes, report.num_genes_known) == (NUM_CELLS, NUM_GENES, NUM_GENES - 3)
    assert report.unknown_genes == GENES[-3:]
    found, metadata, unknown = together(cells.read(path, 0, NUM_CELLS, [INDEX, "drug"]), tokenizer)
    assert np.array_equal(found, counts[:, :-3])
    assert unknown == counts[:, -3:].sum()
    assert metadata.columns.tolist() == [INDEX, "drug"]
    assert metadata[INDEX].tolist() == [f"01_0{i}-lib" for i in range(NUM_CELLS)]
    assert metadata["drug"].tolist() == [f"drug {i % 3}" for i in range(NUM_CELLS)]


@pytest.mark.parametrize("kind", WRITERS)
def test_every_range_equals_that_part_of_the_whole(
    tmp_path: Path, source, counts, tokenizer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = WRITERS[kind](cell_table(counts), tmp_path)
    cells = source(path)
    for elements in (tahoe_100m.CHUNK_ELEMENTS, 60, 1):
        monkeypatch.setattr(tahoe_100m, "CHUNK_ELEMENTS", elements)
        for start, stop in [(0, 50), (0, 1), (11, 13), (12, 24), (12, 25), (23, 24), (49, 50), (5, 45)]:
            found, metadata, _ = together(cells.read(path, start, stop, [INDEX]), tokenizer)
            assert np.array_equal(found, counts[start:stop, :-3]), (start, stop)
            assert metadata[INDEX].tolist() == [f"01_0{i}-lib" for i in range(start, stop)]
        assert list(cells.read(path, 20, 20, [INDEX])) == []


@pytest.mark.parametrize("kind", WRITERS)
def test_chunks_are_bounded(tmp_path: Path, source, counts, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = WRITERS[kind](cell_table(counts), tmp_path)
    monkeypatch.setattr(tahoe_100m, "CHUNK_ELEMENTS", 60)
    chunks = list(source(path).read(path, 0, NUM_CELLS, []))
    assert all(chunk.offsets[-1] <= 60 for chunk in chunks)
    assert 8 < len(chunks) < NUM_CELLS
    assert all(chunk.obs.shape == (len(chunk.offsets) - 1, 0) for chunk in chunks)


def test_real_cells_equal_those_of_the_h5ad_file(tmp_path: Path, shared_data) -> None:
    adata = anndata.read_h5ad(shared_data("h5ad/heart_san_1000_native_ensembl.h5ad"), backed="r")[:100].to_memory()
    gene_table = shared_data("tahoe/gene_metadata.parquet")
    tokenizer = TahoeX1Tokenizer(shared_data("tahoe/vocab.json"))
    numbers = pd.read_parquet(gene_table).set_index("ensembl_id")["token_id"]
    write_parquet(cell_table(adata.X.toarray(), numbers[adata.var_names].to_numpy()), tmp_path / "cells.parquet", 30)
    values = {"kind": "tahoe-100m", "paths": [str(tmp_path)], "gene_metadata": str(gene_table)}
    cells = OpenedFiles(Tahoe100MSource(**values), tokenizer, tmp_path / "spool")
    [path] = cells.list_files()
    report = cells.inspect(path)
    assert (report.num_cells, report.num_genes, report.num_genes_known) == (100, 62710, 62710)
    expected, _ = gene_rows(adata.X, tokenizer.match_genes(adata.var_names), 0, tokenizer)
    [chunk] = cells.read(path, 0, 100, [])
    assert np.array_equal(chunk.offsets, expected.offsets)
    assert np.array_equal(chunk.tokens, expected.tokens)
    assert np.array_equal(chunk.counts, expected.counts)
    assert chunk.unknown_counts == 0
    assert chunk.counts.sum() == adata.X.sum() > 1e5


def test_what_datasets_saves_is_read(tmp_path: Path, source, counts, tokenizer) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset(cell_table(counts)).save_to_disk(tmp_path / "saved", num_shards=2)
    cells = source(tmp_path / "saved")
    files = cells.list_files()
    assert [Path(file).suffix for file in files] == [".arrow", ".arrow"]
    parts = [together(cells.read(file, 0, cells.inspect(file).num_cells, []), tokenizer)[0] for file in files]
    assert np.array_equal(np.concatenate(parts), counts[:, :-3])


def test_zeros_are_dropped_and_repeated_genes_added_up(tmp_path: Path, source, counts) -> None:
    table = replaced(cell_table(counts[:3]), "genes", 1, [1, 9, 5, 9, 7, 42, 42])
    table = replaced(table, "expressions", 1, [-2, 2, 3, 4, 0, 1, 5])
    path = write_parquet(table, tmp_path / "cells.parquet")
    [chunk] = source(path).read(path, 1, 2, [])
    names = source(path).tokenizer.convert_ids_to_tokens(chunk.tokens.tolist())
    assert dict(zip(names, chunk.counts.tolist(), strict=True)) == {GENES[6]: 6, GENES[2]: 3}
    assert chunk.unknown_counts == 6


def test_folders_globs_and_several_paths_are_listed_once_in_order(tmp_path: Path, source, counts) -> None:
    folder = tmp_path / "data[1]"  # brackets are part of a name here, not of a pattern
    (folder / "deep").mkdir(parents=True)
    table = cell_table(counts[:2])
    expected = [write_parquet(table, folder / "b.parquet"), write_arrow(table, folder / "deep" / "a.arrow", "stream")]
    (folder / "state.json").write_text("{}")
    assert source(folder).list_files() == expected
    assert source(folder, expected[0]).list_files() == expected
    glob = tmp_path / "data[[]1]" / "*.parquet"
    assert source(glob).list_files() == expected[:1]
    assert source(tmp_path / "data[[]1]" / "**" / "*.arrow").list_files() == expected[1:]
    for nothing in (tmp_path / "none", folder / "state.json", tmp_path / "*.parquet"):
        with pytest.raises(BadInput, match=r"has no file that ends in \.parquet or \.arrow"):
            source(nothing).list_files()


# Faulty files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("genes", [3, 4], r"cell 2 starts with \[3, -2\.0\], not with <cls> \(1, -2\)"),
        ("expressions", [1, 4], r"cell 2 starts with \[1, 1\.0\], not with <cls>"),
        ("genes", [1, 43], "cell 2 has the number 43, which is not in gene_metadata"),
        ("genes", [1, 2], "cell 2 has the number 2, which is not in gene_metadata"),
        ("genes", [1, -7], "cell 2 has the number -7, which is not in gene_metadata"),
        ("genes", [1, 3, 4], "cell 2 has 3 genes, but 2 expressions"),
        ("expressions", [-2, -1], f"cell 2, gene {GENES[1]} has the value -1.0: negative"),
        ("expressions", [-2, np.nan], f"cell 2, gene {GENES[1]} has the value nan"),
        ("expressions", [-2, np.inf], f"cell 2, gene {GENES[1]} has the value inf"),
        ("genes", None, "genes: cells 2 to 2 have missing values"),
        ("expressions", [-2, None], "expressions: cells 2 to 2 have missing values"),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "stream"])
def test_cells_that_cannot_be_right(tmp_path: Path, source, kind: str, name: str, value: Any, said: str) -> None:
    counts = np.zeros((4, NUM_GENES), dtype=np.float32)
    counts[:, 1] = 5
    path = WRITERS[kind](replaced(cell_table(counts), name, 2, value), tmp_path)
    cells = source(path)
    assert sum(len(chunk.obs) for chunk in cells.read(path, 0, 2, [])) == 2
    with pytest.raises(BadInput, match=said):
        list(cells.read(path, 2, 3, []))


def test_a_negative_count_of_a_gene_that_the_vocabulary_lacks_is_seen(tmp_path: Path, source, counts) -> None:
    table = replaced(cell_table(counts[:1]), "genes", 0, [1, 42])
    path = write_parquet(replaced(table, "expressions", 0, [-2, -3]), tmp_path / "cells.parquet")
    with pytest.raises(BadInput, match=f"gene {GENES[-1]} has the value -3"):
        list(source(path).read(path, 0, 1, []))


def test_a_cell_without_even_cls_is_refused(tmp_path: Path, source, counts) -> None:
    table = replaced(replaced(cell_table(counts[:2]), "genes", 1, []), "expressions", 1, [])
    path = write_parquet(table, tmp_path / "cells.parquet")
    with pytest.raises(BadInput, match="cell 1 starts with nothing"):
        list(source(path).read(path, 0, 2, []))


@pytest.mark.parametrize("kind", WRITERS)
def test_columns_that_are_missing_or_of_another_type(tmp_path: Path, source, counts, kind: str) -> None:
    table = cell_table(counts)
    path = WRITERS[kind](table, tmp_path)
    with pytest.raises(BadInput, match=r"no columns \['moa'\], only .*'plate'"):
        list(source(path).read(path, 0, 1, ["drug", "moa"]))
    path = WRITERS[kind](table.drop_columns(["BARCODE_SUB_LIB_ID"]), tmp_path)
    with pytest.raises(BadInput, match="BARCODE_SUB_LIB_ID"):
        list(source(path).read(path, 0, 1, [INDEX]))
    path = WRITERS[kind](table.drop_columns(["genes"]), tmp_path)
    with pytest.raises(BadInput, match="no column 'genes'"):
        source(path).inspect(path)
    texts = pa.array([["a"]] * NUM_CELLS)
    path = WRITERS[kind](table.set_column(0, "genes", texts), tmp_path)
    with pytest.raises(BadInput, match="not a list of integers"):
        source(path).inspect(path)
    path = WRITERS[kind](table[:0], tmp_path)
    with pytest.raises(BadInput, match="no cells"):
        source(path).inspect(path)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"no table at all"]
)
def test_damaged_files(tmp_path: Path, source, counts, kind: str, damage) -> None:
    path = WRITERS[kind](cell_table(counts), tmp_path)
    Path(path).write_bytes(damage(Path(path).read_bytes()))
    with pytest.raises(BadInput, match="cannot be read"):
        source(path).inspect(path)


def test_damage_in_the_middle_of_a_parquet_file_is_found_where_it_is_read(tmp_path: Path, source, counts) -> None:
    path = write_parquet(cell_table(counts), tmp_path / "cells.parquet")
    place = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data = bytearray(Path(path).read_bytes())
    data[place : place + 40] = b"\xff" * 40
    Path(path).write_bytes(data)
    cells = source(path)
    assert cells.inspect(path).num_cells == NUM_CELLS
    assert len(list(cells.read(path, 0, 24, []))) > 0
    with pytest.raises(BadInput, match="cannot be read"):
        list(cells.read(path, 24, 36, []))


def test_a_missing_file_and_a_wrong_range(tmp_path: Path, source, counts) -> None:
    for name in ("gone.parquet", "gone.arrow"):
        with pytest.raises(BadInput, match="does not exist"):
            source(tmp_path / name).inspect(str(tmp_path / name))
    path = write_parquet(cell_table(counts), tmp_path / "cells.parquet")
    with pytest.raises(ValueError, match="cells 40 to 51 of a file with 50"):
        list(source(path).read(path, 40, 51, []))


def test_a_failing_disk_is_not_a_bad_file(tmp_path: Path, source, counts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a short loss of network would drop a file from a dataset prepared with on_bad_file: skip."""
    path = write_parquet(cell_table(counts), tmp_path / "cells.parquet")

    def fails(*_: object, **__: object) -> None:
        raise ConnectionError("the network is gone")

    cells = source(path)
    cells.inspect(path)
    monkeypatch.setattr(pq, "ParquetFile", fails)
    with pytest.raises(ConnectionError):
        cells.inspect(path)


# The gene table ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"ensembl_id": GENES}, r"no columns \['token_id'\]"),
        ({"ensembl_id": GENES, "token_id": [3] * NUM_GENES}, "a whole number that occurs once"),
        ({"ensembl_id": [None, *GENES[1:]], "token_id": range(3, 43)}, "an ensembl_id"),
        ({"ensembl_id": GENES, "token_id": np.arange(3, 43) - 4}, "a whole number"),
        ({"ensembl_id": GENES, "token_id": np.arange(3, 43) + 0.5}, "a whole number"),
    ],
)
def test_gene_tables_that_cannot_be_used(
    tmp_path: Path, source, counts, gene_metadata: Path, columns: dict, said: str
) -> None:
    path = write_parquet(cell_table(counts), tmp_path / "cells.parquet")
    pq.write_table(pa.table(columns), gene_metadata)
    with pytest.raises(BadInput, match=f"gene_metadata=.*{said}"):
        source(path).inspect(path)


def test_a_gene_table_of_other_genes_or_none_at_all(tmp_path: Path, source, counts, gene_metadata: Path) -> None:
    path = write_parquet(cell_table(counts), tmp_path / "cells.parquet")
    half = [*GENES[:15], *(f"ENSG{number:011d}" for number in range(900, 925))]
    pq.write_table(pa.table({"ensembl_id": half, "token_id": range(3, 43)}), gene_metadata)
    with pytest.raises(BadInput, match=r"15 of 40 genes .* less than min_known_genes=0\.5"):
        source(path).inspect(path)
    assert source(path, min_known_genes=0.3).inspect(path).num_genes_known == 15
    gene_metadata.unlink()
    with pytest.raises(BadInput, match=r"gene_metadata=.*does not exist"):
        source(path).inspect(path)


# Fingerprints, processes ------------------------------------------------------------------------------


def test_the_fingerprint_changes_with_the_file_only(tmp_path: Path, source, counts) -> None:
    path = write_parquet(cell_table(counts), tmp_path / "cells.parquet")
    first = source(path).inspect(path).fingerprint
    assert source(path).inspect(path).fingerprint == first
    os.utime(path, ns=(1, 1))
    second = source(path).inspect(path).fingerprint
    write_parquet(cell_table(counts[:40]), path)
    os.utime(path, ns=(1, 1))
    assert len({first, second, source(path).inspect(path).fingerprint}) == 3


def test_a_source_travels_to_another_process(tmp_path: Path, source, counts, tokenizer) -> None:
    path = write_parquet(cell_table(counts), tmp_path / "cells.parquet")
    cells = source(path)
    cells.inspect(path)
    copy = pickle.loads(pickle.dumps(cells))
    assert np.array_equal(together(copy.read(path, 0, 50, []), tokenizer)[0], counts[:, :-3])


# Remote files -----------------------------------------------------------------------------------------


class CountedFile:
    """A file in memory that records how much of it is read."""

    def __init__(self, file: Any, log: list[int]) -> None:
        self.file, self.log = file, log

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.log.append(len(data))
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "CountedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


class CountedFileSystem(MemoryFileSystem):
    """Files in memory whose reads are counted."""

    protocol = "counted"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    log: list[int] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("counted://", "memory://"))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super()._open(path, mode, **options)
        return CountedFile(file, self.log) if mode == "rb" else file


@pytest.fixture
def remote() -> Iterator[CountedFileSystem]:
    fsspec.register_implementation("counted", CountedFileSystem, clobber=True)
    filesystem = fsspec.filesystem("counted")
    filesystem.store.clear()
    filesystem.log.clear()
    yield filesystem
    filesystem.store.clear()


@pytest.mark.parametrize("kind", WRITERS)
def test_remote_files_are_listed_and_read(
    tmp_path: Path, source, counts, tokenizer, gene_metadata: Path, remote, kind: str
) -> None:
    (tmp_path / "up").mkdir()
    path = Path(WRITERS[kind](cell_table(counts), tmp_path / "up"))
    remote.pipe(f"/bucket/data/deep/{path.name}", path.read_bytes())
    remote.pipe("/bucket/data/README.md", b"text")
    remote.pipe("/bucket/genes.parquet", gene_metadata.read_bytes())
    address = f"counted:///bucket/data/deep/{path.name}"
    for given in ("counted://bucket/data", f"counted://bucket/data/*/*{path.suffix}", address):
        cells = source(given, gene_metadata="counted://bucket/genes.parquet")
        assert cells.list_files() == [address]
    assert cells.inspect(address).num_cells == NUM_CELLS
    found, metadata, _ = together(cells.read(address, 10, 40, [INDEX]), tokenizer)
    assert np.array_equal(found, counts[10:40, :-3])
    assert metadata[INDEX].iloc[0] == "01_010-lib"
    with pytest.raises(BadInput, match="has no file that ends in"):
        source("counted://bucket/none").list_files()


def test_only_the_needed_parts_of_a_remote_parquet_file_are_fetched(source, remote) -> None:
    counts = np.random.default_rng(1).integers(1, 1000, (3000, NUM_GENES)).astype(np.float32)
    table = cell_table(counts).append_column("text", [[os.urandom(300).hex() for _ in range(3000)]])
    with remote.open("/cells.parquet", "wb") as file:
        pq.write_table(table, file, row_group_size=100)
    size = remote.size("/cells.parquet")
    assert size > 2_000_000
    cells = source("counted://cells.parquet")
    [path] = cells.list_files()
    remote.log.clear()
    assert cells.inspect(path).num_cells == 3000
    looked = sum(remote.log)
    remote.log.clear()
    assert sum(len(chunk.obs) for chunk in cells.read(path, 1500, 1600, ["drug"])) == 100
    assert looked < 0.1 * size
    assert sum(remote.log) < looked + 0.02 * size


def test_a_remote_arrow_file_is_copied_once_and_again_when_it_changes(
    tmp_path: Path, source, counts, remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = Path(write_arrow(cell_table(counts), tmp_path / "cells.arrow", "stream"))
    remote.pipe("/cells.arrow", local.read_bytes())
    cells = source("counted://cells.arrow")
    [path] = cells.list_files()
    copies = []
    fetch = CountedFileSystem.get_file
    monkeypatch.setattr(CountedFileSystem, "get_file", lambda *arguments: copies.append(1) or fetch(*arguments))
    first = cells.inspect(path).fingerprint
    list(cells.read(path, 0, 10, []))
    assert len(copies) == 1
    write_arrow(cell_table(counts[:30]), local, "stream")
    remote.pipe("/cells.arrow", local.read_bytes())
    assert cells.inspect(path).num_cells == 30
    assert cells.inspect(path).fingerprint != first
    assert len(copies) == 2
    assert all(file.suffix == ".arrow" for file in (tmp_path / "spool").iterdir())


def test_an_address_of_an_unknown_kind(source) -> None:
    with pytest.raises(BadInput, match="nowhere://cells cannot be read"):
        source("nowhere://cells").list_files()


# The Hub's cache --------------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", ["", "@v1"])
def test_offline_the_hubs_cache_is_read(
    tmp_path: Path, source, counts, tokenizer, gene_metadata: Path, hub_cache: Path, revision: str
) -> None:
    local = Path(write_parquet(cell_table(counts), tmp_path / "cells.parquet"))
    for name, content, blob in (
        ("data/train-0.parquet", local, SHA256),
        ("metadata/gene_metadata.parquet", gene_metadata, "c"),
    ):
        fill_cache(hub_cache, name, content, blob, revision.strip("@") or "main")
    dataset = f"hf://datasets/tahoebio/Tahoe-100M{revision}"
    path = f"{dataset}/data/train-0.parquet"
    for given in (f"{dataset}/data", f"{dataset}/data/*.parquet", path):
        cells = source(given, gene_metadata=f"{dataset}/metadata/gene_metadata.parquet")
        assert cells.list_files() == [path]
    report = cells.inspect(path)
    assert (report.num_cells, report.fingerprint) == (NUM_CELLS, SHA256)
    assert np.array_equal(together(cells.read(path, 0, 50, []), tokenizer)[0], counts[:, :-3])


def test_offline_an_error_names_what_the_cache_lacks(source, gene_metadata: Path, hub_cache: Path) -> None:
    default = Tahoe100MSource(kind="tahoe-100m")
    cells = source(*default.paths, gene_metadata=default.gene_metadata)
    with pytest.raises(
        BadInput, match=r"tahoebio/Tahoe-100M is not in the Hub's cache, and HF_HUB_OFFLINE .*hf download"
    ):
        cells.list_files()
    fill_cache(hub_cache, "metadata/gene_metadata.parquet", gene_metadata, "c")
    with pytest.raises(BadInput, match=r"Tahoe-100M/data is not in the Hub's cache \(.*hf download"):
        cells.list_files()
    with pytest.raises(BadInput, match=r"train-0\.parquet is not in the Hub's cache"):
        cells.inspect("hf://datasets/tahoebio/Tahoe-100M/data/train-0.parquet")
    with pytest.raises(BadInput, match="names no dataset"):
        source("hf://datasets/tahoebio").list_files()


def test_online_the_hub_is_asked_and_the_fingerprint_is_that_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    path = "hf://datasets/tahoebio/Tahoe-100M/data/train-0.parquet"
    assert tables._local_path(path) is None

    class Hub:
        def info(self, name: str) -> dict[str, Any]:
            from huggingface_hub.hf_api import BlobLfsInfo

            return {"size": 5, "blob_id": "git", "lfs": BlobLfsInfo(size=5, sha256=SHA256, pointer_size=1)}

    monkeypatch.setattr(tables, "_filesystem", lambda path: (Hub(), path))
    assert tables.table_fingerprint(path) == SHA256
