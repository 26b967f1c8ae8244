"""Test pretraining in this process: recipes, microbatches, metrics, the original's five steps through Trainer."""

import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from fixed_steps import fixed_trainer, tiny
from golden_bounds import exact, loss_record, tolerance
from helpers import (
    GOLDEN_VARIANTS,
    gradients,
    largest_relative_difference,
    make_batch,
    packed,
    tiny_config,
    tiny_model,
)
from killed_runs import same_weights
from scipy.stats import spearmanr
from training_runs import RECIPE, ROOT, TINY, finished
from transformers import AutoModelForPreTraining, AutoTokenizer

from tahoex1_hf import TahoeX1Config, TahoeX1ForPreTraining
from tahoex1_hf.hub.cards.rendering import render_card
from tahoex1_hf.original.convert import convert_original_folder
from tahoex1_hf.training.config import read_pretrain_config
from tahoex1_hf.training.metrics import MetricSums, batch_sums, spearman_per_cell
from tahoex1_hf.training.microbatches import largest_microbatch, longest_cells, microbatches, num_cells
from tahoex1_hf.training.monitors import SpikeWarning, UntrainedWarning, peak_flops
from tahoex1_hf.training.pretraining import pretrain, training_arguments

RECIPES = sorted(RECIPE.parent.glob("*.yaml"))


# Recipes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid(path: Path) -> None:
    config = read_pretrain_config(path)
    if config.init_from is None:
        TahoeX1Config(**config.model)


def test_recipes_hold_the_originals_values() -> None:
    """The original's values are typed in again here."""
    table = {
        "70m": (4800, 3e-4, "cosine", 1e-5, 6, 1024),
        "1_3b": (3584, 1e-4, "cosine", 1e-6, 8, 1024),
        "3b-stage1": (10240, 3e-4, "cosine", 3e-6, 4, 1024),
        "3b-stage2": (10240, 3e-5, "constant", 3e-6, 1, 2048),
    }
    assert {path.stem for path in RECIPES} == {*table, "debug", "absent-genes"}
    for name, values in table.items():
        c = read_pretrain_config(RECIPE.with_name(f"{name}.yaml"))
        found = (
            c.global_batch_size,
            c.learning_rate,
            c.schedule,
            c.decoupled_weight_decay,
            c.epochs,
            c.context_length,
        )
        assert found == values, name
        assert (c.betas, c.epsilon, c.max_grad_norm, c.mlm_probability) == ((0.9, 0.95), 1e-8, 1.0, 0.5)
        assert c.precision == "bf16"
        assert c.microbatch_size == "auto"
    shapes = {"70m": (512, 12, 8), "1_3b": (2048, 24, 16), "3b-stage1": (2560, 32, 20)}
    for name, shape in shapes.items():
        model = read_pretrain_config(RECIPE.with_name(f"{name}.yaml")).model
        assert (model["hidden_size"], model["num_hidden_layers"], model["num_attention_heads"]) == shape
        assert model["attention_mask_style"] == ("full" if name.startswith("3b") else "observed_or_self")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learning_rat=1", "learning_rat: unknown key"),
        ("max_steps", "'max_steps' is not key=value"),
        ("epochs=2", "set one of them"),
        ("microbatch_size=0", "pass a number of cells, or auto"),
        ("unexpressed_padding=true", "packed leaves no padding"),
        ("packed=false unexpressed_padding=true absent_targets=0.5", "both add genes"),
        ("learning_rate=-1", "learning_rate: Input should be greater than 0"),
        ("resume_from=a init_from=b", "exclude each other"),
    ],
)
def test_errors_name_the_key(override: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_pretrain_config(RECIPE, override.split())


def test_overrides() -> None:
    config = read_pretrain_config(RECIPE, ["model.hidden_size=64", "learning_rate=1e-4", "dataset=[a, b]", "seed=3"])
    assert config.model["hidden_size"] == 64
    assert config.model["num_hidden_layers"] == 3
    assert config.learning_rate == 1e-4
    assert config.datasets == ["a", "b"]
    assert config.seed == 3
    assert read_pretrain_config(RECIPE.with_name("70m.yaml"), ["max_steps=5"]).epochs is None


def test_optimizer_is_the_originals(tmp_path: Path) -> None:
    args = training_arguments(
        read_pretrain_config(RECIPE.with_name("70m.yaml"), [f"output_dir={tmp_path}", "precision=no"]), 1000
    )
    assert args.weight_decay == pytest.approx(1e-5 / 3e-4)
    assert args.warmup_steps == 50
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.max_grad_norm) == (0.9, 0.95, 1e-8, 1.0)


