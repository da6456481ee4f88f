"""TransformerLens' own tools on one input of ours: pictures, latents and all.

TransformerLens' functions call `model(tokens)`, which leaves pictures behind without a word. A
`BoundModel` holds one prompt or run, so that the same call reads all of it. It is TransformerLens'
`HookedRootModule` with a `HookPoint` for every site; what is hooked acts inside our own forward.
"""

from collections.abc import Callable
from functools import partial
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
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.model import LatentModel
from imaginelens.hooks.prompts import Prompt
from imaginelens.hooks.run import Run

# TransformerLens keeps these as (example, head, query, key), our sites put the query first
_BY_HEAD = ("attn.hook_pattern", "attn.hook_attn_scores")


class Block(nn.Module):
    """The hook points of one block."""

    hook_out_is_single_residual_stream = True  # TransformerLens' lenses ask for it


class BoundModel(HookedRootModule):
    """A model with its input, as TransformerLens' functions take it.

    Attributes:
        tokens: the token ids of the input, (example, position); latents show their placeholder.
        cfg: what TransformerLens asks about a model.
        blocks, ln_final, unembed: as TransformerLens names them; hook points, and the two modules
            through which a state becomes logits.

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
        self.model = lens.model  # so that freezing and eval() reach its weights
        self.tokenizer = lens.tokenizer
        given = inputs.inputs if isinstance(inputs, Prompt) else lens.script(inputs).inputs
        self.tokens: Int[torch.Tensor, "example position"] = given["input_ids"]
        self._cfg = _config_of(lens)
        self._inside = {name: HookPoint() for name in lens.registry}
        for name, point in self._inside.items():
            _place(self, name.split("."), point)
        for path, name in (
            (lens.structure.final_norm, "ln_final"),
            (lens.structure.head, "unembed"),
        ):
            _lend(self, name, lens.model.get_submodule(path))
        self.setup()
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
            input: `tokens` or `rows`, as TransformerLens' functions pass it on; None is the same.

        Raises:
            InputError: other tokens, or an argument that only TransformerLens' own models have.
        """
        self._check(input, return_type, unused)
        entries = [
            HookEntry((name,), partial(_through, point, name.endswith(_BY_HEAD)))
            for name, point in self._inside.items()
            if point._forward_hooks or point._backward_hooks or point._forward_pre_hooks
        ]
        with self.lens.registry.scope(entries):
            logits = self.lens.run_with_hooks(self.inputs)
        return None if return_type is None else logits

    def run_with_cache(
        self,
        *args: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **options: Any,
    ) -> tuple[torch.Tensor, Any]:
        """As TransformerLens': the logits, and its `ActivationCache` (or a dict)."""
        logits, found = super().run_with_cache(*args, remove_batch_dim=remove_batch_dim, **options)
        if not return_cache_object:
            return logits, found
        return logits, ActivationCache(found, self, has_batch_dim=not remove_batch_dim)

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
        """The directions of the residual stream that raise the logits of some tokens."""
        ids = self.to_single_token(tokens) if isinstance(tokens, str) else tokens
        return self.W_U.T[ids]

    def accumulated_bias(self, *args: Any, **options: Any) -> torch.Tensor:
        """Zeros: the sites already hold what a block adds, its bias included."""
        return self.W_U.new_zeros(self.cfg.d_model)

    def _check(self, input: torch.Tensor | None, return_type: Any, unused: dict[str, Any]) -> None:
        if return_type not in ("logits", None):
            raise InputError(
                f"return_type is {return_type!r}, and latents have no next token to be wrong "
                "about; take the logits"
            )
        if unused:
            raise InputError(
                f"{', '.join(unused)}: the bound input already says all that the model is given; "
                "bind another input with lens.transformer_lens(...)"
            )
        if input is None or input is self.tokens:
            return
        if isinstance(input, torch.Tensor) and input.dim() == 1:
            if not torch.equal(input, self.rows):
                raise InputError(
                    f"{len(input)} of the {len(self.rows)} examples, or another order of them, is "
                    "asked for, and a bound input is read as a whole; use one batch of all rows"
                )
            return
        same = isinstance(input, torch.Tensor) and torch.equal(input, self.tokens)
        if not same:
            shape = tuple(getattr(input, "shape", ()))
            raise InputError(
                f"the tokens, of shape {shape}, are not those of the bound input, of shape "
                f"{tuple(self.tokens.shape)}, whose pictures and latents belong to them; pass "
                "model.tokens, or bind the other input with lens.transformer_lens(...)"
            )
        if len(torch.unique(self.tokens, dim=0)) < len(self.tokens):
            raise InputError(
                "some examples have equal tokens and differ in their pictures, so their order "
                "cannot be told; pass model.tokens itself, not a copy, or model.rows"
            )

    def __repr__(self) -> str:
        what = "run" if isinstance(self.inputs, Run) else "prompt"
        return (
            f"BoundModel({type(self.model).__name__} with a {what} of {len(self.tokens)} x "
            f"{self.tokens.shape[1]} tokens, {len(self.hook_dict)} hook points)"
        )


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
    found = {name: _turned(name, act) for name, act in given.items()}
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
    """One of our caches as TransformerLens' own, for its methods; `model` is what they ask."""
    return ActivationCache(
        {name: _turned(name, act) for name, act in cache.activations.items()}, model
    )


def _turned(name: str, act: torch.Tensor) -> torch.Tensor:
    return act.transpose(1, 2) if name.endswith(_BY_HEAD) else act


def _through(
    point: Callable[[torch.Tensor], torch.Tensor], by_head: bool, act: torch.Tensor, hook: Any
) -> torch.Tensor:
    """What a hook point makes of an activation, which its hooks may write into."""
    own = (act.transpose(1, 2) if by_head else act).clone()
    new = point(own)
    return new.transpose(1, 2) if by_head else new


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
        return cast(torch.Tensor, self.module.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.module, "bias", None)


def _config_of(lens: LatentModel) -> TransformerLensConfig:
    text = lens.model.config.get_text_config()
    structure = lens.structure
    norm = lens.model.get_submodule(structure.final_norm)
    head = lens.model.get_submodule(structure.head)
    return TransformerLensConfig(
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
        normalization_type="LN" if isinstance(norm, nn.LayerNorm) else "RMS",
        uses_rms_norm=not isinstance(norm, nn.LayerNorm),
        final_rms=not isinstance(norm, nn.LayerNorm),
        dtype=lens.model.dtype,
    )
