# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Compare the facts of a model card with the checkpoint that the card is for."""

from pathlib import Path

from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
from tahoex1_hf.hub.cards.facts import Facts
from tahoex1_hf.original.verify import weights_file
from tahoex1_hf.original.weights import open_weights


def check_facts(facts: Facts, source: Path, folder: Path) -> None:
    """Check that a checkpoint has the shape and the number of parameters that its card will name.

    Args:
        facts: Facts of the card.
        source: File that the facts were read from.
        folder: Converted checkpoint.

    Raises:
        ValueError: If they differ; the message says in what.
    """
    config = TahoeX1Config.from_pretrained(folder)
    shapes = open_weights(weights_file(folder)).shapes.values()
    found = {name: getattr(config, name) for name in vars(facts.shape)}
    found["parameters"] = sum(shape.numel() for shape in shapes)
    told = {**vars(facts.shape), "parameters": facts.parameters}
    wrong = [
        f"{name} {_text(found[name])} instead of {_text(told[name])}" for name in told if found[name] != told[name]
    ]
    if wrong:
        raise ValueError(
            f"{folder} is not the model that the card of {source.name} describes ({facts.title}), it has "
            f"{', '.join(wrong)}. Give the size another name (NAME=FOLDER), or pass a card of its own (--card)."
        )


def _text(value: object) -> str:
    return f"{value:,}" if type(value) is int else str(value)
