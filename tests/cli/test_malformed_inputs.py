"""A fixed handful of the malformed inputs that `tests/support/fuzzing.py` makes by the thousand.

None may end in a traceback, and each that is refused is named.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzing import KINDS, Fuzzer

CASES = 2  # of each kind
# Those whose code the others run, too; the program has them all.
LEFT_OUT = {"h5ad by gene", "h5ad dense", "h5ad, prepare", "zarr", "10x h5, prepare", "10x mtx", "mds plain"}


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    made = Fuzzer(tmp_path_factory.mktemp("malformed"))
    yield made
    made.close()


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - LEFT_OUT))
def test_malformed_inputs_end_in_a_sentence_that_names_them(fuzzer: Fuzzer, kind: str, tmp_path: Path) -> None:
    whole = fuzzer.run_whole(kind)
    assert whole.exit_code == 0 or kind == "loom", whole.output
    for seed in range(CASES):
        case = fuzzer.run(kind, seed)
        assert case.outcome in ("named", "accepted"), (seed, case.change, case.said)
