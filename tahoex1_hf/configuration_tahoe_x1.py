# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the Tahoe-x1 single-cell foundation models, and checks of their tokenizer's settings.

Also what `trust_remote_code` needs: the names of the files that travel to the Hugging Face Hub beside the weights, and
of the classes in them. This file is one of them: it imports nothing but transformers.
"""

import copy
import difflib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

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
    }
)
# Keys that earlier versions of transformers wrote into every config.json, or that Trainer sets. They are kept, and
# `from_pretrained` takes them as keyword arguments, as it does for models that declare them; ours reads none of them.
_LEGACY_KEYS = frozenset(
    {
        "add_cross_attention",
        "cross_attention_hidden_size",
        "finetuning_task",
        "initializer_range",
        "is_decoder",
        "keys_to_ignore_at_inference",
        "prefix",
        "pruned_heads",
        "task_specific_params",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tie_word_embeddings",
        "tokenizer_class",
        "torchscript",
        "use_bfloat16",
        "use_cache",
    }
)

# What `trust_remote_code` reads: the files, and the classes in them.
PIPELINE_FILE = "pipeline_tahoe_x1.py"
CODE_FILES = (
    "configuration_tahoe_x1.py",
    "encoding_tahoe_x1.py",
    "inputs_tahoe_x1.py",
    "modeling_tahoe_x1.py",
    "observed_attention_tahoe_x1.py",
    "packing_tahoe_x1.py",
    "padding_tahoe_x1.py",
    PIPELINE_FILE,
    "tokenization_tahoe_x1.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_tahoe_x1.TahoeX1Config",
    "AutoModel": "modeling_tahoe_x1.TahoeX1Model",
    "AutoModelForPreTraining": "modeling_tahoe_x1.TahoeX1ForPreTraining",
    "AutoModelForSequenceClassification": "modeling_tahoe_x1.TahoeX1ForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_tahoe_x1.TahoeX1ForTokenClassification",
}
TOKENIZER_AUTO_MAP = {"AutoTokenizer": ["tokenization_tahoe_x1.TahoeX1Tokenizer", None]}  # slow, fast
CELL_EMBEDDING = "cell-embedding"  # the task of our pipeline
CUSTOM_PIPELINES = {
    CELL_EMBEDDING: {
        "impl": "pipeline_tahoe_x1.TahoeX1CellEmbeddingPipeline",
        "pt": ["AutoModel"],
        "type": "multimodal",
    }
}


def copy_code(folder: str | os.PathLike) -> list[str]:
    """Copy the files that travel into a folder, and return their paths."""
    here, paths = Path(__file__).parent, []
    for name in CODE_FILES:
        # Code that was itself loaded from the Hub lacks the files that no class in use has imported.
        if (here / name).is_file():
            paths.append(shutil.copyfile(here / name, Path(folder) / name))
    return [str(path) for path in paths]


def names_our_code(auto_map: Any) -> bool:
    """Return whether an `auto_map` names classes in files that must lie beside it, and not in another repository."""
    classes = list(auto_map.values()) if isinstance(auto_map, Mapping) else []
    names = [name[0] if isinstance(name, (list, tuple)) and name else name for name in classes]
    return any(isinstance(name, str) and f"{name.partition('.')[0]}.py" in CODE_FILES for name in names)


class TravelsWithCode:
    """Lets `save_pretrained` and `push_to_hub` of models and tokenizers add the code for `trust_remote_code`."""

    def save_pretrained(self, save_directory: Any, *args: Any, with_code: bool = False, **kwargs: Any) -> Any:
        """Save as transformers does.

        Args:
            save_directory: Folder to write into.
            with_code: Whether to add the code, with which the Auto classes load the folder where this package is not
                installed, given `trust_remote_code=True`.
            *args: As in transformers.
            **kwargs: As in transformers.
        """
        with self._naming_code(with_code):
            return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def push_to_hub(self, repo_id: str, *args: Any, with_code: bool = False, **kwargs: Any) -> Any:
        """Upload as transformers does; `with_code` as for `save_pretrained`."""
        with self._naming_code(with_code):
            return super().push_to_hub(repo_id, *args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def _naming_code(self, wanted: bool) -> Iterator[None]:
        """Name the classes in what is saved meanwhile; who saves such names copies the files."""
        holder, names = self._code_names()
        before = {name: vars(holder).get(name) for name in names}
        vars(holder).update(names if wanted else {})
        try:
            yield
        finally:
            for name, value in before.items() if wanted else ():
                if value is None:
                    vars(holder).pop(name, None)
                else:
                    vars(holder)[name] = value

    def _code_names(self) -> tuple[Any, dict[str, Any]]:
        """Return what the names are attributes of, and the names: of a model, its configuration's."""
        return self.config, copy.deepcopy({"auto_map": AUTO_MAP, "custom_pipelines": CUSTOM_PIPELINES})  # type: ignore[attr-defined]


