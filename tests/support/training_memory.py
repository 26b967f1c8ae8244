"""Models and batches for measuring the memory of training."""

from collections.abc import Callable

import torch

from benchmarks.memory_model import Precision
from tahoex1_hf import TahoeX1Config, TahoeX1ForPreTraining
from tahoex1_hf.training.microbatches import longest_cells


def training_model(config: TahoeX1Config, precision: Precision) -> TahoeX1ForPreTraining:
    dtype = torch.bfloat16 if precision.weights == 2 else torch.float32
    torch.manual_seed(0)
    model = TahoeX1ForPreTraining._from_config(config, attn_implementation="sdpa", dtype=dtype)
    return model.train()


def loss(model: TahoeX1ForPreTraining, precision: Precision, cells: int, length: int) -> torch.Tensor:
    config = model.config
    batch = longest_cells(length, cells, packed=True, vocab_size=config.vocab_size, drugs=config.num_drugs > 0)
    if precision.weights == 2:  # fully_shard casts a module's inputs
        floats = {name for name, value in batch.items() if torch.is_tensor(value) and value.is_floating_point()}
        batch |= {name: batch[name].bfloat16() for name in floats}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision.autocast):
        return model(**batch, num_items_in_batch=torch.tensor(1.0)).loss


def line(measure: Callable[[int], float], low: int, high: int) -> tuple[float, float]:
    """Return the bytes per cell, and the bytes that do not depend on the number of cells."""
    a, b = measure(low), measure(high)
    slope = (b - a) / (high - low)
    return slope, a - low * slope
