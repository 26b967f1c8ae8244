"""Run a model over tokenized cells: device, precision, and batches of cells of similar length."""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize
from transformers.utils.generic import is_flash_attention_requested

from tahoex1_hf.common.cuda_memory import arriving, let_segments_grow, sent
from tahoex1_hf.common.dtypes import dtype_name
from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch
from tahoex1_hf.inference.compiled_attention import compiled_attention
from tahoex1_hf.inference.kept_layers import KeptLayers, ReadyLayer, can_attend_compiled
from tahoex1_hf.inference.prepared_layers import packs_weights, round_layers
from tahoex1_hf.inference.quantization import quantised_by, with_int8_weights
from tahoex1_hf.inference.ragged import can_run_ragged, ragged_forward
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1Model, TahoeX1PreTrainedModel
from tahoex1_hf.padding_tahoe_x1 import EncodedCells
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.getLogger(__name__)

DtypeName = Literal["auto", "float32", "bfloat16", "int8"]
Dtype = DtypeName | torch.dtype

TokenSink = Callable[[np.ndarray, torch.Tensor, torch.Tensor], object]
"""What is called with each batch's row numbers, `(tokens,)` token ids, and `(tokens, width)` contextual embeddings."""

# Tokens per batch, padding included: enough to fill the device, small enough for its memory at every released size.
_DEFAULT_BATCH_TOKENS = {"cuda": 65536, "cpu": 8192}
# With packed weights on a CPU, whose products take so little that reading what left the cache shows.
_PACKED_BATCH_TOKENS = 4096


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """Return the device asked for, or the fastest there is: CUDA, then Apple's GPU, then the CPU.

    Raises:
        ValueError: If PyTorch does not know the device or has none of its kind here.
    """
    let_segments_grow()
    if device is not None:
        return _check_device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _check_device(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device={device!r} is not one that PyTorch knows: pass cuda, mps or cpu. ({error})"
        ) from None
    way_out = "pass cpu, or leave the device out for the fastest there is."
    if chosen.type == "cuda" and not torch.cuda.is_available():
        build = (
            "this PyTorch was built without CUDA" if torch.version.cuda is None else "no CUDA GPU or driver was found"
        )
        raise ValueError(f"device={str(device)!r} cannot be used, {build}: {way_out}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={str(device)!r} is not there, only {torch.cuda.device_count()} CUDA GPUs are: {way_out}"
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={str(device)!r} cannot be used, there is no Apple GPU here: {way_out}")
    return chosen


def choose_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Return the precision asked for; `auto` is bfloat16 where the hardware multiplies it faster, else float32.

    With `int8` the weights have eight bits, and the returned precision is used for everything else.
    """
    dtype = cast(DtypeName, dtype_name(dtype, get_args(DtypeName)))
    if dtype in ("float32", "bfloat16"):
        return getattr(torch, dtype)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        # Without these instructions bfloat16 is emulated, hundreds of times slower than float32. Where they are there,
        # but ATEN_CPU_CAPABILITY asks torch to do without AVX-512, its attention in bfloat16 ends with an error.
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        withheld = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2")
        has_bfloat16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        fast = device.type == "cpu" and has_bfloat16 and not withheld
    return torch.bfloat16 if fast else torch.float32


def length_sorted_batches(lengths: np.ndarray, batch_tokens: int, padded: bool = True) -> Iterator[np.ndarray]:
    """Group cells of similar length, the longest first, so that little is padded.

    Args:
        lengths: `(cells,)` tokens per cell.
        batch_tokens: Most tokens of a batch; a longer cell makes its own batch.
        padded: Whether to count the padding too.

    Yields:
        Row numbers of the cells of one batch.
    """
    order = np.argsort(-lengths, kind="stable")
    upto = np.cumsum(lengths[order])
    start = 0
    while start < len(order):
        if padded:  # the first cell is the longest, and sets the padded length
            size = batch_tokens // max(1, int(lengths[order[start]]))
        else:
            size = int(np.searchsorted(upto, (upto[start - 1] if start else 0) + batch_tokens, side="right")) - start
        yield order[start : start + max(1, size)]
        start += max(1, size)


class GeneMeans:
    """Running means of contextual gene embeddings over cells, by token: memory is genes x width whatever the cells."""

    def __init__(self, token_ids: np.ndarray, vocab_size: int, width: int, device: torch.device):
        self.token_ids = np.unique(token_ids[token_ids >= 0])
        slots = torch.full((vocab_size,), -1, dtype=torch.long)
        slots[torch.from_numpy(self.token_ids)] = torch.arange(len(self.token_ids))
        self._slots = slots.to(device)
        # In float64 the sums do not depend on the order of the cells; Apple's GPU has none.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(len(self.token_ids), width, dtype=dtype, device=device)
        self._counts = torch.zeros(len(self.token_ids), dtype=torch.long, device=device)

    def add(self, input_ids: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Add a batch: `(batch, length)` tokens and their `(batch, length, width)` embeddings; others are left out."""
        slots = self._slots[input_ids.flatten()]
        known = slots >= 0
        slots = slots[known]
        self._sums.index_add_(0, slots, hidden_states.flatten(0, 1)[known].to(self._sums.dtype))
        self._counts.index_add_(0, slots, torch.ones_like(slots))

    def state(self) -> dict[str, np.ndarray]:
        """Return the sums and counts, to which later batches can be added."""
        return {"sums": self._sums.cpu().numpy(), "counts": self._counts.cpu().numpy()}

    def add_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Add the sums and counts that `state` returned."""
        self._sums += torch.from_numpy(state["sums"]).to(self._sums)
        self._counts += torch.from_numpy(state["counts"]).to(self._counts)

    def means(self, token_ids: np.ndarray) -> np.ndarray:
        """Return `(genes, width)` float32 means; NaN where a gene is unknown (-1) or expressed in no cell."""
        means = (self._sums / self._counts.unsqueeze(1)).float().cpu().numpy()  # 0 / 0 is NaN
        slots = self._slots.cpu().numpy()[token_ids]
        return np.where(((token_ids >= 0) & (slots >= 0))[:, None], means[slots], np.float32(np.nan))


def layer_number(config: TahoeX1Config, hidden_layer: int | None) -> int:
    """Return the number of a layer from 0, what enters the first layer, to that of the last; None is the last.

    Raises:
        ValueError: For a layer that the model does not have.
    """
    last = config.num_hidden_layers
    if hidden_layer is None:
        return last
    if not -last - 1 <= hidden_layer <= last:
        raise ValueError(
            f"hidden_layer={hidden_layer} is not there, the model has {last} layers: pass 0, what enters the first "
            f"layer, to {last}, or {-last - 1} to -1, counted from the last."
        )
    return hidden_layer % (last + 1)


def cut_after(model: TahoeX1Model, layer: int) -> TahoeX1Model:
    """Return a model that ends after a layer, without the final norm, and shares the weights of `model`."""
    cut = copy.copy(model)
    cut._modules = dict(model._modules)  # a plain copy would be given the layers of both
    cut.layers = nn.ModuleList(list(model.layers)[:layer])
    cut.norm = nn.Identity()
    return cut


class CellEncoder:
    """A model made ready to embed tokenized cells.

    Args:
        model: Any Tahoe-x1 model; its decoders, if any, are not run. It is moved to the device and set to eval mode.
        tokenizer: Tokenizer of the cells, which decides the values in the padding.
        batch_tokens: Most tokens of a batch; by default suited to the device. It decides how many rows a product of
            matrices has, and so which kernel computes it and in which order sums are rounded: between two settings
            embeddings of length 1 differ by up to 1e-6 in float32, and by 1e-2 in bfloat16, whose numbers have two
            or three digits.
        device: Device to compute on; by default the fastest there is.
        dtype: Precision of the matrix products, by name or as torch's dtype. Weights stay in the precision they were
            loaded in, which is the highest; bfloat16 multiplies those of float32 under autocast, and int8 quantises
            the layers of a copy.
        hidden_layer: Number of the layer whose output is taken, as in the model's `hidden_states`: 0 is what enters
            the first layer, -1 the last layer's output after the final norm, the default. Outputs of other layers
            are taken as they are, without the final norm.
        sole_user: Whether nothing else uses the model. On a GPU, in bfloat16, its layers are then rounded before they
            are moved, and not copied there: less memory, the same results.
        compile_attention: Whether attention may be compiled where that serves, on some CPUs (see
            `inference/compiled_attention.py`). It changes last digits.

    Attributes:
        hidden_layer: Number of the layer whose output is taken, from 0 to the number of layers.
        attention: What attends: `"compiled"`, or the model's `attn_implementation`.
    """

    def __init__(
        self,
        model: TahoeX1PreTrainedModel,
        tokenizer: TahoeX1Tokenizer,
        *,
        batch_tokens: int | None = None,
        device: str | torch.device | None = None,
        dtype: Dtype = "auto",
        hidden_layer: int | None = None,
        sole_user: bool = False,
        compile_attention: bool = True,
    ):
        if batch_tokens is not None and batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}.")
        if len(tokenizer) != model.config.vocab_size:
            raise ValueError(
                f"The tokenizer's vocabulary has {len(tokenizer)} tokens, the model's {model.config.vocab_size}: they "
                "belong to different checkpoints. Load both from the same place."
            )
        if model.config.cell_pooling == "mean_with_padding":
            logger.warning(
                'cell_pooling="mean_with_padding" makes an embedding depend on the cells it shares a batch with, as '
                'in the original; set model.config.cell_pooling = "mean" for embeddings that do not.'
            )
        self.device = choose_device(device)
        dtype = cast(DtypeName, dtype_name(dtype, get_args(DtypeName)))
        self.dtype = choose_dtype(dtype, self.device)
        self.config: TahoeX1Config = model.config
        self.dtype_name = str(self.dtype).removeprefix("torch.")
        if sole_user and self.device.type == "cuda" and self.dtype != torch.float32 and dtype != "int8":
            round_layers(cast(TahoeX1Model, model.base_model), self.dtype)
        self.model = cast(TahoeX1Model, model.base_model.to(self.device).eval())
        if self.dtype == torch.float32 and self.model.dtype in (torch.bfloat16, torch.float16):
            if dtype != "auto":
                logger.warning("dtype=%s, but the model was loaded in %s, which is used.", dtype, self.model.dtype)
            self.dtype = self.model.dtype
            self.dtype_name = str(self.dtype).removeprefix("torch.")
        self.hidden_layer = layer_number(self.config, hidden_layer)
        if self.is_cut:
            self.model = cut_after(self.model, self.hidden_layer)
        if not self.hidden_layer and self.config.cell_pooling == "cls":
            logger.warning(
                "hidden_layer=%s gives every cell the same embedding: <cls>, whose embedding is the cell's "
                '(cell_pooling="cls"), has seen no gene before the first layer.',
                hidden_layer,
            )
        if dtype == "int8":
            self.model = with_int8_weights(self.model)
            self.dtype_name = f"int8 weights, {self.dtype_name}"
        elif self.dtype != torch.float32 and quantised_by(self.model) == "torch":
            self.dtype, self.dtype_name = torch.float32, "int8 weights, float32"  # its layers take no other type
        self.tokenizer = tokenizer
        serves = compile_attention and self._prepares and can_run_ragged(self.model, self.device)
        on_cpu = self.device.type == "cpu"
        compiled = compiled_attention(self.dtype) if serves and on_cpu and can_attend_compiled(self.model) else None
        self.attention = str(self.config._attn_implementation) if compiled is None else "compiled"
        self._kept_layers = KeptLayers(self.model, self.dtype, compiled)
        usual = _PACKED_BATCH_TOKENS if self._packs else _DEFAULT_BATCH_TOKENS.get(self.device.type, 16384)
        self.batch_tokens = batch_tokens or usual

    def go_on_as(self, begun: Mapping[str, Any] | None) -> None:
        """Attend as a run that has begun: by torch, where its record does not say otherwise; None for no such run."""
        if begun is not None and not begun.get("compiled_attention"):
            self.attention = str(self.config._attn_implementation)
            self._kept_layers = KeptLayers(self.model, self.dtype)

    @property
    def is_cut(self) -> bool:
        """Whether the output of another layer than the last is taken."""
        return self.hidden_layer < self.config.num_hidden_layers

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        return self.config.hidden_size

    def gene_means(self, genes: GeneMatch) -> GeneMeans:
        """Make running means for the genes of a matrix."""
        return GeneMeans(genes.token_ids, self.config.vocab_size, self.width, self.device)

    def precision(self) -> AbstractContextManager[Any]:
        """Return the autocast for the chosen precision."""
        if self.dtype == torch.float32 or self.model.dtype == self.dtype:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def embed(
        self,
        cells: EncodedCells,
        gene_means: GeneMeans | None = None,
        on_batch: Callable[[int], object] = lambda num_cells: None,
        on_tokens: TokenSink | None = None,
    ) -> np.ndarray:
        """Embed cells; their order, and which share a batch, change nothing but last digits (see `batch_tokens`).

        Args:
            cells: Tokenized cells.
            gene_means: Running means to which the cells' gene embeddings are added.
            on_batch: Function called after each batch with its number of cells.
            on_tokens: Function that is given every cell's contextual embeddings, batch by batch.

        Returns:
            `(cells, width)` float32, each row of length 1.
        """
        return self.begin(cells, gene_means, on_batch, on_tokens)()

    @torch.inference_mode()
    def begin(
        self,
        cells: EncodedCells,
        gene_means: GeneMeans | None,
        on_batch: Callable[[int], object],
        on_tokens: TokenSink | None,
    ) -> Callable[[], np.ndarray]:
        """Begin to embed cells, and return a function that waits for the result; arguments and result are `embed`'s.

        On a GPU, the last batch may still be computed when this returns, so that other cells can be begun.
        """
        embeddings = np.empty((cells.num_cells, self.width), dtype=np.float32)
        waiting: list[tuple[np.ndarray, Callable[[], torch.Tensor]]] = []

        def receive() -> None:
            for rows, arrived in waiting:
                embeddings[rows] = arrived().numpy()
                on_batch(len(rows))
            waiting.clear()

        with self.precision():  # around all batches, so that weights are cast once
            for rows, pooled in self.pooled_batches(cells, gene_means, on_tokens):
                receive()  # those of the batch before, while a GPU computes this one
                waiting.append((rows, arriving(normalize(pooled.float(), dim=1))))
                if self.device.type != "cuda":
                    receive()

        def finish() -> np.ndarray:
            receive()
            return embeddings

        return finish

    @torch.inference_mode()
    def pooled_batches(
        self, cells: EncodedCells, gene_means: GeneMeans | None = None, on_tokens: TokenSink | None = None
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Run the model over cells, in batches of similar length.

        Args:
            cells: Tokenized cells.
            gene_means: Running means to which the cells' gene embeddings are added.
            on_tokens: Function that is given every cell's contextual embeddings, batch by batch.

        Yields:
            Row numbers of the cells of a batch, and their `(batch, width)` embeddings, not normalised.
        """
        ragged = can_run_ragged(self.model, self.device)
        step = partial(self._embed_ragged, prepared=self._prepared()) if ragged else self._embed_padded
        all_tokens = gene_means is not None or on_tokens is not None
        for rows in length_sorted_batches(cells.lengths, self.batch_tokens, padded=not ragged):
            with self.precision():
                pooled, input_ids, hidden_states = step(cells, rows, all_tokens)
            if hidden_states is not None and gene_means is not None:
                gene_means.add(input_ids.unsqueeze(0), hidden_states.unsqueeze(0))
            if hidden_states is not None and on_tokens is not None:
                on_tokens(rows, input_ids, hidden_states)
            yield rows, pooled

    @property
    def _packs(self) -> bool:
        return self.device.type == "cpu" and packs_weights(self.dtype)

    @property
    def _prepares(self) -> bool:
        """Whether layers are made ready: where that gains, for the attention of torch or a compiled one."""
        if is_flash_attention_requested(self.config):
            return False
        if self.device.type == "cpu":
            return self._packs or self.dtype == torch.float32
        return self.device.type == "cuda" and self.dtype != torch.float32

    def _prepared(self) -> Sequence[ReadyLayer] | None:
        """Return the layers made ready for many batches; None where the model's own are to be run."""
        return self._kept_layers.current() if self._prepares else None

    def _embed_padded(
        self, cells: EncodedCells, rows: np.ndarray, all_tokens: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        batch = cells.padded(rows, pad_token_id=self.tokenizer.pad_token_id, pad_value=self.tokenizer.pad_value)
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        outputs = self.model(**batch)
        if not all_tokens:
            return outputs.pooler_output, batch["input_ids"], None
        valid = batch["attention_mask"].bool()
        return outputs.pooler_output, batch["input_ids"][valid], outputs.last_hidden_state[valid]

    def _embed_ragged(
        self,
        cells: EncodedCells,
        rows: np.ndarray,
        all_tokens: bool,
        prepared: Sequence[ReadyLayer] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        lengths = cells.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        index = np.repeat(cells.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        input_ids = sent(torch.from_numpy(cells.input_ids[index]), self.device)
        drug_ids = None if cells.drug_ids is None else sent(torch.from_numpy(cells.drug_ids[rows]), self.device)
        pooled, hidden_states = ragged_forward(
            self.model,
            input_ids,
            torch.from_numpy(cells.expression_values[index]),
            offsets,
            drug_ids,
            all_tokens=all_tokens,
            prepared=prepared,
        )
        return pooled, input_ids, hidden_states
