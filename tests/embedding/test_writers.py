"""Outputs of embedding files, opened with pandas, datasets, pyarrow and anndata."""

import json
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import anndata
import forked
import fsspec
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from cells import NUM_GENES, make_cells, write_cells, write_vocab
from helpers import tiny_config, tiny_model

from tahoex1_hf import TahoeX1Model, TahoeX1Tokenizer, embed_anndata, embed_files
from tahoex1_hf.cells import encoding
from tahoex1_hf.embedding import files as module
from tahoex1_hf.embedding import making
from tahoex1_hf.embedding.obs_columns import as_arrow, common_types, conformed
from tahoex1_hf.embedding.streams import WholeStream
from tahoex1_hf.inference.encoder import CellEncoder

Parts = tuple[TahoeX1Model, TahoeX1Tokenizer]
KEY = "X_tahoe_x1"


class Stop(Exception):
    pass


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks, each a shard, of few cells."""
    monkeypatch.setattr(encoding, "CHUNK_CELLS", 16)
    monkeypatch.setattr(making, "_SHARD_SECONDS", 0.0)


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    """A model, and a tokenizer whose context is shorter than many cells."""
    config = tiny_config(vocab_size=NUM_GENES + 4)
    vocab = write_vocab(tmp_path / "vocab", drug_token=True)
    return tiny_model(config, TahoeX1Model), TahoeX1Tokenizer(str(vocab), context_length=16)


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    return make_cells(100)


@pytest.fixture
def others() -> list[anndata.AnnData]:
    """Cells of a second and a third source, whose columns of obs are partly others, or of other types."""
    second, third = (make_cells(number, seed=number) for number in (37, 5))
    del second.obs["passed"], second.obs["n_genes"]
    second.obs["donor"] = pd.array([None, *range(36)], dtype="Int64")
    second.obs["cell_type"] = pd.Categorical(["NK", "new"] * 18 + ["NK"])
    third.obs["sample"] = range(5)
    third.obs["source"] = "theirs"
    return [second, third]


def expected(adata: anndata.AnnData, parts: Parts, **options: Any) -> anndata.AnnData:
    copy = adata.copy()
    embed_anndata(copy, *parts, progress=False, **options)
    return copy


def embed(sources: Any, output: Path, parts: Parts, **options: Any) -> Any:
    """Embed files, see that nothing else is left behind, and open the output."""
    embed_files(sources, output, *parts, progress=False, **options)
    assert not [path for path in output.parent.iterdir() if ".shards" in path.name or ".partial" in path.name]
    if output.suffix == ".parquet":
        return pd.read_parquet(output)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return anndata.read_h5ad(output) if output.suffix == ".h5ad" else anndata.read_zarr(output)


def stop_after(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Have the encoder fail after a number of chunks."""
    real, calls = CellEncoder.begin, [0]

    def embed(self: CellEncoder, *arguments: Any) -> np.ndarray:
        calls[0] += 1
        if calls[0] > number:
            raise Stop
        return real(self, *arguments)

    monkeypatch.setattr(CellEncoder, "begin", embed)


# Tables -----------------------------------------------------------------------------------------------


def test_names_come_along(tmp_path: Path, cells: anndata.AnnData, parts: Parts) -> None:
    for kind in ("csr", "zarr", "10x_h5"):
        table = embed(write_cells(cells, tmp_path / kind, kind), tmp_path / f"{kind}.parquet", parts)
        assert table["cell"].tolist() == cells.obs_names.tolist()
        assert table.columns.tolist() == ["cell", KEY]


def test_a_table_has_one_column_of_vectors_and_those_of_obs(
    tmp_path: Path, cells: anndata.AnnData, parts: Parts
) -> None:
    datasets = pytest.importorskip("datasets")
    output = tmp_path / "out.parquet"
    path = write_cells(cells, tmp_path / "cells", "csr")
    table = embed(path, output, parts, obs="cell_type, passed,score,n_genes", key_added="X_mine")
    assert table.columns.tolist() == ["cell", "cell_type", "passed", "score", "n_genes", "X_mine"]
    for name in ("cell_type", "passed", "score", "n_genes"):
        assert table[name].tolist() == cells.obs[name].tolist()
    values = expected(cells, parts).obsm[KEY]
    np.testing.assert_array_equal(np.stack(table["X_mine"]), values)
    assert pq.read_schema(output).field("X_mine").type == pa.list_(pa.float32(), 32)
    assert json.loads(pq.read_metadata(output).metadata[b"mine"])["matched_genes"] == 60
    found = datasets.Dataset.from_parquet(str(output), cache_dir=str(tmp_path / "cache"))
    assert (found.features["X_mine"].length, found.features["cell_type"].dtype) == (32, "string")
    np.testing.assert_array_equal(found.with_format("numpy")[:]["X_mine"], values)


