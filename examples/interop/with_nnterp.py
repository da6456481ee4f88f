"""nnterp's names on a model that sees a picture and reasons in latents.

For users of nnterp. It renames the modules of a language model, so that one code serves many
families: `layers_output[i]`, `mlps_output[i]`, `ln_final`, `steer`. `lens.nnterp` has these names
for any model of ours, inside a trace that may hold a picture, or a generation with latents. The
oracle is nnterp 1.3 itself, recorded in an environment of its own (`nnterp_record.py`), for it
cannot be imported beside nnsight 0.8. From the root of a clone:

    python -m examples.interop.with_nnterp
"""

import json
from pathlib import Path
from typing import Any

import nnsight
import torch

import imaginelens as il
from examples.interop.nnterp_record import LAYER, NAME, inputs, some, vector

RECORDED = Path(__file__).with_name("nnterp_recorded.json")


def what_we_read(lens: Any) -> dict[str, torch.Tensor]:
    """What nnterp's record holds, under the same names: the lines of its traces, unchanged."""
    nn = lens.nnterp
    given = inputs(lens.model.config.image_token_id)
    read: dict[str, torch.Tensor] = {}
    with nn.trace(**given):
        read["token_embeddings"] = nnsight.save(nn.token_embeddings)
        read["layers_input"] = nnsight.save(nn.layers_input[LAYER])
        read["attentions_input"] = nnsight.save(nn.attentions_input[LAYER])
        read["attentions_output"] = nnsight.save(nn.attentions_output[LAYER])
        read["mlps_input"] = nnsight.save(nn.mlps_input[LAYER])
        read["mlps_output"] = nnsight.save(nn.mlps_output[LAYER])
        read["layers_output"] = nnsight.save(nn.layers_output[LAYER])
        read["project_on_vocab"] = nnsight.save(nn.project_on_vocab(nn.layers_output[LAYER]))
        read["ln_final"] = nnsight.save(nn.ln_final.output)
        read["logits"] = nnsight.save(nn.logits)
    with nn.trace(**given):
        nn.steer(LAYER, vector(), factor=3.0, token_positions=-1)
        read["steered"] = nnsight.save(nn.logits)
    with nn.trace(**given):
        nn.attentions_output[LAYER] = nn.attentions_output[LAYER] * 2
        read["attention_doubled"] = nnsight.save(nn.logits)
    with nn.trace(**given):
        nn.skip_layers(LAYER, LAYER + 1)
        read["skipped"] = nnsight.save(nn.logits)
    return read


def off_from_nnterp(lens: Any) -> dict[str, float]:
    """How far each is from what nnterp itself recorded, by name."""
    recorded = json.loads(RECORDED.read_text())["read"]
    ours = {name: some(act) for name, act in what_we_read(lens).items()}
    assert ours.keys() == recorded.keys()
    return {
        name: max(abs(a - b) for a, b in zip(ours[name], recorded[name], strict=True))
        for name in recorded
    }


def steered_latents(lens: Any, example: dict[str, Any]) -> tuple[float, float]:
    """nnterp's steering at one latent of a generation, which nnterp alone does not have: how far
    the next latent moves, and how far that is from the same edit of ours."""
    plain = lens.run(example)
    first = int(plain.tokens.latents(0)[0]) - plain.tokens.prompt_width + 1  # its forward
    with lens.nnterp.trace(fn=lens.run) as tracer:
        with tracer.invoke(example):
            for _ in tracer.iter[[first]]:
                lens.nnterp.steer(LAYER, vector(), factor=3.0)
        with tracer.invoke():
            run = nnsight.save(tracer.result)
    site = f"blocks.{LAYER}.hook_resid_post"
    with lens.edit(il.Steer(vector(), 3.0), at=il.latent[0], site=site):
        ours = lens.run(example)
    moved = (run.latents[:, 1] - plain.latents[:, 1]).norm()
    return float(moved), float((run.latents - ours.latents).abs().max())


@torch.no_grad()
def main() -> None:
    """Print each number beside what it should be."""
    lens = il.load(NAME)
    lens.model.double()  # as it was recorded
    versions = json.loads(RECORDED.read_text())["versions"]
    print(f"off from nnterp {versions['nnterp']} on nnsight {versions['nnsight']}:")
    for name, gap in off_from_nnterp(lens).items():
        print(f"  {name:18} {gap:.1g}")
    moved, gap = steered_latents(lens, lens.task(n=1, seed=0).base[0])
    print(f"a latent steered: the next one moves by {moved:.3g}, off by {gap:.1g} from our edit")


if __name__ == "__main__":
    main()
