"""Verify a conversion against the original's tensors and forward pass, and write the manifest that records it."""

import copy
import json
import platform
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import safetensors
import torch
import transformers
from torch import nn

import tahoex1_hf
from tahoex1_hf.common.weight_files import INDEX, SINGLE
from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForPreTraining
from tahoex1_hf.original.reference import OriginalForward
from tahoex1_hf.original.tensor_names import check_tensors, in_original_names, our_shapes
from tahoex1_hf.original.weights import TensorReader, open_weights
from tahoex1_hf.original.writing import describe_files

MANIFEST = "conversion.json"
TOLERANCE = 1e-5  # largest difference, relative to the largest value of the output, in float32

# (hidden_size, layers, vocabulary, drugs) -> name and number of parameters of the released models. The number of the
# 70M was published with it; the others are the sums over their architecture.
RELEASED = {
    (512, 12, 62720, 0): ("70M", 70_996_993),
    (2048, 24, 62720, 0): ("1.3B", 1_353_854_977),
    (2560, 32, 62720, 378): ("3B", 2_717_041_665),
}


@dataclass(frozen=True)
class Verification:
    """The result of checking a conversion.

    Args:
        num_parameters: Number of parameters of the converted model.
        released_size: Name of the released model of this shape, None where there is none.
        num_tensors: Number of tensors of the original, all of which are accounted for.
        tensors: Result of comparing the tensors.
        differences: Largest relative difference of each output from the original's forward pass; empty where the
            tensors are equal bit for bit and no forward pass is needed.
    """

    num_parameters: int
    released_size: str | None
    num_tensors: int
    tensors: str
    differences: dict[str, float]

    def summary(self) -> str:
        """Return the result as a sentence for people."""
        size = f"the released {self.released_size}" if self.released_size else "no released size has this shape"
        text = f"{self.num_parameters:,} parameters ({size}); all {self.num_tensors} tensors {self.tensors}"
        if self.differences:
            text += f"; largest difference from the original's forward pass {max(self.differences.values()):.1e}"
        return text


def verify_conversion(
    settings: Mapping[str, Any],
    collator: Mapping[str, Any],
    original: TensorReader,
    config: TahoeX1Config,
    folder: Path,
) -> Verification:
    """Compare a converted folder with its original, tensor by tensor and by their outputs.

    Args:
        settings: Contents of `model_config.yml`.
        collator: Contents of `collator_config.yml`.
        original: The original's tensors.
        config: The converted configuration.
        folder: Converted folder.

    Raises:
        ValueError: If a tensor is missing or differs, the number of parameters differs from the released model of
            this shape, or an output differs by more than rounding.
    """
    weights = open_weights(weights_file(folder))
    check_tensors(weights.shapes, our_shapes(config), "the converted checkpoint")
    compare_tensors(original, weights, config)
    num_parameters, size = count_parameters(weights, config)
    (dtype,) = set(weights.dtypes.values())

    def read(name: str) -> torch.Tensor:
        return original.read(name).to(dtype)  # rounded as the converted tensor was

    reference = OriginalForward(settings, collator["pad_token_id"], read, set(original.shapes))
    # The parameters are views of the mapped file, so memory holds only the file's cache.
    model = TahoeX1ForPreTraining.from_pretrained(folder, config=copy.deepcopy(config), attn_implementation="sdpa")
    differences: dict[str, float] = {}
    for style in ("observed", "masked"):
        batch = probe_batch(config, masked=style == "masked")
        expected = reference(
            batch["input_ids"], batch["expression_values"], batch["target_mask"], batch.get("drug_ids")
        )
        found = _converted_outputs(model.eval(), batch)
        tokens = batch["input_ids"] != config.pad_token_id
        for name, values in expected.items():
            ours, theirs = found[name].float(), values
            if name != "cell":
                ours, theirs = ours[tokens], theirs[tokens]
            scale = theirs.abs().max().clamp(min=1e-12)
            differences[f"{style}_{name}"] = float((ours - theirs).abs().max() / scale)
    wrong = {name: value for name, value in differences.items() if not value <= TOLERANCE}  # NaN is wrong, too
    if wrong:
        raise ValueError(
            f"The converted model does not compute what the original does; relative differences: {wrong}. Please "
            "report it, with the settings of the checkpoint."
        )
    how = "equal bit for bit" if set(original.dtypes.values()) == {dtype} else "equal after rounding"
    return Verification(num_parameters, size, len(original.shapes), how, differences)


