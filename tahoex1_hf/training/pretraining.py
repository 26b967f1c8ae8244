# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Pretrain a model, from the configuration of the run to the final weights."""

import copy
import json
import logging
import os
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments, set_seed
from transformers.utils.logging import disable_progress_bar

from tahoex1_hf.common.cuda_memory import let_segments_grow
from tahoex1_hf.common.processes import training_processes
from tahoex1_hf.common.reading import reading
from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
from tahoex1_hf.data.collator import CellCollator
from tahoex1_hf.data.feeding import CellBatches
from tahoex1_hf.hub.loading import find_model, load_folder, load_tokenizer
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForPreTraining, TahoeX1Layer
from tahoex1_hf.runs.arguments import run_arguments
from tahoex1_hf.runs.preemption import PREEMPTED
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer
from tahoex1_hf.training.baselines import baseline_losses
from tahoex1_hf.training.config import PretrainConfig
from tahoex1_hf.training.curve import draw_curve
from tahoex1_hf.training.evaluation import CellTypeEvaluation, GeneEssentialityEvaluation
from tahoex1_hf.training.monitors import SpeedMonitor, SpikeWarning, UntrainedWarning, peak_flops
from tahoex1_hf.training.run_card import card_facts, write_facts
from tahoex1_hf.training.run_folder import RunFolder, computed_in
from tahoex1_hf.training.stream import StepBatches, ValidationBatches, training_cells
from tahoex1_hf.training.trainer import PretrainingTrainer

logger = logging.getLogger(__name__)

# Options of TahoeX1Config that may differ from those of the initial weights: none changes a tensor's shape.
_CHANGEABLE = {"attention_mask_style", "expression_encoder_dropout", "scale_targets", "cell_pooling"}
_VALIDATION_BATCH = 32


def make_tokenizer(config: PretrainConfig) -> TahoeX1Tokenizer:
    """Return the tokenizer of the initial weights, or a new one with the dataset's vocabulary.

    Raises:
        ValueError: If the recipe asks for other values than those for which the tokenizer was made.
    """
    source = config.tokenizer or config.init_from
    rule = config.unknown_drugs
    if source is not None:
        given = load_tokenizer(find_model(source), unknown_drugs=rule)
        if config.value_encoding not in (None, given.value_encoding):
            raise ValueError(
                f"value_encoding={config.value_encoding}: the tokenizer of {source} has {given.value_encoding}. "
                "Leave the key out; other values need a new tokenizer."
            )
        return given
    import fsspec

    table = json.loads(Path(config.drug_table).read_text(encoding="utf-8")) if config.drug_table else None
    location = f"{config.datasets[0].rstrip('/')}/vocab.json"
    vocab = location
    if "://" in location:
        vocab = fsspec.open_local(f"simplecache::{location}")
    elif not Path(vocab).is_file():
        raise FileNotFoundError(
            f"dataset={config.datasets[0]!r} is no folder that tahoex1 prepare made: it has no vocab.json."
        )
    return TahoeX1Tokenizer(
        vocab,
        value_encoding=config.value_encoding or "bins",
        context_length=config.context_length,
        drug_to_id=table,
        unknown_drugs=rule,
    )


def make_model(config: PretrainConfig, tokenizer: TahoeX1Tokenizer) -> TahoeX1ForPreTraining:
    """Return a new model, or one with the initial weights.

    Raises:
        ValueError: If a model option differs from that of the initial weights, and cannot.
    """
    attention = {"attn_implementation": config.attention}
    if config.init_from is not None:
        folder, decoders = find_model(config.init_from), ["expression_decoder.", "cell_decoder."]
        with reading(folder / "config.json"):
            own = TahoeX1Config.from_pretrained(folder).to_dict()
        for key in sorted(set(config.model) - _CHANGEABLE):  # a recipe may repeat what the weights have
            if key not in own or own[key] != config.model[key]:
                raise ValueError(
                    f"model.{key}={config.model[key]}: {config.init_from} has {own.get(key, 'no such option')}. "
                    f"With init_from only {', '.join(sorted(_CHANGEABLE))} can differ."
                )
        model: TahoeX1ForPreTraining = load_folder(
            folder, TahoeX1ForPreTraining, decoders, dtype=torch.float32, **attention, **config.model
        )
        return model
    vocabulary = tokenizer.get_vocab()
    derived: dict[str, Any] = {"vocab_size": max(vocabulary.values()) + 1, "pad_token_id": tokenizer.pad_token_id}
    derived["num_bins"] = tokenizer.num_bins
    fingerprints = None
    if config.drug_fingerprints is not None:
        fingerprints = np.load(config.drug_fingerprints, allow_pickle=False)
        derived |= {"num_drugs": len(fingerprints), "drug_fingerprint_size": fingerprints.shape[1]}
        derived["drug_token_id"] = vocabulary["<drug>"]
    settings = TahoeX1Config(**{**derived, **config.model})
    model = TahoeX1ForPreTraining._from_config(settings, **attention)
    if fingerprints is not None:
        with torch.no_grad():
            model.tahoe.embeddings.drug_encoder.embedding.weight.copy_(torch.from_numpy(fingerprints))
    return model


