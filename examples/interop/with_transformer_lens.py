"""TransformerLens' own functions on a model that sees a picture and reasons in latents.

For users of TransformerLens 4. Its functions call `model(tokens)`, and a picture is no token: on a
TransformerBridge of a vision model they run without an error and never see it. Here the model is
bound to its input, `lens.transformer_lens(run)`, so that the same functions, unchanged, read the
picture and the latents: activation patching with statistics, logit lens, direct logit attribution,
interchange (DAS) with its placebo, and sparse probes. Each number has its oracle: plain torch
hooks, the logits, or what is known of the model, which feeds its answer back or ignores its
latents. From the root of a clone:

    python -m examples.interop.with_transformer_lens
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pandas as pd
import torch
from transformer_lens import patching
from transformer_lens.tools.analysis import direct_logit_attribution, interchange, logit_lens
from transformer_lens.tools.analysis.sparse_probing import fit_sparse_probe

import imaginelens as il


def seen_pairs(lens: Any, n: int, seed: int = 0) -> il.Pairs:
    """Pairs with the same question: only the picture, and so the answer, differs."""
    task = lens.task(n=4 * n, seed=seed)
    texts = zip(task.base, task.source, strict=True)
    same = [i for i, (b, s) in enumerate(texts) if b["text"] == s["text"]][:n]
    return il.Pairs(
        base=[task.base[i] for i in same],
        source=[task.source[i] for i in same],
        base_answers=[task.base_answers[i] for i in same],
        source_answers=[task.source_answers[i] for i in same],
    )


def answer_metric(lens: Any, pairs: il.Pairs, run: il.Run) -> Callable[..., torch.Tensor]:
    """Logit of the source's answer minus that of the base's, for each example."""
    (column,) = set(lens.script(run).read_at)
    base, source = (
        torch.tensor([lens.encode(str(answer))[0] for answer in answers])
        for answers in (pairs.base_answers, pairs.source_answers)
    )

    def metric(logits: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(logits))
        return logits[rows, column, source] - logits[rows, column, base]

    return metric


# ---- what plain torch makes of it ------------------------------------------------------------


@contextmanager
def hooked(module: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Have a function act on a module's output, which may be the first of several."""

    def hook(module: torch.nn.Module, args: Any, out: Any) -> Any:
        return (fn(out[0]), *out[1:]) if isinstance(out, tuple) else fn(out)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def by_torch(
    lens: Any, run: il.Run, *edits: tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]
) -> torch.Tensor:
    """Logits of a run's whole sequence, its latents laid over the embeddings, by torch hooks."""
    script = lens.script(run)
    laid, embeds = script.laid[..., None], script.embeds
    embedding = lens.model.get_input_embeddings()
    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(hooked(embedding, lambda own: torch.where(laid, embeds, own)))
        for module, fn in edits:
            stack.enter_context(hooked(module, fn))
        return lens.model(**script.inputs).logits


def patched_by_torch(
    lens: Any,
    base: il.Run,
    source: il.Run,
    metric: Callable[..., torch.Tensor],
    cells: Sequence[tuple[int, int]],
) -> torch.Tensor:
    """What `get_act_patch_resid_pre` finds in some cells (layer, position), by torch hooks alone.

    What enters a layer is what leaves the one before it, so layers count from 1.
    """
    found = []
    for layer, position in cells:
        block = lens.model.model.language_model.layers[layer - 1]
        kept: list[torch.Tensor] = []
        by_torch(lens, source, (block, lambda act, kept=kept: kept.append(act) or act))

        def put(act: torch.Tensor, at: int = position, donor: Any = kept[0]) -> torch.Tensor:
            new = act.clone()
            new[:, at] = donor[:, at]
            return new

        found.append(metric(by_torch(lens, base, (block, put))))
    return torch.stack(found)


# ---- TransformerLens' functions --------------------------------------------------------------


def patch_table(
    clean: Any, corrupted: Any, metric: Callable[..., torch.Tensor], site: str, **options: Any
) -> Any:
    """Its own sweep over all layers and positions; `clean` and `corrupted` are (model, tokens)."""
    (clean_model, clean_tokens), (model, tokens) = clean, corrupted
    with torch.no_grad():
        wanted = lambda name: name.endswith(f"hook_{site}")  # noqa: E731
        _, cache = clean_model.run_with_cache(clean_tokens, names_filter=wanted)
        return getattr(patching, f"get_act_patch_{site}")(model, tokens, cache, metric, **options)


def a_bridge(name: str) -> Any:
    """TransformerLens' own bridge around the same model, new, for a bridge changes its model.

    Built without `boot_transformers`, which may install packages.
    """
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformer_lens.model_bridge.supported_architectures.qwen2_5_vl import (
        Qwen2_5_VLArchitectureAdapter,
    )

    Qwen2_5_VLArchitectureAdapter.required_libraries = []  # torchvision, for its own loader
    model = il.load(name, dtype=torch.float64).model
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


def flipped(table: torch.Tensor) -> torch.Tensor:
    """For each cell the share of examples that then answer as the source does."""
    return (table > 0).double().mean(-1)


def attribute_directly(bound: Any, lens: Any, pairs: il.Pairs, column: int) -> Any:
    """Direct logit attribution of answers: source's minus base's, one row per component."""
    base, source = (
        torch.tensor([lens.encode(str(answer))[0] for answer in answers])
        for answers in (pairs.base_answers, pairs.source_answers)
    )
    with torch.no_grad():
        return direct_logit_attribution(bound, bound.tokens, source, base, pos=column)


