"""A resumable trainer of a model with a handful of weights, so that a run takes a moment."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tahoex1_hf.runs.arguments import run_arguments
from tahoex1_hf.runs.trainer import ResumableTrainer


class ToyModel(torch.nn.Module):
    """Dropout and a linear layer, with a squared error as loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dropout, self.linear = torch.nn.Dropout(0.2), torch.nn.Linear(4, 1)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        predicted = self.linear(self.dropout(inputs))
        return {"loss": (predicted.squeeze(1) - labels).square().mean(), "logits": predicted}


def toy_batch(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(8, 4, generator=random)
    return {"inputs": inputs, "labels": inputs.sum(1)}


class ToyBatches:
    """Batches for two microbatches a step and five steps an epoch."""

    def __init__(self, seed: int = 0):
        self.dataset: list[int] = [0] * 5
        self.seed, self.max_steps, self.steps_per_epoch = seed, 0, 5
        self.done: Callable[[], int] = lambda: 0

    def __len__(self) -> int:
        return 2 * self.max_steps

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for step in range(self.done(), self.max_steps):
            yield from (toy_batch(1000 * self.seed + 2 * step), toy_batch(1000 * self.seed + 2 * step + 1))

    def identity(self) -> dict[str, Any]:
        return {"seed": self.seed}


class ToyTrainer(ResumableTrainer):
    """A trainer that calls `at_step` with the step's number in the middle of each step."""

    at_step: Callable[[int], None] = staticmethod(lambda step: None)

    def validation_metrics(self) -> dict[str, float]:
        with torch.no_grad():
            return {"loss": self.model.eval()(**toy_batch(-1))["loss"].item()}

    def _clip_grad_norm(self, model: Any) -> Any:
        self.at_step(self.state.global_step + 1)
        return super()._clip_grad_norm(model)


def toy_trainer(folder: Path, seed: int = 0, callbacks: Any = (), **changes: Any) -> ToyTrainer:
    options = {"max_steps": 12, "logging_steps": 4, "save_steps": 3, "learning_rate": 0.01, **changes}
    args = run_arguments(
        precision="no", activation_checkpointing=False, output_dir=str(folder), gradient_accumulation_steps=2,
        save_total_limit=2, report_to="none", **options,
    )  # fmt: skip
    torch.manual_seed(1)
    return ToyTrainer(ToyModel(), args, ToyBatches(seed), callbacks=callbacks, eval_dataset=[0])
