# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Judge released weights by public embeddings of public cells, in a run that can be stopped and resumed."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from huggingface_hub import constants

from tahoex1_hf.cells.readers.tahoe_100m import GENES
from tahoex1_hf.common.digests import json_digest, tokenizer_digest, weights_digest
from tahoex1_hf.common.files import WholeFile, write_json
from tahoex1_hf.common.locks import RunLock
from tahoex1_hf.common.names import public_name
from tahoex1_hf.embedding.files import embed_files
from tahoex1_hf.embedding.release.bench import Bench
from tahoex1_hf.embedding.release.causes import Cause, try_causes
from tahoex1_hf.embedding.release.comparing import compare
from tahoex1_hf.embedding.release.report import write_report
from tahoex1_hf.embedding.release.sources import (
    MODEL,
    Found,
    PublicData,
    as_matrix,
    choose_cells,
    find_public_data,
    read_chosen,
)
from tahoex1_hf.hub.cards.facts import RELEASED_FACTS, load_facts
from tahoex1_hf.hub.loading import find_model
from tahoex1_hf.hub.models import model_and_tokenizer, model_name
from tahoex1_hf.inference.encoder import choose_device
from tahoex1_hf.inference.provenance import model_revision

logger = logging.getLogger(__name__)

SIZE = "3b"  # by default, of a Hub repository
_TRIAL_CELLS = 128  # cells that are embedded again for every assumption, as different in their drugs as can be
_RUN, _CELLS, _PUBLIC, _WORK, _SLOT = "run.json", "cells.parquet", "public.npy", "work", "X_tahoe_x1"


def verify_release(
    output: str | Path,
    *,
    model: str | Path = MODEL,
    size: str | None = None,
    revision: str | None = None,
    data: PublicData = PublicData(),  # noqa: B008 - it is frozen
    num_cells: int = 2000,
    samples: int = 4,
    seed: int = 0,
    batch_tokens: int | None = None,
    device: str | torch.device | None = None,
    restart: bool = False,
    progress: bool = True,
) -> str:
    """Compare our embeddings of public cells with public ones, and judge how near they are.

    The embeddings of some cells are computed for several samples of long cells in float32, and in bfloat16 and without
    the drug token; what two runs of ours differ by is the floor that the public embeddings are measured with. Where
    they are farther, causes are tried and ranked. A run that was stopped resumes when it is called again.

    Args:
        output: Folder for the report (`report.md`, `report.json`, `cosines.csv`, `cosines.png`, `scores.csv`) and for
            what a resumed run goes on with (`work`).
        model: Folder or Hub name of the model.
        size: Size of a model by name; by default `3b` for a Hub repository.
        revision: Branch, tag or commit of the Hub repository.
        data: The public cells and embeddings.
        num_cells: Number of cells to compare.
        samples: Number of samples of each cell longer than the context, at least 2.
        seed: Seed of the choice of cells and of the first sample.
        batch_tokens: Most tokens of a batch.
        device: Device to compute on; by default the fastest there is.
        restart: Whether to discard what a run with other settings left.
        progress: Whether to show progress bars.

    Returns:
        The verdict, in a sentence.

    Raises:
        FileNotFoundError: If cells, embeddings or model cannot be reached; the message says what to download.
        ValueError: For data and arguments that cannot be used.
    """
    if num_cells < 2 or samples < 2:
        raise ValueError(f"num_cells={num_cells}, samples={samples}: pass at least 2 of each.")
    choose_device(device)
    folder = Path(output)
    work = folder / _WORK
    settings = {
        "model": str(model),
        "size": size or (None if os.path.exists(model) else SIZE),
        "revision": revision,
        **asdict(data),
        "num_cells": num_cells,
        "samples": samples,
        "seed": seed,
    }
    with _claimed(folder, settings, restart):
        joined = (work / _CELLS).is_file() and (work / _PUBLIC).is_file()
        problems = _missing_model(model, settings["size"], revision)
        found = None if joined else find_public_data(data, work / "spool", problems)
        loaded, tokenizer = model_and_tokenizer(model, size=settings["size"], revision=revision)
        if found is not None:
            _check_width(loaded.config.hidden_size, found.width, settings)
            _join(work, found, data, num_cells, seed, progress)
        run = _Embedder(work, loaded, tokenizer, data, {"batch_tokens": batch_tokens, "device": device}, progress)
        return _judge(folder, run, settings)


