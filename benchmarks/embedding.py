"""Measure embedding cells and genes, from counts to rows of length 1, beside the reference."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from benchmarks import reference
from benchmarks.cells import cells_in_torch, ensembl_ids, synthetic_counts, tokenizer_for
from benchmarks.measuring import Row, Series, Suite, Task, in_turn
from tahoex1_hf import TahoeX1Config, TahoeX1Model
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch
from tahoex1_hf.inference.encoder import CellEncoder, GeneMeans, choose_dtype
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer
from tahoex1_hf.training.flops import embedding_flops

COLUMNS, CONTEXT = 20_000, 2048
TOLERANCE = 1e-4  # largest difference between embeddings of length 1, in float32


def random_model(model_class: type[Any], config: TahoeX1Config) -> Any:
    """Return a model with random weights, biases and norms, so that none can be mistaken for another."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def reference_shape(config: TahoeX1Config) -> reference.Shape:
    """Return the reference's settings for the same shape."""
    return reference.Shape(config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads)


@dataclass
class Subject:
    """The same cells and weights for the reference and for ours, with the last results of both."""

    counts: csr_matrix
    tokenizer: TahoeX1Tokenizer
    genes: GeneMatch
    theirs: reference.Reference
    context: int = CONTEXT
    results: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each cell."""
        return np.diff(self.counts.indptr) + 1

    @property
    def cells(self) -> list[reference.Cell]:
        """Cells as the reference takes them."""
        return cells_in_torch(self.counts, self.genes.token_ids)

    def rate(self, name: str, work: Callable[[], np.ndarray]) -> float:
        """Return the cells per second of some work, and keep its result to be compared."""
        start = time.perf_counter()
        self.results[name] = work()
        return self.counts.shape[0] / (time.perf_counter() - start)

    def reference_rate(self) -> float:
        """Return the cells per second of the reference."""
        cells = self.cells
        return self.rate("reference", lambda: reference.embed(self.theirs, cells, self.context).numpy())

    def our_rate(self, name: str, encoder: CellEncoder) -> float:
        """Return the cells per second of ours."""
        return self.rate(name, lambda: encoder.embed(self.tokenizer.encode_counts(self.counts, self.genes)))

    def compare(self, name: str) -> dict[str, float]:
        """Return the largest difference from the reference's embeddings, and the smallest cosine with them."""
        ours, theirs = (self.results[which].astype(np.float64) for which in (name, "reference"))
        cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
        return {"max_difference": float(np.abs(ours - theirs).max()), "min_cosine": float(cosines.min())}


def kinds_of_cells(suite: Suite) -> dict[str, np.ndarray]:
    """Return the tokens of each cell, `<cls>` included; all cells fit into the context, so that none is sampled."""
    rng = np.random.default_rng(0)
    short, ragged, long = suite.pick((32, 16, 8), (16, 16, 8))
    most = suite.pick(CONTEXT, 512)
    return {
        "short (200-400 tokens)": rng.integers(200, 401, short),
        f"ragged (200-{most:,} tokens)": rng.integers(200, most + 1, ragged),
        f"long ({most:,} tokens)": np.full(long, most),
    }


def make_encoders(model: TahoeX1Model, tokenizer: TahoeX1Tokenizer) -> tuple[dict[str, CellEncoder], dict[str, str]]:
    """Make encoders by precision; for precisions without one, return the reason."""
    encoders = {"float32": CellEncoder(model, tokenizer, device="cpu", dtype="float32")}
    missing = {}
    if choose_dtype("auto", torch.device("cpu")) == torch.bfloat16:
        encoders["bfloat16"] = CellEncoder(model, tokenizer, device="cpu", dtype="bfloat16")
    else:
        missing["bfloat16"] = "this CPU has no bfloat16 instructions"
    try:
        encoders["int8"] = CellEncoder(model, tokenizer, device="cpu", dtype="int8")
    except (ImportError, ValueError) as error:
        missing["int8"] = str(error)
    return encoders, missing


def measure(suite: Suite) -> list[Row]:
    """Return the rows of the part `embedding`."""
    names = ensembl_ids(COLUMNS)
    tokenizer = tokenizer_for(names, CONTEXT)
    genes = tokenizer.match_genes(names)
    model = random_model(TahoeX1Model, suite.config())
    theirs = reference.embedding_reference(reference_shape(model.config), model.state_dict())
    encoders, missing = make_encoders(model, tokenizer)
    warm_up = Subject(synthetic_counts(np.array([99, 180]), COLUMNS, seed=2), tokenizer, genes, theirs)
    warm_up.reference_rate()
    for name, encoder in encoders.items():
        warm_up.our_rate(name, encoder)
    check(warm_up.compare("float32"))

    rows = []
    for kind, lengths in kinds_of_cells(suite).items():
        subject = Subject(synthetic_counts(lengths - 1, COLUMNS), tokenizer, genes, theirs)
        # With int8 weights, which take as long as float32, one kind is enough.
        here = {name: each for name, each in encoders.items() if name != "int8" or kind.startswith("ragged")}
        series = in_turn(_tasks(suite, subject, here, model.config), suite.rounds)
        check(subject.compare("float32"))
        rows += [
            _row(suite, f"{kind}, {name}", series[name], series["reference"], subject.compare(name)) for name in here
        ]
        rows += [Row("embedding", f"{kind}, {name}", not_measured=reason) for name, reason in missing.items()]
    return rows


