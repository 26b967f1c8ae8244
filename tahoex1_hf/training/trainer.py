# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The Trainer of pretraining: steps in microbatches, exact metrics, sharded models.

A step takes `global_batch_size` cells however many processes and microbatches share them, and its loss is the mean
over all targets of the step. (The original averages the means of microbatches, weighted by cells.)
"""

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, convert_to_fp32
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, StateDictType
from transformers import TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForPreTraining
from tahoex1_hf.runs.log_window import LogWindow
from tahoex1_hf.runs.trainer import ResumableTrainer
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer
from tahoex1_hf.training.flops import training_flops
from tahoex1_hf.training.metrics import MetricSums, batch_sums
from tahoex1_hf.training.microbatches import (
    PassMemory,
    largest_microbatch,
    longest_cells,
    microbatches,
    num_cells,
)
from tahoex1_hf.training.stream import StepBatches, ValidationBatches

logger = logging.getLogger(__name__)

_USE_PARALLELISM = "ACCELERATE_USE_PARALLELISM_CONFIG"  # set by `accelerate launch` where the config has copies (HSDP)


class PretrainingTrainer(ResumableTrainer):
    """Trainer of `TahoeX1ForPreTraining`.

    Args:
        model: Model to train.
        args: Trainer's options, with `max_steps`, and `gradient_accumulation_steps` left at 1.
        batches: Batches of all steps.
        validation: Cells to evaluate on, or None.
        microbatch_size: Largest number of cells in a forward pass, or None to find it.
        background_saves: Whether shards of checkpoints are written while the training goes on; needs FSDP2.
        tokenizer: Tokenizer to be saved with the model. (As Trainer's `processing_class`, its special tokens would be
            written into the model's configuration.)
        **trainer: `callbacks` of Trainer.

    Attributes:
        report: Function that adds to a line of the log, and returns it.
        on_microbatch: Function that takes a microbatch size that was found or read from a checkpoint; called in the
            first process only.
    """

    batches: StepBatches
    num_losses = 2

    def __init__(
        self,
        model: TahoeX1ForPreTraining,
        args: TrainingArguments,
        batches: StepBatches,
        *,
        validation: ValidationBatches | None = None,
        microbatch_size: int | None = None,
        background_saves: bool = False,
        tokenizer: TahoeX1Tokenizer | None = None,
        **trainer: Any,
    ):
        super().__init__(model, args, batches, eval_dataset=validation and validation.cells, **trainer)
        self.validation, self.microbatch_size, self.tokenizer = validation, microbatch_size, tokenizer
        self.background_saves = background_saves
        self.report: Callable[[dict[str, float]], dict[str, float]] = lambda logs: logs
        self.on_microbatch: Callable[[int], None] = discard
        if self.is_fsdp_enabled and getattr(getattr(batches.cells, "collator", None), "cell_targets", None) == "all":
            raise ValueError(
                "cell_targets=all reads the whole table of genes, of which shards (FSDP) hold parts: use DDP."
            )
        if background_saves and not self._saves_shards():
            raise ValueError(
                "background_saves=true needs FSDP2 with fsdp_state_dict_type: SHARDED_STATE_DICT (see "
                "examples/configs/accelerate/fsdp2.yaml): launch the run so, or leave it out."
            )

    # Set-up -----------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """Use FSDP and HSDP on CPUs too, where Accelerate quietly replaces the one by DDP, and refuses the other."""
        wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        wanted = wanted and PartialState().distributed_type == DistributedType.MULTI_CPU
        copies = os.environ.pop(_USE_PARALLELISM, None) if wanted else None
        try:
            super().create_accelerator_and_postprocess()
        finally:
            if copies is not None:
                os.environ[_USE_PARALLELISM] = copies
        state = self.accelerator.state
        if wanted:
            plugin = FullyShardedDataParallelPlugin()
            if plugin.fsdp_version != 2:
                raise ValueError(
                    f"fsdp_version={plugin.fsdp_version}: write fsdp_version: 2 in the accelerate config."
                )
            if state.mixed_precision != "no":
                plugin.set_mixed_precision(state.mixed_precision)
            # Every new reference to Accelerate's state takes the type from the process group's.
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
            self.is_fsdp_enabled = True
            if copies is not None and copies.lower() == "true":
                state.parallelism_config = ParallelismConfig()
                state.device_mesh = state.parallelism_config.get_device_mesh(self.args.device.type)
                state.parallelism_config._validate_accelerator(self.accelerator)
        if self.accelerator.is_fsdp2 and state.fsdp_plugin.mixed_precision_policy is not None:
            state.fsdp_plugin.mixed_precision_policy = only_computing(state.fsdp_plugin.mixed_precision_policy)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Return all names: Composer's rule decays biases and norms too."""
        return [name for name, _ in model.named_parameters()]

    # A step -----------------------------------------------------------------------------------------

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run the forward and backward passes over this process's cells of a step, in microbatches.

        Args:
            model: Model as Accelerate wrapped it.
            inputs: Cells of this process.
            num_items_in_batch: Number of targets in all processes' cells.

        Returns:
            This process's part of the loss.
        """
        model.train()
        size = self.microbatch_size
        if size is None:
            size = self._fitting_microbatch(model, num_cells(inputs))
            self._set_microbatch(size)
        lengths = inputs["cu_seq_lens_q"].diff() if "cu_seq_lens_q" in inputs else inputs["attention_mask"].sum(1)
        self.window.cells += len(lengths)
        self.window.tokens += int(lengths.sum())
        self.window.flops += training_flops(self.accelerator.unwrap_model(model).config, lengths.cpu().numpy())
        parts = list(microbatches(inputs, size))  # of tensors that are not on the device yet: nothing waits for it
        targets = num_items_in_batch if num_items_in_batch is not None else (inputs["labels"] != -100).sum()
        targets = torch.as_tensor(targets, device=self.args.device).clamp(min=1)
        totals = {"num_items_in_batch": targets}
        if "cell_labels" in inputs:  # all processes have equally many cells
            totals["num_cell_labels"] = (inputs["cell_labels"] != -100).sum() * self.args.world_size
        losses = torch.zeros(2, device=self.args.device)
        for number, part in enumerate(parts):
            losses += self._pass(model, self._prepare_inputs({**part, **totals}), last=number == len(parts) - 1)
        self.window.add_losses(losses)
        return losses.mean()

    def _pass(self, model: torch.nn.Module, part: dict[str, Any], last: bool) -> torch.Tensor:
        """Return the two losses of a microbatch after adding its gradients; the last adds those of all processes."""
        together: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.accelerator.is_fsdp2:
            # Under no_sync every device would keep the gradients of all weights, and add passes up in half precision.
            # Reduced in each pass, they are shards in float32. In the last pass, copies of shards (HSDP) are added up.
            sharded: Any = model
            sharded.set_requires_all_reduce(last)
        elif not last:
            together = self.accelerator.no_sync(model)
        with together:
            outputs = self._outputs(model, part)
            # Gradients are averaged over the processes, whose losses are parts of one mean.
            self.accelerator.backward(outputs.loss * self.args.world_size)
        return torch.stack([outputs.expression_loss.detach(), outputs.cell_expression_loss.detach()])

    def _outputs(self, model: torch.nn.Module, batch: dict[str, Any]) -> Any:
        """Return the model's outputs in float32. Accelerate converts them under autocast only, and FSDP2 has none."""
        with self.compute_loss_context_manager():
            return convert_to_fp32(model(**batch, return_dict=True))

    def _set_microbatch(self, size: int) -> None:
        self.microbatch_size = size
        if self.args.should_save:
            self.on_microbatch(size)

    def _fitting_microbatch(self, model: torch.nn.Module, cells: int) -> int:
        config, memory = self.accelerator.unwrap_model(model).config, PassMemory(self.args.device)
        collator = self.batches.cells.collator
        state = {"cpu": torch.get_rng_state()}
        if self.args.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.args.device)

        def measure(number: int) -> float:
            batch = longest_cells(
                collator.context_length,
                number,
                packed=collator.packed,
                vocab_size=config.vocab_size,
                drugs=collator.drug_token,
                cell_labels=collator.cell_targets == "all",
            )
            one = torch.tensor(1.0, device=self.args.device)
            batch = self._prepare_inputs({**batch, "num_items_in_batch": one})
            # FSDP2 keeps gradients that wait for the last pass where zero_grad does not find them.
            needed = memory(lambda: discard(self._pass(model, batch, last=self.accelerator.is_fsdp2)))
            model.zero_grad(set_to_none=True)
            return self._most(needed)

        parameters = sum(local(p).numel() * 4 for p in model.parameters())
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.args.world_size))
        # Gradients of the parameters are there in the second step, beside the two moments.
        limit = -self._most(-memory.available(3 * parameters, here))
        found = largest_microbatch(measure, limit, cells)
        torch.set_rng_state(state["cpu"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.args.device)
        return found

    def _most(self, value: float) -> float:
        """Return the largest of all processes' values, so that they decide alike."""
        if self.args.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.args.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.item()

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        """Clip the gradient; end the run before the weights change if its norm is not finite (fp16 skips the step)."""
        norm = super()._clip_grad_norm(model)
        value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not math.isfinite(value) and self.accelerator.scaler is None:
            self.window.settle()
            raise FloatingPointError(
                f"The gradient's norm is {value} at step {self.state.global_step + 1}: nothing was changed or saved "
                f"by this step. Losses since the last line of the log: {self.window.losses}. Look at the data of this "
                "step, lower learning_rate, or raise warmup_fraction; the same command resumes from the last "
                "checkpoint."
            )
        return norm

    # Log and evaluation -----------------------------------------------------------------------------

    def extended(self, logs: dict[str, float]) -> dict[str, float]:
        """Return a line of the log with speed and memory."""
        return self.report(logs)

    def window_means(self, window: LogWindow) -> dict[str, float]:
        """Return the loss and the two errors that it is made of, and sums from which the speed follows."""
        expression, cell = (value / window.steps for value in window.losses)
        totals = {"cells": window.cells, "tokens": window.tokens, "flops": window.flops}
        return {"loss": (expression + cell) / 2, "masked_mse": expression, "mvc_mse": cell, **totals}

    def validation_metrics(self) -> dict[str, float]:
        """Return losses and the rank correlation on the validation cells; empty where there are none."""
        if self.validation is None:
            return {}
        model, config = self.model_wrapped, self.accelerator.unwrap_model(self.model).config
        was_training = model.training
        model.eval()
        unit = 2 / (config.num_bins - 2) if config.scale_targets else 1.0
        scale = (unit, -unit - 1 if config.scale_targets else 0.0)
        sums = MetricSums.zero(self.args.device)
        for batch, counts, does_count in self.validation.batches(*self.world):
            batch = self._prepare_inputs(batch)
            outputs = self._outputs(model, batch)
            if does_count:
                sums.values += batch_sums(outputs, batch, counts.to(self.args.device), scale).values
        if self.args.world_size > 1:
            dist.all_reduce(sums.values)
        model.train(was_training)
        return sums.means()

    # Checkpoints ------------------------------------------------------------------------------------

    def progress(self) -> dict[str, Any]:
        """Return the state of the log, and the microbatch size: another one adds gradients up in another order."""
        return {"microbatch_size": self.microbatch_size, **super().progress()}

    def restore_progress(self, state: dict[str, Any]) -> None:
        """Restore the values that `progress` returned; a given microbatch size stays."""
        super().restore_progress(state)
        if self.microbatch_size is None:
            self._set_microbatch(state["microbatch_size"])

    def _saves_shards(self) -> bool:
        """Return whether each process writes its shards of weights and optimizer."""
        plugin = self.accelerator.state.fsdp_plugin if self.accelerator.is_fsdp2 else None
        return plugin is not None and plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the shards of weights and optimizer, or begin to, into the folders from which Accelerate loads."""
        if not self.background_saves:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None  # both are made before the first step
        assert self.lr_scheduler is not None
        folder, options = Path(output_dir), StateDictOptions()
        weights = get_model_state_dict(self.model, options=options)
        moments = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        self.saves.begin(
            {
                folder / f"{FSDP_MODEL_NAME}_0": {"model": weights},
                folder / f"{OPTIMIZER_NAME}_0": {"optimizer": moments},
            }
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)

    def save_beside(self, folder: Path) -> None:
        """Save the tokenizer."""
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def save_final(self, output_dir: Path) -> None:
        """Write the model, whole, and its tokenizer for `from_pretrained`."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = get_model_state_dict(self.accelerator.unwrap_model(self.model), options=whole)
        if self.args.should_save:
            # A new model, since transformers reads the tensors of the model that it saves, and these may be shards.
            with torch.device("meta"):
                model = TahoeX1ForPreTraining(self.accelerator.unwrap_model(self.model).config)
            model.load_state_dict({name: _plain(value).cpu() for name, value in state.items()}, assign=True)
            model.save_pretrained(output_dir)
            self.save_beside(output_dir)
        self.accelerator.wait_for_everyone()


def _plain(weight: torch.Tensor) -> torch.Tensor:
    """Return the tensor inside a weight that torchao casts to FP8: a group of one process does not take it out."""
    inside: torch.Tensor | None = getattr(weight, "_tensor", None)
    return weight if inside is None else inside


def only_computing(policy: MixedPrecisionPolicy) -> MixedPrecisionPolicy:
    """Return a policy for FSDP2 that uses the half precision of `policy` for weights in use, and for nothing else.

    Accelerate's own policy uses it for labels too, for losses, which would be logged with three digits, and for the
    sum of gradients over processes, which would lose its digits with 512 of them. `output_dtype` stays unset, since it
    holds for every unit: float32 from the gene table or a layer does not fit the half-precision norm after it.
    """
    return dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False)


def local(parameter: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a parameter."""
    part: torch.Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return part


def discard(_: Any) -> None:
    """Discard a value at once, and with it everything that it keeps alive."""
