"""Cell Ranger's output as it lies in folders of real projects and of GEO."""

import gzip
import logging
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from cells import GENES, make_cells, write_10x_h5, write_10x_mtx, write_cells, write_vocab
from preparing import manifest_of, run, source

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.cells.opening import find_sources, open_cells
from tahoex1_hf.cells.readers.base import INDEX


@pytest.fixture
def tokenizer(tmp_path: Path) -> TahoeX1Tokenizer:
    return TahoeX1Tokenizer(str(write_vocab(tmp_path)), context_length=None)


def counts(source: object, tokenizer: TahoeX1Tokenizer, spool: Path | None = None) -> dict[str, dict[int, float]]:
    """Token -> count of each cell, by name."""
    cells = open_cells(source, tokenizer, spool=spool)
    cells.sort_by_cell()
    found: dict[str, dict[int, float]] = {}
    for rows in cells.rows(0, cells.num_cells, [INDEX]):
        for name, a, b in zip(rows.obs[INDEX], rows.offsets, rows.offsets[1:], strict=False):
            found[name] = dict(zip(rows.tokens[a:b].tolist(), rows.counts[a:b].tolist(), strict=True))
    assert len(found) == cells.num_cells
    return found


def prefixed(folder: Path, prefix: str, seed: int) -> None:
    write_10x_mtx(make_cells(9, seed), folder / "plain")
    for path in (folder / "plain").iterdir():
        path.rename(folder / f"{prefix}{path.name}")
    (folder / "plain").rmdir()


def test_prefixes_of_geo(tmp_path: Path, tokenizer: TahoeX1Tokenizer) -> None:
    folder = tmp_path / "geo"
    prefixed(folder, "GSM1_a_", 1)
    assert [each.path for each in find_sources([str(folder)])] == [str(folder)]
    assert counts(folder, tokenizer, tmp_path / "spool") == counts(make_cells(9, 1), tokenizer)
    prefixed(folder, "GSM2_b.", 2)
    found = find_sources([str(folder)])
    assert [Path(each.path).name for each in found] == ["GSM1_a_matrix.mtx.gz", "GSM2_b.matrix.mtx.gz"]
    for seed, each in enumerate(found, 1):
        assert counts(each, tokenizer, tmp_path / "spool") == counts(make_cells(9, seed), tokenizer)
    prepared = run(tmp_path, [source(folder, "10x")])
    assert manifest_of(prepared)["totals"]["cells_in"] == 18
    (folder / "GSM2_b.barcodes.tsv.gz").unlink()
    with pytest.raises(ValueError, match=r"it has no GSM2_b\.barcodes\.tsv .* beside GSM2_b\.matrix\.mtx"):
        open_cells(folder / "GSM2_b.matrix.mtx.gz", tokenizer)


def test_lines_of_names_and_matrices_of_cells_by_genes(tmp_path: Path, tokenizer: TahoeX1Tokenizer) -> None:
    expected = counts(make_cells(9), tokenizer)
    write_10x_mtx(make_cells(9), tmp_path / "heads")
    for name, head in (("barcodes", "barcode"), ("features", "gene_id\tname\tfeature_type")):
        path = tmp_path / "heads" / f"{name}.tsv.gz"
        path.write_bytes(gzip.compress(f"{head}\n".encode() + gzip.decompress(path.read_bytes())))
    assert counts(tmp_path / "heads", tokenizer, tmp_path / "spool") == expected
    write_10x_mtx(make_cells(9), tmp_path / "turned")
    path = tmp_path / "turned" / "matrix.mtx.gz"
    first, comment, *lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    turned = [" ".join((b, a, c)) for a, b, c in map(str.split, lines)]
    path.write_bytes(gzip.compress("\n".join([first, comment, *turned, ""]).encode()))
    assert counts(tmp_path / "turned", tokenizer, tmp_path / "spool") == expected


@pytest.mark.parametrize("name", ["barcodes", "features"])
def test_names_with_a_zero_byte(tmp_path: Path, tokenizer: TahoeX1Tokenizer, name: str) -> None:
    write_10x_mtx(make_cells(9), tmp_path / "cells")
    path = tmp_path / "cells" / f"{name}.tsv.gz"
    first, *rest = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    path.write_bytes(gzip.compress(b"".join([first, b"a\0b\tc\tGene Expression\n", *rest[1:]])))
    with pytest.raises(ValueError, match=rf"cells.*: line 2 of {name}\.tsv\.gz holds a zero byte"):
        open_cells(tmp_path / "cells", tokenizer)