def compare_tensors(original: TensorReader, converted: TensorReader, config: TahoeX1Config) -> None:
    """Raise ValueError naming the first tensor of the original that cannot be restored bit for bit from ours."""
    for name, restored in in_original_names(config, converted.read):
        expected = original.read(name).to(restored.dtype)
        if not _same_bits(restored, expected):
            raise ValueError(f"{name} was not written as it was read: is the disk full or failing?")


def count_parameters(weights: TensorReader, config: TahoeX1Config) -> tuple[int, str | None]:
    """Count the parameters, and name the released size of this shape.

    Raises:
        ValueError: If the released size has another number of parameters.
    """
    count = sum(shape.numel() for shape in weights.shapes.values())
    key = (config.hidden_size, config.num_hidden_layers, config.vocab_size, config.num_drugs)
    size, expected = RELEASED.get(key, (None, count))
    if count != expected:
        raise ValueError(f"The checkpoint has {count:,} parameters, the released {size} has {expected:,}.")
    return count, size


def probe_batch(config: TahoeX1Config, masked: bool) -> dict[str, torch.Tensor]:
    """Make a padded batch of three small cells of different lengths, with genes from the whole vocabulary."""
    generator = torch.Generator().manual_seed(0)
    drug_token = [config.drug_token_id] if config.drug_token_id is not None else []
    first = next(i for i in range(config.vocab_size) if i not in (config.pad_token_id, *drug_token))
    special = [first, *drug_token]
    reserved = {*special, config.pad_token_id}
    genes = [i for i in torch.randperm(config.vocab_size, generator=generator).tolist()[:40] if i not in reserved]
    lengths = (13, 9, 5)
    ids = torch.full((3, 13), config.pad_token_id or 0)
    values = torch.full(ids.shape, -2.0)
    targets = torch.zeros(ids.shape, dtype=torch.bool)
    for row, length in enumerate(lengths):
        start = len(special)
        cell = torch.tensor(special + [genes[(7 * row + i) % len(genes)] for i in range(length - start)])
        ids[row, :length] = cell
        values[row, start:length] = torch.randint(1, config.num_bins, (length - start,), generator=generator).float()
        if masked:
            targets[row, start + 1 : length : 2] = True
    batch = {"input_ids": ids, "expression_values": values, "target_mask": targets}
    if config.num_drugs:
        batch["drug_ids"] = torch.arange(3) % config.num_drugs
    return batch


@torch.no_grad()
def _converted_outputs(model: TahoeX1ForPreTraining, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with _in_float32(model):
        outputs = model(**batch)
    return {
        "cell": outputs.pooler_output,
        "expression": outputs.expression_predictions,
        "cell_expression": outputs.cell_expression_predictions,
    }


@contextmanager
def _in_float32(model: nn.Module) -> Any:
    """Compute in float32, widening one module's parameters at a time."""

    def widen(module: nn.Module, arguments: Any) -> None:
        module._narrow = dict(module._parameters)  # type: ignore[assignment]
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.float(), requires_grad=False)

    def narrow(module: nn.Module, arguments: Any, output: Any) -> None:
        module._parameters.update(module._narrow)  # type: ignore[arg-type]

    # The encoder of values casts them to this layer's type before the layer, and so its hook, runs.
    model.get_submodule("tahoe.embeddings.expression_encoder.linear1").float()
    with ExitStack() as stack:
        for module in model.modules():
            if any(p.dtype != torch.float32 for p in module.parameters(recurse=False)):
                stack.callback(module.register_forward_pre_hook(widen).remove)
                stack.callback(module.register_forward_hook(narrow).remove)
        yield


def _same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.dtype.itemsize]
    return torch.equal(ours.contiguous().view(bits), theirs.contiguous().view(bits))  # NaN equals itself, 0 is not -0


def weights_file(folder: Path) -> Path:
    """Return the file of a converted folder that says where its tensors are."""
    for name in (SINGLE, INDEX):  # in the order in which transformers looks for them
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has no {SINGLE}: it is not a converted checkpoint.")


def write_manifest(
    folder: Path, source: str, read: Mapping[str, Any], dtype: torch.dtype | None, verification: Verification
) -> None:
    """Write `conversion.json`: the origin of the weights, the written files, and the versions."""
    written = describe_files({path.name: path for path in folder.iterdir() if path.name != MANIFEST})
    manifest = {
        "source": source,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "num_parameters": verification.num_parameters,
        "verification": {**asdict(verification), "tolerance": TOLERANCE},
        "files_read": read,
        "files_written": written,
        "versions": {
            "tahoex1_hf": tahoex1_hf.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
