"""Released weights, cells of Tahoe-100M and public embeddings of them, small and made up, laid out like the real ones.

The weights are random, the cells simulated. The embeddings are made by `original_program`, in bfloat16 and with
samples that no seed decides, as the public ones were.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import yaml
from hub_server import fill_cache
from original_program import OriginalProgram
from safetensors.torch import save_file

COLUMN, KEY = "mosaicfm-3b-prod-cont-MFMv2", "BARCODE_SUB_LIB_ID"


@dataclass(frozen=True)
class Shape:
    """Sizes of a stand-in.

    Attributes:
        genes: Ensembl ids of the gene table, in its order; its numbers begin with 3.
        drugs: drug -> row of the drug table, `<pad>` being 0.
        fingerprints: `(drugs, bits)` fingerprints.
        width: width of the model.
        layers: number of its layers.
        context: context length.
        cells: number of cells.
        mean_genes: mean number of genes of a cell.
    """

    genes: Sequence[str] = tuple(f"ENSG{number:011d}" for number in range(600))
    drugs: dict[str, int] = field(default_factory=lambda: {"<pad>": 0, **{f"drug {n}": n for n in range(1, 20)}})
    fingerprints: np.ndarray | None = None
    width: int = 64
    layers: int = 4
    context: int = 160
    cells: int = 240
    mean_genes: int = 120


@dataclass(frozen=True)
class StandIn:
    """The places of a stand-in, and its cells.

    Attributes:
        model: folder with `3b-model`.
        cells: folder of the cells' files.
        embeddings: folder of the embeddings' files.
        gene_table: gene table.
        keys: key of each cell.
        public: `(cells, width)` public embeddings, in the order of the keys.
    """

    model: Path
    cells: Path
    embeddings: Path
    gene_table: Path
    keys: list[str]
    public: np.ndarray


def make_stand_in(
    folder: Path,
    shape: Shape | None = None,
    *,
    public_drugs: Any = None,
    public_genes: Any = None,
    public_layer: int | None = None,
    public_values: str = "bins",
    public_weights: int = 0,
    public_depth: int | None = None,
    seed: int = 0,
) -> StandIn:
    """Make a stand-in.

    Args:
        folder: folder to make it in.
        shape: its sizes.
        public_drugs: function of the cells' drugs that says with which drugs the public embeddings are made.
        public_genes: function of the array of Ensembl ids that says for which genes they take them.
        public_layer: layer whose output the public embeddings are.
        public_values: kind of values that they are made from.
        public_weights: seed of the weights that they are made with; 0 for those of the model.
        public_depth: number of layers of the model with these weights; by default as many as the model has.
        seed: seed of the cells.
    """
    shape = shape or Shape()
    random = np.random.default_rng(seed)
    model = write_weights(folder / "model" / "3b-model", shape, 0)
    program = OriginalProgram(model)
    counts, drugs, lines = _simulate(shape, random)
    genes = np.array(shape.genes, dtype=object)
    table = folder / "cells" / "metadata" / "gene_metadata.parquet"
    table.parent.mkdir(parents=True)
    numbers = np.arange(3, 3 + len(genes))
    symbols = [f"SYMBOL{number}" for number in numbers]
    pq.write_table(pa.table({"gene_symbol": symbols, "ensembl_id": genes.tolist(), "token_id": numbers}), table)
    keys = [f"{1 + number % 96:02d}_{number // 96:02d}_{number:02d}-lib_{number}" for number in range(shape.cells)]
    _write_cells(folder / "cells" / "data", counts, drugs, lines, keys)
    if public_weights:
        other = replace(shape, layers=public_depth or shape.layers)
        program = OriginalProgram(write_weights(folder / "other", other, public_weights))
    ids = np.array([program.vocabulary[gene] for gene in (genes if public_genes is None else public_genes(genes))])
    cells = [(ids[columns], values) for columns, values in counts]
    drugs_then = drugs if public_drugs is None else public_drugs(drugs)
    public = program.embed(cells, drugs_then, public_layer, public_values)
    _write_embeddings(folder / "embeddings", keys, public, random)
    return StandIn(folder / "model", folder / "cells" / "data", folder / "embeddings", table, keys, public)


def write_weights(folder: Path, shape: Shape, seed: int) -> Path:
    """Write a checkpoint like the 3B in the original's layout, with random weights."""
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(seed)
    tokens = ["<pad>", "<cls>", "<eoc>", *shape.genes, "<drug>"]
    bits = 64 if shape.fingerprints is None else shape.fingerprints.shape[1]
    width, layers = shape.width, shape.layers
    tensors: dict[str, torch.Tensor] = {}

    def linear(name: str, outputs: int, inputs: int, scale: float = 1.0) -> None:
        weight = torch.randn(outputs, inputs, generator=random) * scale * inputs**-0.5
        bias = 0.1 * torch.randn(outputs, generator=random)
        tensors.update({f"model.{name}.weight": weight, f"model.{name}.bias": bias})

    def norm(name: str) -> None:
        tensors[f"model.{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=random)
        tensors[f"model.{name}.bias"] = 0.1 * torch.randn(width, generator=random)

    tensors["model.gene_encoder.embedding.weight"] = torch.randn(len(tokens), width, generator=random)
    tensors["model.flag_encoder.weight"] = torch.randn(2, width, generator=random)
    fingerprints = torch.rand(len(shape.drugs), bits, generator=random).round()
    if shape.fingerprints is not None:
        fingerprints = torch.from_numpy(shape.fingerprints.astype(np.float32))
    fingerprints[0] = 0
    tensors["model.chem_encoder.embedding.weight"] = fingerprints
    linear("chem_encoder.fc", width, bits)
    linear("chem_encoder.proj", width, width)
    linear("expression_encoder.linear1", width, 1, 0.3)
    linear("expression_encoder.linear2", width, width)
    linear("expression_decoder.linear_layers.0", width, width)
    linear("expression_decoder.out_proj", 1, width)
    linear("mvc_decoder.gene2query", width, width)
    tensors["model.mvc_decoder.W.weight"] = torch.randn(width, width, generator=random) * width**-0.5
    norms = ["gene_encoder.enc_norm", "expression_encoder.norm", "chem_encoder.norm", "transformer_encoder.norm"]
    for number in range(layers):
        name = f"transformer_encoder.layers.{number}"
        linear(f"{name}.self_attn.Wqkv", 3 * width, width, 1.6)  # some genes matter more than others
        linear(f"{name}.self_attn.out_proj", width, width)
        linear(f"{name}.up_proj", 4 * width, width)
        linear(f"{name}.down_proj", width, 4 * width)
        norms += [f"{name}.norm1", f"{name}.norm2"]
    for name in norms:
        norm(name)
    _heed_the_drug(tensors, shape, random)
    save_file(tensors, folder / "model.safetensors")
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "drug_to_id_pad.json").write_text(json.dumps(shape.drugs))
    np.save(folder / "drug_fps_pad.npy", fingerprints.numpy())
    _write_settings(folder, shape, bits, len(tokens))
    return folder


