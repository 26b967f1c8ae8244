# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Look into what a model was trained on, so that it is not tested on the same cells.

A record is what a checkpoint carries: the log and the settings of its run, the manifests of the prepared datasets that
these name, and the part of its card that is about training. A data set counts as trained on where the record names its
file, the same content, or the publication that its `uns["reference"]` names.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tahoex1_hf.benchmarking.cells import EvaluationFile
from tahoex1_hf.benchmarking.sources import Source, model_folder
from tahoex1_hf.cells.fingerprint import agrees
from tahoex1_hf.common.reading import reading
from tahoex1_hf.hub.adapter_weights import ADAPTER_CONFIG

_FILES = ("training_log.json", "config.resolved.yaml", "card.yaml", "finetuning.json", "run_status.json")
_TRAINING = re.compile(r"^## Training( data)?$(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_PUBLICATION = re.compile(r"([A-Z][\w'-]+) et al\.?,? \(?(\d{4})")


def check_not_trained_on(source: Source, cells: EvaluationFile) -> str | None:
    """Check that a model was not trained on the cells of a benchmark.

    Returns:
        A note where the checkpoint carries no record, so that nothing is known; None where it does.

    Raises:
        ValueError: If its record names these cells.
    """
    texts = dict(_records(source.what))
    if not texts:
        return (
            f"{source.name}: {source.what} carries no record of its training data, so it is not known whether it was "
            f"trained on {cells.name}."
        )
    for place, text in texts.items():
        if reason := _named(text, cells):
            raise ValueError(
                f"--source {source.name}: the model was trained on {cells.path}, says {place}, which names {reason}. "
                "A score there would say nothing about other cells: take cells that it has not seen."
            )
    return None


def _named(text: str, cells: EvaluationFile) -> str | None:
    """Return what a record names that belongs to the cells; None where there is nothing."""
    # A name of one word (cells.h5ad) is only looked for with its ending: the word itself may stand for anything.
    names = [cells.path.name, *([cells.name] if "_" in cells.name else [])]
    if any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) for name in names):
        return f"the file {cells.name}"
    now = cells.fingerprint()
    if any(agrees(before, now) for before in re.findall(r'"fingerprint": "([^"]+)"', text)):
        return "a file with the same content"
    published = set(_PUBLICATION.findall(str(cells.adata.uns.get("reference", ""))))
    both = sorted(published & set(_PUBLICATION.findall(text)))
    return f"{both[0][0]} et al. {both[0][1]}, from which these cells are" if both else None


def _records(model: str) -> Iterator[tuple[str, str]]:
    """Yield the place and text of every record of a model, and of the base of an adapter."""
    folder = model_folder(model)
    for name in _FILES:
        # A run writes its settings beside the folder of its final model, and its checkpoints into folders below.
        for path in (folder / name, folder.parent / name):
            if path.is_file():
                yield from _with_manifests(path)
                break
    if (card := folder / "README.md").is_file():
        parts = [match[0] for match in _TRAINING.finditer(card.read_text(encoding="utf-8"))]
        if parts:
            yield str(card), "\n".join(parts)
    if (adapter := folder / ADAPTER_CONFIG).is_file():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if base:
            yield from _records(base)


def _with_manifests(path: Path) -> Iterator[tuple[str, str]]:
    import yaml

    text = path.read_text(encoding="utf-8")
    yield str(path), text
    if path.suffix == ".yaml":
        with reading(path):
            settings: Any = yaml.safe_load(text)
        for location in (settings.get("datasets") if isinstance(settings, dict) else None) or []:
            manifest = Path(str(location), "manifest.json")
            if manifest.is_file():
                yield str(manifest), manifest.read_text(encoding="utf-8")
