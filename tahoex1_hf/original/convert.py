# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Open a checkpoint of the original program, and convert it into a folder that the Auto classes load.

A checkpoint is a folder with `model_config.yml`, `collator_config.yml`, `vocab.json` and its weights:
`model.safetensors`, a Composer pickle (`best-model.pt`, or any other single `*.pt`), or the pieces of a sharded
Composer checkpoint. With a drug encoder, `drug_to_id_pad.json` and `drug_fps_pad.npy` may be beside them.
"""

import copy
import json
import logging
import tempfile
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from tahoex1_hf.common.finite_tensors import check_finite
from tahoex1_hf.common.reading import reading
from tahoex1_hf.common.weight_files import tensor_names
from tahoex1_hf.common.wrapped_names import unwrapped
from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForPreTraining
from tahoex1_hf.original.config import translate_collator_config, translate_model_config
from tahoex1_hf.original.files import (
    COLLATOR_CONFIG,
    DRUG_FINGERPRINTS,
    DRUG_TABLE,
    MODEL_CONFIG,
    PICKLE,
    SAFETENSORS,
    SHARDED_METADATA,
    VOCAB,
)
from tahoex1_hf.original.tensor_names import check_tensors, original_shapes
from tahoex1_hf.original.verify import Verification, verify_conversion, write_manifest
from tahoex1_hf.original.weights import TensorReader, UnreadTensor, open_weights, without_wrappers
from tahoex1_hf.original.writing import describe_files, link_or_copy, workspace
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.getLogger(__name__)

MAX_SHARD_SIZE = 5_000_000_000
_DRUG_WEIGHT = "model.chem_encoder.embedding.weight"


@dataclass(frozen=True)
class OriginalCheckpoint:
    """A checkpoint of the original, with translated settings and weights that have not been read yet.

    Args:
        model_settings: Contents of `model_config.yml`.
        collator_settings: Contents of `collator_config.yml`.
        config: Shape of the model.
        tokenizer_arguments: Arguments of `TahoeX1Tokenizer`, except `vocab_file`.
        vocab: Token -> id.
        weights: The original's tensors.
        files: Every file that was read, by its name.
    """

    model_settings: dict[str, Any]
    collator_settings: dict[str, Any]
    config: TahoeX1Config
    tokenizer_arguments: dict[str, Any]
    vocab: dict[str, int]
    weights: TensorReader
    files: dict[str, Path]

    @property
    def dtype(self) -> torch.dtype:
        """Widest type of the original's tensors."""
        return reduce(torch.promote_types, self.weights.dtypes.values())

    def load_model(self, dtype: torch.dtype | None = None) -> TahoeX1ForPreTraining:
        """Load the model; its weights are views of the checkpoint's file where that can be mapped into memory.

        Args:
            dtype: Type of the weights; by default the widest of the original's.
        """
        model = TahoeX1ForPreTraining.from_pretrained(
            None,
            config=copy.deepcopy(self.config),
            state_dict={name: UnreadTensor(self.weights, name) for name in self.weights.shapes},
            dtype=dtype or self.dtype,
        )
        return model.eval()

    def save_tokenizer(self, folder: Path) -> None:
        """Write the files of the tokenizer."""
        with tempfile.TemporaryDirectory() as vocab_folder:
            vocab_file = Path(vocab_folder) / VOCAB
            vocab_file.write_text(json.dumps(self.vocab), encoding="utf-8")
            with reading(self.files[COLLATOR_CONFIG], self.files[VOCAB]):
                tokenizer = TahoeX1Tokenizer(str(vocab_file), **self.tokenizer_arguments)
            tokenizer.save_pretrained(folder)


def open_original(source: str | Path) -> OriginalCheckpoint:
    """Open a checkpoint of the original: a folder, or its `*.pt` file or sharded folder with the settings beside it.

    Raises:
        FileNotFoundError: If a file is missing; the message names it.
        ValueError: If a setting is unknown, the weights are not those of the settings, or a pickle holds more
            than data.
    """
    folder, weights_path = _locate(Path(source))
    files = {name: folder / name for name in (MODEL_CONFIG, COLLATOR_CONFIG, VOCAB)}
    model_settings, collator_settings = _read_yaml(files[MODEL_CONFIG]), _read_yaml(files[COLLATOR_CONFIG])
    vocab = _read_json(files[VOCAB])
    with reading(weights_path):
        weights = without_wrappers(open_weights(weights_path))
    files |= {path.name: path for path in weights.files}
    drug_table, drug_to_id = None, None
    if _DRUG_WEIGHT in weights.shapes:
        num_drugs, fingerprint_size = weights.shapes[_DRUG_WEIGHT]
        drug_table = (num_drugs, fingerprint_size)
        drug_to_id = _read_drug_table(folder / DRUG_TABLE, num_drugs)
        _check_fingerprints(folder / DRUG_FINGERPRINTS, drug_table)
        files |= {n: folder / n for n in (DRUG_TABLE, DRUG_FINGERPRINTS) if (folder / n).is_file()}
    elif collator_settings.get("use_chem_token"):
        logger.warning("The weights have no drug encoder, though the settings name one: converted without drugs.")
    with reading(files[MODEL_CONFIG], files[COLLATOR_CONFIG], files[VOCAB]):
        config = translate_model_config(model_settings, collator_settings, vocab, drug_table)
        arguments = translate_collator_config(collator_settings, vocab, drug_to_id)
    with reading(files[MODEL_CONFIG], weights_path):
        check_tensors(weights.shapes, original_shapes(config), f"the original checkpoint {weights_path}")
    return OriginalCheckpoint(model_settings, collator_settings, config, arguments, vocab, weights, files)