def test_lance_reads_the_table(tmp_path: Path, cells: anndata.AnnData, parts: Parts) -> None:
    lance = pytest.importorskip("lance")
    embed(write_cells(cells, tmp_path / "cells", "csr"), tmp_path / "out.parquet", parts, obs=["cell_type"])
    dataset = lance.write_dataset(pq.read_table(tmp_path / "out.parquet"), tmp_path / "out.lance")
    assert dataset.schema.field(KEY).type == pa.list_(pa.float32(), 32)
    assert dataset.count_rows() == 100


def test_a_wide_table_has_a_column_for_each_dimension(tmp_path: Path, cells: anndata.AnnData, parts: Parts) -> None:
    path = write_cells(cells, tmp_path / "cells", "csr")
    table = embed(path, tmp_path / "out.parquet", parts, wide=True, obs=["score"])
    assert table.columns.tolist() == ["cell", "score", *(f"{KEY}_{i}" for i in range(32))]
    np.testing.assert_array_equal(table.iloc[:, 2:].to_numpy(), expected(cells, parts).obsm[KEY])


def test_columns_of_obs_do_not_depend_on_stops(tmp_path: Path, cells: anndata.AnnData, parts: Parts) -> None:
    path, options = write_cells(cells, tmp_path / "cells", "csr"), {"obs": "cell_type,n_genes"}
    whole = embed(path, tmp_path / "whole.parquet", parts, **options)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stop):
            embed_files(path, tmp_path / "out.parquet", *parts, progress=False, **options)
    for other, said in (({"obs": "n_genes"}, "obs"), ({**options, "wide": True}, "wide")):
        with pytest.raises(ValueError, match=rf"other settings \({said}\)"):
            embed_files(path, tmp_path / "out.parquet", *parts, progress=False, **other)
    pd.testing.assert_frame_equal(embed(path, tmp_path / "out.parquet", parts, **options), whole)


def write_three(folder: Path, all_cells: list[anndata.AnnData]) -> list[Path]:
    kinds = zip(all_cells, ["csr", "zarr", "csc"], strict=True)
    return [write_cells(each, folder / f"{i}", kind) for i, (each, kind) in enumerate(kinds)]


def test_a_table_of_several_files(
    tmp_path: Path, cells: anndata.AnnData, others: list[anndata.AnnData], parts: Parts, caplog
) -> None:
    paths = write_three(tmp_path, [cells, *others])
    table = embed(paths, tmp_path / "out.parquet", parts, obs=["sample", "donor", "cell_type", "n_genes", "source"])
    columns = ["cell", "source", "sample", "donor", "cell_type", "n_genes", "obs_source", KEY]
    assert table.columns.tolist() == columns
    assert table["source"].tolist() == np.repeat([path.name for path in paths], [100, 37, 5]).tolist()
    assert table["cell"].tolist() == [name for each in (cells, *others) for name in each.obs_names]
    samples = [str(value) for each in (cells, *others) for value in each.obs["sample"]]
    assert table["sample"].tolist() == samples  # text in two files, whole numbers in the third
    assert table["donor"].isna().tolist() == [True] * 101 + [False] * 36 + [True] * 5
    assert table["cell_type"].tolist() == [value for each in (cells, *others) for value in each.obs["cell_type"]]
    assert table["obs_source"].isna().tolist() == [True] * 137 + [False] * 5
    assert set(table["obs_source"].dropna()) == {"theirs"}
    values = np.concatenate([expected(each, parts).obsm[KEY] for each in (cells, *others)])
    np.testing.assert_array_equal(np.stack(table[KEY]), values)
    assert json.loads(pq.read_metadata(tmp_path / "out.parquet").metadata[b"tahoe_x1"])["matched_genes"] == [60] * 3
    assert f"{paths[0]}, {paths[2]} has no column donor" in caplog.text


def test_types_of_columns_that_differ() -> None:
    frames = [
        pd.DataFrame({"a": [1, 2], "b": [True, False], "c": pd.Categorical(["x", None])}),
        pd.DataFrame({"a": [0.5], "b": ["yes"]}),
        pd.DataFrame({"a": [None], "c": ["y"]}, dtype=object),
    ]
    tables = [as_arrow(frame) for frame in frames]
    types = common_types([table.schema for table in tables], ["a", "b", "c"])
    assert types == {"a": pa.float64(), "b": pa.string(), "c": pa.string()}
    rows = [[part.to_pylist() for part in conformed(table, types, len(table))] for table in tables]
    assert rows[0] == [[1.0, 2.0], ["true", "false"], ["x", None]]
    assert rows[1:] == [[[0.5], ["yes"], [None]], [[None], [None], ["y"]]]
    with pytest.raises(ValueError, match="'mixed' of obs cannot be written to a table"):
        as_arrow(pd.DataFrame({"mixed": [1, "a", object()]}))


