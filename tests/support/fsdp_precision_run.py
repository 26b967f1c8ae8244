"""Train a tiny model in precision argv[1]; write the observations into argv[2], as JSON."""

import json
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fixed_steps import FixedSteps, tiny
from helpers import make_batch, packed, tiny_config, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tahoex1_hf.training.microbatches import microbatches
from tahoex1_hf.training.pretraining import training_arguments
from tahoex1_hf.training.trainer import PretrainingTrainer

PRECISION, OUTPUT = sys.argv[1], Path(sys.argv[2])
HALF = PRECISION == "bf16"
LENGTHS = [5, 9, 12, 7, 3, 12, 8, 6, 10, 4, 11, 2, 9, 9, 5, 7]


def gradient_here(model: torch.nn.Module) -> torch.Tensor:
    parts = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    return torch.cat([part.flatten().double() for part in parts if part is not None])


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the norm of the difference over that of `theirs`, of the shards of all processes."""
    squares = torch.stack([(ours - theirs).square().sum(), theirs.square().sum()])
    torch.distributed.all_reduce(squares)
    return float((squares[0] / squares[1]).sqrt())


class Watched(PretrainingTrainer):
    """Inspect the gradients that passes leave.

    In half precision, compare their sum in the first step with each pass alone, added up in float64.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.inputs: list[Any] = []
        self.left: list[Any] = []
        self.apart: float | None = None
        self.first_step = True

    def _pass(self, model: Any, part: Any, last: bool) -> torch.Tensor:
        losses = super()._pass(model, part, last)
        if self.first_step and self.microbatch_size is not None:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            here = sum(g.to_local().numel() if isinstance(g, DTensor) else g.numel() for g in gradients)
            share = here / sum(p.numel() for p in model.parameters())
            self.left.append([last, str(losses.dtype), sorted({str(g.dtype) for g in gradients}), share])
            self.inputs.append(part)
        return losses

    def _clip_grad_norm(self, model: Any) -> Any:
        compared, self.first_step = self.first_step and HALF, False
        if compared:
            added, gradients = gradient_here(model), [p.grad for p in model.parameters()]
            alone = torch.zeros_like(added)
            for part in self.inputs:
                model.zero_grad()
                self._pass(model, part, True)
                alone += gradient_here(model)
            self.apart = relative_difference(added, alone)
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
        return super()._clip_grad_norm(model)


def trained(batch: dict[str, Any], size: int | None) -> Watched:
    changes = {"schedule": "constant", "warmup_fraction": 0, "logging_steps": 1, "eval_cells": 0}
    config = tiny(Path("unused"), OUTPUT.parent / "run", precision=PRECISION, learning_rate=1e-3, **changes)
    model = tiny_model(tiny_config(expression_encoder_dropout=0.0, attention_mask_style="observed_or_self"))
    steps: Any = FixedSteps(batch, 2)  # the second shows what the first did to the weights
    steps.cells = SimpleNamespace(
        collator=SimpleNamespace(context_length=16, packed=True, drug_token=None, cell_targets="hidden")
    )
    args = training_arguments(config, 2)
    args.save_strategy = "no"
    trainer = Watched(model, args, steps, microbatch_size=size)
    trainer.train()
    return trainer


def copies_of_shards(run: Watched, batch: dict[str, Any]) -> dict[str, Any]:
    """Compare gradients under HSDP, with two copies of one shard each. (Accelerate itself refuses it on CPUs.)"""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards"))
    policy = run.accelerator.state.fsdp_plugin.mixed_precision_policy or MixedPrecisionPolicy()
    model = tiny_model(run.model.config)
    for module in (*model.tahoe.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    total = {"num_items_in_batch": torch.tensor(120.0)}
    parts = [{**part, **total} for part in microbatches(run._prepare_inputs(batch), 4)]
    waiting = []
    for number, part in enumerate(parts):
        run._pass(model, part, number == len(parts) - 1)
        waiting.append(all(p.grad is None for p in model.parameters()))
    added = gradient_here(model)
    alone = torch.zeros_like(added)
    for part in parts:
        model.zero_grad()
        run._pass(model, part, True)
        alone += gradient_here(model)
    return {"waiting": waiting, "apart": relative_difference(added, alone)}


def main() -> None:
    rank, seen = int(os.environ.get("RANK", 0)), {}
    batch = make_batch(tiny_config(), lengths=LENGTHS, seed=rank)
    batch["labels"] = batch["labels"].masked_fill(~batch["target_mask"], -100.0)
    batch = packed(batch)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for size in (16, 4, 1, None):
            run = trained(batch, size)
            curve = [(line["loss"], line["grad_norm"]) for line in run.state.log_history if "loss" in line]
            seen[str(size)] = {"curve": curve, "left": run.left, "apart": run.apart, "size": run.microbatch_size}
    if HALF:
        with torch.no_grad():
            outputs = run._outputs(run.model_wrapped, run._prepare_inputs(batch))
            # The model's own outputs, without the trainer's help.
            plain = run.model_wrapped(**run._prepare_inputs(batch))
        seen["types"] = {name: [str(outputs[name].dtype), str(plain[name].dtype)] for name in outputs}
        seen["hsdp"] = copies_of_shards(run, batch)
    seen["views"] = sum("view tensor" in str(warning.message) for warning in warned)
    if rank == 0:
        OUTPUT.write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main()
