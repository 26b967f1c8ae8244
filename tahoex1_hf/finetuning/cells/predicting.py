# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Predictions of a fine-tuned model for all cells of a file, in bounded memory.

What is predicted for a cell depends on the cell alone: not on its place in the file, nor on the cells beside it.
"""

import copy
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from tahoex1_hf.cells.files import StoredInput, open_inputs
from tahoex1_hf.cells.inputs import Chunk, EncodeOptions
from tahoex1_hf.common.prefetch import prefetch
from tahoex1_hf.encoding_tahoe_x1 import EncodedCells, GeneRows
from tahoex1_hf.finetuning.cells.labelled import SAMPLE_SEED
from tahoex1_hf.finetuning.cells.prediction_output import PredictionWriter
from tahoex1_hf.finetuning.sampling import content_numbers
from tahoex1_hf.hub.adapters import ADAPTER_CONFIG, RECORD, find_adapter, is_peft, load_adapter, read_record
from tahoex1_hf.inference.encoder import CellEncoder, DtypeName
from tahoex1_hf.inference.provenance import provenance
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForSequenceClassification
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.get_logger(__name__)

PREFIX = "tahoex1_"
_SETTINGS = (
    "layer",
    "gene_id_column",
    "drugs",
)  # of the training, which hold for other files too where nothing is said


@dataclass(frozen=True, eq=False)
class Predictor:
    """A fine-tuned model, ready to predict.

    Attributes:
        model: with its head, and its adapter if it has one.
        tokenizer: of its cells.
        record: what `finetuning.json` says; empty where there is none.
        name: folder or Hub id that it came from.
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
        """Column of obs that predictions go to: `tahoex1_` and the label, or `tahoex1_prediction` without a name."""
        label = self.record.get("label") or "prediction"
        return PREFIX + str(label).replace("/", "_")


def load_predictor(source: str | Path, base: str | Path | None = None) -> Predictor:
    """Load what predicts a class or a number for a cell.

    Args:
        source: folder or Hub id of an adapter, or of a model that was fine-tuned as a whole.
        base: where an adapter's base is now; by default it is where the adapter says.

    Raises:
        FileNotFoundError: for an adapter, a model or a base that cannot be found.
        ValueError: for a model without a head for cells, and a base of another size or vocabulary.
    """
    folder = find_adapter(source)
    if not (folder / RECORD).is_file() and not (folder / ADAPTER_CONFIG).is_file():
        return Predictor(_whole_model(folder), TahoeX1Tokenizer.from_pretrained(folder), {}, str(source))
    record = read_record(folder)
    if record["model_class"] != TahoeX1ForSequenceClassification.__name__:
        trained_for = record.get("task") or record["model_class"]
        raise ValueError(
            f"{source} was trained for {trained_for}: predict is for the classification and regression of cells."
        )
    with _quiet():
        loaded, tokenizer = load_adapter(folder, base)
    return Predictor(loaded.get_base_model() if is_peft(loaded) else loaded, tokenizer, record, str(source))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report that a base has no head: the adapter brings it."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _whole_model(folder: Path) -> TahoeX1ForSequenceClassification:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds neither an adapter ({ADAPTER_CONFIG}) nor a model (config.json).")
    with _quiet():  # what is missing is looked at here
        loaded: Any = TahoeX1ForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    if any(name.startswith("classifier.") for name in info["missing_keys"]):
        raise ValueError(
            f"{folder} has no head to predict with: it is a base. Fine-tune it (examples/finetune_lora.py), and pass "
            "what comes out."
        )
    return model.eval()


class CellPredictor:
    """A predictor on a device.

    Args:
        predictor: model and tokenizer; the model is moved to the device.
        batch_tokens: most tokens of a batch; by default fit for the device.
        device: by default the fastest there is.
        dtype: precision of the matrix products, as in `embed_anndata`; the head is always computed in float32.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        batch_tokens: int | None = None,
        device: str | torch.device | None = None,
        dtype: DtypeName = "auto",
    ):
        self.tokenizer, self.classes = predictor.tokenizer, predictor.classes
        self.encoder = CellEncoder(
            predictor.model, predictor.tokenizer, batch_tokens=batch_tokens, device=device, dtype=dtype
        )
        self.head = predictor.model.classifier.to(self.encoder.device).float().eval()

    def counts_tokenizer(self) -> TahoeX1Tokenizer:
        """A tokenizer that leaves counts as they are, and cells whole, for the reading of cells."""
        raw = copy.copy(self.tokenizer)
        raw.value_encoding, raw.context_length, raw.first_gene_raw = "raw", None, False
        return raw

    def encode(self, cells: EncodedCells) -> EncodedCells:
        """Encode cells that `counts_tokenizer` read; genes of cells that are too long are chosen by what they hold."""
        keep = self.tokenizer.is_gene[cells.input_ids]  # special tokens are put in anew
        rows = GeneRows(cells.input_ids, cells.expression_values, cells.offsets).select(keep)
        return self.tokenizer.encode_rows(
            rows,
            drug_ids=cells.drug_ids,
            cell_numbers=content_numbers(rows),
            seed=SAMPLE_SEED,
            warn=logger.warning_once,
        )

    @torch.inference_mode()
    def predict(self, cells: EncodedCells, on_batch: Any = lambda num_cells: None) -> np.ndarray:
        """Predict.

        Args:
            cells: from `encode`.
            on_batch: called after each batch with its number of cells.

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
        """Outputs of the head."""
        return 1 if self.classes is None else len(self.classes)

    def predict_chunks(
        self, chunks: Iterator[Chunk], on_batch: Any = lambda num_cells: None
    ) -> Iterator[tuple[EncodedCells, np.ndarray]]:
        """Encoded cells and predictions, chunk after chunk; the next is read while the model works on this one."""
        for cells in prefetch(self.encode(chunk.cells) for chunk in chunks):
            yield cells, self.predict(cells, on_batch)


