"""TransformerLens' own tools on one input of ours: pictures, latents and all.

TransformerLens' functions call `model(tokens)`, which leaves pictures behind without a word. A
`BoundModel` holds one prompt or run, so that the same call reads all of it. It is TransformerLens'
`HookedRootModule` with a `HookPoint` for every site; what is hooked acts inside our own forward.
"""

from collections.abc import Callable
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import nn
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.config import TransformerLensConfig
from transformer_lens.hook_points import HookPoint

from imaginelens.hooks.cache import ActivationCache as OurCache
from imaginelens.hooks.entries import HookEntry
from imaginelens.hooks.errors import HookNameError, InputError, SiteUnavailable
from imaginelens.hooks.model import LatentModel
from imaginelens.hooks.prompts import Prompt
from imaginelens.hooks.run import Run
from imaginelens.hooks.sites import SiteTable
from imaginelens.hooks.tensor_parallel import whole_weight
from imaginelens.hooks.weights import (
    NormReading,
    Weights,
    attention_weights,
    mlp_weights,
    read_norm,
)

# TransformerLens keeps these as (example, head, query, key), our sites put the query first
_BY_HEAD = ("attn.hook_pattern", "attn.hook_attn_scores")
# Its caches hold these as well; here they are made of other entries, and no hook acts on them.
_MADE = ("hook_pos_embed", "ln_final.hook_scale")


class Block(nn.Module):
    """The hook points of a block, or of a part of it, and the weights that it offers."""

    hook_out_is_single_residual_stream = True  # TransformerLens' lenses ask for it

    def __init__(self) -> None:
        super().__init__()
        self.offers: Weights = {}

    def __getattr__(self, name: str) -> Any:
        offers = self.__dict__.get("offers", {})
        return offers[name]() if name in offers else super().__getattr__(name)


class _Known(dict[str, Any]):
    """Named things of a model, in which a name that is missing says why."""

    def __init__(self, named: dict[str, Any], table: SiteTable) -> None:
        super().__init__(named)
        self.table = table

    def __missing__(self, name: str) -> Any:
        if name in self.table:
            raise HookNameError(f"{name!r} was not cached, only {', '.join(self)}")
        return self.table[name]  # raises, with the reason or the nearest names


