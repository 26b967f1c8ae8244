"""Write a converted checkpoint in the layout that the original program loads."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from tahoex1_hf.common.finite_tensors import check_finite
from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
from tahoex1_hf.original.config import translate_collator_config, translate_model_config
from tahoex1_hf.original.files import COLLATOR_CONFIG, DRUG_TABLE, MODEL_CONFIG, PICKLE, SAFETENSORS, VOCAB
from tahoex1_hf.original.finished import finished_conversion
from tahoex1_hf.original.tensor_names import check_tensors, in_original_names, our_shapes
from tahoex1_hf.original.verify import (
    Verification,
    compare_tensors,
    count_parameters,
    weights_file,
    write_manifest,
)
from tahoex1_hf.original.weights import TensorReader, open_weights, without_wrappers
from tahoex1_hf.original.writing import describe_files, workspace
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.getLogger(__name__)


def restore_original_folder(
    source: str | Path, destination: str | Path, *, dtype: torch.dtype | None = None
) -> Verification:
    """Write a converted checkpoint in the original's layout, with the weights bit for bit unless `dtype` is given.

    The weights are written twice, as `model.safetensors` (as published on the Hub) and `best-model.pt` (what the
    original's `load_model` opens).

    Args:
        source: Converted folder, with the weights of `TahoeX1ForPreTraining`.
        destination: Folder to make.
        dtype: Type of the tensors; by default the source's.

    Returns:
        The verification. If `destination` holds exactly that checkpoint already, nothing is done.

    Raises:
        FileExistsError: If `destination` exists and is neither an empty folder nor that checkpoint.
        FileNotFoundError: If a file is missing; the message names it.
        ValueError: If the original has no setting for a property of the model or its tokenizer.
    """
    source, destination = Path(source), Path(destination)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} has no config.json: pass a converted folder.")
    config, tokenizer = TahoeX1Config.from_pretrained(source), TahoeX1Tokenizer.from_pretrained(source)
    weights = without_wrappers(open_weights(weights_file(source)))
    check_tensors(weights.shapes, our_shapes(config), f"{source} (TahoeX1ForPreTraining)")
    model_settings, collator_settings = restore_settings(config, tokenizer)
    read = {path.name: path for path in (source / "config.json", *weights.files)}
    done = finished_conversion(destination, read, dtype or next(iter(weights.dtypes.values())))
    if done is not None:
        return done
    check_finite(((name, weights.read(name)) for name in weights.shapes), str(weights.files[0]))
    with workspace(destination) as folder:
        result = folder / "result"
        _write_weights(weights, config, result, dtype)
        _write_settings(result, model_settings, collator_settings, tokenizer)
        restored = open_weights(result / SAFETENSORS)
        compare_tensors(open_weights(result / PICKLE), weights, config)
        if dtype is None:
            compare_tensors(restored, weights, config)
        count, size = count_parameters(weights, config)
        how = "equal bit for bit" if dtype is None else "equal after rounding"
        verification = Verification(count, size, len(restored.shapes), how, {})
        written_type = dtype or next(iter(restored.dtypes.values()))
        write_manifest(result, source.resolve().name, describe_files(read), written_type, verification)
    logger.info("%s", verification.summary())
    return verification


def restore_settings(config: TahoeX1Config, tokenizer: TahoeX1Tokenizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the contents of `model_config.yml` and `collator_config.yml` for a model and its tokenizer.

    Raises:
        ValueError: If the original lacks a setting; the message names it.
    """
    model, collator = _model_settings(config), _collator_settings(config, tokenizer)
    vocab, drugs = tokenizer.get_vocab(), tokenizer.drug_to_id
    if tokenizer.num_bins != config.num_bins:
        raise ValueError(
            f"The tokenizer has num_bins={tokenizer.num_bins}, the model {config.num_bins}: the original has one "
            "setting for both, so make them equal."
        )
    # Translating forward again proves that nothing was lost.
    drug_table = (config.num_drugs, config.drug_fingerprint_size) if config.num_drugs else None
    again = translate_model_config(model, collator, vocab, drug_table)
    # A classifier's dropout is not part of the pretrained model.
    fields = [name for name in TahoeX1Config.__annotations__ if name in TahoeX1Config.__dataclass_fields__]
    fields.remove("classifier_dropout")
    if not config.num_drugs:  # then these have no meaning
        fields = [name for name in fields if name not in ("drug_encoder_act", "drug_fingerprint_size")]
    changed = [name for name in fields if getattr(again, name) != getattr(config, name)]
    arguments = translate_collator_config(collator, vocab, drugs)
    changed += [name for name, value in arguments.items() if value != getattr(tokenizer, name)]
    if changed:
        raise ValueError(f"The original has no setting that means the same as ours for {', '.join(changed)}.")
    return model, collator


def _model_settings(config: TahoeX1Config) -> dict[str, Any]:
    if config.cell_pooling == "mean":
        raise ValueError(
            'The original has no cell_pooling="mean": its mean counts padding. Set config.cell_pooling to "cls" or '
            '"mean_with_padding" first.'
        )
    masked = config.attention_mask_style == "observed_or_self"
    settings: dict[str, Any] = {
        "name": "tahoe_x1",
        "d_model": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "expansion_ratio": _expansion_ratio(config),
        "vocab_size": config.vocab_size,
        "init_device": "cpu",
        "precision": "fp32",
        "standard_scale_outputs": config.scale_targets,
        "transformer_activation": config.hidden_act,
        "norm_scheme": config.norm_position,
        "use_glu": config.use_glu,
        "use_generative_training": False,
        "use_cell_conditioned_generation": False,
        "cell_emb_style": "cls" if config.cell_pooling == "cls" else "avg-pool",
        "attn_config": {
            # For the original's load_model, "triton" means "trained with the mask, run without it".
            "attn_impl": "triton" if masked else "flash",
            "attn_type": "grouped_query_attention",
            "kv_n_heads": config.num_key_value_heads,
            "attn_pdrop": 0.0,
            "use_attn_mask": masked,
        },
        "norm_config": {"norm_type": "low_precision_layernorm", "eps": config.layer_norm_eps},
        "expression_encoder": {
            "input_emb_style": "continuous",
            "dropout": config.expression_encoder_dropout,
            "max_value": config.expression_max_value,
            "activation": config.expression_encoder_act,
            "use_norm": config.expression_encoder_norm,
        },
        "gene_encoder": {"use_norm": config.gene_encoder_norm},
        "mvc": {
            "arch_style": "inner product",
            "query_activation": config.cell_decoder_act,
            "scaled_dot_product": config.cell_decoder_scaled,
        },
        "expression_decoder": {
            "n_outputs": 1,
            "n_layers": config.expression_decoder_layers,
            "activation": config.expression_decoder_act,
        },
    }
    if config.num_drugs:
        settings["chemical_encoder"] = {
            "activation": config.drug_encoder_act,
            "padding_idx": 0,
            "freeze": False,
            "num_drugs": config.num_drugs,
            "fp_dim": config.drug_fingerprint_size,
        }
    return settings


def _collator_settings(config: TahoeX1Config, tokenizer: TahoeX1Tokenizer) -> dict[str, Any]:
    if tokenizer.overflow == "highest":
        raise ValueError(
            'The original has no overflow="highest": set the tokenizer\'s overflow to "sample" or "first".'
        )
    settings: dict[str, Any] = {
        "do_padding": True,
        "pad_token_id": config.pad_token_id,
        "pad_value": tokenizer.pad_value,
        "do_mlm": True,
        "mlm_probability": 0.5,
        "mask_value": -1,
        "do_binning": tokenizer.value_encoding == "bins",
        "log_transform": tokenizer.value_encoding == "log1p",
        "target_sum": tokenizer.target_sum,
        "num_bins": config.num_bins,
        "right_binning": tokenizer.right_binning,
        "max_length": tokenizer.context_length,
        "sampling": tokenizer.overflow == "sample",
        "data_style": "both",
        "use_junk_tokens": False,
        "use_chem_token": bool(config.num_drugs),
        "keep_first_n_tokens": 2 if config.num_drugs else 1,
    }
    if config.num_drugs:
        # The original downloads "remote" to "local" where it can, replacing it, and otherwise reads "local" in the
        # folder in which it runs.
        settings["drug_to_id_path"] = {"remote": f"s3://invalid/{DRUG_TABLE}", "local": DRUG_TABLE}
    return settings


def _expansion_ratio(config: TahoeX1Config) -> float | int:
    width = config.intermediate_size or 4 * config.hidden_size
    if width % config.hidden_size == 0:
        return width // config.hidden_size
    ratio = width / config.hidden_size
    return ratio if int(config.hidden_size * ratio) == width else math.nextafter(ratio, math.inf)


def _write_weights(weights: TensorReader, config: TahoeX1Config, folder: Path, dtype: torch.dtype | None) -> None:
    tensors = dict(in_original_names(config, weights.read))
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(tensors, folder / SAFETENSORS, metadata={"format": "pt"})  # one file, since the original reads only one
    written = open_weights(folder / SAFETENSORS)
    # These are views of the file just written: none of them is in memory.
    torch.save({"state": {"model": {name: written.read(name) for name in written.shapes}}}, folder / PICKLE)


def _write_settings(
    folder: Path, model: dict[str, Any], collator: dict[str, Any], tokenizer: TahoeX1Tokenizer
) -> None:
    for name, settings in ((MODEL_CONFIG, model), (COLLATOR_CONFIG, collator)):
        (folder / name).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    (folder / VOCAB).write_text(json.dumps(tokenizer.get_vocab()), encoding="utf-8")
    if tokenizer.drug_to_id is not None:
        (folder / DRUG_TABLE).write_text(json.dumps(tokenizer.drug_to_id), encoding="utf-8")
    elif model.get("chemical_encoder"):
        logger.warning(
            "The tokenizer knows no drug by name, so %s is not written: the original needs it to run with drugs.",
            DRUG_TABLE,
        )
