"""The page holds all that it promises in one file, escapes what comes from files, and refuses what it cannot show."""

import base64
import io
import logging
import signal
import sys
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import anndata
import forked
import numpy as np
import pytest
from cells import GENES, NUM_GENES, write_vocab
from helpers import tiny_config, tiny_model
from PIL import Image
from scipy.sparse import csr_matrix
from typer.testing import CliRunner

from tahoex1_hf import TahoeX1ForPreTraining, TahoeX1Tokenizer, write_page
from tahoex1_hf.cli.app import app
from tahoex1_hf.embedding import embedder
from tahoex1_hf.reporting import making
from tahoex1_hf.reporting.making import Request

EVIL = '<script>alert("x")</script>'
QUIET: dict[str, Any] = {"dtype": "float32", "progress": False}


class Reader(HTMLParser):
    """Collect the tags of a page, its texts, its attributes, and its pictures."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "img":
            self.pictures.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def two_kinds(number: int, seed: int, unknown: bool = False) -> anndata.AnnData:
    """Return cells of two kinds, each with ten genes of its own; with a gene whose name is HTML."""
    rng = np.random.default_rng(seed)
    kind = np.arange(number) % 2
    counts = rng.poisson(1.0, (number, NUM_GENES))
    counts[:, :10] += rng.poisson(8, (number, 10)) * (kind == 0)[:, None]
    counts[:, 10:20] += rng.poisson(8, (number, 10)) * (kind == 1)[:, None]
    genes, names = list(GENES), [f"G{place}" for place in range(NUM_GENES)]
    if unknown:
        counts = np.hstack([counts, np.full((number, 1), 30)])
        counts[:, 12] += 20 * (kind == 1)
        genes.append("ENSG99999999999")
        names.append(EVIL)
        names[12] = "<b>bold</b>"
    adata = anndata.AnnData(csr_matrix(counts.astype(np.float32)))
    adata.obs_names, adata.var_names = [f"{seed}-{place}" for place in range(number)], genes
    adata.var["gene_symbol"] = names
    adata.obs["kind"] = np.array(["first & best", "second"])[kind]
    adata.obs["<u>side"] = np.array(["<i>left</i>", "$right$"])[rng.integers(0, 2, number)]
    return adata


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write cells, a reference and a model into a folder."""
    folder = tmp_path_factory.mktemp("page")
    two_kinds(60, 0, unknown=True).write_h5ad(folder / "cells.h5ad")
    two_kinds(50, 1).write_h5ad(folder / "reference.h5ad")
    tokenizer = TahoeX1Tokenizer(str(write_vocab(folder / "vocab")), context_length=40)
    config = tiny_config(vocab_size=NUM_GENES + 3, attention_mask_style="observed_or_self")
    for part in (tiny_model(config, TahoeX1ForPreTraining), tokenizer):
        part.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def page(files: Path) -> str:
    """Return a page with all its parts, made by the command."""
    command = ["report", str(files / "cells.h5ad"), "--output", str(files / "page.html"), "--model"]
    command += [str(files / "model"), "--reference", str(files / "reference.h5ad"), "--label", "kind"]
    command += ["--color", "<u>side", "--max-cells", "50", "--score", "--dtype", "float32", "--draws", "3"]
    with pytest.MonkeyPatch.context() as patch:
        # UMAP takes 8 CPU seconds to compile, and has its test elsewhere.
        patch.setattr("tahoex1_hf.reporting.making.umap_places", lambda embeddings, seed: embeddings[:, :2])
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return (files / "page.html").read_text(encoding="utf-8")


def test_it_is_one_file_without_scripts_that_loads_nothing(page: str) -> None:
    read = Reader(page)
    assert not {"script", "link", "iframe", "object", "b", "i", "u"} & set(read.tags)
    sources = [value or "" for name, value in read.attributes if name in ("src", "href")]
    assert all(source.startswith(("#", "data:image/png;base64,")) for source in sources)
    assert not [part for part in ("http://", "https://", "@import", "url(") if part in page]
    assert not [name for name, _ in read.attributes if name.startswith("on")]


def test_pictures_are_pictures_and_have_texts(page: str) -> None:
    pictures = Reader(page).pictures
    assert len(pictures) == 5  # clusters, a column, labels, noise, scores
    for picture in pictures:
        assert len(picture["alt"] or "") > 30
        content = base64.b64decode((picture["src"] or "").removeprefix("data:image/png;base64,"))
        image = Image.open(io.BytesIO(content)).convert("RGB")
        assert min(image.size) > 300
        assert len(image.resize((120, 60)).getcolors(10_000) or ()) > 20


def test_headings_and_tables_are_those_of_a_document(page: str) -> None:
    read = Reader(page)
    assert read.tags.count("h1") == 1
    assert read.tags.count("h2") == read.tags.count("section") == 7
    assert read.tags.count("caption") == read.tags.count("table") > 5
    assert ("lang", "en") in read.attributes
    assert {value for name, value in read.attributes if name == "scope"} == {"row", "col"}


def test_what_comes_from_files_is_escaped_and_shown(page: str) -> None:
    assert "<script" not in page
    assert "<b>bold</b>" not in page
    text = Reader(page).text
    assert EVIL in text  # the gene with most lost counts
    assert "<b>bold</b>" in text  # a marker
    assert "Marked by the column <u>side." in text
    assert "first & best" in text