def check(figures: dict[str, float]) -> None:
    """Raise AssertionError where ours differs from the reference in float32."""
    assert figures["max_difference"] < TOLERANCE, f"embeddings differ from the reference's: {figures}"


def performed_flops(config: TahoeX1Config, lengths: np.ndarray) -> float:
    """Return the operations that this package performs on a CPU where only `<cls>` is asked for.

    All layers but the last are computed for every token. The last projects only `<cls>` (its query, the query times
    the key's matrix, the value of the mean, the output, the feed-forward block), and visits each token twice per head.
    The expression encoder runs on a batch's distinct values, which are too few to count.
    """
    d, f = config.hidden_size, config.intermediate_size or 4 * config.hidden_size
    tokens = float(lengths.sum())
    before_last = embedding_flops(config, lengths) / 2 - tokens * d * d  # without the expression encoder
    before_last *= (config.num_hidden_layers - 1) / config.num_hidden_layers
    last = len(lengths) * (4 * d * d + 2 * d * f) + tokens * 2 * config.num_attention_heads * d
    return 2 * (before_last + last)


def _tasks(suite: Suite, subject: Subject, encoders: dict[str, CellEncoder], config: TahoeX1Config) -> dict[str, Task]:
    gflop = {
        "useful": embedding_flops(config, subject.lengths) / subject.counts.shape[0] / 1e9,
        "performed": performed_flops(config, subject.lengths) / subject.counts.shape[0] / 1e9,
    }
    useful = {"useful": gflop["useful"]}
    tasks = {"reference": Task(subject.reference_rate, suite.limits["matmul float32"], useful)}
    for name, encoder in encoders.items():
        # Products have the type of the activations, which int8 weights do not change.
        limit = suite.limits["matmul bfloat16" if encoder.dtype == torch.bfloat16 else "matmul float32"]
        # With quantised weights the last layer projects all keys and values.
        costs = gflop if name != "int8" else useful
        tasks[name] = Task(partial(subject.our_rate, name, encoder), limit, costs)
    return tasks


def _row(suite: Suite, name: str, ours: Series, theirs: Series, figures: dict[str, float]) -> Row:
    remark = f"max difference {figures['max_difference']:.1e}, min cosine {figures['min_cosine']:.6f}"
    row = Row("embedding", name, "cells/s", ours, theirs, remark, details={**figures, "shape": suite.shape_name})
    if row.ratio is not None and "performed" in row.fractions:
        # The ratio that would result if all operations ran at the rate of a plain matrix product.
        row.details["bound_of_ratio"] = bound = row.ratio / row.fractions["performed"]
        row.remark += f"; at the limit's rate {bound:.2f} times the reference"
    return row


def measure_genes(suite: Suite) -> list[Row]:
    """Return the rows of the part `genes`: embeddings, and each gene's mean last hidden state over the cells."""
    names = ensembl_ids(COLUMNS)
    tokenizer = tokenizer_for(names, CONTEXT)
    genes = tokenizer.match_genes(names)
    model = random_model(TahoeX1Model, suite.config())
    theirs = reference.embedding_reference(reference_shape(model.config), model.state_dict())
    encoder = CellEncoder(model, tokenizer, device="cpu", dtype="float32")
    lengths = np.random.default_rng(1).integers(200, suite.pick(CONTEXT, 512) + 1, 8)
    subject = Subject(synthetic_counts(lengths - 1, COLUMNS), tokenizer, genes, theirs)
    cells, means = subject.cells, {}

    def reference_work() -> np.ndarray:
        embeddings, by_token = reference.embed_with_genes(theirs, cells, CONTEXT)
        means["reference"] = by_token.numpy()[genes.token_ids]
        return embeddings.numpy()

    def our_work() -> np.ndarray:
        running = GeneMeans(genes.token_ids, model.config.vocab_size, encoder.width, encoder.device)
        embeddings = encoder.embed(tokenizer.encode_counts(subject.counts, genes), running)
        means["ours"] = running.means(genes.token_ids)
        return embeddings

    limit = suite.limits["matmul float32"]
    gflop = {"useful": embedding_flops(model.config, lengths) / len(lengths) / 1e9}
    tasks = {
        "reference": Task(lambda: subject.rate("reference", reference_work), limit, gflop),
        "ours": Task(lambda: subject.rate("ours", our_work), limit, gflop),
    }
    series = in_turn(tasks, suite.rounds)
    figures = subject.compare("ours")
    check(figures)
    np.testing.assert_array_equal(np.isnan(means["ours"]), np.isnan(means["reference"]))
    # Hidden states come out of a layer norm: their numbers are about 1, not 1/sqrt(width) as in an embedding.
    figures["max_difference_of_gene_means"] = float(np.nanmax(np.abs(means["ours"] - means["reference"])))
    assert figures["max_difference_of_gene_means"] < 1e-3, f"mean gene embeddings differ: {figures}"
    row = _row(suite, "cells and gene means, ragged, float32", series["ours"], series["reference"], figures)
    row.part = "genes"
    row.remark = f"max difference {figures['max_difference']:.1e}, of gene means "
    row.remark += f"{figures['max_difference_of_gene_means']:.1e}"
    return [row]
