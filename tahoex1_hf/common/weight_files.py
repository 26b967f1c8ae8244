# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Find the files that hold the weights of a folder, and check that they are whole, by their headers alone."""

import json
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tahoex1_hf.common.disguises import disguise

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_LONGEST_HEADER = 100_000_000  # bytes, the limit of safetensors
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x80\x05")


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers loads the weights of a folder from, in its order of preference.

    Raises:
        FileNotFoundError: For a folder without weights, and for a shard that an index names but that is not there.
        ValueError: For an index that cannot be read, or that names a file outside its folder.
    """
    for single, index in ((SINGLE, INDEX), (PICKLE, PICKLE_INDEX)):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return shards_of(folder / index)
    raise FileNotFoundError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX}, nor {PICKLE}.")


def shards_of(index: Path) -> list[Path]:
    """Return the files that an index names; errors as for `weight_files`."""
    if told := disguise(index):
        raise ValueError(f"{index} {told}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged, or not the index of weights: copy or download it again.") from error
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(f"{index} names no files, or files outside its folder: copy or download it again.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index.parent} lacks {', '.join(missing)}, {len(missing)} of the {len(names)} files that {index.name} "
            "names: copy or download them again."
        )
    return [index.parent / name for name in names]


def tensor_names(files: Sequence[Path]) -> list[str]:
    """Return the names of the tensors in files of weights; only the headers of the files are read.

    Raises:
        ValueError: If a file is truncated or does not hold weights, or if two files hold the same tensor.
    """
    owners: dict[str, Path] = {}
    for path in files:
        for name in _names_in_pickle(path) if path.suffix == ".bin" else _names_in_safetensors(path):
            if name in owners:
                raise ValueError(
                    f"{owners[name]} and {path} both hold {name}: they are of different checkpoints. Copy or download "
                    "them again."
                )
            owners[name] = path
    return list(owners)


def _names_in_safetensors(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} {what_is_wrong(path, error)}") from error


def what_is_wrong(path: Path, error: Exception) -> str:
    """Describe why a safetensors file cannot be opened, as the rest of a sentence that begins with its name."""
    if told := disguise(path):
        return told
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(_PICKLES):
            return "is a file of torch.save (a pickle), not safetensors: save the weights with save_pretrained."
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if 0 < length <= min(_LONGEST_HEADER, size - 8):
            try:
                header = json.loads(file.read(length))
                end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
            except (ValueError, KeyError, TypeError, AttributeError, IndexError):
                end = None
            if isinstance(end, int) and size < 8 + length + end:
                return f"is truncated, {size:,} bytes of {8 + length + end:,}: copy or download it again."
            if isinstance(end, int) and size > 8 + length + end:
                return f"has {size - 8 - length - end:,} bytes more than its header says: copy or download it again."
    return f"is truncated or damaged, or not a safetensors file ({error}): copy or download it again."


def _names_in_pickle(path: Path) -> list[str]:
    import torch

    if told := disguise(path):
        raise ValueError(f"{path} {told}")
    try:
        return list(torch.load(path, map_location="meta", weights_only=True))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors; nothing of it was run. Save the weights with "
            "save_pretrained."
        ) from error
    except (RuntimeError, EOFError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged, or not a file of torch.save: copy it again.") from error
