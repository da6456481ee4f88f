"""A run taken up again at a latent, in many rows at once, each edited elsewhere.

What was written before the latent stays as it was, with its keys and values: only the loop from
there on runs, from the state in which it was when it read that latent.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import GenerationMixin

from imaginelens.hooks import engine
from imaginelens.hooks.entries import Entry
from imaginelens.hooks.generate import LatentLoop
from imaginelens.hooks.metrics import Readout, Targets
from imaginelens.hooks.prefix import Prefix, picked_tokens, repeated
from imaginelens.hooks.prompts import ROW_FIELDS, Prompt
from imaginelens.hooks.readout import answer_columns, read_out
from imaginelens.hooks.run import Run, finish
from imaginelens.hooks.sketchpad import Sketcher
from imaginelens.hooks.spans import SpanRecord
from imaginelens.hooks.spec import LatentSpec
from imaginelens.hooks.tokens import Kind, TokenMap

if TYPE_CHECKING:
    from imaginelens.hooks.model import LatentModel


def why_not_resumed(lens: "LatentModel", run: Run) -> str | None:
    """Why a run cannot be taken up at its latents, in words; None if it can be."""
    spec = lens.spec
    _, _, generation, *_ = run.options
    if not isinstance(spec, LatentSpec) or spec.trigger == "prompt":
        return "latents are not fed back while the model writes"
    if spec.feeds != "state" or isinstance(spec.project, Sketcher):
        return f"what {spec.name} feeds back depends on more than the state before it"
    if spec.inserts is not None or spec.on_grid:
        return f"{spec.name} places its latents by what came before"
    if generation:
        return f"generation has options of its own ({', '.join(generation)})"
    if lens.behaviour.first_position:
        return "the class counts positions anew wherever it goes on"
    if not lens.behaviour.crops:
        return "the cache of sliding layers cannot be cut back to a latent"
    if lens.model.main_input_name != "input_ids" or run.position_ids is None:
        return f"{type(lens.model).__name__} does not continue token ids by itself"
    return None


def resumed(
    lens: "LatentModel",
    run: Run,
    prefix: Prefix,
    rows: Sequence[int],
    column: int,
    entries: Sequence[Entry],
) -> Run:
    """Generate again from the latent at a column on, in copies of some rows of a run.

    Args:
        prefix: of the run's script, read up to that column.
        entries: what is active; it acts from that column on.
    """
    started = time.perf_counter()
    limit, latents, _, seed, _ = run.options
    spec = lens.spec if latents is None else latents.applied_to(lens.spec)
    device, index = run.sequences.device, list(rows)
    tokens = _until(picked_tokens(run.tokens, rows), column)
    loop = LatentLoop(
        lens.nnsight, lens.registry, tokens, {}, {}, spec, lens.span_tokens, seed, False,
        resume_at=column,
    )  # fmt: skip
    loop.take_up(*_state(run, index, column))
    config = lens.generation_config(limit, {})
    config.max_new_tokens -= column + 1 - run.tokens.prompt_width
    inputs: dict[str, Any] = {
        "input_ids": torch.as_tensor(tokens.ids, device=device),
        "attention_mask": _mask(run, index, column + 1),
        "past_key_values": repeated(prefix.cache, rows),
        **_positions(run, index, column + 1),
        **_types(run, index, column + 1, lens.behaviour.written_type),
    }
    with torch.no_grad(), engine.untouched(lens.remembering), lens.registry.scope(entries):
        sequences = GenerationMixin.generate(
            lens.model, **inputs, generation_config=config, custom_generate=loop.__call__
        )
        acted = lens.registry.acting("hook_latent")
    empty = torch.empty(0, lens.structure.d_model, dtype=lens.model.dtype, device=device)
    prompt = _picked_prompt(run.prompt, index)
    new = finish(
        loop, sequences, prompt, lens.find_answer, None, (), lens.registry.table, empty, None
    )
    seconds = time.perf_counter() - started
    return replace(new, options=run.options, acted=acted, seconds=seconds)


def read_resumed(
    lens: "LatentModel",
    new: Run,
    prefix: Prefix,
    rows: Sequence[int],
    targets: Targets,
    unedited: Readout,
    entries: Sequence[Entry],
) -> Readout:
    """Read the answers of a run that was taken up behind a prefix, with `entries` active; those
    reported are what it wrote."""
    script = lens.script(new, endings=targets.base_ids)
    columns = answer_columns(script, targets)
    if min(columns) < prefix.stop:  # no row has an answer
        return lens.read_answer(new, targets, unedited=unedited, free=True)
    behind = replace(prefix, script=script, cache=repeated(prefix.cache, rows))
    behind = replace(behind, columns=tuple(columns), end=max(columns) + 1)
    logits = behind.read(range(len(new)), entries, acted=new.acted)
    found = read_out(script, targets, logits, columns, lens.decode, unedited)
    return replace(found, answers=tuple(new.answers))


def _until(tokens: TokenMap, column: int) -> TokenMap:
    """A map up to a column and with it, as it was when that column was about to be read."""
    stop = column + 1
    kind = tokens.kind[:, :stop].copy()
    kind[kind == Kind.ANSWER] = Kind.TEXT
    return replace(
        tokens,
        ids=tokens.ids[:, :stop],
        kind=kind,
        image=tokens.image[:, :stop],
        cell=tokens.cell[:, :stop],
        box=tokens.box[:, :stop],
        span=tokens.span[:, :stop],
        step=tokens.step[:, :stop],
        final=False,
    )


def _state(
    run: Run, rows: list[int], column: int
) -> tuple[
    torch.Tensor, list[tuple[int, int, torch.Tensor]], list[list[SpanRecord]], list[torch.Tensor]
]:
    """What the loop held as it was about to read a latent: that latent, those fed before it, the
    spans of each row, the last of which is open, and the positions read so far."""
    steps = run.tokens.step[rows, column]
    z = run.latents[rows, steps]
    fed, spans = [], []
    for new, row in enumerate(rows):
        columns = run.tokens.columns(row, Kind.LATENT)
        before = columns[columns < column]
        fed += [(new, int(c), run.latents[row, run.tokens.step[row, c]]) for c in before]
        own = [span for span in run.trigger.spans if span.row == row]
        number = int(run.tokens.span[row, column])
        so_far = columns[(columns <= column) & (run.tokens.span[row, columns] == number)]
        now = SpanRecord(new, own[number].opened_by, own[number].column, len(so_far))
        spans.append([replace(span, row=new) for span in own[:number]] + [now])
    positions = run.position_ids
    assert positions is not None
    return z, fed, spans, [_of_rows(positions, rows)[..., :column]]


def _of_rows(positions: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return positions[rows] if positions.dim() == 2 else positions[:, rows]


def _positions(run: Run, rows: list[int], stop: int) -> dict[str, torch.Tensor]:
    assert run.position_ids is not None
    return {"position_ids": _of_rows(run.position_ids, rows)[..., :stop]}


def _mask(run: Run, rows: list[int], stop: int) -> torch.Tensor:
    mask = run.prompt.mask[rows]
    return torch.cat([mask, mask.new_ones(len(mask), stop - mask.shape[1])], dim=1)


def _types(run: Run, rows: list[int], stop: int, written: int) -> dict[str, torch.Tensor]:
    """Token types, of generated tokens too."""
    found = {}
    for name, generated in (("mm_token_type_ids", 0), ("token_type_ids", written)):
        types = run.prompt.inputs.get(name)
        if types is not None:
            own = types[rows]
            new = own.new_full((len(own), stop - own.shape[1]), generated)
            found[name] = torch.cat([own, new], dim=1)
    return found


def _picked_prompt(prompt: Prompt, rows: list[int]) -> Prompt:
    """The prompt of copies of some rows; its pictures have been read and stay as they were."""
    inputs = {k: v for k, v in prompt.inputs.items() if k != "position_ids"}
    inputs |= {k: v[rows] for k, v in inputs.items() if k in ROW_FIELDS}
    pictures = None if prompt.pictures is None else tuple(prompt.pictures[row] for row in rows)
    return replace(prompt, inputs=inputs, pictures=pictures, single=False)
