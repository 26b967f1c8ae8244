"""Load an exported repository through every Auto class, without the package, and write the outputs.

`isolated_load` runs this text in a separate process. The arguments are the folder of the repository, and a folder that
holds cells.json (made-up cells by sub-folder) and receives the results.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

CLASSIFIERS = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification")
AUTO_CLASSES = ("AutoModel", "AutoModelForPreTraining", *CLASSIFIERS)
OUTPUTS = ("pooler_output", "expression_predictions", "cell_expression_predictions")


def check(good: bool, problem: object) -> None:
    """End the process with `problem` unless `good`; unlike assert, this also works under `python -O`."""
    if not good:
        raise SystemExit(str(problem))


def hide_the_package() -> None:
    """Block imports of the package, which may be installed, from here on."""
    check("tahoex1_hf" not in sys.modules, "the package is loaded already")
    sys.modules["tahoex1_hf"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("tahoex1_hf")
    except ImportError:
        return
    check(False, "the package can be imported, so that this would prove nothing")


def is_remote(thing: object) -> bool:
    """Return whether the class of an object comes from the repository."""
    return type(thing).__module__.startswith("transformers_modules.")


def load(repository: str, subfolder: str, cells: dict, results_folder: Path) -> None:
    """Load one size, and write one file of tensors per Auto class."""
    results_folder.mkdir()
    where = {"subfolder": subfolder, "trust_remote_code": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(repository, **where)
    check(is_remote(tokenizer), f"AutoTokenizer gave {type(tokenizer)}")
    batch = tokenizer(
        [tuple(cell) for cell in cells["cells"]], drugs=cells["drugs"], padding=True, return_tensors="pt"
    )
    save_file(dict(batch), results_folder / "AutoTokenizer.safetensors")
    config = transformers.AutoConfig.from_pretrained(repository, **where)
    check(is_remote(config), f"AutoConfig gave {type(config)}")
    for name in AUTO_CLASSES:
        auto_class = getattr(transformers, name)
        model, report = auto_class.from_pretrained(repository, output_loading_info=True, **where)
        check(is_remote(model), f"{name} gave {type(model)}")
        missing = {key for key in report["missing_keys"] if not key.startswith("classifier.")}
        check(not missing and not report["mismatched_keys"], f"{name} leaves weights out: {report}")
        unexpected = report["unexpected_keys"] if name == "AutoModelForPreTraining" else ()
        check(not unexpected, f"{name} finds weights that it does not know: {unexpected}")
        model.eval()
        # A new classifier has random weights, so the model below it is compared.
        model = model.base_model if name in CLASSIFIERS else model
        with torch.no_grad():
            outputs = model(**batch)
        results = {key: outputs[key].contiguous() for key in OUTPUTS if outputs.get(key) is not None}
        save_file(results, results_folder / f"{name}.safetensors")
        del model


if __name__ == "__main__":
    hide_the_package()
    repository, work = sys.argv[1], Path(sys.argv[2])
    cells_of = json.loads((work / "cells.json").read_text(encoding="utf-8"))
    for number, (subfolder, cells) in enumerate(cells_of.items()):
        load(repository, subfolder, cells, work / f"results{number}")
