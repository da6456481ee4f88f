"""The latent decode loop: inside Hugging Face's own `generate`, with its sampling and stopping.

`generate(custom_generate=loop)` prepares inputs, positions, cache, logits processors and stopping
criteria; this loop takes the place of the token-by-token part. Each row keeps its own span state,
so rows of a batch open and close their spans when they like.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import nnsight
import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.generation import LogitsProcessorList

from imaginelens.hooks import engine
from imaginelens.hooks.entries import Chunk
from imaginelens.hooks.insertion import Reinsertion
from imaginelens.hooks.mixture import Mixture
from imaginelens.hooks.registry import HookRegistry
from imaginelens.hooks.sampling import Sampler
from imaginelens.hooks.sketchpad import Sketch, Sketcher
from imaginelens.hooks.spans import EndedBy, OpenedBy, SpanRecord, part_of, records, segments
from imaginelens.hooks.spec import LatentSpec, SpanTokens
from imaginelens.hooks.tokens import Kind, TokenMap
from imaginelens.hooks.widening import count_on


@dataclass
class LatentLoop:
    """One generation: its span state per row, and what it leaves behind.

    Attributes:
        tokens: the map of everything read so far, a column per step.
        first_inputs: the vision inputs. They are kept from `generate`, which would run the vision
            tower before this loop begins, where no hook sees it.
        fed: row, column and state of every latent as it was fed, after all hooks.
        spans: the record of every span, in the order of opening.
    """

    wrapped: nnsight.NNsight
    registry: HookRegistry
    tokens: TokenMap
    chunk_base: Mapping[str, Any]
    first_inputs: Mapping[str, torch.Tensor]
    spec: LatentSpec | None
    span_tokens: SpanTokens | None
    seed: int | None = None
    keep_logits: bool = False
    fed: list[tuple[int, int, torch.Tensor]] = field(default_factory=list)
    spans: list[SpanRecord] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    forwards: int = 0
    seconds: float = 0.0
    resume_at: int | None = None  # the first column to be read: the cache holds those before
    _z: torch.Tensor | None = None
    _read: torch.Tensor | None = None  # what the last forward was fed, or would have been
    _open: list[SpanRecord | None] = field(default_factory=list)
    _calm: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    _positions: list[torch.Tensor] = field(default_factory=list)
    _images: list[torch.Tensor] = field(default_factory=list)  # embeddings of each row's pictures
    _again: Reinsertion | None = None  # image tokens that come again
    _sketches: dict[int, Sketch] = field(default_factory=dict)  # by row, while they are drawn

    @property
    def position_ids(self) -> torch.Tensor | None:
        """The positions the model was given, of everything it has read."""
        return torch.cat(self._positions, dim=-1) if self._positions else None

    @property
    def inserted(self) -> list[torch.Tensor] | None:
        """The image tokens that came again in each row; None if the family has none."""
        return None if self._again is None else self._again.kept(self.tokens)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: Callable[..., torch.Tensor],
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Generate until every row has stopped; the signature is that of `generate`'s samplers."""
        started = time.perf_counter()
        n_rows = len(input_ids)
        if self.resume_at is None:
            self.spans, self._open = records(self.tokens), [None] * n_rows
        self._calm = np.zeros(n_rows, dtype=int)
        unfinished = torch.ones(n_rows, dtype=torch.bool, device=input_ids.device)
        if self.spec is not None and self.spec.inserts is not None:
            self._again = Reinsertion(self.spec.inserts)
            kwargs["position_ids"] = count_on(kwargs["position_ids"], self.tokens)
        sampler = Sampler(generation_config, self.seed, input_ids.device)
        if self.resume_at is None:
            inputs = model.prepare_inputs_for_generation(
                input_ids, is_first_iteration=True, **kwargs
            )
            *earlier, last = segments(self.tokens, self.spec)
            for columns in earlier:
                self._forward(model, part_of(inputs, *columns, self.first_inputs), *columns)
            inputs = part_of(inputs, *last, self.first_inputs) if earlier else inputs
            start = last[0]
        else:
            start = self.resume_at
            inputs = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=input_ids.shape[1] - start, **kwargs
            )
        while True:
            outputs = self._forward(model, inputs, start, input_ids.shape[1])
            kwargs = model._update_model_kwargs_for_generation(
                outputs, kwargs, is_encoder_decoder=model.config.is_encoder_decoder
            )
            logits = outputs.logits[:, -1]
            if self.keep_logits:
                self.logits.append(logits.detach().to(copy=True))
            scores = logits_processor(input_ids, logits.to(torch.float32, copy=True))
            sampled = torch.where(unfinished, sampler(scores), sampler.pad)
            if self.spec is not None and isinstance(self.spec.feeds, Mixture):
                self._mix(self.spec.feeds, logits, logits_processor, input_ids, sampler, model)
                sampled = torch.where(self._inside(sampled), scores.argmax(-1), sampled)
            token, fed = self._advance(sampled, input_ids, unfinished, sampler)
            start = input_ids.shape[1]
            input_ids = torch.cat([input_ids, token[:, None]], dim=-1)
            self._grow(token, fed, unfinished)
            if self.spec is not None and self.spec.on_grid:
                self._place(kwargs["position_ids"])
            # A row inside a span cannot stop: what it emits there is not text.
            unfinished = unfinished & (fed | ~stopping_criteria(input_ids, None))
            if not unfinished.any() or input_ids.shape[1] >= generation_config.max_length:
                break
            inputs = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=1, **kwargs
            )
        self._take_back(fed)
        self.seconds = time.perf_counter() - started
        return input_ids

    def take_up(
        self,
        z: torch.Tensor,
        fed: list[tuple[int, int, torch.Tensor]],
        spans: list[list[SpanRecord]],
        positions: list[torch.Tensor],
    ) -> None:
        """Begin in the middle of a run: with the state about to be fed, what was fed before, and
        the spans of each row, the last of which is open."""
        self._z, self.fed, self._positions = z, fed, positions
        self._open = [own[-1] for own in spans]
        self.spans = [span for own in spans for span in own]
        self.forwards = 1

    def _forward(
        self, model: PreTrainedModel, inputs: dict[str, Any], start: int, stop: int
    ) -> Any:
        """Run the model over columns it has not read yet, latents laid over the embeddings."""
        first = self.forwards == 0
        chunk = Chunk(
            self.tokens,
            start,
            stop,
            has_images=first and bool(self.chunk_base.get("has_images")),
            projector_rows=self.chunk_base.get("projector_rows"),
        )
        self.forwards += 1
        if inputs.get("position_ids") is not None:
            self._positions.append(inputs["position_ids"])
        states: list[torch.Tensor] = []
        read = {"ln_final.hook_normalized": lambda act: states.append(act[:, -1].detach())}
        again = self._again is not None and len(self._again.rows(self.tokens, stop)) > 0
        looked: dict[str, torch.Tensor] = {}
        if again:
            read |= self._watching(looked)
        if first:
            inputs.pop("mm_encoder_outputs", None)
            inputs.update(self.first_inputs)
        laid = self.tokens.kind[:, start:stop] == Kind.LATENT
        outputs = self.registry.run(
            self.wrapped,
            model,
            {**inputs, "return_dict": True},
            chunk,
            overlay=self._laid(chunk, laid, model),
            read=read if self._may_feed(chunk, laid) else None,
            workers=[*self._unembedding(laid), *(self._looking() if first else ())],
        )
        self._read = self._z
        if self._again is not None and again:
            self._again.images = self._images
            self._again.fill(self.tokens, stop, states[0], looked)
        if states and self.spec is not None:
            h, project = states[0], self.spec.project
            if isinstance(project, Sketcher):
                self._z = self._draw(project, h, laid[:, -1], model)
            elif project is not None:
                self._z = project(h, torch.as_tensor(laid[:, -1]).to(h.device))
            else:
                self._z = h
        return outputs

    def _looking(self) -> list[engine.Worker]:
        """Where latents need the pictures themselves: a worker that keeps their embeddings."""
        draws = self.spec is not None and isinstance(self.spec.project, Sketcher)
        if not draws and self._again is None:
            return []

        def keep(act: torch.Tensor) -> torch.Tensor:
            rows = range(len(self.tokens))
            self._images = [act[row, self.tokens.columns(row, Kind.IMAGE)] for row in rows]
            return act

        site = self.registry["blocks.0.hook_resid_pre"]
        return [engine.visit(self.wrapped, site.path, "input", keep)]

    def _watching(
        self, looked: dict[str, torch.Tensor]
    ) -> dict[str, Callable[[torch.Tensor], None]]:
        """What keeps, of each layer, how the last position looks at all of them."""

        def keep(name: str, pattern: torch.Tensor) -> None:
            looked[name] = pattern[:, :, -1].detach()

        names = self.registry.match("blocks.*.attn.hook_pattern")
        return {name: partial(keep, name) for name in names}

    def _draw(
        self, sketcher: Sketcher, h: torch.Tensor, laid: np.ndarray, model: PreTrainedModel
    ) -> torch.Tensor:
        """The next latent of each row that has a sketch, or whose last token opened one."""
        assert self.span_tokens is not None
        merger = model.get_submodule(self.registry["vision_projector.hook_out"].path)
        z = torch.zeros_like(h)
        for row in range(len(h)):
            span = self._open[row]
            if not laid[row] and self.tokens.ids[row, -1] == self.span_tokens.open:
                drawn = [state for r, _, state in self.fed if r == row]
                images = torch.cat([self._images[row], *(state[None] for state in drawn)])
                self._sketches[row] = sketcher.begin(images, merger)
            elif span is None or self.spec is None or span.steps >= self.spec.max_steps:
                self._sketches.pop(row, None)
            if row in self._sketches:
                z[row] = self._sketches[row].draw(h[row])
        return z

    def _place(self, positions: torch.Tensor) -> None:
        """Put the newest column of positions, (axis, row, column), where a picture's cell, or the
        text behind it, would stand."""
        kind = self.tokens.kind[:, -2:]
        for row in np.flatnonzero((kind == Kind.LATENT).any(1)):
            span = [s for s in self.spans if s.row == row][-1]
            grid, axes = self.tokens.grids[row][-1], positions[-3:, row]
            offset = [0, *divmod(span.steps - 1, grid.cols)]
            if kind[row, 1] != Kind.LATENT:
                offset = [max(grid.rows, grid.cols)] * 3
            axes[:, -1] = axes[0, span.column] + axes.new_tensor(offset)

    def _may_feed(self, chunk: Chunk, laid: np.ndarray) -> bool:
        """Whether the hidden state of this forward can become the next input of some row."""
        if self.spec is None or self.span_tokens is None or self.spec.feeds != "state":
            return False
        if self.spec.trigger == "prompt":
            return chunk.stop < self.tokens.prompt_width
        # the token sampled now may open a span, or the state may be asked for by the criterion
        if self.spec.slot == "replace" or self.spec.criterion is not None:
            return True
        if self.spec.trigger == "always" and chunk.stop == self.tokens.prompt_width:
            return True
        opened = self.tokens.ids[:, chunk.stop - 1] == self.span_tokens.open
        return bool((laid[:, -1] | opened).any())

    def _unembedding(self, laid: np.ndarray) -> list[engine.Worker]:
        """Where the output head reads the projected state: a worker that gives it that."""
        if not laid.any():
            return []
        last = torch.tensor([laid.shape[1] - 1])
        return unembed_projected(
            self.wrapped, self.registry, self.spec, torch.as_tensor(laid), last
        )

    def _laid(
        self, chunk: Chunk, laid: np.ndarray, model: PreTrainedModel
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What is laid over the embeddings: latents, and image tokens that come again."""
        overlay = self._overlay(chunk, laid, model) if laid.any() else None
        if self._again is None:
            return overlay
        return self._again.over(overlay, self.tokens, chunk.start, chunk.stop)

    def _overlay(
        self, chunk: Chunk, laid: np.ndarray, model: PreTrainedModel
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Show the states to `hook_latent`, note what is fed, and lay it over the embeddings."""
        places = np.flatnonzero(laid.any(0))
        columns = chunk.start + places
        if self.spec is not None and self.spec.feeds == "embedding":
            ids = torch.as_tensor(self.tokens.ids[:, columns], device=model.device)
            z = model.get_input_embeddings()(ids).detach()
        elif self._again is not None:
            assert self._z is not None
            z = self._again.states(columns, self._z)
        else:
            assert self._z is not None  # a row can only be fed after a forward that was read
            z = self._z[:, None]
        z = self.registry.on_latents(z, chunk, columns)
        for row, place in np.argwhere(laid[:, places]).tolist():
            self.fed.append((row, int(columns[place]), z[row, place].detach().clone()))
        self._z = z[:, -1]
        mask = torch.as_tensor(laid[..., None])

        def lay(embeds: torch.Tensor) -> torch.Tensor:
            spread = torch.zeros_like(embeds)
            spread[:, places] = z.to(embeds)
            return torch.where(mask.to(embeds.device), spread, embeds)

        return lay

    def _mix(
        self,
        mixture: Mixture,
        logits: torch.Tensor,
        processors: Any,
        input_ids: torch.Tensor,
        sampler: Sampler,
        model: PreTrainedModel,
    ) -> None:
        """Make the soft token of the next position, and count the steps that were sure of it."""
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # a text that is dictated replaces what is written, not what is imagined
        own = LogitsProcessorList(p for p in processors if not getattr(p, "dictates", False))
        self._z = mixture(own(input_ids, exact.clone()), model.get_input_embeddings())
        calm = np.asarray(mixture.is_calm(exact, sampler.temperature).cpu())
        self._calm = np.where(calm, self._calm + 1, 0)

    def _inside(self, like: torch.Tensor) -> torch.Tensor:
        """Which rows are in a span, or about to begin with one: they write their likeliest token,
        however tokens are sampled elsewhere."""
        first = self.tokens.width == self.tokens.prompt_width
        return torch.tensor([first or s is not None for s in self._open], device=like.device)

    def _advance(
        self,
        sampled: torch.Tensor,
        input_ids: torch.Tensor,
        unfinished: torch.Tensor,
        sampler: Sampler,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Move every row's span state by one step: the token to emit, and who is fed a latent."""
        fed = torch.zeros_like(unfinished)
        if self.spec is None or self.span_tokens is None or self.spec.trigger == "prompt":
            return sampled, fed
        token = sampled.clone()
        ends = self._criterion()
        for row in torch.nonzero(unfinished)[:, 0].tolist():
            token[row], fed[row] = self._advance_row(
                row, int(sampled[row]), int(input_ids[row, -1]), bool(ends[row]), sampler.ends
            )
        return token, fed

    def _criterion(self) -> np.ndarray:
        if self.spec is not None and isinstance(self.spec.feeds, Mixture):
            return self._calm >= self.spec.feeds.patience
        if self.spec is None or self.spec.criterion is None or self._read is None:
            return np.zeros(len(self._open), dtype=bool)
        return np.asarray(self.spec.criterion(self._read).cpu(), dtype=bool)

    def _advance_row(
        self, row: int, token: int, last: int, criterion: bool, text_ends: frozenset[int]
    ) -> tuple[int, bool]:
        spec, ids = self.spec, self.span_tokens
        assert spec is not None
        assert ids is not None
        step = self.tokens.width - self.tokens.prompt_width
        forced = self._due(row, step)
        span = self._open[row]
        opening = False
        if span is None:
            if forced:
                token = ids.open
            opened = token if spec.slot == "replace" else last
            opening = opened == ids.open and not (spec.slot == "replace" and self._spent(row))
            if spec.trigger == "always":
                opening = step == 0
            if not opening:
                return token, False
            before = self._due(row, step - (spec.slot == "after"))
            by: OpenedBy = "forced" if before else "sampled"
            span = self._open[row] = SpanRecord(row, "always" if spec.trigger == "always" else by)
            self.spans.append(span)
        ended = self._ended(row, span, token, criterion, text_ends)
        if ended is not None and not (opening and spec.slot == "replace"):
            span.ended_by = ended
            self._open[row] = None
            stays = ended in ("reopened", "end of text") or not spec.force_close
            return (token if stays else ids.close), False
        span.column = self.tokens.width if span.column < 0 else span.column
        span.steps += 1
        keeps_id = spec.emit == "sampled" or (opening and spec.slot == "replace")
        return (token if keeps_id else ids.pad), True

    def _due(self, row: int, step: int) -> bool:
        """Whether the loop itself writes the open token at this generated position."""
        assert self.spec is not None
        if self.spec.trigger == "forced" and step == self.spec.forced_at:
            return True
        if self.spec.cue is None or step < 0:
            return False
        start = self.tokens.prompt_width
        return self.spec.cue.opens(self.tokens.ids[row, start : start + step].tolist())

    def _ended(
        self,
        row: int,
        span: SpanRecord,
        token: int,
        criterion: bool,
        text_ends: frozenset[int],
    ) -> EndedBy | None:
        assert self.spec is not None
        assert self.span_tokens is not None
        if self.spec.reopens and not self.spec.fixed and token == self.span_tokens.open:
            return "reopened"
        others = [s for s in self.spans if s.row == row and s is not span]
        if not self.spec.multi_span and any(s.ended_by != "reopened" for s in others):
            return None  # Mirage's release never ends a second span
        if span.steps >= self.spec.max_steps:
            return "cap"
        if self._spent(row):
            return "budget"
        if criterion:
            return "criterion"
        if token == self.span_tokens.close and not self.spec.fixed:
            return "close"
        # inside a mixture the likeliest token is text, which may end
        if isinstance(self.spec.feeds, Mixture) and token in text_ends and not self.spec.fixed:
            return "end of text"
        return None

    def _spent(self, row: int) -> bool:
        """Whether the row has fed as many latents as a run may."""
        assert self.spec is not None
        fed = sum(s.steps for s in self.spans if s.row == row)
        return self.spec.budget is not None and fed >= self.spec.budget

    def _grow(self, token: torch.Tensor, fed: torch.Tensor, unfinished: torch.Tensor) -> None:
        n_rows = len(token)
        kind = np.where(fed.cpu(), Kind.LATENT, np.where(unfinished.cpu(), Kind.TEXT, Kind.PAD))
        span, step = np.full(n_rows, -1), np.full(n_rows, -1)
        for row in np.flatnonzero(fed.cpu()):
            of_row = [s for s in self.spans if s.row == row]
            span[row] = len(of_row) - 1
            step[row] = sum(s.steps for s in of_row) - 1
        self.tokens = self.tokens.grown(token.cpu().numpy(), kind, span, step)

    def _take_back(self, fed: torch.Tensor) -> None:
        """The length ended the run before these rows' next latents were read: they are none."""
        for row in torch.nonzero(fed)[:, 0].tolist():
            span = self._open[row]
            assert span is not None
            span.steps -= 1
            span.column = span.column if span.steps else -1
            self.tokens.kind[row, -1] = Kind.PAD
            self.tokens.span[row, -1] = self.tokens.step[row, -1] = -1


def unembed_projected(
    wrapped: nnsight.NNsight,
    registry: HookRegistry,
    spec: LatentSpec | None,
    is_latent: torch.Tensor,
    columns: torch.Tensor | None = None,
) -> list[engine.Worker]:
    """Where a family's output head reads the projected state: the worker that gives it that.

    Args:
        is_latent: (example, position), whether the input there is a latent.
        columns: the positions whose logits are asked for; None is all. Some models ignore it.
    """
    project = None if spec is None else spec.project
    if spec is None or not spec.project_unembeds or project is None:
        return []
    assert not isinstance(project, Sketcher)  # its spec is refused

    def put(act: torch.Tensor) -> torch.Tensor:
        whole = columns is None or act.shape[1] == is_latent.shape[1]
        mask = is_latent if whole else is_latent[:, columns]
        return project(act, mask.to(act.device))

    return [engine.visit(wrapped, registry["unembed.hook_out"].path, "input", put)]
