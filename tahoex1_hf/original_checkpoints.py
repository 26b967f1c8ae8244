"""Converting a checkpoint of the original program into a folder that the Auto classes load.

A checkpoint is a folder with `model_config.yml`, `collator_config.yml`, `vocab.json` and either `model.safetensors` or
the Composer pickle `best-model.pt`; with a drug encoder, `drug_to_id_pad.json` beside them.
"""

import json
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForPreTraining
from tahoex1_hf.original_config import translate_collator_config, translate_model_config
from tahoex1_hf.original_names import convert_state_dict
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.getLogger(__name__)

MODEL_CONFIG, COLLATOR_CONFIG, VOCAB = "model_config.yml", "collator_config.yml", "vocab.json"
SAFETENSORS, PICKLE, DRUG_TABLE = "model.safetensors", "best-model.pt", "drug_to_id_pad.json"
_DRUG_WEIGHT = "model.chem_encoder.embedding.weight"


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """A checkpoint of the original in our terms.

    Args:
        config: shape of the model.
        tokenizer_arguments: arguments of `TahoeX1Tokenizer`, `vocab_file` excepted.
        vocab: token to id.
        state_dict: tensors of `TahoeX1ForPreTraining`.
    """

    config: TahoeX1Config
    tokenizer_arguments: dict[str, Any]
    vocab: dict[str, int]
    state_dict: dict[str, torch.Tensor]


def is_original_folder(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of the original (its own settings, and no config.json)."""
    return (folder / MODEL_CONFIG).is_file() and not (folder / "config.json").is_file()


def read_original_folder(folder: str | Path) -> ConvertedCheckpoint:
    """Read and translate a checkpoint of the original.

    Raises:
        FileNotFoundError: naming the file that is missing.
        ValueError: where a setting is unknown, the weights are not those of the settings, or a pickle holds more
            than tensors.
    """
    folder = Path(folder)
    model_yaml, collator_yaml = _read_yaml(folder / MODEL_CONFIG), _read_yaml(folder / COLLATOR_CONFIG)
    vocab = _read_json(folder / VOCAB)
    original = _read_weights(folder)
    drug_table, drug_to_id = None, None
    if _DRUG_WEIGHT in original:
        num_drugs, fingerprint_size = original[_DRUG_WEIGHT].shape
        drug_table = (num_drugs, fingerprint_size)
        drug_to_id = _read_drug_table(folder / DRUG_TABLE, num_drugs)
    config = translate_model_config(model_yaml, collator_yaml, vocab, drug_table)
    arguments = translate_collator_config(collator_yaml, vocab, drug_to_id)
    return ConvertedCheckpoint(config, arguments, vocab, convert_state_dict(original, config))


def convert_original_folder(source: str | Path, destination: str | Path) -> TahoeX1Config:
    """Convert a checkpoint of the original into a folder for AutoModel, AutoModelForPreTraining and AutoTokenizer.

    The folder is written under a temporary name and moved into place, so that a half-written one is never there.

    Raises:
        FileExistsError: when `destination` exists and is not an empty folder.
        FileNotFoundError: as `read_original_folder`.
        ValueError: as `read_original_folder`.
    """
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists already: choose another destination, or remove it.")
    checkpoint = read_original_folder(source)
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        partial.chmod(0o755)
        _save(checkpoint, partial)
        if destination.exists():
            destination.rmdir()
        partial.rename(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return checkpoint.config


def _save(checkpoint: ConvertedCheckpoint, folder: Path) -> None:
    with torch.device("meta"):
        model = TahoeX1ForPreTraining(checkpoint.config)
    model.load_state_dict(checkpoint.state_dict, strict=True, assign=True)
    model.save_pretrained(folder)
    with tempfile.TemporaryDirectory() as vocab_folder:
        vocab_file = Path(vocab_folder) / VOCAB
        vocab_file.write_text(json.dumps(checkpoint.vocab), encoding="utf-8")
        TahoeX1Tokenizer(str(vocab_file), **checkpoint.tokenizer_arguments).save_pretrained(folder)


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / SAFETENSORS).is_file():
        return load_file(folder / SAFETENSORS)
    path = folder / PICKLE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has neither {SAFETENSORS} nor {PICKLE}.")
    try:
        # Nothing but tensors and plain containers is ever unpickled.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{path} could not be read as a checkpoint of tensors alone: {error}") from error
    try:
        return dict(checkpoint["state"]["model"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a Composer checkpoint: it has no ['state']['model'].") from error


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
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{path} does not hold settings (key: value), but {type(settings).__name__}.")
    return settings


def _read_json(path: Path) -> dict[str, int]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from the checkpoint's folder.")
    mapping = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(mapping, dict) or not all(isinstance(value, int) for value in mapping.values()):
        raise ValueError(f"{path} does not hold a mapping of names to ids.")
    return mapping
