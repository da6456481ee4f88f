"""The recipe for sparse dictionaries, against known answers and SAELens' own results."""

import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import imaginelens as il
from examples.interop import sae_record, with_sae
from imaginelens.hooks.dictionaries import Features, features, hook_names
from imaginelens.hooks.edits import EditContext

ROWS = np.arange(sae_record.CELLS)
CTX = EditContext("blocks.1.hook_resid_post", ROWS, ROWS, 0 * ROWS, 0 * ROWS)
RECORDED = json.loads(with_sae.RECORDED.read_text())["saes"]


def edited(sae: Any, **do: Any) -> torch.Tensor:
    with torch.no_grad():
        return Features(sae, **do).apply(sae_record.states(), CTX)


@pytest.mark.parametrize("name", list(RECORDED))
def test_our_edit_is_saelens_own_hooked_forward_as_it_was_recorded(name: str) -> None:
    sae = with_sae.AsSaeLens(*name.split(", "))
    with torch.no_grad():
        read = features(sae_record.states(), sae)
    wanted = RECORDED[name]
    torch.testing.assert_close(
        read, torch.tensor(wanted["features"], dtype=torch.float64), rtol=0, atol=1e-12
    )
    new = edited(sae, features=list(sae_record.EDITED), value=list(sae_record.EDITED.values()))
    right = torch.tensor(wanted["edited"], dtype=torch.float64)
    torch.testing.assert_close(new, right, rtol=0, atol=1e-12)
    # fooling case: without the error term, or with the values exchanged, it is another state
    for wrong in (
        edited(sae, features=list(sae_record.EDITED), value=list(sae_record.EDITED.values())[::-1]),
        new - (sae_record.states() - reconstructed(sae)),
    ):
        assert float((wrong - right).abs().max()) > 0.1


def reconstructed(sae: Any) -> torch.Tensor:
    with torch.no_grad():
        return sae.decode(sae.encode(sae_record.states()))


def test_saelens_itself() -> None:
    """Where it can be imported (beside transformer-lens below 4)."""
    pytest.importorskip("sae_lens")
    for name, sae in sae_record.saes().items():
        assert hook_names(sae) == ("blocks.1.hook_resid_post", None)
        do = {"features": list(sae_record.EDITED), "value": list(sae_record.EDITED.values())}
        new = edited(sae, **do)
        assert torch.equal(new, sae_record.hooked(sae, sae_record.states())), name
        sham = edited(sae, scale=1.0)
        assert torch.equal(sham, sae_record.states())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(features(sae_record.states(), sae), sae.encode(sae_record.states()))
        lens = il.load("latent-content")
        with (
            pytest.raises(il.InputError, match=r"made for 'blocks.1.hook_resid_post', pass site="),
            lens.edit(Features(sae, [3], value=0.0), at=il.latent),
        ):
            pass


def test_a_transcoder_of_saelens() -> None:
    """As it sits in a model of SAELens, its error term kept."""
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.analysis.hooked_sae_transformer import _SAEWrapper
    from sae_lens.saes.sae import SAEMetadata

    names = {"hook_name": "blocks.1.hook_resid_mid", "hook_name_out": "blocks.1.hook_mlp_out"}
    width = sae_record.WIDTH
    config = sae_lens.TranscoderConfig(
        d_in=width, d_out=width, d_sae=sae_record.FEATURES, dtype="float64", device="cpu",
        apply_b_dec_to_input=False, metadata=SAEMetadata(**names),
    )  # fmt: skip
    coder = sae_lens.Transcoder(config)
    coder.load_state_dict(sae_record.weights())
    read, written = sae_record.states(), sae_record.waves(sae_record.CELLS, width, start=900)
    wrapper = _SAEWrapper(coder, use_error_term=True)
    wrapper.capture_input(read)

    def put(found: torch.Tensor, hook: Any) -> torch.Tensor:
        found = found.clone()
        found[..., 3] = 2.5
        return found

    coder.hook_sae_acts_post.add_hook(put)
    with torch.no_grad():
        wanted = wrapper(written)
    coder.hook_sae_acts_post.remove_hooks()
    edit = Features(coder, [3], value=2.5)
    assert edit.reads == names["hook_name"]
    ctx = EditContext(names["hook_name_out"], ROWS, ROWS, 0 * ROWS, 0 * ROWS, read=read)
    with torch.no_grad():
        assert torch.equal(edit.apply(written, ctx), wanted)
    with pytest.raises(il.InputError, match="was not passed in this forward before"):
        edit.apply(written, EditContext(names["hook_name_out"], ROWS, ROWS, 0 * ROWS, 0 * ROWS))


def test_the_recipe_finds_what_is_known_and_is_not_fooled() -> None:
    shares = with_sae.swapped("latent-content", n=16)
    assert shares["shape read from the feature"] == 1.0
    assert shares["shape swapped: donor's answer"] == 1.0
    assert shares["placebo swapped: own answer"] == 1.0
    assert shares["placebo swapped: change of the state"] > 0.01
    fooling = with_sae.swapped("latent-pointer", n=16)
    assert fooling["shape read from the feature"] > 0.9
    assert fooling["shape swapped: donor's answer"] < 0.1
    assert fooling["shape swapped: own answer"] > 0.9


def test_it_prints_its_numbers(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(with_sae, "swapped", lambda name: {"shape": 1.0})
    with_sae.main()
    assert "9 kinds of SAE" in capsys.readouterr().out
