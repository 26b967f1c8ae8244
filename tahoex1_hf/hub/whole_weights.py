# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Load the weights of a folder and check them: no tensor may be missing, of a wrong shape or not finite.

`from_pretrained` gives random weights to tensors that a checkpoint lacks, and warns. That is right for training a new
head, but results must not come from such a model. Everything here that computes results loads its model with
`load_whole`.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tahoex1_hf.common.finite_tensors import check_finite, named_tensors
from tahoex1_hf.common.reading import reading
from tahoex1_hf.common.weight_files import tensor_names, weight_files
from tahoex1_hf.common.wrapped_names import taken_off, unwrapped, unwrapping

logger = logging.getLogger(__name__)

_REPORTER = logging.getLogger("transformers.modeling_utils")
# Beginnings of the names of heads, which may be there for other tasks than the present one.
_HEADS = ("expression_decoder.", "cell_decoder.", "classifier.", "head.")
_NAMED = 3  # number of tensors that a message names


def load_whole(folder: Path, model_class: Any, optional: Sequence[str] = (), **options: Any) -> Any:
    """Load a model from a folder.

    What wrappers such as DDP and `torch.compile` put before names is removed, with an INFO.

    Args:
        folder: Folder with `config.json` and weights.
        model_class: Class of the model.
        optional: Beginnings of the names of tensors that may be missing or have another shape; they get random values
            then.
        **options: Arguments of `from_pretrained`.

    Raises:
        FileNotFoundError: For a folder without weights, or without some of them.
        ValueError: For a file that is not what its name says; and for tensors that are missing, have another shape
            than the configuration says, belong to a model of another configuration, or hold NaN or infinite values.
            The message names file and tensor.
    """
    files = weight_files(folder)
    names = tensor_names(files)
    with reading(*files):
        rules = unwrapping(names)
        if rules:
            logger.info("%s: took %s off the names of the tensors.", _what(files), taken_off(names))
        with _keeping_report_back(_what(files)):
            model, report = model_class.from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, key_mapping=rules or None, **options
            )
    problem = _problem(model, report, names, optional)
    if problem:
        raise ValueError(f"{_what(files)} {problem}")
    if new := sorted({name.partition(".")[0] for name in report["missing_keys"]}):
        logger.info("%s lacks %s, which begins with random weights.", _what(files), ", ".join(new))
    others = [name for name in sorted(report["unexpected_keys"]) if not name.startswith(_HEADS)]
    if others:
        logger.warning("%s holds tensors that are not read, %s.", _what(files), some_of(others))
    check_finite(named_tensors(model), _what(files))
    return model


def has_part(folder: Path, part: str) -> bool:
    """Return whether a folder has any tensor of a part of a model: `"classifier"`, `"expression_decoder"`.

    Raises:
        FileNotFoundError, ValueError: As for `load_whole`, for files that are not there, or are not files of weights.
    """
    names = map(unwrapped, tensor_names(weight_files(folder)))
    return any(name.removeprefix("model.").startswith(f"{part}.") for name in names)  # the original has `model.`


class _Report(logging.Filter):
    """Keep back transformers' report of the weights, which becomes an error here, or tells what is expected."""

    text = ""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "LOAD REPORT" not in text:
            return True
        self.text = text
        return False


@contextmanager
def _keeping_report_back(what: str) -> Iterator[None]:
    """Keep the report back; where transformers only says that it is "above", say what is in it.

    Raises:
        ValueError: For tensors of the model that those of the file cannot be put together into.
    """
    report = _Report()
    _REPORTER.addFilter(report)
    try:
        yield
    except RuntimeError as error:
        names = re.findall(r"^(\S+) *\|.*CONVERSION", report.text, re.MULTILINE)
        if not names:
            raise
        raise ValueError(
            f"{what} holds parts of {some_of(names)} that do not make up a whole: some are missing or have another "
            "shape. Copy the file again, or use another checkpoint."
        ) from error
    finally:
        _REPORTER.removeFilter(report)


def _what(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} files of weights)"


def _problem(model: Any, report: dict[str, Any], names: Sequence[str], optional: Sequence[str]) -> str | None:
    """Return what is wrong with the weights that were loaded, as the rest of a sentence about their file."""
    needed = model.state_dict().keys()
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(tuple(optional)))
    misshapen = sorted(each for each in report["mismatched_keys"] if not each[0].startswith(tuple(optional)))
    own = {top for module in (model, model.base_model) for top, _ in module.named_children()}
    bare = {name: name.removeprefix(f"{model.base_model_prefix}.") for name in report["unexpected_keys"]}
    # Heads of other tasks may be there, but of a part that the model has it must know every tensor.
    extra = sorted(name for name, rest in bare.items() if rest.partition(".")[0] in own)
    if misshapen:
        shapes = [f"{name} as {list(found)} instead of {list(wanted)}" for name, found, wanted in misshapen]
        return (
            f"holds {some_of(shapes)}: config.json describes a model of another shape (hidden_size, vocab_size and so "
            "on), or weights and config.json are of different checkpoints."
        )
    if missing:
        return (
            f"lacks {len(missing)} of the {len(needed)} tensors that {type(model).__name__} needs, {some_of(missing)}"
            f"{_instead(names, extra or sorted(bare), len(missing) == len(needed))}. They would be random numbers."
        )
    if extra:
        return (
            f"holds {len(extra)} tensors that the model of config.json does not have, {some_of(extra)}: weights and "
            "config.json are of different checkpoints (num_hidden_layers, use_glu, num_drugs and so on)."
        )
    return None


def _instead(names: Sequence[str], others: Sequence[str], all_of_them: bool) -> str:
    """Say what tensors are there in place of missing ones, and what that tells about their origin."""
    if any(re.search(r"\.(?:lora_\w+|base_layer|modules_to_save|original_module)\.", name) for name in names):
        return (
            "; it is of a model with a PEFT adapter that was not merged: save it after merge_and_unload(), or pass "
            "the folder that the PEFT model's save_pretrained makes"
        )
    if all_of_them:
        unknown = sorted({unwrapped(name).partition(".")[0] for name in names})
        return f"; the names of its {len(names)} tensors begin with {some_of(unknown)}"
    return f"; it has {some_of(others)}, perhaps the same under another name" if others else ""


def some_of(names: Sequence[str]) -> str:
    """Return a few of several names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