@strict
class TahoeX1Config(PreTrainedConfig):
    r"""Shape and behaviour of a Tahoe-x1 model. The defaults are the released 70M model.

    The original program's names `d_model`, `n_layers` and `n_heads` are accepted too. A key that looks like a misspelt
    one of these is an error; any other is kept, as in transformers. In a file, unknown keys are warned of, and kept.

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
        refuse_misspelt_keys(type(self), kwargs, cutoff=0.75)
        for original_name, name in self.attribute_map.items():
            # Before the derived values below, which depend on them.
            if original_name in kwargs:
                setattr(self, name, kwargs.pop(original_name))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if isinstance(self.dtype, str):
            self.dtype = self.dtype.removeprefix("torch.")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration of what a config.json holds; keys that nobody knows are kept, with one warning.

        Args:
            config_dict: Content of the file.
            **kwargs: Keys that replace those of the file, and `return_unused_kwargs`, as in transformers.

        Raises:
            ValueError: For keyword arguments that look like misspelt keys.
        """
        refuse_misspelt_keys(cls, kwargs, cutoff=0.8)
        legacy = {name: kwargs.pop(name) for name in list(kwargs) if name in _LEGACY_KEYS or _is_token_id(cls, name)}
        unknown = {name: value for name, value in config_dict.items() if not _is_known(cls, name)}
        known = {name: value for name, value in config_dict.items() if name not in unknown}
        made = super().from_dict(known | legacy, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        for name, value in unknown.items():
            if not hasattr(cls, name):  # or it would hide a method
                setattr(config, name, value)
        if unknown:
            hints = {name: close for name in unknown if (close := _close_keys(cls, name, 0.75))}
            also = "".join(f" Is {name!r} meant to be {close[0]!r}?" for name, close in hints.items())
            where = f" of {config.name_or_path}" if config.name_or_path else ""
            logger.warning_once(f"The configuration{where} has keys that nothing reads: {sorted(unknown)}.{also}")
        return made

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> Any:
        """Make a configuration of a config.json, as `from_dict` does."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, and beside it the code, where the configuration names its classes."""
        pipelines = vars(self).get("custom_pipelines")
        if names_our_code(getattr(self, "auto_map", None)):
            os.makedirs(save_directory, exist_ok=True)
            copy_code(save_directory)
            if not (Path(save_directory) / PIPELINE_FILE).is_file():  # code of the Hub that imported no pipeline
                vars(self).pop("custom_pipelines", None)
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            if pipelines is not None:
                self.custom_pipelines = pipelines

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


def _own_keys(config_class: type[TahoeX1Config]) -> set[str]:
    """Return the keys that are ours, or the original's names for them."""
    return {*config_class.__dataclass_fields__, *config_class.attribute_map}


def _is_token_id(config_class: type[TahoeX1Config], name: str) -> bool:
    """Return whether a key is the id of a special token that other models have, such as `eos_token_id`."""
    return name.endswith("_token_id") and name not in _own_keys(config_class)


def _is_known(config_class: type[TahoeX1Config], name: str) -> bool:
    """Return whether a key is ours or one that transformers writes."""
    if name in _own_keys(config_class) | _TRANSFORMERS_KEYS | _LEGACY_KEYS:
        return True
    if name in GenerationConfig._get_default_generation_params():  # written by transformers 4; version 5 drops them
        return True
    # `mask_token_id` is written by transformers, `durg_token_id` by nobody.
    return _is_token_id(config_class, name) and not _close_keys(config_class, name, 0.9)


def _close_keys(config_class: type[TahoeX1Config], name: str, cutoff: float) -> list[str]:
    own = _own_keys(config_class) - set(PreTrainedConfig.__dataclass_fields__)
    return difflib.get_close_matches(name, own, n=2, cutoff=cutoff)


def refuse_misspelt_keys(config_class: type[TahoeX1Config], given: Iterable[str], cutoff: float) -> None:
    """Raise ValueError for keys like ours, which PreTrainedConfig would store, or leave out, without a word."""
    close = {name: _close_keys(config_class, name, cutoff) for name in given if not _is_known(config_class, name)}
    if any(close.values()):
        wrong = ", ".join(repr(name) for name, keys in close.items() if keys)
        hint = ", ".join(dict.fromkeys(repr(key) for keys in close.values() for key in keys))
        raise ValueError(f"TahoeX1Config has no option {wrong}. Did you mean {hint}?")


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
    require("num_bins", options["num_bins"] <= LARGEST["num_bins"], f"at most {LARGEST['num_bins']}")
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
