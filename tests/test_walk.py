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


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> dict[str, walk.Row]:
    """The rows of all types that are asked for, two types at once."""
    asked = [
        item.callspec.params["model_type"]
        for item in request.session.items
        if item.originalname == test_the_page_says_what_is_measured.__name__
    ]
    return {row.model_type: row for row in walk.measured(asked, at_once=2)}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", list(walk_checks.class_names()))
def test_the_page_says_what_is_measured(model_type: str, measured: dict[str, walk.Row]) -> None:
    row = measured[model_type]
    lines = walk.PAGE.read_text().splitlines()
    assert walk.line(row) in lines, f"run `python tests/walk.py --write`; measured {row.cells}"


def test_the_page_has_every_type_and_the_counts_of_its_rows() -> None:
    text = walk.PAGE.read_text()
    head, *parts = text.split("\n## ")
    by_title = {part.splitlines()[0]: part for part in parts}
    rows = {
        title: [line for line in part.splitlines() if line.startswith("| ")][1:]
        for title, part in by_title.items()
    }
    full, short = rows["In full"], rows["Not in full"]
    support = [line.split(" | ")[1] for line in short]
    partial, text_only = support.count("partial"), support.count("text only")
    assert f"**{len(full)} of {len(full) + len(short)} are supported in full**" in head
    assert f"{partial} in part, {text_only} with text only" in head
    named = {line.split(" | ")[0].strip("| ") for part in rows.values() for line in part}
    assert named >= set(walk_checks.class_names())
    assert all(line.split(" | ")[-1].strip(" |") for line in short), "each miss has its reason"


def test_latent_families_are_a_table_of_their_own() -> None:
    family = {
        "family": "monet", "kind": "hidden state", "tokens_equal": True, "latent_error": 2.0e-15,
        "folder_error": None, "source": "a paper", "note": "a | b",
    }  # fmt: skip
    rows = {"llava": walk.Row("llava", "Llava", {"instantiates": "ok"})}
    assert "Latent families" not in walk.page(rows)
    assert "| monet | hidden state | yes | 2.0e-15 |  | a paper | a / b |" in walk.page(
        rows, [family]
    )


def test_a_wrong_module_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk is no rubber stamp: a site at the wrong module breaks an identity."""
    found = structure._block

    def confused(path: str, block: object, *rest: object) -> structure.Block:
        right = found(path, block, *rest)
        return dataclasses.replace(right, attn_out=right.mlp_out)

    monkeypatch.setattr(structure, "_block", confused)
    row = walk.apart("llava")
    assert "attn_out misses resid_mid" in row.cells["attn_out"]
    assert walk.standing(row) == "partial"


def test_a_forgotten_factor_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 4 scales its stream behind both sublayers: a write between them that knows nothing of
    it is another than the one that plain torch makes where the stream is made."""
    monkeypatch.setattr(structure, "_FACTORS", ())
    row = walk.apart("gemma4")
    assert "an edit differs from plain torch" in row.cells["resid_mid"]
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