def test_no_mixed_precision_overrides_the_launcher(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for precision, used in (('"no"', "no"), ("launcher", "bf16"), ("bf16", "bf16")):
        assert training_arguments(tiny(Path("unused"), tmp_path, precision=precision), 5).mixed_precision == used


def test_schedule_and_decay_groups(tmp_path: Path) -> None:
    config = tiny_config()
    trainer = fixed_trainer(
        tiny_model(config), make_batch(config), tmp_path, 100, 4, schedule="cosine", warmup_fraction=0.05,
        learning_rate=3e-4, decoupled_weight_decay=1e-5,
    )  # fmt: skip
    optimizer = trainer.create_optimizer()
    assert [group["weight_decay"] for group in optimizer.param_groups if group["params"]] == [pytest.approx(1 / 30)]
    schedule = trainer.create_scheduler(100, optimizer)
    rates = []
    for _ in range(100):
        rates.append(schedule.get_last_lr()[0] / 3e-4)
        schedule.step()
    # Composer's cosine_with_warmup: linear to step 5, then 0.1 + 0.9 (1 + cos(pi t)) / 2.
    expected = [s / 5 if s < 5 else 0.1 + 0.45 * (1 + math.cos(math.pi * (s - 5) / 95)) for s in range(100)]
    assert rates == pytest.approx(expected, abs=1e-9)


def test_a_stable_learning_rate_falls_at_the_end(tmp_path: Path) -> None:
    changes = {"schedule": "stable", "warmup_fraction": 0.1, "decay_fraction": 0.2, "min_learning_rate_fraction": 0}
    args = training_arguments(tiny(Path("unused"), tmp_path, learning_rate=1e-3, **changes), 50)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    from transformers import get_scheduler

    schedule = get_scheduler(
        args.lr_scheduler_type, optimizer, args.warmup_steps, 50, scheduler_specific_kwargs=args.lr_scheduler_kwargs
    )
    rates = []
    for _ in range(50):
        rates.append(schedule.get_last_lr()[0] / 1e-3)
        schedule.step()
    expected = [s / 5 if s < 5 else min(1.0, (50 - s) / 10) for s in range(50)]
    assert rates == pytest.approx(expected, abs=1e-9)


# Steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", GOLDEN_VARIANTS, ids=lambda variant: variant.name)
def test_the_originals_five_steps_through_trainer(variant: Any, tmp_path: Path) -> None:
    convert_original_folder(variant.checkpoint, tmp_path / "model")
    model = exact(TahoeX1ForPreTraining.from_pretrained(tmp_path / "model", attn_implementation="sdpa"), variant)
    model.config.attention_mask_style = getattr(variant, "mask_style", model.config.attention_mask_style)
    model.tahoe.embeddings.expression_encoder.dropout.p = 0.0
    recorded = loss_record(variant)["train_trace"]
    batch = variant.batch("batch_masked", targets=True)
    if "attention_mask" not in batch:
        batch["attention_mask"] = batch["input_ids"] != model.config.pad_token_id
    trainer = fixed_trainer(
        model, batch, tmp_path, len(recorded["losses"]), len(batch["input_ids"]),
        learning_rate=3e-3, decoupled_weight_decay=1e-4,
    )  # fmt: skip
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    limit = tolerance(variant).training
    assert [line["loss"] for line in lines] == pytest.approx(recorded["losses"], rel=limit)
    assert [line["grad_norm"] for line in lines] == pytest.approx(recorded["grad_norms_before_clip"], rel=limit)


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_sixteen_cells_at_once_or_four_by_four(form: str, tmp_path: Path) -> None:
    config = tiny_config(expression_encoder_dropout=0.0, attention_mask_style="observed_or_self")
    batch = make_batch(config, lengths=[5, 9, 12, 7, 3, 12, 8, 6, 10, 4, 11, 2, 9, 9, 5, 7])
    batch["labels"] = batch["labels"].masked_fill(~batch["target_mask"], -100.0)
    if form == "packed":
        batch = packed(batch)
    curves = {}
    for size in (16, 4, 3):
        trainer = fixed_trainer(tiny_model(config), batch, tmp_path / str(size), 4, size, learning_rate=1e-3)
        trainer.train()
        curves[size] = [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line]
    for size in (4, 3):
        np.testing.assert_allclose(curves[size], curves[16], rtol=2e-5)


@pytest.mark.parametrize("every_gene", [False, True])
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_parts_hold_every_cell_once(form: str, every_gene: bool) -> None:
    config = tiny_config(num_drugs=0)
    batch = make_batch(config, lengths=[5, 9, 2, 7, 3])
    labels = torch.arange(5.0 * config.vocab_size).view(5, -1).remainder(7)
    labels[:, :4] = -100
    whole = tiny_model(config)
    if form == "packed":
        batch = packed(batch)
    if every_gene:
        batch["cell_labels"] = labels
    parts = list(microbatches(batch, 2))
    assert [num_cells(part) for part in parts] == [2, 2, 1]
    targets = batch["target_mask"].sum()
    alone = gradients(whole, [batch])
    totals = {"num_items_in_batch": targets} | ({"num_cell_labels": (labels != -100).sum()} if every_gene else {})
    divided = gradients(whole, [{**part, **totals} for part in parts])
    assert largest_relative_difference(divided, alone) < 2e-5


def test_the_largest_microbatch_that_fits() -> None:
    asked: list[int] = []

    def measure(cells: int) -> float:
        asked.append(cells)
        return 100 + 10 * cells

    assert largest_microbatch(measure, limit=1000, most=64) == 64
    assert max(asked) <= 64
    assert largest_microbatch(measure, limit=300 / 0.85, most=100) == 20
    assert largest_microbatch(lambda n: 100 + 10 * n + (1000 if n > 8 else 0), limit=400, most=64) <= 8
    assert largest_microbatch(lambda n: 10 if n == 1 else math.inf, limit=100, most=8) == 1
    with pytest.raises(MemoryError, match="activation_checkpointing=true"):
        largest_microbatch(measure, limit=100, most=4)


def test_the_model_takes_the_batch_of_the_search() -> None:
    model = tiny_model(tiny_config())
    for form in (True, False):
        batch = longest_cells(16, 3, packed=form, vocab_size=model.config.vocab_size, drugs=False, cell_labels=form)
        assert num_cells(batch) == 3
        assert torch.isfinite(model(**batch).loss)


def test_finding_the_microbatch_leaves_the_run_unchanged(training_dataset: Path, tmp_path: Path) -> None:
    """Both runs take all of a step's cells in one microbatch; one finds the size, the other is given it."""
    for name, size in (("found", "auto"), ("given", 8)):
        assert pretrain(tiny(training_dataset, tmp_path / name, microbatch_size=size)) == 0
    found, given = (
        AutoModelForPreTraining.from_pretrained(tmp_path / name).state_dict() for name in ("found", "given")
    )
    assert all(torch.equal(found[name], given[name]) for name in given)


# Metrics ------------------------------------------------------------------------------------------------


def test_spearman_equals_scipys() -> None:
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 7, 200)
    cells[cells == 5] = 6
    predictions, counts = rng.normal(size=200).round(1), rng.poisson(2, 200)
    counts[cells == 3] = 4
    found, known = spearman_per_cell(torch.tensor(predictions), torch.tensor(counts), torch.tensor(cells), 7)
    for cell in range(7):
        mine = cells == cell
        if cell in (3, 5):  # one value, no target
            assert not known[cell]
            assert found[cell] == 0
        else:
            expected = spearmanr(predictions[mine].astype(np.float32), counts[mine]).statistic
            assert found[cell].item() == pytest.approx(expected, abs=1e-12)


