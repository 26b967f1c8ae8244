"""What `hub_export` runs in a process without the package: load through every Auto class, write what comes out.

Arguments: folder of the repository; folder with cells.json (by sub-folder), where the results go.
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
    """Unlike assert, also under -O."""
    if not good:
        raise SystemExit(str(problem))


def hide_the_package() -> None:
    """Installed or not, it cannot be imported from here on."""
    check("tahoex1_hf" not in sys.modules, "the package is loaded already")
    sys.modules["tahoex1_hf"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("tahoex1_hf")
    except ImportError:
        return
    check(False, "the package can be imported, so that this would prove nothing")


def is_remote(thing: object) -> bool:
    """Whether the class of something comes from the repository."""
    return type(thing).__module__.startswith("transformers_modules.")


def load(repository: str, subfolder: str, cells: dict, work: Path) -> None:
    """Write one file of tensors per Auto class."""
    work.mkdir()
    where = {"subfolder": subfolder, "trust_remote_code": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(repository, **where)
    check(is_remote(tokenizer), f"AutoTokenizer gave {type(tokenizer)}")
    batch = tokenizer(
        [tuple(cell) for cell in cells["cells"]], drugs=cells["drugs"], padding=True, return_tensors="pt"
    )
    save_file(dict(batch), work / "AutoTokenizer.safetensors")
    config = transformers.AutoConfig.from_pretrained(repository, **where)
    check(is_remote(config), f"AutoConfig gave {type(config)}")
    for name in AUTO_CLASSES:
        auto_class = getattr(transformers, name)
        model, report = auto_class.from_pretrained(repository, output_loading_info=True, **where)
        check(is_remote(model), f"{name} gave {type(model)}")
        missing = {key for key in report["missing_keys"] if not key.startswith("classifier.")}
        check(not missing and not report["mismatched_keys"], f"{name} leaves weights out: {report}")
        unexpected = report["unexpected_keys"] if name == "AutoModelForPreTraining" else ()
        check(not unexpected, f"{name} finds weights too many: {unexpected}")
        model.eval()
        # A new classifier has random weights: what stands below it is compared.
        model = model.base_model if name in CLASSIFIERS else model
        with torch.no_grad():
            outputs = model(**batch)
        results = {key: outputs[key].contiguous() for key in OUTPUTS if outputs.get(key) is not None}
        save_file(results, work / f"{name}.safetensors")
        del model


if __name__ == "__main__":
    hide_the_package()
    repository, work = sys.argv[1], Path(sys.argv[2])
    cells_of = json.loads((work / "cells.json").read_text(encoding="utf-8"))
    for number, (subfolder, cells) in enumerate(cells_of.items()):
        load(repository, subfolder, cells, work / f"results{number}")
