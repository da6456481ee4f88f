"""Before any test imports anything: no network, no installing, one thread."""

import importlib
import os

import pytest

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    # transformer_lens runs `pip install torchvision` in-process, which would replace torch
    "PIP_NO_INDEX": "1",
    "UV_OFFLINE": "1",
    # sums in one order, so that equal means equal; tiny models are no slower for it
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

# Before imaginelens: what a module under the shape checks is first to import is compiled anew, each
# time, because jaxtyping gives all files that are read meanwhile another cache name.
importlib.import_module("nnsight")
importlib.import_module("transformers.modeling_utils")
importlib.import_module("transformers.processing_utils")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
