"""What a module hands on may be one of several things: which tensor of it a site shows."""

from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

from imaginelens.hooks.engine import first_tensor, with_first

A, B, NEW = torch.zeros(2), torch.ones(3), torch.full((2,), 7.0)


@pytest.mark.parametrize(
    "value",
    [
        A,
        (A, B),
        [A, B],
        BaseModelOutput(last_hidden_state=A, hidden_states=(B,)),
        BaseModelOutputWithPooling(last_hidden_state=B, pooler_output=A),
        BaseModelOutputWithPooling(last_hidden_state=A, pooler_output=None),
        BaseModelOutputWithPooling(last_hidden_state=B, pooler_output=[A, B]),
    ],
)
def test_another_tensor_takes_the_place_of_the_one_that_is_shown(value: Any) -> None:
    assert first_tensor(value) is A
    changed = with_first(value, NEW)
    assert type(changed) is type(value)
    assert first_tensor(changed) is NEW
    assert first_tensor(value) is A  # what the model handed on is left alone
    if not isinstance(value, torch.Tensor):
        assert any(part is B for part in _flat(changed)) == any(part is B for part in _flat(value))


def _flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if hasattr(value, "values") else value
    return [tensor for part in parts if part is not None for tensor in _flat(part)]
