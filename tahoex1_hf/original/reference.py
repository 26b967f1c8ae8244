"""Compute the original's forward pass in plain torch, from the original's own tensor names and settings.

This is independent of our modelling code and of the translation of names and settings, so that a conversion can be
checked against it. Weights are read as float32 when they are needed, and dropped afterwards.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class OriginalForward:
    """The model of a checkpoint of the original.

    Args:
        settings: Contents of `model_config.yml`.
        pad_token_id: Id of the padding token, from `collator_config.yml`.
        read: Function that returns the tensor of a name in the checkpoint.
        names: Names of all tensors.
    """

    def __init__(
        self, settings: Mapping[str, Any], pad_token_id: int, read: Callable[[str], torch.Tensor], names: set[str]
    ):
        self.settings = settings
        self.pad_token_id = pad_token_id
        self.read = read
        self.names = names
        attention = settings.get("attn_config") or {}
        self.heads = settings["n_heads"]
        self.kv_heads = attention.get("kv_n_heads", self.heads)
        self.masked = attention.get("use_attn_mask", True)
        self.eps = (settings.get("norm_config") or {}).get("eps", 1e-5)
        self.average = settings.get("cell_emb_style", "cls") == "avg-pool"

    @torch.no_grad()
    def __call__(
        self, genes: torch.Tensor, values: torch.Tensor, targets: torch.Tensor, drug_ids: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Return the outputs `cell` `(batch, width)`, `expression` and `cell_expression` `(batch, length)`.

        Args:
            genes: `(batch, length)` token ids.
            values: `(batch, length)` float32 expression values.
            targets: `(batch, length)` bool, True where the value is hidden.
            drug_ids: `(batch,)` ids of the drugs, for a model with a drug encoder.
        """
        gene_embeddings = F.embedding(genes, self._weight("gene_encoder.embedding.weight"))
        gene_embeddings = self._norm("gene_encoder.enc_norm", gene_embeddings, 1e-5)
        flag = self._weight("flag_encoder.weight")[1]
        hidden = gene_embeddings + torch.where(targets[..., None], flag, self._expression(values))
        if drug_ids is not None:
            hidden[:, 1] = self._drug(drug_ids)
        tokens = genes != self.pad_token_id
        visible = tokens[:, None, :].expand(-1, genes.shape[1], -1)
        if self.masked:
            same = torch.eye(genes.shape[1], dtype=torch.bool)
            visible = visible & (~targets[:, None, :] | same)
        for i in range(self.settings["n_layers"]):
            hidden = self._layer(f"transformer_encoder.layers.{i}", hidden, tokens, visible)
        hidden = self._norm("transformer_encoder.norm", hidden, self.eps)
        cell = hidden.mean(1) if self.average else hidden[:, 0]
        return {
            "cell": cell,
            "expression": self._expression_decoder(hidden),
            "cell_expression": self._cell_decoder(cell, gene_embeddings),
        }

    def _weight(self, name: str) -> torch.Tensor:
        return self.read(f"model.{name}").float()

    def _linear(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self._weight(f"{name}.weight"), self._weight(f"{name}.bias"))

    def _norm(self, name: str, hidden: torch.Tensor, eps: float) -> torch.Tensor:
        if f"model.{name}.weight" not in self.names:
            return hidden
        weight, bias = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        return F.layer_norm(hidden, weight.shape, weight, bias, eps)

    def _activation(self, part: str, key: str, default: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return _ACTIVATIONS[(self.settings.get(part) or {}).get(key, default)]

    def _expression(self, values: torch.Tensor) -> torch.Tensor:
        largest = (self.settings.get("expression_encoder") or {}).get("max_value", 512)
        hidden = self._linear("expression_encoder.linear1", values.clamp(max=largest)[..., None])
        hidden = self._activation("expression_encoder", "activation", "relu")(hidden)
        return self._norm("expression_encoder.norm", self._linear("expression_encoder.linear2", hidden), 1e-5)

    def _drug(self, drug_ids: torch.Tensor) -> torch.Tensor:
        hidden = self._linear("chem_encoder.fc", F.embedding(drug_ids, self._weight("chem_encoder.embedding.weight")))
        hidden = self._activation("chemical_encoder", "activation", "leaky_relu")(hidden)
        return self._norm("chem_encoder.norm", self._linear("chem_encoder.proj", hidden), 1e-5)

    def _layer(self, name: str, hidden: torch.Tensor, tokens: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        if self.settings.get("norm_scheme", "pre") == "pre":
            hidden = hidden + self._attention(name, self._norm(f"{name}.norm1", hidden, self.eps), tokens, visible)
            return hidden + self._feed_forward(name, self._norm(f"{name}.norm2", hidden, self.eps))
        hidden = hidden + self._attention(name, hidden, tokens, visible)
        hidden = self._norm(f"{name}.norm1", hidden, self.eps)
        return self._norm(f"{name}.norm2", hidden + self._feed_forward(name, hidden), self.eps)

    def _attention(self, name: str, hidden: torch.Tensor, tokens: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden.shape
        size = width // self.heads
        fused = self._linear(f"{name}.self_attn.Wqkv", hidden)
        query, key, value = fused.split([width, self.kv_heads * size, self.kv_heads * size], dim=-1)
        query = query.view(batch, length, self.heads, size).transpose(1, 2)
        key = key.view(batch, length, self.kv_heads, size).transpose(1, 2)
        value = value.view(batch, length, self.kv_heads, size).transpose(1, 2)
        groups = self.heads // self.kv_heads
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(2, 3) * size**-0.5
        weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
        mixed = (weights @ value).transpose(1, 2).reshape(batch, length, width)
        if self.average:  # flash attention leaves zeros at padding, which this mean counts
            mixed = mixed * tokens[..., None]
        return self._linear(f"{name}.self_attn.out_proj", mixed)

    def _feed_forward(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        activation = _ACTIVATIONS[self.settings.get("transformer_activation", "gelu")]
        up = self._linear(f"{name}.up_proj", hidden)
        if self.settings.get("use_glu", False):
            up = activation(self._linear(f"{name}.gate_proj", hidden)) * up
        else:
            up = activation(up)
        return self._linear(f"{name}.down_proj", up)

    def _expression_decoder(self, hidden: torch.Tensor) -> torch.Tensor:
        settings = self.settings.get("expression_decoder") or {}
        for i in range(settings.get("n_layers", 2)):
            hidden = self._linear(f"expression_decoder.linear_layers.{i}", hidden)
            hidden = self._activation("expression_decoder", "activation", "leaky_relu")(hidden)
        return self._linear("expression_decoder.out_proj", hidden)[..., 0]

    def _cell_decoder(self, cell: torch.Tensor, gene_embeddings: torch.Tensor) -> torch.Tensor:
        queries = self._linear("mvc_decoder.gene2query", gene_embeddings)
        queries = F.linear(
            self._activation("mvc", "query_activation", "sigmoid")(queries), self._weight("mvc_decoder.W.weight")
        )
        products = (queries @ cell[..., None])[..., 0]
        return products * cell.shape[1] ** -0.5 if self.settings["mvc"].get("scaled_dot_product", False) else products
