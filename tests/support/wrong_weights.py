"""Checkpoints that are not what they say."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tahoex1_hf import embed_anndata

KEY = "X_tahoe_x1"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 283988000\n"
LAYER = "tahoe.layers.0.self_attn.q_proj.weight"
Tensors = dict[str, torch.Tensor]


def embedded(model: Any, cells: anndata.AnnData, **options: Any) -> np.ndarray:
    copy = cells.copy()
    embed_anndata(copy, model, progress=False, dtype="float32", **options)
    return copy.obsm[KEY]


def read(path: Path) -> Tensors:
    """Read tensors into memory, so that their file can be written anew."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def save(tensors: Tensors, path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def changed(whole: Path, folder: Path, change: Callable[[Tensors], Any]) -> Path:
    """Copy a model whose tensors are changed."""
    shutil.copytree(whole, folder)
    tensors = read(folder / "model.safetensors")
    save(change(tensors) or tensors, folder / "model.safetensors")
    return folder


def with_value(tensors: Tensors, name: str, value: float) -> Tensors:
    tensors[name].view(-1)[3] = value
    return tensors


def without(tensors: Tensors, name: str) -> Tensors:
    return {other: tensor for other, tensor in tensors.items() if other != name}


def renamed(tensors: Tensors, rename: Callable[[str], str]) -> Tensors:
    return {rename(name): tensor for name, tensor in tensors.items()}
