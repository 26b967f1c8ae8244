"""A tokenizer of forty genes, with its vocabulary file."""

import json
from pathlib import Path
from typing import Any

from tahoex1_hf import TahoeX1Tokenizer

GENES = [f"ENSG{number:011d}" for number in range(40)]


def write_tokenizer(folder: Path, **options: Any) -> TahoeX1Tokenizer:
    """Save a tokenizer with 43 tokens, and return it."""
    folder.mkdir(exist_ok=True)
    tokens = ["<pad>", "<cls>", "<drug>", *GENES]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    tokenizer = TahoeX1Tokenizer(folder / "vocab.json", **options)
    tokenizer.save_pretrained(folder)
    return tokenizer
