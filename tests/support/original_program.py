"""A small rendering of the original program: cells in, embeddings out, without a line of the package.

It reads a checkpoint as the original publishes it. As there, long cells are sampled by torch's generator without
a seed, and the longest cells of a batch with drug tokens lose a gene.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "leaky_relu": F.leaky_relu}


def _log(counts: torch.Tensor) -> torch.Tensor:
    return torch.log1p(counts / counts.sum() * 1e4)


class OriginalProgram:
    """The program with a checkpoint of its own layout.

    Args:
        folder: Folder with `model_config.yml`, `collator_config.yml`, `vocab.json`, `model.safetensors` and
            `drug_to_id_pad.json`.
        dtype: Precision of the matrix products.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.bfloat16):
        self.settings = yaml.safe_load((folder / "model_config.yml").read_text())
        self.collator = yaml.safe_load((folder / "collator_config.yml").read_text())
        self.vocabulary: dict[str, int] = json.loads((folder / "vocab.json").read_text())
        self.drugs: dict[str, int] = json.loads((folder / "drug_to_id_pad.json").read_text())
        self.weights = load_file(folder / "model.safetensors")
        self.dtype = dtype

    @torch.no_grad()
    def embed(
        self,
        cells: Sequence[tuple[np.ndarray, np.ndarray]],
        drugs: Sequence[str],
        layer: int | None = None,
        kind: str = "bins",
        batch: int = 16,
    ) -> np.ndarray:
        """Return `(cells, width)` embeddings of length 1.

        Args:
            cells: Token ids and counts of each cell's genes.
            drugs: Drug of each cell; one that the table lacks is no drug.
            layer: Layer whose output is taken, without the final norm; by default the last, with it.
            kind: Kind of values, `"bins"`, or `"log1p"` of counts that add up to 10,000.
            batch: Cells of a batch.
        """
        found, encode = [], self._bins if kind == "bins" else _log
        for start in range(0, len(cells), batch):
            ids = torch.tensor([self.drugs.get(drug.strip(), 0) for drug in drugs[start : start + batch]])
            genes, values = self._collate(cells[start : start + batch], encode)
            with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype != torch.float32):
                found.append(F.normalize(self._forward(genes, values, ids, layer)[:, 0].float(), dim=1))
        return torch.cat(found).numpy()

    # Cells to batches ---------------------------------------------------------------------------------

    def _collate(
        self, cells: Sequence[tuple[np.ndarray, np.ndarray]], encode: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        special = torch.tensor([self.vocabulary["<cls>"], self.vocabulary["<drug>"]])
        pad, fill = self.vocabulary["<pad>"], float(self.collator["pad_value"])
        longest = max(len(genes) for genes, _ in cells) + 1  # as if there were no drug token
        length = min(longest, self.collator["max_length"])
        rows = []
        for genes, counts in cells:
            ids = torch.cat([special, torch.as_tensor(genes, dtype=torch.int64)])
            values = torch.cat([torch.full((2,), fill), encode(torch.as_tensor(counts, dtype=torch.float32))])
            if len(ids) > length:
                kept = 2 + torch.randperm(len(ids) - 2)[: length - 2]
                order = torch.cat([torch.arange(2), kept])
                ids, values = ids[order], values[order]
            rest = (0, length - len(ids))
            rows.append((F.pad(ids, rest, value=pad), F.pad(values, rest, value=fill)))
        return torch.stack([ids for ids, _ in rows]), torch.stack([values for _, values in rows])

    def _bins(self, counts: torch.Tensor) -> torch.Tensor:
        edges = torch.quantile(counts, torch.linspace(0, 1, self.collator["num_bins"] - 1))
        return (torch.searchsorted(edges, counts) + 1).float()

    # The model ----------------------------------------------------------------------------------------

    def _forward(
        self, genes: torch.Tensor, values: torch.Tensor, drugs: torch.Tensor, layer: int | None
    ) -> torch.Tensor:
        encoder = self.settings["expression_encoder"]
        hidden = F.embedding(genes, self.weights["model.gene_encoder.embedding.weight"])
        hidden = self._norm("gene_encoder.enc_norm", hidden)
        inner = self._linear("expression_encoder.linear1", values.clamp(max=encoder["max_value"])[..., None])
        inner = self._linear("expression_encoder.linear2", ACTIVATIONS[encoder["activation"]](inner))
        hidden = hidden + self._norm("expression_encoder.norm", inner)
        rows = F.embedding(drugs, self.weights["model.chem_encoder.embedding.weight"])
        chemical = ACTIVATIONS[self.settings["chemical_encoder"]["activation"]](self._linear("chem_encoder.fc", rows))
        hidden[:, 1] = self._norm("chem_encoder.norm", self._linear("chem_encoder.proj", chemical)).to(hidden.dtype)
        mask = (genes != self.vocabulary["<pad>"])[:, None, None, :]
        layers = self.settings["n_layers"]
        for number in range(layers if layer is None else layer):
            hidden = self._layer(f"transformer_encoder.layers.{number}", hidden, mask)
        return hidden if layer is not None else self._norm("transformer_encoder.norm", hidden)

    def _layer(self, name: str, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        heads = self.settings["n_heads"]
        fused = self._linear(f"{name}.self_attn.Wqkv", self._norm(f"{name}.norm1", hidden))
        parts = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in fused.chunk(3, dim=-1)]
        mixed = F.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2).flatten(2)
        hidden = hidden + self._linear(f"{name}.self_attn.out_proj", mixed)
        activation = ACTIVATIONS[self.settings["transformer_activation"]]
        inner = activation(self._linear(f"{name}.up_proj", self._norm(f"{name}.norm2", hidden)))
        return hidden + self._linear(f"{name}.down_proj", inner)

    def _linear(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weights[f"model.{name}.weight"], self.weights[f"model.{name}.bias"])

    def _norm(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights[f"model.{name}.weight"], self.weights[f"model.{name}.bias"]
        return F.layer_norm(hidden.float(), weight.shape, weight, bias, 1e-5)
