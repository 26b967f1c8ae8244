"""Tokenizing and embedding with the 70M shape (random weights), beside the machine's own matrix-multiply rate.

    python -m benchmarks [--cells 48] [--rounds 3] [--max-length 1024] [--json FILE]

The machine may be shared and noisy, so each round measures the matrix product and the work in turn, and what counts
is their ratio: useful floating-point operations per second (padding not counted) over those of a plain product.
"""

import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from scipy.sparse import csr_matrix

from benchmarks.cells import real_or_synthetic_cells, tokenizer_for
from tahoex1_hf import TahoeX1Config, TahoeX1Model
from tahoex1_hf.encoder import CellEncoder, choose_device


def matmul_rate(dtype: torch.dtype, device: torch.device, seconds: float = 1.0) -> float:
    """Floating-point operations per second of a 2048 x 2048 x 2048 product."""
    left, right = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        (left @ right).sum().item()  # waits for the device
        count += 1
    return count * 2 * 2048**3 / (time.perf_counter() - start)


def embedding_flops(config: TahoeX1Config, lengths: np.ndarray) -> float:
    """Operations that the embedding of cells of these lengths needs: two per multiplication, padding not counted.

    Per token and layer 4 d^2 for the attention's projections (query, key, value, output; heads not grouped) and
    2 d f for the feed-forward block, per pair of tokens 2 d for scores and sum; d^2 in the expression encoder.
    """
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    lengths = lengths.astype(np.float64)
    per_token = layers * (4 * d * d + 2 * d * f) + d * d
    return 2 * float(lengths.sum() * per_token + (lengths**2).sum() * layers * 2 * d)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(
    cells: Annotated[int, typer.Option(help="Cells to embed in a round; eight times as many are tokenized.")] = 48,
    rounds: int = 3,
    max_length: Annotated[int, typer.Option(help="Most tokens per cell.")] = 1024,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures there.")] = None,
) -> None:
    counts, gene_ids, source = real_or_synthetic_cells(8 * cells)
    tokenizer = tokenizer_for(gene_ids, max_length)
    genes = tokenizer.match_genes(gene_ids)
    torch.manual_seed(0)
    model = TahoeX1Model(TahoeX1Config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id))
    encoder = CellEncoder(model, tokenizer, device=choose_device())
    encoded = tokenizer.encode_counts(csr_matrix(counts[:cells]), genes)
    encoder.embed(encoded)  # warm-up
    flops = embedding_flops(model.config, encoded.lengths)

    results: dict[str, list[float]] = {"matmul": [], "tokenizing": [], "embedding": [], "fraction": []}
    for _ in range(rounds):
        before = matmul_rate(encoder.dtype, encoder.device)
        tokenizing = timed(lambda: tokenizer.encode_counts(counts, genes))
        embedding = timed(lambda: encoder.embed(encoded))
        rate = (before + matmul_rate(encoder.dtype, encoder.device)) / 2
        results["matmul"].append(rate / 1e9)
        results["tokenizing"].append(counts.shape[0] / tokenizing)
        results["embedding"].append(cells / embedding)
        results["fraction"].append(flops / embedding / rate)
    report = {name: statistics.median(values) for name, values in results.items()}
    report["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{source}: mean {np.diff(counts.indptr).mean():.0f} genes a cell; {encoder.device}, {encoder.dtype}, "
        f"{torch.get_num_threads()} threads; medians of {rounds} rounds"
    )
    print(f"matrix product        {report['matmul']:10.1f} GFLOP/s")
    print(f"tokenizing            {report['tokenizing']:10.0f} cells/s")
    print(f"embedding, 70M shape  {report['embedding']:10.2f} cells/s of mean {encoded.lengths.mean():.0f} tokens")
    print(f"useful FLOP/s         {100 * report['fraction']:10.0f} % of the matrix product's")
    print(f"peak memory           {report['peak_memory_gb']:10.2f} GB")
    if json_file is not None:
        json_file.write_text(json.dumps({"source": source, **report}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
