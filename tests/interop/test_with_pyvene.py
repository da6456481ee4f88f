"""pyvene's configs on our models, against pyvene itself: the same logits from the same config."""

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import imaginelens as il
from imaginelens.hooks.pyvene_configs import from_pyvene, to_pyvene

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its plotting libraries, at import
    pv = pytest.importorskip("pyvene")

D, HEADS = 16, 4
BASE = torch.tensor([[1, 5, 7, 9, 11, 3], [2, 4, 6, 8, 10, 12]])
SOURCE = torch.tensor([[9, 8, 7, 6, 5, 4], [3, 13, 2, 14, 1, 15]])


@cache
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=D, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def theirs(config: Any, sources: Any = None, **call: Any) -> tuple[Any, Any]:
    """What pyvene makes of the base: all its returns, and the logits with the interventions."""
    intervenable = config
    if not isinstance(config, pv.IntervenableModel):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            intervenable = pv.IntervenableModel(config, model())
    sources = None if sources is None else [{"input_ids": source} for source in sources]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = intervenable({"input_ids": BASE}, sources, **call)
    return found, found[1].logits


def ours(config: Any, sources: Any = None, **call: Any) -> tuple[Any, torch.Tensor]:
    """What our own engine makes of the same."""
    lens = il.LatentModel(model(), spec=False)
    sources = None if sources is None else [_inputs(source) for source in sources]
    with torch.no_grad(), from_pyvene(lens, config).active(sources=sources, **call) as found:
        logits, _ = lens.run_with_cache(_inputs(BASE), names_filter="resid_post")
    return found, logits


