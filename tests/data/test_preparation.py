"""`tahoex1 prepare` writes every cell once, with its counts, whatever the source, the processes or interruptions."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from cells import expressed, expressed_in, file_bytes, make_cells, read_dataset, write_10x_h5, write_cells, write_vocab
from forked import Forked
from preparing import METADATA, manifest_of, run, source
from scipy.sparse import csr_matrix

from tahoex1_hf.data import preparation as prepare_module
from tahoex1_hf.data.config import parse_config
from tahoex1_hf.data.preparation import prepare


def assert_holds(folder: Path, adata: anndata.AnnData, tmp_path: Path) -> pd.DataFrame:
    """Assert that every cell is there once, with its counts in column order; return the rows."""
    rows = read_dataset(folder)
    assert sorted(rows["name"]) == sorted(adata.obs_names)
    for _, row in rows.iterrows():
        cell = adata.obs_names.get_loc(row["name"])
        found = expressed(row["genes"], row["counts"], tmp_path / "vocab.json")
        assert found == expressed_in(adata, cell)
        assert list(found) == list(expressed_in(adata, cell))
    return rows


@pytest.mark.parametrize("kind", ["csr", "csc", "dense", "zarr", "zarr_csc", "10x_h5", "10x_mtx"])
def test_every_kind_of_file_gives_the_same_cells(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Chunks and pieces much smaller than the file, and not divisors of it.
    for module in ("cells.readers.base", "cells.readers.csr", "cells.readers.stores", "cells.readers.ten_x"):
        monkeypatch.setattr(f"tahoex1_hf.{module}.CHUNK_ELEMENTS", 150, raising=True)
    adata = make_cells(67)
    path = write_cells(adata, tmp_path / "cells", kind)
    folder = run(tmp_path, [source(path, "10x" if "10x" in kind else "anndata")], piece_cells=10)
    assert_holds(folder, adata, tmp_path)
    assert not (folder / ".prepare").exists()


def test_the_order_is_shuffled_over_files_and_depends_on_the_seed(tmp_path: Path) -> None:
    for seed in range(3):
        make_cells(40, seed).write_h5ad(tmp_path / f"file{seed}.h5ad")
    orders = []
    for seed in (0, 0, 1):
        folder = run(tmp_path, [source(tmp_path / "*.h5ad")], f"out{len(orders)}", seed=seed, piece_cells=16)
        orders.append(read_dataset(folder, "train")["name"].tolist())
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) != orders[0]
    files = [name.split("-")[0] for name in orders[0]]
    assert sum(a != b for a, b in pairwise(files)) > len(files) / 3  # files are mixed


def test_several_shards_hold_each_cell_once(tmp_path: Path) -> None:
    adata = make_cells(300)
    adata.write_h5ad(tmp_path / "a.h5ad")
    folder = run(tmp_path, [source(tmp_path / "a.h5ad")], shard_size_mb=0.005, piece_cells=64)
    assert len(manifest_of(folder)["splits"]["train"]["shards"]) > 3
    one = run(tmp_path, [source(tmp_path / "a.h5ad")], "one", piece_cells=300)
    assert_holds(folder, adata, tmp_path)
    # The order of the cells is that of their keys, so shards and pieces change nothing.
    assert read_dataset(folder)["name"].tolist() == read_dataset(one)["name"].tolist()


def test_load_dataset_reads_it_without_this_package(tmp_path: Path) -> None:
    adata = make_cells(50)
    adata.write_h5ad(tmp_path / "a.h5ad")
    folders = [
        str(run(tmp_path, [source(tmp_path / "a.h5ad")], form, validation={"fraction": 0.3}, format=form))
        for form in ("arrow", "parquet")
    ]
    code = f"""
import datasets, json, sys
for folder in {folders!r}:
    cells = datasets.load_dataset(folder, cache_dir={str(tmp_path / "cache")!r})
    print(json.dumps([
        sorted(cells), cells["train"].column_names, str(cells["train"].features["genes"]),
        str(cells["train"].features["counts"]), cells["train"][3], cells["validation"].num_rows,
        cells["train"].num_rows, "tahoex1_hf" in sys.modules]))
