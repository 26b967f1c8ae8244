# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuned models that predict a class or a number for a cell.

The prediction for a cell depends on the cell alone, not on its place in the file or on the other cells.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from tahoex1_hf.cells import encoding
from tahoex1_hf.cells.encoding import DrugIds, EncodeOptions, report_unknown_drugs
from tahoex1_hf.cells.readers.base import CellInput
from tahoex1_hf.common.prefetch import prefetch
from tahoex1_hf.encoding_tahoe_x1 import GeneRows
from tahoex1_hf.finetuning.cells.labelled import SAMPLE_SEED
from tahoex1_hf.hub.adapter_weights import ADAPTER_CONFIG
from tahoex1_hf.hub.adapters import RECORD, find_adapter, load_adapter, read_record
from tahoex1_hf.hub.loading import load_folder, load_tokenizer
from tahoex1_hf.hub.models import without_peft
from tahoex1_hf.hub.whole_weights import has_part
from tahoex1_hf.inference.encoder import CellEncoder, Dtype
from tahoex1_hf.inference.finite import check_results
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForSequenceClassification
from tahoex1_hf.padding_tahoe_x1 import EncodedCells, report_empty
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.get_logger(__name__)

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
) -> Predictor:
    """Load a model that predicts a class or a number for a cell.

    Args:
        source: Folder or Hub id of an adapter, or of a model that was fine-tuned as a whole; or a loaded model.
        base: Folder or Hub id of an adapter's base; by default the one that the adapter names.
        tokenizer: Tokenizer of a loaded model; by default the one in the model's folder or repository.

    Raises:
        FileNotFoundError: For an adapter, a model or a base that cannot be found.
        ValueError: For a model without a head for cells, a base of another size or vocabulary, and a loaded model
            without its tokenizer.
    """
    if isinstance(source, Predictor):
        return source
    if isinstance(source, torch.nn.Module):
        return _loaded_model(source, tokenizer)
    folder = find_adapter(source)
    if not (folder / RECORD).is_file() and not (folder / ADAPTER_CONFIG).is_file():
        return Predictor(_whole_model(folder), tokenizer or load_tokenizer(folder), {}, str(source))
    record = read_record(folder)
    if record["model_class"] != TahoeX1ForSequenceClassification.__name__:
        trained_for = record.get("task") or record["model_class"]
        raise ValueError(
            f"{source} was trained for {trained_for}: predict serves the classification and regression of cells."
        )
    loaded, own = load_adapter(folder, base)
    return Predictor(without_peft(loaded), tokenizer or own, record, str(source))


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

    def encode(self, rows: GeneRows, drug_ids: np.ndarray | None) -> EncodedCells:
        """Encode cells; which genes of long cells are kept follows from their counts."""
        encoded = self.tokenizer.encode_rows(
            rows,
            drug_ids=drug_ids,
            seed=SAMPLE_SEED,
            warn=logger.warning_once,
        )
        report_empty(encoded)
        return encoded

    @torch.inference_mode()
    def predict(self, cells: EncodedCells, on_batch: Any = lambda num_cells: None) -> np.ndarray:
        """Predict classes or numbers.

        Args:
            cells: Cells from `encode`.
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
    ) -> Iterator[tuple[EncodedCells, np.ndarray]]:
        """Yield encoded cells and predictions, chunk after chunk; the next is read while the model computes.

        Args:
            cells: Cells to predict for, sorted by cell.
            options: Drugs of the cells, and what becomes of unknown ones.
            on_batch: Function called after each batch with its number of cells.

        Raises:
            ValueError: If a prediction is not finite; the message names the cell.
        """
        drug_ids = DrugIds(cells, options)
        report_unknown_drugs([drug_ids])
        chunks = cells.chunks(0, cells.num_cells, encoding.CHUNK_CELLS, drug_ids.columns)
        done = 0
        for encoded in prefetch(self.encode(chunk, drug_ids.of_rows(chunk)) for chunk in chunks):
            outputs = self.predict(encoded, on_batch)
            check_results(outputs, range(done, done + len(outputs)), cells, self.encoder.dtype_name)
            yield encoded, outputs
            done += len(outputs)