def _inputs(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@cache
def plain() -> torch.Tensor:
    with torch.no_grad():
        return model()(BASE).logits


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert float((a - plain()).abs().max()) > 1e-4


@pytest.mark.parametrize(
    "component",
    [
        "block_input", "block_output", "attention_value_output", "attention_output",
        "query_output", "key_output", "value_output", "mlp_output",
        "model.layers[1].mlp.down_proj.input", "model.layers[1].self_attn.v_proj.output",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "locations", [4, (3, 4), ([[[3], [1]]], [[[4], [2]]]), ([[[3, 0], [1, 5]]], [[[4, 2], [2, 0]]])]
)
def test_vanilla_interventions(component: str, locations: Any) -> None:
    where = {"sources->base": locations}
    units = 1 if not isinstance(locations, tuple) or isinstance(locations[0], int) else None
    n = units or len(locations[0][0][0])
    representation = {"layer": 1, "component": component, "max_number_of_units": n}
    config = pv.IntervenableConfig([representation], pv.VanillaIntervention)
    _, wanted = theirs(config, [SOURCE], unit_locations=where)
    found, logits = ours(config, [SOURCE], unit_locations=where)
    same(logits, wanted)
    assert found.landings[0].fired == 1
    assert len(found.landings[0].cells) == 2 * n


@pytest.mark.parametrize("component", ["attention_value_output", "query_output", "key_output"])
def test_interventions_in_heads(component: str) -> None:
    where = {"sources->base": ([[[[1]] * 2, [[3]] * 2]], [[[[1]] * 2, [[4]] * 2]])}
    representation = {"layer": 1, "component": f"head_{component}", "unit": "h.pos"}
    config = pv.IntervenableConfig([representation], pv.VanillaIntervention)
    _, wanted = theirs(config, [SOURCE], unit_locations=where)
    _, logits = ours(config, [SOURCE], unit_locations=where)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["AdditionIntervention", "SubtractionIntervention"])
def test_interventions_that_add(kind: str) -> None:
    where = {"sources->base": (3, 4)}
    config = pv.IntervenableConfig([{"layer": 0}], getattr(pv, kind))
    same(ours(config, [SOURCE], unit_locations=where)[1],
         theirs(config, [SOURCE], unit_locations=where)[1])  # fmt: skip


def test_zeros_constants_and_reads() -> None:
    vector = torch.linspace(-1, 1, D, dtype=torch.float64)
    for part in (
        {"intervention_type": pv.ZeroIntervention},
        {"intervention_type": pv.VanillaIntervention, "source_representation": vector},
        {"intervention_type": pv.AdditionIntervention, "source_representation": vector},
    ):
        config = pv.IntervenableConfig([{"layer": 1, "component": "mlp_output", **part}])
        where = {"base": [4]}
        same(ours(config, unit_locations=where)[1], theirs(config, unit_locations=where)[1])
    config = pv.IntervenableConfig(
        [{"layer": 0, "component": "mlp_output"}], pv.CollectIntervention
    )
    read, _ = theirs(config, unit_locations={"base": [4]})
    found, _ = ours(config, unit_locations={"base": [4]})
    (collected,) = found.collected
    torch.testing.assert_close(
        collected.reshape(2, D), read[0][1][0].reshape(2, D), rtol=0, atol=1e-12
    )


def test_several_interventions_in_one_run() -> None:
    config = pv.IntervenableConfig(
        [
            {"layer": 0, "component": "block_output", "intervention_type": pv.VanillaIntervention},
            {"layer": 1, "component": "mlp_output", "intervention_type": pv.ZeroIntervention},
            {"layer": 1, "component": "block_input", "intervention_type": pv.AdditionIntervention},
        ]
    )
    where = {
        "sources->base": (
            [[[1], [1]], None, [[0], [0]]],
            [[[2], [2]], [[4], [4]], [[5], [5]]],
        )
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        intervenable = pv.IntervenableModel(config, model())
    sources = [{"input_ids": SOURCE}, None, {"input_ids": SOURCE}]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = intervenable({"input_ids": BASE}, sources, unit_locations=where)[1].logits
    found, logits = ours(config, [SOURCE, SOURCE], unit_locations=where)
    same(logits, wanted)
    assert [landing.positions for landing in found.landings] == [
        {0: [2], 1: [2]}, {0: [4], 1: [4]}, {0: [5], 1: [5]},
    ]  # fmt: skip


@pytest.mark.parametrize("subspaces", [None, [0], [2, 0]])
@pytest.mark.parametrize("kind", ["RotatedSpaceIntervention", "LowRankRotatedSpaceIntervention"])
def test_trained_rotations_come_along(kind: str, subspaces: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    part = {"layer": 0, "subspace_partition": [[0, 1], [1, 2], [2, 3]], "low_rank_dimension": 3}
    config = pv.IntervenableConfig([part], getattr(pv, kind))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        intervenable = pv.IntervenableModel(config, model())
    for intervention in intervenable.interventions.values():
        intervention.double()
        start = torch.randn(D, intervention.rotate_layer.weight.shape[1], dtype=torch.float64)
        intervention.rotate_layer.weight = torch.linalg.qr(start)[0]  # orthogonal in float64
    where = {"sources->base": (3, 4)}
    call = {} if subspaces is None else {"subspaces": [[subspaces] * 2]}
    _, wanted = theirs(intervenable, [SOURCE], unit_locations=where, **call)
    same(ours(intervenable, [SOURCE], unit_locations=where, **call)[1], wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        intervenable.save(str(tmp_path / "saved"))
    _, read = ours(tmp_path / "saved", [SOURCE], unit_locations=where, **call)
    same(read, wanted)


def test_subspaces_of_the_state_itself() -> None:
    part = {"layer": 0, "subspace_partition": [[0, 4], [4, D]]}
    config = pv.IntervenableConfig([part], pv.VanillaIntervention)
    where, call = {"sources->base": (3, 4)}, {"subspaces": [[[1]] * 2]}
    _, wanted = theirs(config, [SOURCE], unit_locations=where, **call)
    same(ours(config, [SOURCE], unit_locations=where, **call)[1], wanted)


def test_our_edits_go_out_and_give_the_same_there() -> None:
    lens = il.LatentModel(model(), spec=False)
    vector = torch.linspace(-1, 1, D, dtype=torch.float64)
    for site, edit in (
        ("blocks.1.hook_mlp_out", il.Zero()),
        ("blocks.0.hook_resid_post", il.Constant(vector)),
        ("blocks.1.hook_resid_pre", il.Steer(vector, 2.0)),
        ("blocks.1.mlp.hook_post", il.Zero()),
    ):
        given = to_pyvene(lens, [(site, edit)])
        types = [getattr(pv, name) for name in given.pop("intervention_types")]
        config = pv.IntervenableConfig(**given, intervention_types=types)
        _, wanted = theirs(config, unit_locations={"base": [4]})
        with torch.no_grad(), lens.edit(edit, at=il.positions([4]), site=site):
            logits, _ = lens.run_with_cache(_inputs(BASE), names_filter="resid_post")
        same(logits, wanted)


def test_a_wrong_location_is_seen() -> None:
    """Fooling case: the same config one column on is another result."""
    config = pv.IntervenableConfig([{"layer": 0}], pv.VanillaIntervention)
    _, wanted = theirs(config, [SOURCE], unit_locations={"sources->base": (3, 4)})
    for other in ((4, 4), (3, 5), (4, 3)):
        _, logits = ours(config, [SOURCE], unit_locations={"sources->base": other})
        assert float((logits - wanted).abs().max()) > 1e-3
