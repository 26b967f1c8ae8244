"""Implement the reference: the original's algorithm in plain torch.

It stands in for the original program, which needs CUDA, flash-attn and Composer, and uses nothing of this package:
cells are collated one by one, in the order in which they come, and padded to the longest of a batch of eight; query,
key and value are fused; attention runs over padded rows with a mask; the cell decoder is multiplied out gene by gene.
Other things that slow the original (files, worker processes, callbacks) are left out, in its favour.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

PAD_ID, CLS_ID, PAD_VALUE = 0, 1, -2.0
BATCH = 8

Cell = tuple[torch.Tensor, torch.Tensor]  # token ids of the genes (int64) and their counts (float32)


@dataclass(frozen=True)
class Shape:
    """Shape of the 70M model."""

    vocab_size: int = 62720
    width: int = 512
    layers: int = 12
    heads: int = 8
    max_value: float = 512.0
    dropout: float = 0.1
    fused: bool = True  # whether torch's kernel computes attention, instead of written-out scores and softmax


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.heads, self.fused = shape.heads, shape.fused
        self.Wqkv = nn.Linear(shape.width, 3 * shape.width)
        self.out_proj = nn.Linear(shape.width, shape.width)

    def forward(self, hidden: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden.shape
        fused = self.Wqkv(hidden).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = fused.permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        else:
            scores = query @ key.transpose(2, 3) / (width // self.heads) ** 0.5
            mixed = torch.softmax(scores + visible, dim=-1) @ value
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))


class Layer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.self_attn = Attention(shape)
        self.up_proj = nn.Linear(shape.width, 4 * shape.width)
        self.down_proj = nn.Linear(4 * shape.width, shape.width)

    def forward(self, hidden: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.norm1(hidden), visible)
        return hidden + self.down_proj(F.relu(self.up_proj(self.norm2(hidden))))


class ExpressionEncoder(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.max_value = shape.max_value
        self.linear1, self.linear2 = nn.Linear(1, shape.width), nn.Linear(shape.width, shape.width)
        self.norm, self.dropout = nn.LayerNorm(shape.width), nn.Dropout(shape.dropout)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.linear1(values.clamp(max=self.max_value).unsqueeze(-1)))
        return self.dropout(self.norm(self.linear2(hidden)))


class Reference(nn.Module):
    """The 70M architecture: pre-norm, ReLU, biases everywhere."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.gene_embedding = nn.Embedding(shape.vocab_size, shape.width, padding_idx=PAD_ID)
        self.gene_norm = nn.LayerNorm(shape.width)
        self.expression_encoder = ExpressionEncoder(shape)
        self.flag_encoder = nn.Embedding(2, shape.width)
        self.layers = nn.ModuleList([Layer(shape) for _ in range(shape.layers)])
        self.norm = nn.LayerNorm(shape.width)

    def forward(
        self, genes: torch.Tensor, values: torch.Tensor, targets: torch.Tensor, visible: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the last hidden states and the gene embeddings, `(batch, length, width)` each."""
        embedded = self.gene_norm(self.gene_embedding(genes))
        expression = self.expression_encoder(values).masked_fill(targets.unsqueeze(-1), 0.0)
        flag = self.flag_encoder(torch.ones((), dtype=torch.long)) * targets.unsqueeze(-1)
        hidden = embedded + expression + flag
        for layer in self.layers:
            hidden = layer(hidden, visible)
        return self.norm(hidden), embedded


class ReferenceForTraining(nn.Module):
    """The reference with both decoders and a mask; a target sees the observed genes and itself."""

    def __init__(self, shape: Shape):
        super().__init__()
        width = shape.width
        self.width = width
        self.transformer = Reference(shape)
        self.decoder, self.decoder_out = nn.Linear(width, width), nn.Linear(width, 1)
        self.gene2query, self.W = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(
        self, genes: torch.Tensor, values: torch.Tensor, targets: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss: the mean of both decoders' mean squared errors at the targets."""
        observed = (~targets & (genes != PAD_ID))[:, None, None, :]
        visible = observed | torch.eye(genes.shape[1], dtype=torch.bool)  # (batch, 1, length, length)
        bias = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)  # once for all layers
        hidden, embedded = self.transformer(genes, values, targets, bias)
        by_token = self.decoder_out(F.leaky_relu(self.decoder(hidden))).squeeze(-1)
        queries = self.W(torch.sigmoid(self.gene2query(embedded)))
        by_cell = torch.bmm(queries, hidden[:, 0].unsqueeze(2)).squeeze(2) / self.width**0.5
        wanted = labels[targets]
        return (F.mse_loss(by_token[targets], wanted) + F.mse_loss(by_cell[targets], wanted)) / 2


