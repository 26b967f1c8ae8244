"""transformers' own Trainer, as its users call it: save, load, predict, metrics, resume, accumulation."""

import json
import logging
import sys
import textwrap
from pathlib import Path

import datasets
import forked
import numpy as np
import pytest
import torch
from helpers import SHAPES, tiny_config, tiny_model
from tiny_tokenizer import GENES, write_tokenizer
from transformers import (
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from tahoex1_hf import TahoeX1ForPreTraining, TahoeX1ForSequenceClassification


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tokenizer(folder)
    torch.manual_seed(0)
    TahoeX1ForPreTraining(tiny_config(vocab_size=43)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cells(checkpoint) -> datasets.Dataset:
    """Return twelve tokenized cells with a class each, and columns that are not for the model."""
    random = np.random.default_rng(0)
    sizes = [4 + 2 * number for number in range(12)]
    rows = [
        (random.choice(GENES, size, replace=False).tolist(), random.integers(1, 9, size).tolist()) for size in sizes
    ]
    encoded = AutoTokenizer.from_pretrained(checkpoint)(rows)
    more = {"labels": [number % 3 for number in range(12)], "donor": ["a", "b"] * 6}
    return datasets.Dataset.from_dict({**encoded, **more})


def arguments(folder: Path, **changes) -> TrainingArguments:
    usual = {"max_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 1}
    usual |= {"per_device_train_batch_size": 4, "push_to_hub": False, "learning_rate": 1e-2, "logging_steps": 1}
    return TrainingArguments(str(folder), **(usual | changes))


def accuracy(prediction) -> dict[str, float]:
    assert prediction.predictions.shape == (12, 3)
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def classifier(checkpoint, **options):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3, **options)


@pytest.mark.parametrize("collator", [DataCollatorWithPadding, None])
def test_what_trainer_saves_is_loaded_again(checkpoint, cells, tmp_path, caplog, collator) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.eos_token = "<drug>"  # so that it has ids that the configuration lacks
    trainer = Trainer(
        classifier(checkpoint),
        arguments(tmp_path / "run"),
        train_dataset=cells,
        eval_dataset=cells,
        processing_class=tokenizer,
        data_collator=collator and collator(tokenizer, pad_to_multiple_of=8),
        compute_metrics=accuracy,
    )
    trainer.train()
    prediction = trainer.predict(cells)
    assert prediction.label_ids.tolist() == cells["labels"]
    assert set(trainer.evaluate()) >= {"eval_loss", "eval_accuracy"}
    trainer.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["eos_token_id"] == 2
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
        AutoModel.from_pretrained(tmp_path / "saved")
    assert not caplog.records
    batch = tokenizer.pad(cells.remove_columns(["labels", "donor"])[:], return_tensors="pt").to("cpu")
    with torch.no_grad():
        np.testing.assert_allclose(loaded(**batch).logits, prediction.predictions, atol=1e-5)
    again = Trainer(loaded, arguments(tmp_path / "run2"), train_dataset=cells, processing_class=tokenizer)
    again.train()
    again.save_model(str(tmp_path / "again"))
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").config.num_labels == 3


def test_it_resumes_from_its_own_checkpoint(checkpoint, cells, tmp_path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def run(folder: str, **changes) -> Trainer:
        settings = arguments(
            tmp_path / folder, **{"max_steps": 4, "save_strategy": "steps", "save_steps": 2} | changes
        )
        model = classifier(checkpoint)
        return Trainer(model, settings, train_dataset=cells, eval_dataset=cells, processing_class=tokenizer)

    whole = run("whole")
    whole.train()
    resumed = run("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, atol=1e-6, rtol=0)
    best = run("best", load_best_model_at_end=True, eval_strategy="steps", eval_steps=2)
    best.train()
    assert best.state.best_model_checkpoint is not None


@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        ("single_label_classification", [number % 3 for number in range(12)]),
        ("regression", [[number / 3.0] * 3 for number in range(12)]),
        ("multi_label_classification", [[1.0, 0.0, float(number % 2)] for number in range(12)]),
    ],
)
def test_accumulated_microbatches_are_one_batch(checkpoint, cells, tmp_path, problem, labels) -> None:
    data = cells.remove_columns(["labels"]).add_column("labels", labels)
    norms = {}
    for size, steps in ((12, 1), (3, 4)):
        model = classifier(checkpoint, problem_type=problem)
        settings = arguments(
            tmp_path / str(size), max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=steps
        )
        model.config.expression_encoder_dropout = 0.0
        model.tahoe.embeddings.expression_encoder.dropout.p = 0.0
        trainer = Trainer(
            model, settings, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(checkpoint)
        )
        trainer.train()
        norms[size] = next(log for log in trainer.state.log_history if "grad_norm" in log)
    assert norms[3]["grad_norm"] == pytest.approx(norms[12]["grad_norm"], rel=1e-3)
    assert norms[3]["loss"] == pytest.approx(norms[12]["loss"], rel=1e-3)


def test_names_of_labels_and_token_labels(checkpoint, cells, tmp_path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    genes = cells.map(lambda cell: {"labels": [-100, *(token % 2 for token in cell["input_ids"][1:])]})
    model = AutoModelForTokenClassification.from_pretrained(checkpoint, num_labels=2)
    trainer = Trainer(
        model,
        arguments(tmp_path, label_names=["labels"]),
        train_dataset=genes,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.predict(genes).predictions.shape == (12, 27, 2)


def test_pretraining_with_labels_beside_the_targets(checkpoint, cells, tmp_path) -> None:
    from tahoex1_hf.data.collator import CellCollator  # our own collator, in transformers' Trainer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    random = np.random.default_rng(1)
    rows = [{"genes": sorted(random.choice(range(3, 43), 9, replace=False).tolist()), "counts": [3.0] * 9}] * 8
    model = AutoModelForPreTraining.from_pretrained(checkpoint)
    trainer = Trainer(
        model,
        arguments(tmp_path, remove_unused_columns=False),
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=CellCollator(tokenizer, mlm_probability=0.5),
        processing_class=tokenizer,
    )
    assert np.isfinite(trainer.train().training_loss)


# Several processes -----------------------------------------------------------------------------------------

CHECKPOINTED = """
    import os, sys
    import torch
    from transformers import Trainer, TrainingArguments
    from helpers import SHAPES, make_batch, tiny_config, tiny_model
    from tahoex1_hf import TahoeX1ForSequenceClassification

    config = tiny_config(**SHAPES["drugs"], num_labels=3, expression_encoder_dropout=0.0)
    model = tiny_model(config, TahoeX1ForSequenceClassification)
    batch = make_batch(config, lengths=(9, 14, 6, 12, 5, 11, 8, 7), targets=False)
    cells = [{**{name: value[row] for name, value in batch.items()}, "labels": row % 3} for row in range(8)]
    arguments = TrainingArguments(
        sys.argv[1] + ".run", per_device_train_batch_size=int(sys.argv[2]), gradient_checkpointing=True, use_cpu=True,
        ddp_backend="gloo", optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_steps=4, seed=1,
        report_to=[], disable_tqdm=True, save_strategy="no", remove_unused_columns=False,
    )
    trainer = Trainer(model, arguments, train_dataset=cells)
    trainer.train()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    assert not trainer.model_wrapped.find_unused_parameters
    if arguments.process_index == 0:
        torch.save(model.state_dict(), sys.argv[1])
    os._exit(0)  # at once: taking gloo's group down may wait for a thread that waits for the interpreter
"""


def test_checkpointing_under_ddp_trains_what_one_process_trains(tmp_path: Path) -> None:
    """A head on cells leaves the embedding of targets unused, which DDP would otherwise wait for."""
    command = [sys.executable, "-c", textwrap.dedent(CHECKPOINTED)]
    for processes, size in ((1, 4), (2, 2)):  # four cells a step
        place = tmp_path / f"{processes}.pt"
        done = forked.launch(processes, [*command, place, size], forked.environment())
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{processes}.pt") for processes in (1, 2))
    begun = tiny_model(
        tiny_config(**SHAPES["drugs"], num_labels=3, expression_encoder_dropout=0.0), TahoeX1ForSequenceClassification
    ).state_dict()
    moved = [name for name in begun if not torch.equal(begun[name], one[name])]
    assert "tahoe.layers.0.mlp.up_proj.weight" in moved
    assert "tahoe.embeddings.flag_embedding.weight" not in moved
    for name, tensor in one.items():
        # Sums of four cells' gradients in another order: roundings of float32, over four steps of 0.1.
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=1e-5)
