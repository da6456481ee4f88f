"""Latents from elsewhere: as donors they do what swapping in memory does, and mix-ups are found."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import imaginelens as il
from imaginelens.hooks.errors import CheckpointError, DonorError
from imaginelens.hooks.recorded import Latents

N = 6


@pytest.fixture(scope="module")
def content() -> tuple[Any, il.Pairs, il.Run, il.Run]:
    lens = il.load("latent-content")
    task = lens.task(n=N, seed=3)
    return lens, task, lens.run(task.base), lens.run(task.source)


def swapped(lens: Any, base: il.Run, donor: Any, at: Any = il.latent) -> il.Run:
    with lens.edit(il.Swap(donor), at=at) as landing:
        run = lens.rerun(base)
    assert landing.fired > 0
    return run


# ---- as donors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "at", [il.latent, il.latent[0], il.latent[1], il.latent[-2:], il.span[0].latent[:1]]
)
def test_a_recording_gives_what_its_run_gives(content: Any, tmp_path: Path, at: Any) -> None:
    """Saved, read and swapped in: the same states as from memory, to the last bit."""
    _, _, _, source = content
    recorded = Latents.load(Latents.of(source).save(tmp_path / "latents.safetensors"))
    ours, theirs = recorded.states("hook_latent", at), source.states("hook_latent", at)
    assert torch.equal(ours.values, theirs.values)
    assert torch.equal(ours.mask, theirs.mask)
    assert ours.keys == theirs.keys


def test_swapping_a_recording_in_flips_the_answer_to_the_donors(
    content: Any, tmp_path: Path
) -> None:
    """latent-content answers what its latents hold, so the source's, whoever brings them."""
    lens, task, base, source = content
    memory = swapped(lens, base, source)
    recorded = Latents.load(Latents.of(source).save(tmp_path / "latents.safetensors"))
    run = swapped(lens, base, recorded)
    assert torch.equal(run.sequences, memory.sequences)
    assert torch.equal(run.latents, memory.latents)
    hits = [a == b for a, b in zip(run.answers, task.source_answers, strict=True)]
    assert base.answers == list(task.base_answers)
    assert sum(hits) >= N - 1

    result = lens.patch(
        base=base, source=recorded, metric=il.source_answer, source_answers=task.source_answers
    )
    wanted = lens.swap(base, source, metric=il.source_answer, source_answers=task.source_answers)
    assert torch.equal(result.after, wanted.after)
    assert float(result.after.mean()) >= (N - 1) / N
    assert torch.equal(lens.ablate(base, il.Swap(recorded), metric=il.kl).after,
                       lens.patch(base=base, source=recorded, metric=il.kl).after)  # fmt: skip


def test_where_latents_are_ignored_a_recording_changes_no_answer(tmp_path: Path) -> None:
    lens = il.load("latent-ignored")
    task = lens.task(n=N, seed=3)
    base, source = lens.run(task.base), lens.run(task.source)
    recorded = Latents.load(Latents.of(source).save(tmp_path / "latents.safetensors"))
    run = swapped(lens, base, recorded)
    assert not torch.equal(run.latents, base.latents)
    assert run.answers == base.answers == list(task.base_answers)


def test_one_sample_serves_all_rows(content: Any) -> None:
    lens, _, base, source = content
    one = Latents.of(source).select(["2"])
    with lens.edit(il.Swap(one), at=il.latent):
        run = lens.rerun(base)
    assert run.latents[:, 0].eq(source.latents[2, 0]).all()


def test_a_patch_that_needs_the_sources_answers_says_so(content: Any) -> None:
    lens, _, base, source = content
    with pytest.raises(il.InputError, match="has no source answer"):
        lens.patch(base=base, source=Latents.of(source), metric=il.logit_diff)


# ---- formats of others -------------------------------------------------------------------------


