"""Building the folder of a Hub repository from converted checkpoints, and proving that it loads without the package.

One size lies at the root, the others in sub-folders (`subfolder=`). The code lies at the root only: transformers looks
for it there, whatever the sub-folder.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from tahoex1_hf.hub.loading import SIZES_FILE
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForPreTraining
from tahoex1_hf.original.verify import MANIFEST
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.getLogger(__name__)

AUTO_MAP = {
    "AutoConfig": "configuration_tahoe_x1.TahoeX1Config",
    "AutoModel": "modeling_tahoe_x1.TahoeX1Model",
    "AutoModelForPreTraining": "modeling_tahoe_x1.TahoeX1ForPreTraining",
    "AutoModelForSequenceClassification": "modeling_tahoe_x1.TahoeX1ForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_tahoe_x1.TahoeX1ForTokenClassification",
}
TOKENIZER_AUTO_MAP = {"AutoTokenizer": ["tokenization_tahoe_x1.TahoeX1Tokenizer", None]}  # slow, fast
CODE_FILES = (
    "configuration_tahoe_x1.py",
    "encoding_tahoe_x1.py",
    "modeling_tahoe_x1.py",
    "observed_attention_tahoe_x1.py",
    "packing_tahoe_x1.py",
    "tokenization_tahoe_x1.py",
)
CONFIG, TOKENIZER_CONFIG, VOCAB, INDEX = (
    "config.json",
    "tokenizer_config.json",
    "vocab.json",
    "model.safetensors.index.json",
)
RUN_STATUS = "run_status.json"  # in the folder of a training run
_OF_A_RUN = {RUN_STATUS, "trainer_state.json"}
_PACKAGE = Path(__file__).resolve().parent
_TOLERANCE = 1e-6


def size_names(folders: list[str]) -> dict[str, Path]:
    """Name each converted folder: `NAME=FOLDER`, or the folder's own name (without `-model`).

    Raises:
        ValueError: where two have the same name.
    """
    sizes: dict[str, Path] = {}
    for folder in folders:
        name, equals, path = folder.partition("=") if not Path(folder).exists() else ("", "", folder)
        source = Path(path if equals or not name else folder)
        name = name if equals else source.resolve().name.removesuffix("-model")
        if name in sizes:
            raise ValueError(f"{sizes[name]} and {source} are both named {name}: name one of them, as NAME={source}.")
        if not name or name.startswith(".") or "/" in name:
            raise ValueError(f"{name!r} cannot be the name of a sub-folder: pass NAME={source}.")
        sizes[name] = source
    return sizes


def check_converted(folder: Path) -> None:
    """Check that a folder is a complete converted checkpoint.

    Raises:
        FileNotFoundError: naming the file that is missing.
        ValueError: where it is another kind of model.
    """
    for name in (CONFIG, TOKENIZER_CONFIG, VOCAB):
        if not (folder / name).is_file():
            hint = "convert it first, with conversion/convert_checkpoint.py" if name == CONFIG else "convert it again"
            raise FileNotFoundError(f"{folder} has no {name}, so it is not a converted checkpoint: {hint}.")
    model_type = _read_json(folder / CONFIG).get("model_type")
    if model_type != "tahoe_x1":
        raise ValueError(f"{folder} holds a model of type {model_type!r}: pass a converted Tahoe-x1 checkpoint.")
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as tensors:
                tensors.keys()
        except SafetensorError as error:
            raise ValueError(
                f"{path} cannot be read, perhaps it was cut short ({error}): convert it again."
            ) from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a converted checkpoint's weights.

    Raises:
        FileNotFoundError: where one is missing.
    """
    index = folder / INDEX
    names = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: convert it again (weights are safetensors).")
    return [folder / name for name in names]