def test_sums_do_not_depend_on_how_cells_are_divided() -> None:
    config = tiny_config()
    model, batch = tiny_model(config), make_batch(config, lengths=[5, 9, 12, 7, 3])
    counts = batch["labels"] + 0.25

    def sums(part: dict[str, Any], raw: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return batch_sums(model(**part), part, raw, (1.0, 0.0)).values

    whole = sums(batch, counts)
    rows = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(5)]
    torch.testing.assert_close(
        sum(sums(part, counts[i : i + 1]) for i, part in enumerate(rows)), whole, rtol=1e-5, atol=0
    )
    means = MetricSums(whole).means()
    assert means["loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-6)
    assert math.isnan(MetricSums.zero("cpu").means()["loss"])


def test_spikes_give_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import TrainerControl, TrainerState

    warning, state = SpikeWarning(), TrainerState()
    with caplog.at_level(logging.WARNING):
        for loss in [1.0, 1.1, 0.9, 1.0, 1.2, 2.5]:
            warning.on_log(None, state, TrainerControl(), logs={"loss": loss})  # type: ignore[arg-type]
        assert not caplog.records
        warning.on_log(None, state, TrainerControl(), logs={"loss": 4.0})  # type: ignore[arg-type]
    assert "loss at step 0 is 4" in caplog.text


def test_matrices_without_a_gradient_give_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import TrainerControl, TrainerState

    config = tiny_config()
    model, batch = tiny_model(config), make_batch(config)
    model(**batch).loss.backward()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            warning = UntrainedWarning()
            warning.on_pre_optimizer_step(None, TrainerState(), TrainerControl(), model=model)  # type: ignore[arg-type]
            if not caplog.records:
                model.tahoe.layers[1].self_attn.v_proj.weight.grad.zero_()
                warning.on_pre_optimizer_step(None, TrainerState(), TrainerControl(), model=model)  # type: ignore[arg-type]
                assert not caplog.records  # it looks at the first step alone
    assert "does not depend on 1 matrices of the layers, such as tahoe.layers.1.self_attn.v_proj.weight" in caplog.text


# A run --------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_model_that_loads(training_dataset: Path, tmp_path: Path) -> None:
    assert pretrain(tiny(training_dataset, tmp_path, baselines="true", decoupled_weight_decay=1e-5)) == 0
    model = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert isinstance(model, TahoeX1ForPreTraining)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.context_length == 32
    assert len(tokenizer) == model.config.vocab_size
    status = json.loads((tmp_path / "run_status.json").read_text())
    assert status["status"] == "finished"
    assert status["step"] == 8
    assert status["baselines"]["mean_bin"] >= 0
    assert (tmp_path / "training_curve.png").stat().st_size > 10_000
    resolved = read_pretrain_config(tmp_path / "config.resolved.yaml")
    assert (
        resolved.model_dump()
        == tiny(training_dataset, tmp_path, baselines="true", decoupled_weight_decay=1e-5).model_dump()
    )
    lines = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [2, 4, 6, 8]
    assert {"cells_per_second", "tokens_per_second", "flop_utilisation", "hours_left", "learning_rate"} <= set(
        training[0]
    )
    assert [line["step"] for line in lines if "eval_spearman" in line] == [4, 8]


def test_a_run_goes_on_from_a_checkpoint_before_its_fall(training_dataset: Path, tmp_path: Path) -> None:
    absent = {"value_encoding": "log1p", "absent_targets": 0.3, "cell_targets": "all", "eval_cells": 4}
    changes = {**absent, "schedule": "stable", "warmup_fraction": 0, "save_steps": 2, "eval_steps": 99}
    made = {
        "short": {"max_steps": 6, "decay_fraction": 1 / 3},  # falls in steps 5 and 6
        "long": {"max_steps": 8, "decay_fraction": 1 / 4},
        "gone on": {"max_steps": 8, "decay_fraction": 1 / 4, "resume_from": tmp_path / "short" / "checkpoint-4"},
    }
    for name, own in made.items():
        assert pretrain(tiny(training_dataset, tmp_path / name, **changes, **own)) == 0
    assert same_weights(tmp_path / "long", tmp_path / "gone on")
    assert AutoTokenizer.from_pretrained(tmp_path / "long").value_encoding == "log1p"
    card = render_card(tmp_path / "long" / "card.yaml")
    assert "its counts become logarithms of 1 + counts per 10,000" in card
    assert "become bins" not in card
    assert "30% of the genes in a step are ones that the cell does not express" in card
    assert "the cell embedding predicts all genes" in card


def test_the_loss_on_real_cells_falls_below_a_constant(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "examples" / "prepare_debug_cells.py"), str(tmp_path / "cells")]
    forked.run(script).check_returncode()
    changes = {"max_steps": 60, "eval_steps": 60, "save_steps": 60, "learning_rate": 3e-3, "context_length": 128}
    pretrain(tiny(tmp_path / "cells", tmp_path / "run", baselines="true", global_batch_size=16, **changes))
    status = json.loads((tmp_path / "run" / "run_status.json").read_text())
    assert status["metrics"]["eval_loss"] < 0.9 * status["baselines"]["mean_bin"]
    assert status["baselines"]["mean_bin_of_each_gene"] < status["baselines"]["mean_bin"]


