"""Embedding files gives the same numbers for every kind of input, after a stop, and with several processes."""

import copy
import json
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import forked
import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from cells import GENES, NUM_GENES, make_cells, write_cells, write_vocab
from helpers import tiny_config, tiny_model
from tahoe_100m import SHA256, cell_table, fill_cache, write_parquet

from tahoex1_hf import TahoeX1Model, TahoeX1Tokenizer, embed_anndata
from tahoex1_hf.cells import encoding
from tahoex1_hf.cells.encoding import ChunkEncoder, EncodeOptions
from tahoex1_hf.cells.opening import Source, open_cells
from tahoex1_hf.cells.readers.csr import AlignedArray
from tahoex1_hf.data.config import parse_config
from tahoex1_hf.data.preparation import prepare
from tahoex1_hf.embedding import making
from tahoex1_hf.embedding.files import embed_files as run
from tahoex1_hf.embedding.plan import Plan
from tahoex1_hf.inference.encoder import CellEncoder

KEY = "X_tahoe_x1"
CHUNK = 16


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make chunks of few cells, each of which becomes a shard."""
    monkeypatch.setattr(encoding, "CHUNK_CELLS", CHUNK)
    monkeypatch.setattr(making, "_SHARD_SECONDS", 0.0)


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocab(tmp_path_factory.mktemp("vocab"), drug_token=True)


@pytest.fixture
def parts(vocab: Path) -> tuple[TahoeX1Model, TahoeX1Tokenizer]:
    """Return a model, and a tokenizer whose context is shorter than many cells."""
    return tiny_model(tiny_config(vocab_size=NUM_GENES + 4), TahoeX1Model), TahoeX1Tokenizer(
        str(vocab), context_length=16
    )


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    return make_cells(100)


def expected(cells: anndata.AnnData, parts: tuple[TahoeX1Model, TahoeX1Tokenizer], **options: Any) -> anndata.AnnData:
    copy = cells.copy()
    embed_anndata(copy, *parts, progress=False, **options)
    return copy


def embed(
    sources: Any, output: Path | str, parts: tuple[TahoeX1Model, TahoeX1Tokenizer], **options: Any
) -> np.ndarray:
    run(sources, output, *parts, progress=False, **options)
    if str(output).endswith(".npy"):
        return np.load(output)
    return anndata.read_h5ad(output).obsm[KEY]


# Inputs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csr", "csc", "dense", "zarr", "zarr_csc", "10x_h5", "10x_mtx"])
def test_every_kind_of_file_gives_the_same(tmp_path: Path, cells: anndata.AnnData, parts, kind: str) -> None:
    path = write_cells(cells, tmp_path / "cells", kind)
    embeddings = embed(path, tmp_path / "out.npy", parts)
    np.testing.assert_array_equal(embeddings, expected(cells, parts).obsm[KEY])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([path.name, "out.npy"])


def test_the_models_folder_is_no_setting(tmp_path: Path, cells: anndata.AnnData, parts, stopping) -> None:
    """A run resumes with the same weights and settings from another folder."""
    path = write_cells(cells, tmp_path / "cells", "csr")
    stopping(2)
    with pytest.raises(Stop):
        embed(path, tmp_path / "out.npy", parts)
    stopping(None)
    for part in parts:
        part.save_pretrained(tmp_path / "moved")
    moved = TahoeX1Model.from_pretrained(tmp_path / "moved"), TahoeX1Tokenizer.from_pretrained(tmp_path / "moved")
    np.testing.assert_array_equal(embed(path, tmp_path / "out.npy", moved), expected(cells, parts).obsm[KEY])


def test_a_file_of_an_old_anndata(tmp_path: Path, cells: anndata.AnnData, vocab: Path) -> None:
    """Before anndata 0.7, obs and var were one compound dataset each, and sparse matrices had other attributes."""
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        group = file.create_group("X")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(cells.X, name)
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = b"csr", cells.shape
        columns = list(zip(cells.obs_names, cells.obs["sample"], strict=True))
        file["obs"] = np.array(columns, dtype=[("index", "S12"), ("sample", "S4")])
        file["var"] = np.array([(name, 1) for name in cells.var_names], dtype=[("index", "S16"), ("number", int)])
    model = tiny_model(tiny_config(vocab_size=NUM_GENES + 4, num_drugs=5, drug_token_id=3), TahoeX1Model)
    table = {"<pad>": 0, "s1": 1, "s2": 2, "s3": 3, "s4": 4}
    parts = model, TahoeX1Tokenizer(str(vocab), drug_to_id=table)
    run(tmp_path / "old.h5ad", tmp_path / "out.parquet", *parts, drugs="sample", progress=False)
    result = pd.read_parquet(tmp_path / "out.parquet")
    assert result["cell"].tolist() == cells.obs_names.tolist()
    np.testing.assert_array_equal(np.stack(result[KEY]), expected(cells, parts, drugs="sample").obsm[KEY])


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_a_backed_anndata_is_read_in_the_files_own_chunks(
    tmp_path: Path, cells: anndata.AnnData, parts, compression: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tahoex1_hf.cells.readers.base._ELEMENTS_FOR_CHUNKS", 200)
    cells.write_h5ad(tmp_path / "cells.h5ad", compression=compression)
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    starts = []
    real = AlignedArray.read

    def watched(self: AlignedArray, start: int, stop: int) -> np.ndarray:
        starts.append(start)
        return real(self, start, stop)

    monkeypatch.setattr(AlignedArray, "read", watched)
    embed_anndata(backed, *parts, progress=False)
    np.testing.assert_array_equal(backed.obsm[KEY], expected(cells, parts).obsm[KEY])
    assert len(starts) > 4


def test_a_folder_and_a_glob_stand_for_their_files(tmp_path: Path, parts) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        write_cells(make_cells(20, seed=i), tmp_path / "in" / str(i), "csr")
    whole = embed(tmp_path / "in", tmp_path / "a.npy", parts)
    assert whole.shape == (60, 32)
    np.testing.assert_array_equal(embed(str(tmp_path / "in" / "*.h5ad"), tmp_path / "b.npy", parts), whole)


@pytest.fixture
def prepared(tmp_path: Path, cells: anndata.AnnData, vocab: Path) -> Path:
    source = {"kind": "anndata", "paths": [str(write_cells(cells, tmp_path / "cells", "csr"))]}
    source |= {"metadata": {"_index": "_index", "drug": "sample"}}
    values = {"output": str(tmp_path / "prepared"), "vocab": str(vocab), "sources": [source], "shard_size_mb": 0.004}
    prepare(parse_config(values, "test"))
    return tmp_path / "prepared"


def test_a_prepared_dataset(tmp_path: Path, cells: anndata.AnnData, parts, prepared: Path) -> None:
    model, tokenizer = parts
    run(prepared, tmp_path / "out.parquet", model, tokenizer, progress=False)
    split = open_cells(Source(str(prepared), "prepared", "train"), tokenizer)
    assert len(split.dataset.sizes) > 1
    encoder = ChunkEncoder(split, EncodeOptions(tokenizer))
    tokens = [chunk.lengths.sum() for chunk in encoder.chunks(0, split.num_cells)]
    np.testing.assert_array_equal(encoder.chunk_tokens(), tokens)
    table = pd.read_parquet(tmp_path / "out.parquet").set_index("cell")
    assert set(table["source"]) == {f"{prepared.name} (train)", f"{prepared.name} (validation)"}
    values = np.stack(table.loc[cells.obs_names, KEY])
    np.testing.assert_allclose(values, expected(cells, (model, tokenizer)).obsm[KEY], atol=1e-6, rtol=0)


def test_a_dataset_of_another_vocabulary_is_refused(tmp_path: Path, parts, prepared: Path) -> None:
    other = write_vocab(tmp_path / "other", [*GENES[:-1], "ENSG99999999999"], drug_token=True)
    with pytest.raises(ValueError, match="another vocabulary"):
        run(prepared, tmp_path / "out.npy", parts[0], TahoeX1Tokenizer(str(other)), progress=False)


def test_drugs_of_files_and_datasets(tmp_path: Path, cells: anndata.AnnData, vocab: Path, prepared: Path) -> None:
    model = tiny_model(tiny_config(vocab_size=NUM_GENES + 4, num_drugs=5, drug_token_id=3), TahoeX1Model)
    table = {"<pad>": 0, "s1": 1, "s2": 2, "s3": 3, "s4": 4}
    parts = model, TahoeX1Tokenizer(str(vocab), context_length=None, drug_to_id=table)
    values = expected(cells, parts, drugs="sample").obsm[KEY]
    from_file = embed(tmp_path / "cells.h5ad", tmp_path / "file.npy", parts, drugs="sample")
    np.testing.assert_array_equal(from_file, values)
    run(prepared, tmp_path / "out.parquet", *parts, drugs="drug", progress=False)
    found = np.stack(pd.read_parquet(tmp_path / "out.parquet").set_index("cell").loc[cells.obs_names, KEY])
    np.testing.assert_allclose(found, values, atol=1e-6, rtol=0)
    one = embed(tmp_path / "cells.h5ad", tmp_path / "one.npy", parts, drugs="s3")
    np.testing.assert_array_equal(one, expected(cells, parts, drugs="s3").obsm[KEY])
    with pytest.raises(ValueError, match="neither a column"):
        run(tmp_path / "cells.h5ad", tmp_path / "x.npy", *parts, drugs="water", progress=False)


def test_tables_in_the_form_of_tahoe_100m(tmp_path: Path, cells: anndata.AnnData, parts) -> None:
    counts = cells.X.toarray()
    (tmp_path / "data").mkdir()
    write_parquet(cell_table(counts[:70]), tmp_path / "data" / "a.parquet")
    write_parquet(cell_table(counts[70:]), tmp_path / "data" / "b.parquet")
    genes = tmp_path / "genes.parquet"
    pd.DataFrame({"gene_symbol": GENES, "ensembl_id": GENES, "token_id": range(3, 3 + NUM_GENES)}).to_parquet(genes)
    run(tmp_path / "data", tmp_path / "out.parquet", *parts, gene_metadata=str(genes), progress=False)
    table = pd.read_parquet(tmp_path / "out.parquet")
    assert table["cell"].tolist() == [f"01_0{i}-lib" for n in (70, 30) for i in range(n)]
    halves = [expected(cells[a:b], parts).obsm[KEY] for a, b in ((0, 70), (70, 100))]
    np.testing.assert_allclose(np.stack(table[KEY]), np.concatenate(halves), atol=1e-6, rtol=0)


def test_the_hub_dataset_from_the_cache(tmp_path: Path, cells: anndata.AnnData, parts, hub_cache: Path) -> None:
    genes = tmp_path / "genes.parquet"
    pd.DataFrame({"gene_symbol": GENES, "ensembl_id": GENES, "token_id": range(3, 3 + NUM_GENES)}).to_parquet(genes)
    table = Path(write_parquet(cell_table(cells.X.toarray()), tmp_path / "cells.parquet"))
    for name, content, blob in (("data/a.parquet", table, SHA256), ("metadata/gene_metadata.parquet", genes, "c")):
        fill_cache(hub_cache, name, content, blob)
    embeddings = embed("tahoebio/Tahoe-100M", tmp_path / "out.npy", parts)
    np.testing.assert_allclose(embeddings, expected(cells, parts).obsm[KEY], atol=1e-6, rtol=0)


# Stopping and resuming ------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int | None], list[int]]]:
    """Make the encoder fail after a number of chunks, and return the list of the cells that were embedded."""
    real = CellEncoder.begin

    def make(after: int | None) -> list[int]:
        seen: list[int] = []

        def embed(self: CellEncoder, chunk: Any, *more: Any) -> np.ndarray:
            if after is not None and len(seen) >= after * CHUNK:
                raise Stop
            seen.extend(chunk.cell_numbers.tolist())
            return real(self, chunk, *more)

        monkeypatch.setattr(CellEncoder, "begin", embed)
        return seen

    yield make
    monkeypatch.setattr(CellEncoder, "begin", real)


@pytest.mark.parametrize("after", [1, 3, 6])
@pytest.mark.parametrize("genes", [False, True])
def test_a_stopped_run_resumes(
    tmp_path: Path, cells: anndata.AnnData, parts, after: int, genes: bool, stopping
) -> None:
    path, output = write_cells(cells, tmp_path / "cells", "csr"), tmp_path / "out.h5ad"
    reference = expected(cells, parts, gene_embeddings=genes)
    stopping(after)
    with pytest.raises(Stop):
        embed(path, output, parts, gene_embeddings=genes)
    assert not output.exists()
    seen = stopping(None)
    embed(path, output, parts, gene_embeddings=genes)
    assert seen == list(range(after * CHUNK, 100))  # nothing is computed again
    result = anndata.read_h5ad(output)
    np.testing.assert_array_equal(result.obsm[KEY], reference.obsm[KEY])
    if genes:
        np.testing.assert_array_equal(result.varm[KEY], reference.varm[KEY])
    assert not (tmp_path / "out.h5ad.shards").exists()


@pytest.mark.parametrize("lost", [False, True])
def test_shards_and_sums_that_do_not_fit(tmp_path: Path, cells: anndata.AnnData, parts, stopping, lost: bool) -> None:
    """A run killed between a shard and its sums leaves a shard too many; a lost shard leaves sums too large."""
    path, output = write_cells(cells, tmp_path / "cells", "csr"), tmp_path / "out.h5ad"
    stopping(3)
    with pytest.raises(Stop):
        embed(path, output, parts, gene_embeddings=True)
    shards = sorted((tmp_path / "out.h5ad.shards").glob("chunks-*"))
    assert len(shards) == 3
    if lost:
        shards[1].unlink()
    else:
        shutil.copyfile(shards[2], shards[2].with_name("chunks-000000000003-000000000004.parquet"))
    seen = stopping(None)
    embed(path, output, parts, gene_embeddings=True)
    assert seen == list(range(0 if lost else 3 * CHUNK, 100))
    reference = expected(cells, parts, gene_embeddings=True)
    np.testing.assert_array_equal(anndata.read_h5ad(output).obsm[KEY], reference.obsm[KEY])
    np.testing.assert_array_equal(anndata.read_h5ad(output).varm[KEY], reference.varm[KEY])


def test_a_run_with_other_settings_is_refused(tmp_path: Path, cells: anndata.AnnData, parts, stopping) -> None:
    path, output = write_cells(cells, tmp_path / "cells", "csr"), tmp_path / "out.npy"
    stopping(2)
    with pytest.raises(Stop):
        embed(path, output, parts)
    stopping(None)
    with pytest.raises(ValueError, match=r"other settings \(seed\).*--restart"):
        embed(path, output, parts, seed=1)
    close = copy.deepcopy(parts[0])
    with torch.no_grad():  # one value, of which there are thousands
        close.get_input_embeddings().weight[3, 1] += 1
    with pytest.raises(ValueError, match=r"other settings \(weights\)"):
        embed(path, output, (close, parts[1]))
    write_cells(make_cells(100, seed=9), tmp_path / "cells", "csr")
    with pytest.raises(ValueError, match=r"other settings \(cells\)"):
        embed(path, output, parts)
    other = tiny_model(tiny_config(vocab_size=NUM_GENES + 4, num_hidden_layers=1), TahoeX1Model)
    with pytest.raises(ValueError, match=r"other settings \(cells, model, weights\)"):
        embed(path, output, (other, parts[1]))
    embeddings = embed(path, output, parts, restart=True)
    np.testing.assert_array_equal(embeddings, expected(make_cells(100, seed=9), parts).obsm[KEY])


def test_settings_that_an_older_run_did_not_record_are_taken_to_be_the_same(
    tmp_path: Path, cells: anndata.AnnData, parts, stopping
) -> None:
    path = write_cells(cells, tmp_path / "cells", "csr")
    stopping(2)
    with pytest.raises(Stop):
        embed(path, tmp_path / "out.npy", parts, batch_tokens=200)
    stopping(None)
    with pytest.raises(ValueError, match=r"other settings \(batch_tokens\)"):
        embed(path, tmp_path / "out.npy", parts)
    record = tmp_path / "out.npy.shards" / "run.json"
    identity = json.loads(record.read_text())
    del identity["batch_tokens"], identity["weights"]  # as earlier versions wrote it
    record.write_text(json.dumps(identity))
    assert embed(path, tmp_path / "out.npy", parts, batch_tokens=200).shape == (100, 32)


def test_a_run_that_sampled_cells_by_their_numbers_is_not_gone_on_with(
    tmp_path: Path, cells: anndata.AnnData, parts, stopping
) -> None:
    """Earlier versions did; where no genes are left out, that makes no difference."""
    path, output = write_cells(cells, tmp_path / "cells", "csr"), tmp_path / "out.npy"
    for length in (16, 4096):
        stopping(2)
        with pytest.raises(Stop):
            embed(path, output, parts, max_length=length, restart=True, overflow="sample" if length == 16 else "first")
        stopping(None)
        record = tmp_path / "out.npy.shards" / "run.json"
        identity = json.loads(record.read_text())
        for key in ("sampled_by", "draws", "unknown_drugs"):
            del identity[key]  # as the code of before wrote it
        record.write_text(json.dumps(identity))
        if length == 16:
            with pytest.raises(ValueError, match=r"other settings \(sampled_by\)"):
                embed(path, output, parts, max_length=length, overflow="sample")
    values = embed(path, output, parts, max_length=4096, overflow="first")
    np.testing.assert_array_equal(values, expected(cells, parts, max_length=4096, overflow="first").obsm[KEY])


@pytest.mark.parametrize("kind", [".h5ad", ".parquet", "several.h5ad"])
def test_means_over_samples(tmp_path: Path, cells: anndata.AnnData, parts, stopping, kind: str) -> None:
    """Also over a stop, and never together with what another number of samples left."""
    path, output = write_cells(cells, tmp_path / "cells", "csr"), tmp_path / f"out{kind}"
    sources = [path] if kind != "several.h5ad" else [path, write_cells(cells, tmp_path / "more", "csr")]
    stopping(3)
    with pytest.raises(Stop):
        run(sources, output, *parts, draws=3, progress=False)
    stopping(None)
    with pytest.raises(ValueError, match=r"other settings \(draws\)"):
        run(sources, output, *parts, draws=2, progress=False)
    run(sources, output, *parts, draws=3, progress=False)
    one = expected(cells, parts, draws=3)
    values, deviations = one.obsm[KEY], one.obs["tahoe_x1_sd"].to_numpy()
    assert 0 < (deviations > 0).sum() < len(deviations)
    repeat = len(sources)
    if kind == ".parquet":
        table = pd.read_parquet(output)
        assert table.columns[:2].tolist() == ["cell", "tahoe_x1_sd"]
        found, spread = np.stack(table[KEY]), table["tahoe_x1_sd"].to_numpy()
    else:
        written = anndata.read_h5ad(output)
        found, spread = written.obsm[KEY], written.obs["tahoe_x1_sd"].to_numpy()
        assert written.uns["tahoe_x1"]["draws"] == 3
        if repeat == 1:
            assert written.obs.columns.tolist() == [*cells.obs.columns, "tahoe_x1_sd"]
    np.testing.assert_array_equal(found, np.concatenate([values] * repeat))
    np.testing.assert_array_equal(spread, np.concatenate([deviations] * repeat))
    assert spread.dtype == np.float32
    with pytest.raises(ValueError, match=r"further numbers \(tahoe_x1_sd\), which 'x.npy' cannot hold"):
        run(sources, tmp_path / "x.npy", *parts, draws=3, progress=False)


def test_only_one_run_at_a_time(tmp_path: Path, cells: anndata.AnnData, parts) -> None:
    from filelock import FileLock

    path = write_cells(cells, tmp_path / "cells", "csr")
    with FileLock(tmp_path / "out.npy.shards.lock"), pytest.raises(ValueError, match="another run is writing"):
        embed(path, tmp_path / "out.npy", parts)
    embed(path, tmp_path / "out.npy", parts)


def test_a_damaged_shard_is_named(tmp_path: Path, cells: anndata.AnnData, parts, stopping) -> None:
    path = write_cells(cells, tmp_path / "cells", "csr")
    stopping(2)
    with pytest.raises(Stop):
        embed(path, tmp_path / "out.npy", parts)
    shard = next((tmp_path / "out.npy.shards").glob("chunks-*"))
    pq.write_table(pq.read_table(shard).slice(1), shard)
    stopping(None)
    with pytest.raises(ValueError, match="is damaged: remove it"):
        embed(path, tmp_path / "out.npy", parts)
    assert not (tmp_path / "out.npy").exists()
    shard.unlink()
    np.testing.assert_array_equal(embed(path, tmp_path / "out.npy", parts), expected(cells, parts).obsm[KEY])


DRIVER = """
    import sys, time
    import torch
    from helpers import tiny_config, tiny_model
    from tahoex1_hf import TahoeX1Model, TahoeX1Tokenizer
    from tahoex1_hf.cells import encoding
    from tahoex1_hf.embedding import files as embed_files, making
    from tahoex1_hf.inference.encoder import CellEncoder
    torch.set_num_threads(1)
    source, output, vocab, *stop = sys.argv[1:]
    encoding.CHUNK_CELLS, making._SHARD_SECONDS = 16, 0.0
    real, calls = CellEncoder.begin, []
    def counted(*arguments):
        calls.append(1)
        if stop and len(calls) > int(stop[0]):
            time.sleep(3600)  # until it is killed
        return real(*arguments)
    CellEncoder.begin = counted
    model = tiny_model(tiny_config(vocab_size=64), TahoeX1Model)
    embed_files.embed_files(source, output, model, TahoeX1Tokenizer(vocab, context_length=16), device="cpu")
    with open(output + ".calls", "w") as file:
        file.write(str(len(calls)))
