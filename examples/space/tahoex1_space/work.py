"""The work on one file: embed its cells, annotate them by a reference, draw and write the result."""

import base64
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from anndata.io import read_elem

from tahoex1_hf import annotate_files, embed_files
from tahoex1_hf.cells.opening import read_obs_column
from tahoex1_hf.common.plots import draw_umap
from tahoex1_hf.common.progress import watch_progress
from tahoex1_hf.hub.loading import load_model_and_tokenizer

Tell = Callable[[str, int, int], None]
KEY, RECORD = "X_tahoe_x1", "tahoe_x1"
FEWEST = 5  # cells of which a UMAP can be drawn


def prepare_reference(tell: Tell, reference: str, output: str, model: str, size: str | None) -> dict[str, Any]:
    """Embed the Space's reference, once for all users, and measure how fast that is.

    Args:
        tell: Function that is told of progress.
        reference: `.h5ad` file with labelled cells.
        output: `.h5ad` file to write.
        model: Folder or Hub name of the model.
        size: Size to take from a model that holds several.

    Returns:
        `seconds` that embedding took, and the model's `context_length`.
    """
    tell("Loading the model", 0, 0)
    loaded, tokenizer = load_model_and_tokenizer(model, size=size)
    with watch_progress(tell):
        start = time.perf_counter()
        embed_files(reference, output, loaded, tokenizer, key_added=KEY, progress=False)
        return {"seconds": time.perf_counter() - start, "context_length": int(tokenizer.context_length)}


def analyse(
    tell: Tell, folder: str, query: str, reference: str, label: str, own_reference: bool, model: str, size: str | None
) -> dict[str, Any]:
    """Embed cells, annotate them where the reference allows it, and write all into the folder's sub-folder `result`.

    Args:
        tell: Function that is told of progress.
        folder: Folder of this piece of work.
        query: `.h5ad` file with the cells.
        reference: `.h5ad` file with labelled cells; the Space's own is embedded already.
        label: Column of the reference's obs with the labels.
        own_reference: Whether the reference is the user's.
        model: Folder or Hub name of the model.
        size: Size to take from a model that holds several.

    Returns:
        Paths of the files to download, the picture, and what is told of the cells.

    Raises:
        ValueError: If the cells cannot be embedded; the message says what to do.
    """
    place, name = Path(folder), Path(query).name
    for each in ("work", "result"):
        (place / each).mkdir()
    embedded, output = place / "work" / name, place / "result" / f"{Path(name).stem}_tahoe_x1.h5ad"
    column, report = None, None

    def watch(title: str, done: int, total: int) -> None:
        tell(title, done, total)
        if title == "Annotating" and done == total:
            tell("Writing the report", 0, 0)

    with _warnings() as notes, watch_progress(watch):
        tell("Loading the model", 0, 0)
        loaded, tokenizer = load_model_and_tokenizer(model, size=size)
        embed_files(query, embedded, loaded, tokenizer, key_added=KEY, progress=False)
        try:
            if own_reference:
                known = str(place / "work" / f"reference_{Path(reference).name}")
                embed_files(reference, known, loaded, tokenizer, key_added=KEY, progress=False)
                reference = known
            found = annotate_files(
                embedded,
                reference,
                output,
                loaded,
                label,
                tokenizer,
                key=KEY,
                drop_rare=True,
                report=place / "work" / "report",
                progress=False,
            )
        except ValueError as error:  # the embeddings are good without labels
            notes.append(f"Not annotated: {error}")
            shutil.move(embedded, output)
        else:
            column = found.column
            notes[:0] = [note for note in found.notes if not note.startswith("**")]
            target = place / "result" / f"{Path(name).stem}_report"
            report = shutil.make_archive(str(target), "zip", place / "work" / "report")
        tell("Drawing the UMAP", 0, 0)
        result = _describe(output, column, place / "work" / "umap.png")
    return {**result, "notes": list(dict.fromkeys(notes)), "cells": str(output), "report": report}


def _describe(output: Path, column: str | None, picture: Path) -> dict[str, Any]:
    """Return the picture of the embeddings as base64, the labels with their numbers of cells, and the genes found."""
    with h5py.File(output) as file:
        embeddings = np.asarray(file["obsm"][KEY])
        record = read_elem(file["uns"][RECORD])
    labels = np.full(len(embeddings), "cell")
    probabilities = np.ones(len(embeddings))
    if column is not None:
        labels = read_obs_column(str(output), column, "label").astype(str).to_numpy()
        probabilities = read_obs_column(str(output), f"{column}_probability", "label").to_numpy()
    rows = []
    for label in np.unique(labels) if column is not None else ():
        mine = labels == label
        rows.append([str(label), int(mine.sum()), float(probabilities[mine].mean())])
    drawn = None
    if len(embeddings) >= FEWEST:
        title = f"UMAP of the embeddings of {len(embeddings):,} cells"
        draw_umap(embeddings, labels, title, picture, 0)
        drawn = base64.b64encode(picture.read_bytes()).decode()
    genes = int(record["matched_genes"])
    return {
        "picture": drawn,
        "labels": sorted(rows, key=lambda row: -row[1]),
        "number": len(embeddings),
        "genes": genes,
    }


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect the texts of the package's warnings."""
    notes: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
    package = logging.getLogger("tahoex1_hf")
    package.addHandler(handler)
    try:
        yield notes
    finally:
        package.removeHandler(handler)
