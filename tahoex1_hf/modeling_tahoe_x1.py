# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Tahoe-x1: a bidirectional transformer over the expressed genes of single cells.

A cell is a set of (gene, expression) tokens after a `<cls>` token; there is no positional encoding. Decisions that
hold for the whole file:

- Padding is never a key, on any attention backend, so a cell's result does not depend on its batch.
- Without `attention_mask`, padding is recognised by `config.pad_token_id`.
- Values of `expression_values` at padded or targeted positions are never read.
- Cells may be packed back to back into one row, told apart by `cu_seq_lens_q`; the result equals the padded one.

This file travels to the Hub beside the weights: it imports only torch, transformers and the files that travel too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_tahoe_x1 import TahoeX1Config, TravelsWithCode
from .observed_attention_tahoe_x1 import AttentionMask, EagerAttention, PackedAttention, eager_attention_forward
from .packing_tahoe_x1 import (
    UNREAD_BY_LAYERS,
    CellLayout,
    TahoeX1ForPreTrainingOutput,
    TahoeX1HeadLinear,
    TahoeX1ModelOutput,
    check_arguments,
    check_shape,
    dummy_batch,
    every_gene_mse,
    lay_out_cells,
    linear_and_relu,
    make_attention_mask,
    masked_mse,
    refuse_to_generate,
    scaled_labels,
    token_cross_entropy,
)

ON_RESIDUAL = "_adds_to_residual_stream"  # attribute of the last layer of an attention block


class TahoeX1GeneEncoder(nn.Module):
    """Gene id to its context-free embedding: `(batch, length)` to `(batch, length, hidden_size)`."""

    def __init__(self, config: TahoeX1Config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.norm = nn.LayerNorm(config.hidden_size) if config.gene_encoder_norm else nn.Identity()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.embedding(input_ids))


class TahoeX1ValueLinear(nn.Module):
    """Linear layer with one input, a value. Quantisers, which gain nothing here and may fail, replace `nn.Linear`s."""

    def __init__(self, out_features: int):
        super().__init__()
        linear = nn.Linear(1, out_features)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(values.to(self.bias.dtype), self.weight, self.bias)


class TahoeX1DrugTable(nn.Embedding):
    """Fingerprints of the drugs. It differs from torch's class in its initial weights only."""


class TahoeX1ExpressionEncoder(nn.Module):
    """Expression value to a vector: `(batch, length)` to `(batch, length, hidden_size)`."""

    def __init__(self, config: TahoeX1Config):
        super().__init__()
        self.max_value = config.expression_max_value
        self.linear1 = TahoeX1ValueLinear(config.hidden_size)
        self.act_fn = ACT2FN[config.expression_encoder_act]
        self.linear2 = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size) if config.expression_encoder_norm else nn.Identity()
        self.dropout = nn.Dropout(config.expression_encoder_dropout)

    def forward(self, expression_values: torch.Tensor) -> torch.Tensor:
        values = expression_values.clamp(max=self.max_value).unsqueeze(-1)
        # Autocast would round the values themselves (those of log1p are not whole) to bfloat16's three digits.
        with torch.autocast(values.device.type, enabled=False):
            hidden_states = self.linear1(values)
        return self.dropout(self.norm(self.linear2(self.act_fn(hidden_states))))


class TahoeX1DrugEncoder(nn.Module):
    """Drug id to a vector, from a table that starts as Morgan fingerprints: `(cells,)` to `(cells, hidden_size)`."""

    def __init__(self, config: TahoeX1Config):
        super().__init__()
        self.embedding = TahoeX1DrugTable(config.num_drugs, config.drug_fingerprint_size, padding_idx=0)
        self.linear1 = nn.Linear(config.drug_fingerprint_size, config.hidden_size)
        self.act_fn = ACT2FN[config.drug_encoder_act]
        self.linear2 = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, drug_ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear2(self.act_fn(self.linear1(self.embedding(drug_ids)))))


