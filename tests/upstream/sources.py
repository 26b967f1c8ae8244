"""Where the tests of transformers and PEFT are: in their source distributions, which `make test-upstream` unpacks.

transformers' distribution holds the common testers, but not the modules below its `tests` that they import. What they
import of these is made here, as far as our models need it.
"""

import importlib.metadata
import os
import sys
import types
from pathlib import Path
from typing import Any

SOURCES = Path(os.environ["TAHOEX1_UPSTREAM_SOURCES"])

# Values other than the defaults for options that all configurations share.
COMMON_OPTIONS = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "is_encoder_decoder": True,
    "architectures": ["AModel"],
    "id2label": {0: "a label"},
    "label2id": {"a label": 0},
    "problem_type": "regression",
}


def make_package(name: str, *folders: Path) -> None:
    """Make a package of the files in some folders, none for one that holds modules from `make_module` alone."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder) for folder in folders]
    sys.modules[name] = package


def make_module(name: str, **contents: Any) -> None:
    """Make a module, and the package around it."""
    make_package(name.rpartition(".")[0])
    module = types.ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module


def tests_of(project: str) -> Path:
    """Return the folder of tests of a project, in the version that is installed here."""
    return SOURCES / f"{project}-{importlib.metadata.version(project)}" / "tests"


make_package("peft_tests", tests_of("peft"))
make_package("transformers_tests", tests_of("transformers"))
(tests_of("transformers") / "__init__.py").touch()  # the tester of configurations imports it
make_module("transformers_tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
make_module("transformers_tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
make_module("transformers_tests.utils.test_configuration_utils", config_common_kwargs=COMMON_OPTIONS)