def test_it_says_what_went_in_and_how_to_repeat_it(page: str, files: Path) -> None:
    text = " ".join(Reader(page).text.split())
    for part in (
        "random sample of 50 of the file's 60 cells",
        "Genes that the model knows 60",
        "Genes left out 1",
        "of the counts are in genes that the model does not know",
        "Labels of the nearest cells of reference.h5ad (column kind)",
        "over 3 samples",
        f"tahoex1 report {files / 'cells.h5ad'} --output {files / 'page.html'} --model {files / 'model'} --reference",
        "--color '<u>side' --max-cells 50 --draws 3 --score --dtype float32",
    ):
        assert part in text
    assert "--seed" not in text


def test_a_page_of_less(files: Path, tmp_path: Path) -> None:
    """No reference, no long cell, a single sample."""
    output = tmp_path / "page.html"
    write_page(files / "reference.h5ad", output, files / "model", max_length=80, draws=1, **QUIET)
    read = Reader(output.read_text(encoding="utf-8"))
    assert read.tags.count("h2") == 5
    assert len(read.pictures) == 1
    assert "Every cell fits into the model's context" in read.text


def test_a_killed_page_goes_on_to_the_same_bytes(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is embedded is not embedded again, and what is lost with unknown genes is said once for each file."""
    output = tmp_path / "page.html"
    arguments = [str(files / "cells.h5ad"), "--output", str(output), "--model", str(files / "model"), "--max-cells"]
    arguments += ["50", "--reference", str(files / "reference.h5ad"), "--label", "kind", "--dtype", "float32"]

    class Noon(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Noon":
            return cls(2026, 1, 1, 12, tzinfo=UTC)

    embed, embedded = embedder.embed_files, []

    def counting(paths: Any, *rest: Any, **options: Any) -> None:
        embedded.append(Path(paths[0]).name)
        embed(paths, *rest, **options)

    monkeypatch.setattr(making, "datetime", Noon)
    monkeypatch.setattr(making, "umap_places", lambda embeddings, seed: embeddings[:, :2])
    monkeypatch.setattr(embedder, "embed_files", counting)
    with caplog.at_level(logging.INFO):
        result = CliRunner().invoke(app, ["report", *arguments])
    assert result.exit_code == 0, result.output
    assert embedded == ["cells.h5ad", "reference.h5ad"]
    assert sum("not in the vocabulary" in each.message for each in caplog.records) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    whole = output.read_bytes()
    output.unlink()
    command = [sys.executable, forked.SUPPORT / "killed_answer.py", "report", *arguments, "-q"]
    for after, again in ((1, ["cells.h5ad", "reference.h5ad"]), (2, ["reference.h5ad"])):
        done = forked.run(command, forked.environment(KILL_AFTER=str(after)))
        assert done.returncode == -signal.SIGKILL, done.stderr
        embedded.clear()
        result = CliRunner().invoke(app, ["report", *arguments])
        assert result.exit_code == 0, result.output
        assert embedded == again
        assert output.read_bytes() == whole
        assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_errors_come_before_any_work(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, reference, output = files / "cells.h5ad", files / "reference.h5ad", tmp_path / "page.html"
    monkeypatch.setattr(making, "model_and_tokenizer", None)  # which would be called next

    def refused(message: str, error: type[Exception] = ValueError, **changes: Any) -> None:
        given = {"cells": cells, "output": output, **changes}
        with pytest.raises(error, match=message):
            Request(**given).check()
        with pytest.raises(error, match=message):
            write_page(given.pop("cells"), given.pop("output"), "none", **given)

    refused(r"none.h5ad does not exist", FileNotFoundError, cells=files / "none.h5ad")
    refused(r"none.h5ad does not exist", FileNotFoundError, reference=files / "none.h5ad", label="kind")
    refused(r"The cells must be an .h5ad file", cells=files / "model")
    refused(r"must end in .html", output=tmp_path / "page.pdf")
    refused(r"folder .* does not exist", output=tmp_path / "none" / "page.html")
    refused("go together", label="kind")
    refused("go together", reference=reference)
    refused("label=none is not a column of obs", reference=reference, label="none")
    refused("is its own reference", reference=cells, label="kind")
    refused("color=none is not a column of obs", color="none")
    refused("pass at least 20 cells", max_cells=3)
    many = two_kinds(50, 2)
    many.obs["id"] = many.obs_names
    many.write_h5ad(tmp_path / "many.h5ad")
    refused(r"color=id \(--color\) has 50 different values", cells=tmp_path / "many.h5ad", color="id")
    assert not output.exists()


def test_a_missing_igraph_is_told_before_any_work(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "igraph", None)  # as if it were not installed
    command = ["report", str(files / "cells.h5ad"), "--output", str(tmp_path / "page.html"), "--model", "none"]
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 1
    assert "igraph is missing: pip install 'tahoex1_hf[data,report]'" in told.output


def test_too_few_cells_and_a_missing_head_are_told(files: Path, tmp_path: Path) -> None:
    two_kinds(19, 3).write_h5ad(tmp_path / "few.h5ad")
    with pytest.raises(ValueError, match=r"has 19 cells: a page needs at least 20"):
        write_page(tmp_path / "few.h5ad", tmp_path / "page.html", files / "model", **QUIET)
    bare = TahoeX1ForPreTraining.from_pretrained(files / "model").tahoe
    tokenizer = TahoeX1Tokenizer.from_pretrained(files / "model")
    with pytest.raises(ValueError, match="needs the pretraining head"):
        write_page(files / "cells.h5ad", tmp_path / "page.html", bare, tokenizer, score=True, **QUIET)
    assert not list(tmp_path.glob("page*"))
