"""Opening models: what is refused, in one sentence that says what to do."""

from pathlib import Path

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import imaginelens as il
from imaginelens.hooks.patching import check_arguments


def text_only() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        eos_token_id=None,  # a random model would stop where it likes
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("latent-conten", r"no organism 'latent-conten'; did you mean 'latent-content'\?"),
        ("nowhere/at/all", "neither a folder nor a Hub id"),
        ("./nowhere", "neither a folder nor a Hub id"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises(il.CheckpointError, match=message) as error:
        il.load(name)
    assert "\n" not in str(error.value)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(il.CheckpointError, match=r"holds nothing and no config\.json"):
        il.load(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(il.CheckpointError, match=r"holds notes\.txt and no config\.json"):
        il.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(il.CheckpointError, match=r"no \.safetensors weights"):
        il.load(tmp_path)
    with pytest.raises(il.CheckpointError, match="is a file"):
        il.load(tmp_path / "notes.txt")
    text_only().save_pretrained(tmp_path / "llama")
    with pytest.raises(il.CheckpointError, match="does not list as image-text-to-text"):
        il.load(tmp_path / "llama")


def test_a_text_only_model_is_wrapped_without_a_vision_side() -> None:
    lens = il.LatentModel(text_only())
    run = lens.run({"input_ids": torch.tensor([[1, 2, 3]])}, max_new_tokens=3)
    assert run.sequences.shape == (1, 6)
    assert "no vision tower was found" in str(lens.describe())
    with pytest.raises(il.SiteUnavailable, match="not offered by LlamaForCausalLM"):
        lens.registry.match("vision_projector.hook_out")


def test_a_step_that_was_never_emitted_is_refused_and_leaves_nothing_behind() -> None:
    lens = il.load("latent-content")
    task = lens.task(n=2, seed=0)
    with pytest.raises(il.EditTouchedNothing, match=r"Zero at latent\[5\] .* touched no position"):
        lens.ablate(task.base, il.Zero(), at=il.latent[5])
    assert lens.registry.entries == []
    with pytest.raises(il.PositionError, match="counts from the end"):
        lens.ablate(task.base, il.Zero(), at=il.latent[-1])
    assert lens.registry.entries == []


def test_what_a_model_cannot_offer_is_described() -> None:
    text = str(il.LatentModel(*tiny.build("qwen2_5_vl"), spec=False).describe())
    assert "3 layers, d_model 64" in text
    assert "merged 2 x 2" in text


def test_wrong_arguments_are_refused_before_anything_runs() -> None:
    lens = il.load("latent-content")
    task = lens.task(n=1, seed=0)
    with pytest.raises(il.InputError, match=r"at is 'latent', expected something like il\.latent"):
        check_arguments(at="latent")  # the verbs ask this first; the tests' type checks before them
    with pytest.raises(il.InputError, match=r"metric is 'log_prob'"):
        check_arguments(metric="log_prob")
    with pytest.raises(il.InputError, match=r"expected something like il\.Zero\(\)"):
        check_arguments(edit=il.Zero)
    with pytest.raises(il.InputError, match=r"run pairs\.base or pairs\.source"):
        lens.run(task)
    with pytest.raises(il.InputError, match="was given a Linear; pass a Hugging Face model"):
        il.LatentModel(torch.nn.Linear(2, 2))
    with pytest.raises(il.InputError, match="max_new_tokens is 0, expected 1 or more"):
        lens.run(task.base, max_new_tokens=0)
    with pytest.raises(TypeError, match=r"pairs\[0:1\]"):
        task[0]


def test_a_users_own_trace_works_beside_ours() -> None:
    import nnsight

    lens = il.load("latent-content")
    inputs = lens.prompt(lens.task(n=1, seed=0).base[0]).inputs
    with torch.no_grad():
        ours = lens.run_with_hooks(inputs)
        with lens.nnsight.trace(**inputs):
            theirs = nnsight.save(lens.nnsight.lm_head.output)
        again = lens.run_with_hooks(inputs)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, again)


def test_bases_and_sources_that_do_not_pair_up_are_refused() -> None:
    lens = il.load("latent-content")
    task = lens.task(n=3, seed=0)
    with pytest.raises(il.InputError, match="3 base inputs and 2 source inputs do not pair up"):
        lens.swap(task.base, task.source[:2])
    assert lens.registry.entries == []
    one = lens.swap(task.base[:1], task.source[0])
    assert len(one.after) == 1


def test_files_that_are_no_cache_are_refused(tmp_path: Path) -> None:
    with pytest.raises(il.CheckpointError, match="is not a file; pass the path"):
        il.ActivationCache.load(tmp_path / "missing.safetensors")
    (tmp_path / "torn.safetensors").write_text("not a cache")
    with pytest.raises(il.CheckpointError, match="is not a cache that can be read"):
        il.ActivationCache.load(tmp_path / "torn.safetensors")
