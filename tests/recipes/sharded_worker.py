"""One of several processes that train the organism `base` in shards, and again in plain copies.

    torchrun --nproc_per_node 2 tests/recipes/sharded_worker.py chains.jsonl losses.json

Every process learns rows of its own. The losses of both trainings, over all processes, and how far
their final weights differ, go to the file.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[2]))
from examples.capimagine.chains import load
from examples.capimagine.train import open_model
from examples.capimagine.training_data import IGNORED, Collator, dataset, unopened
from imaginelens.organisms import checkpoint

UPDATES, ROWS = 10, 4


def losses(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    """Train; gives the loss of every update, each token of every process weighing alike."""
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-3)
    found = []
    for batch in batches:
        learned = (batch["labels"][:, 1:] != IGNORED).sum()
        dist.all_reduce(learned)
        labels = batch.pop("labels")
        logits = model(**batch).logits[:, :-1]
        total = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        loss = total / learned * dist.get_world_size()  # gradients are averaged over processes
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        found.append(mean.item() / dist.get_world_size())
    return found


def main() -> None:
    data, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    process, processes = dist.get_rank(), dist.get_world_size()
    chains = load(data)[process::processes]
    collate = Collator(processor=checkpoint.build_processor(latent=False))
    rows = unopened(dataset(chains))

    def batches() -> list[dict[str, torch.Tensor]]:
        return [collate([rows[u * ROWS + i] for i in range(ROWS)]) for u in range(UPDATES)]

    sharded = open_model("base", lora=False)
    mesh = init_device_mesh("cpu", (processes,))
    for layer in (*sharded.model.language_model.layers, *sharded.model.visual.blocks):
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    in_shards = losses(sharded, batches())
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(sharded, options=whole)

    copied = open_model("base", lora=False)
    in_copies = losses(DistributedDataParallel(copied), batches())
    if process == 0:
        held = copied.state_dict()
        apart = max(float((gathered[n] - held[n]).abs().max()) for n in gathered)
        kinds = sorted({type(weight).__name__ for weight in sharded.parameters()})
        found = {"sharded": in_shards, "copied": in_copies, "apart": apart, "kinds": kinds}
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
