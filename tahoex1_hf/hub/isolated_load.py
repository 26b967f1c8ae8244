# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Check that an exported repository loads without this package, and computes the same."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForPreTraining
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

_SCRIPT = Path(__file__).with_name("isolated_load_script.py")
_TOLERANCE = 1e-6


def compare_isolated_load(repository: Path, sources: Mapping[str, Path]) -> dict[str, float]:
    """Load every sub-folder through every Auto class without the package, and compare with the package's results.

    Args:
        repository: Folder of the exported repository.
        sources: For each sub-folder (`""` is the root) the converted folder that it was made from.

    Returns:
        The largest absolute difference of any output, by sub-folder.

    Raises:
        RuntimeError: If something does not load, or differs by more than 1e-6.
    """
    with tempfile.TemporaryDirectory() as work:
        cells, expected = {}, {}
        for subfolder, source in sources.items():
            cells[subfolder], expected[subfolder] = _own_results(source)
        (Path(work) / "cells.json").write_text(json.dumps(cells), encoding="utf-8")
        results = _results_without_package(repository, list(sources), Path(work))
        return {
            subfolder: _largest_difference(results[subfolder], expected[subfolder], subfolder) for subfolder in sources
        }


def example_cells(tokenizer: TahoeX1Tokenizer, num_cells: int = 4) -> dict[str, Any]:
    """Make cells with random counts of the tokenizer's genes, the same each time, as arguments of the tokenizer."""
    genes = [token for token in sorted(tokenizer.get_vocab()) if token.startswith("ENS")] or [
        token for token in sorted(tokenizer.get_vocab()) if not token.startswith("<")
    ]
    cells = []
    for number in range(num_cells):
        chosen = genes[number :: max(1, len(genes) // (40 + 8 * number))][: 40 + 8 * number]
        cells.append((chosen, [1 + (index * 7919 + number) % 23 for index in range(len(chosen))]))
    drugs = None
    if tokenizer.drug_to_id is not None:
        names = sorted(tokenizer.drug_to_id, key=lambda name: tokenizer.drug_to_id[name])  # type: ignore[index]
        drugs = [names[-1 - number % len(names)] for number in range(num_cells - 1)] + [None]
    return {"cells": cells, "drugs": drugs}


def _own_results(source: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    tokenizer = TahoeX1Tokenizer.from_pretrained(source)
    cells = example_cells(tokenizer)
    batch = tokenizer(cells["cells"], drugs=cells["drugs"], padding=True, return_tensors="pt")
    model, report = TahoeX1ForPreTraining.from_pretrained(source, output_loading_info=True)
    problems = {kind: names for kind, names in report.items() if names}
    if problems:
        raise RuntimeError(f"{source} does not load cleanly: {problems}")
    with torch.no_grad():
        outputs = model.eval()(**batch)
    names = ("pooler_output", "expression_predictions", "cell_expression_predictions")
    return cells, {**batch, **{name: outputs[name] for name in names}}


def _results_without_package(
    repository: Path, subfolders: list[str], work: Path
) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HOME": str(work / "hf_home"), "HF_HUB_OFFLINE": "1"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # sums are then added in the same order
    script = _SCRIPT.read_text(encoding="utf-8")
    # Python is isolated and gets the script as text, so that neither this folder nor PYTHONPATH nor the current folder
    # is searched for modules.
    command = [sys.executable, "-I", "-c", script, str(repository), str(work)]
    run = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"The export does not load without the package:\n{run.stderr[-4000:]}")
    return {
        subfolder: {path.stem: load_file(path) for path in sorted((work / f"results{number}").iterdir())}
        for number, subfolder in enumerate(subfolders)
    }


def _largest_difference(
    results: Mapping[str, Mapping[str, torch.Tensor]], expected: Mapping[str, torch.Tensor], subfolder: str
) -> float:
    largest = 0.0
    for auto_class, tensors in results.items():
        for name, tensor in tensors.items():
            same_shape = tensor.shape == expected[name].shape
            difference = (tensor.double() - expected[name].double()).abs().max().item() if same_shape else float("inf")
            if not difference <= _TOLERANCE:  # NaN too
                raise RuntimeError(
                    f"Without the package, {auto_class} gives another {name} than the package does (sub-folder "
                    f"{subfolder!r}, difference {difference:.3g}): the converted folder or the code was changed."
                )
            largest = max(largest, difference)
    return largest