def test_init_from_takes_only_the_weights_of_another_run(
    finished_run: Callable[..., Path], training_dataset: Path, tmp_path: Path
) -> None:
    second = read_pretrain_config(
        RECIPE.with_name("3b-stage2.yaml"),
        [f"{k}={v}" for k, v in TINY.items() if not k.startswith("model.")]
        + [
            f"init_from={finished_run('single')}",
            f"dataset={training_dataset}",
            f"output_dir={tmp_path / 'two'}",
            "attention=sdpa",
        ],
    )
    assert second.schedule == "constant"
    pretrain(second)
    lines = json.loads((tmp_path / "two" / "trainer_state.json").read_text())["log_history"]
    assert {line["learning_rate"] for line in lines if "learning_rate" in line} == {3e-5}
    other = {"output_dir": str(tmp_path / "three")}
    with pytest.raises(ValueError, match=r"model\.hidden_size=8: .* has 32\. With init_from only"):
        pretrain(second.model_copy(update={**other, "model": {"hidden_size": 8}}))
    with pytest.raises(ValueError, match=r"model\.hidden_sizes=32: .* has no such option\."):
        pretrain(second.model_copy(update={**other, "model": {"hidden_sizes": 32}}))
    with pytest.raises(ValueError, match=r"value_encoding=log1p: the tokenizer of .* has bins\."):
        pretrain(second.model_copy(update={**other, "value_encoding": "log1p"}))


