"""Small models and batches that several test files share."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden.copy_golden import VARIANTS as COPIED_VARIANTS
from transformers import PreTrainedModel

from tahoex1_hf import TahoeX1Config, TahoeX1ForPreTraining

REPO_ROOT = Path(__file__).resolve().parents[2]
GOLDEN = REPO_ROOT / "tests" / "golden"
SHARED_GOLDEN = Path(os.environ.get("TAHOEX1_SHARED_GOLDEN", REPO_ROOT.parent / "shared" / "golden"))
NO_SHARED_GOLDEN = f"the complete recordings are not here: {SHARED_GOLDEN} (or TAHOEX1_SHARED_GOLDEN)"

# Models this small gain nothing from a second thread; with OMP_NUM_THREADS=2 the tests pass, too.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

PAD, CLS, DRUG, FIRST_GENE = 0, 1, 2, 3

# Small shapes with the features of the published models and of the golden variants.
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "observed_or_self": {"attention_mask_style": "observed_or_self"},
    "drugs": {"num_drugs": 6, "drug_fingerprint_size": 16, "drug_token_id": DRUG, "hidden_act": "gelu"},
    "drugs_observed_or_self_mean": {
        "num_drugs": 6,
        "drug_fingerprint_size": 16,
        "drug_token_id": DRUG,
        "attention_mask_style": "observed_or_self",
        "cell_pooling": "mean",
    },
    "gqa_glu_post_mean": {
        "num_key_value_heads": 2,
        "use_glu": True,
        "norm_position": "post",
        "hidden_act": "silu",
        "cell_pooling": "mean",
        "scale_targets": True,
    },
}


def tiny_config(**changes: Any) -> TahoeX1Config:
    settings = {"vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return TahoeX1Config(**{**settings, **changes})


def perturb(model: PreTrainedModel, seed: int = 1) -> PreTrainedModel:
    """Move the weights that start as zeros and ones, which would hide a missing bias or norm."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "drug_encoder.embedding" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def tiny_model(
    config: TahoeX1Config, model_class: type[PreTrainedModel] = TahoeX1ForPreTraining, attention: str = "sdpa"
) -> PreTrainedModel:
    torch.manual_seed(0)
    model = perturb(model_class(copy.deepcopy(config))).eval()
    model.set_attn_implementation(attention)
    return model