def compile_layers(model: TahoeX1ForPreTraining, **options: Any) -> None:
    """Have each layer compiled when it first runs, once for all of them and for rows of any length."""
    run = torch.compile(TahoeX1Layer.run, dynamic=True, **options)
    for layer in model.tahoe.layers:
        layer.run = MethodType(run, layer)  # type: ignore[assignment]  # a layer's attribute, which torch may copy


def training_arguments(config: PretrainConfig, max_steps: int) -> TrainingArguments:
    """Return Trainer's options for a run of `max_steps` steps."""
    warmup = round(config.warmup_fraction * max_steps)
    lowest = config.min_learning_rate_fraction
    schedule, options = {
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": lowest}),
        "constant": ("constant_with_warmup", {}),
        "stable": ("warmup_stable_decay", _fall(config, max_steps, warmup)),
    }[config.schedule]
    return run_arguments(
        precision=config.precision,
        activation_checkpointing=config.activation_checkpointing,
        output_dir=config.output_dir,
        max_steps=max_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=options,
        warmup_steps=warmup,
        # Composer's rule, p *= 1 - (lr / highest lr) * decay, in torch's terms: p *= 1 - lr * weight_decay.
        weight_decay=config.decoupled_weight_decay / config.learning_rate,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_epsilon=config.epsilon,
        max_grad_norm=config.max_grad_norm,
        torch_compile=config.compile is True,
        seed=config.seed,
        logging_steps=config.logging_steps,
        eval_strategy="steps" if config.eval_cells and config.eval_steps else "no",
        eval_steps=config.eval_steps,
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        report_to=list(config.report_to) or "none",
        run_name=config.run_name,
        ddp_find_unused_parameters=False,
    )


def _fall(config: PretrainConfig, max_steps: int, warmup: int) -> dict[str, Any]:
    """Return the options of a learning rate that is constant until its last, linear fall."""
    decay = min(max(round(config.decay_fraction * max_steps), 1), max_steps - warmup)
    return {"num_decay_steps": decay, "decay_type": "linear", "min_lr_ratio": config.min_learning_rate_fraction}


def pretrain(config: PretrainConfig) -> int:
    """Train a model to the last step, from the newest checkpoint in the run's folder where there is one.

    Args:
        config: Configuration of the run, the same in every process of a launcher.

    Returns:
        0; or 75 (`PREEMPTED`) if SIGTERM ended the run after a checkpoint, so that the same command resumes it.

    Raises:
        ValueError: If settings, data and checkpoint do not fit together.
        FloatingPointError: If a gradient is not finite.
    """
    let_segments_grow()
    processes = training_processes()
    folder = RunFolder(config, processes.num_processes)
    config = folder.config
    processes.wait_for_everyone()  # until all have read the files of an earlier start
    if processes.is_main_process:
        folder.write("running")
    if not os.isatty(2):
        disable_progress_bar()
    set_seed(config.seed)
    tokenizer = make_tokenizer(config)
    collator = _collator(config, tokenizer, cell_targets=config.cell_targets)
    cells = training_cells(config, collator, processes.process_index, processes.num_processes)
    validation = _validation(config, tokenizer)
    model = make_model(config, tokenizer)
    if config.compile == "layers":
        compile_layers(model)
    baselines: dict[str, float] = {}
    if config.baselines and validation and processes.is_main_process:
        baselines = baseline_losses(config, model.config, collator, validation)
        logger.info("Loss of constants on the validation cells: %s", baselines)
    trainer = _trainer(folder, model, tokenizer, cells, validation)
    trainer.run(Path(config.resume_from) if config.resume_from else None)
    if trainer.preempted:
        if processes.is_main_process:
            folder.write("preempted", step=trainer.state.global_step)
        return PREEMPTED
    _finish(trainer, folder, baselines)
    return 0


