"""Path effects are products of planted weights, sum to the total, and are 0.0 where no path is."""

import numpy as np
import planted
import pytest
import tiny
import torch
from planted import CLOSE, NUMBER, Planted

import imaginelens as il
from imaginelens.hooks.entries import CaptureEntry
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.ends import ends_of
from imaginelens.mediation.path_patch import _End, _Path, path_patch

ALPHA, BETA = 0.6, -1.7
WRITES = ("blocks.0.hook_attn_out", il.before_answer)
BEHIND = (
    ("blocks.0.hook_mlp_out", il.before_answer),
    ("blocks.1.hook_attn_out", il.before_answer),
    ("blocks.1.hook_mlp_out", il.before_answer),
    ("ln_final.hook_normalized", il.before_answer),
)


def effect(p: Planted, senders: list, receivers: list, **words: object) -> EffectMap:
    return path_patch(p.lens, p.pairs, senders=senders, receivers=receivers, **words)


def close(found: EffectMap, wanted: np.ndarray) -> bool:
    assert not found.sham.any()
    return np.allclose(found.effect[0], wanted, rtol=0, atol=1e-12)


def with_a_relay() -> Planted:
    """y = 0.7 x + 1.3 z - 1 + BETA u, where the first MLP makes u = ALPHA x for the second."""
    p = planted.planted("linear")
    model = p.lens.model
    at, (first, second) = model.registers, (layer.mlp for layer in model.model.layers)
    u = at.size - 1
    old_first, old_second = first.fn, second.fn

    def relay(h: torch.Tensor) -> torch.Tensor:
        blank = h.new_zeros(*h.shape[:-1], u - at["next"].stop)
        return torch.cat([old_first(h), blank, ALPHA * h[..., at["x_read"]]], -1)

    first.fn, first.to_register = relay, slice(at["next"].start, at.size)
    second.fn = lambda h: old_second(h) + BETA * h[..., at["is_close"]] * h[..., u : u + 1]
    return p


def test_effects_are_products_of_weights_and_sum_to_the_total() -> None:
    p = with_a_relay()
    change = (p.x1 - p.x0)[:, 0]
    by_path = [effect(p, [WRITES], [receiver]) for receiver in BEHIND]
    for found, weight in zip(by_path, (ALPHA * BETA, 0.0, 0.7, 0.0), strict=True):
        assert close(found, weight * change)
    whole = effect(p, [WRITES], list(BEHIND))
    assert close(whole, (ALPHA * BETA + 0.7) * change)
    patched = p.lens.patch(
        base=p.pairs.base, source=p.pairs.source, site=WRITES[0], at=CLOSE, context="fixed",
        base_answers=p.pairs.base_answers, source_answers=p.pairs.source_answers,
    )  # fmt: skip
    assert close(whole, patched.effect.numpy())
    assert close(whole, sum(found.effect[0] for found in by_path))


def test_receivers_tell_each_other() -> None:
    """Both MLPs receive: what the first makes of x, the second hears."""
    p = with_a_relay()
    change = (p.x1 - p.x0)[:, 0]
    assert close(effect(p, [WRITES], [BEHIND[0], BEHIND[2]]), (ALPHA * BETA + 0.7) * change)
    heard_by_none = effect(p, [WRITES], [BEHIND[0], ("blocks.1.attn.hook_q", CLOSE)])
    assert close(heard_by_none, ALPHA * BETA * change)


def test_paths_that_do_not_exist_have_exactly_no_effect() -> None:
    p = planted.planted("chain")
    for senders, receivers in (
        ([("hook_latent", il.latent)], [("blocks.0.hook_mlp_out", il.latent)]),  # nobody reads it
        ([("hook_latent", il.latent)], [("blocks.1.hook_mlp_out", CLOSE)]),  # by attention alone
        ([("hook_embed", NUMBER)], [("blocks.1.hook_resid_mid", CLOSE)]),
        ([("blocks.1.hook_attn_out", CLOSE)], [("blocks.0.hook_resid_post", CLOSE)]),  # backwards
    ):
        found = effect(p, senders, receivers)
        assert not found.effect.any(), found.cells[0]
        assert np.abs(found.total).min() > 0.1


def test_a_masked_model_has_no_path_from_its_latents() -> None:
    p = planted.planted("masked")
    found = effect(p, [("hook_latent", il.latent)], [("blocks.1.attn.hook_v", il.latent)])
    assert not found.effect.any()
    assert (found.change > 0).all()  # the receivers are told, and nobody looks


def test_latents_are_read_as_values() -> None:
    p = planted.planted("chain")
    sender, receiver = ("hook_latent", il.latent), ("blocks.1.attn.hook_v", il.latent)
    assert close(effect(p, [sender], [receiver]), p.truth["pnie"])
    assert close(effect(p, [sender], [receiver], direction="noise"), -p.truth["tnie"])
    steps = [effect(p, [(sender[0], il.latent[t])], [receiver]) for t in range(3)]
    for t, found in enumerate(steps):
        assert close(found, p.truth["single_fixed_denoise"][:, t])
    fewer = effect(p, [sender], [(receiver[0], il.latent[1])], batch_size=3)
    assert close(fewer, p.truth["single_fixed_denoise"][:, 1])


