"""A source is copied while its cells are embedded: all of it, until it is stopped, and to where embeddings fit in."""

import errno
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from cells import NUM_GENES, make_cells, write_cells, write_vocab
from helpers import tiny_config, tiny_model

from tahoex1_hf import TahoeX1Model, TahoeX1Tokenizer, embed_files
from tahoex1_hf.cells import encoding
from tahoex1_hf.embedding import making, source_copy
from tahoex1_hf.embedding.source_copy import SourceCopy
from tahoex1_hf.inference.encoder import CellEncoder

CHUNK = 16


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_copy, "_PIECE_BYTES", 1000)


def files_of(folder: Path) -> dict[str, bytes | None]:
    """Return the contents of a folder's files, and None for each folder in it."""
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize("size", [0, 1, 1000, 20_500])
def test_a_file(tmp_path: Path, small_pieces: None, size: int) -> None:
    source, output = tmp_path / "cells.h5ad", tmp_path / "out.h5ad"
    source.write_bytes(np.random.default_rng(0).bytes(size))
    output.write_bytes(b"earlier")
    copy = SourceCopy(str(source), str(output), tmp_path / "run" / "copy.partial")
    assert len(list(tmp_path.iterdir())) == 2  # nothing is done before it is asked for
    copy.begin()
    whole = copy.wait()
    copy.check()
    assert whole.partial.read_bytes() == source.read_bytes()
    assert output.read_bytes() == b"earlier"
    whole.finish()
    copy.abandon()
    assert output.read_bytes() == source.read_bytes()
    assert files_of(tmp_path).keys() == {"cells.h5ad", "out.h5ad", "run"}