def _collator(config: PretrainConfig, tokenizer: TahoeX1Tokenizer, **options: Any) -> CellCollator:
    return CellCollator(
        tokenizer,
        mlm_probability=config.mlm_probability,
        context_length=config.context_length,
        packed=config.packed,
        unexpressed_padding=config.unexpressed_padding,
        absent_targets=config.absent_targets,
        pad_to_multiple_of=config.pad_to_multiple_of,
        **options,
    )


def _validation(config: PretrainConfig, tokenizer: TahoeX1Tokenizer) -> ValidationBatches | None:
    if not config.eval_cells:
        return None
    collator = _collator(config, tokenizer)
    raw = copy.copy(tokenizer)  # a copy does not warn again of unknown drugs
    raw.value_encoding = "raw"
    return ValidationBatches(config, collator, _collator(config, raw), min(_VALIDATION_BATCH, config.eval_cells))


def _trainer(
    folder: RunFolder,
    model: TahoeX1ForPreTraining,
    tokenizer: TahoeX1Tokenizer,
    cells: CellBatches,
    validation: ValidationBatches | None,
) -> PretrainingTrainer:
    config = folder.config
    max_steps = config.max_steps or round((config.epochs or 0) * len(cells))
    args = training_arguments(config, max_steps)
    speed = SpeedMonitor(args, peak_flops(args.device, computed_in(config)))
    evaluations: list[Any] = [
        *(CellTypeEvaluation(each) for each in config.cell_types),
        *(GeneEssentialityEvaluation(each) for each in config.gene_essentiality),
    ]
    trainer = PretrainingTrainer(
        model,
        args,
        StepBatches(cells, max_steps),
        validation=validation,
        microbatch_size=folder.microbatch_size,
        background_saves=config.background_saves,
        callbacks=[speed, SpikeWarning(), UntrainedWarning(), *evaluations],
        tokenizer=tokenizer,
    )
    trainer.report = lambda logs: speed.extended(logs, trainer.state)
    trainer.on_microbatch = folder.note_microbatch
    for evaluation in evaluations:
        evaluation.log, evaluation.tokenizer = trainer.log, tokenizer
    return trainer


def _finish(trainer: PretrainingTrainer, folder: RunFolder, baselines: dict[str, float]) -> None:
    """Evaluate a last time, and write the final model with its records."""
    output_dir = folder.path
    step, history = trainer.state.global_step, trainer.state.log_history
    seen = [line for line in history if line["step"] == step and "eval_loss" in line]
    metrics = {k: v for k, v in seen[-1].items() if k.startswith("eval_")} if seen else trainer.evaluate()
    trainer.save_final(output_dir)
    if trainer.args.should_save:
        trainer.state.save_to_json(str(output_dir / "trainer_state.json"))
        try:
            draw_curve(trainer.state.log_history, baselines, output_dir / "training_curve.png")
        except ImportError:
            logger.info("No picture of the run: pip install matplotlib.")
        write_facts(_facts(trainer, folder.config, {**metrics, **baselines}), output_dir)
        for name, value in [*metrics.items(), *baselines.items()]:
            logger.info("%s: %.4f", name, value)
        folder.write("finished", step=trainer.state.global_step, metrics=metrics, baselines=baselines)


def _facts(trainer: PretrainingTrainer, config: PretrainConfig, results: dict[str, float]) -> dict[str, Any]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    assert trainer.tokenizer is not None
    return card_facts(
        config,
        model.config,
        value_encoding=trainer.tokenizer.value_encoding,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        steps=trainer.state.global_step,
        steps_per_epoch=trainer.batches.steps_per_epoch,
        cells=(trainer.batches.cells.num_cells, trainer.validation.cells.num_cells if trainer.validation else 0),
        results=results,
    )