@contextmanager
def _claimed(folder: Path, settings: dict[str, Any], restart: bool) -> Iterator[None]:
    """Take the folder for a run with these settings.

    Raises:
        ValueError: If it holds a run with other settings, or another run is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with RunLock(folder / ".lock", folder, "folder"):
        path = folder / _WORK / _RUN
        begun = path.is_file() and (path.parent / _CELLS).is_file()
        before = json.loads(path.read_text(encoding="utf-8")) if begun else None
        if before is not None and before != settings:
            names = [name for name in settings if before.get(name) != settings[name]]
            if not restart:
                raise ValueError(
                    f"{folder} holds a run with other settings ({', '.join(names)}): choose another folder, or "
                    "discard that run with restart=True (--restart)."
                )
            shutil.rmtree(folder / _WORK)
        path.parent.mkdir(exist_ok=True)
        write_json(path, settings)
        yield


def _missing_model(model: str | Path, size: str | None, revision: str | None) -> list[str]:
    """Return why the model is not here, where no network is to be asked; then nothing else need be tried."""
    if not constants.HF_HUB_OFFLINE and not os.path.exists(model):
        return []
    try:
        find_model(model, size=size, revision=revision)
    except OSError as error:
        return [f"the model: {str(error).rstrip('.')}"]
    return []


def _join(work: Path, found: Found, data: PublicData, num_cells: int, seed: int, progress: bool) -> None:
    """Bring cells and public embeddings together, and keep them."""
    spool = work / "spool"
    logger.info("%d files of cells, %d of embeddings.", len(found.cells), len(found.embeddings))
    chosen = choose_cells(found, data, num_cells, seed, spool, progress)
    cells, public = read_chosen(chosen, data, spool, progress)
    with WholeFile(work / _CELLS) as partial:
        pq.write_table(cells, partial)
    with WholeFile(work / _PUBLIC) as partial, partial.open("wb") as file:
        np.save(file, public)
    shutil.rmtree(spool, ignore_errors=True)


def _check_width(own: int, public: int | None, settings: dict[str, Any]) -> None:
    if public is not None and own != public:
        sizes = [
            f", as the {size} is"
            for size in ("70m", "1b", "3b")
            if load_facts(RELEASED_FACTS[size]).shape.hidden_size == public
        ]
        raise ValueError(
            f"The column {settings['column']!r} has embeddings of {public} numbers, the model {settings['model']} "
            f"({settings['size'] or 'its only size'}) of {own}: it is of another size{''.join(sizes)}. Name the "
            "size with --size, or the column of this size with --column."
        )


class _Embedder:
    """Our embeddings of the cells, each kind computed once and kept.

    Args:
        work: Folder that they are kept in.
        model: The model.
        tokenizer: Its tokenizer.
        data: Names of the columns.
        run: Arguments of `embed_files`: `batch_tokens`, `device`.
        progress: Whether to show progress bars.
    """

    def __init__(self, work: Path, model: Any, tokenizer: Any, data: PublicData, run: dict[str, Any], progress: bool):
        self.work, self.model, self.tokenizer, self.data = work, model, tokenizer, data
        self.run, self.progress = run, progress
        self.drugs = None if tokenizer.drug_table is None else data.drugs
        self.identity = json_digest([weights_digest(model), tokenizer_digest(tokenizer)])

    def embed(self, seed: int, dtype: str = "float32", drugs: bool = True) -> np.ndarray:
        """Return the embeddings of all cells, computing them where they are not there."""
        name = f"{self.identity[:12]}-{dtype}-{seed}{'' if drugs else '-without_drug'}.parquet"
        path = self.work / name
        if not path.is_file():
            logger.info("Embedding: %s, seed %d%s.", dtype, seed, "" if drugs else ", without the drug token")
            embed_files(
                self.work / _CELLS,
                path,
                self.model,
                self.tokenizer,
                gene_metadata=self.data.gene_metadata,
                key_added=_SLOT,
                drugs=self.drugs if drugs else None,
                unknown_drugs="pad",
                seed=seed,
                dtype=dtype,  # type: ignore[arg-type]
                progress=self.progress,
                **self.run,
            )
        return as_matrix(pq.read_table(path, columns=[_SLOT])[_SLOT], _SLOT, str(path))

    def bench(self, public: np.ndarray, samples: list[np.ndarray], other_run: np.ndarray, seed: int) -> Bench:
        """Return some cells to try causes on."""
        cells = pq.read_table(self.work / _CELLS)
        rows = _different(cells[self.data.drugs].to_pylist(), _TRIAL_CELLS)
        return Bench(
            folder=self.work,
            cells=cells.take(rows),
            public=public[rows],
            samples=[each[rows] for each in samples],
            other_run=other_run[rows],
            model=self.model,
            tokenizer=self.tokenizer,
            gene_metadata=self.data.gene_metadata,
            drugs=self.drugs,
            seed=seed,
            run=self.run,
        )

    def cells(self) -> pd.DataFrame:
        """Return `key`, `drug`, further columns, `genes` and `fits` of every cell."""
        table = pq.read_table(self.work / _CELLS)
        lengths = pa.compute.list_value_length(table[GENES]).to_numpy() - 1
        found = pd.DataFrame({"key": table[self.data.key].to_pandas(), "drug": table[self.data.drugs].to_pandas()})
        context = self.tokenizer.context_length
        fits = np.ones(len(found), dtype=bool) if context is None else lengths <= context - 2
        return found.assign(genes=lengths, fits=fits)


def _different(drugs: list[Any], number: int) -> np.ndarray:
    """Return the numbers of cells with as many different drugs as can be."""
    rank: dict[Any, int] = {}
    order = []
    for drug in drugs:
        rank[drug] = rank.get(drug, -1) + 1
        order.append(rank[drug])
    return np.sort(np.argsort(order, kind="stable")[:number])


def _judge(folder: Path, run: _Embedder, settings: dict[str, Any]) -> str:
    """Embed the cells, compare, try causes where there is need to, and write the report."""
    public, seed = np.load(run.work / _PUBLIC), settings["seed"]
    samples = [run.embed(seed + number) for number in range(settings["samples"])]
    other_run = run.embed(seed, "bfloat16")
    without = run.embed(seed, drugs=False) if run.drugs is not None else None
    comparison = compare(public, samples, other_run, without)
    causes: list[Cause] | None = None
    if comparison.verdict != "floor":
        logger.info("The public embeddings are farther than our own floor: looking for the cause.")
        causes = try_causes(run.bench(public, samples, other_run, seed + 1), run.progress)
    facts = {
        **settings,
        **{name: public_name(settings[name]) for name in ("model", "cells", "embeddings", "gene_metadata")},
        "model_revision": model_revision(model_name(settings["model"], run.model)),
        "identity": run.identity,
        "context_length": run.tokenizer.context_length,
        "cells_compared": len(public),
    }
    return write_report(folder, comparison, run.cells(), causes, facts, public_name(settings["embeddings"]))