def test_a_store_that_may_only_be_read(tmp_path: Path, small_pieces: None) -> None:
    source = tmp_path / "cells.zarr"
    make_cells(30).write_zarr(source)
    (source / "empty").mkdir()
    for path in [source, *source.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    whole = SourceCopy(str(source), str(tmp_path / "out.zarr"), tmp_path / "run" / "copy.partial").wait()
    assert files_of(whole.partial) == files_of(source)
    assert len(files_of(source)) > 20
    assert all(path.stat().st_mode & 0o200 for path in [whole.partial, *whole.partial.rglob("*")])
    whole.discard()
    for path in [source, *source.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)  # or pytest cannot remove it


@pytest.mark.parametrize("kind", ["file", "store"])
def test_a_copy_that_is_abandoned_stops(
    tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    written, going_on = threading.Semaphore(0), threading.Event()
    real = source_copy._write

    def slow(file: Any, piece: memoryview) -> None:
        real(file, piece)
        written.release()
        assert going_on.wait(60)

    monkeypatch.setattr(source_copy, "_write", slow)
    source = tmp_path / "cells"
    if kind == "store":
        source.mkdir()
    for number in range(5):
        (source / str(number) if kind == "store" else source).write_bytes(bytes(5000))
    copy = SourceCopy(str(source), str(tmp_path / "out"), tmp_path / "run" / "copy.partial")
    copy.begin()
    assert written.acquire(timeout=60)
    copy.check()  # no error so far
    copy._stopped.set()
    going_on.set()
    copy.abandon()
    assert not written.acquire(blocking=False)  # nothing was written after the stop
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells", "run"]
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("kind", ["file", "store"])
def test_what_a_kill_has_left_is_written_over(tmp_path: Path, kind: str) -> None:
    source, place = tmp_path / "cells", tmp_path / "run" / "copy.partial"
    given, left = (source / "part", place / "old") if kind == "store" else (source, place)
    for path, content in ((given, b"cells"), (left, b"longer than the cells")):
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content)
    whole = SourceCopy(str(source), str(tmp_path / "out"), place).wait()
    assert whole.partial == place  # in the folder of the run, which whoever goes on with it knows
    whole.finish()
    found = files_of(tmp_path / "out") if kind == "store" else (tmp_path / "out").read_bytes()
    assert found == ({"part": b"cells"} if kind == "store" else b"cells")


def test_another_disk(tmp_path: Path) -> None:
    """A file cannot be moved to another disk at once, so the copy is beside the output."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second disk at /dev/shm")
    source, output = tmp_path / "cells", tmp_path / "out"
    source.write_bytes(b"cells")
    with tempfile.TemporaryDirectory(dir=memory) as elsewhere:
        (tmp_path / "run").symlink_to(elsewhere)
        SourceCopy(str(source), str(output), tmp_path / "run" / "copy.partial").wait().finish()
    assert output.read_bytes() == b"cells"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells", "out", "run"]


def full(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = tmp_path / "cells.h5ad", tmp_path / "out.h5ad"
    with pytest.raises(FileNotFoundError, match=r"cells\.h5ad"):
        SourceCopy(str(source), str(output), tmp_path / "run" / "copy.partial").wait()
    source.write_bytes(b"cells")
    monkeypatch.setattr(source_copy, "_write", full)
    copy = SourceCopy(str(source), str(output), tmp_path / "run" / "copy.partial")
    with pytest.raises(OSError, match=r"make room, and give the command again: '.*out\.h5ad'"):
        copy.wait()
    assert files_of(tmp_path).keys() == {"cells.h5ad", "run"}  # what is left of the disk is free again
    with pytest.raises(OSError, match="make room"):
        copy.check()
    copy.abandon()


# In a run -------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[TahoeX1Model, TahoeX1Tokenizer]:
    vocab = str(write_vocab(tmp_path_factory.mktemp("vocab"), drug_token=True))
    return tiny_model(tiny_config(vocab_size=NUM_GENES + 4), TahoeX1Model), TahoeX1Tokenizer(vocab, context_length=16)


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of cells that were embedded, chunk by chunk, each of which becomes a shard."""
    monkeypatch.setattr(encoding, "CHUNK_CELLS", CHUNK)
    monkeypatch.setattr(making, "_SHARD_SECONDS", 0.0)
    real, seen = CellEncoder.begin, []

    def begin(self: CellEncoder, chunk: Any, *more: Any) -> Any:
        seen.append(chunk.num_cells)
        return real(self, chunk, *more)

    monkeypatch.setattr(CellEncoder, "begin", begin)
    return seen


def test_cells_are_embedded_meanwhile(
    tmp_path: Path, parts: Any, embedded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy waits for the third chunk, and the third chunk for the copy to begin: in turn, neither would end."""
    source, output = write_cells(make_cells(100), tmp_path / "cells", "csr"), tmp_path / "out.h5ad"
    real, copying, third = source_copy._write, threading.Event(), threading.Event()

    def held(file: Any, piece: memoryview) -> None:
        copying.set()
        assert third.wait(30)
        real(file, piece)

    monkeypatch.setattr(source_copy, "_write", held)
    begin = CellEncoder.begin

    def counting(self: CellEncoder, *arguments: Any) -> Any:
        if len(embedded) == 2:
            third.set()
            assert copying.wait(30)
        return begin(self, *arguments)

    monkeypatch.setattr(CellEncoder, "begin", counting)
    embed_files(source, output, *parts, progress=False)
    assert third.is_set()
    assert copying.is_set()
    result = anndata.read_h5ad(output)
    assert np.linalg.norm(result.obsm["X_tahoe_x1"], axis=1) == pytest.approx(np.ones(100), abs=1e-5)
    assert (result.X != anndata.read_h5ad(source).X).nnz == 0


def test_a_copy_that_fails_ends_the_run_and_what_is_embedded_stays(
    tmp_path: Path, parts: Any, embedded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = write_cells(make_cells(100), tmp_path / "cells", "csr"), tmp_path / "out.h5ad"
    failed = threading.Event()
    real, begin = source_copy.SourceCopy._copy, CellEncoder.begin

    def failing(*arguments: Any) -> None:
        try:
            real(*arguments)
        finally:
            failed.set()

    def after(self: CellEncoder, *arguments: Any) -> Any:
        assert failed.wait(60)
        return begin(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(source_copy, "_write", full)
        patch.setattr(source_copy.SourceCopy, "_copy", failing)
        patch.setattr(CellEncoder, "begin", after)
        with pytest.raises(OSError, match=r"make room, and give the command again: '.*out\.h5ad'"):
            embed_files(source, output, *parts, progress=False)
    done = sum(embedded)
    assert 0 < done < 100
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name, "out.h5ad.shards"]
    kept = len(list((tmp_path / "out.h5ad.shards").glob("chunks-*")))
    assert kept >= 1
    embedded.clear()
    embed_files(source, output, *parts, progress=False)
    assert sum(embedded) == 100 - kept * CHUNK
    assert len(anndata.read_h5ad(output).obsm["X_tahoe_x1"]) == 100