def find_aligned(
    lens: Any, n: int, *, rank: int = 8, epochs: int = 15, seed: int = 3
) -> tuple[float, float]:
    """Its DAS: a subspace of the second latent that carries the answer.

    Returns the shares of held-out pairs that give the source's answer, with the subspace
    exchanged, and with states moved as far in a random one.
    """
    pairs = lens.task(n=n, seed=seed)
    run = lens.run([*pairs.base, *pairs.source])
    both = lens.transformer_lens(run)
    (column,) = set(lens.script(run).read_at)
    words = sorted({str(answer) for answer in (*pairs.base_answers, *pairs.source_answers)})
    ids = torch.tensor([lens.encode(word)[0] for word in words])
    targets = torch.tensor([words.index(str(answer)) for answer in pairs.source_answers])
    at = torch.tensor([int(il.latent[1].resolve(run.tokens, row)[0]) for row in range(2 * n)])

    def answers(rows: torch.Tensor) -> torch.Tensor:
        return both(rows)[:, column][:, ids]

    site, half = "blocks.0.hook_resid_pre", n // 2
    bases, sources = both.rows[:n], both.rows[n:]
    train, test = slice(0, half), slice(half, n)
    with torch.enable_grad():
        fitted = interchange.fit_das(
            both, site, bases[train], sources[train], targets[train], answers,
            rank=rank, epochs=epochs, lr=3e-2,
            base_positions=at[:n][train], source_positions=at[n:][train],
        )  # fmt: skip
    states = interchange.collect_activations(
        both, site, sources[test], answers, positions=at[n:][test]
    )
    move = interchange.SubspaceInterchange(fitted.basis)
    placebo = interchange.NormMatchedPlacebo(move, interchange.random_basis(64, rank, seed=0))
    shares = []
    for intervention in (move, placebo):
        logits = interchange.intervened_logits(
            both, site, intervention, bases[test], states, answers, positions=at[:n][test]
        )
        shares.append(float((logits.argmax(-1) == targets[test]).double().mean()))
    return shares[0], shares[1]


def probe_auc(lens: Any, n: int = 64) -> float:
    """Its sparse probe: is the answer a circle, from 8 dimensions of the second latent?"""
    task = lens.task(n=n, seed=1)
    bound = lens.transformer_lens(lens.run(task.base))
    tokens = bound.inputs.tokens
    at = torch.tensor([int(il.latent[1].resolve(tokens, row)[0]) for row in range(n)])
    states = interchange.collect_activations(
        bound, "blocks.0.hook_resid_pre", bound.rows, bound, positions=at
    )
    labels = torch.tensor([answer == "circle" for answer in task.base_answers]).long()
    return fit_sparse_probe(states.float(), labels, k=8).metrics.roc_auc


def on_one_pair_after_another(lens: Any, pairs: il.Pairs) -> dict[str, float]:
    """Patching, lens and attributions of bound runs, each against its oracle."""
    base, source = lens.run(pairs.base), lens.run(pairs.source)
    bound, donor = lens.transformer_lens(base), lens.transformer_lens(source)
    metric = answer_metric(lens, pairs, base)
    (column,) = set(lens.script(base).read_at)
    ours = (donor, donor.tokens), (bound, bound.tokens)
    table = patch_table(*ours, metric, "resid_pre", reduce="none").values
    places = [int(il.image.resolve(base.tokens, 0)[0]), *il.latent.resolve(base.tokens, 0), column]
    cells = [(layer, int(place)) for layer in (1, 2) for place in places]
    by_hooks = patched_by_torch(lens, base, source, metric, cells)
    gaps = [abs(table[cell] - value).max() for cell, value in zip(cells, by_hooks, strict=True)]

    bridge = a_bridge("latent-content")
    theirs = (bridge, donor.tokens), (bridge, bound.tokens)
    some = pd.DataFrame(cells, columns=["layer", "pos"])
    blind = patch_table(
        *theirs, metric, "resid_pre", baseline=True, reduce="none",
        index_axis_names=None, index_df=some,
    ).effect()  # fmt: skip

    with torch.no_grad():
        last = logit_lens(bound, bound.tokens, positions=None).values[-1]
        logits = bound(bound.tokens)
    parts = attribute_directly(bound, lens, pairs, column).attribution
    return {
        "patching: largest difference from plain torch hooks": float(max(gaps)),
        "patching: answers flipped in the best cell": float(flipped(table).max()),
        "patching on a bridge: largest effect, as it sees no picture": float(blind.abs().max()),
        "logit lens: its last row against the logits": float((last - logits).abs().max()),
        "direct attribution: all terms against the logits": float(
            (parts.sum(0) - metric(logits)).abs().max()
        ),
    }


def on_many_pairs(name: str) -> dict[str, float]:
    """Interchange and probes on one model."""
    lens = il.load(name)
    moved, placebo = find_aligned(lens, n=64)
    return {
        f"{name}: held-out answers moved by its DAS": moved,
        f"{name}: the same by its placebo": placebo,
        f"{name}: AUC of its sparse probe": probe_auc(lens),
    }


def findings() -> dict[str, float]:
    """Every number of this page, by what it is."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # TransformerLens keeps its tables in the default
    try:
        lens = il.load("latent-content", dtype=torch.float64)
        found = on_one_pair_after_another(lens, seen_pairs(lens, n=8))
    finally:
        torch.set_default_dtype(default)
    return found | on_many_pairs("latent-content") | on_many_pairs("latent-ignored")


def main() -> None:
    """Run each function once, and print what it found beside what it should."""
    for what, number in findings().items():
        print(f"{number:8.2g}  {what}")


if __name__ == "__main__":
    main()
