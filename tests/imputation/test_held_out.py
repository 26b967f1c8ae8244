"""The test on held-out genes sees when a model knows something, and when it does not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anndata import AnnData
from cells import NUM_GENES, make_cells, write_vocab
from conftest import REPO_ROOT
from helpers import tiny_config, tiny_model

from tahoex1_hf import TahoeX1ForPreTraining, TahoeX1Tokenizer
from tahoex1_hf.cells.encoding import EncodeOptions
from tahoex1_hf.cells.genes import GeneOptions
from tahoex1_hf.cells.opening import open_cells
from tahoex1_hf.imputation import held_out
from tahoex1_hf.imputation.held_out import MEAN, OURS, SMOOTHED, HeldOutTest, run_test
from tahoex1_hf.imputation.targets import TargetPredictor
from tahoex1_hf.inference.encoder import CellEncoder
from tahoex1_hf.inference.expression import ExpressionPredictor
from tahoex1_hf.perturbation.cells import PerturbationEncoder


def outcome(
    adata: AnnData, model: TahoeX1ForPreTraining, tokenizer: TahoeX1Tokenizer, symbols: Any = None
) -> HeldOutTest | None:
    source = PerturbationEncoder(
        open_cells(adata, tokenizer, GeneOptions(gene_symbols=symbols)), EncodeOptions(tokenizer)
    )
    encoder = CellEncoder(model, tokenizer, device="cpu", dtype="float32")
    targets = TargetPredictor(ExpressionPredictor(encoder, model.expression_decoder))
    return run_test(source, targets, "cells", 0)


def test_the_demo_checkpoint_beats_the_means_on_its_own_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO_ROOT / "examples"))
    monkeypatch.setattr(held_out, "TEST_CELLS", 60)
    from demo_cells import load_cells, load_gene_symbols

    folder = REPO_ROOT / "examples" / "demo_checkpoint"
    model, tokenizer = TahoeX1ForPreTraining.from_pretrained(folder), TahoeX1Tokenizer.from_pretrained(folder)
    found = outcome(load_cells(), model, tokenizer, load_gene_symbols())
    assert found is not None
    scores = found.report.means()
    assert scores[OURS]["correlation"].value > scores[MEAN]["correlation"].value > 0.4
    assert scores[OURS]["auroc"].value > scores[MEAN]["auroc"].value > 0.6
    assert any(verdict.startswith("The model beats the mean of the gene") for verdict in found.verdicts)


def test_random_weights_lose_and_few_cells_are_no_test(tmp_path: Path) -> None:
    tokenizer = TahoeX1Tokenizer(str(write_vocab(tmp_path)), context_length=40)
    model = tiny_model(tiny_config(vocab_size=NUM_GENES + 3), TahoeX1ForPreTraining)
    found = outcome(make_cells(60), model, tokenizer)
    assert found is not None
    assert len(found.verdicts) == 4
    assert "loses to" in found.verdicts[0]
    assert {SMOOTHED, MEAN, OURS} == set(found.report.means())
    assert outcome(make_cells(39), model, tokenizer) is None


def test_neighbours_that_share_a_pattern_are_found(tmp_path: Path) -> None:
    """Cells of two kinds, whose genes are high in one kind: smoothing must predict better than the mean."""
    rng = np.random.default_rng(0)
    adata = make_cells(120)
    kind = rng.integers(0, 2, 120)
    high = np.arange(NUM_GENES) % 2
    adata.X = type(adata.X)(np.where(high == kind[:, None], 40, 2) + rng.integers(0, 3, (120, NUM_GENES)), dtype=float)
    tokenizer = TahoeX1Tokenizer(str(write_vocab(tmp_path)), context_length=80)
    found = outcome(adata, tiny_model(tiny_config(vocab_size=NUM_GENES + 3), TahoeX1ForPreTraining), tokenizer)
    assert found is not None
    scores = found.report.means()
    assert scores[SMOOTHED]["mse"].value < 0.9 * scores[MEAN]["mse"].value
    assert "auroc" not in scores[OURS]  # every gene is expressed in every cell
