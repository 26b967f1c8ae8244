"""The original's MDS shards, written by the real library (tests/mds/make_shards.py), give their cells or a reason."""

import hashlib
import json
import logging
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.cells.readers.base import INDEX, BadInput
from tahoex1_hf.data.config import MDSSource
from tahoex1_hf.data.sources import mds
from tahoex1_hf.data.sources.mds import MDSFiles
from tahoex1_hf.data.sources.mds_format import decompress, parse_index
from tahoex1_hf.encoding_tahoe_x1 import GeneRows

SHARDS = Path(__file__).parents[2] / "mds"
CELLS: list[dict[str, Any]] = json.loads((SHARDS / "cells.json").read_text())
SOURCE_IDS: dict[str, int] = json.loads((SHARDS / "vocab.json").read_text())
SOURCE_NAMES = {i: name for name, i in SOURCE_IDS.items()}
UNKNOWN = ["ENSG00000001002", "ENSG00000001017"]  # ids 5 and 20 of the shards, left out of our vocabulary


@pytest.fixture
def tokenizer(tmp_path: Path) -> TahoeX1Tokenizer:
    """Return a tokenizer whose genes have other ids than in the shards, and which lacks two of them."""
    genes = [name for name in reversed(SOURCE_IDS) if name.startswith("ENSG") and name not in UNKNOWN]
    names = ["ENSG00000009999", *genes, "<cls>", "<pad>"]
    path = tmp_path / "ours" / "vocab.json"
    path.parent.mkdir()
    path.write_text(json.dumps({name: i for i, name in enumerate(names)}))
    return TahoeX1Tokenizer(str(path))


@pytest.fixture
def source(tokenizer: TahoeX1Tokenizer, tmp_path: Path) -> Callable[..., MDSFiles]:
    def make(*paths: Path | str, vocab: Path | str = SHARDS / "vocab.json", **settings: Any) -> MDSFiles:
        config = MDSSource(kind="mds", paths=[str(p) for p in paths], source_vocab=str(vocab), **settings)
        return MDSFiles(config, tokenizer, tmp_path / "spool")

    return make


def copied(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHARDS / name, tmp_path / name))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def expected_cell(cell: dict[str, Any]) -> dict[str, float]:
    """Return gene -> count without <cls>, zeros and genes that our vocabulary lacks; repeated genes are added up."""
    sums: dict[str, float] = {}
    for i, count in zip(cell["genes"][1:], cell["expressions"][1:], strict=True):
        if count and SOURCE_NAMES[i] not in UNKNOWN:
            sums[SOURCE_NAMES[i]] = sums.get(SOURCE_NAMES[i], 0) + count
    return sums


def unknown_sum(cells: list[dict[str, Any]]) -> float:
    pairs = (pair for cell in cells for pair in zip(cell["genes"], cell["expressions"], strict=True))
    return sum(count for i, count in pairs if SOURCE_NAMES[i] in UNKNOWN)


def read_whole(files: MDSFiles, path: str, columns: tuple[str, ...] = ()) -> list[GeneRows]:
    return list(files.read(path, 0, files.inspect(path).num_cells, columns))


def cells_of(chunks: list[GeneRows], tokenizer: TahoeX1Tokenizer) -> list[list[tuple[str, float]]]:
    cells = []
    for chunk in chunks:
        names = tokenizer.convert_ids_to_tokens(chunk.tokens.tolist())
        pairs = list(zip(names, chunk.counts.tolist(), strict=True))
        bounds = chunk.offsets.tolist()
        cells += [pairs[a:b] for a, b in pairwise(bounds)]
    return cells


@pytest.mark.parametrize("name", ["upstream", "plain", "arrays"])
def test_every_shard_gives_the_cells_that_were_written(
    name: str, source: Callable[..., MDSFiles], tokenizer: TahoeX1Tokenizer, tmp_path: Path
) -> None:
    files = source(SHARDS / name)
    paths = files.list_files()
    assert len(paths) > 1
    chunks = [chunk for path in paths for chunk in read_whole(files, path)]
    cells = cells_of(chunks, tokenizer)
    assert cells == [list(expected_cell(cell).items()) for cell in CELLS]  # in storage order
    assert cells[1] == []
    assert dict(cells[2]) == {SOURCE_NAMES[9]: 4.0}
    assert sum(chunk.unknown_counts for chunk in chunks) == unknown_sum(CELLS) > 0
    for chunk in chunks:
        assert chunk.counts.dtype == np.float32
        assert chunk.tokens.dtype == np.uint16  # as in a prepared dataset
    assert list((tmp_path / "spool").iterdir()) == []


