"""Malformed inputs by the thousand, each given to a command in this process: what does the user see?

    python tests/support/fuzzing.py --count 5000 [--seed 0] [--kind h5ad] [--show traceback]

A copy of a whole input is damaged (`damage.py`), and the command is run on it. The table has a line per kind of input:
how many were given, and how many ended in a sentence with the file's name, in a sentence without, in an error that no
one foresaw, in a traceback, in the death of the process, in no end within half a minute, or were accepted.
"""

import argparse
import collections
import functools
import json
import os
import pickle
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import damage
from cells import make_cells, write_cells, write_vocab
from helpers import GOLDEN, tiny_config, tiny_model
from preparing import run as prepare_cells
from preparing import source
from typer.testing import CliRunner

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.cli.app import app
from tahoex1_hf.hub import models

Random = np.random.Generator
OUTCOMES = ("named", "nameless", "unforeseen", "traceback", "died", "hung", "accepted")
MDS = Path(__file__).parents[1] / "mds"
PATIENCE = 30.0  # seconds that a case may take, which takes a fraction of one


class Case(NamedTuple):
    """A malformed input and what became of it.

    Attributes:
        kind: Kind of input.
        change: How it was damaged.
        outcome: One of `OUTCOMES`.
        said: What the command printed.
    """

    kind: str
    change: str
    outcome: str
    said: str


class Kind(NamedTuple):
    """A kind of input.

    Attributes:
        make: Writes a whole input into an empty folder.
        arguments: Returns the command line, given the folder of the input, a vocabulary, a model and an output.
    """

    make: Callable[[Path], None]
    arguments: Callable[[Path, Path, Path, Path], list[object]]


def _cells(form: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write_cells(make_cells(8), folder / "cells", form)

    return make


def _embed(name: str) -> Callable[[Path, Path, Path, Path], list[object]]:
    return lambda here, vocab, model, out: ["embed", here / name, out / "out.h5ad", "--model", model]


def _prepare(name: str) -> Callable[[Path, Path, Path, Path], list[object]]:
    def arguments(here: Path, vocab: Path, model: Path, out: Path) -> list[object]:
        columns = ["--metadata", "cell_type"] if name.endswith((".h5ad", ".zarr")) else []
        return ["prepare", here / name, "--output", out / "data", "--vocab", vocab, *columns]

    return arguments


def _make_mtx(folder: Path) -> None:
    import gzip

    write_cells(make_cells(8), folder / "cells", "10x_mtx")
    for path in (folder / "cells").glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()


def _make_symbols(folder: Path) -> None:
    cells = make_cells(8)
    lines = [f"G{number},{name}" for number, name in enumerate(cells.var_names)]
    cells.var_names = [f"G{number}" for number in range(cells.n_vars)]
    (folder / "symbols.csv").write_text("symbol,ensembl_id\n" + "\n".join(lines) + "\n")
    cells.write_h5ad(folder / "cells.h5ad")


def _symbols(here: Path, vocab: Path, model: Path, out: Path) -> list[object]:
    return [*_embed("cells.h5ad")(here, vocab, model, out), "--gene-symbols", here / "symbols.csv"]


def _make_gene_table(folder: Path) -> None:
    lines = [f"{number},{name}" for number, name in enumerate(make_cells(1).var_names)]
    (folder / "genes.csv").write_text("token_id,ensembl_id\n" + "\n".join(lines) + "\n")


def _make_model(folder: Path) -> None:
    vocab = write_vocab(folder / "vocab")
    tiny_model(tiny_config(vocab_size=63, hidden_size=8, num_attention_heads=2)).save_pretrained(folder / "model")
    TahoeX1Tokenizer(str(vocab), context_length=32).save_pretrained(folder / "model")
    shutil.rmtree(folder / "vocab")


def _embed_model(here: Path, vocab: Path, model: Path, out: Path) -> list[object]:
    return ["embed", out.parent / "whole" / "cells.h5ad", out / "out.npy", "--model", here / "model"]


def _make_original(folder: Path) -> None:
    whole = GOLDEN / "a_70m_like" / "model"
    for name in ("model_config.yml", "collator_config.yml", "vocab.json", "model.safetensors"):
        shutil.copy(whole / name, folder / name)


def _make_dataset(folder: Path) -> None:
    write_cells(make_cells(30), folder / "cells", "csr")
    prepare_cells(folder, [source(folder / "cells.h5ad")], "dataset", validation={"fraction": 0.2})
    (folder / "cells.h5ad").unlink()
    (folder / "vocab.json").unlink()


def _make_mds(folder: Path) -> None:
    shutil.copytree(MDS / "upstream", folder / "shards")
    recipe = {"sources": [{"kind": "mds", "paths": ["shards"], "source_vocab": "shards/vocab.json"}]}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    shutil.copy(MDS / "vocab.json", folder / "shards" / "vocab.json")


def _make_plain_mds(folder: Path) -> None:
    _make_mds(folder)
    shutil.rmtree(folder / "shards")
    shutil.copytree(MDS / "plain", folder / "shards")
    shutil.copy(MDS / "vocab.json", folder / "shards" / "vocab.json")


def _mds(here: Path, vocab: Path, model: Path, out: Path) -> list[object]:
    recipe = out / "recipe.yaml"
    recipe.write_bytes((here / "recipe.yaml").read_bytes().replace(b'"shards', f'"{here}/shards'.encode()))
    return ["prepare", "--config", recipe, "--output", out / "data", "--vocab", MDS / "vocab.json"]


def _make_prepare_recipe(folder: Path) -> None:
    recipe = {
        "sources": [
            {
                "kind": "anndata",
                "paths": [str(folder.parents[1] / "whole" / "cells.h5ad")],
                "metadata": {"type": "cell_type"},
                "filter": "n_genes > 2",
                "min_genes": 1,
                "layer": None,
            }
        ],
        "validation": {"by": "type", "values": ["B"]},
        "seed": 3,
        "piece_cells": 64,
        "shard_size_mb": 10,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))