def test_init_from_with_the_recipe_that_made_the_weights(
    finished_run: Callable[..., Path], training_dataset: Path, tmp_path: Path
) -> None:
    """A recipe that repeats the shape and the values of a checkpoint goes on from it."""
    one = finished_run("single")
    settings = tiny(training_dataset, tmp_path, init_from=str(one), value_encoding="bins", max_steps=1)
    assert {"hidden_size", "num_hidden_layers"} <= set(settings.model)
    assert pretrain(settings) == 0


def test_a_checkpoint_of_another_run_is_resumed(
    finished_run: Callable[..., Path], training_dataset: Path, tmp_path: Path
) -> None:
    one = finished_run("single")
    finished("single", tmp_path, training_dataset, resume_from=one / "checkpoint-6")
    assert same_weights(tmp_path, one)


def test_mixed_datasets(training_dataset: Path, tmp_path: Path) -> None:
    changes = {"dataset_weights": "[3, 1]", "epoch_cells": 32}
    config = read_pretrain_config(
        RECIPE,
        [f"{k}={v}" for k, v in {**TINY, **changes, "output_dir": tmp_path}.items()]
        + [f"dataset=[{training_dataset}, {training_dataset}]"],
    )
    assert pretrain(config) == 0


def test_a_step_that_processes_cannot_share(training_dataset: Path, tmp_path: Path) -> None:
    from tahoex1_hf.training.stream import training_cells

    with pytest.raises(ValueError, match="global_batch_size=8 cannot be shared evenly by 3 processes: 6 could"):
        training_cells(tiny(training_dataset, tmp_path), None, 0, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA B200", 2250),
    ],
)
def test_the_rate_is_that_of_the_cards_exact_name(name: str, tflops: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == tflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H20", "NVIDIA A1000", "NVIDIA GB200"])
def test_other_cards_are_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    with pytest.raises((AssertionError, RuntimeError)):  # there is no such card here to multiply on
        peak_flops(torch.device("cuda"), torch.bfloat16)
