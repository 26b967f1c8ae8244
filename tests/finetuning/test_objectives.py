"""Test losses: masks, class weights, and independence of padding."""

from pathlib import Path

import numpy as np
import pytest
import torch
from finetuning_runs import (
    labelled_cells,
    make_config,
    write_base,
)
from helpers import largest_difference

from tahoex1_hf import TahoeX1ForSequenceClassification
from tahoex1_hf.finetuning.bases import load_base, load_tokenizer
from tahoex1_hf.finetuning.cells.labelled import read_cells
from tahoex1_hf.finetuning.objectives import HELD_OUT, Objective, class_weights


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    labelled_cells(120).write_h5ad(path)
    return path


def test_masks_follow_from_seed_epoch_and_cell(base: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(base, data, tmp_path, task="masked_expression", label=None)
    cells = read_cells(config, load_tokenizer(config), tmp_path)
    objective = Objective(config, cells, np.arange(100))
    together, alone = objective.batch(np.array([3, 70, 5]), 2), objective.batch(np.array([70]), 2)
    length = int(alone["attention_mask"].sum())
    for name in ("input_ids", "target_mask", "labels"):
        assert torch.equal(together[name][1, :length], alone[name][0, :length])
    assert 0.4 < float(alone["target_mask"].sum()) / (length - 1) <= 0.5
    later = objective.batch(np.array([70]), 3)
    assert not torch.equal(later["target_mask"], alone["target_mask"])


def test_padding_changes_no_loss(base: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(base, data, tmp_path)
    cells = read_cells(config, load_tokenizer(config), tmp_path)
    objective = Objective(config, cells, np.arange(100))
    model = load_base(config, TahoeX1ForSequenceClassification, num_labels=3).eval()
    rows = np.arange(40)
    with torch.no_grad():
        whole = objective.sums(model, objective.batch(rows, HELD_OUT))
        parts = sum(objective.sums(model, objective.batch(part, HELD_OUT)) for part in np.split(rows, [3, 17]))
    assert largest_difference(whole, parts) < 1e-4
    assert objective.metrics(whole, 40)["accuracy"] == pytest.approx(float(whole[2]) / 40)


def test_class_weights_let_every_class_count_the_same() -> None:
    labels = np.repeat([0, 1, 3], [60, 30, 10])
    weights = class_weights(labels, 4, "balanced")
    assert np.allclose([weights[i] * (labels == i).sum() for i in (0, 1, 3)], 100 / 3)
    assert weights[2] == 1
    assert np.array_equal(class_weights(labels, 4, "none"), np.ones(4))
