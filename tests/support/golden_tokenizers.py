"""Tokenizers of the golden checkpoints, and the examples on which they are compared."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tahoex1_hf import TahoeX1Tokenizer

VARIANTS = ("a_70m_like", "b_3b_like_chem", "c_glu_post_gqa_avgpool", "d_attn_mask")


def make(golden: Path, variant: str = "a_70m_like", **options: Any) -> TahoeX1Tokenizer:
    """Load the tokenizer of a golden checkpoint, with its drugs."""
    folder = golden / variant / "model"
    table = folder / "drug_to_id_pad.json"
    if table.exists():
        options.setdefault("drug_to_id", json.loads(table.read_text()))
    return TahoeX1Tokenizer(folder / "vocab.json", **options)


def examples(golden: Path, variant: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the original's raw examples as (token ids, counts) pairs, without their <cls>."""
    z = np.load(golden / variant / "examples.npz")
    starts, stops = z["offsets"][:-1] + 1, z["offsets"][1:]
    return [(z["genes"][a:b], z["expressions"][a:b]) for a, b in zip(starts, stops, strict=True)]


def same_batch(one: Any, other: Any) -> None:
    """Assert that two batches are equal."""
    assert one.keys() == other.keys()
    for name in one:
        assert one[name] == other[name], name
