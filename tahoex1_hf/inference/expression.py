# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Expression of genes that are hidden from the model, as its expression decoder predicts it."""

import numpy as np
import torch

from tahoex1_hf.encoding_tahoe_x1 import cell_streams, mix64
from tahoex1_hf.inference.encoder import CellEncoder, length_sorted_batches
from tahoex1_hf.padding_tahoe_x1 import EncodedCells


class ExpressionPredictor:
    """An expression decoder on top of a model that is made ready to embed cells.

    Args:
        encoder: Model and its batches.
        decoder: Expression decoder of the same model; it is moved to the encoder's device.

    Raises:
        ValueError: If the model's attention cannot take cells without padding, if its embeddings depend on padding, or
            if the encoder takes the output of another layer than the last, which the decoder does not read.
    """

    def __init__(self, encoder: CellEncoder, decoder: torch.nn.Module):
        config = encoder.config
        if config._attn_implementation != "sdpa":
            raise ValueError(
                f"expression with attn_implementation={config._attn_implementation!r}: load the model with "
                'attn_implementation="sdpa".'
            )
        if config.cell_pooling == "mean_with_padding":
            raise ValueError(
                'expression with cell_pooling="mean_with_padding": set model.config.cell_pooling = "mean", since '
                "cells are put together here without any padding."
            )
        if encoder.is_cut:
            raise ValueError(
                f"hidden_layer={encoder.hidden_layer}: expression is predicted from the output of the last layer; "
                "leave hidden_layer (--hidden-layer) out, or make two runs."
            )
        self.encoder, self.decoder = encoder, decoder.to(encoder.device).eval()
        # Scaled targets run from -1 to 1 over the bins 1 to num_bins - 1.
        self._scale = (config.num_bins - 2) / 2 if config.scale_targets else 1.0
        self._shift = self._scale + 1 if config.scale_targets else 0.0

    @torch.inference_mode()
    def predict(self, cells: EncodedCells, hidden: np.ndarray) -> np.ndarray:
        """Predict the expression of hidden genes, as in the model's training.

        Args:
            cells: Encoded cells.
            hidden: `(tokens,)` bool, the tokens whose expression is hidden from the model.

        Returns:
            `(tokens,)` float32 expression of the hidden tokens, in the tokenizer's unit (bins, or the logarithm of
            scaled counts); NaN elsewhere.

        Raises:
            ValueError: If a prediction is not finite.
        """
        predicted = np.full(len(hidden), np.nan, dtype=np.float32)
        device = self.encoder.device
        for rows in length_sorted_batches(cells.lengths, self.encoder.batch_tokens, padded=False):
            lengths = cells.lengths[rows]
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            index = np.repeat(cells.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
            if not hidden[index].any():
                continue
            drug_ids = None if cells.drug_ids is None else torch.from_numpy(cells.drug_ids[rows]).to(device)
            with self.encoder.precision():
                states = self.encoder.model(
                    torch.from_numpy(cells.input_ids[index]).to(device).unsqueeze(0),
                    torch.from_numpy(cells.expression_values[index]).to(device).unsqueeze(0),
                    target_mask=torch.from_numpy(hidden[index]).to(device).unsqueeze(0),
                    drug_ids=drug_ids,
                    cu_seq_lens_q=torch.from_numpy(offsets).to(device),
                ).last_hidden_state
                values = self.decoder(states)[0].float().cpu().numpy()
            predicted[index[hidden[index]]] = values[hidden[index]] * self._scale + self._shift
        if not np.isfinite(predicted[hidden]).all():
            raise ValueError(
                f"the model predicts NaN or infinite expression, in {self.encoder.dtype_name}: pass "
                'dtype="float32" (--dtype float32), or use another checkpoint.'
            )
        return predicted


def halves(cells: np.ndarray, tokens: np.ndarray, contents: np.ndarray, seed: int) -> np.ndarray:
    """Return 0 or 1 for each gene: its half of the cell, by a hash of seed, cell content and gene alone.

    Args:
        cells: `(genes,)` row number of each gene's cell.
        tokens: `(genes,)` token ids.
        contents: `(cells,)` uint64 content number of each cell.
        seed: Seed of the hash.
    """
    return (mix64(cell_streams(contents, seed)[cells] + tokens.astype(np.uint64)) & np.uint64(1)).astype(np.int64)
