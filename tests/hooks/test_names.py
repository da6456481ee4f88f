"""Names are TransformerLens' own, and a filter that selects nothing says what there is."""

import itertools

import pytest
import tiny

import imaginelens as il
from imaginelens.hooks.names import get_act_name, match

KNOWN = [
    "hook_embed",
    *(f"blocks.{i}.{h}" for i in range(3)
      for h in ("hook_resid_pre", "attn.hook_z", "hook_resid_post")),
    "ln_final.hook_normalized",
]  # fmt: skip
IN_BLOCKS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z",
             "rot_q", "rot_k",
             "pattern", "pre", "post")  # fmt: skip


@pytest.mark.parametrize(
    ("names_filter", "wanted"),
    [
        (None, KNOWN),
        ("hook_embed", ["hook_embed"]),
        ("*", KNOWN),
        ("*.attn.*", ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z", "blocks.2.attn.hook_z"]),
        ("blocks.[02].hook_resid_post", ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]),
        (["ln_final.*", "hook_embed", "hook_*"], ["hook_embed", "ln_final.hook_normalized"]),
        (("hook_embed",), ["hook_embed"]),
        (lambda n: n.startswith("blocks.1"), [n for n in KNOWN if n.startswith("blocks.1")]),
    ],
)
def test_a_filter_selects_in_the_order_of_the_model(
    names_filter: object, wanted: list[str]
) -> None:
    assert match(KNOWN, names_filter) == wanted
    assert match(iter(KNOWN), names_filter) == wanted


def test_case_and_dots_are_taken_literally() -> None:
    for pattern in ("Hook_embed", "hookXembed", "blocks.1"):
        with pytest.raises(il.HookNameError):
            match(KNOWN, pattern)


def test_a_misspelt_name_gets_the_nearest_ones() -> None:
    with pytest.raises(il.HookNameError) as error:
        match(KNOWN, "blocks.1.hook_resid_pots")
    message = str(error.value)
    assert "no site matches 'blocks.1.hook_resid_pots'" in message
    assert "did you mean 'blocks.1.hook_resid_post'" in message
    assert "\n" not in message
    assert not message.startswith('"')  # a KeyError would show the repr
    with pytest.raises(KeyError):  # what users catch
        match(KNOWN, "blocks.1.hook_resid_pots")


def test_a_layer_out_of_range_is_told_the_range() -> None:
    with pytest.raises(
        il.HookNameError, match=r"layers are 0\.\.2; did you mean 'blocks\.\d\.hook"
    ):
        match(KNOWN, "blocks.40.hook_resid_post")
    with pytest.raises(il.HookNameError, match=r"layers are 0\.\.2; names look like 'hook_embed'"):
        match(KNOWN, "zzzzzzzz")
    with pytest.raises(il.HookNameError, match="names look like 'a'"):
        match(["a"], "zzzzzzzz")


def test_one_bad_name_in_a_list_is_an_error_although_the_others_match() -> None:
    with pytest.raises(il.HookNameError, match=r"hook_embbed.*did you mean 'hook_embed'"):
        match(KNOWN, ["ln_final.*", "hook_embbed"])
    with pytest.raises(il.HookNameError, match="empty list"):
        match(KNOWN, [])


def test_a_predicate_that_selects_nothing_is_named() -> None:
    def only_mlps(name: str) -> bool:
        return "mlp" in name

    with pytest.raises(il.HookNameError, match=f"only_mlps is true for none of the {len(KNOWN)}"):
        match(KNOWN, only_mlps)


def test_act_names_are_those_of_transformer_lens() -> None:
    from transformer_lens.utilities.components_utils import get_act_name as theirs

    pairs = [*itertools.product(IN_BLOCKS, (0, 3, 27)), ("embed", None)]
    pairs += [("blocks.2.hook_resid_post", None), ("hook_embed", None)]
    for short, layer in pairs:
        assert get_act_name(short, layer) == theirs(short, layer)


@pytest.mark.parametrize("short", ["normalized", "z3", "resid_post1", "attn", "mlp_post"])
def test_the_other_spellings_of_transformer_lens_mean_the_same(short: str) -> None:
    from transformer_lens.utilities.components_utils import get_act_name as theirs

    layer = 1 if short in ("attn", "mlp_post") else None
    assert get_act_name(short, layer) == theirs(short, layer)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "gemma3"])
def test_every_text_site_of_a_model_is_reached_by_its_short_name(name: str) -> None:
    lens = il.LatentModel(*tiny.build(name), spec=False)
    short = {get_act_name(s, i) for s in IN_BLOCKS for i in range(3)}
    rest = {"hook_latent", "hook_embed", "ln_final.hook_normalized", "unembed.hook_out"}
    found = {n for n in lens.registry if not n.startswith("vision")}
    assert found == short | rest
