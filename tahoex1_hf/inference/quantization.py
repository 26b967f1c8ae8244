"""Int8 weights for inference, by torchao."""

import copy
import warnings

import torch
from torch import nn

from tahoex1_hf.modeling_tahoe_x1 import TahoeX1Model

_QUANTISED = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")


def quantised_by(model: nn.Module) -> str | None:
    """Return the library that quantised layers of a model: "torchao", "bitsandbytes" or "torch"; None for none."""
    for layer in model.modules():
        if type(getattr(layer, "weight", None)).__module__.startswith("torchao."):
            return "torchao"
        library = type(layer).__module__
        if library.startswith(("bitsandbytes.", "torch.ao.")):
            return library.partition(".")[0]
    return None


def with_int8_weights(model: TahoeX1Model) -> TahoeX1Model:
    """Copy a model so that its layers multiply with int8 weights, one scale per output; the rest is shared with it.

    The weights of the layers take a quarter of their memory. On CPUs they are turned back into floats batch by batch,
    which costs some speed (see benchmarks/).

    Raises:
        ValueError: If torchao is not installed, and for a model whose layers are quantised already.
    """
    library = quantised_by(model)
    if library is not None:
        raise ValueError(f"dtype='int8', but {library} has quantised this model's layers already: leave dtype out.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError("dtype='int8' needs torchao: pip install 'tahoex1_hf[int8]'.") from error
    shared: dict[int, object] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    quantised: TahoeX1Model = copy.deepcopy(model, shared)

    def is_layer(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name.rpartition(".")[2] in _QUANTISED

    with torch.no_grad():
        quantize_(quantised.layers, Int8WeightOnlyConfig(), filter_fn=is_layer)
    return quantised