def test_the_input_is_told_through_its_own_reader() -> None:
    """x reaches the answer's token by the values of block 0; the latents keep theirs: Y(x1, Z0)."""
    p = planted.planted("bilinear")
    found = effect(p, [("hook_embed", NUMBER)], [("blocks.0.attn.hook_v", NUMBER)])
    assert close(found, p.truth["pnde"])
    there = effect(p, [("blocks.0.attn.hook_v", NUMBER)], [("blocks.0.hook_attn_out", CLOSE)])
    assert close(there, p.truth["pnde"])


def test_single_heads_send_and_receive() -> None:
    p = planted.planted("chain")
    for t in range(3):
        of_step = p.truth["single_fixed_denoise"][:, t]
        said = effect(
            p, [("blocks.1.attn.hook_z", CLOSE, [1 + t])], [("blocks.1.hook_mlp_out", CLOSE)]
        )
        assert close(said, of_step)
        heard = effect(p, [("hook_latent", il.latent)], [("blocks.1.attn.hook_z", CLOSE, [1 + t])])
        assert close(heard, of_step)
    assert not effect(
        p, [("blocks.1.attn.hook_z", CLOSE, [0])], [("blocks.1.hook_attn_out", CLOSE)]
    ).effect.any()


def test_senders_of_one_sublayer_do_not_hear_earlier_senders() -> None:
    """Latents and head 1 send together: head 1's own output is the source's, the other heads stay
    as they were, so that the MLP hears of z_1 once."""
    p = planted.planted("chain")
    found = effect(
        p, [("hook_latent", il.latent), ("blocks.1.attn.hook_z", CLOSE, [1])],
        [("blocks.1.hook_mlp_out", CLOSE)],
    )  # fmt: skip
    assert close(found, p.truth["single_fixed_denoise"][:, 0])


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
def test_all_that_sublayers_write_is_held(name: str) -> None:
    """What is sent into the first block comes out of the last one as it was sent: no sublayer, and
    no norm behind one, has heard of it."""
    lens = il.LatentModel(*tiny.build(name), spec=False)
    base, source = (
        {"images": tiny.image(40, 24, seed=seed), "text": tiny.prompt(name, "what colour?")}
        for seed in (0, 1)
    )
    enter, leave = "blocks.0.hook_resid_pre", "blocks.2.hook_resid_post"
    ends = ends_of(
        lens, il.Pairs([base], [source], ["a"], ["b"]), metric=il.log_prob, direction="denoise",
        context="fixed", states=[(enter, il.image)],
    )  # fmt: skip
    path = _Path.of(lens, [(enter, il.image)], [(leave, il.image)])
    capture = CaptureEntry((*path.hold, enter, leave), None)
    path._read(ends, [capture])
    swap = [end.part(il.Swap(ends.donor)) for end in path.senders]
    nothing, told = (path._told(ends, capture.whole, (leave,), parts) for parts in ((), swap))
    assert torch.equal(nothing[leave], capture.whole[leave])
    (columns,) = (il.image.resolve(ends.run.tokens, row) for row in range(1))
    sent = torch.zeros_like(capture.whole[enter])
    sent[0, columns] = ends.donor.states(enter, il.image).values[0]
    sent[0, columns] -= capture.whole[enter][0, columns]
    assert torch.allclose(told[leave] - nothing[leave], sent, rtol=0, atol=1e-13)
    assert sent.abs().max() > 1


def test_written_out_attention_has_its_own_base() -> None:
    lens = il.load("latent-content", dtype=torch.float64)
    task = lens.task(n=3, seed=0)
    words = {"receivers": [("blocks.0.attn.hook_pattern", il.before_answer)]}
    found = path_patch(lens, task, senders=[("blocks.2.hook_mlp_out", il.before_answer)], **words)
    assert not found.effect.any()
    assert np.abs(found.sham).max() < 1e-12


def test_organisms_show_who_reads_the_latents() -> None:
    ends = {
        "senders": [("hook_latent", il.latent)],
        "receivers": [("blocks.0.hook_mlp_out", il.latent), ("blocks.1.attn.hook_v", il.latent)],
    }
    content, ignored = (il.load(f"latent-{name}") for name in ("content", "ignored"))
    found = path_patch(content, content.task(n=16, seed=1), **ends)
    assert found.recovery_at("path").value > 0.5
    nothing = path_patch(ignored, ignored.task(n=16, seed=1), **ends)
    assert abs(nothing.recovery_at("path").value) < 0.02


def test_what_cannot_be_sent_or_received_is_refused() -> None:
    p = planted.planted("linear")
    ok = [("hook_latent", il.latent)]
    to = [("blocks.1.hook_mlp_out", CLOSE)]
    for senders, receivers, said in (
        ([], to, "senders is"),
        (ok, [], "receivers is"),
        ([("blocks.0.attn.hook_pattern", il.latent)], to, "cannot send"),
        (ok, ok, "given to a reading"),
        (ok, [("hook_embed", CLOSE)], "given to a reading"),
    ):
        with pytest.raises(il.InputError, match=said):
            effect(p, senders, receivers)
    for given in (("hook_latent",), "hook_latent", ("hook_latent", il.latent, [0], 1)):
        with pytest.raises(il.InputError, match="expected \\(site, positions\\)"):
            _End.of(p.lens, "senders", given)
    with pytest.raises(il.HookNameError):
        effect(p, ok, [("blocks.9.hook_mlp_out", CLOSE)])
    with pytest.raises(il.EditTouchedNothing, match="changed nothing"):
        effect(p, [("hook_latent", il.latent[5])], to)