# AnnDatas ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".h5ad", ".zarr"])
def test_several_files_have_the_union_of_their_obs(
    tmp_path: Path, cells: anndata.AnnData, others: list[anndata.AnnData], parts: Parts, ending: str
) -> None:
    paths = write_three(tmp_path, [cells, *others])
    result = embed(paths, tmp_path / f"out{ending}", parts)
    assert result.shape == (142, 0)
    own = ["cell_type", "sample", "n_genes", "score", "passed", "donor", "obs_source"]
    assert result.obs.columns.tolist() == ["source", *own]
    assert result.obs["source"].tolist() == np.repeat([path.name for path in paths], [100, 37, 5]).tolist()
    assert result.obs_names.tolist() == [name for each in (cells, *others) for name in each.obs_names]
    assert set(result.obs["cell_type"].cat.categories) == {"B", "NK", "T", "new"}
    assert result.obs["cell_type"].tolist() == [v for each in (cells, *others) for v in each.obs["cell_type"]]
    assert result.obs["sample"].tolist() == [str(v) for each in (cells, *others) for v in each.obs["sample"]]
    assert result.obs["score"].dtype == np.float64
    assert result.obs["passed"].dtype == "boolean"
    for name, there in (("n_genes", [0, 2]), ("donor", [1])):
        assert result.obs[name].dtype == "Int64"
        rows = np.repeat(np.isin(range(3), there), [100, 37, 5])
        values = [v for i, each in enumerate((cells, *others)) if i in there for v in each.obs[name]]
        assert result.obs[name][rows].fillna(-1).tolist() == [-1 if pd.isna(v) else v for v in values]
        assert result.obs[name][~rows].isna().all()
    values = np.concatenate([expected(each, parts).obsm[KEY] for each in (cells, *others)])
    np.testing.assert_array_equal(result.obsm[KEY], values)
    assert result.uns["tahoe_x1"]["matched_genes"].tolist() == [60] * 3


def test_obs_chooses_columns_of_cells_without_counts(tmp_path: Path, cells: anndata.AnnData, parts: Parts) -> None:
    ordered = cells.copy()
    ordered.obs["cell_type"] = cells.obs["cell_type"].cat.set_categories(["T", "NK", "B", "none"], ordered=True)
    path = write_cells(ordered, tmp_path / "cells", "zarr")
    result = embed(path, tmp_path / "out.h5ad", parts, obs="cell_type")
    pd.testing.assert_frame_equal(result.obs, ordered.obs[["cell_type"]])
    whole = embed(path, tmp_path / "whole.h5ad", parts)
    pd.testing.assert_frame_equal(whole.obs, ordered.obs.astype({"sample": "category"}))


def test_a_column_that_cannot_be_read_is_left_out(
    tmp_path: Path, cells: anndata.AnnData, parts: Parts, caplog
) -> None:
    path = write_cells(cells, tmp_path / "cells", "csr")
    with h5py.File(path, "r+") as file:
        file["obs"].create_group("odd").attrs["encoding-type"] = "awkward-array"
    more = write_cells(make_cells(3, seed=3), tmp_path / "more", "csr")
    result = embed([path, more], tmp_path / "out.h5ad", parts)
    assert result.obs.columns.tolist() == ["source", *cells.obs.columns]
    assert f"The column odd of obs is left out: {path}: a column of its obs or var is stored as" in caplog.text


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.filterwarnings("ignore:Writing zarr v2", "ignore:Consolidated metadata")
def test_a_zarr_store_is_copied_with_the_new_slots(
    tmp_path: Path, cells: anndata.AnnData, parts: Parts, zarr_format: int
) -> None:
    source = tmp_path / "cells.zarr"
    with anndata.settings.override(zarr_write_format=zarr_format):
        cells.write_zarr(source)
    output = tmp_path / "out.zarr"
    options = {"gene_embeddings": "EA,GE", "draws": 2}
    result, reference = embed(source, output, parts, **options), expected(cells, parts, **options)
    np.testing.assert_array_equal(result.obsm[KEY], reference.obsm[KEY])
    assert set(result.varm) == {KEY, f"{KEY}_GE"}
    np.testing.assert_array_equal(result.varm[KEY], reference.varm[KEY])
    assert (result.X != cells.X).nnz == 0
    np.testing.assert_array_equal(result.obs["tahoe_x1_sd"], reference.obs["tahoe_x1_sd"])
    assert result.obs.columns.tolist() == [*cells.obs.columns, "tahoe_x1_sd"]
    assert zarr.open_group(output).metadata.zarr_format == zarr_format
    # Again, on top of what is there.
    again = embed(source, output, parts, seed=1)
    assert set(again.varm) == set()
    assert again.uns["tahoe_x1"]["seed"] == 1
    with pytest.raises(ValueError, match=r"cells.zarr is a source: a .zarr store cannot be changed in place"):
        embed_files(source, source, *parts, progress=False)
    (tmp_path / "folder.zarr").mkdir()
    with pytest.raises(ValueError, match="exists and is not a zarr store"):
        embed_files(source, tmp_path / "folder.zarr", *parts, progress=False)