def make_batch(
    config: TahoeX1Config,
    lengths: tuple[int, ...] = (9, 14, 6, 12),
    padded_to: int | None = None,
    seed: int = 0,
    targets: bool = True,
) -> dict[str, torch.Tensor]:
    """Return arguments of `TahoeX1ForPreTraining` for random cells, padded behind each cell."""
    random = np.random.default_rng(seed)
    shape = (len(lengths), padded_to or max(lengths))
    num_special = 2 if config.num_drugs else 1
    ids, values = np.full(shape, PAD), np.full(shape, -2.0, dtype=np.float32)
    target_mask, labels = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.float32)
    for row, length in enumerate(lengths):
        ids[row, 0] = CLS
        ids[row, 1:num_special] = DRUG
        genes = slice(num_special, length)
        num_genes = length - num_special
        ids[row, genes] = random.choice(np.arange(FIRST_GENE, config.vocab_size), num_genes, replace=False)
        values[row, genes] = labels[row, genes] = random.integers(1, 51, num_genes)
        target_mask[row, num_special + random.permutation(num_genes)[: max(1, num_genes // 2)]] = True
    batch = {
        "input_ids": torch.tensor(ids),
        "expression_values": torch.tensor(values),
        "attention_mask": torch.tensor(ids != PAD).long(),
    }
    if targets:
        batch |= {"target_mask": torch.tensor(target_mask), "labels": torch.tensor(labels)}
    if config.num_drugs:
        batch["drug_ids"] = torch.tensor(random.integers(0, config.num_drugs, len(lengths)))
    return batch


def without_labels(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def rows(batch: dict[str, torch.Tensor], index: Any) -> dict[str, torch.Tensor]:
    """Return some cells of a batch, in the padding of the whole."""
    return {name: tensor[index] for name, tensor in batch.items()}


def packed(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the same cells back to back in one row, including the arguments that flash attention wants."""
    valid = batch["attention_mask"].bool()
    lengths = valid.sum(1)
    boundaries = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    arguments: dict[str, Any] = {
        name: tensor[valid].unsqueeze(0)
        for name, tensor in batch.items()
        if name not in ("attention_mask", "drug_ids")
    }
    if "drug_ids" in batch:
        arguments["drug_ids"] = batch["drug_ids"]
    arguments |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
    return arguments | {"max_length_q": int(lengths.max()), "max_length_k": int(lengths.max())}


def largest_difference(ours: torch.Tensor | np.ndarray, theirs: torch.Tensor | np.ndarray) -> float:
    ours, theirs = np.asarray(torch.as_tensor(ours).detach()), np.asarray(torch.as_tensor(theirs).detach())
    assert ours.shape == theirs.shape
    difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max(initial=0)
    return float("inf") if np.isnan(difference) else float(difference)  # NaN compares false with every tolerance


def gradients(model: PreTrainedModel, batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the gradients of the loss, summed over the batches.

    Key biases are left out: softmax is blind to them, so that their gradients are zero but for rounding.
    """
    model.zero_grad()
    for batch in batches:
        model(**batch).loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and "k_proj.bias" not in name
    }


def largest_relative_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of named tensors, each relative to its own largest value."""
    assert ours.keys() == theirs.keys()
    return max(
        largest_difference(ours[name], theirs[name]) / max(theirs[name].abs().max().item(), 1e-6) for name in theirs
    )


def largest_departure_of_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Compare weights that Adam trained in two ways: the norm of the difference, relative to each tensor's norm.

    Comparing number by number would not do: Adam divides each gradient by its own size, so where a gradient is hardly
    more than rounding, the rounding decides over a visible share of a step. That happens to some numbers of every
    tensor, and to more of those that make the keys, whose gradients nearly cancel: the softmax is blind to what all
    keys share. How many depends on the kind of CPU. Over a few steps of 0.01 single numbers were seen to depart by
    5e-3 of the largest, and a tensor by 6e-4 of its norm. Cells that are lost, taken twice or weighted wrongly move a
    tensor by a tenth.
    """
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[name].double() - theirs[name].double()).norm() / theirs[name].double().norm().clamp(min=1e-6))
        for name in theirs
    )


@contextmanager
def layer_outputs(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collect the output of each layer (of the last one before the final norm, which `hidden_states` lacks)."""
    outputs: list[torch.Tensor] = []

    def record(module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> None:
        outputs.append(output)

    handles = [layer.register_forward_hook(record) for layer in model.base_model.layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Variant:
    """A golden checkpoint, and the recordings that it must reproduce."""

    name: str
    mode: str

    @property
    def checkpoint(self) -> Path:
        return GOLDEN / self.name / "model"

    def batch(self, name: str, targets: bool = False) -> dict[str, torch.Tensor]:
        """Return arguments of `TahoeX1ForPreTraining`; with `targets`, its hidden positions and labels too."""
        arrays = np.load(GOLDEN / self.name / f"{name}.npz")
        batch = {
            "input_ids": torch.tensor(arrays["gene"]),
            "expression_values": torch.tensor(arrays["expr"]),
        }
        if targets:
            batch |= {
                "target_mask": torch.tensor(arrays["gen_mask"]),
                "labels": torch.tensor(arrays["expr_target"]),
            }
        if "drug_ids" in arrays:
            batch["drug_ids"] = torch.tensor(arrays["drug_ids"]).long()
        return batch

    def recorded(self, kind: str, complete: bool = False) -> dict[str, np.ndarray]:
        """Return recorded arrays: `out_nomlm`, `out_masked`, `out_log`, `inter_masked` or `grads_masked`."""
        folder = (SHARED_GOLDEN if complete else GOLDEN) / self.name
        return dict(np.load(folder / f"{kind}_{self.mode}.npz"))


GOLDEN_VARIANTS = [Variant(name, mode) for name, (_, mode) in COPIED_VARIANTS.items()]