def test_shards_of_a_merged_index_are_listed_once(source: Callable[..., MDSFiles], tmp_path: Path) -> None:
    folder = SHARDS / "upstream"
    expected = [f"{folder}/chunk_{chunk}/shard.0000{shard}.mds" for chunk in (0, 1) for shard in (0, 1)]
    assert source(folder).list_files() == expected
    assert source(folder, folder / "chunk_1", folder / "index.json").list_files() == expected
    parts = copied("upstream", tmp_path)
    (parts / "index.json").unlink()  # leaves a folder above those that have an index
    assert source(parts).list_files() == [path.replace(str(folder), str(parts)) for path in expected]


def test_links_that_lead_round_in_a_circle_end(source: Callable[..., MDSFiles], tmp_path: Path) -> None:
    shutil.copytree(SHARDS / "upstream", tmp_path / "data" / "elsewhere")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "data" / "elsewhere")  # the same shards under two names
    for name in ("up", "again"):
        (tmp_path / "data" / name).symlink_to(tmp_path)
        (tmp_path / "data" / "elsewhere" / name).symlink_to(tmp_path / "data")
    found = source(tmp_path / "data").list_files()
    assert len(found) == len(source(SHARDS / "upstream").list_files())


def test_a_shard_is_found_without_listing_first(source: Callable[..., MDSFiles], tmp_path: Path) -> None:
    """A worker process gets only the path; the shard is found even where only the merged index is left."""
    path = str(SHARDS / "upstream" / "chunk_1" / "shard.00001.mds")
    count = source(SHARDS / "upstream").inspect(path).num_cells
    assert count == 10
    folder = copied("upstream", tmp_path)
    for index in folder.glob("chunk_*/index.json"):
        index.unlink()
    assert source(folder).inspect(f"{folder}/chunk_1/shard.00001.mds").num_cells == count
    with pytest.raises(BadInput, match=r"index\.json .* lists it"):
        source(folder).inspect(f"{folder}/chunk_1/shard.00009.mds")


def test_report(source: Callable[..., MDSFiles], tmp_path: Path) -> None:
    files = source(SHARDS / "upstream")
    first, second = (files.inspect(path) for path in files.list_files()[:2])
    assert (first.num_cells, second.num_cells) == (11, 10)
    assert (first.num_genes, first.num_genes_known) == (60, 58)
    assert sorted(first.unknown_genes) == UNKNOWN
    assert first.fingerprint != second.fingerprint
    assert first.fingerprint == source(SHARDS / "upstream" / "chunk_0").inspect(files.list_files()[0]).fingerprint
    assert not first.by_gene
    # Without hashes in the index, the file itself shows whether it has changed.
    shard = copied("plain", tmp_path) / "shard.00000.mds"
    before = source(shard.parent).inspect(str(shard)).fingerprint
    os.utime(shard, (1, 1))
    assert source(shard.parent).inspect(str(shard)).fingerprint != before


