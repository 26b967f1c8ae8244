# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Scores of cells in an embedding run."""

from tahoex1_hf.hub.models import expression_decoder
from tahoex1_hf.inference.encoder import CellEncoder
from tahoex1_hf.inference.expression import ExpressionPredictor
from tahoex1_hf.inference.scoring import CellScorer
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1PreTrainedModel


def scorer_of(encoder: CellEncoder, model: TahoeX1PreTrainedModel, masks: int, seed: int) -> CellScorer | None:
    """Return a scorer of cells; None for no masks.

    Args:
        encoder: Encoder that runs the model.
        model: Model with its expression decoder.
        masks: Number of masks; 0 for no scores.
        seed: Seed of the masks.

    Raises:
        ValueError: For a model without the decoder, or one that cannot predict (see `ExpressionPredictor`).
    """
    if not masks:
        return None
    return CellScorer(ExpressionPredictor(encoder, expression_decoder(model)), masks, seed)
