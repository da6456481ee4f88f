"""What the walk asks of one model type, each answer measured: a cell is OK or says what is wrong.

The judge is plain torch: hooks on the same modules, identities between the sites that hold for the
right modules only, and latent decoding by full recomputation without a cache.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import ModelOutput
from walk_inputs import (
    ALONG_ROW,
    SIZE_FIELDS,
    Inputs,
    found_image_inputs,
    found_video_inputs,
    image_token,
    lengthened,
    other_pixel,
    pixel_name,
    side_by_side,
    stacked,
    text_inputs,
)
from walk_shrink import TEXT_IDS, VOCABULARY, shrunken

import imaginelens as il
from imaginelens.hooks import controls
from imaginelens.hooks.tokens import Kind

OK = "ok"
OPEN, CLOSE, PAD = VOCABULARY - 12, VOCABULARY - 11, VOCABULARY - 10
SPEC = il.LatentSpec(name="walk", open=OPEN, close=CLOSE, pad=PAD, max_steps=3)
BLOCK_SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
NEW, OPEN_AT, STEPS = 6, 1, 2  # generated tokens, where the span opens, how many latents
SAME, EXACT, CLOSE_ENOUGH, EXACT_ALONE = 1e-12, 1e-9, 1e-8, 1e-10


@dataclass
class Row:
    """One model type: what was measured, by column; `notes` are numbers and ways beside them."""

    model_type: str
    class_name: str
    cells: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


COLUMNS = (
    "instantiates", "text", "image", "stock_generate", "lens", "describe",
    *BLOCK_SITES, "projector", "projector_cells", "pattern", "text_latent", "latent", "path_gap",
    "batch", "sizes", "video",
)  # fmt: skip


def class_names() -> dict[str, str]:
    """Class name by model type, of all that take images or other media beside text."""
    return {
        **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }


def is_image_text(model_type: str) -> bool:
    """Whether transformers lists the type among those from image and text to text."""
    return model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def examined(model_type: str) -> Row:
    """Everything the walk asks of a model type."""
    row = Row(model_type, class_names()[model_type])
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings(), _Double():
        warnings.simplefilter("ignore")
        _Walk(row).go()
    for column in COLUMNS:
        row.cells.setdefault(column, "not reached")
    return row


class _Walk:
    """The questions in order; one that cannot be asked leaves its cell empty."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.model: Any = None
        self.lens: Any = None
        self.text: Inputs = {}
        self.image: Inputs = {}

    def go(self) -> None:
        if not self._ask("instantiates", self._instantiates):
            return
        self._ask("text", self._text)
        self._ask("image", self._image)
        if self._ask("lens", self._lens):
            self._ask("describe", lambda: str(self.lens.describe()) and OK)
            if self.image or self.text:
                self._sites()
                self._ask("text_latent", self._text_latent)
            if self.image:
                self._ask("stock_generate", self._stock)
                self._ask("projector", self._projector)
                self._ask("projector_cells", self._projector_cells)
                self._ask("latent", lambda: self._latent(self.image))
                self._ask("path_gap", self._path_gap)
                self._ask("batch", self._batch)
                self._ask("sizes", self._sizes)
                self._ask("video", self._video)

    def _ask(self, column: str, question: Callable[[], str]) -> bool:
        try:
            answer = question()
        except Exception as error:  # the answer is what went wrong
            answer = f"{type(error).__name__}: {_first_line(error)}{_where(error)}"
        self.row.cells[column] = answer
        return answer == OK

    # ---- the model alone ---------------------------------------------------------------------

    def _instantiates(self) -> str:
        self.model = build(self.row.model_type)
        if self.model.config.is_encoder_decoder:
            self.row.notes["kind"] = "encoder-decoder"
        n = sum(p.numel() for p in self.model.parameters())
        self.row.notes["parameters"] = f"{n / 1e6:.2f} M"
        return OK

    def _text(self) -> str:
        inputs = text_inputs(self.model)
        _forward(self.model, inputs)
        self.text = inputs
        return OK

    def _image(self) -> str:
        inputs, _ = found_image_inputs(self.model, 0)
        name = pixel_name(inputs)
        assert name is not None
        self.row.notes["pixels"] = f"{name} {tuple(inputs[name].shape)}"
        plain = _forward(self.model, inputs)
        others = (other_pixel(inputs, name, by=by) for by in (10.0, 1000.0))  # codebooks round
        if not any(_gap(plain, _forward(self.model, other)) > 0 for other in others):
            return "one changed pixel does not change the logits"
        self.image = inputs
        return OK

    def _stock(self) -> str:
        plain = il.LatentModel(self.model, spec=False)
        ban = {"logits_processor": LogitsProcessorList([_Ban(len(self.image["input_ids"][0]))])}
        stock = self.model.generate(**self.image, **ban, max_new_tokens=4, do_sample=False)
        own = plain.run(self.image, max_new_tokens=4, generation=ban)
        return OK if torch.equal(own.sequences, stock) else "other tokens than stock generate"

    # ---- sites -------------------------------------------------------------------------------

    def _lens(self) -> str:
        self.lens = il.LatentModel(self.model, spec=SPEC)
        self.row.notes["sites"] = str(len(self.lens.registry))
        if any(block.by_difference for block in self.lens.structure.blocks):
            self.row.notes["difference"] = "yes"
        return OK

    def _sites(self) -> None:
        inputs = self.image or self.text
        n = len(self.lens.structure.blocks)
        for kind in BLOCK_SITES:
            self._ask(kind, lambda kind=kind: self._block_site(kind, inputs, n))
        self._ask("pattern", lambda: self._pattern(n))

    def _block_site(self, kind: str, inputs: Inputs, n: int) -> str:
        missing = [i for i in range(n) if _name(i, kind) not in self.lens.registry]
        if missing:
            why = self.lens.registry.table.unavailable[_name(missing[0], kind)]
            return f"not offered in {len(missing)} of {n} blocks: {why}"
        for i in range(n):
            said = self._read_and_write(_name(i, kind), inputs)
            if said != OK:
                return f"layer {i}: {said}"
        return self._identity(kind, inputs, n)

    def _read_and_write(self, site: str, inputs: Inputs) -> str:
        wanted: list[torch.Tensor] = []
        with hooked(self.lens, site, lambda act: wanted.append(act.clone()) or act, inputs):
            _forward(self.model, inputs)
        logits, cache = self.lens.run_with_cache(inputs, names_filter=site)
        gap = _gap(cache[site].reshape(wanted[0].shape), wanted[0])
        if gap > SAME:
            return f"what is read differs from what plain torch reads by {gap:.1g}"

        def edit(act: torch.Tensor) -> torch.Tensor:
            if site.startswith("vision"):
                return act * 0.5 + 0.25
            return torch.cat([act[:, :-2], act[:, -2:] * 0.5 + 0.25], dim=1)

        with hooked(self.lens, site, edit, inputs):
            plain = _forward(self.model, inputs)
        with torch.no_grad():
            changed = self.lens.run_with_hooks(
                inputs, fwd_hooks=[(site, lambda act, hook: edit(act))]
            )
        gap = _gap(changed, plain)
        if not gap < EXACT:
            return f"an edit differs from plain torch by {gap:.1g}"
        return OK if _gap(changed, logits) > 0 else "an edit does not change the logits"

    def _identity(self, kind: str, inputs: Inputs, n: int) -> str:
        """Whether the residual stream is the sum that its sites say it is."""
        offered = [s for s in BLOCK_SITES if _name(n - 1, s) in self.lens.registry]
        names = [_name(i, s) for i in range(n) for s in offered]
        _, cache = self.lens.run_with_cache(
            inputs, names_filter=[x for x in names if x in self.lens.registry]
        )
        text = inputs["input_ids"][0] != (image_token(self.model.config) or -1)
        for i in range(n):
            c = {s: cache[_name(i, s)] for s in offered if _name(i, s) in self.lens.registry}
            sums = [("resid_pre", "attn_out", "resid_mid"), ("resid_mid", "mlp_out", "resid_post")]
            if "resid_mid" not in c:
                sums = [("resid_pre", "attn_out", "mlp_out", "resid_post")]
            for *parts, whole in sums:
                if kind not in (*parts, whole) or not {*parts, whole} <= c.keys():
                    continue
                gap = _gap(sum(c[p] for p in parts), c[whole])
                if gap > EXACT and kind not in ("resid_pre", "resid_post"):
                    return (
                        f"in block {i} {' + '.join(parts)} misses {whole} by {gap:.1g}: the stream "
                        "is not the plain sum of what its parts return"
                    )
            if kind == "resid_post" and i + 1 < n:
                after = cache[_name(i + 1, "resid_pre")]
                if c["resid_post"].shape != after.shape:
                    return f"layer {i}: shape {tuple(c['resid_post'].shape)}"
                gap = _gap(c["resid_post"][:, text], after[:, text])
                if gap > EXACT:
                    return (
                        f"what leaves block {i} differs by {gap:.1g} from what enters block "
                        f"{i + 1}: something else stands between them"
                    )
        return OK

    def _pattern(self, n: int) -> str:
        names = [f"blocks.{i}.attn.hook_pattern" for i in range(n)]
        offered = [x for x in names if x in self.lens.registry]
        if not offered:
            return self.lens.registry.table.unavailable[names[0]]
        inputs = self.image or self.text
        with torch.no_grad():
            plain = self.lens.run_with_hooks(inputs)
            for name in offered:
                logits, cache = self.lens.run_with_cache(inputs, names_filter=name)
                if _gap(logits, plain) > EXACT:
                    return f"{name}: the written-out attention differs by {_gap(logits, plain):.1g}"
                if _gap(cache[name].sum(-1), torch.ones(1)) > EXACT:
                    return f"{name}: does not sum to 1"
        if len(offered) == n:
            return OK
        missing = next(x for x in names if x not in self.lens.registry)
        why = self.lens.registry.table.unavailable[missing]
        return f"not in {n - len(offered)} of {n} blocks: {why}"

    def _projector(self) -> str:
        site = "vision_projector.hook_out"
        if site not in self.lens.registry:
            return self.lens.registry.table.unavailable[site]
        said = self._read_and_write(site, self.image)
        if said != OK:
            return said
        first = _name(0, "resid_pre")
        _, before = self.lens.run_with_cache(self.image, names_filter=first)
        with self.lens.hooks([(site, lambda act, hook: act * 0.5 + 0.25)]):
            _, after = self.lens.run_with_cache(self.image, names_filter=first)
        moved = (after[first] - before[first])[0].flatten(1).abs().amax(-1) > 0
        shown = self._shown()
        if not bool(moved.any()):
            return self._reaches_cross_attention(site)
        if bool((moved & ~shown).any()) and bool(shown.any()):
            return f"an edit moves {int((moved & ~shown).sum())} positions without image"
        # image tokens that show nothing of the picture (row ends) are no rows of the projector
        rows = self._projector_rows(site)
        if bool(shown.any()) and int(moved.sum()) not in (int(shown.sum()), rows):
            return f"an edit moves {int(moved.sum())} of {int(shown.sum())} image tokens"
        return OK

    def _shown(self) -> torch.Tensor:
        """Which positions show the image, as `il.image` selects them."""
        return torch.as_tensor(self.lens.tokens(self.image).kind[0] == Kind.IMAGE)

    def _reaches_cross_attention(self, site: str) -> str:
        """Where images come by cross-attention there is nothing in the first layer to reach: the
        first layer that looks at them is asked, whose input must stay."""
        blocks = [self.model.get_submodule(b.path) for b in self.lens.structure.blocks]
        crossing = [i for i, block in enumerate(blocks) if hasattr(block, "cross_attn")]
        if not crossing:
            return "an edit does not reach the first layer"
        names = [_name(crossing[0], s) for s in ("resid_pre", "resid_post")]
        _, before = self.lens.run_with_cache(self.image, names_filter=names)
        with self.lens.hooks([(site, lambda act, hook: act * 0.5 + 0.25)]):
            _, after = self.lens.run_with_cache(self.image, names_filter=names)
        pre, post = (_gap(before[name], after[name]) for name in names)
        return OK if pre == 0 < post else f"an edit moves its cross-attention's input by {pre:.1g}"

    def _projector_rows(self, site: str) -> int:
        _, cache = self.lens.run_with_cache(self.image, names_filter=site)
        return cache[site][..., 0].numel()

    def _projector_cells(self) -> str:
        site, first = "vision_projector.hook_out", _name(0, "resid_pre")
        if site not in self.lens.registry:
            return "no projector"
        if any("cross_attn" in path for path, _ in self.model.get_decoder().named_modules()):
            return "its images come by cross-attention: no position of the text shows one"
        shown = torch.nonzero(self._shown())[:, 0]
        if not len(shown):
            return "its image tokens have no id of their own, so il.image finds none"
        _, before = self.lens.run_with_cache(self.image, names_filter=first)
        for column in sorted({int(shown[0]), int(shown[len(shown) // 2]), int(shown[-1])}):
            with self.lens.edit(il.Zero(), at=il.positions([column]), site=site):
                _, after = self.lens.run_with_cache(self.image, names_filter=first)
            change = (after[first] - before[first])[0].flatten(1).abs().amax(-1)
            moved = torch.nonzero(change)[:, 0].tolist()
            if moved != [column]:
                return (
                    f"zeroing the image token at {column} moves {moved[:4]} ({len(moved)} of them)"
                )
        return OK

    # ---- latents -----------------------------------------------------------------------------

    def _run(self, inputs: Inputs) -> il.Run:
        return self.lens.run(
            inputs,
            max_new_tokens=NEW,
            latents=il.Force(STEPS, at=OPEN_AT),
            keep_logits=True,
            generation={"logits_processor": [_Ban(inputs["input_ids"].shape[1])]},
        )

    def _latent(self, inputs: Inputs) -> str:
        run = self._run(inputs)
        written, latents = recomputed(self.model, inputs)
        own = run.sequences[0, run.tokens.prompt_width :].tolist()
        if run.latents.shape[1] != STEPS:
            return f"{run.latents.shape[1]} latents instead of {STEPS}"
        gap = _gap(run.latents[0], latents)
        self.row.notes["latent_gap"] = f"{gap:.1e}"
        if not gap < CLOSE_ENOUGH:
            return f"latents differ from recomputation by {gap:.1g}"
        return OK if own == written else f"wrote {own} instead of {written}"

    def _text_latent(self) -> str:
        return self._latent(self.text) if self.text else "its forward asks for an image"

    def _path_gap(self) -> str:
        gap = controls.path_gap(self.lens, self._run(self.image))
        self.row.notes["path_gap"] = f"{gap:.1e}"
        return OK if gap < CLOSE_ENOUGH else f"generating and reading differ by {gap:.1g}"

    def _batch(self) -> str:
        other, _ = found_image_inputs(self.model, 1)
        rows = [self.image, lengthened(other, 3)]
        together = self._run(stacked(rows))
        for i, inputs in enumerate(rows):
            alone = self._run(inputs)
            gap = _gap(together.latents[i], alone.latents[0])
            if not gap < CLOSE_ENOUGH:
                return self._not_alone(rows, f"latents of row {i} differ by {gap:.1g}")
            if together.texts[i] != alone.texts[0]:
                return f"row {i} writes something else than alone"
        return OK

    def _not_alone(self, rows: list[Inputs], said: str) -> str:
        """Whether a row that is not as alone is our doing, or its class reads it so without us."""
        logits = _forward(self.model, stacked(rows))
        for row, inputs in enumerate(rows):
            alone = _forward(self.model, inputs)
            if _gap(logits[row, -alone.shape[1] :], alone[0]) > CLOSE_ENOUGH:
                return "its class, without us, reads a row of this batch, as packed, not as alone"
        return f"{said} from the row alone"

    def _sizes(self) -> str:
        """Two images in one prompt, of two sizes, beside a prompt with one: as each alone."""
        try:
            other, _ = found_image_inputs(self.model, 1, rows=4, cols=2)
            two = side_by_side(self.image, other)
            _forward(self.model, two)
        except Exception as error:
            return f"two images in one prompt are not taken as walk_inputs packs them: {error}"
        rows = [two, other]
        together = self._run(stacked(rows))
        for i, inputs in enumerate(rows):
            gap = _gap(together.latents[i], self._run(inputs).latents[0])
            if not gap < EXACT_ALONE:
                return self._not_alone(rows, f"latents of row {i} differ by {gap:.1g}")
        if all(torch.equal(self.image[k], other[k]) for k in SIZE_FIELDS if k in other):
            self.row.notes["sizes"] = "one size"
        return OK

    def _video(self) -> str:
        """A video: its tokens are found, a run is read again, and a batch is its rows."""
        if "pixel_values_videos" not in inspect.signature(self.model.forward).parameters:
            return "takes no videos"
        rows = [found_video_inputs(self.model, seed) for seed in (0, 1)]
        rows[1] = lengthened(rows[1], 3)
        alone = [self._run(inputs) for inputs in rows]
        for run, inputs in zip(alone, rows, strict=True):
            shown = torch.as_tensor(run.tokens.kind[0, : run.tokens.prompt_width] == Kind.VIDEO)
            ids = inputs["input_ids"][0]
            tokens = ids[shown].unique()
            if len(tokens) != 1 or not torch.equal(shown, ids == tokens[0]):
                return f"il.video finds {int(shown.sum())} tokens of a video"
            gap = controls.path_gap(self.lens, run)
            if not gap < CLOSE_ENOUGH:
                return f"generating and reading differ by {gap:.1g}"
        together = self._run(stacked(rows))
        gaps = [_gap(together.latents[i], run.latents[0]) for i, run in enumerate(alone)]
        if not max(gaps) < CLOSE_ENOUGH:
            return self._not_alone(rows, f"latents differ by {max(gaps):.1g}")
        return OK


# ---- the judge -------------------------------------------------------------------------------


@torch.no_grad()
def recomputed(model: PreTrainedModel, inputs: Inputs) -> tuple[list[int], torch.Tensor]:
    """Latent decoding without a cache or explicit positions: every step reads everything anew."""
    ban = _Ban(inputs["input_ids"].shape[1])
    decoder = model.get_decoder()
    while hasattr(decoder, "lm_head"):  # some accessors stop at the language model with its head
        decoder = decoder.model
    decoder = getattr(decoder, "decoder", decoder)  # OPT calls the decoder in its model itself
    written: list[int] = []
    latents: list[torch.Tensor] = []
    where: list[int] = []
    for step in range(NEW):
        whole = _continued(model, inputs, written)
        states: list[torch.Tensor] = []

        def lay(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            for column, z in zip(where, latents, strict=True):
                if out.dim() == 3 and out.shape[1] > column:
                    out[0, column] = z
            return out

        def keep(module: Any, args: Any, out: Any, states: list[torch.Tensor] = states) -> None:
            states.append(out.last_hidden_state[0, -1])

        handles = [
            model.get_input_embeddings().register_forward_hook(lay),
            decoder.register_forward_hook(keep),
        ]
        try:
            logits = _forward(model, whole)[0, -1]
        finally:
            for handle in handles:
                handle.remove()
        if step == OPEN_AT:
            written.append(OPEN)
        elif OPEN_AT < step <= OPEN_AT + STEPS:
            where.append(whole["input_ids"].shape[1])
            latents.append(states[-1])
            written.append(PAD)
        elif step == OPEN_AT + STEPS + 1:
            written.append(CLOSE)
        else:
            written.append(int(ban(whole["input_ids"], logits[None])[0].argmax()))
    return written, torch.stack(latents)


def _continued(model: PreTrainedModel, inputs: Inputs, written: list[int]) -> Inputs:
    """A prompt and what was written behind it."""
    whole = dict(inputs)
    for name in ALONG_ROW:
        if name not in inputs or not written:
            continue
        row = inputs[name]
        if name == "input_ids":
            new = torch.tensor([written])
        elif name in ("mm_token_type_ids", "token_type_ids"):  # PaliGemma's 0 is its prefix
            new = torch.full((1, len(written)), int(model.config.model_type == "paligemma"))
        else:  # the last token sees what new ones see, but is never an image
            last = row[:, -1:]
            new = last.expand(1, len(written), *row.shape[2:])
        whole[name] = torch.cat([row, new.to(row)], dim=1)
    return whole


@contextmanager
def hooked(
    lens: Any, site: str, fn: Callable[[torch.Tensor], torch.Tensor], inputs: Inputs
) -> Iterator[None]:
    """Have `fn` act at a site by plain torch, while the model reads `inputs`."""
    found = lens.registry[site]
    if found.kind.slot in ("mid", "stream"):
        with _in_the_stream(lens, found, fn, inputs):
            yield
        return
    module = lens.model.get_submodule(found.path)
    if found.kind.slot == "output":
        handles = [module.register_forward_hook(lambda m, a, out: _put(out, fn(_first(out))))]
    else:

        def at_input(m: Any, args: Any, kwargs: Any) -> Any:
            old = args[0] if args else next(iter(kwargs.values()))
            new = fn(old)
            if args:
                return (new, *args[1:]), kwargs
            return args, {**kwargs, next(iter(kwargs)): new}

        handles = [module.register_forward_pre_hook(at_input, with_kwargs=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _in_the_stream(
    lens: Any, found: Any, fn: Callable[[torch.Tensor], torch.Tensor], inputs: Inputs
) -> Iterator[None]:
    """`fn` on the stream between two sublayers, or on what one of them adds to it.

    The stream between them is changed where it is made: the operation whose result enters the
    second sublayer returns the changed result, whoever reads it. No module is trusted with it.
    """
    before, stream = _around(lens, found, inputs)
    whole = stream.reshape(before.shape)
    if found.kind.part == "mlp_out":
        block = lens.model.get_submodule(found.block)
        behind = lambda m, a, out: _put(out, whole + fn(_first(out) - whole))  # noqa: E731
        handle = block.register_forward_hook(behind)
        try:
            yield
        finally:
            handle.remove()
        return
    rest = before if found.kind.part == "attn_out" else torch.zeros_like(whole)
    with _Remade(stream, (rest + fn(whole - rest)).reshape(stream.shape)):
        yield


def _around(lens: Any, found: Any, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters a block, and what enters its second sublayer."""
    seen: dict[str, torch.Tensor] = {}

    def entering(path: str) -> Any:
        def keep(module: Any, args: Any, kwargs: Any) -> None:
            seen[path] = _first(args or next(iter(kwargs.values()))).clone()

        module = lens.model.get_submodule(path)
        return module.register_forward_pre_hook(keep, with_kwargs=True)

    handles = [entering(path) for path in (found.block, found.path)]
    try:
        _forward(lens.model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen[found.block], seen[found.path]


class _Remade(TorchFunctionMode):
    """The first operation whose result has these values returns others."""

    def __init__(self, wanted: torch.Tensor, instead: torch.Tensor) -> None:
        super().__init__()
        self.wanted, self.instead, self.done = wanted, instead, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.done or not isinstance(result, torch.Tensor):
            return result
        if result.numel() != self.wanted.numel() or result.dtype != self.wanted.dtype:
            return result
        if result.shape[-1] != self.wanted.shape[-1]:
            return result
        self.done = torch.equal(result.reshape(self.wanted.shape), self.wanted)
        return self.instead.reshape(result.shape) if self.done else result


class _Ban(LogitsProcessor):
    """Keeps a model from writing special tokens behind a prompt of this width."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, :16] = scores[:, TEXT_IDS:] = -1e9
        return scores


class _Double(TorchFunctionMode):
    """Keeps float64 what a class would round to float32, so that equal sums stay equal.

    Norms, routers and rotations of most classes round inside. Two ways to the same number then
    differ by 1e-7 now and then, which would hide small errors of ours.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        double = bool(args) and isinstance(args[0], torch.Tensor)
        double = double and args[0].dtype == torch.float64
        if func is torch.Tensor.float:
            return args[0].double()
        if double and func in (torch.Tensor.to, torch.Tensor.type):
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        if double and kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        if func is torch.Tensor.__setitem__ and isinstance(args[2], torch.Tensor):
            args = (*args[:2], args[2].to(args[0].dtype))
        if func is torch.full and kwargs.get("dtype") is None:
            value = kwargs["fill_value"] if "fill_value" in kwargs else args[1]
            if isinstance(value, float):  # the least float64 as a mask does not fit float32
                kwargs["dtype"] = torch.float64
        if double and func is nn.functional.grid_sample:
            args = (args[0], args[1].double(), *args[2:])
        return func(*args, **kwargs)


# ---- the model -------------------------------------------------------------------------------


def build(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of a type, in float64 and eval mode, decoding greedily."""
    config = shrunken(model_type)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, class_names()[model_type])(config)
    model = model.to(torch.float64).eval()
    for module in model.modules():  # the grouped kernel knows no float64
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"
    randomize(model, seed)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=2)
    return model


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Draw every parameter anew, loud enough that every image cell reaches the logits; and factors
    kept as buffers, whose start of 1 would hide that they are there."""
    generator = torch.Generator().manual_seed(seed)
    seen = set()
    for name, buffer in model.named_buffers():
        if name.endswith("scalar"):
            buffer.mul_(1 + 0.2 * torch.rand(buffer.shape, generator=generator))
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter in seen or not parameter.is_floating_point():
                continue
            seen.add(parameter)
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim < 2:
                parameter += (0.1 * noise).to(parameter)
            elif isinstance(module, nn.Linear):
                parameter.copy_(1.2 * parameter.shape[1] ** -0.5 * noise)
            elif "Conv" in type(module).__name__:
                parameter.copy_(1.2 * parameter[0].numel() ** -0.5 * noise)
            elif isinstance(module, nn.Embedding) or min(parameter.shape) == 1:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(1.2 * max(parameter.shape[-2:]) ** -0.5 * noise)


@torch.no_grad()
def _forward(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    options = {"use_cache": False} if "use_cache" in _names(model) else {}
    return model(**inputs, **options).logits


def _names(model: PreTrainedModel) -> set[str]:
    taken = inspect.signature(model.forward).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    return {*taken, *(["use_cache"] if free else [])}


def _name(layer: int, site: str) -> str:
    return f"blocks.{layer}.hook_{site}"


def _first(value: Any) -> torch.Tensor:
    """The tensor that a value is about; of a vision tower's output what the text model reads."""
    if isinstance(value, ModelOutput):
        value = value[_read_by_text(value)]
    return value[0] if isinstance(value, tuple | list) else value


def _put(value: Any, act: torch.Tensor) -> Any:
    if isinstance(value, ModelOutput):
        changed = copy.copy(value)
        key = _read_by_text(value)
        changed[key] = _put(value[key], act)
        return changed
    return type(value)([act, *value[1:]]) if isinstance(value, tuple | list) else act


def _read_by_text(value: ModelOutput) -> str:
    pooled = getattr(value, "pooler_output", None)
    return "last_hidden_state" if pooled is None else "pooler_output"


def _gap(one: Any, two: Any) -> float:
    return float((one - two).abs().max())


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return next((line for line in lines if line.strip()), "")[:300]


def _where(error: BaseException) -> str:
    """The innermost line of the error's trace."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return ""
    file = trace.tb_frame.f_code.co_filename.rsplit("/", 1)[-1]
    return f" [{file}:{trace.tb_lineno}]"