@pytest.mark.parametrize("name", ["upstream", "plain", "arrays"])
def test_ranges_and_small_chunks_equal_one_read(
    name: str, source: Callable[..., MDSFiles], tokenizer: TahoeX1Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = source(SHARDS / name)
    path = files.list_files()[0]
    count = files.inspect(path).num_cells
    whole = read_whole(files, path, ("id",))
    assert len(whole) == 1
    monkeypatch.setattr(mds, "CHUNK_ELEMENTS", 25)
    bounds = [0, 1, 1, 5, count]
    pieces = [c for a, b in pairwise(bounds) for c in files.read(path, a, b, ["id"])]
    assert len(pieces) > 4
    assert cells_of(pieces, tokenizer) == cells_of(whole, tokenizer)
    assert [v for c in pieces for v in c.obs["id"]] == whole[0].obs["id"].tolist()
    assert sum(c.unknown_counts for c in pieces) == whole[0].unknown_counts
    assert list(files.read(path, 3, 3, ["id"])) == []
    with pytest.raises(ValueError, match=f"which has {count}"):
        list(files.read(path, 0, count + 1, []))


def test_metadata_of_the_original(source: Callable[..., MDSFiles]) -> None:
    files = source(SHARDS / "upstream")
    chunks = [c for path in files.list_files() for c in read_whole(files, path, ("drug", "sample", "id", INDEX))]
    for name, expected in {name: [cell[name] for cell in CELLS] for name in ("drug", "sample", "id")}.items():
        assert [value for chunk in chunks for value in chunk.obs[name]] == expected
    assert [value for chunk in chunks for value in chunk.obs[INDEX]] == [str(cell["id"]) for cell in CELLS]


def test_metadata_of_every_encoding(source: Callable[..., MDSFiles]) -> None:
    files = source(SHARDS / "plain")
    names = ("id", "plate", "depth", "dose", "half", "digits", "ratio", "price", "note", "code", "score")
    (chunk, *_) = read_whole(files, files.list_files()[0], names)
    row = dict(zip(names, chunk.obs.iloc[3], strict=True))
    assert row == {
        "id": "cell-3",
        "plate": -3,
        "depth": 60_003,
        "dose": 0.75,
        "half": 0.5,
        "digits": 10**30 + 3,
        "ratio": 0.1,
        "price": Decimal("1.10"),
        "note": "note 3",
        "code": b"\x00\xff",
        "score": 0.375,
    }
    arrays = source(SHARDS / "arrays")
    (chunk, *_) = read_whole(arrays, arrays.list_files()[0], ("umis",))
    assert chunk.obs["umis"][2] == sum(CELLS[2]["expressions"][1:])


@pytest.mark.parametrize(
    ("name", "column", "message"),
    [
        ("plain", "tissue", r"no column 'tissue'; .*'note'"),
        ("plain", "genes", "no column 'genes'"),
        ("plain", "picture", "encoding 'png' is not read"),
        ("plain", "tags", "'tags' holds a list"),
    ],
)
def test_columns_that_are_no_metadata(name: str, column: str, message: str, source: Callable[..., MDSFiles]) -> None:
    files = source(SHARDS / name)
    with pytest.raises(BadInput, match=message):
        read_whole(files, files.list_files()[0], (column,))


def test_cells_without_ids_have_no_names(source: Callable[..., MDSFiles], tmp_path: Path) -> None:
    folder = copied("plain", tmp_path)

    def rename(index: dict[str, Any]) -> None:
        names = index["shards"][0]["column_names"]
        names[names.index("id")] = "number"

    edit_index(folder, rename)
    files = source(folder)
    with pytest.raises(BadInput, match=r"no column 'id' to name its cells \(_index\); .*'number'"):
        read_whole(files, files.list_files()[0], (INDEX,))


# Damage -------------------------------------------------------------------------------------------


def change_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def test_changed_byte(source: Callable[..., MDSFiles], tmp_path: Path) -> None:
    folder = copied("upstream", tmp_path)
    change_byte(folder / "chunk_0" / "shard.00000.mds.zstd", 500)
    files = source(folder)
    entry = json.loads((folder / "index.json").read_text())["shards"][0]["zip_data"]
    found = hashlib.sha1((folder / "chunk_0" / "shard.00000.mds.zstd").read_bytes()).hexdigest()
    with pytest.raises(
        BadInput, match=rf"shard\.00000\.mds\.zstd is damaged: its sha1 is {found}.*{entry['hashes']['sha1']}"
    ):
        read_whole(files, files.list_files()[0])
    assert len(read_whole(files, files.list_files()[1])) == 1  # the others stay readable
    assert list((tmp_path / "spool").iterdir()) == []


@pytest.mark.parametrize(("algorithm", "form"), [("sha1", "raw_data"), ("xxh64", "raw_data"), ("xxh64", "zip_data")])
def test_every_hash_is_checked(algorithm: str, form: str, source: Callable[..., MDSFiles], tmp_path: Path) -> None:
    folder = copied("upstream", tmp_path) / "chunk_0"
    wrong = "0" * (40 if algorithm == "sha1" else 16)
    edit_index(folder, lambda index: index["shards"][0][form]["hashes"].update({algorithm: wrong}))
    files = source(folder)
    with pytest.raises(BadInput, match=f"its {algorithm} is .*{wrong}"):
        read_whole(files, files.list_files()[0])


def test_unknown_hash_is_reported(
    source: Callable[..., MDSFiles], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied("plain", tmp_path)
    edit_index(folder, lambda index: index["shards"][0]["raw_data"].update(hashes={"blake9": "00"}))
    files = source(folder)
    with caplog.at_level(logging.WARNING):
        read_whole(files, files.list_files()[0])
    assert "cannot be checked: its hashes ['blake9'] are not known" in caplog.text


def test_missing_and_truncated_shards(source: Callable[..., MDSFiles], tmp_path: Path) -> None:
    folder = copied("upstream", tmp_path) / "chunk_0"
    shard = folder / "shard.00001.mds.zstd"
    files = source(folder)
    path = files.list_files()[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-9])
    with pytest.raises(BadInput, match=rf"has {len(content) - 9} bytes, but index\.json says {len(content)}"):
        files.inspect(path)
    with pytest.raises(BadInput, match="copy it again"):
        list(files.read(path, 0, 10, []))
    shard.unlink()
    with pytest.raises(BadInput, match=r"shard\.00001\.mds\.zstd and shard\.00001\.mds is missing"):
        files.inspect(path)


def test_a_decompressed_shard_is_enough(
    source: Callable[..., MDSFiles], tokenizer: TahoeX1Tokenizer, tmp_path: Path
) -> None:
    """The library leaves such shards in its cache."""
    zstandard = pytest.importorskip("zstandard")
    folder = copied("upstream", tmp_path) / "chunk_0"
    packed = folder / "shard.00000.mds.zstd"
    with packed.open("rb") as source_file, (folder / "shard.00000.mds").open("wb") as target:
        zstandard.ZstdDecompressor().copy_stream(source_file, target)
    packed.unlink()
    files = source(folder)
    cells = cells_of(read_whole(files, files.list_files()[0]), tokenizer)
    assert cells == [list(expected_cell(cell).items()) for cell in CELLS[:11]]
    change_byte(folder / "shard.00000.mds", 5000)
    with pytest.raises(BadInput, match="is damaged: its sha1"):
        read_whole(files, files.list_files()[0])


def test_compressed_content_that_does_not_fit(source: Callable[..., MDSFiles], tmp_path: Path) -> None:
    """Some checks remain where an index has no hashes."""
    zstandard = pytest.importorskip("zstandard")
    folder = copied("upstream", tmp_path) / "chunk_0"
    packed = folder / "shard.00000.mds.zstd"

    def without_hashes(index: dict[str, Any]) -> None:
        for form in ("raw_data", "zip_data"):
            index["shards"][0][form]["hashes"] = {}
        index["shards"][0]["zip_data"]["bytes"] = packed.stat().st_size

    content = packed.read_bytes()
    raw = zstandard.ZstdDecompressor().decompress(content)
    for broken, message in (
        (content[: len(content) // 2], "decompresses to less than|cannot be decompressed"),
        (b"nonsense" + content[8:], "cannot be decompressed"),
        (zstandard.compress(raw + b"\0"), f"decompresses to more than the {len(raw)} bytes"),
    ):
        packed.write_bytes(broken)
        edit_index(folder, without_hashes)
        files = source(folder)
        with pytest.raises(BadInput, match=message):
            read_whole(files, files.list_files()[0])
    (shard,) = parse_index((folder / "index.json").read_bytes())[:1]
    bomb = tmp_path / "bomb.zstd"
    bomb.write_bytes(zstandard.compress(bytes(64_000_000)))
    with pytest.raises(BadInput, match=rf"bomb\.zstd decompresses to more than the {len(raw)} bytes"):
        decompress(bomb, shard, tmp_path / "target")
    assert (tmp_path / "target").stat().st_size <= len(raw)
    edit_index(folder, lambda index: index["shards"][0].update(compression="br:3"))
    with pytest.raises(BadInput, match="compressed with 'br'; zstd, gz and bz2 are read"):
        read_whole(source(folder), str(folder / "shard.00000.mds"))


@pytest.mark.parametrize(
    ("place", "number", "message"),
    [
        (0, 9, "has 9 samples"),
        (4, 1, "offsets of its samples make no sense"),
        (12, 2**31, "offsets of its samples make no sense"),
        (-1, 1, "of sample 0 do not fill it"),
    ],
)
def test_damaged_offsets(
    place: int, number: int, message: str, source: Callable[..., MDSFiles], tmp_path: Path
) -> None:
    folder = copied("plain", tmp_path)
    shard = folder / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    first = int.from_bytes(content[4:8], "little")
    place = first if place < 0 else place
    content[place : place + 4] = number.to_bytes(4, "little")
    shard.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        read_whole(source(folder), str(shard))


@pytest.mark.parametrize("size", [0, 3, 60, 5000])
def test_truncated_without_hashes(size: int, source: Callable[..., MDSFiles], tmp_path: Path) -> None:
    folder = copied("plain", tmp_path)
    shard = folder / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:size])
    edit_index(folder, lambda index: index["shards"][0]["raw_data"].update(bytes=size))
    with pytest.raises(BadInput, match="truncated"):
        read_whole(source(folder), str(shard))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(version=3), "version 3"),
        (lambda index: index.pop("shards"), "KeyError"),
        (lambda index: index["shards"][0].update(format="csv"), "format 'csv'"),
        (lambda index: index["shards"][0]["raw_data"].update(basename="../x.mds"), "outside its folder"),
        (lambda index: index["shards"][0]["raw_data"].update(basename="/etc/passwd"), "outside its folder"),
        (lambda index: index["shards"][0].update(column_names=["genes"]), "damaged"),
    ],
)
def test_damaged_index(
    change: Callable[[dict[str, Any]], None], message: str, source: Callable[..., MDSFiles], tmp_path: Path
) -> None:
    folder = copied("plain", tmp_path)
    edit_index(folder, change)
    with pytest.raises(BadInput, match=message) as error:
        source(folder).list_files()
    assert str(folder / "index.json") in str(error.value)


