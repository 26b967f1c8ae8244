"""Tests lie in the right files, and the house rules of CONTRIBUTING.md that a machine can check hold."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, TESTS = ROOT / "tahoex1_hf", ROOT / "tests"
FOLDERS = ("tahoex1_hf", "tests", "benchmarks", "conversion", "examples", "model_cards")
LONGEST_FILE, LONGEST_FUNCTION = 600, 60

# Modules without a test file of their name, listed under the file that tests them: it covers more than one module.
TESTED_IN: dict[str, set[str]] = {
    "annotation/test_annotating.py": {
        "annotation/classifier",
        "annotation/labels",
        "annotation/output",
        "annotation/report",
        "annotation/sides",
        "annotation/transfer",
        "cli/annotate",
        "embedding/embedder",
    },
    "annotation/test_validation.py": {"annotation/methods"},
    "benchmarking/test_cell_types.py": {
        "benchmarking/cell_embeddings",
        "benchmarking/cells",
        "benchmarking/report",
        "benchmarking/running",
        "benchmarking/task",
        "cli/evaluate",
    },
    "benchmarking/test_contextual_essentiality.py": {"benchmarking/line_genes", "benchmarking/tissue"},
    "benchmarking/test_essentiality.py": {"benchmarking/gene_embeddings"},
    "benchmarking/test_perturbation.py": {"benchmarking/perturbed_genes", "benchmarking/screens"},
    "benchmarking/test_state.py": {"benchmarking/state_runs"},
    "cells/test_opening.py": {
        "cells/errors",
        "cells/readers/tables",
        "data/sources/opened",
    },
    "cells/test_counts.py": {"cells/looking"},
    "cells/test_gene_search.py": {"cells/feature_types", "cells/genes"},
    "cells/readers/test_anndata_inputs.py": {"cells/readers/stores"},
    "cells/test_compiled_encoding.py": {"cells/kernels", "cells/ragged"},
    "cli/test_app.py": {
        "cli/convert",
        "cli/export",
        "cli/finetune",
        "cli/options",
        "cli/perturb",
        "cli/predict",
        "cli/prepare",
        "cli/pretrain",
        "cli/running",
    },
    "cli/test_recipes.py": {"common/recipes"},
    "common/test_cluster.py": {"common/cluster_progress"},
    "common/test_reading.py": {"common/disguises"},
    "data/sources/test_mds.py": {"data/sources/base", "data/sources/mds_format"},
    "data/sources/test_mds_values.py": {"common/pickles", "data/sources/restricted_pickle"},
    "data/test_feeding.py": {"common/processes", "data/workers"},
    "data/test_preparation.py": {
        "data/columns",
        "data/manifest",
        "data/pieces",
        "data/shards",
    },
    "data/test_preparation_errors.py": {"data/config"},
    "data/test_vocabulary.py": {"cli/vocabulary"},
    "embedding/test_files.py": {
        "cells/readers/base",
        "cells/readers/by_gene",
        "cells/readers/paths",
        "cells/readers/prepared",
        "embedding/making",
        "embedding/plan",
        "inference/h5ad_columns",
    },
    "embedding/test_stored.py": {"cells/stored_slot"},
    "embedding/test_writers.py": {
        "embedding/anndata_writer",
        "embedding/obs_columns",
        "embedding/outputs",
    },
    "embedding/release/test_running.py": {
        "cli/verify_release",
        "embedding/release/bench",
        "embedding/release/causes",
        "embedding/release/plot",
        "embedding/release/report",
    },
    "embedding/test_in_memory.py": {"inference/encoder", "inference/provenance"},
    "finetuning/cells/test_cell_baselines.py": {"finetuning/cells/baselines"},
    "finetuning/cells/test_cell_report.py": {"finetuning/cells/report"},
    "finetuning/cells/test_cell_task.py": {
        "finetuning/cells/labels",
        "finetuning/cells/masked_expression",
        "finetuning/cells/task",
        "finetuning/fitting",
        "finetuning/metrics",
        "finetuning/run_folder",
        "finetuning/running",
        "finetuning/task",
        "finetuning/trainer",
    },
    "finetuning/cells/test_predicting.py": {
        "finetuning/cells/prediction_output",
        "finetuning/cells/predictor",
    },
    "finetuning/drugs/test_drug_task.py": {
        "finetuning/drugs/objective",
        "finetuning/drugs/predicting",
        "finetuning/drugs/report",
        "finetuning/drugs/screen",
        "finetuning/drugs/table",
        "finetuning/drugs/task",
    },
    "finetuning/genes/test_gene_baselines.py": {"finetuning/genes/baselines"},
    "finetuning/genes/test_gene_report.py": {"finetuning/genes/report"},
    "finetuning/genes/test_gene_task.py": {
        "finetuning/genes/objective",
        "finetuning/genes/predicting",
        "finetuning/genes/table",
        "finetuning/genes/task",
    },
    "finetuning/test_adapters.py": {"finetuning/cards", "hub/adapters", "hub/added_drugs", "hub/base_sample"},
    "finetuning/test_errors.py": {"finetuning/bases"},
    "hub/test_export.py": {"hub/cards/checking", "hub/isolated_load", "hub/isolated_load_script"},
    "hub/test_loading.py": {"hub/download"},
    "hub/test_sources.py": {"original/files"},
    "hub/test_whole_weights.py": {
        "common/finite_tensors",
        "common/weight_files",
        "common/wrapped_names",
        "inference/finite",
    },
    "imputation/test_running.py": {"cli/impute", "imputation/layer", "imputation/targets"},
    "indexing/test_building.py": {"indexing/store"},
    "indexing/test_querying.py": {"cli/index", "indexing/searching", "indexing/summary"},
    "model_cards/test_model_cards.py": {"hub/cards/facts", "hub/cards/rendering", "training/flops"},
    "original/test_convert.py": {"original/finished"},
    "original/test_verify.py": {"original/config", "original/reference"},
    "perturbation/test_interactions.py": {"perturbation/heat_map"},
    "perturbation/test_journal.py": {"perturbation/plot", "perturbation/tables"},
    "perturbation/test_run.py": {"perturbation/cells", "perturbation/measures", "perturbation/plan"},
    "reporting/test_making.py": {
        "cli/report",
        "reporting/figures",
        "reporting/page",
        "reporting/sample",
        "reporting/sections",
    },
    "runs/test_report.py": {"finetuning/verdicts"},
    "signatures/test_building.py": {"cli/signatures", "signatures/figures", "signatures/report", "signatures/screen"},
    "signatures/test_querying.py": {"signatures/comparing", "signatures/store"},
    "training/test_config.py": {"training/trainer"},
    "training/test_pretraining.py": {
        "runs/log_window",
        "runs/memory",
        "training/baselines",
        "training/curve",
        "training/metrics",
        "training/microbatches",
        "training/monitors",
        "training/stream",
    },
    "training/test_resuming.py": {"runs/preemption", "runs/status"},
    "training/test_several_processes.py": {"runs/background_saves"},
}


def python_files() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def modules() -> set[str]:
    """Return the package's modules as `folder/name`."""
    paths = (path for path in PACKAGE.rglob("*.py") if not path.name.startswith("__"))
    return {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in paths}