def _prepare_recipe(here: Path, vocab: Path, model: Path, out: Path) -> list[object]:
    return ["prepare", "--config", here / "recipe.yaml", "--output", out / "data", "--vocab", vocab]


def _packaged(command: str, name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from tahoex1_hf.common.recipes import packaged_recipes

        (folder / "recipe.yaml").write_text(packaged_recipes(command)[name].read_text())  # type: ignore[arg-type]

    return make


def _run_recipe(command: str) -> Callable[[Path, Path, Path, Path], list[object]]:
    return lambda here, vocab, model, out: [command, here / "recipe.yaml"]


def _loom(folder: Path) -> None:
    import h5py

    cells = make_cells(8)
    with h5py.File(folder / "cells.loom", "w") as file:
        file["matrix"] = cells.X.toarray().T
        file["row_attrs/Accession"] = cells.var_names.to_numpy().astype("S")
        file["col_attrs/CellID"] = cells.obs_names.to_numpy().astype("S")


KINDS: dict[str, Kind] = {
    "h5ad": Kind(_cells("csr"), _embed("cells.h5ad")),
    "h5ad by gene": Kind(_cells("csc"), _embed("cells.h5ad")),
    "h5ad dense": Kind(_cells("dense"), _embed("cells.h5ad")),
    "h5ad, prepare": Kind(_cells("csr"), _prepare("cells.h5ad")),
    "zarr": Kind(_cells("zarr"), _embed("cells.zarr")),
    "zarr, prepare": Kind(_cells("zarr"), _prepare("cells.zarr")),
    "10x h5": Kind(_cells("10x_h5"), _embed("cells.h5")),
    "10x h5, prepare": Kind(_cells("10x_h5"), _prepare("cells.h5")),
    "10x mtx.gz": Kind(_cells("10x_mtx"), _embed("cells")),
    "10x mtx": Kind(_make_mtx, _embed("cells")),
    "loom": Kind(_loom, _embed("cells.loom")),
    "symbols csv": Kind(_make_symbols, _symbols),
    "gene table csv": Kind(
        _make_gene_table, lambda here, vocab, model, out: ["build-vocab", here / "genes.csv", out / "vocab.json"]
    ),
    "vocab.json": Kind(
        lambda folder: write_vocab(folder) and None,  # type: ignore[func-returns-value]
        lambda here, vocab, model, out: [
            *("prepare", out.parent / "whole" / "cells.h5ad", "--output", out / "data", "--vocab", here / "vocab.json")
        ],
    ),
    "model": Kind(_make_model, _embed_model),
    "original checkpoint": Kind(
        _make_original, lambda here, vocab, model, out: ["convert", here, out / "converted"]
    ),
    "prepared dataset": Kind(
        _make_dataset, lambda here, vocab, model, out: ["embed", here / "dataset", out / "out.npy", "--model", model]
    ),
    "mds": Kind(_make_mds, _mds),
    "mds plain": Kind(_make_plain_mds, _mds),
    "recipe, prepare": Kind(_make_prepare_recipe, _prepare_recipe),
    "recipe, pretrain": Kind(_packaged("pretrain", "3b-stage1"), _run_recipe("pretrain")),
    "recipe, finetune": Kind(_packaged("finetune", "classification"), _run_recipe("finetune")),
}  # fmt: skip

_BY_FORMAT: dict[str, Callable[[Path, Random], str]] = {
    ".h5ad": damage.damage_hdf5,
    ".h5": damage.damage_hdf5,
    ".loom": damage.damage_hdf5,
    **dict.fromkeys((".json", ".zarray", ".zattrs", ".zgroup", ".zmetadata"), damage.damage_json),
    ".yaml": damage.damage_yaml,
    ".yml": damage.damage_yaml,
    ".csv": damage.damage_lines,
    ".mtx": damage.damage_lines,
    ".tsv": damage.damage_lines,
    ".safetensors": damage.damage_safetensors,
}


class Fuzzer:
    """Whole inputs in a folder, and damaged copies of them given to the commands.

    Args:
        folder: Empty folder to work in.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.outside = folder, folder / "outside"
        _make_model(self._empty("outside"))
        self.vocab = write_vocab(folder / "whole")
        write_cells(make_cells(4), folder / "whole" / "cells", "csr")
        self.model, self.made = self.outside / "model", set[str]()
        self._before = (models.load_model_and_tokenizer, os.environ.get("TQDM_DISABLE", ""))
        os.environ["TQDM_DISABLE"] = "1"
        models.load_model_and_tokenizer = self._load  # type: ignore[assignment]

    def close(self) -> None:
        """Put back what commands load a model with."""
        models.load_model_and_tokenizer, os.environ["TQDM_DISABLE"] = self._before

    @functools.cached_property
    def _own(self) -> Any:
        from tahoex1_hf.hub.loading import load_model_and_tokenizer

        return load_model_and_tokenizer(self.model)

    def _load(self, model: str | Path, **options: Any) -> Any:
        """Load the model that is the same for all but the cases in which it is damaged, once."""
        from tahoex1_hf.hub.loading import load_model_and_tokenizer

        return self._own if Path(model) == self.model else load_model_and_tokenizer(model, **options)

    def _empty(self, name: str) -> Path:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).mkdir(parents=True)
        return self.folder / name

    def whole(self, kind: str) -> Path:
        """Return a folder with a whole input of a kind."""
        place = self.folder / "templates" / kind
        if kind not in self.made:
            KINDS[kind].make(self._empty(f"templates/{kind}"))
            self.made.add(kind)
        return place

    def damaged(self, kind: str, random: Random) -> tuple[Path, str, set[str]]:
        """Make a damaged copy; return its folder, what was done, and names by which a message may call the file."""
        template = self.whole(kind)
        here = self.folder / "here"
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(template, here)
        path = damage.choose(random, damage.files_in(here))
        by_format = _BY_FORMAT.get(path.suffix or path.name)
        if by_format is not None and random.random() < 0.7:
            change = by_format(path, random)
        elif random.random() < 0.05:
            path.unlink()
            change = f"missing {path.name}"
        else:
            change = damage.damage_bytes(path, random)
        parts = path.relative_to(here).parts
        return here, change, {parts[0], path.name}

    def run(self, kind: str, seed: int) -> Case:
        """Run the command on one damaged input."""
        random = np.random.default_rng([seed, sorted(KINDS).index(kind)])
        here, change, names = self.damaged(kind, random)
        result = self._result(kind, here)
        return Case(kind, change, outcome_of(result, names), _said(result))

    def run_whole(self, kind: str) -> Any:
        """Run the command on an input that is not damaged."""
        here = self.folder / "here"
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(self.whole(kind), here)
        return self._result(kind, here)

    def _result(self, kind: str, here: Path) -> Any:
        out = self._empty("out")
        arguments = [str(each) for each in KINDS[kind].arguments(here, self.vocab, self.model, out)]
        with _without_runs():
            return CliRunner().invoke(app, arguments)


def _said(result: Any) -> str:
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return "".join(traceback.format_exception(result.exception))
    return str(result.output)


def outcome_of(result: Any, names: set[str]) -> str:
    """Return which of `OUTCOMES` a result is."""
    if result.exit_code == 0:
        return "accepted"
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return "traceback"
    if "This was not foreseen" in result.output:
        return "unforeseen"
    said = " ".join(result.output.split())
    return "named" if any(name in said for name in names) else "nameless"


@functools.lru_cache(maxsize=1)
def _patched_runs() -> list[tuple[Any, str]]:
    import tahoex1_hf.finetuning.running as finetuning
    import tahoex1_hf.training.pretraining as pretraining

    return [(pretraining, "pretrain"), (finetuning, "finetune")]


class _without_runs:
    """Have recipes read, and no model trained."""

    def __enter__(self) -> None:
        self.before = [(module, name, getattr(module, name)) for module, name in _patched_runs()]
        for module, name, _ in self.before:
            setattr(module, name, lambda config: 0)

    def __exit__(self, *error: object) -> None:
        for module, name, value in self.before:
            setattr(module, name, value)


# Many cases, in processes that may die --------------------------------------------------------------


def run_cases(fuzzer: Fuzzer, cases: Sequence[tuple[str, int]]) -> Iterator[Case]:
    """Run cases in a forked process, and in another where one died or does not end."""
    at = 0
    while at < len(cases):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            _work(fuzzer, cases[at:], reader, writer)
        os.close(writer)
        with os.fdopen(reader, "rb", buffering=0) as stream:
            while at < len(cases):
                ready, _, _ = select.select([stream], [], [], PATIENCE)
                case = _received(stream) if ready else None
                if case is None:
                    kind, seed = cases[at]
                    yield Case(kind, f"seed {seed}", "died" if ready else "hung", "")
                    at += 1
                    break
                yield case
                at += 1
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _work(fuzzer: Fuzzer, cases: Sequence[tuple[str, int]], reader: int, writer: int) -> None:
    import resource

    os.close(reader)
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, resource.RLIM_INFINITY))
    with os.fdopen(writer, "wb", buffering=0) as stream:
        try:
            for kind, seed in cases:
                data = pickle.dumps(fuzzer.run(kind, seed))
                stream.write(len(data).to_bytes(4, "little") + data)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os._exit(0)


def _received(stream: Any) -> Case | None:
    head = stream.read(4)
    if len(head) < 4:
        return None
    size, data = int.from_bytes(head, "little"), b""
    while len(data) < size:
        data += stream.read(size - len(data))
    return pickle.loads(data)


def table(cases: Sequence[Case]) -> str:
    """Return how many of each kind ended in which way."""
    counts = collections.Counter((case.kind, case.outcome) for case in cases)
    kinds = [kind for kind in KINDS if any(counts[kind, outcome] for outcome in OUTCOMES)]
    lines = [("kind of input", "inputs", *OUTCOMES)]
    for kind in kinds:
        numbers = [counts[kind, outcome] for outcome in OUTCOMES]
        lines.append((kind, str(sum(numbers)), *map(str, numbers)))
    sums = [sum(counts[kind, outcome] for kind in kinds) for outcome in OUTCOMES]
    lines.append(("all", str(sum(sums)), *map(str, sums)))
    return "\n".join(f"{line[0]:20}" + "".join(f"{text:>12}" for text in line[1:]) for line in lines)


def main() -> None:
    """Run many cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000, help="number of inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="kind of input; may be repeated")
    parser.add_argument("--show", action="append", default=[], choices=OUTCOMES, help="print cases that ended so")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = options.kind or list(KINDS)
    cases = [(kind, options.seed + number) for number in range(options.count // len(kinds)) for kind in kinds]
    done: list[Case] = []
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder))
        for kind in kinds:
            result = fuzzer.run_whole(kind)
            if result.exit_code and kind != "loom":
                raise SystemExit(f"{kind}: the whole input is refused: {_said(result)}")
        for number, case in enumerate(run_cases(fuzzer, cases)):
            done.append(case)
            if case.outcome in options.show:
                sys.stdout.write(f"--- {cases[number]} {case.change}: {case.outcome}\n{case.said[-1500:]}\n")
                sys.stdout.flush()
    sys.stdout.write(table(done) + "\n")


if __name__ == "__main__":
    main()