def test_missing_files_and_columns_are_named(source: Callable[..., MDSFiles], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        source(tmp_path / "nowhere").list_files()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no index\.json"):
        source(SHARDS / "plain", tmp_path / "empty").list_files()
    files = source(SHARDS / "plain", vocab=tmp_path / "no_vocab.json")
    with pytest.raises(FileNotFoundError, match=r"source_vocab=.*no_vocab\.json"):
        files.inspect(files.list_files()[0])
    folder = copied("plain", tmp_path)
    edit_index(folder, lambda index: index["shards"][0]["column_names"].__setitem__(4, "values"))
    with pytest.raises(BadInput, match="no column 'expressions', only"):
        source(folder).inspect(str(folder / "shard.00000.mds"))


def test_missing_packages_are_named(source: Callable[..., MDSFiles], monkeypatch: pytest.MonkeyPatch) -> None:
    files = source(SHARDS / "upstream")
    for package in ("zstandard", "xxhash"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ImportError, match=rf"needs {package}: pip install 'tahoex1_hf\[mds\]'"):
                read_whole(files, files.list_files()[0])


# Impossible cells ---------------------------------------------------------------------------------


def write_shard(folder: Path, cells: list[tuple[bytes, bytes]], encoding: str = "pkl") -> str:
    """Write an uncompressed shard by hand, with content that the real library would refuse to write."""
    bodies = [b"".join(len(v).to_bytes(4, "little") for v in (e, g)) + e + g for g, e in cells]
    head = b"{}"
    offsets = np.cumsum([4 * (len(cells) + 2) + len(head), *map(len, bodies)]).astype("<u4")
    content = len(cells).to_bytes(4, "little") + offsets.tobytes() + head + b"".join(bodies)
    folder.mkdir()
    (folder / "shard.00000.mds").write_bytes(content)
    shard = {
        "version": 2,
        "format": "mds",
        "samples": len(cells),
        "column_names": ["expressions", "genes"],
        "column_encodings": [encoding, encoding],
        "column_sizes": [None, None],
        "compression": None,
        "hashes": [],
        "size_limit": None,
        "raw_data": {"basename": "shard.00000.mds", "bytes": len(content), "hashes": {}},
        "zip_data": None,
    }
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": [shard]}))
    return str(folder / "shard.00000.mds")


@pytest.mark.parametrize(
    ("genes", "counts", "message"),
    [
        ([1, 7, 8], [-2.0, 1.0, -1.0], rf"cell 1, gene {SOURCE_NAMES[8]} has the value -1\.0: negative"),
        ([1, 7, 5], [-2.0, 1.0, -1.0], rf"cell 1, gene {UNKNOWN[0]} has the value -1\.0: negative"),
        ([1, 7, 5], [-2.0, 1.0, float("nan")], f"cell 1, gene {UNKNOWN[0]} has the value nan"),
        ([1, 7], [-2.0, float("inf")], "value inf"),
        ([7, 8], [-2.0, 1.0], f"cell 1, gene {SOURCE_NAMES[7]} has the value -2"),
        ([1, 65], [-2.0, 1.0], "cell 1: gene id 65 is not in source_vocab"),
        ([1, -3], [-2.0, 1.0], "cell 1: gene id -3 is not in source_vocab"),
        ([1, 66], [-2.0, 1.0], "cell 1: gene id 66 is not in source_vocab"),
        ([1, 7], [5.0, 1.0], r"cell 1: <cls> \(id 1\) has the count 5"),
        ([1, 63], [-2.0, 1.0], r"cell 1: <junk0> \(id 63\) has the count 1"),
        ([1, 7], [-2.0, 1.0, 1.0], "cell 1: it has 2 genes and 3 expressions"),
        ([1.0, 7.5], [-2.0, 1.0], "cell 1: column 'genes' holds float64 .* whole numbers"),
        ([[1, 7], [1, 8]], [-2.0, 1.0], r"'genes' holds int64 of the shape \(2, 2\)"),
        ([1, 7], ["-2", "1"], "'expressions' holds <U2"),
        (7, 1.0, "'genes' holds int64 of the shape"),
        ([[1], [1, 2]], [1.0], "'genes'"),
    ],
)
def test_impossible_cells(
    genes: Any, counts: Any, message: str, source: Callable[..., MDSFiles], tmp_path: Path
) -> None:
    cells = [([1, 7], [-2.0, 1.0]), (genes, counts)]
    encoded = [(json.dumps(g).encode(), json.dumps(e).encode()) for g, e in cells]
    path = write_shard(tmp_path / "made", encoded, "json")
    gaps = {name: 66 if name == "<junk1>" else i for name, i in SOURCE_IDS.items() if i != 65}  # no token has 65
    (tmp_path / "gaps.json").write_text(json.dumps(gaps))
    vocab = tmp_path / "gaps.json" if genes == [1, 65] else SHARDS / "vocab.json"
    with pytest.raises(BadInput, match=message):
        read_whole(source(tmp_path / "made", vocab=vocab), path)
    with pytest.raises(BadInput, match=message):  # cells are numbered in the shard, wherever reading starts
        list(source(tmp_path / "made", vocab=vocab).read(path, 1, 2, []))
    (chunk,) = source(tmp_path / "made").read(path, 0, 1, [])
    assert chunk.counts.tolist() == [1.0]


def test_another_vocabulary_is_noticed(source: Callable[..., MDSFiles], tmp_path: Path) -> None:
    """Genes of another species have no names in common with ours."""
    (tmp_path / "mouse.json").write_text(json.dumps({"<cls>": 0, **{f"ENSMUSG{i:011d}": i for i in range(1, 70)}}))
    files = source(SHARDS / "plain", vocab=tmp_path / "mouse.json")
    with pytest.raises(BadInput, match="another species"):
        files.inspect(files.list_files()[0])
    (tmp_path / "broken.json").write_text(json.dumps({"<cls>": 0, "ENSG00000001000": 0}))
    with pytest.raises(ValueError, match=r"broken\.json.*distinct ids"):
        source(SHARDS / "plain", vocab=tmp_path / "broken.json").inspect(files.list_files()[0])


# Pickles ------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("column", [0, 1])
def test_malicious_pickle_is_not_run(column: int, source: Callable[..., MDSFiles], tmp_path: Path) -> None:
    cell = [pickle.dumps([3]), pickle.dumps([1.0])]
    cell[column] = pickle.dumps([Malicious(tmp_path / "was_run")])
    path = write_shard(tmp_path / "made", [(cell[0], cell[1])])
    with pytest.raises(BadInput, match=r"cell 0: column '(genes|expressions)': .* asks for (posix|nt)\.system"):
        read_whole(source(tmp_path / "made"), path)
    assert not (tmp_path / "was_run").exists()
    pickle.loads(cell[column])
    assert (tmp_path / "was_run").exists()  # the pickle really is malicious


# S3 -----------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(s3: str) -> Any:
    """Return a client of the loopback server, which has the shards."""
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket="mds-cells", ACL="public-read")
    public = {"ACL": "public-read"}
    for path in (SHARDS / "upstream").rglob("*.*"):
        if path.is_file():
            client.upload_file(str(path), "mds-cells", f"MFM/train/{path.relative_to(SHARDS / 'upstream')}", public)
    client.upload_file(str(SHARDS / "vocab.json"), "mds-cells", "MFM/vocab.json", public)
    return client