def weights_for_reference(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a `TahoeX1Model`'s state, named and fused as in the reference."""
    renamed: dict[str, torch.Tensor] = {}
    simple = {
        "embeddings.gene_encoder.embedding.": "gene_embedding.",
        "embeddings.gene_encoder.norm.": "gene_norm.",
        "embeddings.expression_encoder.": "expression_encoder.",
        "embeddings.flag_embedding.": "flag_encoder.",
        ".attention_norm.": ".norm1.",
        ".mlp_norm.": ".norm2.",
        ".mlp.": ".",
        ".o_proj.": ".out_proj.",
    }
    for name, tensor in ours.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            parts = [ours[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            renamed[name.replace("q_proj", "Wqkv")] = torch.cat(parts)
            continue
        for old, new in simple.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


def embedding_reference(shape: Shape, ours: dict[str, torch.Tensor]) -> Reference:
    """Return the reference with the weights of a `TahoeX1Model` (its `state_dict()`), ready to embed."""
    model = Reference(shape)
    model.load_state_dict(weights_for_reference(ours))  # strict, so that no tensor of either is left over
    return model.eval()


def training_reference(shape: Shape, ours: dict[str, torch.Tensor]) -> ReferenceForTraining:
    """Return the reference with the weights of a `TahoeX1ForPreTraining`."""
    model = ReferenceForTraining(shape)
    body = {name.removeprefix("tahoe."): tensor for name, tensor in ours.items() if name.startswith("tahoe.")}
    state = {f"transformer.{name}": tensor for name, tensor in weights_for_reference(body).items()}
    heads = {
        "expression_decoder.layers.0.": "decoder.",
        "expression_decoder.output.": "decoder_out.",
        "cell_decoder.gene_query.": "gene2query.",
    }
    for name, tensor in ours.items():
        for old, new in heads.items():
            if name.startswith(old):
                state[name.replace(old, new)] = tensor
    state["W.weight"] = ours["cell_decoder.cell_proj.weight"].T  # ours multiplies the cell instead of the genes
    model.load_state_dict(state)
    return model


def bins(counts: torch.Tensor) -> torch.Tensor:
    """Return the quantile bins of one cell."""
    edges = torch.quantile(counts, torch.linspace(0, 1, 50))
    return (torch.bucketize(counts, edges) + 1).float()


def collate(cells: Sequence[Cell], context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bin, sample and pad cell by cell; return token ids and values, `(cells, length)`."""
    width = min(max(len(genes) for genes, _ in cells) + 1, context)
    all_genes, all_values = [], []
    for genes, counts in cells:
        genes = torch.cat([torch.tensor([CLS_ID]), genes])
        values = torch.cat([torch.tensor([PAD_VALUE]), bins(counts)])
        if len(genes) > width:
            kept = torch.cat([torch.tensor([0]), 1 + torch.randperm(len(genes) - 1)[: width - 1]])
            genes, values = genes[kept], values[kept]
        missing = width - len(genes)
        all_genes.append(torch.cat([genes, torch.full((missing,), PAD_ID)]))
        all_values.append(torch.cat([values, torch.full((missing,), PAD_VALUE)]))
    return torch.stack(all_genes), torch.stack(all_values)


@torch.inference_mode()
def hidden_states(
    model: Reference, cells: Sequence[Cell], context: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids and last hidden states of batches of eight, in the order in which the cells come."""
    for start in range(0, len(cells), BATCH):
        genes, values = collate(cells[start : start + BATCH], context)
        visible = (genes != PAD_ID)[:, None, None, :]
        yield genes, model(genes, values, torch.zeros_like(genes, dtype=torch.bool), visible)[0]


def embed(model: Reference, cells: Sequence[Cell], context: int) -> torch.Tensor:
    """Return cell embeddings, `(cells, width)`, rows of length 1."""
    return F.normalize(torch.cat([hidden[:, 0] for _, hidden in hidden_states(model, cells, context)]), dim=1)


def embed_with_genes(model: Reference, cells: Sequence[Cell], context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cell embeddings, and each token's mean hidden state, `(vocabulary, width)`.

    As in the original, the hidden states of all cells are kept at full length until the end.
    """
    width = model.norm.normalized_shape[0]
    kept = torch.zeros(len(cells), context, width)
    kept_genes = torch.full((len(cells), context), PAD_ID)
    start = 0
    for genes, hidden in hidden_states(model, cells, context):
        kept[start : start + len(genes), : genes.shape[1]] = hidden
        kept_genes[start : start + len(genes), : genes.shape[1]] = genes
        start += len(genes)
    vocabulary = model.gene_embedding.num_embeddings
    flat = kept_genes.flatten()
    sums = torch.zeros(vocabulary, width).index_add_(0, flat, kept.flatten(0, 1))
    counts = torch.zeros(vocabulary).index_add_(0, flat, torch.ones(len(flat)))
    return F.normalize(kept[:, 0], dim=1), sums / counts.unsqueeze(1)
