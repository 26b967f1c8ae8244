# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The model that fine-tuning starts from, and its tokenizer."""

import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers.utils import logging

from tahoex1_hf.finetuning.config import FinetuneConfig
from tahoex1_hf.finetuning.methods import quantization
from tahoex1_hf.hub.loading import find_model, load_folder
from tahoex1_hf.hub.loading import load_tokenizer as read_tokenizer
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1PreTrainedModel
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

# Beginnings of the names of weights that a pretrained checkpoint does not have.
NEW_HEADS = ("classifier.", "head.")

Model = TypeVar("Model", bound=TahoeX1PreTrainedModel)


def load_tokenizer(config: FinetuneConfig) -> TahoeX1Tokenizer:
    """Load the base's tokenizer, with the context length of the run."""
    changes = {} if config.context_length is None else {"context_length": config.context_length}
    return read_tokenizer(find_model(config.model, size=config.size), **changes)


def load_base(config: FinetuneConfig, model_class: type[Model], **options: Any) -> Model:
    """Load the base with the head of a task; a head that the checkpoint lacks gets random weights from `config.seed`.

    Args:
        config: Configuration of the run; with `method=qlora`, the base's weights are quantised.
        model_class: Class of the model with the head.
        **options: Options of `TahoeX1Config`: `num_labels`, `id2label` and the like.

    Raises:
        ValueError: For `qlora` where the hardware or a library is missing; for a checkpoint that lacks more than the
            head, or is wrong otherwise (see `load_whole`), or whose pooling counts padding.
    """
    options |= quantization(config)
    folder = find_model(config.model, size=config.size)
    if not os.isatty(2):
        logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model: Model = load_folder(
            folder, model_class, NEW_HEADS, dtype=torch.float32, attn_implementation=config.attention, **options
        )
    if model.config.cell_pooling == "mean_with_padding":
        raise ValueError(
            f'model={config.model}: cell_pooling="mean_with_padding" makes a cell depend on the batch it is in. Set '
            '"cell_pooling": "mean" in its config.json and train on that.'
        )
    return model


def base_name(config: FinetuneConfig) -> str:
    """Return how an adapter names its base: the id on the Hub, or the absolute path of a folder."""
    return str(Path(config.model).resolve()) if Path(config.model).exists() else config.model
