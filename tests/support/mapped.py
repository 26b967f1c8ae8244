"""Find the weights of a model that are views of a file mapped into memory."""

from pathlib import Path

import pytest
from transformers import PreTrainedModel

_MAPS = Path("/proc/self/maps")


def names_in_memory(model: PreTrainedModel, path: Path) -> set[str]:
    """Return the names of the parameters that do not lie in the mapping of a file."""
    if not _MAPS.exists():
        pytest.skip("this system does not list what is mapped into memory")
    lines = [line.split() for line in _MAPS.read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if line[-1] == str(path.resolve())]
    return {
        name
        for name, parameter in model.named_parameters()
        if not any(int(start, 16) <= parameter.data_ptr() < int(end, 16) for start, end in spans)
    }
