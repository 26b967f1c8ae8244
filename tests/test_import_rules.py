"""Imports between the parts of the package point down, and there are no circles."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "tahoex1_hf"
MODEL = {path.stem for path in PACKAGE.glob("*_tahoe_x1.py")}  # the files that travel to the Hub

# The parts that each part may import beside itself.
ALLOWED: dict[str, set[str]] = {
    "model": set(),
    "common": set(),
    "cells": {"model", "common"},
    "original": {"model", "common"},
    "hub": {"model", "common", "original"},
    "inference": {"model", "common", "cells"},
    "data": {"model", "common", "cells"},
    "runs": {"model", "common", "cells", "hub", "inference", "data"},
}
ALLOWED |= {
    job: {*ALLOWED["runs"], "runs", "original"} for job in ("embedding", "perturbation", "training", "finetuning")
}
ALLOWED["benchmarking"] = {*ALLOWED["finetuning"], "embedding", "finetuning"}
ALLOWED["indexing"] = {*ALLOWED["finetuning"], "embedding"}
ALLOWED["annotation"] = {*ALLOWED["benchmarking"], "benchmarking", "indexing"}
ALLOWED["imputation"] = {*ALLOWED["benchmarking"], "benchmarking", "perturbation"}
ALLOWED["reporting"] = {*ALLOWED["annotation"], "annotation"}
ALLOWED["signatures"] = {*ALLOWED["benchmarking"], "benchmarking"}
ALLOWED["cli"] = {*ALLOWED, "cli"}


def part_of(module: str) -> str:
    """Return the part that a module belongs to: a folder, or `model` for the files that travel to the Hub."""
    first = module.split(".")[1] if "." in module else ""
    return "model" if first in MODEL else first


def imported(path: Path) -> Iterator[str]:
    """Yield every module of the package that a file imports, at its top or in a function."""
    here = ".".join(["tahoex1_hf", *path.relative_to(PACKAGE).with_suffix("").parts])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here.split(".")[: -node.level]) if node.level else ""
            module = ".".join(name for name in (base, node.module) if name)
            yield from (f"{module}.{name.name}" for name in node.names)


# The package's `__init__`, which names everything, and its version.
FRONT = {"__init__", "__main__"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if str(path.relative_to(PACKAGE).with_suffix("")) not in FRONT)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path: Path) -> None:
    own = part_of(f"tahoex1_hf.{'.'.join(path.relative_to(PACKAGE).with_suffix('').parts)}")
    assert own in ALLOWED, f"{path} lies in no known part"
    found = {part_of(name) for name in imported(path) if name.startswith("tahoex1_hf.")} & set(ALLOWED)
    assert found - {own} <= ALLOWED[own], f"{own} may not import {sorted(found - {own} - ALLOWED[own])}"


def test_there_are_no_circles() -> None:
    modules = {f"tahoex1_hf.{'.'.join(path.relative_to(PACKAGE).with_suffix('').parts)}": path for path in MODULES}
    arrows = {
        name: {target for found in imported(path) for target in (found, found.rpartition(".")[0]) if target in modules}
        - {name}
        for name, path in modules.items()
    }
    while leaves := {name for name, targets in arrows.items() if not targets}:
        arrows = {name: targets - leaves for name, targets in arrows.items() if name not in leaves}
    assert not arrows, f"circles among {sorted(arrows)}"


def test_files_that_travel_to_the_hub_import_one_another_only() -> None:
    for name in MODEL:
        tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
        ours = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        assert all(node.level == 1 and node.module in MODEL for node in ours), name
