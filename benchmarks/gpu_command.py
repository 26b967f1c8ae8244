"""The command `tahoex1 embed` on a GPU: its seconds until the first batch, and its rate beside the model's own."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import child
from benchmarks.gpu_measuring import Check, RandomCells, cell_lengths, stand_in_tokenizer

FEW = 64  # cells of a command that does hardly anything but start


def check(run: Check, settings: dict[str, Any]) -> None:
    """Measure the command on a file of many cells, and on one of a few.

    Args:
        run: The check.
        settings: Shape of the model.
    """
    lengths = cell_lengths(300, 20, 5, 40) if run.tiny else cell_lengths(20_000, 900, 64, 2048)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        vocab_size = _write(place, lengths, settings)
        for name, number in (("few", FEW), ("cells", len(lengths))):
            if not run.has_time(f"tahoex1 embed, {number} cells"):
                return
            with run.attempt(f"tahoex1 embed, {number} cells"):
                times, more = _timed(run, place, name), {}
                first = times.pop("first_cells")
                if name != "few":
                    rate = (number - first) / (times["last_batch_s"] - times["first_batch_s"])
                    own = number / _own_seconds(run, place, lengths, vocab_size)
                    more = {"cells_per_s": rate, "models_cells_per_s": own, "of_the_models_rate": rate / own}
                run.row(f"tahoex1 embed, {number:,} cells, 70M", **times, **more)


def _write(folder: Path, lengths: list[int], settings: dict[str, Any]) -> int:
    """Write a model, and files of cells with as many genes as to make so many tokens; return the vocabulary's size."""
    import anndata
    import pandas as pd
    import scipy.sparse as sp

    from tahoex1_hf import TahoeX1Config, TahoeX1Model, TahoeX1Tokenizer

    genes = [f"ENSG{number:011d}" for number in range(100 if settings else 30_000)]
    vocab = {token: number for number, token in enumerate(["<pad>", "<cls>", "<eoc>", *genes])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    TahoeX1Model(TahoeX1Config(**{**settings, "vocab_size": len(vocab)})).save_pretrained(folder / "model")
    TahoeX1Tokenizer(str(folder / "vocab.json"), context_length=2048).save_pretrained(folder / "model")
    random = np.random.default_rng(0)
    numbers = np.asarray(lengths) - 1
    offsets = np.concatenate([[0], np.cumsum(numbers)])
    # Neighbours in a row differ by a step that is prime to the number of genes, so that no gene comes twice.
    starts, steps = np.repeat(random.integers(0, len(genes), len(numbers)), numbers), 7
    columns = (starts + steps * (np.arange(offsets[-1]) - np.repeat(offsets[:-1], numbers))) % len(genes)
    counts = random.geometric(0.3, offsets[-1]).astype(np.float32)
    matrix = sp.csr_matrix((counts, columns.astype(np.int32), offsets), shape=(len(numbers), len(genes)))
    matrix.sort_indices()
    for name, rows in (("few", FEW), ("cells", len(numbers))):
        names = pd.Index([f"cell{number}" for number in range(rows)])
        anndata.AnnData(matrix[:rows], pd.DataFrame(index=names), pd.DataFrame(index=genes)).write_h5ad(
            folder / f"{name}.h5ad"
        )
    return len(vocab)


def _timed(run: Check, folder: Path, name: str) -> dict[str, float]:
    """Run the command, and return the seconds since it was called."""
    clock = folder / f"{name}.json"
    arguments = ["embed", f"{folder}/{name}.h5ad", f"{folder}/{name}.npy", "--model", f"{folder}/model"]
    options = ["--device", run.device.type, "--dtype", "bfloat16"]
    began = time.time()
    child.python("-m", "benchmarks.gpu_clock", str(began), str(clock), *arguments, *options).checked()
    times: dict[str, float] = json.loads(clock.read_text())
    return {**times, "whole_s": time.time() - began}


def _own_seconds(run: Check, folder: Path, lengths: list[int], vocab_size: int) -> float:
    """Return the seconds that the model takes for encoded cells of these lengths, in batches of similar ones."""
    from tahoex1_hf import TahoeX1Model
    from tahoex1_hf.inference.encoder import CellEncoder

    model = TahoeX1Model.from_pretrained(folder / "model")
    encoder = CellEncoder(model, stand_in_tokenizer(vocab_size), device=run.device, dtype="bfloat16")
    cells = RandomCells(lengths, vocab_size).encoded()
    encoder.embed(RandomCells(lengths[:FEW], vocab_size).encoded())
    start = time.perf_counter()
    encoder.embed(cells)
    return time.perf_counter() - start
