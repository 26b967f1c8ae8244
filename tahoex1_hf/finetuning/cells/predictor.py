# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuned models that predict a class or a number for a cell.

The prediction for a cell depends on the cell alone, not on its place in the file or on the other cells.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel

from tahoex1_hf.cells.encoding import ChunkEncoder, EncodeOptions, report_unknown_drugs
from tahoex1_hf.cells.readers.base import CellInput
from tahoex1_hf.common.prefetch import prefetch
from tahoex1_hf.hub.adapter_weights import ADAPTER_CONFIG
from tahoex1_hf.hub.adapters import RECORD, find_adapter, load_adapter, read_record
from tahoex1_hf.hub.loading import find_model, load_folder, load_tokenizer
from tahoex1_hf.hub.models import without_peft
from tahoex1_hf.hub.whole_weights import has_part
from tahoex1_hf.inference.chunks import average, with_settings
from tahoex1_hf.inference.encoder import CellEncoder, Dtype
from tahoex1_hf.inference.finite import check_results
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForSequenceClassification
from tahoex1_hf.padding_tahoe_x1 import EncodedCells
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

if TYPE_CHECKING:
    from peft import PeftModel

PREFIX = "tahoex1_"


@dataclass(frozen=True, eq=False)
class Predictor:
    """A fine-tuned model, ready to predict.

    Attributes:
        model: Model with its head, and its adapter if it has one.
        tokenizer: Tokenizer of the model.
        record: Content of `finetuning.json`; empty where there is none.
        name: Folder or Hub id that the model was loaded from.
    """

    model: TahoeX1ForSequenceClassification
    tokenizer: TahoeX1Tokenizer
    record: dict[str, Any]
    name: str

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes; None where a number is predicted."""
        config: Any = self.model.config
        if config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1):
            return None
        return [str(config.id2label[number]) for number in range(config.num_labels)]

    @property
    def column(self) -> str:
        """Column of obs for the predictions: `tahoex1_` and the label, or `tahoex1_prediction` without a label."""
        label = self.record.get("label") or "prediction"
        return PREFIX + str(label).replace("/", "_")


def load_predictor(
    source: "str | Path | PreTrainedModel | PeftModel | Predictor",
    base: str | Path | None = None,
    tokenizer: TahoeX1Tokenizer | None = None,
    size: str | None = None,
) -> Predictor:
    """Load a model that predicts a class or a number for a cell.

    Args:
        source: Folder or Hub id of an adapter, or of a model that was fine-tuned as a whole; or a loaded model.
        base: Folder or Hub id of an adapter's base; by default the one that the adapter names.
        tokenizer: Tokenizer of a loaded model; by default the one in the model's folder or repository.
        size: Name of the size of the base, or of the model, where a folder or repository holds several.

    Raises:
        FileNotFoundError: For an adapter, a model or a base that cannot be found.
        ValueError: For a model without a head for cells, a base of another size or vocabulary, and a loaded model
            without its tokenizer.
    """
    if size is not None and not isinstance(source, (str, Path)):
        raise ValueError(f"size={size!r} chooses among models by name, and model is loaded already: leave it out.")
    if isinstance(source, Predictor):
        return source
    if isinstance(source, torch.nn.Module):
        return _loaded_model(source, tokenizer)
    folder = find_adapter(source)
    if size is not None and not _is_tuned(folder):
        folder, size = find_model(folder, size=size), None
    if not _is_tuned(folder):
        return Predictor(_whole_model(folder), tokenizer or load_tokenizer(folder), {}, str(source))
    record = read_record(folder)
    if record["model_class"] != TahoeX1ForSequenceClassification.__name__:
        trained_for = record.get("task") or record["model_class"]
        raise ValueError(
            f"{source} was trained for {trained_for}: predict serves the classification and regression of cells."
        )
    loaded, own = load_adapter(folder, base, size=size)
    return Predictor(without_peft(loaded), tokenizer or own, record, str(source))


def _is_tuned(folder: Path) -> bool:
    return (folder / RECORD).is_file() or (folder / ADAPTER_CONFIG).is_file()


def with_overflow(predictor: Predictor, overflow: str | None) -> Predictor:
    """Return a predictor that takes other genes of long cells; None means as the model was trained."""
    return replace(predictor, tokenizer=with_settings(predictor.tokenizer, None, overflow))


def _loaded_model(model: Any, tokenizer: TahoeX1Tokenizer | None) -> Predictor:
    inner = without_peft(model)
    if not isinstance(inner, TahoeX1ForSequenceClassification):
        raise ValueError(
            f"model is a {type(inner).__name__}: predictions for cells need a TahoeX1ForSequenceClassification."
        )
    if tokenizer is None:
        raise ValueError("tokenizer is missing: pass that of the loaded model, or the model's folder instead.")
    return Predictor(inner.eval(), tokenizer, {}, str(inner.name_or_path))


def _whole_model(folder: Path) -> TahoeX1ForSequenceClassification:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds neither an adapter ({ADAPTER_CONFIG}) nor a model (config.json).")
    if not has_part(folder, "classifier"):
        raise ValueError(
            f"{folder} has no head to predict with: it is a base. Fine-tune it (tahoex1 finetune), and pass the "
            "folder of that run."
        )
    model: TahoeX1ForSequenceClassification = load_folder(folder, TahoeX1ForSequenceClassification)
    return model.eval()


class CellPredictor:
    """A predictor on a device.

    Args:
        predictor: Model and tokenizer; the model is moved to the device.
        batch_tokens: Most tokens of a batch; by default suited to the device.
        device: Device to compute on; by default the fastest there is.
        dtype: Precision of the matrix products, as in `embed_anndata`; the head is always computed in float32.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        batch_tokens: int | None = None,
        device: str | torch.device | None = None,
        dtype: Dtype = "auto",
    ):
        self.tokenizer, self.classes = predictor.tokenizer, predictor.classes
        self.encoder = CellEncoder(
            predictor.model, predictor.tokenizer, batch_tokens=batch_tokens, device=device, dtype=dtype
        )
        self.head = predictor.model.classifier.to(self.encoder.device).float().eval()

    @torch.inference_mode()
    def predict(self, cells: EncodedCells, on_batch: Any = lambda num_cells: None) -> np.ndarray:
        """Predict classes or numbers.

        Args:
            cells: Encoded cells.
            on_batch: Function called after each batch with its number of cells.

        Returns:
            `(cells, classes)` float32 probabilities, or `(cells,)` float32 numbers.
        """
        outputs = np.empty((cells.num_cells, self.head_width), dtype=np.float32)
        for rows, pooled in self.encoder.pooled_batches(cells):
            values = self.head(pooled.float()).float()
            outputs[rows] = (values if self.classes is None else values.softmax(1)).cpu().numpy()
            on_batch(len(rows))
        return outputs[:, 0] if self.classes is None else outputs

    @property
    def head_width(self) -> int:
        """Number of outputs of the head."""
        return 1 if self.classes is None else len(self.classes)

    def predict_chunks(
        self, cells: CellInput, options: EncodeOptions, on_batch: Any = lambda num_cells: None
    ) -> Iterator[tuple[EncodedCells, np.ndarray, np.ndarray]]:
        """Predict chunk after chunk; the next is read while the model computes.

        Args:
            cells: Cells to predict for, sorted by cell.
            options: Drugs of the cells, what becomes of unknown ones, and the number of samples of long cells.
            on_batch: Function called after each batch with its number of cells.

        Yields:
            A chunk; its predictions, as `predict` returns them, means where there are several samples of a cell; and
            `(cells,)` float32, how far they vary with the sample (see `average`), 0 for cells with one sample.

        Raises:
            ValueError: If a prediction is not finite; the message names the cell.
        """
        chunks = ChunkEncoder(cells, options)
        report_unknown_drugs([chunks.drug_ids])
        for chunk in prefetch(chunks.chunks(0, cells.num_cells)):
            outputs = self.predict(chunk, on_batch)
            deviations = np.zeros(len(outputs), dtype=np.float32)
            if chunk.samples:
                others = (self.predict(sample) for sample in chunk.samples)
                long = chunk.samples[0].cell_numbers - chunk.cell_numbers[0]
                columns = (len(long), self.head_width)
                means, deviations[long] = average(
                    outputs[long].reshape(columns), (other.reshape(columns) for other in others)
                )
                outputs[long] = means.reshape(outputs[long].shape)
            check_results(outputs, chunk.cell_numbers, cells, self.encoder.dtype_name)
            yield chunk, outputs, deviations
