# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The folder of a pretraining run, with its settings and its status."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
import yaml

from tahoex1_hf.observed_attention_tahoe_x1 import flash_serves
from tahoex1_hf.runs.status import read_status, write_status
from tahoex1_hf.training.config import PretrainConfig

logger = logging.getLogger(__name__)

RESOLVED = "config.resolved.yaml"

# Settings on which the memory of a pass depends: a size that was found with other settings may not fit.
_DECIDE_MEMORY = (
    "model",
    "init_from",
    "tokenizer",
    "drug_table",
    "context_length",
    "packed",
    "unexpressed_padding",
    "absent_targets",
    "cell_targets",
    "pad_to_multiple_of",
    "global_batch_size",
    "precision",
    "attention",
    "activation_checkpointing",
    "compile",
)


class RunFolder:
    """The folder of a pretraining run.

    Another microbatch size adds gradients up in another order, which changes the last digits of the weights. With
    `microbatch_size: auto` the size is therefore noted when it is found, and the same command on the same folder uses
    it again, however much memory there is then.

    Args:
        config: Configuration of the run.
        processes: Number of processes. A size that was found with another number is not used.

    Attributes:
        microbatch_size: Size that was given, else the size that this run found before, else None.
    """

    def __init__(self, config: PretrainConfig, processes: int):
        self.path, self.processes = Path(config.output_dir), processes
        config = config.model_copy(update={"compile": self._compile(config)})
        self.config = config = config.model_copy(update={"attention": self._attention(config)})
        self.automatic = config.microbatch_size == "auto"
        self.microbatch_size = self._found_before() if config.microbatch_size == "auto" else config.microbatch_size

    def _compile(self, config: PretrainConfig) -> bool | str:
        """Return what is compiled: where it is `auto`, what this run compiled before, else what is faster."""
        if config.compile is True and config.packed and _flash_serves(config):
            logger.warning(
                "compile=true compiles the model as a whole, which failed with masked attention on the one GPU where "
                "it was tried: compile=layers is what was verified."
            )
        if config.compile != "auto":
            return config.compile
        earlier = self._resolved().get("compile", "auto")
        if earlier != "auto":
            return bool(earlier) if isinstance(earlier, bool) else str(earlier)
        sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        serves = config.packed and config.attention in ("auto", "sdpa") and not sharded and _flash_serves(config)
        return "layers" if serves else False

    def _attention(self, config: PretrainConfig) -> str:
        """Return the implementation of attention: where it is `auto`, the one that this run had, else the fastest."""
        if config.attention != "auto":
            if config.attention == "sdpa" and _needs_all_pairs(config):
                logger.warning(
                    "compile makes attention=sdpa compute a mask of all pairs of tokens of a packed row here: "
                    "attention=auto needs none."
                )
            return config.attention
        earlier = self._resolved().get("attention", "auto")
        if earlier != "auto":
            return str(earlier)
        return "flex_attention" if _needs_all_pairs(config) else "sdpa"

    def _resolved(self) -> dict[str, Any]:
        """Return the settings with which this run was started before; empty where it was not."""
        try:
            earlier = yaml.safe_load((self.path / RESOLVED).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            return {}
        return earlier if isinstance(earlier, dict) else {}

    def _found_before(self) -> int | None:
        found, earlier = read_status(self.path).get("microbatch"), self._resolved()
        here = self.config.model_dump(mode="json")
        same = bool(earlier) and all(earlier.get(key) == here[key] for key in _DECIDE_MEMORY)
        if found is None or not same or found["processes"] != self.processes:
            return None
        size = int(found["size"])
        logger.info("microbatch_size: auto is %d, which this run has found before (%s).", size, self.path)
        return size

    def write(self, status: str, **more: Any) -> None:
        """Write all settings, and the status of the run.

        Args:
            status: See `write_status`.
            **more: Further entries of the status file.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        config = self.config
        if self.automatic and self.microbatch_size is not None:
            config = config.model_copy(update={"microbatch_size": self.microbatch_size})
            more = {**more, "microbatch": {"size": self.microbatch_size, "processes": self.processes}}
        config.write(self.path / RESOLVED)
        write_status(self.path, status, **more)

    def note_microbatch(self, size: int) -> None:
        """Keep the size that the run has found, for when it is resumed."""
        self.microbatch_size = size
        self.write("running")
        logger.info(
            "microbatch_size: auto has become %d. Pass microbatch_size=%d to repeat this run elsewhere bit for bit.",
            size,
            size,
        )


def _needs_all_pairs(config: PretrainConfig) -> bool:
    """Return whether `sdpa` tells the cells of a packed row apart by a mask of all pairs of its tokens.

    It does in a compiled graph, which has no loop over the cells, unless flash attention takes them all at once.
    """
    return bool(config.compile) and config.packed and not _flash_serves(config)


def computed_in(config: PretrainConfig) -> torch.dtype:
    """Return the type in which a run computes. With fp8, what is no product of weights is computed in bfloat16."""
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    precision = launcher if config.precision == "launcher" else config.precision
    return {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def _flash_serves(config: PretrainConfig) -> bool:
    """Return whether torch's own flash attention computes this run's packed rows, in this machine's precision."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = computed_in(config)
    return dtype != torch.float32 and flash_serves(device, dtype, 64)
