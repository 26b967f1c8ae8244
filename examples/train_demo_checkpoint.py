"""Train the small checkpoint of `make demo` by masked-expression modelling on 700 real cells, without their labels.

The defaults are the recipe of the checkpoint in the repository. Training takes about ten minutes on one CPU core.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from demo_cells import load_cells, load_gene_symbols
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from tahoex1_hf import TahoeX1Config, TahoeX1ForPreTraining, TahoeX1Tokenizer

NOT_A_TARGET = -100.0  # transformers' Trainer averages the loss over the number of labels that differ from this


def build_tokenizer() -> TahoeX1Tokenizer:
    """Return a tokenizer for the genes of the cells, in the vocabulary layout of the released models."""
    tokens = ["<pad>", "<cls>", "<eoc>", *sorted(load_gene_symbols().values())]
    tokens += [f"<junk{i}>" for i in range(-len(tokens) % 64)]
    with tempfile.TemporaryDirectory() as folder:
        vocab = Path(folder) / "vocab.json"
        vocab.write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
        return TahoeX1Tokenizer(vocab, context_length=1024)


def build_model(tokenizer: TahoeX1Tokenizer, hidden_size: int, layers: int, pooling: str) -> TahoeX1ForPreTraining:
    """Return an untrained model, shaped like a released one but small."""
    config = TahoeX1Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        attention_mask_style="observed_or_self",
        cell_pooling=pooling,
        scale_targets=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    return TahoeX1ForPreTraining(config)


class Cells(Dataset):
    """Tokenized cells: dicts of `input_ids` and `expression_values`, with `<cls>` first."""

    def __init__(self, cells: list[dict[str, np.ndarray]]):
        self.cells = cells

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.cells[index]


class MaskingCollator:
    """Collator that hides the expression of a random part of each cell's genes, a different part every time.

    Args:
        tokenizer: Tokenizer of the cells.
        fractions: Shares of the genes to hide; one is chosen at random for each cell.
        max_genes: Largest number of genes of a cell, chosen at random: faster, and different in each epoch.
        absent: Number of genes that the cell does not express (value 0) to add as targets, per hidden gene.
        seed: Seed of all these choices.
    """

    def __init__(
        self, tokenizer: TahoeX1Tokenizer, fractions: tuple[float, ...], max_genes: int, absent: float, seed: int
    ):
        self.tokenizer, self.fractions, self.max_genes, self.absent = tokenizer, fractions, max_genes, absent
        self.random = np.random.default_rng(seed)
        vocab = tokenizer.get_vocab()
        self.genes = np.sort([i for token, i in vocab.items() if not token.startswith("<")])
        self.vocab_size = len(vocab)

    def __call__(self, cells: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        masked = [self.mask(cell["input_ids"], cell["expression_values"]) for cell in cells]
        length = max(len(ids) for ids, _, _ in masked)
        shape = (len(masked), length)
        ids = torch.full(shape, self.tokenizer.pad_token_id)
        values = torch.full(shape, self.tokenizer.pad_value)
        labels = torch.full(shape, NOT_A_TARGET)
        for row, (cell_ids, cell_values, targets) in enumerate(masked):
            ids[row, : len(cell_ids)] = torch.from_numpy(cell_ids)
            values[row, : len(cell_ids)] = torch.from_numpy(cell_values)
            labels[row, : len(cell_ids)][targets] = torch.from_numpy(cell_values[targets])
        return {
            "input_ids": ids,
            "expression_values": values,
            "attention_mask": (ids != self.tokenizer.pad_token_id).long(),
            "target_mask": labels != NOT_A_TARGET,
            "labels": labels,
        }

    def mask(self, ids: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens, their true values, and which of them are targets."""
        genes = 1 + self.random.permutation(len(ids) - 1)[: self.max_genes]
        num_hidden = max(1, round(float(self.random.choice(self.fractions)) * len(genes)))
        expressed = np.zeros(self.vocab_size, dtype=bool)
        expressed[ids] = True
        others = self.genes[~expressed[self.genes]]
        absent = self.random.permutation(others)[: round(self.absent * num_hidden)]
        kept = np.concatenate([[0], genes])
        targets = np.zeros(len(kept) + len(absent), dtype=bool)
        targets[1 : 1 + num_hidden] = True
        targets[len(kept) :] = True
        all_ids = np.concatenate([ids[kept], absent])
        return all_ids, np.concatenate([values[kept], np.zeros(len(absent), dtype=values.dtype)]), targets


def validation_masking(tokenizer: TahoeX1Tokenizer, absent: float) -> MaskingCollator:
    """Return the masking of the validation cells, which always hides the same half of their genes."""
    return MaskingCollator(tokenizer, (0.5,), max_genes=1024, absent=absent, seed=0)