def _heed_the_drug(tensors: dict[str, torch.Tensor], shape: Shape, random: torch.Generator) -> None:
    """Let every token attend to the drug, as training would: to random weights it is one token among hundreds."""
    width = shape.width
    mark, query = F.normalize(torch.randn(2, width, generator=random), dim=1)
    tensors["model.chem_encoder.norm.bias"] += 1.5 * width**0.5 * mark
    for number in range(shape.layers):
        name = f"model.transformer_encoder.layers.{number}.self_attn.Wqkv"
        tensors[f"{name}.bias"][:width] += 2 * width**0.5 * query
        tensors[f"{name}.weight"][width : 2 * width] += 0.6 * torch.outer(query, mark)


def _write_settings(folder: Path, shape: Shape, bits: int, vocabulary: int) -> None:
    model = {
        "name": "tahoe_x1", "d_model": shape.width, "n_layers": shape.layers, "n_heads": 4, "expansion_ratio": 4,
        "init_device": "cpu", "standard_scale_outputs": False, "transformer_activation": "gelu",
        "norm_scheme": "pre", "use_generative_training": False, "use_cell_conditioned_generation": False,
        "use_glu": False, "cell_emb_style": "cls", "vocab_size": vocabulary, "precision": "amp_bf16",
        "attn_config": {"attn_impl": "flash", "attn_type": "grouped_query_attention", "kv_nheads": 4,
                        "attn_pdrop": 0.0, "use_attn_mask": False},
        "norm_config": {"norm_type": "layernorm", "eps": 1e-5},
        "expression_encoder": {"input_emb_style": "continuous", "dropout": 0.1, "max_value": 512,
                               "activation": "gelu", "use_norm": True},
        "gene_encoder": {"use_norm": True},
        "mvc": {"arch_style": "inner product", "query_activation": "sigmoid", "scaled_dot_product": True},
        "expression_decoder": {"n_outputs": 1, "n_layers": 1, "activation": "gelu"},
        "chemical_encoder": {"activation": "gelu", "padding_idx": 0, "freeze": False,
                             "num_drugs": len(shape.drugs), "fp_dim": bits},
    }  # fmt: skip
    collator = {
        "do_padding": True, "pad_value": -2, "do_mlm": True, "do_binning": True, "mlm_probability": 0.5,
        "mask_value": -1, "max_length": shape.context, "sampling": True, "data_style": "both", "num_bins": 51,
        "right_binning": False, "use_junk_tokens": False, "use_chem_token": True, "keep_first_n_tokens": 2,
        "drug_to_id_path": {"local": "drug_to_id_pad.json"}, "pad_token_id": 0,
    }  # fmt: skip
    (folder / "model_config.yml").write_text(yaml.safe_dump(model))
    (folder / "collator_config.yml").write_text(yaml.safe_dump(collator))


