"""Checkpoints as the original's Composer writes them."""

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

SETTINGS = ("model_config.yml", "collator_config.yml", "vocab.json", "drug_to_id_pad.json", "drug_fps_pad.npy")


def composer_state(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the state that Composer saves: optimizer, clock and random numbers beside the model."""
    name = next(iter(tensors))
    optimizer = {
        "state": {name: {"step": torch.tensor(4.0), "exp_avg": torch.zeros(3)}},
        "param_groups": [{"lr": 1.0}],
    }
    return {
        "state": {
            "model": tensors,
            "optimizers": {"DecoupledAdamW": optimizer},
            "timestamp": {"Timestamp": {"epoch": 4, "total_wct": timedelta(seconds=3)}},
        },
        "rng": [{"numpy": np.random.RandomState(0).get_state(), "torch": torch.zeros(4, dtype=torch.uint8)}],
    }


def copy_settings(checkpoint: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in SETTINGS:
        if (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, folder / name)


def as_composer_file(checkpoint: Path, place: Path) -> str:
    copy_settings(checkpoint, place / "src")
    state = composer_state(load_file(checkpoint / "model.safetensors"))
    torch.save(state, place / "src" / "ep4-ba104156-rank0.pt")
    return str(place / "src" / "ep4-ba104156-rank0.pt")


def as_sharded(checkpoint: Path, place: Path) -> str:
    copy_settings(checkpoint, place / "src")
    state = composer_state(load_file(checkpoint / "model.safetensors"))
    dcp.save({"state": state["state"]}, checkpoint_id=place / "src" / "ep4-ba104156", no_dist=True)
    return str(place / "src")