"""
    run_python = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = run_python.stdout.splitlines()
    assert len(lines) == len(folders)
    for line in lines:
        splits, columns, genes, counts, row, held_out, trained, imported = json.loads(line)
        assert splits == ["train", "validation"]
        assert columns == ["genes", "counts", *METADATA]
        assert "uint16" in genes
        assert "uint16" in counts
        assert held_out + trained == 50
        assert held_out > 0
        assert not imported
        cell = adata.obs_names.get_loc(row["name"])
        assert expressed(row["genes"], row["counts"], tmp_path / "vocab.json") == expressed_in(adata, cell)
        assert row["cell_type"] == adata.obs["cell_type"].iloc[cell]


def test_parquet_and_arrow_hold_the_same(tmp_path: Path) -> None:
    make_cells(80).write_h5ad(tmp_path / "a.h5ad")
    rows = [
        read_dataset(run(tmp_path, [source(tmp_path / "a.h5ad")], form, format=form, shard_size_mb=0.004))
        for form in ("arrow", "parquet")
    ]
    pd.testing.assert_frame_equal(rows[0].astype(str), rows[1].astype(str))


def test_the_number_of_processes_changes_no_byte(tmp_path: Path) -> None:
    for seed in range(3):
        write_cells(make_cells(40, seed), tmp_path / f"file{seed}", ["csr", "csc", "dense"][seed])
    settings: dict[str, Any] = {"piece_cells": 16, "shard_size_mb": 0.004, "validation": {"fraction": 0.2}}
    folders = [run(tmp_path, [source(tmp_path / "*.h5ad")], f"out{n}", num_proc=n, **settings) for n in (1, 2, 4)]
    first = file_bytes(folders[0])
    assert len(first) > 6
    assert first == file_bytes(folders[1]) == file_bytes(folders[2])


# Interruptions ------------------------------------------------------------------------------------


def test_a_killed_run_resumes_without_redoing_or_doubling(tmp_path: Path) -> None:
    make_cells(400).write_h5ad(tmp_path / "a.h5ad")
    write_vocab(tmp_path)
    settings = {"piece_cells": 10, "shard_size_mb": 0.01}
    whole = run(tmp_path, [source(tmp_path / "a.h5ad")], "whole", **settings)
    config = {"sources": [source(tmp_path / "a.h5ad")], "vocab": str(tmp_path / "vocab.json"), **settings}
    config["output"] = str(tmp_path / "cut")
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    # The run pauses after some pieces, so that it is killed among them however busy the machine is.
    code = (
        "import time, tahoex1_hf.data.preparation as p\n"
        "real, calls = p.make_batches, []\n"
        "p.make_batches = lambda *a: (calls.append(1), len(calls) > 8 and time.sleep(3600), real(*a))[2]\n"
        "from tahoex1_hf.data.config import read_config\n"
        f"p.prepare(read_config({str(tmp_path / 'config.yaml')!r}))\n"
    )
    process = Forked([sys.executable, "-c", code])
    pieces = tmp_path / "cut" / ".prepare" / "pieces"
    while len(list(pieces.glob("*.arrow"))) < 5 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in pieces.glob("*.arrow")}
    assert 5 <= len(done) <= 8
    kept = []
    real = prepare_module.make_batches

    def watched(piece: Any, *rest: Any) -> Any:
        kept.append(pieces / f"{piece.name}.arrow")
        return real(piece, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "make_batches", watched)
        run(tmp_path, [source(tmp_path / "a.h5ad")], "cut", **settings)
    assert not set(kept) & set(done)
    assert len(kept) + len(done) == 40
    assert file_bytes(whole) == file_bytes(tmp_path / "cut")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_workers_end_with_a_run_that_was_killed(tmp_path: Path) -> None:
    make_cells(3000).write_h5ad(tmp_path / "a.h5ad")
    config = {"sources": [source(tmp_path / "a.h5ad")], "vocab": str(write_vocab(tmp_path)), "piece_cells": 2}
    config["output"] = str(tmp_path / "cut")
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    command = ["-m", "tahoex1_hf", "prepare", "--config", str(tmp_path / "config.yaml"), "--num-proc", "2"]
    process = subprocess.Popen([sys.executable, *command], start_new_session=True, stderr=subprocess.DEVNULL)

    def others() -> list[str]:
        """Return the processes of the run's session: its workers and their server."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue  # the process has ended meanwhile
            if int(session) == process.pid and state != "Z" and path.parent.name != str(process.pid):
                found.append(path.parent.name)
        return found

    deadline = time.monotonic() + 600
    while not list((tmp_path / "cut").glob(".prepare/pieces/*.arrow")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(others()) >= 3
    process.kill()
    process.wait()
    while others() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not others()


def test_finished_shards_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cells(200).write_h5ad(tmp_path / "a.h5ad")
    settings = {"shard_size_mb": 0.004}
    whole = run(tmp_path, [source(tmp_path / "a.h5ad")], "whole", **settings)
    real, written = prepare_module.write_shard, []

    def stopping(folder: Any, name: str, *rest: Any) -> Any:
        written.append(name)
        if len(written) == 3:
            raise KeyboardInterrupt
        return real(folder, name, *rest)

    monkeypatch.setattr(prepare_module, "write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [source(tmp_path / "a.h5ad")], "cut", **settings)
    run(tmp_path, [source(tmp_path / "a.h5ad")], "cut", **settings)
    assert file_bytes(whole) == file_bytes(tmp_path / "cut")
    assert written.count(written[0]) == written.count(written[1]) == 1
    assert written.count(written[2]) == 2


def test_a_complete_dataset_is_left_as_it_is(tmp_path: Path) -> None:
    make_cells(20).write_h5ad(tmp_path / "a.h5ad")
    folder = run(tmp_path, [source(tmp_path / "a.h5ad")])
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run(tmp_path, [source(tmp_path / "a.h5ad")])
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_other_settings_need_another_folder_or_overwrite(tmp_path: Path) -> None:
    make_cells(20).write_h5ad(tmp_path / "a.h5ad")
    folder = run(tmp_path, [source(tmp_path / "a.h5ad")])
    before = file_bytes(folder)
    with pytest.raises(ValueError, match=r"other settings \(seed\).*--overwrite"):
        run(tmp_path, [source(tmp_path / "a.h5ad")], seed=5)
    assert file_bytes(folder) == before
    config = {"sources": [source(tmp_path / "a.h5ad")], "output": str(folder), "vocab": str(tmp_path / "vocab.json")}
    prepare(parse_config({**config, "seed": 5}, "the test"), overwrite=True)
    assert manifest_of(folder)["configuration"]["seed"] == 5


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    make_cells(20).write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not empty.*thesis"):
        run(tmp_path, [source(tmp_path / "a.h5ad")])
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_input_that_changed_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cells(20).write_h5ad(tmp_path / "a.h5ad")
    monkeypatch.setattr(prepare_module, "write_shard", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [source(tmp_path / "a.h5ad")])
    monkeypatch.undo()
    make_cells(20, seed=1).write_h5ad(tmp_path / "a.h5ad")
    os.utime(tmp_path / "a.h5ad", ns=(1, 1))
    with pytest.raises(ValueError, match=r"input has changed.*a\.h5ad"):
        run(tmp_path, [source(tmp_path / "a.h5ad")])


# Metadata, filters, splits ------------------------------------------------------------------------


def test_cells_are_dropped_by_named_rules_that_add_up(tmp_path: Path) -> None:
    adata = make_cells(100)
    dense = adata.X.toarray()
    dense[:4] = 0
    dense[4:9, 1:] = 0
    dense[4:9, 0] = 3
    adata.X = csr_matrix(dense)
    adata.obs_names = [*adata.obs_names[:98], adata.obs_names[50], adata.obs_names[51]]
    adata.write_h5ad(tmp_path / "a.h5ad")
    settings = {"filter": 'passed == True and cell_type in ["B", "T"]', "min_genes": 10, "min_counts": 400}
    folder = run(tmp_path, [source(tmp_path / "a.h5ad", duplicate_barcodes="drop", **settings)])
    totals = manifest_of(folder)["totals"]
    assert totals["cells_in"] == 100
    assert totals["cells_out"] + sum(totals["dropped"].values()) == 100
    selected = (adata.obs["passed"] & adata.obs["cell_type"].isin(["B", "T"])).to_numpy()
    repeated = adata.obs_names.duplicated()
    lengths, sums = (dense > 0).sum(1), dense.sum(1)
    assert totals["dropped"] == {
        "filter": (~selected).sum(),
        "duplicate_barcode": (selected & repeated).sum(),
        "no_known_gene": (selected & ~repeated & (lengths == 0)).sum(),
        "min_genes": (selected & ~repeated & (lengths > 0) & (lengths < 10)).sum(),
        "min_counts": (selected & ~repeated & (lengths >= 10) & (sums < 400)).sum(),
    }
    assert min(totals["dropped"].values()) > 0 or selected[98:].sum() == 0
    kept = selected & ~repeated & (lengths >= 10) & (sums >= 400)
    assert sorted(read_dataset(folder)["name"]) == sorted(adata.obs_names[kept])


def test_metadata_is_renamed_joined_and_keeps_its_types(tmp_path: Path) -> None:
    adata = make_cells(60)
    adata.obs["plate"] = pd.array([None if i % 7 == 0 else i % 3 for i in range(60)], dtype="Int64")
    adata.write_h5ad(tmp_path / "a.h5ad")
    table = pd.DataFrame({"sample": ["s1", "s2", "s3"], "drug": ["aspirin", "DMSO", "aspirin"], "dose": [1.5, 0, 2]})
    table.to_csv(tmp_path / "samples.csv", index=False)
    folder = run(
        tmp_path,
        [
            source(
                tmp_path / "a.h5ad",
                metadata={"name": "_index", "type": "cell_type", "drug": "drug", "dose": "dose", "n": "n_genes",
                          "ok": "passed", "plate": "plate"},
                constants={"study": "test"},
                join=[{"file": str(tmp_path / "samples.csv"), "key": "sample", "columns": ["drug", "dose"]}],
            )
        ],
    )  # fmt: skip
    columns = manifest_of(folder)["columns"]
    assert columns == {
        "genes": "list<uint16>", "counts": "list<uint16>", "name": "dictionary<string>", "type": "dictionary<string>",
        "drug": "dictionary<string>", "dose": "double", "n": "int64", "ok": "bool", "plate": "int64",
        "study": "dictionary<string>",
    }  # fmt: skip
    rows = read_dataset(folder).set_index("name").loc[adata.obs_names]
    joined = adata.obs["sample"].map(table.set_index("sample")["drug"])
    assert rows["drug"].isna().equals(joined.isna())
    assert rows["drug"].dropna().astype(str).tolist() == joined.dropna().tolist()
    assert rows["type"].astype(str).tolist() == adata.obs["cell_type"].astype(str).tolist()
    assert rows["ok"].tolist() == adata.obs["passed"].tolist()
    np.testing.assert_array_equal(rows["plate"].astype(float), adata.obs["plate"].astype("float"))
    assert set(rows["study"]) == {"test"}
    misses = manifest_of(folder)["sources"][0]["files"][0]["cells_without_joined_row"]
    assert misses == (adata.obs["sample"] == "s4").sum() > 0


def test_a_column_that_only_one_source_has_is_missing_in_the_others(tmp_path: Path) -> None:
    make_cells(30, 1).write_h5ad(tmp_path / "a.h5ad")
    make_cells(30, 2).write_h5ad(tmp_path / "b.h5ad")
    folder = run(
        tmp_path,
        [
            source(tmp_path / "a.h5ad", metadata={"name": "_index", "n": "n_genes", "mixed": "n_genes"}),
            source(tmp_path / "b.h5ad", metadata={"name": "_index", "mixed": "cell_type"}),
        ],
        piece_cells=7,
    )
    rows = read_dataset(folder)
    from_b = rows["name"].str.startswith("cell2")
    assert rows["n"].isna().equals(from_b)
    assert set(rows.loc[from_b, "mixed"]) <= {"B", "NK", "T"}
    assert rows.loc[~from_b, "mixed"].str.isdigit().all()


def test_a_column_is_held_out_whole(tmp_path: Path) -> None:
    make_cells(200).write_h5ad(tmp_path / "a.h5ad")
    folder = run(tmp_path, [source(tmp_path / "a.h5ad")], validation={"by": "sample", "values": ["s2"]})
    assert set(read_dataset(folder, "validation")["sample"]) == {"s2"}
    assert set(read_dataset(folder, "train")["sample"]) == {"s1", "s3", "s4"}
    drawn = run(tmp_path, [source(tmp_path / "a.h5ad")], "drawn", validation={"by": "sample", "fraction": 0.5})
    splits = [set(read_dataset(drawn, split).get("sample", [])) for split in ("train", "validation")]
    assert not splits[0] & splits[1]
    assert splits[0] | splits[1] == {"s1", "s2", "s3", "s4"}


def test_the_split_has_the_requested_share_and_is_spread_over_the_order(tmp_path: Path) -> None:
    make_cells(3000).write_h5ad(tmp_path / "a.h5ad")
    folder = run(tmp_path, [source(tmp_path / "a.h5ad")], validation={"fraction": 0.2})
    held_out = manifest_of(folder)["splits"]["validation"]["cells"]
    assert abs(held_out - 600) < 5 * np.sqrt(3000 * 0.2 * 0.8)
    numbers = read_dataset(folder, "validation")["name"].str.split("-").str[1].astype(int)
    assert abs(numbers[: held_out // 2].mean() - 1500) < 5 * 866 / np.sqrt(held_out / 2)
    none = run(tmp_path, [source(tmp_path / "a.h5ad")], "none", validation={"fraction": 0})
    assert manifest_of(none)["splits"]["validation"] == {"cells": 0, "shards": []}


# Counts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("largest", "wanted"), [(65535, "list<uint16>"), (65536, "list<float>")])
def test_counts_are_uint16_exactly_where_they_fit(tmp_path: Path, largest: int, wanted: str) -> None:
    first, second = make_cells(20, 0), make_cells(20, 1)
    dense = second.X.toarray()
    dense[3, 3] = largest
    second.X = csr_matrix(dense)
    first.write_h5ad(tmp_path / "a.h5ad")
    second.write_h5ad(tmp_path / "b.h5ad")
    folder = run(tmp_path, [source(tmp_path / "*.h5ad")])
    assert manifest_of(folder)["columns"]["counts"] == wanted
    assert max(row.max() for row in read_dataset(folder)["counts"]) == largest


def test_kept_fractions_are_float32(tmp_path: Path) -> None:
    adata = make_cells(20)
    adata.X = adata.X * np.float32(0.3)
    adata.write_h5ad(tmp_path / "a.h5ad")
    folder = run(tmp_path, [source(tmp_path / "a.h5ad", non_integer_counts="keep")])
    assert manifest_of(folder)["columns"]["counts"] == "list<float>"
    assert manifest_of(folder)["sources"][0]["files"][0]["whole_numbers"] is False
    assert_holds(folder, adata, tmp_path)


def test_unknown_and_repeated_genes_are_accounted_for(tmp_path: Path) -> None:
    adata = make_cells(30)
    dense = adata.X.toarray()
    adata.var_names = ["ENSG99999999999", *adata.var_names[1:-1], adata.var_names[1]]
    adata.write_h5ad(tmp_path / "a.h5ad")
    folder = run(tmp_path, [source(tmp_path / "a.h5ad")])
    entry = manifest_of(folder)["sources"][0]["files"][0]
    assert (entry["genes"], entry["genes_known"], entry["unknown_genes"]) == (60, 59, ["ENSG99999999999"])
    assert entry["counts_of_unknown_genes"] == dense[:, 0].sum() > 0
    assert entry["counts_kept"] == dense[:, 1:].sum()
    rows = read_dataset(folder).set_index("name").loc[adata.obs_names]
    both = [expressed(g, c, tmp_path / "vocab.json").get(adata.var_names[1], 0) for g, c in zip(rows["genes"], rows["counts"], strict=True)]  # fmt: skip  # noqa: E501
    np.testing.assert_array_equal(both, dense[:, 1] + dense[:, -1])


def test_layers_raw_columns_and_symbols(tmp_path: Path) -> None:
    adata = make_cells(30)
    counts = adata.copy()
    adata.layers["counts"] = adata.X.copy()
    adata.raw = counts
    adata.X = np.log1p(adata.X)
    adata.var["ensembl"] = adata.var_names
    adata.var_names = [f"SYMBOL{i}" for i in range(adata.n_vars)]
    adata.write_h5ad(tmp_path / "a.h5ad")
    table = tmp_path / "symbols.csv"
    table.write_text("".join(f"{s},{e}\n" for s, e in zip(adata.var_names, adata.var["ensembl"], strict=True)))
    for number, settings in enumerate(
        (
            {"layer": "counts", "gene_id_column": "ensembl"},
            {"layer": "raw"},
            {"layer": "counts", "gene_symbols": str(table)},
        )
    ):
        folder = run(tmp_path, [source(tmp_path / "a.h5ad", **settings)], f"out{number}")
        assert_holds(folder, counts, tmp_path)


def test_cells_of_a_mouse(tmp_path: Path) -> None:
    adata = make_cells(30)
    mouse = adata.copy()
    mouse.var_names = [gene.replace("ENSG", "ENSMUSG") for gene in adata.var_names]
    mouse.write_h5ad(tmp_path / "a.h5ad")
    table = tmp_path / "orthologs.csv"
    table.write_text("".join(f"{m},{h}\n" for m, h in list(zip(mouse.var_names, adata.var_names, strict=True))[:20]))
    folder = run(tmp_path, [source(tmp_path / "a.h5ad", species="mouse", orthologs=str(table))])
    assert_holds(folder, adata[:, :20], tmp_path)  # a third of the genes is enough here


def test_settings_that_an_older_version_did_not_know_are_no_change(tmp_path: Path) -> None:
    make_cells(30).write_h5ad(tmp_path / "a.h5ad")
    folder = run(tmp_path, [source(tmp_path / "a.h5ad")])
    assert not {"species", "orthologs"} & set(manifest_of(folder)["configuration"]["sources"][0])
    assert run(tmp_path, [source(tmp_path / "a.h5ad", species="human")]) == folder  # it is complete


def test_counts_that_are_not_in_x_must_be_named(tmp_path: Path) -> None:
    adata = make_cells(30)
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.log1p(adata.X)
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(
        ValueError, match=r"a\.h5ad: X holds no counts.*layer=\"counts\" holds some.*--layer.*'counts'"
    ):
        run(tmp_path, [source(tmp_path / "a.h5ad")], "asked")
    run(tmp_path, [source(tmp_path / "a.h5ad", non_integer_counts="keep")], "kept")


def test_cell_ranger_2_files_and_antibodies(tmp_path: Path) -> None:
    import h5py

    adata = make_cells(25)
    path = write_10x_h5(adata, tmp_path / "new.h5")
    with h5py.File(path, "r+") as file:  # the last three features are antibodies
        kinds = file["matrix/features/feature_type"][:].astype("S20")
        kinds[-3:] = b"Antibody Capture"
        del file["matrix/features/feature_type"]
        file["matrix/features/feature_type"] = kinds
    folder = run(tmp_path, [source(path, "10x")])
    assert_holds(folder, adata[:, :-3], tmp_path)
    old = tmp_path / "old.h5"
    with h5py.File(path) as new, h5py.File(old, "w") as file:
        for name in ("data", "indices", "indptr", "shape", "barcodes"):
            file[f"GRCh38/{name}"] = new[f"matrix/{name}"][:]
        file["GRCh38/genes"] = file["GRCh38/gene_names"] = new["matrix/features/id"][:]
    assert_holds(run(tmp_path, [source(old, "10x")], "old"), adata, tmp_path)
