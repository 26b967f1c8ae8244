"""Test in-silico perturbation: the null distribution, resuming, choices and errors, and the command."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import anndata
import forked
import numpy as np
import pandas as pd
import pytest
import torch
from cells import GENES, make_cells, write_vocab
from helpers import tiny_config, tiny_model
from scipy.sparse import csr_matrix
from typer.testing import CliRunner

from tahoex1_hf import (
    TahoeX1ForPreTraining,
    TahoeX1Tokenizer,
    perturb_genes,
)
from tahoex1_hf.cells.encoding import EncodeOptions
from tahoex1_hf.cells.opening import open_cells
from tahoex1_hf.cli.app import app
from tahoex1_hf.perturbation import run as perturbation_run
from tahoex1_hf.perturbation.cells import PerturbationEncoder
from tahoex1_hf.perturbation.journal import Journal
from tahoex1_hf.perturbation.measures import Moments
from tahoex1_hf.perturbation.plan import Controls, Groups, Levels
from tahoex1_hf.perturbation.tables import compared

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QUIET: dict[str, Any] = {"null_genes": 0, "device": "cpu", "progress": False}
CLOSE: dict[str, float] = {"rel": 1e-3, "abs": 1e-9}  # of cosine distances, from 1e-5 to 0.1
MEASURES = ["cosine_distance", "euclidean_shift", "n_cells", "n_cells_expressing", "n_cells_changed"]


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocab(tmp_path_factory.mktemp("vocab"))


@pytest.fixture(scope="module")
def tokenizer(vocab: Path) -> TahoeX1Tokenizer:
    return TahoeX1Tokenizer(vocab)


@pytest.fixture(scope="module")
def model(tokenizer: TahoeX1Tokenizer) -> TahoeX1ForPreTraining:
    config = tiny_config(vocab_size=len(tokenizer), scale_targets=True, attention_mask_style="observed_or_self")
    return tiny_model(config, TahoeX1ForPreTraining)


def dense(adata: anndata.AnnData) -> np.ndarray:
    return csr_matrix(adata.X).toarray()


def run_all(adata: Any, model: Any, tokenizer: TahoeX1Tokenizer, **options: Any) -> pd.DataFrame:
    settings: dict[str, Any] = {"null_genes": 5, "min_cells": 4, "groupby": "cell_type", "expression": True}
    settings |= {"device": "cpu", "progress": False, "target": "passed == True", "max_length": 16}
    return perturb_genes(adata, model, tokenizer, **{**settings, **options}).table


# The null distribution ------------------------------------------------------------------------------------


def test_controls_are_nearest_in_expression_and_never_a_tested_gene() -> None:
    expressing = np.array([[10, 10, 11, 40, 9, 10, 2]])
    sums = np.array([[20, 21, 22, 80, 400, 20, 4.0]])
    levels = Levels(np.array([50]), expressing, sums)
    ties = np.arange(7)
    finder = Controls(levels, np.array([0, 5]), 3, 5, False, ties)
    assert finder.of(0, [0]) == [(1,), (2,), (3,)]  # not 5, which is tested, nor 6, in too few cells; 4 is far
    assert Controls(levels, np.array([], dtype=int), 2, 5, False, ties).of(0, [0]) == [(5,), (1,)]
    assert Controls(levels, np.array([0, 5]), 2, 5, False, ties).of(0, [0, 5]) == [(1, 2), (2, 3)]
    # Genes that no cell of the group expresses, but enough of all cells do.
    both = Levels(np.array([50, 50]), np.stack([expressing[0] * 0, expressing[0]]), np.stack([sums[0] * 0, sums[0]]))
    assert Controls(both, np.array([0]), 9, 5, False, ties).of(0, [0]) == []
    assert Controls(both, np.array([0]), 9, 5, True, ties).of(0, [0]) == [(1,), (2,), (3,), (4,), (5,)]
    assert Controls(both, np.array([0]), 2, 5, True, ties[::-1]).of(0, [0]) == [(5,), (4,)]


def test_p_values_count_controls_as_extreme() -> None:
    null = np.array([1.0, 2.0, 3.0, 4.0, np.nan])
    above = compared(3.5, null, two_sided=False)
    assert above["p_value"] == pytest.approx(2 / 5)
    assert above["z_score"] == pytest.approx((3.5 - 2.5) / np.std([1, 2, 3, 4], ddof=1))
    assert above["n_null"] == 4
    assert compared(0.0, null, two_sided=False)["p_value"] == 1
    assert compared(0.0, null, two_sided=True)["p_value"] == pytest.approx(1 / 5)
    assert np.isnan(compared(1.0, np.array([]), two_sided=True)["p_value"])


def test_controls_shift_as_they_do_when_they_are_tested(tokenizer: TahoeX1Tokenizer, model: Any) -> None:
    adata = make_cells(40, seed=5)
    options: dict[str, Any] = {"device": "cpu", "progress": False, "min_cells": 3}
    row = perturb_genes(adata, model, tokenizer, [GENES[0]], null_genes=6, **options).table.iloc[0]
    source = PerturbationEncoder(open_cells(adata, tokenizer), EncodeOptions(tokenizer))
    levels = Levels.measure(source, Groups(["all"], [np.arange(40)]))
    distance = ((levels.coordinates(0) - levels.coordinates(0)[0]) ** 2).sum(1)
    controls = [GENES[c] for c in np.argsort(distance)[1:7]]
    assert len(np.unique(np.sort(distance)[:8])) == 8  # no ties
    tested = perturb_genes(adata, model, tokenizer, controls, null_genes=0, **options).table["cosine_distance"]
    assert row["null_mean"] == pytest.approx(tested.mean(), **CLOSE)
    assert row["null_sd"] == pytest.approx(tested.std(), **CLOSE)


def test_q_values_are_benjamini_and_hochbergs(tokenizer: TahoeX1Tokenizer, model: Any) -> None:
    table = run_all(make_cells(40, seed=5), model, tokenizer, groupby=None, expression=False)
    p = np.sort(table["p_value"].to_numpy())
    stepped = np.minimum.accumulate((p * len(p) / np.arange(1, len(p) + 1))[::-1])[::-1].clip(max=1)
    np.testing.assert_allclose(np.sort(table["q_value"]), stepped)


def test_few_changed_cells_are_ranked_last_without_p_value(tokenizer: TahoeX1Tokenizer, model: Any) -> None:
    adata = make_cells(40, seed=5)
    counts = dense(adata)
    counts[2:, 7] = 0
    counts[:2, 7] = 30
    adata.X = csr_matrix(counts)
    options: dict[str, Any] = {"null_genes": 5, "min_cells": 4, "device": "cpu", "progress": False}
    table = perturb_genes(adata, model, tokenizer, GENES[5:9], **options).table
    last = table.iloc[-1]
    assert (last["gene"], last["n_cells_changed"], last["n_null"]) == (GENES[7], 2, 0)
    assert np.isnan(last["p_value"])
    assert table["p_value"][:-1].notna().all()


def test_moments_equal_numpy() -> None:
    rng = np.random.default_rng(0)
    values, groups = rng.normal(5, 1e-3, 200), rng.integers(0, 3, 200)
    moments = Moments(4)
    for part in np.array_split(np.arange(200), 7):
        moments.add(groups[part], values[part])
    for group in range(3):
        mine = values[groups == group]
        mean, error = moments.of(group)
        assert mean == pytest.approx(mine.mean(), rel=1e-14)
        assert error == pytest.approx(mine.std(ddof=1) / len(mine) ** 0.5, rel=1e-9)
    assert np.isnan(moments.of(3)).all()


# Resuming ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tahoex1_hf.perturbation.plan._BLOCK_EVERY_GENE", 4)


def test_a_killed_run_resumes_and_gives_the_same_bits(
    tokenizer: TahoeX1Tokenizer, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    adata, partial = make_cells(40, seed=5), tmp_path / "out.csv.partial"
    reference = run_all(adata, model, tokenizer)
    measure, calls = perturbation_run._Run._measure, []

    def killed(self: Any, block: Any, *arguments: Any) -> Any:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(block)
        return measure(self, block, *arguments)

    monkeypatch.setattr(perturbation_run._Run, "_measure", killed)
    with pytest.raises(KeyboardInterrupt):
        run_all(adata, model, tokenizer, partial=partial)
    with partial.open("a") as file:
        file.write('{"group": 0, "genes": [4')  # the kill came while a line was written
    seen: list[Any] = []
    monkeypatch.setattr(
        perturbation_run._Run, "_measure", lambda self, block, *rest: seen.append(block) or measure(self, block, *rest)
    )
    resumed = run_all(adata, model, tokenizer, partial=partial)
    pd.testing.assert_frame_equal(resumed, reference, check_exact=True)
    assert calls
    assert not {task for block in seen for task in block} & {task for block in calls for task in block}
    lines = [json.loads(line) for line in partial.read_text().splitlines()]
    assert len(lines) == 1 + len({task for block in [*seen, *calls] for task in block})
    seen.clear()
    pd.testing.assert_frame_equal(run_all(adata, model, tokenizer, partial=partial), reference, check_exact=True)
    assert not seen


def test_other_settings_are_refused(tokenizer: TahoeX1Tokenizer, model: Any, tmp_path: Path) -> None:
    adata, partial = make_cells(20, seed=5), tmp_path / "partial"
    options: dict[str, Any] = {**QUIET, "partial": partial}
    first = perturb_genes(adata, model, tokenizer, GENES[:2], **options).table
    for other, name in (
        ({"seed": 1}, "seed"),
        ({"mode": "overexpress"}, "mode"),
        ({"cells": "n_genes > 14"}, "cells"),
    ):
        with pytest.raises(ValueError, match=f"another .*{name}"):
            perturb_genes(adata, model, tokenizer, GENES[:2], **options, **other)
    with pytest.raises(ValueError, match="another genes"):
        perturb_genes(adata, model, tokenizer, GENES[:3], **options)
    adata.X = csr_matrix(dense(adata) + 1)
    with pytest.raises(ValueError, match="another counts"):
        perturb_genes(adata, model, tokenizer, GENES[:2], **options)
    close = copy.deepcopy(model)
    with torch.no_grad():  # one value, of which there are thousands
        close.get_input_embeddings().weight[3, 1] += 1
    with pytest.raises(ValueError, match="another counts, model, weights"):
        perturb_genes(adata, close, tokenizer, GENES[:2], **options)
    changed = perturb_genes(adata, model, tokenizer, GENES[:2], **options, restart=True).table
    assert not np.allclose(changed["cosine_distance"], first["cosine_distance"])


def test_a_run_that_did_not_record_all_weights_goes_on(tmp_path: Path) -> None:
    """Earlier versions recorded some of the weights alone."""
    with Journal(tmp_path / "partial", {"model": "a"}):
        pass
    with Journal(tmp_path / "partial", {"model": "a", "weights": "b"}):
        pass
    with (
        pytest.raises(ValueError, match="another model"),
        Journal(tmp_path / "partial", {"model": "b", "weights": "b"}),
    ):
        pass


def test_two_runs_do_not_share_a_file(tokenizer: TahoeX1Tokenizer, model: Any, tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    with Journal(partial, {}), pytest.raises(ValueError, match="another run is writing there"):
        perturb_genes(make_cells(20, seed=5), model, tokenizer, GENES[:2], partial=partial, **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["partial"]


# Choices and errors -----------------------------------------------------------------------------------------


def test_genes_are_found_by_symbol_column_and_version(tokenizer: TahoeX1Tokenizer, model: Any) -> None:
    adata = make_cells(20, seed=5)
    adata.var["feature_name"] = [f"SYM{i}" for i in range(60)]
    table = perturb_genes(adata, model, tokenizer, ["SYM3", GENES[4] + ".12"], **QUIET).table.set_index("gene")
    assert table["gene_id"]["SYM3"] == GENES[3]
    assert table["gene_id"][GENES[4] + ".12"] == GENES[4]
    symbols = {f"OTHER{i}": gene for i, gene in enumerate(GENES)}
    named = perturb_genes(adata, model, tokenizer, ["OTHER3"], gene_symbols=symbols, **QUIET).table
    assert named["gene_id"][0] == GENES[3]
    # Other batches change the last bits of float32 embeddings by some 1e-6 of their length, which moves a
    # distance d by up to 1e-6 * sqrt(2 d), here by 1.4e-5 of d.
    assert named["cosine_distance"][0] == pytest.approx(table["cosine_distance"]["SYM3"], rel=1e-4)
    everything = perturb_genes(adata, model, tokenizer, "all", min_cells=3, **QUIET).table
    assert set(everything["gene"]) <= set(adata.var["feature_name"])
    adata.var["feature_name"] = ["twin"] * 60
    with pytest.raises(ValueError, match="'twin' is 60 genes"):
        perturb_genes(adata, model, tokenizer, ["twin"], **QUIET)


def test_folder_of_an_adapter_serves_as_a_model(tokenizer: TahoeX1Tokenizer, model: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = TahoeX1ForPreTraining.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2, lora_alpha=16))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(tmp_path / "adapter")
    adata, arguments = make_cells(20, seed=5), {"genes": GENES[:3], "expression": True, **QUIET}
    ours = perturb_genes(adata, tmp_path / "adapter", **arguments).table
    theirs = perturb_genes(adata, adapted, tokenizer, **arguments).table
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4)
    plain = perturb_genes(adata, tmp_path / "base", **arguments).table.set_index("gene")["cosine_distance"]
    assert not np.allclose(ours.set_index("gene")["cosine_distance"], plain, rtol=0.1)


def test_cells_by_mask_query_and_group(tokenizer: TahoeX1Tokenizer, model: Any) -> None:
    adata = make_cells(30, seed=5)
    mask = (adata.obs["n_genes"] > 15).to_numpy() & (adata.obs["cell_type"] == "B").to_numpy()
    by_mask = perturb_genes(adata, model, tokenizer, GENES[:4], cells=mask, **QUIET).table
    query = 'n_genes > 15 and cell_type == "B"'
    pd.testing.assert_frame_equal(
        perturb_genes(adata, model, tokenizer, GENES[:4], cells=query, **QUIET).table, by_mask
    )
    assert (by_mask["n_cells"] == mask.sum()).all()
    adata.obs["cell type"] = adata.obs["cell_type"]
    blanks = 'n_genes > 15 and `cell type` == "B"'
    pd.testing.assert_frame_equal(
        perturb_genes(adata, model, tokenizer, GENES[:4], cells=blanks, **QUIET).table, by_mask
    )
    adata.obs["group"] = pd.Categorical(np.where(mask, "in", None))
    by_group = perturb_genes(adata, model, tokenizer, GENES[:4], groupby="group", **QUIET).table
    assert set(by_group["group"]) == {"in"}
    np.testing.assert_array_equal(by_group["cosine_distance"], by_mask["cosine_distance"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"genes": ["ENSG00000000001", "NOPE", "NADA"]}, r"\['NOPE', 'NADA'\] are not among"),
        ({"genes": "ENSG00000000001"}, "pass a list of genes"),
        ({"genes": []}, "genes is empty"),
        ({"genes": [GENES[1], GENES[1] + ".2"]}, "names a gene twice"),
        ({"cells": "n_genes > 999"}, "leaves none of the 20 cells"),
        ({"cells": "missing > 1"}, "'missing' is not in adata.obs"),
        ({"cells": "n_genes >"}, "not an expression"),
        ({"cells": np.ones(3, dtype=bool)}, r"cells has shape \(3,\)"),
        ({"target": "n_genes > 999"}, "target=.* leaves none"),
        ({"groupby": "missing"}, "groupby='missing' is not in adata.obs"),
        ({"mode": "remove"}, "mode='remove'"),
        ({"mode": "set"}, "value=None"),
        ({"value": 3.0}, "value=3.0"),
        ({"mode": "set", "value": -1.0}, "value=-1.0"),
        ({"null_genes": -1}, "null_genes=-1"),
        ({"genes": "all", "min_cells": 1000}, "min_cells=1000"),
        ({"genes": GENES[:9], "together": True, "mode": "overexpress", "max_length": 8}, "larger max_length"),
    ],
)
def test_errors_say_what_to_do(tokenizer: TahoeX1Tokenizer, model: Any, options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"genes": GENES[:2], **QUIET, **options}
    with pytest.raises(ValueError, match=message):
        perturb_genes(make_cells(20, seed=5), model, tokenizer, **arguments)


def test_deleting_genes_that_no_cell_expresses_is_an_error(tokenizer: TahoeX1Tokenizer, model: Any) -> None:
    adata = make_cells(20, seed=5)
    counts = dense(adata)
    counts[:, [3, 8]] = 0
    adata.X = csr_matrix(counts)
    with pytest.raises(ValueError, match=rf"None of the chosen cells expresses \['{GENES[3]}', '{GENES[8]}'\]"):
        perturb_genes(adata, model, tokenizer, [GENES[1], GENES[3], GENES[8]], **QUIET)
    table = perturb_genes(adata, model, tokenizer, [GENES[3]], mode="overexpress", **QUIET).table
    assert (table["n_cells_expressing"][0], table["n_cells_changed"][0]) == (0, 20)


def test_wrong_counts_and_models_are_refused(
    vocab: Path, tokenizer: TahoeX1Tokenizer, model: Any, tmp_path: Path
) -> None:
    adata = make_cells(20, seed=5)
    with pytest.raises(ValueError, match="pretraining head, which a TahoeX1Model lacks"):
        perturb_genes(adata, model.tahoe, tokenizer, GENES[:2], expression=True, **QUIET)
    headless = tmp_path / "headless"
    model.tahoe.save_pretrained(headless)
    tokenizer.save_pretrained(headless)
    with pytest.raises(ValueError, match="pretraining head, which the checkpoint"):
        perturb_genes(adata, headless, genes=GENES[:2], expression=True, **QUIET)
    table = perturb_genes(adata, headless, genes=GENES[:2], **QUIET).table
    np.testing.assert_allclose(
        table["cosine_distance"], perturb_genes(adata, model, tokenizer, GENES[:2], **QUIET).table["cosine_distance"]
    )
    with pytest.raises(ValueError, match="tokenizer is missing"):
        perturb_genes(adata, model, genes=GENES[:2], **QUIET)
    quirky = TahoeX1Tokenizer(vocab, first_gene_raw=True)
    with pytest.raises(ValueError, match="first_gene_raw"):
        perturb_genes(adata, model, quirky, GENES[:2], **QUIET)
    counts = dense(adata)
    counts[13, 5] = -2
    adata.X = csr_matrix(counts)
    with pytest.raises(ValueError, match=f"cell 13, gene {GENES[5]} has the value -2"):
        perturb_genes(adata, model, tokenizer, GENES[:2], **QUIET)


# The command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pbmc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("scanpy")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        from demo_cells import load_cells
    path = tmp_path_factory.mktemp("pbmc") / "pbmc.h5ad"
    load_cells().write_h5ad(path)
    return path


def run_command(*arguments: Any) -> Any:
    options = ["--gene-symbols", EXAMPLES / "pbmc68k_symbol_to_ensembl.csv", "--device", "cpu"]
    arguments = ("perturb", *arguments, "--model", EXAMPLES / "demo_checkpoint", *options)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command_on_real_cells(pbmc: Path, tmp_path: Path) -> None:
    output, affected, plot = tmp_path / "out.csv", tmp_path / "affected.parquet", tmp_path / "plot.png"
    before = pbmc.read_bytes()
    names = tmp_path / "genes.txt"
    names.write_text("CD79A\nLYZ\nMS4A1\nCD3D\n")
    options = ["--genes", names, "--cells", 'bulk_labels in ["CD19+ B", "CD56+ NK"]', "--groupby", "bulk_labels"]
    options += [
        "--null-genes",
        2,
        "--most-null-genes",
        2,
        "--expression",
        "--affected",
        affected,
        "--num-affected",
        5,
        "--plot",
        plot,
    ]
    result = run_command(pbmc, output, *options)
    assert result.exit_code == 0, result.output
    table = pd.read_csv(output)
    assert list(table["group"].unique()) == ["CD19+ B", "CD56+ NK"]
    assert len(table) == 8
    b_cells = table[table["group"] == "CD19+ B"].set_index("gene")
    # Markers of B cells, in cells that are B cells, and known to matter to the model (n = 61 and 94 of 95).
    assert set(b_cells.index[:2]) == {"MS4A1", "CD79A"}
    assert b_cells["cosine_distance"]["CD79A"] > 3 * b_cells["cosine_distance"]["CD3D"]
    assert b_cells["gene_id"]["CD79A"] == "ENSG00000105369"
    listed = pd.read_parquet(affected)
    assert (listed.groupby(["group", "gene"]).size() <= 5).all()
    assert {"CD79A", "MS4A1"} <= set(listed["gene"])
    image = plot.read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(image) > 20_000
    assert not output.with_name("out.csv.partial").exists()
    assert pbmc.read_bytes() == before
    again = tmp_path / "again.parquet"
    assert run_command(pbmc, again, *options[:10], "--expression", "--batch-tokens", 1000).exit_code == 0
    np.testing.assert_allclose(pd.read_parquet(again)["cosine_distance"], table["cosine_distance"], rtol=1e-3)


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("out.txt", ["--genes", "LYZ"], "must end in .csv or .parquet"),
        ("missing/out.csv", ["--genes", "LYZ"], "does not exist"),
        ("out.csv", ["--genes", "LYZ,NOPE"], "['NOPE'] are not among"),
        ("out.csv", ["--genes", ","], "names no gene"),
        ("out.csv", ["--genes", "LYZ", "--plot", "plot.pdf"], "must end in .png"),
        ("out.csv", ["--genes", "LYZ", "--affected", "a.csv"], "--affected needs --expression"),
        ("out.csv", ["--genes", "LYZ", "--cells", "bulk_labels == 'Nobody'"], "leaves none of the 700 cells"),
    ],
)
def test_errors_of_the_command(pbmc: Path, tmp_path: Path, output: str, options: list[str], message: str) -> None:
    result = run_command(pbmc, tmp_path / output, *options)
    assert result.exit_code == 1
    assert message in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_example(pbmc: Path, tmp_path: Path) -> None:
    genes = "PRF1,CD8B,GZMB,CCR7,FGFBP2"
    command = [sys.executable, EXAMPLES / "perturb_cells.py", "--output-dir", tmp_path, "--genes", genes]
    result = forked.run([*command, "--null-genes", 3, "--most-null-genes", 3])
    assert result.returncode == 0, result.stdout + result.stderr
    table = pd.read_csv(tmp_path / "perturbation.csv").set_index("gene")["target_change"]
    # Naive cells lack the effector genes, but not CCR7 and CD8B.
    assert table[["FGFBP2", "PRF1", "GZMB"]].min() > 0.002
    assert table[["CCR7", "CD8B"]].max() < 0
    assert (tmp_path / "perturbation.png").stat().st_size > 10_000
    assert not (tmp_path / "perturbation.partial").exists()