def test_s3(bucket: Any, source: Callable[..., MDSFiles], tokenizer: TahoeX1Tokenizer, tmp_path: Path) -> None:
    files = source("s3://mds-cells/MFM/", vocab="s3://mds-cells/MFM/vocab.json")
    paths = files.list_files()
    assert paths[0] == "s3://mds-cells/MFM/train/chunk_0/shard.00000.mds"
    assert len(paths) == 4
    report = files.inspect(paths[3])
    for worker in (pickle.loads(pickle.dumps(files)), source("s3://mds-cells/MFM", vocab=SHARDS / "vocab.json")):
        assert worker.inspect(paths[3]) == report
    chunks = [chunk for path in paths for chunk in read_whole(worker, path, ("drug",))]
    assert cells_of(chunks, tokenizer) == [list(expected_cell(cell).items()) for cell in CELLS]
    assert [drug for chunk in chunks for drug in chunk.obs["drug"]] == [cell["drug"] for cell in CELLS]
    assert list((tmp_path / "spool").iterdir()) == []

    name = "MFM/train/chunk_0/shard.00000.mds.zstd"
    content = bytearray(bucket.get_object(Bucket="mds-cells", Key=name)["Body"].read())
    content[100] ^= 1
    bucket.put_object(Bucket="mds-cells", Key=name, Body=bytes(content))
    with pytest.raises(BadInput, match="is damaged: its sha1"):
        read_whole(files, paths[0])
    bucket.delete_object(Bucket="mds-cells", Key=name)
    with pytest.raises(BadInput, match="is missing from s3://mds-cells/MFM/train"):
        files.inspect(paths[0])
    assert list((tmp_path / "spool").iterdir()) == []


def test_s3_errors_name_what_is_missing(bucket: Any, source: Callable[..., MDSFiles]) -> None:
    for url in ("s3://mds-cells/nothing", "s3://no-such-bucket/x"):
        with pytest.raises(FileNotFoundError, match=rf"{url} (holds no index|does not exist)"):
            source(url).list_files()


class Refusing:
    def find(self, root: str) -> list[str]:
        raise PermissionError(root)


def test_a_public_bucket_that_refuses_the_credentials_is_read_unsigned(
    bucket: Any, source: Callable[..., MDSFiles]
) -> None:
    files = source("s3://mds-cells/MFM")
    files._store._filesystems[os.getpid(), False] = Refusing()
    assert len(files.list_files()) == 4
    files._store._filesystems[os.getpid(), True] = Refusing()
    with pytest.raises(PermissionError, match="s3://mds-cells/MFM may not be read"):
        files.list_files()
