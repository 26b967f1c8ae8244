# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Translate the settings of the original's checkpoints (`model_config.yml`, `collator_config.yml`) into ours.

Every key is either translated, or listed here as having no effect on what a trained model computes. Any other key is
an error, since dropping a setting silently would silently give a wrong model.
"""

import logging
from collections.abc import Mapping, Set
from typing import Any, Literal

from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config

logger = logging.getLogger(__name__)

# Keys that the original's code never reads, or that matter only to its training loop.
_MODEL_KEYS_WITHOUT_EFFECT = {
    "name",
    "init_device",
    "init_config",
    "precision",
    "wandb_id",
    "use_generative_training",
    "use_cell_conditioned_generation",
    "do_mlm",
    "return_gene_embeddings",
}
_ATTENTION_KEYS_WITHOUT_EFFECT = {
    "attn_impl",
    "attn_type",
    "kv_nheads",  # misspelt in every published config: the code reads kv_n_heads
    "attn_pdrop",
    "qk_ln",
    "qk_gn",
    "clip_qkv",
    "softmax_scale",
}
_COLLATOR_KEYS_WITHOUT_EFFECT = {
    "do_padding",
    "unexp_padding",  # a training option, never on at inference
    "do_mlm",
    "mlm_probability",
    "mask_value",
    "data_style",
    "use_junk_tokens",
    "reserve_keys",
    "drug_to_id_path",
    "return_tensors",
}


class _Section:
    """A mapping whose keys must all be taken, so that none is overlooked.

    Args:
        name: Name of the mapping for error messages.
        values: The mapping; None stands for an empty one.
    """

    def __init__(self, name: str, values: Mapping[str, Any] | None):
        self.name = name
        self.values = dict(values or {})

    def take(self, key: str, default: Any = None) -> Any:
        """Take and return the value of a key, or the default where the key is missing or null."""
        value = self.values.pop(key, default)
        return default if value is None else value

    def require(self, key: str) -> Any:
        """Take and return the value of a key that must be there."""
        if key not in self.values:
            raise ValueError(f"{self.name} lacks the key {key!r}.")
        return self.values.pop(key)

    def require_value(self, key: str, allowed: tuple[Any, ...], default: Any) -> None:
        """Take a key that is supported only at some values, and raise ValueError at any other."""
        value = self.take(key, default)
        if value not in allowed:
            raise ValueError(f"{self.name}: {key} = {value!r} is not supported, only {allowed} is.")

    def finish(self, without_effect: Set[str] = frozenset()) -> None:
        """Raise ValueError if a key is left that is not among those without effect."""
        unknown = sorted(self.values.keys() - without_effect)
        if unknown:
            raise ValueError(
                f"{self.name} has keys that this converter does not know: {', '.join(unknown)}. They may change the "
                "model, so it is not converted; please report them."
            )


def translate_model_config(
    model: Mapping[str, Any],
    collator: Mapping[str, Any],
    vocab: Mapping[str, int],
    drug_table: tuple[int, int] | None,
) -> TahoeX1Config:
    """Translate the settings of a model into a `TahoeX1Config`.

    Args:
        model: Contents of `model_config.yml`.
        collator: Contents of `collator_config.yml`.
        vocab: Contents of `vocab.json`.
        drug_table: Shape of `chem_encoder.embedding.weight` in the checkpoint; None without a drug encoder.

    Raises:
        ValueError: If a key is unknown or missing, or has a value that the original cannot run either.
    """
    section = _Section("model_config.yml", model)
    hidden_size = section.require("d_model")
    attention = _Section("model_config.yml: attn_config", section.take("attn_config"))
    norm, gene, expression, decoder, drug = (
        _Section(f"model_config.yml: {name}", section.take(name))
        for name in ("norm_config", "gene_encoder", "expression_encoder", "expression_decoder", "chemical_encoder")
    )
    cell_decoder = _Section("model_config.yml: mvc", section.require("mvc"))
    _refuse_unsupported(norm, expression, decoder, cell_decoder, gene, drug)
    _check_vocabulary_size(section.require("vocab_size"), vocab)

    num_heads = section.require("n_heads")
    config = TahoeX1Config(
        vocab_size=len(vocab),
        hidden_size=hidden_size,
        num_hidden_layers=section.require("n_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=attention.take("kv_n_heads", num_heads),
        intermediate_size=int(hidden_size * section.require("expansion_ratio")),
        hidden_act=section.take("transformer_activation", "gelu"),
        use_glu=section.take("use_glu", False),
        norm_position=section.take("norm_scheme", "pre"),
        layer_norm_eps=norm.take("eps", 1e-5),
        gene_encoder_norm=gene.take("use_norm", False),
        expression_encoder_act=expression.take("activation", "relu"),
        expression_encoder_norm=expression.take("use_norm", False),
        expression_encoder_dropout=expression.take("dropout", 0.1),
        expression_max_value=expression.take("max_value", 512),
        num_drugs=drug_table[0] if drug_table else 0,
        drug_fingerprint_size=drug_table[1] if drug_table else 2048,
        drug_encoder_act=drug.take("activation", "leaky_relu"),
        drug_token_id=_token_id(vocab, "<drug>") if drug_table else None,
        expression_decoder_layers=decoder.take("n_layers", 2),
        expression_decoder_act=decoder.take("activation", "leaky_relu"),
        cell_decoder_act=cell_decoder.require("query_activation"),
        cell_decoder_scaled=cell_decoder.take("scaled_dot_product", False),
        cell_pooling=_pooling(section),
        attention_mask_style="observed_or_self" if attention.take("use_attn_mask", True) else "full",
        num_bins=collator.get("num_bins", 51),
        scale_targets=section.take("standard_scale_outputs", False),
        pad_token_id=_token_id(vocab, "<pad>"),
    )
    drug.finish({"num_drugs", "fp_dim", "drug_fps_path"})  # the table's shape is read from the weights
    attention.finish(_ATTENTION_KEYS_WITHOUT_EFFECT)
    for part in (norm, gene, expression, decoder, cell_decoder):
        part.finish()
    section.finish(_MODEL_KEYS_WITHOUT_EFFECT)
    return config


def translate_collator_config(
    collator: Mapping[str, Any], vocab: Mapping[str, int], drug_to_id: Mapping[str, int] | None
) -> dict[str, Any]:
    """Translate the settings of a collator into the arguments of `TahoeX1Tokenizer`, except `vocab_file`.

    Args:
        collator: Contents of `collator_config.yml`.
        vocab: Contents of `vocab.json`.
        drug_to_id: Contents of `drug_to_id_pad.json`; None where the checkpoint lacks that file.

    Raises:
        ValueError: If a key is unknown or missing, or has a value that contradicts the rest.
    """
    section = _Section("collator_config.yml", collator)
    bins, log1p = section.take("do_binning", True), section.take("log_transform", False)
    uses_drugs = section.take("use_chem_token", False)
    num_special = section.take("keep_first_n_tokens", 1)
    if num_special != (2 if uses_drugs else 1):
        raise ValueError(
            f"collator_config.yml: keep_first_n_tokens = {num_special} does not fit use_chem_token = {uses_drugs}."
        )
    pad_token_id = section.require("pad_token_id")
    if pad_token_id != _token_id(vocab, "<pad>"):
        raise ValueError(f"collator_config.yml: pad_token_id = {pad_token_id}, but <pad> is {vocab['<pad>']}.")
    arguments = {
        "value_encoding": "bins" if bins else "log1p" if log1p else "raw",
        "num_bins": section.take("num_bins", 51),
        "right_binning": section.take("right_binning", False),
        "target_sum": float(section.take("target_sum", 10000)),
        "context_length": section.require("max_length"),
        "overflow": "sample" if section.take("sampling", True) else "first",
        "pad_value": float(section.require("pad_value")),
        "drug_to_id": dict(drug_to_id) if uses_drugs and drug_to_id is not None else None,
    }
    section.finish(_COLLATOR_KEYS_WITHOUT_EFFECT)
    return arguments


def _refuse_unsupported(
    norm: _Section, expression: _Section, decoder: _Section, cell_decoder: _Section, gene: _Section, drug: _Section
) -> None:
    """Take the keys of which the original, or its checkpoints, use only some values, and refuse other values."""
    for part, key, allowed in (
        (norm, "norm_type", ("low_precision_layernorm", "layernorm")),
        (expression, "input_emb_style", ("continuous",)),
        (decoder, "n_outputs", (1,)),
        (cell_decoder, "arch_style", ("inner product",)),
        (gene, "embeddings", ({},)),
        (drug, "padding_idx", (0,)),
    ):
        part.require_value(key, allowed, allowed[0])
    if drug.take("freeze", False):
        logger.warning("The drug table was frozen in training (chemical_encoder.freeze); ours is trainable.")


def _pooling(section: _Section) -> Literal["cls", "mean_with_padding"]:
    pooling = section.take("cell_emb_style", "cls")
    if pooling not in ("cls", "avg-pool"):
        raise ValueError(
            f"{section.name}: cell_emb_style = {pooling!r} is not supported: only 'cls' and 'avg-pool' are "
            "('w-pool' cannot run in the original either)."
        )
    return "cls" if pooling == "cls" else "mean_with_padding"


def _token_id(vocab: Mapping[str, int], token: str) -> int:
    if token not in vocab:
        raise ValueError(f"vocab.json lacks the token {token}.")
    return vocab[token]


def _check_vocabulary_size(declared: int, vocab: Mapping[str, int]) -> None:
    if declared != len(vocab):
        raise ValueError(f"model_config.yml: vocab_size = {declared}, but vocab.json has {len(vocab)} tokens.")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"The ids of vocab.json are not the numbers 0 to {len(vocab) - 1}, each once.")
