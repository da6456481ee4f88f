"""pyvene's configs without pyvene: every form they come in, plain torch as oracle, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import imaginelens as il
from imaginelens.hooks import pyvene_places
from imaginelens.hooks.pyvene_configs import COMPONENTS, FIELDS, from_pyvene, to_pyvene

SITES = {
    "block_input": "blocks.1.hook_resid_pre",
    "block_output": "blocks.1.hook_resid_post",
    "attention_output": "blocks.1.hook_attn_out",
    "attention_value_output": "blocks.1.attn.hook_z",
    "query_output": "blocks.1.attn.hook_q",
    "key_output": "blocks.1.attn.hook_k",
    "value_output": "blocks.1.attn.hook_v",
    "mlp_output": "blocks.1.hook_mlp_out",
}
LENS = il.LatentModel(*tiny.fresh("qwen2_5_vl"), spec=False)


def prompt(seed: int, text: str = "red?") -> dict[str, Any]:
    return {
        "images": tiny.image(40, 24, seed=seed),
        "text": tiny.prompt("qwen2_5_vl", text),
    }


@pytest.mark.parametrize("component", list(COMPONENTS))
def test_components_are_sites_both_ways(component: str) -> None:
    (part,) = from_pyvene(LENS, {"layer": 1, "component": component})
    assert (part.site, part.kind) == (SITES[component], "VanillaIntervention")
    config = to_pyvene(LENS, [(part.site, il.Zero())])
    assert config["representations"] == [{"layer": 1, "component": component, "unit": "pos"}]
    assert from_pyvene(LENS, config)[0].site == part.site


@pytest.mark.parametrize(
    "site", ["blocks.1.mlp.hook_post", "hook_embed", "vision_projector.hook_out"]
)
def test_other_sites_go_by_the_path_of_their_module(site: str) -> None:
    config = to_pyvene(LENS, [(site, il.Zero())])
    component = config["representations"][0]["component"]
    assert component.endswith((".input", ".output"))
    assert from_pyvene(LENS, config)[0].site == site


def test_every_form_of_a_config_is_read(tmp_path: Path) -> None:
    named = {"layer": 1, "component": "mlp_output"}
    listed = [1, "mlp_output", "pos", 1, *[None] * (len(FIELDS) - 4)]
    saved = {
        "representations": [listed],
        "intervention_types": ["<class 'pyvene.models.interventions.ZeroIntervention'>"],
        "intervention_dimensions": [64],
        "mode": "parallel",
        "sorted_keys": ["layer_1_comp_mlp_output_unit_pos_nunit_1#0"],
    }
    (tmp_path / "config.json").write_text(json.dumps(saved))

    class ZeroIntervention:
        pass

    for config in (
        {"representations": [named], "intervention_types": "ZeroIntervention"},
        {"representations": named, "intervention_types": ["pyvene.ZeroIntervention"]},
        {"representations": [{**named, "intervention_type": ZeroIntervention}]},
        {"representations": [{**named, "intervention": ZeroIntervention()}]},
        [{**named, "intervention_type": "ZeroIntervention"}],
        saved,
        tmp_path,
        str(tmp_path),
    ):
        (part,) = from_pyvene(LENS, config)
        assert (part.site, part.kind) == ("blocks.1.hook_mlp_out", "ZeroIntervention")
        assert part.width is None
        assert part.edit() == il.Zero()


def test_a_swap_between_other_columns_equals_plain_torch_with_the_picture() -> None:
    """What pyvene cannot run: a Qwen2.5-VL, its picture included."""
    site = "blocks.1.hook_resid_post"
    base, source = prompt(0), prompt(1, "blue?")
    with torch.no_grad():
        plain, _ = LENS.run_with_cache(base, names_filter=site)
        _, cache = LENS.run_with_cache(source, names_filter=site)

        def put(act: torch.Tensor, hook: Any) -> torch.Tensor:
            new = act.clone()
            new[0, 5], new[0, 3] = cache[site][0, 2], cache[site][0, 7]
            return new

        wanted = LENS.run_with_hooks(base, fwd_hooks=[(site, put)])
        swap = from_pyvene(LENS, {"layer": 1, "max_number_of_units": 2})
        where = {"sources->base": ([[[2, 7]]], [[[5, 3]]])}
        with swap.active(where, sources=[source]) as found:
            logits, _ = LENS.run_with_cache(base, names_filter=site)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-12)
    assert float((logits - plain).abs().max()) > 1e-4
    assert found.landings[0].positions == {0: [3, 5]}


def test_a_config_acts_at_latents_and_the_answer_follows() -> None:
    """Known answer: the last latent of the content organism decides; fooled by the ignored one."""
    for name, moves in (("latent-content", True), ("latent-ignored", False)):
        lens = il.load(name)
        task = lens.task(n=4, seed=0)
        last = f"blocks.{len(lens.structure.blocks) - 1}.hook_resid_post"
        config = to_pyvene(lens, [(last, il.Swap(torch.zeros(1, 1, 64)))])
        swap = from_pyvene(lens, config)
        base, source = lens.run(task.base), lens.run(task.source)
        where = {"sources->base": il.latent[0]}  # the state there becomes the last latent
        with swap.active(where, sources=[source]) as found:
            changed = lens.run(task.base)
        assert found.landings[0].rows == [0, 1, 2, 3]
        answers = task.source_answers if moves else base.answers
        assert list(changed.answers) == list(answers)


def test_states_that_are_collected_are_the_caches() -> None:
    inputs = [prompt(0), prompt(1, "which colour?")]
    config = {"layer": 1, "component": "attention_value_output"}
    reading = from_pyvene(LENS, {"representations": config,
                                 "intervention_types": "CollectIntervention"})  # fmt: skip
    with torch.no_grad():
        _, cache = LENS.run_with_cache(inputs, names_filter="blocks.1.attn.hook_z")
        with reading.active({"base": [[[4, 9], [6, 8]]]}) as found:
            LENS.run_with_cache(inputs, names_filter="hook_embed")
    z = cache["blocks.1.attn.hook_z"].flatten(2)
    assert torch.equal(found.collected[0], torch.stack([z[0, [4, 9]], z[1, [6, 8]]]))
    with pytest.raises(il.InputError, match=r"edits nothing; read found\.collected"):
        reading[0].edit()


@pytest.mark.parametrize(
    ("representation", "kind", "message"),
    [
        ({"component": "mlp_input"}, None, "'mlp_input' has no site: it lies behind a norm"),
        ({"component": "attention_input"}, None, "edit hook_resid_pre, or q, k and v, instead"),
        ({"component": "mlp_activation"}, None, "where the MLP is gated it is no state of its own"),
        ({"component": "block_middle"}, None, "is no site of Qwen2_5_VL.*; components are block"),
        ({"component": "model.nowhere[0].output"}, None, r"is no site of .* or a module's path"),
        ({"layer": 3}, None, "layer is 3, and the layers are 0 to 2"),
        ({"layer": "1"}, None, "layer is '1', and the layers are"),
        ({"unit": "t"}, None, "the unit 't' of component 'block_output' has no counterpart"),
        ({"component": "head_query_output"}, None, r"unit 'pos' of component 'head_query_output'"),
        ({"group_key": 0}, None, "group_key has no counterpart"),
        ({"moe_key": 1}, None, "moe_key has no counterpart"),
        ({"site": 1}, None, "has 'site', which is not among layer, component"),
        ({}, "NoiseIntervention", "NoiseIntervention has no counterpart; those that have are"),
        ({}, "BoundlessRotatedSpaceIntervention", "has no counterpart; those that have are Vani"),
        (
            {"max_number_of_units": 2},
            "RotatedSpaceIntervention",
            "over several units, or in heads, rotates them joined",
        ),
        ({"hidden_source_representation": True}, None, "is a constant, and does not hold it"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_refused_in_a_sentence(
    representation: dict[str, Any], kind: str | None, message: str
) -> None:
    config = {"representations": [representation], "intervention_types": kind}
    with pytest.raises(il.InputError, match=message):
        from_pyvene(LENS, config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"representations": [{}], "mode": "serial"}, "mode is 'serial': sources that are edited"),
        ({"representations": []}, "has no representations"),
        ({"representations": [{}, {}], "intervention_types": ["X"]}, "1 intervention types were"),
        ("nowhere", "holds no config.json; pass a folder"),
        (3, "a representation is 3, expected a dict"),
    ],
)
def test_a_config_that_is_none_is_refused(config: Any, message: str) -> None:
    with pytest.raises(il.InputError, match=message):
        from_pyvene(LENS, config)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({}, r"expected {'sources->base': ...} or {'base': ...}"),
        ({"base": 1, "sources->base": 1}, "expected {'sources->base'"),
        ({"base": [[[1]], [[1]]]}, "for 1 interventions; give columns"),
        ({"base": [[[1, 1]]]}, "the columns of each example, each once"),
        ({"base": [[[-1]]]}, "counted from 0"),
        ({"base": -1}, "counted from 0"),
        ({"base": "end"}, "for 1 interventions; give columns"),
        ({"sources->base": ([[[1, 2]]], [[[1]]])}, "other numbers of columns in sources and base"),
    ],
)
def test_locations_that_do_not_fit_are_refused(where: Any, message: str) -> None:
    parts = from_pyvene(LENS, {"layer": 1}).parts
    with pytest.raises(il.InputError, match=message):
        pyvene_places.places_of(where, parts)


def test_sources_and_subspaces_that_do_not_fit_are_refused() -> None:
    base, swap = prompt(0), from_pyvene(LENS, {"layer": 1})
    for call, message in (
        ({"unit_locations": {"base": 4}}, "takes states of a source; pass sources="),
        ({"unit_locations": {"base": 4}, "sources": [base] * 2}, "2 sources were given for 1"),
        (
            {"unit_locations": {"sources->base": (900, 4)}, "sources": [base]},
            "column 900 of a source that has",
        ),
        (
            {"unit_locations": {"base": 4}, "sources": [base], "subspaces": [[[0]], [[0]]]},
            "subspaces are for 2 interventions, and there are 1",
        ),
        (
            {"unit_locations": {"base": 4}, "sources": [base], "subspaces": [[[0], [1]]]},
            "subspaces differ between examples",
        ),
    ):
        with pytest.raises(il.InputError, match=message), swap.active(**call):
            pass
    parts = from_pyvene(LENS, {"layer": 1, "subspace_partition": [[0, 4]]})
    with (
        pytest.raises(il.InputError, match="names subspace 1 of VanillaIntervention"),
        parts.active({"base": 4}, sources=[base], subspaces=1),
    ):
        pass
    with (
        pytest.raises(il.InputError, match="name dimension 64 of states of width 64"),
        swap.active({"base": 4}, sources=[prompt(1)], subspaces=[64]),
    ):
        LENS.run_with_cache(base, names_filter="hook_embed")
    rotated = {"representations": [{"layer": 1}], "intervention_types": "RotatedSpaceIntervention"}
    with (
        pytest.raises(il.InputError, match="has no rotation yet; pass the trained"),
        from_pyvene(LENS, rotated).active({"base": 4}, sources=[base]),
    ):
        pass


@pytest.mark.parametrize(
    ("site", "edit", "message"),
    [
        ("hook_latent", il.Zero(), "'hook_latent' has no counterpart in pyvene, which acts at"),
        ("blocks.1.attn.hook_pattern", il.Zero(), "hook_pattern' has no counterpart in pyvene"),
        ("blocks.1.hook_resid_mid", il.Zero(), "hook_resid_mid' has no counterpart in pyvene"),
        ("blocks.1.hook_resid_post", il.Noise(), "Noise at .* has no counterpart in pyvene; il"),
        ("blocks.1.hook_resid_post", il.Constant(), "Constant at .* has no counterpart"),
    ],
)  # fmt: skip
def test_what_pyvene_does_not_have_is_refused(site: str, edit: il.Edit, message: str) -> None:
    with pytest.raises(il.InputError, match=message):
        to_pyvene(LENS, [(site, edit)])


@pytest.mark.parametrize(
    "content",
    ["", "[" * 100_000, "[]", '{"sorted_keys": 3}', '{"sorted_keys": ["/../../x"]}'],
)
def test_a_saved_config_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(il.InputError, match=r"is no config that IntervenableModel\.save wrote"):
        from_pyvene(LENS, tmp_path)


def test_weights_that_could_run_code_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"sorted_keys": ["a"]}))
    torch.save({"a": Path}, tmp_path / "intkey_a.bin")
    with pytest.raises(il.InputError, match="a pickle of anything else could run code"):
        from_pyvene(LENS, tmp_path)
    torch.save([1], tmp_path / "intkey_a.bin")
    with pytest.raises(il.InputError, match="holds a list, not tensors by name"):
        from_pyvene(LENS, tmp_path)
