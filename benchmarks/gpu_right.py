"""First piece of the GPU check: what comes out is right, in every precision, beside float64 and the golden data."""

import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForPreTraining

from benchmarks.gpu_measuring import Check, RandomCells, cell_lengths, relative_error, stand_in_tokenizer
from tahoex1_hf import TahoeX1Config, TahoeX1ForPreTraining, TahoeX1Model
from tahoex1_hf.inference.encoder import CellEncoder
from tahoex1_hf.original.convert import convert_original_folder
from tahoex1_hf.training.pretraining import compile_layers

TESTS = Path(__file__).resolve().parents[1] / "tests"
# Largest errors, relative to the norm, of two layers and their gradients: a few roundings to each type's digits.
LIMITS = {"float32": 2e-4, "bfloat16 autocast": 5e-2, "bfloat16 weights": 5e-2, "float16 autocast": 1e-2}
COMPILED = "bfloat16 autocast, compiled layers"  # as the recipes train
GOLDEN = {"float32": 1e-4, "bfloat16 autocast": 0.5}  # absolute, on values up to thirteen
OUTPUTS = {
    "cell_emb": "pooler_output",
    "expr_preds": "expression_predictions",
    "mvc_output": "cell_expression_predictions",
}


def check(run: Check) -> None:
    """Check everything."""
    torch.backends.cuda.matmul.allow_tf32 = False
    golden(run)
    for style in ("observed_or_self", "full"):
        for heads in (4,) if run.tiny else (8, 4):
            for lengths in ([70, 33, 9], [20] * 3) if run.tiny else ([700, 333, 257, 64, 12], [512] * 3):
                if run.has_time(f"{style} {heads} heads {lengths}"):
                    training(run, style, heads, lengths)
    embeddings(run)


def golden(run: Check) -> None:
    """Compare with the recordings of the original, in their bounds for float32."""
    sys.path[:0] = [str(TESTS / "support"), str(TESTS)]
    from helpers import GOLDEN_VARIANTS, without_labels  # type: ignore[import-not-found]

    for variant in GOLDEN_VARIANTS:
        with run.attempt(f"golden {variant.name}"), tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "converted"
            convert_original_folder(variant.checkpoint, place)
            model = AutoModelForPreTraining.from_pretrained(place).eval().to(run.device)
            for precision, limit in GOLDEN.items():
                worst = 0.0
                for kind, name in {"nomlm": "collate_bin", "masked": "batch_masked"}.items():
                    recorded = variant.recorded(f"out_{kind}")
                    batch = without_labels(variant.batch(name, targets=kind == "masked"))
                    batch = {key: tensor.to(run.device) for key, tensor in batch.items()}
                    with torch.no_grad(), _precision(run, precision):
                        ours = model(**batch)
                    everywhere = model.config.cell_pooling == "mean_with_padding"
                    valid = (batch["input_ids"] != model.config.pad_token_id).cpu().numpy() | everywhere
                    for theirs, mine in OUTPUTS.items():
                        difference = np.abs(ours[mine].float().cpu().numpy() - recorded[theirs])
                        worst = max(worst, float(difference[valid if difference.shape == valid.shape else ...].max()))
                run.row(f"golden {variant.name} {precision}", largest_difference=worst, ok=worst < limit)


def training(run: Check, style: Any, heads: int, lengths: list[int]) -> None:
    """Compare outputs and gradients of a packed row with eager attention in float64 on padded rows."""
    width, vocab_size = (64, 200) if run.tiny else (512, 2000)
    cells = RandomCells(lengths, vocab_size)
    config = TahoeX1Config(
        vocab_size=vocab_size, hidden_size=width, num_hidden_layers=2, num_attention_heads=heads,
        attention_mask_style=style, expression_encoder_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    base = TahoeX1ForPreTraining(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim == 1:  # norms and biases begin at ones and zeros, which would hide them
                parameter += 0.1 * torch.randn_like(parameter)
    exact = copy.deepcopy(base).double()
    exact.set_attn_implementation("eager")
    batch = cells.padded()
    expected = _outputs(exact, exact(**batch), batch["attention_mask"])
    for precision, limit in (LIMITS | ({COMPILED: 5e-2} if heads == 8 and run.on_gpu else {})).items():
        if run.tiny and precision.startswith("float16"):
            continue  # not on every CPU
        kind = "equal" if len(set(lengths)) == 1 else "ragged"
        name = f"train {style}, heads of {width // heads}, {kind} lengths, {precision}"
        with run.attempt(name):
            model = copy.deepcopy(base).to(run.device)
            model = model.bfloat16() if precision == "bfloat16 weights" else model
            if precision == COMPILED:
                compile_layers(model)
            with _precision(run, precision):
                found = _outputs(model, model(**cells.packed(run.device)), None)
            errors = {part: relative_error(found[part], value) for part, value in expected.items()}
            run.row(name, **errors, ok=max(errors.values()) < limit * (2 if run.tiny else 1))


def _outputs(model: TahoeX1ForPreTraining, outputs: Any, valid: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return what is compared, with the gradients of all but the keys' biases, to which softmax is blind."""
    outputs.loss.backward()
    predictions = outputs.expression_predictions
    gradients = [
        p.grad.flatten() for n, p in model.named_parameters() if p.grad is not None and "k_proj.bias" not in n
    ]
    return {
        "pooled": outputs.pooler_output,
        "predictions": predictions[0] if valid is None else predictions[valid],
        "gradients": torch.cat(gradients),
    }


def embeddings(run: Check) -> None:
    """Compare embeddings in bfloat16, as `tahoex1 embed` makes them, with float32 on the same device."""
    shape: dict[str, Any] = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = TahoeX1Config(**shape if run.tiny else {})
    with run.device:
        model = TahoeX1Model(config).eval()
    for kind, lengths in {
        "equal": [20 if run.tiny else 1024] * 16,
        "ragged": cell_lengths(64, 20, 5, 40) if run.tiny else cell_lengths(64, 900, 64, 2048),
    }.items():
        with run.attempt(f"embed {kind}"):
            cells, tokens = RandomCells(lengths, config.vocab_size).encoded(), stand_in_tokenizer(config.vocab_size)
            exact, ours = (
                CellEncoder(model, tokens, device=run.device, dtype=dtype).embed(cells).astype(np.float64)
                for dtype in ("float32", "bfloat16")
            )
            cosine = float((exact * ours).sum(1).min())
            run.row(f"embed {kind} lengths, bfloat16 beside float32", smallest_cosine=cosine, ok=cosine > 0.9999)


def _precision(run: Check, name: str) -> torch.autocast:
    dtype = torch.float16 if name.startswith("float16") else torch.bfloat16
    return torch.autocast(run.device.type, dtype=dtype, enabled="autocast" in name)
