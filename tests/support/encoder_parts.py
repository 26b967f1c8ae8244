"""As much of a tokenizer, and of tokenized cells, as a `CellEncoder` needs; weights of prepared layers."""

from collections.abc import Sequence

import numpy as np
import torch
from helpers import make_batch

from tahoex1_hf import TahoeX1Config
from tahoex1_hf.inference.prepared_layers import Product
from tahoex1_hf.padding_tahoe_x1 import EncodedCells


class Tokens(list):
    """As much of a tokenizer as an encoder asks for."""

    pad_token_id, pad_value = 0, -2.0

    def __init__(self, size: int) -> None:
        super().__init__(range(size))


def encoded(config: TahoeX1Config, lengths: Sequence[int]) -> EncodedCells:
    """Return cells of these numbers of tokens."""
    batch = make_batch(config, lengths, targets=False)
    valid = batch["attention_mask"].bool().numpy()
    drugs = batch["drug_ids"].numpy() if "drug_ids" in batch else None
    return EncodedCells(
        batch["input_ids"].numpy()[valid], batch["expression_values"].numpy()[valid],
        np.concatenate([[0], np.cumsum(lengths)]), drugs, np.arange(len(lengths)), np.zeros(0, int),
    )  # fmt: skip


def dense(product: Product) -> torch.Tensor:
    """Return the weight of a product as a usual tensor."""
    return product.weight.to_dense() if product.packed else product.weight