def convert_original_folder(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    label: str | None = None,
) -> TahoeX1Config:
    """Convert a checkpoint of the original into a folder for AutoModel, AutoModelForPreTraining and AutoTokenizer.

    The folder is written under a temporary name, compared with the original on a small batch, and then moved into
    place, so that there is never a half-written or wrong one. Its `conversion.json` records what was read and written.

    Args:
        source: As for `open_original`.
        destination: Folder to make.
        dtype: Type of the converted weights; by default that of the original.
        max_shard_size: Largest size of one file of weights, in bytes.
        label: Name of the source in the manifest; by default the base name of `source`.

    Raises:
        FileExistsError: If `destination` exists and is not an empty folder.
        FileNotFoundError: As for `open_original`.
        ValueError: As for `open_original`, and where the converted model does not compute what the original does.
    """
    destination = Path(destination)
    with workspace(destination) as folder:
        config, _ = convert_into(
            source,
            folder / "result",
            dtype=dtype,
            max_shard_size=max_shard_size,
            label=label or Path(source).resolve().name,
        )
    return config


def convert_into(
    source: str | Path, folder: Path, *, dtype: torch.dtype | None, max_shard_size: int, label: str
) -> tuple[TahoeX1Config, Verification]:
    """Do what `convert_original_folder` does, in an existing empty folder; also return the verification."""
    checkpoint = open_original(source)
    weights = checkpoint.weights
    with reading(*weights.files):
        check_finite(((name, weights.read(name)) for name in weights.shapes), str(weights.files[0]))
    dtype = dtype or checkpoint.dtype
    with reading(*checkpoint.files.values()):
        model = checkpoint.load_model(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    checkpoint.save_tokenizer(folder)
    verification = verify_conversion(
        checkpoint.model_settings, checkpoint.collator_settings, checkpoint.weights, checkpoint.config, folder
    )
    logger.info("%s", verification.summary())
    write_manifest(folder, label, describe_files(checkpoint.files), dtype, verification)
    return checkpoint.config, verification


def translate_folder(source: Path, folder: Path) -> dict[str, Path]:
    """Make a folder that the Auto classes load, of links to the weights and translated settings.

    The weights keep the original's names, which the registered rules read (`tensor_names`). What transformers cannot
    read, a pickle, a sharded checkpoint or one with names of wrappers, is converted instead.

    Args:
        source: Folder in the original's layout.
        folder: Empty folder that exists.

    Returns:
        Every file that was read, by its name.

    Raises:
        FileNotFoundError, ValueError: As for `open_original`.
    """
    checkpoint = open_original(source)
    weights = source / SAFETENSORS
    if not weights.is_file() or _has_wrappers(weights):
        convert_into(source, folder, dtype=None, max_shard_size=MAX_SHARD_SIZE, label=source.resolve().name)
        return checkpoint.files
    checkpoint.save_tokenizer(folder)
    config = copy.deepcopy(checkpoint.config)
    config.architectures, config.dtype = [TahoeX1ForPreTraining.__name__], checkpoint.dtype
    config.save_pretrained(folder)
    link_or_copy(weights.resolve(), folder / SAFETENSORS)
    return checkpoint.files


def _has_wrappers(weights: Path) -> bool:
    return any(unwrapped(name) != name for name in tensor_names([weights]))


def _locate(source: Path) -> tuple[Path, Path]:
    """Return the folder of the settings, and the path of the weights."""
    if source.is_file():
        return source.parent, source
    if (source / SHARDED_METADATA).is_file():
        return (source if (source / MODEL_CONFIG).is_file() else source.parent), source
    for name in (SAFETENSORS, PICKLE):
        if (source / name).is_file():
            return source, source / name
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is neither a file nor a folder.")
    pickles = sorted(source.glob("*.pt"))
    sharded = sorted(path.parent for path in source.glob(f"*/{SHARDED_METADATA}"))
    if len(pickles) + len(sharded) == 1:
        return source, (pickles + sharded)[0]
    if pickles or sharded:
        names = ", ".join(path.name for path in pickles + sharded)
        raise FileNotFoundError(f"{source} holds several checkpoints: name the one you want ({names}).")
    raise FileNotFoundError(
        f"{source} has no weights: neither {SAFETENSORS} nor {PICKLE}, nor another *.pt, nor a sharded checkpoint."
    )


def _check_fingerprints(path: Path, drug_table: tuple[int, int]) -> None:
    if not path.is_file():
        return
    try:
        shape = np.load(path, allow_pickle=False, mmap_mode="r").shape
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} could not be read as an array of numbers: {error}") from error
    if shape != drug_table:
        raise ValueError(f"{path} has shape {list(shape)}; the drug table of the weights has {list(drug_table)}.")


def _read_drug_table(path: Path, num_drugs: int) -> dict[str, int] | None:
    if not path.is_file():
        logger.warning(
            "%s is missing: the converted model keeps its drug encoder, but its tokenizer knows no drug by name.", path
        )
        return None
    drug_to_id = _read_json(path)
    if max(drug_to_id.values()) >= num_drugs:
        raise ValueError(f"{path} numbers drugs up to {max(drug_to_id.values())}; the weights hold {num_drugs} rows.")
    return drug_to_id


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from the checkpoint's folder.")
    with reading(path):
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"{path} does not hold settings (key: value), but {type(settings).__name__}.")
    return settings


def _read_json(path: Path) -> dict[str, int]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from the checkpoint's folder.")
    with reading(path):
        mapping = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(value, int) for value in mapping.values()):
        raise ValueError(f"{path} does not hold a mapping of names to ids.")
    return mapping