@pytest.mark.parametrize("ending", [".h5ad", ".zarr", ".parquet", ".npy"])
def test_an_output_that_fails_at_the_end_is_not_there(
    tmp_path: Path, cells: anndata.AnnData, parts: Parts, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    path, output = write_cells(cells, tmp_path / "cells", "10x_h5"), tmp_path / f"out{ending}"
    with monkeypatch.context() as patch:
        patch.setattr(module, "provenance", lambda *args: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            embed_files(path, output, *parts, progress=False)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(["cells.h5", f"out{ending}.shards", "vocab"])
    embed_files(path, output, *parts, progress=False)
    assert output.exists()


# What the processes of a run do, and what a kill leaves: embed the sources of a folder into all forms of outputs.
EVERY_OUTPUT = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from helpers import tiny_config, tiny_model
    from tahoex1_hf import TahoeX1Model, TahoeX1Tokenizer, embed_files
    from tahoex1_hf.cells import encoding
    from tahoex1_hf.embedding import making

    torch.set_num_threads(1)
    vocab, place, kill = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    encoding.CHUNK_CELLS, making._SHARD_SECONDS = 16, 0.0
    one, *_ = sources = [place.parent / name for name in ("0.h5ad", "1.zarr", "2.h5ad")]
    parts = tiny_model(tiny_config(vocab_size=64), TahoeX1Model), TahoeX1Tokenizer(vocab, context_length=16)
    if kill:
        rename = Path.rename

        def killed(self, target):
            if self.name.endswith(".partial") and Path(target).name == "copy.zarr":
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, target)

        Path.rename = killed
    for name, given, options in (
        ("list.parquet", one, {"obs": "cell_type,score", "cell_gene_embeddings": place / "genes.parquet"}),
        ("wide.parquet", sources, {"wide": True, "draws": 2, "obs": "sample"}),
        ("copy.zarr", sources[1], {"gene_embeddings": "GE,TE,EA", "hidden_layer": 1, "overflow": "highest"}),
        ("all.h5ad", sources, {"draws": 3}),
    ):
        if not kill or name == "copy.zarr":
            embed_files(given, place / name, *parts, device="cpu", progress=False, **options)
"""


@pytest.fixture
def every_output(tmp_path: Path, cells: anndata.AnnData, others: list[anndata.AnnData], parts: Parts) -> list[Any]:
    """A command that embeds three sources into every form of output; the folder of the outputs comes behind it."""
    write_three(tmp_path, [cells, *others])
    return [sys.executable, "-c", textwrap.dedent(EVERY_OUTPUT), tmp_path / "vocab" / "vocab.json"]


def contents(folder: Path) -> dict[str, Any]:
    """Return all values of the outputs in a folder, by their names."""
    found: dict[str, Any] = {}
    for name in ("list", "wide", "genes"):
        found[name] = pq.read_table(folder / f"{name}.parquet")
    for name, read in (("copy.zarr", anndata.read_zarr), ("all.h5ad", anndata.read_h5ad)):
        adata = read(folder / name)
        found[f"{name} obs"] = pa.Table.from_pandas(adata.obs)
        slots = {**adata.obsm, **adata.varm}
        found |= {f"{name} {slot}": values for slot, values in slots.items()}
    return found


def test_two_processes_write_what_one_writes(tmp_path: Path, every_output: list[Any]) -> None:
    found = []
    for processes in (1, 2):
        place = tmp_path / f"by {processes}"
        place.mkdir()
        done = forked.launch(processes, [*every_output, place], forked.environment())
        assert done.returncode == 0, done.stderr
        names = ["all.h5ad", "copy.zarr", "genes.parquet", "list.parquet", "wide.parquet"]
        assert sorted(path.name for path in place.iterdir()) == names
        found.append(contents(place))
    one, two = found
    assert one.keys() == two.keys() >= {f"copy.zarr {KEY}", f"copy.zarr {KEY}_TE", f"all.h5ad {KEY}"}
    for name, values in one.items():
        if isinstance(values, pa.Table):
            assert values.num_rows > 30
            assert values.equals(two[name]), name
        else:
            np.testing.assert_array_equal(two[name], values, err_msg=name)


def test_a_kill_while_a_store_is_replaced_loses_nothing(
    tmp_path: Path, every_output: list[Any], parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, source = tmp_path / "outputs" / "copy.zarr", tmp_path / "1.zarr"
    output.parent.mkdir()
    embed_files(source, output, *parts, seed=5, progress=False)
    done = forked.run([*every_output, output.parent, "kill"])
    assert done.returncode == -9, done.stderr
    assert not output.exists()
    monkeypatch.setattr("tahoex1_hf.common.files._cleared", set())  # as in a process of its own
    # Another command, whatever it is, finds the earlier store in its place again; the same one finishes its work.
    with pytest.raises(ValueError, match=r"holds an unfinished run with other settings"):
        embed_files(source, output, *parts, seed=5, progress=False)
    assert anndata.read_zarr(output).uns["tahoe_x1"]["seed"] == 5
    options = {"gene_embeddings": "GE,TE,EA", "hidden_layer": 1, "overflow": "highest"}
    result = embed(source, output, parts, **options)
    assert result.uns["tahoe_x1"]["overflow"] == "highest"
    assert set(result.varm) == {KEY, f"{KEY}_GE", f"{KEY}_TE"}
    assert [path.name for path in output.parent.iterdir()] == ["copy.zarr"]


def test_an_unfinished_object_is_removed_from_its_store() -> None:
    memory = fsspec.filesystem("memory")
    stream = WholeStream("memory://streams/a.bin")
    stream.file.write(b"half")
    stream.abandon()
    assert not memory.exists("/streams/a.bin")
    with WholeStream("memory://streams/a.bin") as file:
        file.write(b"whole")
    assert memory.cat("/streams/a.bin") == b"whole"


def test_hidden_layer_and_kinds_of_gene_embeddings_of_files(
    tmp_path: Path, cells: anndata.AnnData, parts: Parts
) -> None:
    path, output = write_cells(cells, tmp_path / "cells", "csr"), tmp_path / "out.h5ad"
    options = {"hidden_layer": 1, "gene_embeddings": "GE,TE,EA"}
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stop):
            embed(path, output, parts, **options)
    for other, said in (({"hidden_layer": 0}, "hidden_layer"), ({"gene_embeddings": "GE,EA"}, "gene_kinds")):
        with pytest.raises(ValueError, match=rf"other settings \({said}\)"):
            embed(path, output, parts, **{**options, **other})
    result, reference = embed(path, output, parts, **options), expected(cells, parts, **options)
    np.testing.assert_array_equal(result.obsm[KEY], reference.obsm[KEY])
    assert set(result.varm) == {KEY, f"{KEY}_GE", f"{KEY}_TE"}
    for slot, values in reference.varm.items():
        np.testing.assert_array_equal(result.varm[slot], values)
    facts = result.uns["tahoe_x1"]
    assert (facts["hidden_layer"], facts["gene_embeddings"]) == (1, "GE,TE,EA")
    assert np.abs(result.obsm[KEY] - expected(cells, parts).obsm[KEY]).max() > 1e-3


@pytest.mark.parametrize(
    ("output", "options", "said"),
    [
        ("out.npy", {"obs": "score"}, r"obs=score: 'out.npy' has no place for columns"),
        ("out.h5ad", {"obs": ["score"]}, r"out.h5ad is a copy of the only source, with all columns of obs"),
        ("out.h5ad", {"wide": True}, r"wide \(--wide\) needs an output that ends in .parquet"),
        ("out.parquet", {"obs": "score,nothing"}, r"no source has the column 'nothing'; there are cell_type, sample"),
        ("out.zarr", {"gene_embeddings": True}, r"a single .h5ad file as source and an .h5ad output"),
    ],
)
def test_what_does_not_go_together(
    tmp_path: Path, cells: anndata.AnnData, parts: Parts, output: str, options: dict[str, Any], said: str
) -> None:
    path = write_cells(cells, tmp_path / "cells", "csr")
    with pytest.raises(ValueError, match=said):
        embed_files(path, tmp_path / output, *parts, progress=False, **options)
    assert not (tmp_path / f"{output}.shards").exists()
