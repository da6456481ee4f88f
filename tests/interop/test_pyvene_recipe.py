"""The recipe for pyvene's configs, without pyvene: known answers, and what goes out."""

import warnings

import pytest
import torch

from examples.interop import with_pyvene


def test_the_config_at_a_latent_gives_the_donors_answer_or_none() -> None:
    content, proof = with_pyvene.swapped("latent-content", n=8)
    ignored, _ = with_pyvene.swapped("latent-ignored", n=8)
    assert (content, ignored) == (1.0, 0.0)
    assert proof.startswith("8 cells in 8 rows")


def test_edits_go_out_in_pyvenes_words() -> None:
    config = with_pyvene.sent_out()
    zero, steer = config["representations"]
    assert zero == {"layer": 0, "component": "mlp_output", "unit": "pos"}
    assert torch.equal(steer["source_representation"], torch.full((64,), 0.5))
    assert config["intervention_types"] == ["ZeroIntervention", "AdditionIntervention"]


def test_where_pyvene_runs_the_logits_are_the_same() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its plotting libraries, at import
        pytest.importorskip("pyvene")
    difference, change = with_pyvene.against_pyvene()
    assert difference < 1e-12
    assert change > 0.1