class TahoeX1Embeddings(nn.Module):
    """Token embeddings: gene, plus expression (or the flag of a target), or the drug in place of both."""

    def __init__(self, config: TahoeX1Config):
        super().__init__()
        self.drug_token_id = config.drug_token_id
        self.gene_encoder = TahoeX1GeneEncoder(config)
        self.expression_encoder = TahoeX1ExpressionEncoder(config)
        # Row 1 marks a target. Row 0 is never read; the original's checkpoints hold it.
        self.flag_embedding = nn.Embedding(2, config.hidden_size)
        self.drug_encoder = TahoeX1DrugEncoder(config) if config.num_drugs else None

    def forward(
        self,
        input_ids: torch.Tensor,
        expression_values: torch.Tensor,
        target_mask: torch.Tensor | None,
        drug_ids: torch.Tensor | None,
        layout: CellLayout,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        value_embeddings = self.expression_encoder(expression_values)
        if target_mask is None and self.training and torch.is_grad_enabled():
            # Put nowhere, but part of the graph: DistributedDataParallel waits for the gradients of all parameters.
            target_mask = torch.zeros_like(input_ids, dtype=torch.bool)
        if target_mask is not None:
            flag = self.flag_embedding(input_ids.new_ones(())).to(value_embeddings.dtype)
            value_embeddings = torch.where(target_mask.unsqueeze(-1), flag, value_embeddings)
        return self.combine(input_ids, value_embeddings, drug_ids, layout)

    def combine(
        self,
        input_ids: torch.Tensor,
        value_embeddings: torch.Tensor,
        drug_ids: torch.Tensor | None,
        layout: CellLayout,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token and gene embeddings, `(batch, length, hidden_size)`, given the embeddings of the values."""
        gene_embeddings = self.gene_encoder(input_ids)
        hidden_states = gene_embeddings + value_embeddings
        if self.drug_encoder is not None:
            if drug_ids is None:  # a drug token without a drug is the unknown drug, row 0
                drug_ids = input_ids.new_zeros(layout.num_cells)
            drugs = layout.per_token(self.drug_encoder(drug_ids)).to(hidden_states.dtype)
            hidden_states = torch.where(input_ids.eq(self.drug_token_id).unsqueeze(-1), drugs, hidden_states)
        return hidden_states, gene_embeddings


class TahoeX1MLP(nn.Module):
    """Feed-forward block, gated with `use_glu`."""

    def __init__(self, config: TahoeX1Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size) if config.use_glu else None
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
        """Return `(..., hidden_size)`; with `overwrite`, activations reuse memory where they can."""
        if self.gate_proj is not None:
            return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        if type(self.act_fn) is nn.ReLU:
            return self.down_proj(linear_and_relu(self.up_proj, hidden_states, overwrite))
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class TahoeX1Attention(nn.Module):
    """Bidirectional multi-head attention with separate query, key and value projections."""

    def __init__(self, config: TahoeX1Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, kv_size)
        self.v_proj = nn.Linear(config.hidden_size, kv_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        # An attribute, since quantisers replace `nn.Linear`s alone, and transformers has custom models initialise only
        # the modules that hold parameters themselves, without their parents.
        setattr(self.o_proj, ON_RESIDUAL, True)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: AttentionMask = None,
        query_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)
        if isinstance(attention_mask, (PackedAttention, EagerAttention)):
            attn_output, attn_weights = attention_mask(query, key, value, self.scaling)
        else:
            backend = self.config._attn_implementation
            attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
            attn_output, attn_weights = attend(
                self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
            )
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        if query_mask is not None:
            attn_output = attn_output * query_mask.unsqueeze(-1).to(attn_output.device, attn_output.dtype)
        return self.o_proj(attn_output), attn_weights


class TahoeX1Layer(GradientCheckpointingLayer):
    """One transformer layer, normalised before (`"pre"`) or after (`"post"`) each block."""

    def __init__(self, config: TahoeX1Config, layer_idx: int):
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.self_attn = TahoeX1Attention(config, layer_idx)
        self.mlp = TahoeX1MLP(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: AttentionMask = None,
        query_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        return self.run(hidden_states, attention_mask, query_mask, **kwargs)

    def run(self, hidden_states: torch.Tensor, *masks: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the layer. `compile_layers` compiles this alone: compiled checkpoints keep twice as much memory."""
        attn_output, _ = self.self_attn(self.before_attention(hidden_states), *masks, **kwargs)
        return self.after_attention(hidden_states, attn_output)

    def before_attention(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the input of the attention block."""
        return self.attention_norm(hidden_states) if self.pre_norm else hidden_states

    def after_attention(
        self, hidden_states: torch.Tensor, attn_output: torch.Tensor, overwrite: bool = False
    ) -> torch.Tensor:
        """Return the layer's output, token by token.

        Args:
            hidden_states: `(..., hidden_size)`, the layer's input.
            attn_output: `(..., hidden_size)`, output of the attention block at the same tokens.
            overwrite: As for `TahoeX1MLP`.
        """
        hidden_states = hidden_states + attn_output
        if self.pre_norm:
            return hidden_states + self.mlp(self.mlp_norm(hidden_states), overwrite)
        hidden_states = self.attention_norm(hidden_states)
        return self.mlp_norm(hidden_states + self.mlp(hidden_states, overwrite))


class TahoeX1PreTrainedModel(TravelsWithCode, PreTrainedModel):  # type: ignore[misc]
    """Base of all Tahoe-x1 models, with the properties that transformers needs to know."""

    config: TahoeX1Config
    base_model_prefix = "tahoe"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TahoeX1Embeddings", "TahoeX1Layer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": TahoeX1Layer, "attentions": TahoeX1Attention}
    dummy_inputs = property(lambda self: dummy_batch(self.config.vocab_size, self.device))
    generate = refuse_to_generate
    _locate_checkpoint: Callable | None = None  # set by the package, for checkpoints in the original's layout

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, and with the package installed also a checkpoint in the original's layout."""
        name = pretrained_model_name_or_path
        if cls._locate_checkpoint is not None:
            name, kwargs = cls._locate_checkpoint(name, "config.json", kwargs)
        return super().from_pretrained(name, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, under our names of the weights; `with_code=True` adds the code (remote code)."""
        super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as the original: normal, std `sqrt(2 / fan_in)`; the attention output also `/ sqrt(2 layers)`.

        Source: `init_config_defaults` of tahoe_x1/model/blocks.py (kaiming_normal_, fan_in, relu, residual division).
        """
        if isinstance(module, (nn.Linear, TahoeX1ValueLinear)):
            residuals = 2 * self.config.num_hidden_layers if hasattr(module, ON_RESIDUAL) else 1
            init.normal_(module.weight, std=(2.0 / module.weight.shape[1] / residuals) ** 0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, TahoeX1DrugTable):
            init.zeros_(module.weight)  # replaced when fingerprints are loaded
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=(2.0 / module.embedding_dim) ** 0.5)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        """Return the gene embedding table."""
        return self.base_model.get_submodule("embeddings.gene_encoder.embedding")

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the gene embedding table."""
        self.base_model.set_submodule("embeddings.gene_encoder.embedding", value)


class TahoeX1Model(TahoeX1PreTrainedModel):
    """The Tahoe-x1 transformer without a decoder: contextual gene embeddings and cell embeddings."""

    # Loading the checkpoint of a head is the usual case, so the unused weights are not reported.
    _keys_to_ignore_on_load_unexpected = [r"^expression_decoder\.", r"^cell_decoder\.", r"^classifier\."]

    def __init__(self, config: TahoeX1Config):
        super().__init__(config)
        self.embeddings = TahoeX1Embeddings(config)
        self.layers = nn.ModuleList([TahoeX1Layer(config, i) for i in range(config.num_hidden_layers)])
        pre_norm = config.norm_position == "pre"
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if pre_norm else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        expression_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        target_mask: torch.Tensor | None = None,
        drug_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> TahoeX1ModelOutput:
        """Embed cells.

        Args:
            input_ids: `(batch, length)` int64, token ids of the genes after `<cls>`.
            expression_values: `(batch, length)` float, encoded expression of the genes.
            attention_mask: `(batch, length)`, nonzero at tokens, zero at padding; by default where `input_ids` is not
                `config.pad_token_id`. Or `(batch, 1, queries, keys)`, what each token sees besides: nonzero, or 0
                among floats, which are added to the scores.
            target_mask: `(batch, length)` bool, tokens whose expression is hidden from the model and to be predicted.
            drug_ids: `(cells,)` int64, drug of each cell, 0 for none; read where a `<drug>` token stands.
            **kwargs: `output_hidden_states`; `output_attentions`; and, for cells packed into one row without padding,
                `cu_seq_lens_q` `(cells + 1,)` int32, their boundaries from 0 to the length (flash attention also
                wants `cu_seq_lens_k`, `max_length_q` and `max_length_k`). With `max_length_q` and `num_targets`, the
                number of tokens in `target_mask`, nothing waits for a GPU to count them.

        Raises:
            ValueError: For an argument that does not exist, shapes that do not agree, ids out of range, padding on the
                left, or a combination that the attention backend cannot compute.
        """
        check_arguments(self.config, input_ids, expression_values, attention_mask, target_mask, drug_ids, kwargs)
        layout, valid = lay_out_cells(self.config, input_ids, attention_mask, drug_ids, kwargs)
        unread = torch.zeros_like(input_ids, dtype=torch.bool) if target_mask is None else target_mask
        if valid is not None and self.config.cell_pooling != "mean_with_padding":
            unread = unread | ~valid
        values = expression_values.masked_fill(unread, 0.0)
        hidden_states, gene_embeddings = self.embeddings(input_ids, values, target_mask, drug_ids, layout)
        mask = make_attention_mask(self.config, hidden_states, valid, attention_mask, target_mask, layout, kwargs)
        # The original's mean over padding takes the attention output there as zero, as flash attention leaves it.
        query_mask = valid if self.config.cell_pooling == "mean_with_padding" else None
        kwargs = {name: value for name, value in kwargs.items() if name not in UNREAD_BY_LAYERS}
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, query_mask, **kwargs)
        hidden_states = self.norm(hidden_states)
        return TahoeX1ModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=layout.pool(hidden_states, valid, self.config.cell_pooling),
            gene_embeddings=gene_embeddings,
        )


class TahoeX1ExpressionDecoder(nn.Module):
    """Contextual embedding to expression: `(batch, length, hidden_size)` to `(batch, length)`."""

    def __init__(self, config: TahoeX1Config):
        super().__init__()
        width, depth = config.hidden_size, config.expression_decoder_layers
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.act_fn = ACT2FN[config.expression_decoder_act]
        self.output = TahoeX1HeadLinear(width, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = self.act_fn(layer(hidden_states))
        return self.output(hidden_states).squeeze(-1).clone()  # FSDP2 warns of outputs that are views


class TahoeX1CellDecoder(nn.Module):
    """Expression of a gene from the cell embedding alone: `query(gene) · project(cell)`.

    The original projects each gene's query instead of the cell: the same product, at length times the work.
    """

    def __init__(self, config: TahoeX1Config):
        super().__init__()
        self.gene_query = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.cell_decoder_act]
        self.cell_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.scaling = config.hidden_size**-0.5 if config.cell_decoder_scaled else 1.0

    def forward(
        self, cell_embeddings: torch.Tensor, gene_embeddings: torch.Tensor, layout: CellLayout | None
    ) -> torch.Tensor:
        queries = self.act_fn(self.gene_query(gene_embeddings))
        if layout is None:  # the same genes for all cells: (cells, genes)
            return torch.matmul(self.cell_proj(cell_embeddings), queries.transpose(0, 1)) * self.scaling
        cells = layout.per_token(self.cell_proj(cell_embeddings))
        if layout.token_cells is None:
            return torch.matmul(queries, cells.transpose(1, 2)).squeeze(-1) * self.scaling
        return (queries * cells).sum(-1) * self.scaling


class TahoeX1ForPreTraining(TahoeX1PreTrainedModel):
    """Tahoe-x1 with its two decoders, for masked-expression modelling."""

    _keep_in_fp32_modules = ["expression_decoder.output"]

    def __init__(self, config: TahoeX1Config):
        super().__init__(config)
        self.tahoe = TahoeX1Model(config)
        self.expression_decoder = TahoeX1ExpressionDecoder(config)
        self.cell_decoder = TahoeX1CellDecoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        expression_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        target_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        drug_ids: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        cell_labels: torch.Tensor | None = None,
        num_cell_labels: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> TahoeX1ForPreTrainingOutput:
        """Predict the hidden expression of the targets. Other arguments and errors are `TahoeX1Model.forward`'s.

        Args:
            labels: `(batch, length)` float, expression at the targets; other values are not read. The loss is the mean
                of the two decoders' mean squared errors over the targets that are not padding, and 0 when there is
                none.
            num_items_in_batch: Number of targets over which the loss is averaged, by default the targets of this call;
                with gradient accumulation, pass the targets of all microbatches.
            cell_labels: `(cells, tokens)` float, expression of every gene by token id, -100 at ids that are no gene's:
                the cell decoder's loss is then over these, and not over the targets as in the original.
            num_cell_labels: As `num_items_in_batch`, for `cell_labels`.
        """
        if labels is not None and target_mask is None:
            raise ValueError("labels was given without target_mask, which marks the positions to predict.")
        outputs = self.tahoe(input_ids, expression_values, attention_mask, target_mask, drug_ids, **kwargs)
        check_shape(input_ids, labels=labels)
        layout, valid = lay_out_cells(self.config, input_ids, attention_mask, drug_ids, kwargs)
        expression_predictions = self.expression_decoder(outputs.last_hidden_state)
        cell_expression_predictions = self.cell_decoder(outputs.pooler_output, outputs.gene_embeddings, layout)
        loss = expression_loss = cell_expression_loss = None
        if labels is not None and target_mask is not None:
            targets = target_mask if valid is None else target_mask & valid
            num_targets = targets.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            scaled = scaled_labels(self.config, labels)
            expression_loss = masked_mse(expression_predictions, scaled, targets, num_targets)
            if cell_labels is None:
                cell_expression_loss = masked_mse(cell_expression_predictions, scaled, targets, num_targets)
            else:
                cell_expression_loss = every_gene_mse(self, outputs.pooler_output, cell_labels, num_cell_labels)
            loss = (expression_loss + cell_expression_loss.to(expression_loss.device)) / 2
        # Built last, since the order of assignment is also the order of the tuple for return_dict=False.
        return TahoeX1ForPreTrainingOutput(
            loss=loss, expression_loss=expression_loss, cell_expression_loss=cell_expression_loss,
            expression_predictions=expression_predictions, cell_expression_predictions=cell_expression_predictions,
            pooler_output=outputs.pooler_output, hidden_states=outputs.hidden_states, attentions=outputs.attentions,
        )  # fmt: skip


class TahoeX1ForSequenceClassification(TahoeX1PreTrainedModel):
    """Tahoe-x1 with a linear head on the cell embedding: classification or regression of cells."""

    _keep_in_fp32_modules = ["classifier"]
    _keys_to_ignore_on_load_unexpected = [r"^expression_decoder\.", r"^cell_decoder\."]

    def __init__(self, config: TahoeX1Config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.tahoe = TahoeX1Model(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = TahoeX1HeadLinear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        expression_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        target_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        drug_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classify cells.

        The other arguments, and the errors, are as for `TahoeX1Model.forward`.

        Args:
            labels: `(cells,)` int64 class ids, or float values for `config.problem_type` "regression"
                (`(cells, num_labels)` floats for "multi_label_classification").
        """
        outputs = self.tahoe(input_ids, expression_values, attention_mask, target_mask, drug_ids, **kwargs)
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
            if kwargs.get("num_items_in_batch") is not None:  # Trainer's: those of all microbatches of a step
                share = labels.ne(-100).sum() / torch.as_tensor(kwargs["num_items_in_batch"], device=labels.device)
                loss = loss * share.to(loss.device)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class TahoeX1ForTokenClassification(TahoeX1PreTrainedModel):
    """Tahoe-x1 with a linear head on every contextual gene embedding: classification of genes."""

    _keep_in_fp32_modules = ["classifier"]
    _keys_to_ignore_on_load_unexpected = [r"^expression_decoder\.", r"^cell_decoder\."]

    def __init__(self, config: TahoeX1Config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.tahoe = TahoeX1Model(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = TahoeX1HeadLinear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        expression_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        target_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        drug_ids: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Classify the genes of cells: logits `(batch, length, num_labels)`.

        The other arguments, and the errors, are as for `TahoeX1Model.forward`.

        Args:
            labels: `(batch, length)` int64 class ids, -100 at tokens without one. The loss is the mean cross-entropy
                over the tokens that have one and are not padding, and 0 when there is none.
            num_items_in_batch: As for `TahoeX1ForPreTraining`.
        """
        outputs = self.tahoe(input_ids, expression_values, attention_mask, target_mask, drug_ids, **kwargs)
        check_shape(input_ids, labels=labels)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            _, valid = lay_out_cells(self.config, input_ids, attention_mask, drug_ids, kwargs)
            loss = token_cross_entropy(logits, labels, valid, num_items_in_batch)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "TahoeX1ForPreTraining",
    "TahoeX1ForSequenceClassification",
    "TahoeX1ForTokenClassification",
    "TahoeX1Model",
    "TahoeX1PreTrainedModel",
]
