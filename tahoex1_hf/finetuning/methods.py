# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Methods of fine-tuning: train low-rank adapters and the head, the head alone, or all weights.

All methods except `full` leave the weights of the base as they are, and PEFT saves their adapters and the whole head
in a few MB.
"""

import importlib.util
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

from tahoex1_hf.finetuning.config import FinetuneConfig
from tahoex1_hf.hub.adapter_weights import without_warnings_of_old_names
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ExpressionEncoder

if TYPE_CHECKING:
    from peft import PeftModel

# Linear layers that get adapters: the projections of attention and feed-forward blocks. PEFT's "all-linear" would also
# adapt the decoders and the encoder of expression values, whose layers have one input.
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Further layers that drug response adapts: those of the drug encoder.
DRUG_MODULES = ["drug_encoder.linear1", "drug_encoder.linear2"]
# Heads of the tasks, which are trained and saved whole. Masked expression keeps the decoders of the base as they are.
HEADS: dict[str, list[str]] = {
    "masked_expression": [],
    "classification": ["classifier"],
    "regression": ["classifier"],
    "gene_classification": ["classifier"],
    "drug_response": ["cell_decoder"],
}
# PEFT's name for a task, which decides the Auto class that loads the base of an adapter.
_TASK_TYPES = {"classification": "SEQ_CLS", "regression": "SEQ_CLS", "gene_classification": "TOKEN_CLS"}
LOW_RANK = ("lora", "dora", "rslora", "qlora")


def adapt(model: PreTrainedModel, config: FinetuneConfig) -> "PreTrainedModel | PeftModel":
    """Make a model ready for a method.

    Args:
        model: Model with the head of the task; its weights are not changed.
        config: Configuration of the run.

    Returns:
        A PEFT model around `model`; for `full`, `model` itself. Only the parameters to train require gradients.

    Raises:
        ValueError: For target modules that the model does not have.
    """
    if config.method == "full":
        return model.requires_grad_(True)
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES

    if config.method == "qlora":
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    low_rank = config.method in LOW_RANK
    settings = LoraConfig(
        task_type=_TASK_TYPES.get(config.task),
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it by the rank, whole or not
        lora_dropout=config.lora_dropout,
        use_dora=config.method == "dora",
        use_rslora=config.method == "rslora",
        target_modules=target_modules(model, config) if low_rank else DUMMY_TARGET_MODULES,
        modules_to_save=list(HEADS[config.task]) or None,
    )
    with without_warnings_of_old_names():
        return get_peft_model(model, settings)


def target_modules(model: torch.nn.Module, config: FinetuneConfig) -> list[str]:
    """Return the names of the layers that get adapters: those asked for, or those of `TARGET_MODULES` that exist.

    Raises:
        ValueError: For a name that is not a linear layer of the model.
    """
    linear = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    if config.target_modules is None:
        usual = [name for name in TARGET_MODULES if name in linear]
        return [*usual, *DRUG_MODULES] if config.task == "drug_response" else usual
    unknown = sorted(name for name in set(config.target_modules) if name.rpartition(".")[2] not in linear)
    if unknown or not config.target_modules:
        raise ValueError(
            f"target_modules={config.target_modules}: {', '.join(unknown) or 'none'} is not a linear layer of the "
            f"model, which has {', '.join(sorted(linear))}."
        )
    return list(config.target_modules)


def set_dropout(model: torch.nn.Module, config: FinetuneConfig) -> None:
    """Set the dropout of the expression encoder for training, without changing the model's configuration.

    Embeddings of cells differ by little, so that a fitted head has large weights. It was fitted without dropout, and
    with dropout the noise exceeds the differences: on heart nuclei, the loss at the first step is 7.3 instead of 1.4.
    """
    dropout = config.expression_encoder_dropout
    if dropout is None:
        if not config.starts_from_probe:
            return
        dropout = 0.0
    for layer in model.modules():
        if isinstance(layer, TahoeX1ExpressionEncoder):
            layer.dropout.p = dropout


def trainable_parameters(model: torch.nn.Module) -> int:
    """Return the number of parameters that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def trained_head(model: Any) -> torch.nn.Linear:
    """Return the linear classifier that is trained, which with PEFT is a copy of the model's."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    head = inner.classifier
    return cast(torch.nn.Linear, head.modules_to_save["default"] if inner is not model else head)


def quantization(config: FinetuneConfig) -> dict[str, Any]:
    """Return arguments of `from_pretrained` that quantise the base for `qlora`; none for other methods.

    Raises:
        ValueError: If there is no CUDA device, or neither bitsandbytes nor torchao.
    """
    if config.method != "qlora":
        return {}
    if not torch.cuda.is_available():
        raise ValueError("method=qlora needs a CUDA device, and there is none here: use method=lora.")
    if importlib.util.find_spec("bitsandbytes") is not None:
        return {"quantization_config": bitsandbytes_config()}
    if importlib.util.find_spec("torchao") is not None:
        return {"quantization_config": torchao_config()}
    raise ValueError("method=qlora needs bitsandbytes or torchao: pip install bitsandbytes, or use method=lora.")


def bitsandbytes_config() -> Any:
    """Return settings that quantise weights to NF4 and their scales to 8 bits.

    QLoRA does the same (Dettmers et al. 2023, arXiv:2305.14314).
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=SKIPPED,
    )


def torchao_config() -> Any:
    """Return settings that quantise the projections' weights to 8 bits, the only torchao layers that PEFT adapts."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=SKIPPED)


# Small layers that stay in full precision: token encoders, decoders, heads. Names are compared from their beginning.
SKIPPED = ["tahoe.embeddings", "expression_decoder", "cell_decoder", "classifier"]