def test_every_module_has_its_tests() -> None:
    """A module's tests are in the file that mirrors its folder and name, or in the file that `TESTED_IN` names."""
    own = {name for name in modules() if (TESTS / name).with_name(f"test_{Path(name).name}.py").is_file()}
    listed = [name for names in TESTED_IN.values() for name in names]
    assert len(listed) == len(set(listed))
    assert not [file for file in TESTED_IN if not (TESTS / file).is_file()]
    assert not modules() - own - set(listed), "neither has a test file of its name nor is in TESTED_IN"
    assert not set(listed) & own, "has a test file of its name: take it from TESTED_IN"
    assert not set(listed) - modules(), "is there no longer: take it from TESTED_IN"


def test_tests_lie_in_the_packages_folders() -> None:
    others = {"benchmarks", "examples", "model_cards"}  # folders of the repository that have tests
    for path in TESTS.rglob("test_*.py"):
        folder = path.parent.relative_to(TESTS)
        assert (PACKAGE / folder).is_dir() or folder.as_posix() in others, name_of(path)


def test_files_are_short() -> None:
    found = {name_of(path) for path in python_files() if len(path.read_text().splitlines()) > LONGEST_FILE}
    assert not found


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function without its signature and docstring: a command's signature is its options."""
    assert function.end_lineno is not None
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return function.end_lineno - body[0].lineno + 1 if body else 0


def test_functions_are_short() -> None:
    found = {
        f"{name_of(path)}::{node.name}"
        for path in python_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and body_lines(node) > LONGEST_FUNCTION
    }
    assert not found


ARGUMENT = re.compile(r"^(?P<name>\*{0,2}\w+)( \([^)]*\))?: (?P<text>.*)$")


def argument_texts(docstring: str) -> Iterator[tuple[str, str]]:
    """Yield the names and first lines of the entries in a docstring's sections Args and Attributes."""
    listing = False
    for line in docstring.splitlines():
        if re.match(r"\s*(Args|Attributes):$", line):
            listing, inner = True, len(line) - len(line.lstrip()) + 4
        elif listing and line.strip():
            indent = len(line) - len(line.lstrip())
            if indent < inner:
                listing = False
            elif indent == inner and (found := ARGUMENT.match(line.strip())):
                yield found["name"], found["text"]


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("It.\n\n    Args:\n        a: Of cells.\n            b: x\n    Returns:\n        c: d", [("a", "Of cells.")]),
        ("Do it.\n\nArgs:\n    *rest: Things.\n    n (int): How many.", [("*rest", "Things."), ("n", "How many.")]),
        ("Note: of no section.", []),
    ],
)  # fmt: skip
def test_texts_of_arguments_are_found(docstring: str, expected: list[tuple[str, str]]) -> None:
    assert list(argument_texts(docstring)) == expected


def test_texts_of_arguments_are_noun_phrases() -> None:
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                for _, text in argument_texts(ast.get_docstring(node, clean=False) or ""):
                    if text.lower().startswith("of "):
                        found.add(name_of(path))
    assert not found