def monet(folder: Path, run: il.Run, *, kind: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """What Monet's precompute_teacher_latents.py writes: one file of torch.save per sample."""
    folder.mkdir()
    for row in range(len(run)):
        info = f"{kind}_Zebra_{row}"
        z = run.latents[row, : run.trigger.emitted[row]].to(dtype)
        if kind == "all_layers":
            z = torch.stack([torch.zeros_like(z), z])
        torch.save({"metadata_info": info, "latent": z}, folder / f"latent_{info}.pt")
    return folder


@pytest.mark.parametrize("kind", ["last_layer", "all_layers"])
def test_monets_files_are_read(content: Any, tmp_path: Path, kind: str) -> None:
    lens, _, base, source = content
    folder = monet(tmp_path / "latents", source, kind=kind)
    layer = -1 if kind == "all_layers" else None
    recorded = Latents.load(folder, layer=layer, dtype=torch.float32)
    assert recorded.ids == tuple(f"Zebra_{i}" for i in range(N))
    for row, states in enumerate(recorded.samples.values()):
        assert torch.equal(states, source.latents[row].to(torch.bfloat16).float())
    assert swapped(lens, base, recorded).answers == swapped(lens, base, source).answers
    assert 0 < recorded.check(source) < 0.01
    alone = Latents.load(folder / f"latent_{kind}_Zebra_4.pt", layer=layer)
    assert alone.ids == ("Zebra_4",)


def test_monets_recorder_is_read(content: Any, tmp_path: Path) -> None:
    """`get_all()` gives lists of floats, `get_all_tensors()` float16 tensors; both by request."""
    lens, _, base, source = content
    counts = source.trigger.emitted
    lists = {f"0_{i}": source.latents[i, : counts[i]].tolist() for i in range(N)}
    exact = Latents.from_steps(lists)
    assert exact.check(source) == 0.0
    (tmp_path / "all.json").write_text(json.dumps(lists))
    assert Latents.load(tmp_path / "all.json").check(source) == 0.0
    halves = {k: [torch.tensor(z, dtype=torch.float16) for z in v] for k, v in lists.items()}
    torch.save(halves, tmp_path / "all.pt")
    rounded = Latents.load(tmp_path / "all.pt")
    assert {each.dtype for each in rounded.samples.values()} == {torch.float16}
    with pytest.raises(DonorError, match=r"brings states in torch\.float16"):
        swapped(lens, base, rounded)
    float32 = rounded.to(dtype=torch.float32)
    assert 0 < float32.check(source) < 1e-2
    assert swapped(lens, base, float32).answers == swapped(lens, base, source).answers


def test_requests_without_latents_leave_their_rows_alone(content: Any) -> None:
    lens, _, base, source = content
    steps = {str(i): source.latents[i].numpy() if i else None for i in range(N)}
    recorded = Latents.from_steps(steps)
    assert recorded.counts() == [0] + [2] * (N - 1)
    run = swapped(lens, base, recorded)
    assert torch.equal(run.latents[0], base.latents[0])
    assert not torch.equal(run.latents[1], base.latents[1])


def test_plain_safetensors_are_read_by_name(content: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    _, _, _, source = content
    save_file({f"s{i}": source.latents[i].clone() for i in range(N)}, tmp_path / "x.safetensors")
    recorded = Latents.load(tmp_path / "x.safetensors")
    assert recorded.ids == tuple(f"s{i}" for i in range(N))
    assert recorded.check(source) == 0.0


def test_states_put_out_at_latents_are_fed_one_step_later(content: Any) -> None:
    """A recording of last-layer states at latent positions: they are next step's latents."""
    lens, _, base, source = content
    out = {str(i): source.latents[i, 1:] for i in range(N)}
    longer = torch.cat([source.latents[:, 1:], torch.randn_like(source.latents)], 1)
    with pytest.raises(DonorError, match="load it with first=1"):
        Latents({str(i): longer[i] for i in range(N)}).check(source)
    recorded = Latents(out, first=1)
    assert recorded.check(source) == 0.0
    with pytest.raises(DonorError, match=r"use at=il\.latent\[1:\]"):
        swapped(lens, base, recorded)
    ours, memory = (swapped(lens, base, d, il.latent[1:]) for d in (recorded, source))
    assert torch.equal(ours.latents, memory.latents)


# ---- mix-ups -----------------------------------------------------------------------------------

ORDER = [3, 0, 1, 2, 4, 5]


def test_a_shuffled_recording_is_found_by_its_inputs(content: Any) -> None:
    _, _, _, source = content
    recorded = Latents.of(source)
    shuffled = recorded.select([str(i) for i in ORDER])
    with pytest.raises(DonorError, match="row 0 of the recording, sample '3', is of row 3's input"):
        shuffled.check(source)
    assert shuffled.aligned(source).ids == recorded.ids
    assert shuffled.aligned(source).check(source) == 0.0


def test_a_prompt_has_the_keys_of_its_run(content: Any) -> None:
    lens, task, _, source = content
    shuffled = Latents.of(source).select([str(i) for i in ORDER])
    assert shuffled.aligned(lens.tokens(list(task.source))).ids == tuple(map(str, range(N)))


def test_a_shuffled_recording_without_inputs_is_found_by_its_states(content: Any) -> None:
    _, _, _, source = content
    recorded = replace(Latents.of(source), keys_of={})
    assert recorded.check(source) == 0.0
    wrong = recorded.select([str(i) for i in ORDER])
    with pytest.raises(DonorError, match="sample '3', lies nearer to the latents of row 3"):
        wrong.check(source)
    with pytest.raises(DonorError, match="do not say of which input"):
        wrong.aligned(source)


def test_a_recording_of_other_inputs_is_found(content: Any) -> None:
    _, _, base, source = content
    with pytest.raises(DonorError, match="is of an input that is not in the run"):
        Latents.of(source).check(base)
    with pytest.raises(DonorError, match="the inputs of 6 of 6 rows"):
        Latents.of(source).aligned(base)


def test_a_renamed_file_is_found(content: Any, tmp_path: Path) -> None:
    folder = monet(tmp_path / "latents", content[3], kind="last_layer")
    one, two = (folder / f"latent_last_layer_Zebra_{i}.pt" for i in (1, 2))
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)
    with pytest.raises(DonorError, match="Zebra_2', which its name does not say"):
        Latents.load(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.select(["0", "1"]), "2 samples and the run 6 rows"),
        (lambda r: Latents({n: z[:, :9] for n, z in r.samples.items()}), "width 9 and the model"),
        (lambda r: Latents({n: z[:1] for n, z in r.samples.items()}), "has 1 states from step 0"),
    ],
)
def test_what_does_not_fit_a_run_is_told(content: Any, change: Any, words: str) -> None:
    with pytest.raises(DonorError, match=words):
        change(Latents.of(content[3])).check(content[3])


