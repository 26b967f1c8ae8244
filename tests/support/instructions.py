"""What GCC knows of the CPU, which torch.compile need not find out."""

import os
from typing import Any

import pytest


@pytest.fixture
def known_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare torch.compile the programs that show whether GCC knows instructions of the CPU: 1.5 CPU seconds.

    `TORCHINDUCTOR_VEC_ISA_OK`, which conftest.py sets for a GCC that knows them, spares the first of these alone.
    Those of AMX in float16 came with GCC 13.
    """
    from torch._inductor.cpu_vec_isa import VecAMX, VecISA

    original = VecISA.check_build

    def known(self: Any, code: str) -> bool:
        return code != VecAMX._amx_fp16_code or original(self, code)

    if os.environ.get("TORCHINDUCTOR_VEC_ISA_OK") == "1":
        monkeypatch.setattr(VecISA, "check_build", known)