def build_repository(
    sizes: Mapping[str, Path], destination: Path, *, default: str, license_file: Path, cards: Mapping[str, str]
) -> dict[str, float]:
    """Build the folder of a Hub repository, and load it in a process that lacks the package.

    It is built beside `destination` and moved into place when it has loaded and agrees. An earlier export there is
    replaced; weights are hard links where the file system can.

    Args:
        sizes: name to converted folder, as `size_names` gives them.
        destination: folder of the repository.
        default: the size at the root; the others lie in sub-folders of their names.
        license_file: what becomes LICENSE.
        cards: text of README.md, by size.

    Returns:
        The largest difference to the package's own embeddings, by size.

    Raises:
        FileExistsError: when `destination` holds something else.
        FileNotFoundError: where a converted folder lacks a file.
        ValueError: where a folder or a name cannot be used.
        RuntimeError: where the export does not load without the package, or gives other numbers.
    """
    if default not in sizes:
        raise ValueError(f"default={default!r} is not one of the sizes: pass one of {', '.join(sizes)}.")
    for folder in sizes.values():
        check_converted(folder)
    destination = destination.absolute()
    if destination.exists() and not (destination / SIZES_FILE).is_file() and any(destination.iterdir()):
        raise FileExistsError(f"{destination} is there and is not an earlier export: choose another, or remove it.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}-", dir=destination.parent) as work:
        repository = Path(work) / "repository"
        repository.mkdir()
        places = {name: "" if name == default else name for name in sizes}
        for name, folder in sizes.items():
            _add_checkpoint(folder, repository / places[name])
        for name in CODE_FILES:
            shutil.copyfile(_PACKAGE / name, repository / name)
        shutil.copyfile(license_file, repository / "LICENSE")
        for name, text in cards.items():
            (repository / places[name] / "README.md").write_text(text, encoding="utf-8")
        _write_json(places, repository / SIZES_FILE)
        differences = smoke_load(repository, {places[name]: folder for name, folder in sizes.items()})
        if destination.exists():
            destination.rename(Path(work) / "replaced")
        repository.rename(destination)
    return {name: differences[places[name]] for name in sizes}


def _add_checkpoint(source: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    weights = weight_files(source)
    for path in sorted(source.iterdir()):
        if path in weights:
            _link_or_copy(path.resolve(), folder / path.name)
        elif path.name in _OF_A_RUN:
            continue
        elif path.suffix == ".json" and path.is_file():
            shutil.copyfile(path, folder / path.name)
        elif path.name != "README.md" and not (source / RUN_STATUS).is_file():
            logger.warning("%s is left out: it is not part of a converted checkpoint.", path)
    if (manifest := folder / MANIFEST).is_file():  # it is public from here on: no folder names of this machine
        record = _read_json(manifest)
        if Path(str(record["source"])).is_absolute():
            _write_json(record | {"source": Path(record["source"]).name}, manifest)
    config = _read_json(folder / CONFIG)
    _write_json(config | {"auto_map": AUTO_MAP}, folder / CONFIG)
    _write_json(_read_json(folder / TOKENIZER_CONFIG) | {"auto_map": TOKENIZER_AUTO_MAP}, folder / TOKENIZER_CONFIG)


def _link_or_copy(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, destination)


# The proof: the same cells through the package here, and through the Auto classes where the package is not ---------


def smoke_load(repository: Path, sources: Mapping[str, Path]) -> dict[str, float]:
    """Load every sub-folder through every Auto class without the package, and compare with the package's numbers.

    Args:
        repository: folder of the repository.
        sources: sub-folder (`""` for the root) to the converted folder that it was made from.

    Returns:
        The largest difference, by sub-folder.

    Raises:
        RuntimeError: where something does not load, or differs.
    """
    with tempfile.TemporaryDirectory() as work:
        cells, expected = {}, {}
        for subfolder, source in sources.items():
            cells[subfolder], expected[subfolder] = _own_results(source)
        (Path(work) / "cells.json").write_text(json.dumps(cells), encoding="utf-8")
        results = _results_elsewhere(repository, list(sources), Path(work))
        return {
            subfolder: _largest_difference(results[subfolder], expected[subfolder], subfolder) for subfolder in sources
        }


def example_cells(tokenizer: TahoeX1Tokenizer, num_cells: int = 4) -> dict[str, Any]:
    """Made-up cells of the tokenizer's own genes: the same ones each time."""
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


def _results_elsewhere(
    repository: Path, subfolders: list[str], work: Path
) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HOME": str(work / "hf_home"), "HF_HUB_OFFLINE": "1"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # the same sums in the same order
    script = (_PACKAGE / "hub_smoke_load.py").read_text(encoding="utf-8")
    # Isolated, from text: neither this folder nor PYTHONPATH nor the current folder is searched for modules.
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


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
