"""The processes that share a study, as `accelerate launch` or `torchrun` starts them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module

import torch

from imaginelens.hooks.errors import InputError

_PATIENCE = timedelta(days=14)  # how long the first to finish waits for the last


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is; chunk i of a map belongs to process i % count.

    Attributes:
        device: the one that this process was given; None where it may choose.
        wait: returns when all processes have come to the same place.
        close: leaves the others, at the end.

    >>> Processes().owns(3)
    True
    """

    index: int = 0
    count: int = 1
    device: str | None = None
    wait: Callable[[], object] = lambda: None
    close: Callable[[], object] = lambda: None

    @property
    def first(self) -> bool:
        """Whether this is the process that begins, merges and tells."""
        return self.index == 0

    def owns(self, chunk: int) -> bool:
        """Whether a chunk is measured here."""
        return chunk % self.count == self.index


def launched(*, cpu: bool = False) -> Processes:
    """The processes that this one was launched with; alone, unless a launcher says otherwise.

    Args:
        cpu: they are to run on the processor, whatever else is there.

    Raises:
        InputError: there are several, and accelerate is not installed, or does not join them.
    """
    told = os.environ.get("WORLD_SIZE", "1")
    if "RANK" not in os.environ or not told.isdigit() or int(told) < 2:
        return Processes()
    try:
        accelerate = import_module("accelerate")
    except ImportError as error:
        raise InputError(
            f"this is one of {told} processes, which need accelerate to find "
            "each other: pip install accelerate; or start one process alone"
        ) from error
    state = accelerate.PartialState(
        cpu=cpu or not torch.accelerator.is_available(), timeout=_PATIENCE
    )
    if state.num_processes != int(told):
        raise InputError(
            f"this is one of {told} processes, and accelerate joins {state.num_processes} of them "
            "here; start them by torchrun, or one process alone"
        )
    return Processes(
        state.process_index, state.num_processes, str(state.device), state.wait_for_everyone,
        state.destroy_process_group,
    )  # fmt: skip