def predict_file(
    source: str | Path,
    output: str | Path,
    predictor: Predictor,
    *,
    layer: str | None = None,
    gene_id_column: str | None = None,
    gene_symbols: Mapping[str, str] | None = None,
    drugs: str | None = None,
    batch_tokens: int | None = None,
    device: str | torch.device | None = None,
    dtype: DtypeName = "auto",
    progress: bool = True,
) -> str:
    """Write a file's cells with what a model predicts for them.

    The output is the input plus `obs["tahoex1_<label>"]`, the predicted class or number; for classes also
    `obsm["tahoex1_<label>_probabilities"]`, one column per class in the order of `uns["tahoex1_<label>"]["classes"]`.
    Cells without a gene that the model knows are predicted from the `<cls>` token alone; a warning says so, and `uns`
    counts them.

    Args:
        source: `.h5ad` file with raw counts; read piece by piece, and left as it is.
        output: `.h5ad` file to write, which may be the source. It appears when it is complete.
        predictor: from `load_predictor`.
        layer: layer with the counts. Here and in the next two, None is as in the training, "" is the default.
        gene_id_column: column of var with Ensembl ids.
        drugs: for models with a drug encoder: a column of obs, or one drug for all cells.
        gene_symbols: gene symbol -> Ensembl id.
        batch_tokens: most tokens of a batch; changes speed and memory, not the result.
        device: by default the fastest there is.
        dtype: as in `embed_anndata`.
        progress: whether to show a progress bar.

    Returns:
        Name of the column.

    Raises:
        FileNotFoundError: for a source that does not exist.
        ValueError: for files and arguments that cannot be used; the message says what to do.
    """
    source, output = Path(source), Path(output)
    check_files(source, output)
    given = {"layer": layer, "gene_id_column": gene_id_column, "drugs": drugs}
    chosen = {name: (predictor.record.get(name) if given[name] is None else given[name]) or None for name in _SETTINGS}
    ready = CellPredictor(predictor, batch_tokens=batch_tokens, device=device, dtype=dtype)
    options = EncodeOptions(ready.counts_tokenizer(), seed=SAMPLE_SEED, gene_symbols=gene_symbols, **chosen)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as spool:
        [cells] = open_inputs([str(source)], options, Path(spool))
        if not isinstance(cells, StoredInput):
            raise ValueError(f"{source} is not an .h5ad file that holds an AnnData.")
        cells.sort_by_cell()
        writer = PredictionWriter(source, output, predictor.column, cells.num_cells, predictor.classes)
        num_empty = 0
        try:
            with tqdm(total=cells.num_cells, unit="cell", desc="Predicting", disable=not progress) as bar:
                for part, predictions in ready.predict_chunks(cells.chunks(0, cells.num_cells), bar.update):
                    writer.write(predictions)
                    num_empty += len(part.empty_cells)
            writer.finish(_provenance(predictor, ready, options, cells, num_empty))
        except BaseException:
            writer.abandon()
            raise
    return predictor.column


def check_files(source: Path, output: Path) -> None:
    """Raise where a file could not be read or written, before any work is done."""
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist.")
    for name, path in (("input", source), ("output", output)):
        if path.suffix != ".h5ad":
            raise ValueError(f"The {name} must be an .h5ad file, got {path.name!r}.")
    if not output.parent.is_dir():
        raise ValueError(f"The output's folder {output.parent} does not exist.")


def _provenance(
    predictor: Predictor, ready: CellPredictor, options: EncodeOptions, cells: StoredInput, num_empty: int
) -> dict[str, Any]:
    told = EncodeOptions(ready.tokenizer, seed=options.seed)  # the tokenizer that the model's cells are encoded by
    facts = provenance(str(predictor.record.get("model") or predictor.name), ready.encoder, told, [cells], num_empty)
    del facts["normalized"]  # the head sees embeddings as they are
    return {"adapter": predictor.name, "label": str(predictor.record.get("label") or ""), **facts}