def test_all_droplets_are_left_out_beside_cells(
    tmp_path: Path, tokenizer: TahoeX1Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    outs = tmp_path / "outs"
    write_10x_mtx(make_cells(9), outs / "filtered_feature_bc_matrix")
    write_10x_mtx(make_cells(90), outs / "raw_feature_bc_matrix")
    with caplog.at_level(logging.INFO, "tahoex1_hf"):
        (found,) = find_sources([str(outs)])
    assert found.path == str(outs / "filtered_feature_bc_matrix")
    assert "raw_feature_bc_matrix is left out: filtered_feature_bc_matrix lies beside it" in caplog.text
    for name, number in (("filtered", 9), ("raw", 90)):
        write_10x_h5(make_cells(number), outs / f"S1_{name}_feature_bc_matrix.h5")
        write_10x_h5(make_cells(number), outs / f"{name}_feature_bc_matrix.h5")
    (outs / "molecule_info.h5").write_bytes(b"")
    names = ["S1_filtered_feature_bc_matrix.h5", "filtered_feature_bc_matrix.h5"]
    assert [Path(each.path).name for each in find_sources([str(outs)])] == names
    assert len(find_sources([str(outs / "raw_feature_bc_matrix")])) == 1  # named, it is read
    (tmp_path / "own").mkdir()
    for name in ("raw_qc", "filtered_qc"):  # names of a user's own
        write_cells(make_cells(5), tmp_path / "own" / name, "csr")
    assert len(find_sources([str(tmp_path / "own")])) == 2
    shutil.rmtree(outs / "filtered_feature_bc_matrix")
    for path in outs.glob("*filtered*"):
        path.unlink()
    assert len(find_sources([str(outs)])) == 2  # without cells beside them, droplets are read


def test_references_of_two_species(
    tmp_path: Path, tokenizer: TahoeX1Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    adata = make_cells(9)
    both = make_cells(
        9, genes=[f"GRCh38_{gene}" for gene in GENES] + [f"mm10___{g.replace('G', 'MUSG')}" for g in GENES]
    )
    both.X[:, :60] = adata.X
    expected = counts(adata, tokenizer)
    with caplog.at_level(logging.WARNING, "tahoex1_hf"):
        found = counts(write_10x_h5(both, tmp_path / "both.h5"), tokenizer)
    assert [*found.values()] == [*expected.values()]
    assert "60 of 120 genes (50.0%) are not in the vocabulary and are left out" in caplog.text


@pytest.mark.parametrize("kind", ["10x_h5", "10x_mtx"])
def test_losses_are_said_once_the_cells_are_sorted(
    tmp_path: Path, tokenizer: TahoeX1Tokenizer, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_cells(
        make_cells(9, genes=[*GENES[:30], *(f"ENSG09{i:09d}" for i in range(30))]), tmp_path / "c", kind
    )
    with caplog.at_level(logging.INFO, "tahoex1_hf"):
        cells = open_cells(path, tokenizer, spool=tmp_path / "spool")
        cells.sort_by_cell()
        list(cells.rows(0, 9))
    (record,) = caplog.records
    assert record.message.startswith(f"{path}: 30 of 60 genes (50.0%) are not in the vocabulary")
    assert cells.seen is not None
    assert 0.3 < cells.seen.lost < 0.7


def test_files_of_other_forms_are_refused_with_the_way_out(tmp_path: Path, tokenizer: TahoeX1Tokenizer) -> None:
    ways = {
        "a.loom": "read_loom",
        "a.h5mu": "mudata",
        "a.rds": "R's",
        "a.csv.gz": "read_csv",
        "a.h5ad.gz": "unpack it",
    }
    for name, way in ways.items():
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(FileNotFoundError, match=rf"{name} is none of .*{way}"):
            find_sources([str(tmp_path / name)])
    make_cells(9).write_h5ad(tmp_path / "a.h5ad")
    shutil.copy(tmp_path / "a.h5ad", tmp_path / "a.h5")
    with pytest.raises(ValueError, match=r"a\.h5: it is an AnnData by another name"):
        open_cells(tmp_path / "a.h5", tokenizer)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["x"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"b\.h5: it has 0 matrices"):
        open_cells(tmp_path / "b.h5", tokenizer)