class BoundModel(HookedRootModule):
    """A model with its input, as TransformerLens' functions take it.

    A function that hands on some rows of `tokens`, or of `rows`, is answered for those: the whole
    batch is read, and hooks see the rows that were asked for.

    Attributes:
        tokens: the token ids of the input, (example, position); latents show their placeholder.
        cfg: what TransformerLens asks about a model.
        blocks, ln_final, unembed: as TransformerLens names them; hook points, weights by head, and
            the two modules through which a state becomes logits.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> run = lens.run(lens.task(n=1, seed=0).base)
    >>> bound = lens.transformer_lens(run)
    >>> bound(bound.tokens).shape == (*bound.tokens.shape, bound.cfg.d_vocab)
    True
    """

    def __init__(self, lens: LatentModel, inputs: Run | Prompt) -> None:
        super().__init__()
        self.lens, self.inputs = lens, inputs
        self.tokenizer = lens.tokenizer
        given = inputs.inputs if isinstance(inputs, Prompt) else lens.script(inputs).inputs
        self.tokens: Int[torch.Tensor, "example position"] = given["input_ids"]
        structure = lens.structure
        self._inside = {name: HookPoint() for name in lens.registry}
        for name, point in self._inside.items():
            _place(self, name.split("."), point)
        for layer in range(len(structure.blocks)):
            for part, weights in (("attn", attention_weights), ("mlp", mlp_weights)):
                held = cast(nn.ModuleList, self.blocks)[layer]._modules.get(part)
                if isinstance(held, Block):
                    held.offers = weights(lens.model, structure, layer)
        self.setup()  # names every module below this one: the user's own come afterwards
        self.hook_dict = _Known(self.hook_dict, lens.registry.table)
        self.mod_dict = _Known(self.mod_dict, lens.registry.table)
        self.model = lens.model  # so that freezing and eval() reach its weights
        _lend(self, "ln_final", lens.model.get_submodule(structure.final_norm))
        _lend(self, "unembed", lens.model.get_submodule(structure.head))
        norm = lens.model.get_submodule(structure.final_norm)
        like = next(norm.parameters(), torch.zeros(0, dtype=lens.model.dtype))
        with torch.no_grad():
            self._norm = read_norm(norm, like.new_zeros(structure.d_model))
        self._cfg = _config_of(lens, self._norm)
        self.train(lens.model.training)

    @property
    def cfg(self) -> TransformerLensConfig:
        """What TransformerLens asks about a model."""
        return self._cfg

    @property
    def rows(self) -> Int[torch.Tensor, " example"]:
        """The numbers of the examples: the input for tools that hand on pieces of what they are
        given, in which equal tokens of different pictures could not be told apart."""
        return torch.arange(len(self.tokens), device=self.tokens.device)

    @property
    def W_U(self) -> Float[torch.Tensor, "d_model d_vocab"]:
        """The unembedding, without the norm before it."""
        return cast(_Lent, self.unembed).weight.T

    @property
    def b_U(self) -> Float[torch.Tensor, " d_vocab"]:
        """The unembedding's bias, zeros where there is none."""
        bias = getattr(self.unembed, "bias", None)
        return self.W_U.new_zeros(self.W_U.shape[1]) if bias is None else bias

    def forward(
        self,
        input: torch.Tensor | None = None,
        *,
        return_type: str | None = "logits",
        **unused: Any,
    ) -> Float[torch.Tensor, "example position d_vocab"] | None:
        """Read the bound input once, with the hooks that are on the hook points.

        Args:
            input: `tokens` or `rows`, or some of either, as TransformerLens' functions pass it on;
                None is all of them.

        Raises:
            InputError: other tokens, or an argument that only TransformerLens' own models have.
        """
        _check_options(return_type, {k: v for k, v in unused.items() if v is not None})
        rows = self._rows_of(input)
        entries = [
            HookEntry(
                (name,),
                partial(_through, point, name, rows, self.lens.registry.table[name].is_vision),
            )
            for name, point in self._inside.items()
            if point._forward_hooks or point._backward_hooks or point._forward_pre_hooks
        ]
        with self.lens.registry.scope(entries):
            logits = self.lens.run_with_hooks(self.inputs)
        if return_type is None:
            return None
        return logits if rows is None else logits[rows]

    def run_with_cache(
        self,
        *args: Any,
        names_filter: Any = None,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        **options: Any,
    ) -> tuple[torch.Tensor, Any]:
        """As TransformerLens': the logits, and its `ActivationCache` (or a dict).

        Raises:
            HookNameError: the filter selects nothing.
            InputError: gradients of no single number are asked for.
        """
        if incl_bwd:
            raise InputError(
                "incl_bwd=True needs a loss, and logits are no single number; give a metric to "
                "transformer_lens.tools.analysis.attribution_patching.cache_activation_and_gradient"
            )
        logits, found = super().run_with_cache(
            *args, names_filter=names_filter, remove_batch_dim=remove_batch_dim, **options
        )
        if not found:
            raise HookNameError(
                f"names_filter={names_filter!r} selects none of the {len(self.hook_dict)} hook "
                "points that this input passes; names are compared letter by letter here, so give "
                "a function for several, such as lambda name: name.endswith('hook_resid_post')"
            )
        self._add_made(found, _as_predicate(names_filter))
        if not return_cache_object:
            return logits, found
        known = _Known(found, self.lens.registry.table)
        return logits, ActivationCache(known, self, has_batch_dim=not remove_batch_dim)

    def to_tokens(
        self, text: str | list[str] | None = None, prepend_bos: bool = False, **unused: Any
    ) -> Int[torch.Tensor, "example position"]:
        """The tokens of a text by itself; of the bound input without one."""
        if text is None:
            return self.tokens
        texts = [text] if isinstance(text, str) else text
        rows = [self.lens.encode(t) for t in texts]
        if len({len(row) for row in rows}) > 1:
            raise InputError(
                f"the texts have {sorted({len(row) for row in rows})} tokens; give texts of one "
                "length, or one at a time"
            )
        return torch.tensor(rows, device=self.tokens.device)

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token.

        Raises:
            InputError: it is several.
        """
        ids = self.lens.encode(text)
        if len(ids) != 1:
            raise InputError(f"{text!r} is {len(ids)} tokens, {ids}; name one that is a single one")
        return ids[0]

    def to_string(self, tokens: torch.Tensor | int) -> str:
        """The text of some token ids, special ones spelled out."""
        return str(self.lens.tokenizer.decode(tokens))

    def to_str_tokens(self, tokens: torch.Tensor | None = None) -> list[str]:
        """The text of each token of a row, the bound input's first by default."""
        row = self.tokens[0] if tokens is None else tokens.reshape(-1)
        return [str(self.lens.tokenizer.decode(int(token))) for token in row]

    def tokens_to_residual_directions(self, tokens: Any) -> torch.Tensor:
        """The directions of the residual stream, divided by the final norm's scale, that raise the
        logits of some tokens: the norm's gain is folded in, so that `cache.logit_attrs` of all
        terms of the stream add up to the logit.

        Raises:
            SiteUnavailable: the logits are not the unembedding of the normed stream.
        """
        norm = self._plain_norm()
        ids = self.to_single_token(tokens) if isinstance(tokens, str) else tokens
        return self.W_U.T[ids] * norm.gain

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[torch.Tensor, " d_model"]:
        """The sum of what the output layers of the blocks before `layer` add whatever comes in."""
        total = self.W_U.new_zeros(self.cfg.d_model)
        blocks = cast(Any, self.blocks)
        for before in range(layer + mlp_input):
            total = total + blocks[before].attn.b_O
            if include_mlp_biases and before < layer:
                total = total + blocks[before].mlp.b_out
        return total

    def blocks_with(self, part: str) -> list[tuple[int, Any]]:
        """The blocks that have a part, such as "attn", with their numbers."""
        blocks = cast(nn.ModuleList, self.blocks)
        return [(i, block) for i, block in enumerate(blocks) if part in block._modules]

    def tl_parameters(self) -> dict[str, torch.Tensor]:
        """Not here: TransformerLens' `SVDInterpreter` pairs value and output heads by number, which
        is wrong where several query heads share one."""
        raise SiteUnavailable(
            "parameters are not renamed here; take the weights of a layer's heads as "
            "model.blocks[0].attn.W_V and W_O, and torch.linalg.svd of their product"
        )

    def _no_copies(self, use: bool) -> None:
        """What TransformerLens' models do with copies of the stream for every head."""
        if use:
            raise SiteUnavailable(
                "copies of the residual stream for every head (hook_result, hook_q_input, "
                "hook_mlp_in) are no sites here, so paths between heads cannot be patched; patch "
                "nodes, or cut who reads whom with lens.edit(..., readers=...)"
            )

    set_use_attn_result = set_use_split_qkv_input = _no_copies
    set_use_attn_in = set_use_hook_mlp_in = _no_copies

    def _rows_of(self, input: torch.Tensor | None) -> torch.Tensor | None:
        """Which examples are asked for, in which order; None is all, as they come."""
        if input is None or input is self.tokens:
            return None
        rows = self._rows_meant(input)
        n = len(self.tokens)
        if not len(rows) or len(torch.unique(rows)) < len(rows) or rows.min() < 0 or max(rows) >= n:
            raise InputError(
                f"rows {rows.tolist()} of {n} are asked for; ask for one or more of model.rows, "
                "each once"
            )
        return None if torch.equal(rows, self.rows) else rows

    def _rows_meant(self, input: torch.Tensor) -> torch.Tensor:
        tokens = self.tokens
        shape = tuple(getattr(input, "shape", ()))
        if len(shape) == 1:
            return input.to(tokens.device)
        same_memory = len(shape) == 2 and shape[1] == tokens.shape[1] and _shares(input, tokens)
        if same_memory:  # a slice of `tokens`: its place says which rows, whatever their tokens
            first = (input.storage_offset() - tokens.storage_offset()) // tokens.stride(0)
            return first + self.rows[: len(input)] * (input.stride(0) // tokens.stride(0))
        if len(shape) != 2 or shape[1] != tokens.shape[1]:
            raise InputError(self._other_tokens(shape))
        hits = (input[:, None].to(tokens.device) == tokens[None]).all(-1)
        if not hits.any(1).all():
            raise InputError(self._other_tokens(shape))
        if (hits.sum(1) > 1).any():
            raise InputError(
                "some examples have equal tokens and differ in their pictures, so their order "
                "cannot be told; pass model.tokens itself or slices of it, not a copy, or rows of "
                "model.rows"
            )
        return hits.int().argmax(1)

    def _other_tokens(self, shape: tuple[int, ...]) -> str:
        return (
            f"the tokens, of shape {shape}, are not those of the bound input, of shape "
            f"{tuple(self.tokens.shape)}, whose pictures and latents belong to them; pass "
            "model.tokens, or bind the other input with lens.transformer_lens(...)"
        )

    def _add_made(
        self, found: dict[str, torch.Tensor], wanted: Callable[[str], bool] = lambda name: True
    ) -> None:
        """Add what TransformerLens' caches hold and no site here does, made of what was cached."""
        embed, stream = found.get("hook_embed"), found.get("blocks.0.hook_resid_pre")
        if embed is not None and stream is not None and wanted("hook_pos_embed"):
            rest = stream - embed
            if bool(rest.any()):
                found["hook_pos_embed"] = rest
        last = found.get(f"blocks.{self.cfg.n_layers - 1}.hook_resid_post")
        scale = None
        if last is not None and self._norm is not None and wanted("ln_final.hook_scale"):
            scale = self._norm.scale(last)
        if scale is not None:
            found["ln_final.hook_scale"] = scale

    def _plain_norm(self) -> NormReading:
        """The final norm, where nothing but it and the unembedding makes logits of the stream."""
        gap = self._readout_gap
        if self._norm is None or gap > 1e-2:
            raise SiteUnavailable(
                f"the logits of {type(self.model).__name__} are not the unembedding of its normed "
                f"residual stream (they differ by {gap:.0%} of their spread), so no direction of "
                "the stream stands for a token; patch states instead"
            )
        return self._norm

    @cached_property
    def _readout_gap(self) -> float:
        """How far the unembedding of the normed stream is from the logits, in their spread."""
        if self._norm is None:
            return float("inf")
        last = f"blocks.{self.cfg.n_layers - 1}.hook_resid_post"
        registry = self.lens.registry
        with torch.no_grad(), registry.scope():
            registry.entries = []  # neither edited nor counted; the scope puts them back
            logits, cache = self.lens.run_with_cache(self.inputs, names_filter=last)
            made = self._norm.norm(cache[last]) @ self.W_U + self.b_U
        spread = (logits - logits.mean(-1, keepdim=True)).abs().max()
        return float((made - logits).abs().max() / spread)

    def __repr__(self) -> str:
        what = "run" if isinstance(self.inputs, Run) else "prompt"
        return (
            f"BoundModel({type(self.model).__name__} with a {what} of {len(self.tokens)} x "
            f"{self.tokens.shape[1]} tokens, {len(self.hook_dict)} hook points)"
        )


def _check_options(return_type: str | None, unused: dict[str, Any]) -> None:
    if return_type not in ("logits", None):
        raise InputError(
            f"return_type is {return_type!r}, and latents have no next token to be wrong about; "
            "take the logits"
        )
    layers = [name for name in ("start_at_layer", "stop_at_layer") if name in unused]
    if layers:
        raise InputError(
            f"{layers[0]}: a bound input is read from its pictures to its logits; to see the "
            "stream on its way, cache it: names_filter='blocks.1.hook_resid_pre'"
        )
    if unused:
        raise InputError(
            f"{', '.join(unused)}: the bound input already says all that the model is given; "
            "bind another input with lens.transformer_lens(...)"
        )


def _shares(view: torch.Tensor, tokens: torch.Tensor) -> bool:
    """Whether one tensor is rows of the other, in the same memory."""
    return (
        view.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()
        and view.stride(1) == tokens.stride(1)
        and (view.storage_offset() - tokens.storage_offset()) % tokens.stride(0) == 0
        and view.stride(0) % tokens.stride(0) == 0
    )


def _as_predicate(names_filter: Any) -> Callable[[str], bool]:
    if names_filter is None or callable(names_filter):
        return names_filter or (lambda name: True)
    names = [names_filter] if isinstance(names_filter, str) else list(names_filter)
    return lambda name: name in names


def from_transformer_lens(
    cache: ActivationCache | dict[str, torch.Tensor], like: OurCache
) -> OurCache:
    """TransformerLens' cache as one of ours, with the columns and axes of a cache `like` it.

    Raises:
        InputError: a name or a shape is not that of the other cache.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> run = lens.run(lens.task(n=1, seed=0).base)
    >>> _, ours = lens.run_with_cache(run, names_filter="*.hook_resid_post")
    >>> sorted(from_transformer_lens(to_transformer_lens(ours, lens), ours)) == sorted(ours)
    True
    """
    given = dict(cache.cache_dict if isinstance(cache, ActivationCache) else cache)
    found = {name: _turned(name, act) for name, act in given.items() if name not in _MADE}
    for name, act in found.items():
        if name not in like.activations:
            raise InputError(
                f"{name!r} is not in the cache it should be like, which holds {', '.join(like)}"
            )
        if act.shape != like.activations[name].shape:
            raise InputError(
                f"{name!r} has shape {tuple(act.shape)}, and {tuple(like.activations[name].shape)} "
                "in the cache it should be like"
            )
    return OurCache(
        found,
        {name: like.columns[name] for name in found if name in like.columns},
        {name: like.axes[name] for name in found if name in like.axes},
        {name: like.slots[name] for name in found if name in like.slots},
        like.n_layers,
    )


def to_transformer_lens(cache: OurCache, model: Any) -> ActivationCache:
    """One of our caches as TransformerLens' own, for its methods; `model` is what they ask: a
    `BoundModel` of the same input, for those that need weights."""
    found = {name: _turned(name, act) for name, act in cache.activations.items()}
    if isinstance(model, BoundModel):
        model._add_made(found)
        found = _Known(found, model.lens.registry.table)
    return ActivationCache(found, model)


def _turned(name: str, act: torch.Tensor) -> torch.Tensor:
    return act.transpose(1, 2) if name.endswith(_BY_HEAD) else act


def _through(
    point: Callable[[torch.Tensor], torch.Tensor],
    name: str,
    rows: torch.Tensor | None,
    is_vision: bool,
    act: torch.Tensor,
    hook: Any,
) -> torch.Tensor:
    """What a hook point makes of an activation, or of some of its rows; its hooks may write into
    what they are given."""
    if rows is not None and is_vision:
        raise InputError(
            f"{name!r} holds the pictures of the whole batch, so that it has no rows; ask for all "
            "of model.tokens, or leave the site out of names_filter"
        )
    whole = _turned(name, act)
    given = whole.clone() if rows is None else whole[rows]
    new = point(given)
    if new.shape != given.shape:
        raise InputError(
            f"the hook at {name!r} returned shape {tuple(new.shape)} for an activation of shape "
            f"{tuple(given.shape)}; return a tensor of the same shape, or None to only read"
        )
    if rows is not None:
        new = whole.clone().index_copy(0, rows, new)
    return _turned(name, new)


def _place(root: nn.Module, path: list[str], point: HookPoint) -> None:
    """Put a hook point where its name says; numbered modules make a list, as in TransformerLens."""
    here = root
    for name, following in pairwise(path):
        if name not in here._modules:
            inner = nn.ModuleList() if following.isdigit() else Block()
            here.add_module(name, inner)
        here = here._modules[name]  # type: ignore[assignment]
    here.add_module(path[-1], point)


def _lend(root: nn.Module, name: str, module: nn.Module) -> None:
    """Show one of the model's own modules under TransformerLens' name; its hook points stay."""
    points = root._modules.pop(name, None)
    setattr(root, name, _Lent(module, points))


class _Lent(nn.Module):
    """A module of the model beside the hook points that have its name."""

    def __init__(self, module: nn.Module, points: nn.Module | None) -> None:
        super().__init__()
        self.module = module
        for name, point in (points._modules if points is not None else {}).items():
            self.add_module(name, point)

    def forward(self, act: torch.Tensor) -> torch.Tensor:
        return self.module(act)

    @property
    def weight(self) -> torch.Tensor:
        return whole_weight(self.module)

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.module, "bias", None)


def _config_of(lens: LatentModel, norm: NormReading | None) -> TransformerLensConfig:
    centred = norm is not None and norm.centred
    text = lens.model.config.get_text_config()
    structure = lens.structure
    head = lens.model.get_submodule(structure.head)
    config = TransformerLensConfig(
        d_model=structure.d_model,
        d_head=getattr(text, "head_dim", None) or structure.d_model // structure.n_heads,
        n_layers=len(structure.blocks),
        n_ctx=getattr(text, "max_position_embeddings", 0) or 0,
        n_heads=structure.n_heads,
        d_vocab=head.weight.shape[0],
        d_mlp=getattr(text, "intermediate_size", None),
        device=str(lens.model.device),
        n_key_value_heads=getattr(text, "num_key_value_heads", None),
        default_prepend_bos=False,
        normalization_type="LN" if centred else "RMS",
        uses_rms_norm=not centred,
        final_rms=not centred,
        dtype=lens.model.dtype,
    )
    config.use_hook_mlp_in = False  # type: ignore[attr-defined]  # its edge attribution asks
    return config
