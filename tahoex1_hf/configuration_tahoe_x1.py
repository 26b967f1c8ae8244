# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the Tahoe-x1 single-cell foundation models, and checks of their tokenizer's settings.

This file travels to the Hugging Face Hub beside the weights: it imports nothing but transformers.
"""

import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

Activation = Literal["relu", "leaky_relu", "gelu", "silu", "tanh", "sigmoid"]

# Choices among the settings of the tokenizer.
VALUE_ENCODINGS = ("bins", "log1p", "raw")
OVERFLOWS = ("sample", "first", "highest")
UNKNOWN_DRUGS = ("pad", "error")
# Its settings in the original's spelling, which would otherwise vanish among transformers' own keyword arguments.
_ORIGINAL_TOKENIZER_NAMES = {
    "max_length": "context_length",
    "n_bins": "num_bins",
    "sampling": "overflow",
    "do_binning": "value_encoding",
    "log_transform": "value_encoding",
}

# Sizes far above those of any model. Beyond them a damaged or hostile configuration would fill the memory, or build
# layers for hours, before anything else could be found wrong.
LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**17,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "intermediate_size": 2**20,
    "expression_decoder_layers": 2**8,
    "num_drugs": 2**24,
    "drug_fingerprint_size": 2**20,
    "num_bins": 2**20,
}

# Keys that transformers itself (or quantisation) stores in config.json without declaring them as fields.
_TRANSFORMERS_KEYS = frozenset(
    {
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation_internal",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "base_model_ep_plan",
        "base_model_fsdp_plan",
        "base_model_pp_plan",
        "base_model_tp_plan",
        "custom_pipelines",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "quantization_config",
        "tie_last_hidden_states",
        "torch_dtype",
        "use_cache",  # set by Trainer
    }
)


@strict
class TahoeX1Config(PreTrainedConfig):
    r"""Shape and behaviour of a Tahoe-x1 model. The defaults are the released 70M model.

    The original program's names `d_model`, `n_layers` and `n_heads` are accepted too. An unknown key is an error.

    Args:
        vocab_size (`int`, *optional*, defaults to 62720):
            Number of gene tokens, special tokens and fillers included.
        hidden_size (`int`, *optional*, defaults to 512):
            Width of the model, and of its cell and gene embeddings.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Number of transformer layers.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Number of attention heads.
        num_key_value_heads (`int`, *optional*, defaults to `num_attention_heads`):
            Number of key and value heads (grouped-query attention when smaller).
        intermediate_size (`int`, *optional*, defaults to `4 * hidden_size`):
            Width of the feed-forward block.
        hidden_act (`str`, *optional*, defaults to `"relu"`):
            Activation of the feed-forward block.
        use_glu (`bool`, *optional*, defaults to `False`):
            Gated feed-forward block: `down(act(gate(x)) * up(x))`.
        norm_position (`str`, *optional*, defaults to `"pre"`):
            `"pre"`: normalise the inputs of attention and feed-forward, and once more at the end;
            `"post"`: normalise after each residual sum.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the transformer's layer norms (those of the encoders always use 1e-5, as in the original).
        gene_encoder_norm (`bool`, *optional*, defaults to `True`):
            Layer norm after the gene embedding.
        expression_encoder_act (`str`, *optional*, defaults to `"relu"`):
            Activation of the expression encoder.
        expression_encoder_norm (`bool`, *optional*, defaults to `True`):
            Layer norm at the end of the expression encoder.
        expression_encoder_dropout (`float`, *optional*, defaults to 0.1):
            Dropout at the end of the expression encoder; the only dropout of the model.
        expression_max_value (`float`, *optional*, defaults to 512):
            Expression values are clipped to this maximum before they are encoded.
        num_drugs (`int`, *optional*, defaults to 0):
            Rows of the drug table, row 0 (no or unknown drug) included; 0 means that the model has no drug encoder.
        drug_fingerprint_size (`int`, *optional*, defaults to 2048):
            Bits of the Morgan fingerprints from which the drug table starts.
        drug_encoder_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the drug encoder.
        drug_token_id (`int`, *optional*):
            Id of the `<drug>` token, whose embedding is replaced by the drug encoder's output.
        expression_decoder_layers (`int`, *optional*, defaults to 1):
            Hidden layers of the expression decoder.
        expression_decoder_act (`str`, *optional*, defaults to `"leaky_relu"`):
            Activation of the expression decoder.
        cell_decoder_act (`str`, *optional*, defaults to `"sigmoid"`):
            Activation of the gene queries that predict expression from the cell embedding (the original's MVC).
        cell_decoder_scaled (`bool`, *optional*, defaults to `True`):
            Divide those predictions by `sqrt(hidden_size)`.
        cell_pooling (`str`, *optional*, defaults to `"cls"`):
            How a cell embedding is read from the last layer: `"cls"`, the `<cls>` token; `"mean"`, the mean over the
            cell's tokens; `"mean_with_padding"`, the original's `avg-pool`, which counts padding, so that an
            embedding depends on the length its batch was padded to. It is there to reproduce the original's numbers.
        attention_mask_style (`str`, *optional*, defaults to `"full"`):
            `"full"`: every token sees every token; `"observed_or_self"`: every token sees itself and the tokens whose
            expression is given, never another token that is to be predicted. Without such tokens both are the same.
        num_bins (`int`, *optional*, defaults to 51):
            Number of expression bins of the training targets, for `scale_targets`.
        scale_targets (`bool`, *optional*, defaults to `False`):
            Scale the targets from bins `1..num_bins-1` to `[-1, 1]` in the loss.
        pad_token_id (`int`, *optional*, defaults to 0):
            Id of the `<pad>` token.
        classifier_dropout (`float`, *optional*, defaults to 0.0):
            Dropout before the classifier of `TahoeX1ForSequenceClassification` and `TahoeX1ForTokenClassification`.
    """

    model_type = "tahoe_x1"
    attribute_map: ClassVar[dict[str, str]] = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
    }
    # Shard the embeddings and each layer on their own; the rest (final norm, decoders) is small.
    base_model_fsdp_plan: ClassVar[dict[str, str]] = {
        "embeddings": "free_full_weight",
        "layers.*": "free_full_weight",
    }

    vocab_size: int = 62720
    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    hidden_act: Activation = "relu"
    use_glu: bool = False
    norm_position: Literal["pre", "post"] = "pre"
    layer_norm_eps: float | int = 1e-5
    gene_encoder_norm: bool = True
    expression_encoder_act: Activation = "relu"
    expression_encoder_norm: bool = True
    expression_encoder_dropout: float | int = 0.1
    expression_max_value: float | int = 512
    num_drugs: int = 0
    drug_fingerprint_size: int = 2048
    drug_encoder_act: Activation = "gelu"
    drug_token_id: int | None = None
    expression_decoder_layers: int = 1
    expression_decoder_act: Activation = "leaky_relu"
    cell_decoder_act: Activation = "sigmoid"
    cell_decoder_scaled: bool = True
    cell_pooling: Literal["cls", "mean", "mean_with_padding"] = "cls"
    attention_mask_style: Literal["full", "observed_or_self"] = "full"
    num_bins: int = 51
    scale_targets: bool = False
    pad_token_id: int | None = 0
    classifier_dropout: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_unknown_keys(kwargs)
        for original_name, name in self.attribute_map.items():
            # Before the derived values below, which depend on them.
            if original_name in kwargs:
                setattr(self, name, kwargs.pop(original_name))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    def _refuse_unknown_keys(self, extra: dict[str, Any]) -> None:
        """Raise ValueError for unknown keys, such as misspelt options, which PreTrainedConfig would store silently."""
        unknown = sorted(set(extra) - _TRANSFORMERS_KEYS - set(self.attribute_map))
        if not unknown:
            return
        known = [*self.__dataclass_fields__, *self.attribute_map]
        close = [match for key in unknown for match in difflib.get_close_matches(key, known, n=2)]
        hint = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"TahoeX1Config has no option {', '.join(map(repr, unknown))}.{hint}")

    def validate_architecture(self) -> None:
        """Check the fields against each other (called by `@strict` at construction and before saving)."""
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if value is not None and value > largest:
                raise ValueError(f"{name} must be at most {largest}, got {value}: is the configuration damaged?")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})."
            )
        num_key_value_heads = self.num_key_value_heads if self.num_key_value_heads is not None else 1
        if num_key_value_heads < 1 or self.num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})."
            )
        if self.expression_decoder_layers < 0:
            raise ValueError(f"expression_decoder_layers must not be negative, got {self.expression_decoder_layers}.")
        if self.num_bins < 3:
            raise ValueError(f"num_bins must be at least 3, got {self.num_bins}.")
        for name in ("expression_encoder_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        if self.num_drugs < 0 or (self.num_drugs > 0 and self.drug_fingerprint_size < 1):
            raise ValueError(
                f"num_drugs ({self.num_drugs}) must not be negative, and drug_fingerprint_size "
                f"({self.drug_fingerprint_size}) must be positive."
            )
        if (self.num_drugs > 0) != (self.drug_token_id is not None):
            raise ValueError(
                f"num_drugs ({self.num_drugs}) and drug_token_id ({self.drug_token_id}) belong together: a model with "
                "a drug encoder needs the id of its <drug> token, one without has neither (0 and None)."
            )
        for name in ("pad_token_id", "drug_token_id"):
            token_id = getattr(self, name)
            if token_id is not None and not 0 <= token_id < self.vocab_size:
                raise ValueError(f"{name} ({token_id}) is outside the vocabulary of {self.vocab_size} tokens.")


__all__ = ["TahoeX1Config"]


def read_vocabulary(path: Any) -> dict[str, int]:
    """Read a `vocab.json`, or raise ValueError for what is none."""
    if not isinstance(path, (str, os.PathLike)) or not os.path.isfile(path):
        raise ValueError(f"vocab_file={path!r} is not a file: pass the path of the model's vocab.json.")
    try:
        with open(path, encoding="utf-8") as file:
            vocabulary = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"vocab_file={path!r} is damaged, or not JSON ({error}): copy it again.") from None
    good = isinstance(vocabulary, dict) and len(vocabulary) > 0
    if not good or not all(type(i) is int and 0 <= i < LARGEST["vocab_size"] for i in vocabulary.values()):
        raise ValueError(
            f"vocab_file={path!r} must hold a JSON object token -> id with ids from 0 to {LARGEST['vocab_size'] - 1}."
        )
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError(f"vocab_file={path!r} gives the same id to several tokens: each needs one of its own.")
    return vocabulary


def similar_names(name: Any, choices: Iterable[str]) -> str:
    """Return the close matches of a name, as the end of a sentence."""
    close = difflib.get_close_matches(str(name), [str(choice) for choice in choices])
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else "."


def refuse_misspelt_settings(kwargs: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise ValueError for options that transformers would silently accept; its own keyword arguments pass."""
    for name in kwargs:
        close = _ORIGINAL_TOKENIZER_NAMES.get(name) or next(
            iter(difflib.get_close_matches(name, options, cutoff=0.8)), None
        )
        if close is not None:
            raise ValueError(f"{name}= is not an option of TahoeX1Tokenizer: use {close}=.")


def check_tokenizer_settings(options: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting of the tokenizer that cannot work."""

    def require(name: str, good: bool, wanted: str) -> None:
        if not good:
            raise ValueError(f"{name}={options[name]!r}: pass {wanted}.")

    def is_int(value: Any, least: int) -> bool:
        return type(value) is int and value >= least

    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    require("value_encoding", options["value_encoding"] in VALUE_ENCODINGS, f"one of {VALUE_ENCODINGS}")
    require("overflow", options["overflow"] in OVERFLOWS, f"one of {OVERFLOWS}")
    require("num_bins", is_int(options["num_bins"], 3), "a whole number of at least 3")
    length = options["context_length"]
    require(
        "context_length", length is None or is_int(length, 3), "a whole number of at least 3, or None for whole cells"
    )
    require("target_sum", is_number(options["target_sum"]) and options["target_sum"] > 0, "a positive number")
    require("pad_value", is_number(options["pad_value"]) and options["pad_value"] < 0, "a negative number")
    for name in ("right_binning", "first_gene_raw"):
        require(name, type(options[name]) is bool, "True or False")
    require("unknown_drugs", options["unknown_drugs"] in UNKNOWN_DRUGS, f"one of {UNKNOWN_DRUGS}")
    table = options["drug_to_id"]
    if table is not None:
        good = isinstance(table, Mapping) and all(type(k) is str and is_int(v, 0) for k, v in table.items())
        require("drug_to_id", good and len(set(table.values())) == len(table), "a dict name -> id with distinct ids")
        require("drug_to_id", 0 in table.values(), "a table with id 0, for cells without a drug")
