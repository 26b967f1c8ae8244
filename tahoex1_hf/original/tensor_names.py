"""Tensor names of the original program's checkpoints, and ours: one table, read in both directions.

The original keeps query, key and value in one fused matrix (`Wqkv`, rows in that order) and projects gene queries
where we project the cell (`mvc_decoder.W`, transposed). Everything else is renamed only, so both directions are exact.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForPreTraining


@dataclass(frozen=True)
class NameRule:
    """One tensor of the original, and the tensor or tensors of ours that hold the same numbers.

    Args:
        original: name in the original's checkpoint.
        ours: names in `TahoeX1ForPreTraining`; three, stacked along dimension 0, for `Wqkv`.
        transposed: whether our matrix is the transpose of the original's.
    """

    original: str
    ours: tuple[str, ...]
    transposed: bool = False


# (original, ours); `{kind}` stands for weight and bias.
_EMBEDDINGS = [
    ("gene_encoder.embedding.weight", "tahoe.embeddings.gene_encoder.embedding.weight"),
    ("flag_encoder.weight", "tahoe.embeddings.flag_embedding.weight"),
    ("expression_encoder.linear1.{kind}", "tahoe.embeddings.expression_encoder.linear1.{kind}"),
    ("expression_encoder.linear2.{kind}", "tahoe.embeddings.expression_encoder.linear2.{kind}"),
]
_DRUG_ENCODER = [
    ("chem_encoder.embedding.weight", "tahoe.embeddings.drug_encoder.embedding.weight"),
    ("chem_encoder.fc.{kind}", "tahoe.embeddings.drug_encoder.linear1.{kind}"),
    ("chem_encoder.proj.{kind}", "tahoe.embeddings.drug_encoder.linear2.{kind}"),
    ("chem_encoder.norm.{kind}", "tahoe.embeddings.drug_encoder.norm.{kind}"),
]
_LAYER = [
    ("self_attn.out_proj.{kind}", "self_attn.o_proj.{kind}"),
    ("up_proj.{kind}", "mlp.up_proj.{kind}"),
    ("down_proj.{kind}", "mlp.down_proj.{kind}"),
    ("norm1.{kind}", "attention_norm.{kind}"),
    ("norm2.{kind}", "mlp_norm.{kind}"),
]
_DECODERS = [
    ("expression_decoder.out_proj.{kind}", "expression_decoder.output.{kind}"),
    ("mvc_decoder.gene2query.{kind}", "cell_decoder.gene_query.{kind}"),
]


def _pairs(config: TahoeX1Config) -> Iterator[tuple[str, str]]:
    """Yield the plainly renamed tensors of a model of this shape, `{kind}` not yet filled in."""
    yield from _EMBEDDINGS
    if config.gene_encoder_norm:
        yield "gene_encoder.enc_norm.{kind}", "tahoe.embeddings.gene_encoder.norm.{kind}"
    if config.expression_encoder_norm:
        yield "expression_encoder.norm.{kind}", "tahoe.embeddings.expression_encoder.norm.{kind}"
    if config.num_drugs:
        yield from _DRUG_ENCODER
    layer_pairs = [*_LAYER, ("gate_proj.{kind}", "mlp.gate_proj.{kind}")] if config.use_glu else _LAYER
    for i in range(config.num_hidden_layers):
        for original, ours in layer_pairs:
            yield f"transformer_encoder.layers.{i}.{original}", f"tahoe.layers.{i}.{ours}"
    if config.norm_position == "pre":
        yield "transformer_encoder.norm.{kind}", "tahoe.norm.{kind}"
    for i in range(config.expression_decoder_layers):
        yield f"expression_decoder.linear_layers.{i}.{{kind}}", f"expression_decoder.layers.{i}.{{kind}}"
    yield from _DECODERS


def name_rules(config: TahoeX1Config) -> list[NameRule]:
    """Every tensor of a checkpoint of this shape, as the original names it and as we do."""
    rules = []
    for original, ours in _pairs(config):
        for kind in ("weight", "bias") if "{kind}" in original else ("",):
            rules.append(NameRule("model." + original.format(kind=kind), (ours.format(kind=kind),)))
    for i in range(config.num_hidden_layers):
        for kind in ("weight", "bias"):
            parts = tuple(f"tahoe.layers.{i}.self_attn.{part}_proj.{kind}" for part in "qkv")
            rules.append(NameRule(f"model.transformer_encoder.layers.{i}.self_attn.Wqkv.{kind}", parts))
    rules.append(NameRule("model.mvc_decoder.W.weight", ("cell_decoder.cell_proj.weight",), transposed=True))
    return rules


def our_shapes(config: TahoeX1Config) -> dict[str, torch.Size]:
    """Shape of every tensor of `TahoeX1ForPreTraining`; builds it without memory."""
    with torch.device("meta"):
        model = TahoeX1ForPreTraining(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def original_shapes(config: TahoeX1Config) -> dict[str, torch.Size]:
    """Shape of every tensor of the original's checkpoint."""
    ours, shapes = our_shapes(config), {}
    for rule in name_rules(config):
        first = ours[rule.ours[0]]
        rows = sum(ours[name][0] for name in rule.ours)
        shapes[rule.original] = torch.Size(reversed(first)) if rule.transposed else torch.Size((rows, *first[1:]))
    return shapes


def convert_tensor(rule: NameRule, tensor: torch.Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """One tensor of the original to ours. `shapes` are `our_shapes`."""
    if rule.transposed:
        tensor = tensor.T
    pieces = tensor.split([shapes[name][0] for name in rule.ours])
    return {name: piece.contiguous() for name, piece in zip(rule.ours, pieces, strict=True)}


def restore_tensor(rule: NameRule, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Our tensor or tensors back to the original's one."""
    tensor = torch.cat([tensors[name] for name in rule.ours])
    return (tensor.T if rule.transposed else tensor).contiguous()


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


def convert_state_dict(original: Mapping[str, torch.Tensor], config: TahoeX1Config) -> dict[str, torch.Tensor]:
    """Convert a whole state dict of the original to ours.

    Raises:
        ValueError: listing every tensor that is missing, unexpected or of another shape.
    """
    check_tensors({k: v.shape for k, v in original.items()}, original_shapes(config), "the original checkpoint")
    shapes, converted = our_shapes(config), {}
    for rule in name_rules(config):
        converted.update(convert_tensor(rule, original[rule.original], shapes))
    return converted


def restore_state_dict(ours: Mapping[str, torch.Tensor], config: TahoeX1Config) -> dict[str, torch.Tensor]:
    """Convert a state dict of `TahoeX1ForPreTraining` back to the original's names, bit for bit.

    Raises:
        ValueError: listing every tensor that is missing, unexpected or of another shape.
    """
    check_tensors({k: v.shape for k, v in ours.items()}, our_shapes(config), "the converted checkpoint")
    return {rule.original: restore_tensor(rule, ours) for rule in name_rules(config)}
