"""A small base, cells whose labels can be learnt, and fine-tuning runs that take seconds."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import forked
import numpy as np
import pandas as pd
from cells import GENES, write_vocab
from helpers import tiny_config, tiny_model
from scipy.sparse import csr_matrix
from training_runs import free_port

from tahoex1_hf import TahoeX1ForPreTraining, TahoeX1Tokenizer
from tahoex1_hf.finetuning.config import FinetuneConfig, parse_finetune_config

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "finetune_lora.py"
RECIPES = ROOT / "examples" / "configs" / "finetune"
KINDS = ["B cell", "NK", "T cell"]


def write_base(folder: Path, genes: list[str] = GENES, **changes: Any) -> Path:
    """Write a model with random weights, and its tokenizer."""
    with_drugs = "num_drugs" in changes
    vocab = write_vocab(folder.parent / f"{folder.name}_vocab", genes, drug_token=with_drugs)
    table = {"drug_to_id": {"<pad>": 0, "aspirin": 1, "caffeine": 2, "taxol": 3}} if with_drugs else {}
    tokenizer = TahoeX1Tokenizer(vocab, context_length=48, **table)
    settings = {"vocab_size": len(tokenizer), "expression_encoder_dropout": 0.0, **changes}
    if with_drugs:
        settings |= {"drug_fingerprint_size": 16, "drug_token_id": tokenizer.get_vocab()["<drug>"]}
    model = tiny_model(tiny_config(**settings), TahoeX1ForPreTraining)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def labelled_cells(num_cells: int = 120, seed: int = 0, noise: float = 0.1) -> anndata.AnnData:
    """Make cells of three kinds, each with its own genes, and a number that depends on what a cell expresses."""
    random = np.random.default_rng(seed)
    kinds = np.arange(num_cells) % 3
    own = np.arange(len(GENES)) % 3 == kinds[:, None]
    expressed = random.random(own.shape) < np.where(own, 0.7, noise)
    counts = random.integers(1, 30, own.shape) * expressed
    counts[np.arange(num_cells), random.integers(0, len(GENES), num_cells)] += 1  # no cell is empty
    obs = pd.DataFrame(
        {
            "kind": pd.Categorical(np.array(KINDS)[kinds]),
            "pair": np.where(kinds == 0, "yes", "no"),
            "dose": 100.0 + 50.0 * kinds + random.normal(0, 1, num_cells),
            "donor": [f"d{i}" for i in random.integers(0, 6, num_cells)],
        },
        index=[f"cell{i}" for i in range(num_cells)],
    )
    return anndata.AnnData(csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=GENES))


def settings(base: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Return the settings of a run of a few steps."""
    usual = {
        "task": "classification",
        "model": str(base),
        "data": str(data),
        "label": "kind",
        "output_dir": str(output),
        "lora_rank": 4,
        "lora_alpha": 8,
        "epochs": 3,
        "batch_size": 16,
        "learning_rate": 0.01,
        "precision": "no",
        "head_start": "random",  # a random head has more to learn
        "report": False,
    }
    chosen = {**usual, **changes}
    if chosen["task"] == "masked_expression":
        del chosen["head_start"]
    return {name: value for name, value in chosen.items() if value is not None}


def make_config(base: Path, data: Path, output: Path, **changes: Any) -> FinetuneConfig:
    return parse_finetune_config(settings(base, data, output, **changes))


def result(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with np.load(folder / "result.npz") as arrays:
        return json.loads((folder / "result.json").read_text()), dict(arrays)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def command(script: Path, processes: int = 1, **values: Any) -> list[str]:
    """Return the command as a user gives it, with a value for every key that the recipe sets."""
    recipe = RECIPES / "classification.yaml"
    launcher = [sys.executable]
    if processes > 1:  # with --cpu, accelerate would start one process whatever the number
        launcher += ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
        launcher += ["--num_processes", str(processes), "--main_process_port", str(free_port())]
    defaults = {
        "gene_symbols": "null",
        "early_stopping_patience": 5,
        "validation_fraction": 0.1,
        "warmup_fraction": 0.1,
    }
    return [
        *launcher,
        str(script),
        str(recipe),
        *(f"{name}={value}" for name, value in {**defaults, **values}.items()),
    ]


def start(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in a forked process."""
    return forked.run(arguments, forked.environment(**environment))
