"""`LatentModel`: any Hugging Face image-text-to-text model, with named sites and live latents."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import nnsight
import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import (
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)

from imaginelens.hooks import answers, engine
from imaginelens.hooks.answers import AnswerFinder
from imaginelens.hooks.behaviour import find_behaviour
from imaginelens.hooks.bytoken import by_token
from imaginelens.hooks.cache import ActivationCache
from imaginelens.hooks.depth import DepthSpec, unrolled
from imaginelens.hooks.describe import Description, describe
from imaginelens.hooks.edits import Edit
from imaginelens.hooks.entries import CaptureEntry, Chunk, HookEntry
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.families import (
    Family,
    check_rows,
    equipped,
    family_of,
    family_on_disk,
    named,
    note,
)
from imaginelens.hooks.generate import LatentLoop, unembed_projected
from imaginelens.hooks.grid import lay_out
from imaginelens.hooks.inputs import InputEdit
from imaginelens.hooks.landing import Landing
from imaginelens.hooks.loading import adapts, load_model, processor_home, readable
from imaginelens.hooks.media import audio_token_id, lay_out_videos, video_token_id
from imaginelens.hooks.metrics import Metric, Readout, Targets, log_prob, logit_diff
from imaginelens.hooks.names import NamesFilter
from imaginelens.hooks.nnterp_names import NnterpNames
from imaginelens.hooks.patching import Context, PatchResult, ablate, check_arguments, patch
from imaginelens.hooks.pixels import PixelEdit, edit_pixels
from imaginelens.hooks.placement import check_placed
from imaginelens.hooks.positions import Positions, answer, image, latent, selectors
from imaginelens.hooks.processors import load_processor
from imaginelens.hooks.prompts import PIXELS, Prompt, make_prompt
from imaginelens.hooks.raw_traces import RawTraces, has_run, heard, named_entries
from imaginelens.hooks.readout import answer_columns, read_out
from imaginelens.hooks.registry import HookRegistry
from imaginelens.hooks.rewriting import ForcedText, OwnLimit, Speller, as_written_by, rewritten
from imaginelens.hooks.run import Run, assemble, finish, wanted_while_generating
from imaginelens.hooks.script import Script, script_of
from imaginelens.hooks.sites import find_sites
from imaginelens.hooks.sketch_family import check_canvas
from imaginelens.hooks.spans import mark_placeholders, without_latents
from imaginelens.hooks.spec import Force, LatentSpec, Skip
from imaginelens.hooks.structure import find_structure
from imaginelens.hooks.textedits import TextEntry, edit_entry
from imaginelens.hooks.textmodels import text_checkpoint
from imaginelens.hooks.textspans import TextSpec
from imaginelens.hooks.tokens import Kind, TokenMap, map_prompt
from imaginelens.hooks.vocabspans import VocabSpec, states_of_words, without_feedback
from imaginelens.hooks.widening import Widened, mark_inserted, settle_inserted, widened

if TYPE_CHECKING:
    from imaginelens.hooks.bound import BoundModel

Hooks = Sequence[tuple[NamesFilter, Callable[..., torch.Tensor | None]]]
DEFAULT_POSITIONS = (latent, answer)


class LatentModel:
    """A multimodal model whose named states can be read, patched, ablated and swapped.

    Args:
        model: an instantiated Hugging Face model; it is wrapped, never changed. A TransformerBridge
            is taken with its components, and its hooks go on acting; of a wrapper of nnsight's, the
            model inside.
        processor: its processor; without one only encoded inputs are taken.
        spec: how the family feeds latents back (`il.LatentSpec`), writes them as tokens
            (`il.VocabSpec`), imagines in words (`il.TextSpec`) or recurs in depth
            (`il.FAMILIES["huginn"].with_steps(8)`), or the name of an entry of `il.FAMILIES`; None
            recognises it, `False` is no family.
        answer: finds the answer in what the model wrote: a function of `il.answers`, or a callable
            from text to text, which is shown all of it, the family's own tokens included; None is
            the family's own way, or all that was written.

    Attributes:
        family: how it imagines; `spec` is the same if it feeds latents back, or else None.
        registry: every site by name, and what is active on it.
        structure: where the parts of the model are.
        behaviour: what it does beyond a plain causal decoder.
        nnsight: the model for nnsight traces of your own, in which edits act as well.
    """

    def __init__(
        self,
        model: nn.Module | nnsight.Envoy,
        processor: Any = None,
        spec: Family | str | Literal[False] | None = None,
        *,
        answer: Callable[[str], Any] | None = None,
    ) -> None:
        model = model._module if isinstance(model, nnsight.Envoy) else model
        # of a TransformerBridge, the model that it has put its components into
        model = getattr(model, "original_model", model)
        if not isinstance(model, PreTrainedModel):
            raise InputError(
                f"il.LatentModel was given a {type(model).__name__}; pass a Hugging Face model, "
                "such as AutoModelForImageTextToText.from_pretrained(...) gives"
            )
        check_placed(model)
        self.model: PreTrainedModel = model
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        found = family_of(model.config, self.tokenizer) if spec is None else named(spec)
        self.family: Family | None = found or None
        depth = unrolled(model, found) if isinstance(found, DepthSpec) else None
        self.structure = find_structure(model) if depth is None else depth.structure
        note(self.family)
        self.spec: LatentSpec | None = (
            equipped(found, model) if isinstance(found, LatentSpec) else None
        )
        self.span_tokens = (
            None if self.spec is None else self.spec.resolve(self.tokenizer, model.config)
        )
        usual = None if self.family is None else self.family.answer
        words = self.family if isinstance(self.family, VocabSpec) else None
        self._spoken = {} if words is None else words.resolve(self.tokenizer)
        if self.family is not None:
            own = vars(self.span_tokens).values() if self.span_tokens is not None else self._spoken
            check_rows(self.family, tuple(own), model)
        strays = () if isinstance(self.family, TextSpec | None) else self.family.strings
        finder = answers.from_callable(answer or usual or answers.tail)
        self.find_answer: AnswerFinder = answers.without(finder, strays)
        table = find_sites(model, self.structure) if depth is None else depth.sites(model)
        table = table if words is None else without_feedback(table, words)
        self.registry = HookRegistry(table, depth=depth)
        self.behaviour = find_behaviour(model, len(self.structure.blocks))
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.nnsight = RawTraces(self)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        spec: Family | str | Literal[False] | None = None,
        answer: Callable[[str], Any] | None = None,
        dtype: torch.dtype | str = "auto",
        device_map: Any = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> "LatentModel":
        """Open a checkpoint from a local folder or the Hub.

        Raises:
            CheckpointError: the folder is not a checkpoint, holds no multimodal model, or a latent
                family that is ambiguous or incomplete.
        """
        spec = None if spec is None else named(spec)
        source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        options = {
            "dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation,
        }  # fmt: skip
        text = text_checkpoint(name, spec, **source)
        if text is None:
            model = load_model(name, **options, **source)
            with readable(name):
                processor = load_processor(processor_home(name), **source)
        else:
            model, processor, spec = text.load(**options, **source), text.tokenizer, text.family
        family = family_on_disk(adapts(name) or name, model, processor, spec, revision=revision)
        return cls(model.eval(), processor, family or False, answer=answer)

    # ---- running ----------------------------------------------------------------------------

    def run(
        self,
        inputs: Any = None,
        *,
        images: Any = None,
        text: str | None = None,
        names_filter: NamesFilter | Literal[False] = False,
        positions: Positions | Sequence[Positions] = DEFAULT_POSITIONS,
        max_new_tokens: int | None = None,
        latents: Skip | Force | None = None,
        generation: Mapping[str, Any] | None = None,
        seed: int = 0,
        keep_logits: bool = False,
    ) -> Run:
        """Generate, latents included, with everything that is registered active.

        Args:
            inputs: an example `{"images": ..., "text": ...}`, a list of examples (a batch), or a
                processor's dict. Or give `images` and `text`.
            names_filter: sites to capture at `positions`, one selector or several (default: latents
                and answer).
            max_new_tokens: latents count as tokens; default: the checkpoint's own, or 256.
            latents: `il.Skip()` or `il.Force(k)`.
            generation: further options of `generate` (`do_sample`, `temperature`,
                `logits_processor`, ...). The default is greedy.
            seed: for sampling, a private stream.
            keep_logits: keep the logits of every generated position in `run.logits`.

        Raises:
            EditTouchedNothing: an active edit reached no position, or changed nothing.
            InputError: the input is not one this model can take.
        """
        prompt = self.prompt(inputs, images=images, text=text)
        how = (max_new_tokens, latents, generation, seed, keep_logits)
        return self._generate(prompt, names_filter, selectors(positions), *how)

    def rerun(
        self,
        run: Run,
        *,
        names_filter: NamesFilter | Literal[False] = False,
        positions: Positions | Sequence[Positions] = DEFAULT_POSITIONS,
    ) -> Run:
        """Generate again from the prompt of a run, under the same options, as hooks are now."""
        return self._generate(run.prompt, names_filter, selectors(positions), *run.options)

    def prompt(self, inputs: Any = None, *, images: Any = None, text: str | None = None) -> Prompt:
        """Encode what `run` would run, without running it."""
        made = make_prompt(
            inputs,
            images=images,
            text=text,
            model=self.model,
            processor=self.processor,
            image_token_id=self.structure.image_token_id,
            style=None if self.family is None else self.family.prompt,
        )
        if self.spec is None or self.spec.inserts is None or self.span_tokens is None:
            return made
        padding = getattr(self.tokenizer, "pad_token_id", None) or 0
        return widened(made, self.spec.inserts, pad=self.span_tokens.pad, padding=padding)

    def tokens(self, inputs: Any) -> TokenMap:
        """Map the positions of a prompt without running the model."""
        prompt = inputs if isinstance(inputs, Prompt) else self.prompt(inputs)
        return self._marked(prompt, self.spec)

    def _generate(
        self,
        prompt: Prompt,
        names_filter: NamesFilter | Literal[False],
        positions: Sequence[Positions],
        max_new_tokens: int | None,
        latents: Skip | Force | None,
        generation: Mapping[str, Any] | None,
        seed: int,
        keep_logits: bool,
    ) -> Run:
        """Generate as hooks are now, and again for each edit of written imagination."""
        how = (max_new_tokens, latents, generation, seed, keep_logits)
        self.registry.begin()
        run = self._write(prompt, names_filter, positions, *how)
        entries = self.registry.text_edits()
        if entries:
            run = self.respelled(run, entries, names_filter=names_filter, positions=positions)
            run = replace(run, acted=run.acted | {entry.number for entry in entries})
        self.registry.judge(len(run), str(run.trigger))
        return run

    def respelled(
        self,
        run: Run,
        entries: Sequence[TextEntry],
        *,
        context: Context = "free",
        names_filter: NamesFilter | Literal[False] = False,
        positions: Sequence[Positions] = DEFAULT_POSITIONS,
    ) -> Run:
        """A run written again with its imagination edited: in free context the model goes on by
        itself behind each edited span, in fixed context the text behind it stays."""
        limit, *others = run.options
        _, generation, *_ = others
        limit = self.generation_config(limit, dict(generation or {})).max_new_tokens

        def write(forced: ForcedText) -> Run:
            most = max(forced.limits)
            new = self._write(run.prompt, names_filter, positions, most, *others, forced=forced)
            return replace(new, options=run.options)

        def decode(ids: Sequence[int]) -> str:
            return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

        speller = Speller(self.encode, decode)
        return rewritten(run, entries, context, limit=limit, write=write, spell=speller)

    def retell(self, run: Run, *, like: Run) -> Run:
        """Run an input again while it writes what another run wrote; its latents are its own.

        This is how two inputs are compared at one text: everything between them but the text and
        the number of latents may differ.
        """
        forced = as_written_by(like)
        forced.width = run.tokens.prompt_width
        _, *others = run.options
        limit = max(map(len, forced.ids))
        new = self._write(run.prompt, False, DEFAULT_POSITIONS, limit, *others, forced=forced)
        return replace(new, options=run.options)

    def _write(
        self,
        prompt: Prompt,
        names_filter: NamesFilter | Literal[False],
        positions: Sequence[Positions],
        max_new_tokens: int | None,
        latents: Skip | Force | None,
        generation: Mapping[str, Any] | None,
        seed: int,
        keep_logits: bool,
        *,
        forced: ForcedText | None = None,
    ) -> Run:
        """Generate once, with what is `forced` written first."""
        words = self.family if isinstance(self.family, VocabSpec) else None
        if words is not None and isinstance(latents, Force):
            raise InputError(
                f"il.Force({latents.steps}) feeds states back, and {words.name} writes its latents "
                "as tokens; put them into the prompt, or force them with a logits_processor"
            )
        spec = self.spec if latents is None else latents.applied_to(self.spec)
        if spec is None and isinstance(prompt, Widened):
            prompt = prompt.plain or prompt
        options = dict(generation or {})
        processors = list(options.get("logits_processor") or [])
        if isinstance(latents, Skip):
            processors += self._without_open()
        if forced is not None:
            processors.append(forced)
            stopping = [*(options.get("stopping_criteria") or []), OwnLimit(forced)]
            options["stopping_criteria"] = StoppingCriteriaList(stopping)
        if processors:
            options["logits_processor"] = LogitsProcessorList(processors)
        capture = self._capture(names_filter, wanted_while_generating(positions))
        config = self.generation_config(max_new_tokens, options)
        said = None if words is None else states_of_words(words)
        scope = self.registry.scope([entry for entry in (capture, said) if entry is not None])
        with torch.no_grad(), engine.untouched(self.remembering), scope:
            loop = LatentLoop(
                self.nnsight,
                self.registry,
                replace(self._marked(prompt, spec), final=False),
                self._chunk_base(prompt),
                prompt.vision_inputs,
                spec,
                self.span_tokens,
                seed,
                keep_logits,
            )
            inputs = {k: v for k, v in prompt.inputs.items() if k not in PIXELS}
            # not the class's own: some drop the logits processors, and with them Skip and Force
            with self._by_token(prompt):
                sequences = GenerationMixin.generate(
                    self.model,
                    **inputs,
                    **options,
                    generation_config=config,
                    custom_generate=loop.__call__,
                )
        run = finish(
            loop,
            sequences,
            prompt,
            self.find_answer,
            capture,
            positions,
            self.registry.table,
            torch.empty(
                0, self.structure.d_model, dtype=self.model.dtype, device=self.model.device
            ),
            said,
        )
        how = (max_new_tokens, latents, generation, seed, keep_logits)
        return replace(run, options=how, acted=self.registry.acting("hook_latent"))

    @contextmanager
    def _by_token(self, prompt: Prompt) -> Iterator[None]:
        """What `generate` needs so that it goes on token by token."""
        depth = self.registry.depth
        with by_token(self.model, prompt.inputs):
            if depth is None:
                yield
            else:
                with depth.by_token(self.model):
                    yield

    def generation_config(
        self, max_new_tokens: int | None, options: dict[str, Any]
    ) -> GenerationConfig:
        """The checkpoint's config, greedy unless asked otherwise; its own knobs leave `options`."""
        config = copy.deepcopy(self.model.generation_config)
        if not options.get("do_sample", False):  # knobs of sampling would only warn
            for knob in ("temperature", "top_p", "top_k", "typical_p", "min_p"):
                setattr(config, knob, None)
        config.do_sample = False
        for name in [n for n in options if hasattr(config, n)]:
            setattr(config, name, options.pop(name))
        if max_new_tokens is not None and max_new_tokens < 1:
            raise InputError(
                f"max_new_tokens is {max_new_tokens}, expected 1 or more; to read a prompt without "
                "writing, use lens.run_with_cache(prompt)"
            )
        if max_new_tokens is not None or config.max_new_tokens is None:
            config.max_new_tokens = max_new_tokens or 256
        config.max_length = None
        config.use_cache = True
        config.num_beams = 1
        config.return_dict_in_generate = False
        return config

    def _without_open(self) -> list[LogitsProcessor]:
        """What keeps the open token from being sampled."""
        if isinstance(self.family, VocabSpec):
            never = self.family.suppressed(self.tokenizer)
            return [SuppressTokensLogitsProcessor(never, device=str(self.model.device))]
        if self.span_tokens is None or self.span_tokens.open < 0:
            return []
        return [
            SuppressTokensLogitsProcessor([self.span_tokens.open], device=str(self.model.device))
        ]

    # ---- TransformerLens' verbs ------------------------------------------------------------

    def run_with_hooks(
        self,
        inputs: Any,
        *,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
    ) -> torch.Tensor:
        """One forward with hook functions `fn(act, hook=...)`; returns the logits.

        A prompt is read alone, as in TransformerLens. A `Run` is read over its whole sequence, its
        latents included. A hook that returns None only reads.
        """
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end=reset_hooks_end):
            return self._read_mapped(inputs)[1]

    def run_with_cache(
        self,
        inputs: Any,
        *,
        names_filter: NamesFilter = None,
        positions: Positions | Sequence[Positions] | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[torch.Tensor, ActivationCache]:
        """One forward that keeps activations; returns the logits and the cache.

        Args:
            inputs: a prompt (read alone) or a `Run` (its whole sequence, latents included).
            names_filter: which sites; None is all of them.
            positions: keep only these, cut before storing; None keeps whole activations.
        """
        kept = None if positions is None else selectors(positions)
        wanted = None if kept is None else wanted_while_generating(kept)
        capture = self._capture(names_filter, wanted, device)
        assert capture is not None
        with self.registry.scope([capture]):
            tokens, logits = self._read_mapped(inputs)
        return logits, assemble(capture, tokens, kept, self.registry.table)

    @contextmanager
    def hooks(
        self, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (), *, reset_hooks_end: bool = True
    ) -> Iterator["LatentModel"]:
        """Activate hook functions for a block; they are gone afterwards, also after an error."""
        entries = [HookEntry(tuple(self.registry.match(n)), fn) for n, fn in fwd_hooks]
        entries += [HookEntry(tuple(self.registry.match(n)), fn, "bwd") for n, fn in bwd_hooks]
        if not reset_hooks_end:
            self.registry.entries += entries
            yield self
            return
        if not entries:
            yield self
            return
        with self.registry.scope(entries), heard(self.model, named_entries(entries)):
            yield self

    def transformer_lens(self, inputs: Any) -> "BoundModel":
        """One input as a model of TransformerLens, for its own functions: pictures and latents are
        read whenever they call it.

        Args:
            inputs: a prompt, or a `Run`, which is read over its whole sequence, latents included.

        >>> from transformer_lens import patching
        >>> from imaginelens.organisms import load
        >>> lens = load("latent-content")
        >>> task = lens.task(n=1, seed=0)
        >>> base = lens.transformer_lens(lens.run(task.base))
        >>> source = lens.transformer_lens(lens.run(task.source))
        >>> _, cache = source.run_with_cache(source.tokens)
        >>> def metric(logits):
        ...     return logits[0, -2].max()
        >>> patching.get_act_patch_resid_pre(base, base.tokens, cache, metric).shape
        torch.Size([3, 28])
        """
        from imaginelens.hooks.bound import BoundModel

        given = inputs if isinstance(inputs, Run | Prompt) else self.prompt(inputs)
        return BoundModel(self, given)

    @cached_property
    def nnterp(self) -> NnterpNames:
        """The model under nnterp's names (`layers_output[i]`, `ln_final`, ...), for traces."""
        return NnterpNames(self)

    def add_hook(
        self,
        name: NamesFilter,
        hook: Callable[..., torch.Tensor | None],
        dir: Literal["fwd", "bwd"] = "fwd",
        *,
        is_permanent: bool = False,
    ) -> None:
        """Activate a hook function until `reset_hooks`; permanent ones stay even then."""
        self.registry.add(name, hook, direction=dir, permanent=is_permanent)

    def reset_hooks(self, *, including_permanent: bool = False) -> None:
        """Deactivate everything that is registered, permanent hooks only if asked to."""
        self.registry.clear(including_permanent=including_permanent)

    # ---- edits ------------------------------------------------------------------------------

    @contextmanager
    def edit(
        self,
        edit: Edit,
        *,
        at: Positions,
        site: NamesFilter = "hook_latent",
        heads: Sequence[int] | None = None,
        readers: Positions | None = None,
    ) -> Iterator[Landing]:
        """Make an edit active for a block; yields its landing, the proof of what it did.

        Args:
            heads: at sites with heads, such as `blocks.0.attn.hook_rot_k`, those it edits.
            readers: at `hook_rot_k` and `hook_v`, who reads the edited key or value, as if it had
                been edited in the cache before they came; the others, and each position itself,
                read the own. None: everyone does.

        Raises:
            EditTouchedNothing: a run inside the block did not reach any position, or changed none;
                nothing ran inside the block; or the model was called directly, which no edit hears.
        """
        check_arguments(edit=edit, at=at)
        sites = tuple(self.registry.match(site))
        entry = edit_entry(edit, at, sites, heads=heads, readers=readers)
        with self.registry.scope([entry]), has_run(self, entry):
            yield entry.landing

    def patch(
        self,
        *,
        base: Any,
        source: Any,
        site: NamesFilter = "hook_latent",
        at: Positions = latent,
        metric: Metric = logit_diff,
        context: Context = "free",
        base_answers: str | Sequence[str] | None = None,
        source_answers: str | Sequence[str | None] | None = None,
        heads: Sequence[int] | None = None,
        readers: Positions | None = None,
    ) -> PatchResult:
        """Run the base with the source's states at a site: how far does the answer move?

        Answers default to what the unedited runs answered. `free`: later latents and text are
        generated anew; `fixed`: they stay, and one forward reads the answer.
        """
        return patch(
            self,
            base=base,
            source=source,
            site=site,
            at=at,
            metric=metric,
            context=context,
            base_answers=base_answers,
            source_answers=source_answers,
            heads=heads,
            readers=readers,
        )

    def swap(
        self,
        base: Any,
        source: Any,
        *,
        at: Positions = latent,
        metric: Metric = logit_diff,
        context: Context = "free",
        base_answers: str | Sequence[str] | None = None,
        source_answers: str | Sequence[str | None] | None = None,
    ) -> PatchResult:
        """Give the base the source's latents, as they were fed back: `patch` at `hook_latent`."""
        return self.patch(
            base=base,
            source=source,
            site="hook_latent",
            at=at,
            metric=metric,
            context=context,
            base_answers=base_answers,
            source_answers=source_answers,
        )

    def ablate(
        self,
        inputs: Any,
        edit: Edit,
        *,
        at: Positions = latent,
        site: NamesFilter = "hook_latent",
        metric: Metric = log_prob,
        context: Context = "free",
        answers: str | Sequence[str] | None = None,
        heads: Sequence[int] | None = None,
        readers: Positions | None = None,
    ) -> PatchResult:
        """Run inputs with their states replaced by an edit: does the answer need them?

        The answer measured is the unedited run's, unless `answers` are given.
        """
        return ablate(
            self,
            inputs,
            edit,
            at=at,
            site=site,
            metric=metric,
            context=context,
            answers=answers,
            heads=heads,
            readers=readers,
        )

    def edit_pixels(
        self, example: Any, edit: InputEdit, *, at: Positions = image, seed: int = 0
    ) -> PixelEdit:
        """Edit the pixels that some image tokens of one input see, before the processor runs.

        Args:
            example: `{"images": ..., "text": ...}`; it stays as it is.
            edit: `il.BlankImage()` (the picture's mean colour), `il.BlankImage(colour)`,
                `il.BlurImage(radius)` or `il.NoiseImage(scale)`.
            at: whose pixels, such as `il.image[0][3:6, 2:9]`.
            seed: of noise.

        Returns:
            The new input as `.example`, with the record of what was changed.

        Raises:
            InputError: the edit cannot be kept to cells, or the pixels of a cell are not known.
            EditTouchedNothing: every pixel is as it was.

        >>> import imaginelens as il
        >>> lens = il.load("latent-content")
        >>> example = lens.task(n=1, seed=0).base[0]
        >>> lens.edit_pixels(example, il.BlankImage((9, 9, 9)), at=il.image[0][1, 0:2])
        PixelEdit(BlankImage(colour=(9, 9, 9)), seed 0, in 2 cells: 100% of their pixels changed...
        """
        return edit_pixels(self, example, edit, at=at, seed=seed)

    # ---- reading ----------------------------------------------------------------------------

    def read_answer(
        self,
        run: Run,
        targets: Targets,
        *,
        unedited: Readout | None = None,
        free: bool = False,
    ) -> Readout:
        """Read a run's answer in one teacher-forced forward, as hooks are now.

        Args:
            free: the answers reported are those the run wrote; otherwise what the deciding
                position's logits say.
        """
        script = self.script(run, endings=targets.base_ids)
        with torch.no_grad():
            columns = answer_columns(script, targets)
            logits = self._read_script(script, columns, acted=run.acted)
        found = read_out(script, targets, logits, columns, self.decode, unedited)
        return replace(found, answers=tuple(run.answers)) if free else found

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens around it."""
        if self.tokenizer is None:
            raise InputError("answers need a tokenizer; pass processor=... to il.LatentModel")
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, token: int) -> str:
        """The text of one token, outer spaces left out."""
        return str(self.tokenizer.decode([token])).strip()

    def _read_mapped(self, inputs: Any) -> tuple[TokenMap, torch.Tensor]:
        """Read a prompt, or a run's whole sequence, once; edits that are active are judged."""
        self.registry.begin()
        if isinstance(inputs, Run):
            script = self.script(inputs)
            logits = self._read_script(script, None, acted=inputs.acted)
            self.registry.judge(len(inputs), str(inputs.trigger), inputs.acted)
            return script.tokens, logits
        prompt = inputs if isinstance(inputs, Prompt) else self.prompt(inputs)
        tokens = without_latents(self.tokens(prompt))
        chunk = Chunk(tokens, 0, tokens.width, **self._chunk_base(prompt))
        with engine.untouched(self.remembering):
            inputs = {**prompt.inputs, **self._positions(prompt), "use_cache": False}
            outputs = self.registry.run(self.nnsight, self.model, inputs, chunk)
        self.registry.judge(len(prompt), "a prompt alone holds no latents and no answer")
        return tokens, outputs.logits

    def script(self, run: Run, endings: Sequence[Sequence[int]] | None = None) -> Script:
        """A run as one teacher-forced sequence; `endings` replace each row's answer by tokens."""
        config = self.model.config
        ids = self.structure.image_token_id, video_token_id(config), audio_token_id(config)
        media = [token for token in ids if token is not None]
        filler = 0 if self.span_tokens is None else max(self.span_tokens.pad, 0)
        if filler in media:
            filler = 0
        return script_of(
            run,
            embedding=self.model.get_input_embeddings(),
            filler=filler,
            media=media,
            written_type=self.behaviour.written_type,
            endings=endings,
        )

    def read_with(self, script: Script, worker: engine.Worker) -> torch.Tensor:
        """Read a script once with a bare worker inside the trace; returns all logits."""
        return self._read_script(script, None, [worker])

    def _read_script(
        self,
        script: Script,
        columns: Sequence[int] | None,
        workers: Sequence[engine.Worker] = (),
        acted: frozenset[int] = frozenset(),
    ) -> torch.Tensor:
        """Logits of a script at some columns (None: all), as hooks are now; what has `acted` on
        the run's latents when they were fed does not act on them again."""
        tokens = script.tokens
        has_images = any(name in script.inputs for name in PIXELS)
        chunk = Chunk(tokens, 0, tokens.width, has_images, self.projector_rows(script.inputs))
        columns_read = np.arange(tokens.width)
        embeds = self.registry.on_latents(script.embeds, chunk, columns_read, acted)
        mask = script.laid[..., None]
        inputs = dict(script.inputs)
        if columns is not None and "unembed.hook_out" not in self.registry.active:
            inputs["logits_to_keep"] = torch.tensor(columns, device=mask.device)
        overlay = None
        if bool(script.laid.any()):
            overlay = lambda own: torch.where(mask, embeds.to(own), own)  # noqa: E731
        with engine.untouched(self.remembering):
            outputs = self.registry.run(
                self.nnsight,
                self.model,
                inputs,
                chunk,
                overlay=overlay,
                workers=[*workers, *self._unembedding(tokens, inputs)],
            )
        if columns is not None and outputs.logits.shape[1] != len(columns):
            return outputs.logits[:, list(columns)]
        return outputs.logits

    def _unembedding(self, tokens: TokenMap, inputs: Mapping[str, Any]) -> list[engine.Worker]:
        """Where the family's output head reads projected states: what gives it those."""
        is_latent = torch.as_tensor(tokens.kind == Kind.LATENT)
        keep = inputs.get("logits_to_keep")
        return unembed_projected(
            self.nnsight, self.registry, self.spec, is_latent, None if keep is None else keep.cpu()
        )

    # ---- what there is ----------------------------------------------------------------------

    def describe(self) -> Description:
        """What this model is to the library: family, sites, grid rule, and what is missing."""
        return describe(
            self.model,
            self.structure,
            self.behaviour,
            self.registry.table,
            self.spec or self.family,
            self.registry.depth,
        )

    def estimate_bytes(
        self, names_filter: NamesFilter, *, n_examples: int, n_positions: int
    ) -> int:
        """How large a cache would be, before it is made."""
        total = 0
        for name in self.registry.match(names_filter):
            total += n_examples * n_positions * self._state_size(name, n_positions)
        return total * next(self.model.parameters()).element_size()

    def _state_size(self, name: str, n_positions: int) -> int:
        """How many numbers a site holds per position (per patch, inside the vision tower)."""
        site = self.registry[name]
        if site.kind.slot == "pattern":
            return self.structure.n_heads * n_positions
        if site.kind.slot in ("rot_q", "rot_k"):
            part = site.name.replace("hook_rot_", "hook_")
            return self._state_size(part, 1) if part in self.registry else self.structure.d_model
        module = self.model.get_submodule(site.path)
        if isinstance(module, torch.nn.Linear):
            return module.in_features if site.kind.slot == "input" else module.out_features
        if name.startswith("vision_encoder."):
            return int(self.model.get_submodule(self.structure.vision or "").config.hidden_size)
        return self.structure.d_model

    def _capture(
        self,
        names_filter: NamesFilter | Literal[False],
        wanted: Callable[[TokenMap, int], np.ndarray] | None,
        device: torch.device | str | None = None,
    ) -> CaptureEntry | None:
        if names_filter is False:
            return None
        return CaptureEntry(tuple(self.registry.match(names_filter)), wanted, device)

    @property
    def remembering(self) -> list[torch.nn.Module]:
        return [self.model.get_submodule(path) for path in self.behaviour.remembers]

    def _map(self, prompt: Prompt) -> TokenMap:
        ids = prompt.inputs["input_ids"].cpu().numpy()
        layouts = lay_out(
            ids,
            self.model,
            self.processor,
            prompt.inputs,
            self.structure.image_token_id,
            prompt.pictures,
        )
        tokens = map_prompt(ids, prompt.mask.cpu().numpy(), layouts, self.tokenizer, prompt.keys)
        videos = lay_out_videos(ids, self.model, prompt.inputs)
        tokens = tokens.showing(videos, audio_token_id(self.model.config))
        tokens = tokens.speaking(self._spoken)
        span = self.span_tokens
        return tokens if span is None else replace(tokens, markers=(span.open, span.close))

    def _marked(self, prompt: Prompt, spec: LatentSpec | None) -> TokenMap:
        """The map of a prompt, with the placeholders of a family that has them there."""
        tokens = self._map(prompt)
        check_canvas(tokens, spec, mrope=self.behaviour.mrope, forced=spec is not self.spec)
        tokens = mark_inserted(tokens, prompt)
        tokens = mark_placeholders(tokens, spec, self.span_tokens, self.behaviour)
        if spec is not None and spec.inserts is not None:
            tokens = settle_inserted(tokens, spec.inserts)
        return tokens

    def _positions(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        """Explicit positions, so that padding is not counted. Models with multi-axis positions
        count from their token types instead."""
        if not self._takes_positions or self.behaviour.mrope:
            return {}
        positions = (prompt.mask.long().cumsum(-1) - 1).clamp_min(0)
        return {"position_ids": positions + self.behaviour.first_position}

    def _chunk_base(self, prompt: Prompt) -> dict[str, Any]:
        return {
            "has_images": prompt.has_images,
            "projector_rows": self.projector_rows(prompt.inputs),
        }

    def projector_rows(self, inputs: Mapping[str, Any]) -> np.ndarray | None:
        """Where the projector puts each image token, for towers that work in window order."""
        grid = inputs.get("image_grid_thw", inputs.get("video_grid_thw"))
        watched = any(name.startswith("vision_projector") for name in self.registry.active)
        if not self.structure.windowed or grid is None or not watched:
            return None
        from transformers.vision_utils import get_vision_window_index

        vision = self.model.get_submodule(self.structure.vision or "")
        index, _ = get_vision_window_index(
            grid,
            spatial_merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
        )
        return np.asarray(torch.argsort(index).cpu())

    def __repr__(self) -> str:
        own = None if isinstance(self.family, TextSpec) else self.family
        family = "no latents" if own is None else f"latents as {own.name}"
        return (
            f"{type(self).__name__}({type(self.model).__name__}, "
            f"{len(self.structure.blocks)} layers, d_model {self.structure.d_model}, {family}, "
            f"{len(self.registry)} sites)"
        )