"""


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    path = tmp_path / "driver.py"
    path.write_text(textwrap.dedent(DRIVER))
    return path


def test_a_killed_run_resumes_in_another_process(
    tmp_path: Path, cells: anndata.AnnData, vocab: Path, driver: Path
) -> None:
    path = write_cells(cells, tmp_path / "cells", "csr")
    command = [sys.executable, driver, path, tmp_path / "out.npy", vocab]
    shards = tmp_path / "out.npy.shards"
    process = forked.Forked([*command, 5])
    try:
        while len(list(shards.glob("chunks-*"))) < 3:
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    before = len(list(shards.glob("chunks-*")))
    assert 3 <= before <= 5
    forked.run(command).check_returncode()
    forked.run([*command[:3], tmp_path / "whole.npy", vocab]).check_returncode()
    again, whole = (int((tmp_path / f"{name}.npy.calls").read_text()) for name in ("out", "whole"))
    assert (again, whole) == (7 - before, 7)  # no chunk was embedded again
    assert (tmp_path / "out.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


# Several processes ----------------------------------------------------------------------------------


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run two processes with accelerate's launcher, as a user does."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--multi_gpu"]  # accelerate's name for its launcher, GPUs or not
    return forked.launch_as_a_user([*command, *arguments])


def test_two_processes_give_the_same(tmp_path: Path, cells: anndata.AnnData, vocab: Path, driver: Path) -> None:
    path = write_cells(cells, tmp_path / "cells", "csr")
    forked.run([sys.executable, driver, path, tmp_path / "1.npy", vocab]).check_returncode()
    result = launch(driver, path, tmp_path / "2.npy", vocab)
    assert result.returncode == 0, result.stderr
    assert "Embedding (2/2)" in result.stderr
    assert (tmp_path / "1.npy").read_bytes() == (tmp_path / "2.npy").read_bytes()


def test_an_error_of_the_first_process_ends_all(tmp_path: Path, vocab: Path, driver: Path) -> None:
    path = write_cells(make_cells(40), tmp_path / "cells", "csr")
    shards = tmp_path / "out.npy.shards"
    shards.mkdir()
    (shards / "run.json").write_text('{"seed": 5}')
    arguments = [sys.executable, driver, path, tmp_path / "out.npy", vocab]
    result = forked.launch(2, arguments, forked.environment())
    assert result.returncode != 0
    assert result.stderr.count("holds an unfinished run with other settings") >= 1


def test_work_is_shared_by_tokens(vocab: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    dense = np.ones((160, NUM_GENES), dtype=np.float32) * (
        rng.random((160, NUM_GENES)) < np.linspace(0.05, 1, 160)[:, None]
    )
    dense[:, 0] = 1
    long_last = make_cells(160)
    long_last.X = type(long_last.X)(dense)
    path = write_cells(long_last, tmp_path / "cells", "csr")
    options = EncodeOptions(TahoeX1Tokenizer(str(vocab), context_length=None))
    plan = Plan([ChunkEncoder(open_cells(each, options.tokenizer), options) for each in (path, make_cells(40))])
    todo = np.setdiff1d(np.arange(plan.num_chunks), [1, 4])
    shares = plan.shares(todo, 3)
    np.testing.assert_array_equal(np.concatenate(shares), todo)
    tokens = np.concatenate([each.chunk_tokens() for each in plan.encoders])
    sums = [tokens[share].sum() for share in shares]
    assert max(sums) - min(sums) <= 2 * tokens.max()
    assert len(shares[0]) > len(shares[1])  # short cells come first
    assert plan.ranges(todo) == [(0, 1), (2, 4), (5, 10), (10, 13)]
    assert plan.cells(5, 10) == (0, 5 * CHUNK, 160)
    assert plan.cells(10, 13) == (1, 0, 40)


# Places ---------------------------------------------------------------------------------------------


def test_an_output_in_an_object_store(tmp_path: Path, cells: anndata.AnnData, parts, stopping) -> None:
    import fsspec

    path, output = write_cells(cells, tmp_path / "cells", "csc"), "memory://bucket/run/out.parquet"
    stopping(3)
    with pytest.raises(Stop):
        run(path, output, *parts, progress=False)
    memory = fsspec.filesystem("memory")
    assert len(memory.glob("/bucket/run/out.parquet.shards/chunks-*")) == 3
    stopping(None)
    run(path, output, *parts, progress=False)
    with memory.open("/bucket/run/out.parquet") as file:
        table = pd.read_parquet(file)
    np.testing.assert_array_equal(np.stack(table[KEY]), expected(cells, parts).obsm[KEY])
    assert [entry.rpartition("/")[2] for entry in memory.ls("/bucket/run", detail=False)] == ["out.parquet"]
    with pytest.raises(ValueError, match="cannot be written to memory"):
        run(path, "memory://bucket/x.h5ad", *parts, progress=False)


def test_s3(tmp_path: Path, cells: anndata.AnnData, parts, s3: str) -> None:
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket="embeddings")
    run(write_cells(cells, tmp_path / "cells", "csr"), "s3://embeddings/out.npy", *parts, progress=False)
    client.download_file("embeddings", "out.npy", str(tmp_path / "out.npy"))
    assert [entry["Key"] for entry in client.list_objects(Bucket="embeddings")["Contents"]] == ["out.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected(cells, parts).obsm[KEY])


def test_unusable_inputs_are_refused(tmp_path: Path, cells: anndata.AnnData, parts) -> None:
    path = write_cells(cells, tmp_path / "cells", "csr")
    two = [path, write_cells(cells, tmp_path / "more", "csr")]
    for sources, options, said in (
        (two, {"gene_embeddings": True}, "a single .h5ad file as source"),
        (tmp_path / "text.h5ad", {}, "not an .h5ad file"),
        (path, {"layer": "raw"}, r"it has no layers/raw; layer= \(--layer\) can be one of"),
        (path, {"max_length": 2}, "max_length"),
        (write_cells(cells, tmp_path / "tenx", "10x_h5"), {"layer": "x"}, "a 10x file, which has no layers"),
        (path, {"drugs": "sample"}, "no drug table"),
    ):
        (tmp_path / "text.h5ad").write_text("no HDF5")
        with pytest.raises(ValueError, match=said):
            run(sources, tmp_path / "out.h5ad", *parts, progress=False, **options)
    assert not (tmp_path / "out.h5ad.shards").exists()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run(tmp_path / "nowhere.zarr", tmp_path / "out.npy", *parts, progress=False)
