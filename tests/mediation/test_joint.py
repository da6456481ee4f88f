"""Several edits at once: they compose, and what they did is told of each row."""

import numpy as np
import planted
import pytest
import torch

import imaginelens as il
from imaginelens.mediation.behind_prefix import FLAGS
from imaginelens.mediation.ends import Ends, ends_of
from imaginelens.mediation.joint import part, together


def ends(kind: str, context: str, **words: object) -> tuple[planted.Planted, Ends]:
    p = planted.planted(kind)
    return p, ends_of(
        p.lens, p.pairs, metric=il.logit_diff, direction="denoise", context=context, **words
    )


@pytest.mark.parametrize("context", ["free", "fixed"])
def test_edits_of_several_steps_act_together(context: str) -> None:
    p, e = ends("chain", context)
    steps = [part(il.Swap(e.donor), il.latent[t], ("hook_latent",)) for t in (0, 2)]
    joint = together(p.lens, e.run, e.before, steps, context=context)
    wanted = p.edited([0, 2], context=context)
    assert np.allclose(e.value(joint.after), wanted, rtol=0, atol=1e-12)
    assert not joint.flags.any()
    assert (joint.change[1:] > 0).all()
    assert p.lens.registry.entries == []


@pytest.mark.parametrize("context", ["free", "fixed"])
def test_edits_at_modules_and_latents_act_together(context: str) -> None:
    """The number that block 0 reads, and all latents: the source's world."""
    at = ("blocks.0.attn.hook_v", planted.NUMBER)
    p, e = ends("bilinear", context, states=[at])
    parts = [part(il.Swap(e.donor), at[1], at[:1])]
    parts.append(part(il.Swap(e.donor), il.latent, ("hook_latent",)))
    joint = together(p.lens, e.run, e.before, parts, context=context)
    assert np.allclose(e.value(joint.after), p.truth["y11"], rtol=0, atol=1e-12)


def test_a_row_is_flagged_where_no_edit_changed_it() -> None:
    p, e = ends("chain", "fixed")
    own = il.Swap(e.run)
    absent = part(il.Zero(), il.latent[7], ("hook_latent",))
    same = part(own, il.latent[0], ("hook_latent",))
    new = part(il.Swap(e.donor), il.latent[1], ("hook_latent",))
    for parts, flag in (
        ([absent], FLAGS["not_emitted"]),
        ([absent, same], FLAGS["identical_donor"]),
        ([absent, same, new], 0),
    ):
        joint = together(p.lens, e.run, e.before, parts, context="fixed")
        assert joint.flags.tolist() == [flag] * 4
        unchanged = torch.equal(joint.after.logits, e.before.logits)
        assert unchanged == (flag != 0)


def test_an_edit_of_the_users_own_is_judged_as_ever() -> None:
    p, e = ends("chain", "fixed")
    one = part(il.Swap(e.donor), il.latent[1], ("hook_latent",))
    with (
        p.lens.edit(il.Zero(), at=il.latent[7]),
        pytest.raises(il.EditTouchedNothing, match="touched no position"),
    ):
        together(p.lens, e.run, e.before, [one], context="fixed")


def test_donors_hold_no_graph() -> None:
    at = ("blocks.0.hook_resid_post", il.latent)
    _, e = ends("chain", "fixed", states=[at])
    assert not e.donor.cache[at[0]].requires_grad
