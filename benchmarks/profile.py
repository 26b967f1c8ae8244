"""Measure the shares of an embedding's time by kind of operation, which show where time could be gained."""

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cells import ensembl_ids, synthetic_counts, tokenizer_for
from benchmarks.embedding import COLUMNS, CONTEXT, random_model
from benchmarks.measuring import Row, Series, Suite, progress
from tahoex1_hf import TahoeX1Model
from tahoex1_hf.inference import compiled_attention
from tahoex1_hf.inference.encoder import CellEncoder

KINDS = {
    "matrix products": ("aten::addmm", "aten::addmm_", "aten::mm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu", compiled_attention.NAME),
    "layer norms": ("aten::native_layer_norm",),
}


def measure(suite: Suite) -> list[Row]:
    """Return the rows of this part: shares of the operations' time, in percent."""
    names = ensembl_ids(COLUMNS)
    tokenizer = tokenizer_for(names, CONTEXT)
    encoder = CellEncoder(random_model(TahoeX1Model, suite.config()), tokenizer, device="cpu", dtype="float32")
    lengths = np.random.default_rng(0).integers(200, suite.pick(CONTEXT, 512), 8)
    cells = tokenizer.encode_counts(synthetic_counts(lengths, COLUMNS), tokenizer.match_genes(names))
    encoder.embed(cells)
    shares: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "all else")}
    for number in range(suite.rounds):
        progress(f"  round {number + 1} of {suite.rounds}")
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as run, torch.inference_mode():
            encoder.embed(cells)
        times = {event.key: event.self_cpu_time_total for event in run.key_averages()}
        total = sum(times.values())
        for kind, operations in KINDS.items():
            shares[kind].append(100 * sum(times.get(name, 0.0) for name in operations) / total)
        shares["all else"].append(100 - sum(shares[kind][-1] for kind in KINDS))
    return [
        Row("profile", kind, "% of time", Series(values), remark=f"ragged cells, float32, {suite.shape_name}")
        for kind, values in shares.items()
    ]
