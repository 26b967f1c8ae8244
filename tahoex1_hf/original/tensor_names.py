# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The original's names of the weights, as rules by which transformers loads and saves them.

The original keeps query, key and value in one fused matrix (`Wqkv`, rows in that order) and projects gene queries
where we project the cell (`mvc_decoder.W`, transposed). Everything else is renamed only, so both ways are exact.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    Transpose,
    WeightConverter,
    WeightRenaming,
    revert_weight_conversion,
)

from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForPreTraining

# The rules, in the order in which they apply. None matches one of our names, and the reverse of each undoes it in any
# order.
_RENAMED = [
    (r"^model\.gene_encoder\.embedding\.", "tahoe.embeddings.gene_encoder.embedding."),
    (r"^model\.gene_encoder\.enc_norm\.", "tahoe.embeddings.gene_encoder.norm."),
    (r"^model\.flag_encoder\.", "tahoe.embeddings.flag_embedding."),
    (r"^model\.expression_encoder\.", "tahoe.embeddings.expression_encoder."),
    (r"^model\.chem_encoder\.embedding\.", "tahoe.embeddings.drug_encoder.embedding."),
    (r"^model\.chem_encoder\.fc\.", "tahoe.embeddings.drug_encoder.linear1."),
    (r"^model\.chem_encoder\.proj\.", "tahoe.embeddings.drug_encoder.linear2."),
    (r"^model\.chem_encoder\.norm\.", "tahoe.embeddings.drug_encoder.norm."),
    (r"^model\.transformer_encoder\.norm\.", "tahoe.norm."),
    (r"^model\.transformer_encoder\.layers\.", "tahoe.layers."),
    (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
    (r"(layers\.\d+)\.up_proj\.", r"\1.mlp.up_proj."),
    (r"(layers\.\d+)\.down_proj\.", r"\1.mlp.down_proj."),
    (r"(layers\.\d+)\.gate_proj\.", r"\1.mlp.gate_proj."),
    (r"\.norm1\.", ".attention_norm."),
    (r"\.norm2\.", ".mlp_norm."),
    (r"^model\.expression_decoder\.linear_layers\.", "expression_decoder.layers."),
    (r"^model\.expression_decoder\.out_proj\.", "expression_decoder.output."),
    (r"^model\.mvc_decoder\.gene2query\.", "cell_decoder.gene_query."),
]


class SplitRows(ConversionOps):
    """Split a matrix along its rows into one piece per target, each as long as the model's parameter of that name.

    transformers has the same operation as `Split`, but not in all versions that this package runs with.
    """

    dim = 0

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        model: torch.nn.Module,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Return the pieces by target."""
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        names = [full_layer_name.replace(target_patterns[0], target) for target in target_patterns]
        pieces = tensor.split([len(model.get_parameter(name)) for name in names])
        return dict(zip(target_patterns, pieces, strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        """The operation that joins the pieces again."""
        return Concatenate(self.dim)


def conversion_rules() -> list[WeightRenaming | WeightConverter]:
    """Make the rules that turn the original's tensors into those of `TahoeX1ForPreTraining`."""
    rules: list[WeightRenaming | WeightConverter] = [WeightRenaming(theirs, ours) for theirs, ours in _RENAMED]
    rules.append(
        WeightConverter("model.mvc_decoder.W.weight", "cell_decoder.cell_proj.weight", operations=[Transpose()])
    )
    for kind in ("weight", "bias"):
        parts = [f"self_attn.{part}_proj.{kind}" for part in "qkv"]
        rules.append(WeightConverter(f"self_attn.Wqkv.{kind}", parts, operations=[SplitRows()]))
    return rules


def register_conversion_rules() -> None:
    """Let `from_pretrained` of every Tahoe-x1 model read weights under the original's names."""
    # Remote code of an exported repository registers nothing; the package may be imported again under another name.
    register_checkpoint_conversion_mapping(TahoeX1Config.model_type, conversion_rules(), overwrite=True)


def in_original_names(
    config: TahoeX1Config, read: Callable[[str], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the original's checkpoint, made from ours, reading one layer at a time.

    Args:
        config: Shape of the model.
        read: Function that returns our tensor of a name.
    """
    model = _empty_model(config)
    # Here transformers keeps the rules by which a model was loaded, to undo them.
    model._weight_conversions = conversion_rules()  # type: ignore[assignment]
    for _, names in groupby(model.state_dict(), _layer_of):
        yield from revert_weight_conversion(model, {name: read(name) for name in names}).items()


def our_shapes(config: TahoeX1Config) -> dict[str, torch.Size]:
    """Return the shape of every tensor of `TahoeX1ForPreTraining`; this takes no memory."""
    return {name: tensor.shape for name, tensor in _empty_model(config).state_dict().items()}


def original_shapes(config: TahoeX1Config) -> dict[str, torch.Size]:
    """Return the shape of every tensor of the original's checkpoint; this takes no memory."""
    ours = _empty_model(config).state_dict()
    return {name: tensor.shape for name, tensor in in_original_names(config, ours.__getitem__)}


def check_tensors(found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size], what: str) -> None:
    """Raise ValueError listing every tensor that is missing, unexpected or of another shape."""
    problems = [f"  missing: {name} {list(expected[name])}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"  unexpected: {name} {list(found[name])}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"  wrong shape: {name} is {list(found[name])}, the configuration makes it {list(expected[name])}"
        for name in sorted(found.keys() & expected.keys())
        if tuple(found[name]) != tuple(expected[name])
    ]
    if problems:
        raise ValueError(f"The tensors of {what} do not fit its configuration:\n" + "\n".join(problems))


def _empty_model(config: TahoeX1Config) -> TahoeX1ForPreTraining:
    with torch.device("meta"):
        return TahoeX1ForPreTraining(config)


def _layer_of(name: str) -> str:
    """Return `tahoe.layers.N` for a tensor of a layer, and the name itself for any other."""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[:2] == ["tahoe", "layers"] else name
