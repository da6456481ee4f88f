"""nnsight traces of your own on a model that reasons in latents, with our edits inside them.

For users of nnsight 0.8. `lens.nnsight` is nnsight's wrapper of the model, and takes what that one
takes. Beyond that it encodes pictures, also several in one trace; it runs our verbs, so that a
trace sees the latents that `generate` alone would never feed back; and edits that are active act in
it, with their proof of landing. Each number stands beside its oracle. From the root of a clone:

    python -m examples.interop.with_nnsight
"""

from pathlib import Path
from typing import Any

import nnsight
import torch

import imaginelens as il

SITE = "blocks.1.hook_resid_post"


def blocks(lens: Any) -> Any:
    """The decoder's blocks, as nnsight shows them."""
    return lens.nnsight.get("model.language_model.layers")


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference between two tensors."""
    return float((one - other).abs().max())


def several_pictures(lens: Any, examples: list[dict[str, Any]]) -> float:
    """Two pictures in one trace, an invoke each: how far from each in a trace of its own."""
    one, two = examples
    with lens.nnsight.trace() as tracer:
        with tracer.invoke(one):
            first = nnsight.save(blocks(lens)[1].output)
        with tracer.invoke(two):
            second = nnsight.save(blocks(lens)[1].output)
    alone = [lens.run_with_cache(x, names_filter=SITE)[1][SITE] for x in (one, two)]
    together = (x[:, -a.shape[1] :] for x, a in zip((first, second), alone, strict=True))
    return max(off(x, a) for x, a in zip(together, alone, strict=True))  # rows are left-padded


def edits_inside(lens: Any, example: dict[str, Any]) -> tuple[float, il.Landing]:
    """An edit of ours in a raw trace: how far from the same edit under our own verb."""
    with lens.edit(il.Zero(), at=il.image, site=SITE) as landing:
        with lens.nnsight.trace(example):
            raw = nnsight.save(lens.nnsight.lm_head.output)
    with lens.edit(il.Zero(), at=il.image, site=SITE):
        ours = lens.run_with_hooks(example)
    return off(raw, ours), landing


def latents_in_a_trace(lens: Any, example: dict[str, Any]) -> float:
    """What is fed back, read by a raw trace of a whole generation: how far from `run.latents`.

    Forward 0 reads the prompt and forward k the k-th generated position. The state that is fed at
    a position is what the final norm put out one forward before.
    """
    norm = lens.nnsight.get("model.language_model.norm")
    states: list[torch.Tensor] = []
    with lens.nnsight.trace(fn=lens.run) as tracer:
        with tracer.invoke(example):
            for _ in tracer.iter[0:4]:
                states.append(norm.output[:, -1].clone())
        with tracer.invoke():
            run = nnsight.save(tracer.result)
    columns = run.tokens.latents(0) - run.tokens.prompt_width  # of the generated positions
    read = torch.stack([states[column][0] for column in columns])
    return off(read, run.latents[0])


def latent_written_by_hand(lens: Any, example: dict[str, Any], donor: il.Run) -> tuple[bool, float]:
    """A latent replaced by nnsight alone, at the embedding of its forward: is the answer that of
    our own swap, and how far are the latents behind it?"""
    z = donor.latents[:, 0]
    place = int(donor.tokens.latents(0)[0]) - donor.tokens.prompt_width + 1  # its forward
    embed = lens.nnsight.get("model.language_model.embed_tokens")
    with lens.nnsight.trace(fn=lens.run) as tracer:
        with tracer.invoke(example):
            for _ in tracer.iter[[place]]:
                embed.output = z[:, None]
        with tracer.invoke():
            raw = nnsight.save(tracer.result)
    with lens.edit(il.Swap(donor), at=il.latent[0]):
        ours = lens.run(example)
    return raw.answer == ours.answer, off(raw.latents[:, 1], ours.latents[:, 1])


def of_a_run(lens: Any, run: il.Run) -> float:
    """A finished run, latents included, read by one raw trace: how far from our own cache."""
    with lens.nnsight.trace(run, fn=lens.run_with_hooks):
        raw = nnsight.save(blocks(lens)[1].output)
    return off(raw, lens.run_with_cache(run, names_filter=SITE)[1][SITE])


def remotely(lens: Any, example: dict[str, Any], folder: str) -> float:
    """A prompt on a machine that has the weights: nnsight's own wrapper runs it, our map says where
    the picture is. `remote="local"` sends it through the same serialisation, and nowhere.

    The latent loop is ours and runs here: it cannot be sent, and `lens.nnsight` says so.
    """
    there = nnsight.TransformersModel(
        folder, task="image-text-to-text", dtype=torch.float32,
        processor=lens.processor, tokenizer=lens.tokenizer,
    )  # fmt: skip
    here = il.LatentModel(there, lens.processor)  # without weights: for names and positions
    inputs = here.prompt(example).inputs
    columns = il.image.resolve(here.tokens(example), 0)
    with there.trace(**inputs, remote="local"):
        there.model.language_model.layers[1].output[:, columns] = 0
        logits = nnsight.save(there.lm_head.output)
    with lens.edit(il.Zero(), at=il.image, site=SITE):
        return off(logits, lens.run_with_hooks(example))


@torch.no_grad()
def main() -> None:
    """Print each number beside what it should be."""
    lens = il.load("latent-content")
    task = lens.task(n=2, seed=0)
    base, donor = task.base[0], lens.run(task.source[0])
    print(f"two pictures in one trace, off by {several_pictures(lens, task.base):.1g}")
    gap, landing = edits_inside(lens, base)
    print(f"an edit in a raw trace, off by {gap:.1g} from our own verb\n  {landing}")
    print(f"latents read by a raw trace, off by {latents_in_a_trace(lens, base):.1g}")
    same, gap = latent_written_by_hand(lens, base, donor)
    print(f"a latent written by hand: same answer {same}, next latent off by {gap:.1g}")
    print(f"a run read by a raw trace, off by {of_a_run(lens, lens.run(base)):.1g}")
    folder = Path(il.__file__).parent / "organisms" / "checkpoints" / "latent-content"
    print(f"a prompt through nnsight's remote path, off by {remotely(lens, base, str(folder)):.1g}")
    try:
        lens.nnsight.trace(base, fn=lens.run, remote=True)
    except il.InputError as error:
        print(f"the latent loop, remotely: {error}")


if __name__ == "__main__":
    main()