def test_an_edit_refuses_another_width_and_too_few_steps(content: Any) -> None:
    lens, _, base, source = content
    narrow = Latents({n: z[:, :9] for n, z in Latents.of(source).samples.items()})
    with pytest.raises(DonorError, match=r"states of shape \(9,\)"):
        swapped(lens, base, narrow)
    short = Latents({n: z[:1] for n, z in Latents.of(source).samples.items()})
    with pytest.raises(DonorError, match="has 1 states at latent"):
        swapped(lens, base, short)
    assert swapped(lens, base, short, il.latent[0]).answers


# ---- what is refused ---------------------------------------------------------------------------


def test_a_pickle_of_code_is_refused_unread(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Touch:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    torch.save({"metadata_info": "x", "latent": Touch()}, tmp_path / "latent_x.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": Touch()}, protocol=2))
    for name in ("latent_x.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match="could run code; save it as safetensors"):
            Latents.load(tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "content_of", "error", "words"),
    [
        ("x.npy", b"", CheckpointError, "ends in '.npy'"),
        ("x.json", b"{", CheckpointError, "is no JSON"),
        ("x.json", b"[1]", DonorError, "holds a list"),
        ("x.json", b'{"a": [[1.0], [1.0, 2.0]]}', DonorError, "no vectors of one width"),
        ("x.json", b'{"a": [[1.0]], "b": [[1.0, 2.0]]}', DonorError, "the samples differ"),
        ("x.json", b'{"a": [[NaN]]}', DonorError, "1 values that are not finite"),
        ("x.json", b"{}", DonorError, "no samples"),
        ("x.safetensors", b"torn", CheckpointError, "torn, or no safetensors"),
    ],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, name: str, content_of: bytes, error: type[Exception], words: str
) -> None:
    (tmp_path / name).write_bytes(content_of)
    with pytest.raises(error, match=words):
        Latents.load(tmp_path / name)


def test_other_refusals(content: Any, tmp_path: Path) -> None:
    _, _, _, source = content
    recorded = Latents.of(source)
    with pytest.raises(CheckpointError, match="no file or folder"):
        Latents.load(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="has no file that ends in"):
        Latents.load(tmp_path)
    folder = monet(tmp_path / "m", source, kind="all_layers")
    with pytest.raises(DonorError, match="say which layer"):
        Latents.load(folder)
    with pytest.raises(DonorError, match="layer=5 is none of them"):
        Latents.load(folder, layer=5)
    with pytest.raises(DonorError, match="no sample 'nobody'; it has '0'"):
        recorded.select(["nobody"])
    with pytest.raises(DonorError, match="named twice"):
        recorded.select(["1", "1"])
    with pytest.raises(DonorError, match="expected a list of ids"):
        recorded.select("12")
    with pytest.raises(DonorError, match="has no states for image"):
        recorded.states("hook_latent", il.image)
    with pytest.raises(DonorError, match="site='hook_latent'"):
        recorded.states("blocks.1.hook_resid_post", il.latent)
    with pytest.raises(DonorError, match="does not say where the spans"):
        replace(recorded, spans={}).states("hook_latent", il.span[0].latent)
    with pytest.raises(DonorError, match="6 ids, 5 of them different"):
        Latents.of(source, ids=["a", "a", "b", "c", "d", "e"])
    with pytest.raises(CheckpointError, match=r"end in \.safetensors"):
        recorded.save(tmp_path / "x.pt")
    recorded.save(tmp_path / "two" / "a.safetensors")
    recorded.save(tmp_path / "two" / "b.safetensors")
    with pytest.raises(DonorError, match="a second time"):
        Latents.load(tmp_path / "two")
    assert recorded["1"].shape == (2, 64)
    assert "1" in recorded
    assert list(recorded) == [str(i) for i in range(N)]


def test_a_folder_of_two_parts_is_one_recording(content: Any, tmp_path: Path) -> None:
    recorded = Latents.of(content[3], ids=[f"s{i}" for i in range(N)])
    recorded.select(["s0", "s1", "s2"]).save(tmp_path / "a.safetensors")
    recorded.select(["s3", "s4", "s5"]).save(tmp_path / "b.safetensors")
    assert Latents.load(tmp_path).check(content[3]) == 0.0
