"""Scores say how badly a model predicts hidden genes, and depend on the cell alone."""

import numpy as np
import pytest
from cells import GENES, NUM_GENES, make_cells, write_vocab
from conftest import REPO_ROOT
from helpers import tiny_config, tiny_model
from scipy.sparse import csr_matrix
from sklearn.metrics import roc_auc_score

from tahoex1_hf import TahoeX1ForPreTraining, TahoeX1Tokenizer
from tahoex1_hf.encoding_tahoe_x1 import GeneRows, content_numbers, sample_seed
from tahoex1_hf.inference.encoder import CellEncoder
from tahoex1_hf.inference.expression import ExpressionPredictor, halves
from tahoex1_hf.inference.scoring import CellScorer, num_masks
from tahoex1_hf.padding_tahoe_x1 import EncodedCells


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TahoeX1Tokenizer:
    return TahoeX1Tokenizer(str(write_vocab(tmp_path_factory.mktemp("vocab"))), context_length=40)


@pytest.fixture(scope="module")
def predictor(tokenizer: TahoeX1Tokenizer) -> ExpressionPredictor:
    config = tiny_config(vocab_size=NUM_GENES + 3, attention_mask_style="observed_or_self")
    model = tiny_model(config, TahoeX1ForPreTraining)
    encoder = CellEncoder(model, tokenizer, device="cpu", dtype="float32")
    return ExpressionPredictor(encoder, model.expression_decoder)


def encoded(tokenizer: TahoeX1Tokenizer, counts: csr_matrix, genes: list[str] = GENES) -> EncodedCells:
    return tokenizer.encode_counts(counts, tokenizer.match_genes(genes))


def test_score_is_the_share_of_the_variance_that_is_not_predicted(
    tokenizer: TahoeX1Tokenizer, predictor: ExpressionPredictor
) -> None:
    cells = encoded(tokenizer, make_cells(5).X)
    scores, deviations = CellScorer(predictor, 3, seed=7).score(cells)
    assert scores.dtype == deviations.dtype == np.float32
    for cell in range(5):
        here = slice(cells.offsets[cell], cells.offsets[cell + 1])
        tokens, values = cells.input_ids[here], cells.expression_values[here].astype(float)
        content = content_numbers(GeneRows(tokens, cells.expression_values[here], np.array([0, len(tokens)])))
        each = []
        for mask, seed in enumerate([7, 7, sample_seed(7, 1)]):
            hidden = halves(np.zeros(len(tokens), dtype=int), tokens, content, seed) == mask % 2
            hidden[0] = False  # <cls>
            everywhere = np.zeros(len(cells.input_ids), dtype=bool)
            everywhere[here] = hidden
            errors = (predictor.predict(cells, everywhere)[here][hidden] - values[hidden]) ** 2
            each.append(errors.mean() / values[1:].var())
        assert scores[cell] == pytest.approx(np.mean(each), rel=1e-5)
        assert deviations[cell] == pytest.approx(np.std(each, ddof=1), rel=1e-4)


def test_scores_depend_on_the_cell_and_the_seed_alone(
    tokenizer: TahoeX1Tokenizer, predictor: ExpressionPredictor
) -> None:
    adata = make_cells(40)
    order = np.random.default_rng(0).permutation(40)
    genes = np.random.default_rng(1).permutation(NUM_GENES)
    scorer = CellScorer(predictor, 2)
    scores = scorer.score(encoded(tokenizer, adata.X))[0]
    moved = encoded(tokenizer, adata.X[order][:, genes], [GENES[gene] for gene in genes])
    # Float32 sums in another order: each of the two layers rounds about 40 terms of size 1.
    np.testing.assert_allclose(scorer.score(moved)[0], scores[order], rtol=1e-4)
    assert np.abs(CellScorer(predictor, 2, seed=1).score(encoded(tokenizer, adata.X))[0] - scores).max() > 1e-3


def test_cells_without_variance_have_no_score(tokenizer: TahoeX1Tokenizer, predictor: ExpressionPredictor) -> None:
    counts = np.zeros((4, NUM_GENES), dtype=np.float32)
    counts[1, 3], counts[2, :20], counts[3, :30] = 5, 1, np.arange(1, 31)
    scores, deviations = CellScorer(predictor, 2).score(encoded(tokenizer, csr_matrix(counts)))
    assert np.isnan(scores).tolist() == np.isnan(deviations).tolist() == [True, True, True, False]
    scores, deviations = CellScorer(predictor, 1).score(encoded(tokenizer, csr_matrix(counts)))
    assert np.isnan(scores).tolist() == [True, True, True, False]
    assert np.isnan(deviations).all()


def test_number_of_masks() -> None:
    assert [num_masks(score) for score in (False, True, 0, 1, 7)] == [0, 4, 0, 1, 7]
    with pytest.raises(ValueError, match="score=-1: pass True, or the number of masks"):
        num_masks(-1)


def test_an_infinite_prediction_is_an_error(tokenizer: TahoeX1Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(vocab_size=NUM_GENES + 3)
    model = tiny_model(config, TahoeX1ForPreTraining)
    model.expression_decoder.output.bias.data.fill_(float("inf"))
    encoder = CellEncoder(model, tokenizer, device="cpu", dtype="float32")
    scorer = CellScorer(ExpressionPredictor(encoder, model.expression_decoder), 1)
    with pytest.raises(ValueError, match="predicts NaN or infinite expression, in float32"):
        scorer.score(encoded(tokenizer, make_cells(2).X))


def test_the_demo_checkpoint_notices_swapped_counts_and_misses_doublets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doublets are better told by their numbers of genes: what docs/score.md says, on 120 blood cells."""
    monkeypatch.syspath_prepend(str(REPO_ROOT / "examples"))
    from demo_cells import load_cells, load_gene_symbols

    folder = REPO_ROOT / "examples" / "demo_checkpoint"
    model, tokenizer = TahoeX1ForPreTraining.from_pretrained(folder), TahoeX1Tokenizer.from_pretrained(folder)
    adata = load_cells()
    genes = tokenizer.match_genes(adata.var_names, gene_symbols=load_gene_symbols())
    rng = np.random.default_rng(0)
    counts = adata.X[np.sort(rng.choice(adata.n_obs, 120, replace=False))].toarray()
    swapped = counts.copy()
    for cell in swapped:
        some = rng.choice(np.flatnonzero(cell), int(0.5 * (cell > 0).sum()), replace=False)
        cell[some] = cell[rng.permutation(some)]
    doublets = counts + counts[rng.permutation(120)]
    encoder = CellEncoder(model, tokenizer, device="cpu", dtype="float32")
    scorer = CellScorer(ExpressionPredictor(encoder, model.expression_decoder), 2)
    usual, *others = (
        scorer.score(tokenizer.encode_counts(csr_matrix(each), genes))[0] for each in (counts, swapped, doublets)
    )
    labels = np.repeat([0, 1], 120)
    swaps, both = (roc_auc_score(labels, np.concatenate([usual, other])) for other in others)
    genes_alone = roc_auc_score(labels, np.concatenate([(each > 0).sum(1) for each in (counts, doublets)]))
    assert swaps > 0.9
    assert both < genes_alone - 0.1
