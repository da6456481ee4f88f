"""Every multimodal type of transformers does what docs/models.md says of it."""

import dataclasses

import pytest
import walk
import walk_checks
import walk_shrink

import imaginelens.hooks.structure as structure

REPRESENTATIVE = ("llava", "qwen2_5_vl", "gemma3")


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    walk.prepare()


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_a_representative_type_is_supported_in_full(model_type: str) -> None:
    row = walk.apart(model_type)
    assert walk.standing(row) == "full", row.cells


@pytest.mark.slow
@pytest.mark.parametrize("model_type", list(walk_checks.class_names()))
def test_the_page_says_what_is_measured(model_type: str) -> None:
    row = walk.apart(model_type)
    lines = walk.PAGE.read_text().splitlines()
    assert walk.line(row) in lines, f"run `python tests/walk.py --write`; measured {row.cells}"


def test_a_wrong_module_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk is no rubber stamp: a site at the wrong module breaks an identity."""
    found = structure._block

    def confused(path: str, block: object, *rest: object) -> structure.Block:
        right = found(path, block, *rest)
        return dataclasses.replace(right, attn_out=right.mlp_out)

    monkeypatch.setattr(structure, "_block", confused)
    row = walk.apart("llava")
    assert "misses resid_mid" in row.cells["attn_out"]
    assert walk.standing(row) == "partial"


def test_a_type_that_crashes_costs_its_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk_checks, "examined", lambda model_type: walk.os._exit(3))
    row = walk.apart("llava")
    assert row.cells == {"instantiates": "the process ended with 3"}
    assert walk.standing(row) == "none"


def test_ids_stay_apart_and_layers_of_every_kind_remain() -> None:
    config = walk_shrink.shrunken("qwen3_5")
    text = config.get_text_config()
    assert set(text.layer_types) == {"linear_attention", "full_attention"}
    assert len({config.image_token_id, config.video_token_id, config.vision_start_token_id}) == 3
    assert config.image_token_id < text.vocab_size
