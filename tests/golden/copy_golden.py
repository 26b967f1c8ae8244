"""Make the contents of this folder from the complete recordings of the original program.

    python tests/golden/copy_golden.py [SOURCE] [DESTINATION]

SOURCE is the folder of the complete recordings (by default `../shared/golden` beside the repository), DESTINATION this
one. Running it twice gives the same bytes. README.md says what the files hold.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
REPO_ROOT = HERE.parents[1]

# variant: (folder of the checkpoint, mode of the recordings)
VARIANTS = {
    "a_70m_like": ("70m_flash-model", "flash"),
    "b_3b_like_chem": ("3b_flash-model", "flash"),
    "c_glu_post_gqa_avgpool": ("1b_flash-model", "flash"),
    "d_attn_mask": ("70m-model", "torch_mask_fixed"),
}
CHECKPOINT = ["collator_config.yml", "model.safetensors", "model_config.yml", "vocab.json"]
EVERY_VARIANT = [
    "batch_masked.npz",
    "collate_bin.npz",
    "collate_bin_right.npz",
    "collate_log.npz",
    "collate_raw.npz",
    "collate_truncate.npz",
    "examples.npz",
]
MORE = {
    "a_70m_like": ["adata.h5ad", "emb_flash.npz"],
    "b_3b_like_chem": [
        "adata.h5ad",
        "collate_bin_nochem.npz",
        "emb_flash.npz",
        "emb_flash_nochem.npz",
        "examples_drugs.json",
    ],
}
DRUG_FILES = ["drug_fps_pad.npy", "drug_to_id_pad.json"]

COLUMN_STEP = 8  # every eighth column of contextual embeddings is kept
INTERMEDIATE_CELLS = (1, 4)  # two of the six cells
GRADIENT_POSITIONS = 256  # at most, per parameter


def gradient_positions(size: int) -> np.ndarray:
    """Return the flat positions at which the gradient of a parameter of this many values is kept."""
    return np.linspace(0, size - 1, min(size, GRADIENT_POSITIONS)).astype(np.int64)


def reduce_outputs(source: Path, destination: Path) -> None:
    arrays = dict(np.load(source))
    arrays["gene_emb"] = arrays["gene_emb"][..., ::COLUMN_STEP]
    np.savez_compressed(destination, **arrays)


def reduce_intermediates(source: Path, destination: Path) -> None:
    cells = np.array(INTERMEDIATE_CELLS)
    arrays = {name: array[cells][..., ::COLUMN_STEP] for name, array in np.load(source).items()}
    np.savez_compressed(destination, cells=cells, **arrays)


def reduce_gradients(source: Path, destination: Path) -> None:
    gradients = load_file(source)
    kept = {name: gradients[name].ravel()[gradient_positions(gradients[name].size)] for name in sorted(gradients)}
    np.savez_compressed(destination, **kept)


def copy_variant(source: Path, destination: Path, model: str, mode: str, more: list[str]) -> None:
    (destination / "model").mkdir(parents=True, exist_ok=True)
    for name in CHECKPOINT:
        shutil.copyfile(source / model / name, destination / "model" / name)
    for name in DRUG_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, destination / "model" / name)
    for name in EVERY_VARIANT + more:
        shutil.copyfile(source / name, destination / name)
    for kind in ("nomlm", "masked", "log"):
        reduce_outputs(source / f"out_{kind}_{mode}.npz", destination / f"out_{kind}_{mode}.npz")
    reduce_intermediates(source / f"inter_masked_{mode}.npz", destination / f"inter_masked_{mode}.npz")
    reduce_gradients(source / f"grads_masked_{mode}.safetensors", destination / f"grads_masked_{mode}.npz")
    loss = json.loads((source / f"loss_masked_{mode}.json").read_text())
    (destination / f"loss_masked_{mode}.json").write_text(json.dumps(loss, separators=(",", ":")) + "\n")


def main(source: Path, destination: Path) -> None:
    for variant, (model, mode) in VARIANTS.items():
        copy_variant(source / variant, destination / variant, model, mode, MORE.get(variant, []))
    (destination / "binning").mkdir(exist_ok=True)
    for name in ("binning.npz", "errors.json"):
        shutil.copyfile(source / "binning" / name, destination / "binning" / name)


if __name__ == "__main__":
    arguments = [Path(argument) for argument in sys.argv[1:]]
    main(*arguments, *[REPO_ROOT.parent / "shared" / "golden", HERE][len(arguments) :])