def losses(model: TahoeX1ForPreTraining, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the two losses of one batch, in eval mode."""
    training = model.training
    model.eval()
    with torch.inference_mode():
        outputs = model(**batch)
    model.train(training)
    return {"expression": outputs.expression_loss.item(), "cell_expression": outputs.cell_expression_loss.item()}


def baseline_losses(
    training: list[dict[str, torch.Tensor]], batch: dict[str, torch.Tensor], config: TahoeX1Config
) -> dict[str, float]:
    """Return the losses of constants learnt from training batches: the mean bin, and each gene's mean bin."""
    ids = np.concatenate([masked["input_ids"][masked["target_mask"]] for masked in training])
    bins = np.concatenate([masked["labels"][masked["target_mask"]] for masked in training]).astype(np.float64)
    sums, counts = (np.bincount(ids, weights=w, minlength=config.vocab_size) for w in (bins, np.ones_like(bins)))
    gene_means = np.where(counts > 0, sums / np.maximum(counts, 1), bins.mean())
    targets = batch["target_mask"].numpy()
    wanted, genes = batch["labels"].numpy()[targets], batch["input_ids"].numpy()[targets]
    unit = 2 / (config.num_bins - 2)  # the loss is in targets scaled to [-1, 1]
    return {
        "mean_bin": float(np.mean((unit * (wanted - bins.mean())) ** 2)),
        "mean_bin_of_each_gene": float(np.mean((unit * (wanted - gene_means[genes])) ** 2)),
    }


class Validation(TrainerCallback):
    """Callback that records the losses on held-out cells every few epochs, with the same genes hidden."""

    def __init__(self, batch: dict[str, torch.Tensor], every: int):
        self.batch, self.every = batch, every
        self.history: list[dict[str, float]] = []

    def on_epoch_end(
        self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        epoch = round(state.epoch)
        if epoch % self.every == 0:
            rounded = {name: round(value, 5) for name, value in losses(model, self.batch).items()}
            self.history.append({"epoch": epoch, **rounded})
            parts = (f"{name} {value:.4g}" for name, value in self.history[-1].items())
            print("held-out cells:", ", ".join(parts), flush=True)


def tokenize(tokenizer: TahoeX1Tokenizer) -> list[dict[str, np.ndarray]]:
    """Return the cells in the form that `Cells` takes."""
    encoded = tokenizer(load_cells(), gene_symbols=load_gene_symbols())
    return [
        {"input_ids": np.array(ids), "expression_values": np.array(values, dtype=np.float32)}
        for ids, values in zip(encoded["input_ids"], encoded["expression_values"], strict=True)
    ]


def split_cells(cells: list[dict[str, np.ndarray]], num_held_out: int, seed: int) -> tuple[Cells, Cells]:
    """Return the training cells and the held-out cells."""
    order = np.random.default_rng(seed).permutation(len(cells))
    return Cells([cells[i] for i in order[num_held_out:]]), Cells([cells[i] for i in order[:num_held_out]])


def main(
    output_dir: Annotated[Path, typer.Argument(help="Folder for the model, the tokenizer and training_log.json.")],
    epochs: Annotated[int, typer.Option(help="Passes over the training cells.")] = 80,
    max_steps: Annotated[
        int, typer.Option(help="Number of steps after which to stop, whatever the epochs; -1 for no limit.")
    ] = -1,
    batch_size: Annotated[int, typer.Option(help="Cells per step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 3e-3,
    hidden_size: Annotated[int, typer.Option(help="Width of the model.")] = 64,
    layers: Annotated[int, typer.Option(help="Transformer layers.")] = 2,
    pooling: Annotated[
        str, typer.Option(help="Token that the cell embedding is read from: cls, or the mean of all.")
    ] = "cls",
    max_genes: Annotated[
        int, typer.Option(help="Largest number of genes of a cell in a training step; longer cells are sampled.")
    ] = 128,
    absent: Annotated[float, typer.Option(help="Targets that the cell does not express, per expressed one.")] = 1.0,
    held_out: Annotated[int, typer.Option(help="Number of cells to hold out for the validation loss.")] = 70,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
) -> None:
    """Train on scanpy's 700 PBMCs, and write a checkpoint that the Auto classes load."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # the matrices are small, and so the weights do not depend on the number of cores
    set_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, hidden_size, layers, pooling)
    training, validating = split_cells(tokenize(tokenizer), held_out, seed)
    validation_batch = validation_masking(tokenizer, absent)(validating.cells)
    masking = validation_masking(tokenizer, absent)
    baselines = baseline_losses([masking(training.cells) for _ in range(20)], validation_batch, model.config)
    log: dict[str, Any] = {"training_cells": len(training), "held_out_cells": held_out, "baselines": baselines}
    print(f"{len(training)} cells to train on, {held_out} held out; {model.num_parameters():,} parameters")
    print("losses of constants on the held-out cells:", baselines, flush=True)
    validation = Validation(validation_batch, every=5)
    trainer = Trainer(
        model=model,
        args=training_arguments(epochs, max_steps, batch_size, learning_rate, seed),
        train_dataset=training,
        data_collator=MaskingCollator(tokenizer, (0.25, 0.5, 0.75), max_genes, absent, seed),
        callbacks=[validation],
    )
    trainer.train()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    log |= {"final": losses(model, validation_batch), "history": validation.history}
    log |= {"steps": trainer.state.global_step, "seconds": round(time.perf_counter() - started)}
    (output_dir / "training_log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {output_dir} after {log['seconds']} s; on the held-out cells: {log['final']}")


def training_arguments(
    epochs: int, max_steps: int, batch_size: int, learning_rate: float, seed: int
) -> TrainingArguments:
    """Return the released models' optimiser and schedule, with a learning rate for a model of this size."""
    return TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is written there: no checkpoints, no reports
        num_train_epochs=epochs,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=0.05,  # a fraction of all steps
        adam_beta2=0.95,
        weight_decay=0.01,
        max_grad_norm=1.0,
        seed=seed,
        data_seed=seed,
        use_cpu=True,  # gives the same result with and without a GPU
        remove_unused_columns=False,  # the collator reads columns that Trainer would remove
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    typer.run(main)