def _simulate(
    shape: Shape, random: np.random.Generator
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[str], list[str]]:
    """Simulate cells of four lines: columns and counts of their genes, their drugs, their lines."""
    number = len(shape.genes)
    programs = np.exp(1.5 * random.standard_normal((4, number)))
    names = [name for name in shape.drugs if name != "<pad>"]
    cells, drugs, lines = [], [], []
    for cell in range(shape.cells):
        line, size = cell % 4, int(np.clip(random.lognormal(np.log(shape.mean_genes), 0.35), 10, number))
        chance = programs[line] * np.exp(0.5 * random.standard_normal(number))
        columns = np.sort(random.choice(number, size, replace=False, p=chance / chance.sum()))
        counts = 1 + random.poisson(np.minimum(chance[columns], 30))
        cells.append((columns, counts.astype(np.float32)))
        drugs.append(str(random.choice(names)))
        lines.append(f"CVCL_{line}")
    return cells, drugs, lines


def _write_cells(
    folder: Path, cells: list[tuple[np.ndarray, np.ndarray]], drugs: list[str], lines: list[str], keys: list[str]
) -> None:
    """Write cells as Tahoe-100M's: `<cls>` first, numbers of the gene table, a few row groups in each of two files."""
    folder.mkdir(parents=True)
    table = pa.table(
        {
            "genes": pa.array([[1, *(columns + 3)] for columns, _ in cells], pa.list_(pa.int64())),
            "expressions": pa.array([[-2.0, *counts] for _, counts in cells], pa.list_(pa.float32())),
            "drug": [f"{drug} " if number % 7 == 0 else drug for number, drug in enumerate(drugs)],
            "sample": [f"smp_{number % 5}" for number in range(len(cells))],
            KEY: keys,
            "cell_line_id": lines,
            "plate": ["plate1"] * len(cells),
        }
    )
    half = len(cells) // 2
    for number, part in enumerate((table.slice(0, half), table.slice(half))):
        pq.write_table(part, folder / f"train-0000{number}-of-00002.parquet", row_group_size=50)


def _write_embeddings(folder: Path, keys: list[str], public: np.ndarray, random: np.random.Generator) -> None:
    """Write embeddings in an order of their own, among those of other cells, beside a column of another model."""
    folder.mkdir(parents=True)
    strangers = [f"99_00_00-lib_{number}" for number in range(60)]
    everyone = np.array([*keys, *strangers], dtype=object)
    values = np.concatenate([public, random.standard_normal((60, public.shape[1])).astype(np.float32)])
    order = random.permutation(len(everyone))
    for number, rows in enumerate(np.array_split(order, 2)):
        table = pa.table(
            {
                KEY: everyone[rows].tolist(),
                "drug": ["some"] * len(rows),
                "mosaicfm-70m-merged": pa.array(values[rows][:, :8].tolist(), pa.list_(pa.float32())),
                COLUMN: pa.array(values[rows].tolist(), pa.list_(pa.float32())),
            }
        )
        pq.write_table(table, folder / f"train-0000{number}-of-00002.parquet", row_group_size=40)


def fill_hub_cache(cache: Path, stand_in: StandIn) -> None:
    """Lay a stand-in out as the Hub's cache does after a download."""
    fill_cache(cache, "tahoebio/Tahoe-x1", {"main": stand_in.model})
    fill_cache(cache, "tahoebio/Tahoe-100M", {"main": stand_in.cells.parent}, "datasets")
    fill_cache(cache, "tahoebio/Tahoe-x1-embeddings", {"main": stand_in.embeddings}, "datasets")


def real_shape(tahoe: Path, cells: int = 160) -> Shape:
    """Return a shape with the real gene and drug tables; cells and context are about a quarter of the real ones'.

    Args:
        tahoe: folder with `gene_metadata.parquet`, `drug_to_id_pad.json` and `drug_morgan2_2048_rdkit.npz`.
        cells: number of cells.
    """
    genes = pq.read_table(tahoe / "gene_metadata.parquet").to_pandas().sort_values("token_id")
    drugs = json.loads((tahoe / "drug_to_id_pad.json").read_text())
    with np.load(tahoe / "drug_morgan2_2048_rdkit.npz") as arrays:
        fingerprints = arrays["fps"]
    return Shape(tuple(genes["ensembl_id"]), drugs, fingerprints, context=448, cells=cells, mean_genes=350)


def shuffled(values: np.ndarray) -> np.ndarray:
    return np.random.default_rng(5).permutation(values)


def in_a_circle(drugs: list[str]) -> list[str]:
    """Return for each drug another, one for each."""
    names = sorted(set(drugs))
    return [names[(names.index(drug) + 5) % len(names)] for drug in drugs]


WRONG: dict[str, dict[str, Any]] = {
    "right": {},
    "drugs": {"public_drugs": in_a_circle},
    "genes": {"public_genes": shuffled},
    "layer": {"public_layer": 3},
}

if __name__ == "__main__":  # the stand-ins of docs/verify-release.md: FOLDER/right and so on
    tables, output = Path(sys.argv[1]), Path(sys.argv[2])
    torch.seed()  # by chance, as the original's samples are
    for name, made in WRONG.items():
        make_stand_in(output / name, real_shape(tables), **made)
