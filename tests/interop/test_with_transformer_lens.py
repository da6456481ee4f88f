"""TransformerLens' functions, unchanged, on an organism's pictures and latents."""

import pytest
import torch

pytest.importorskip("transformer_lens")
from examples.interop import with_transformer_lens as recipe


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    return recipe.findings()


def test_its_tools_give_what_plain_torch_and_the_logits_give(found: dict[str, float]) -> None:
    assert torch.get_default_dtype() == torch.float32
    assert found["patching: largest difference from plain torch hooks"] == 0.0
    assert found["patching: answers flipped in the best cell"] == 1.0
    assert found["logit lens: its last row against the logits"] < 1e-6
    # the norm computes in float32, so that its scale is known to that
    assert found["direct attribution: all terms against the logits"] < 1e-5


def test_on_a_bridge_the_same_call_finds_nothing(found: dict[str, float]) -> None:
    assert found["patching on a bridge: largest effect, as it sees no picture"] == 0.0


def test_its_alignment_finds_the_answer_only_where_latents_carry_it(
    found: dict[str, float],
) -> None:
    assert found["latent-content: held-out answers moved by its DAS"] > 0.5
    assert found["latent-content: the same by its placebo"] < 0.2
    assert found["latent-ignored: held-out answers moved by its DAS"] < 0.1
    assert found["latent-ignored: AUC of its sparse probe"] > 0.5  # decodes, and is not used
