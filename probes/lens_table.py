"""What states read as, by step and layer: the result of a lens, as numbers and as a table to see.

A model can write anything: `<script>`, marks that reverse the reading order, control characters.
Every text that is shown here goes through `shown` first, and through `html.escape` in a notebook.
"""

import html
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from imaginelens.estimates import Estimate
from imaginelens.hooks.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_WIDEST, _EXAMPLES = 14, 4


def shown(text: str, *, limit: int = 40) -> str:
    r"""A token's text on one line: spaces as dots, invisible and reordering characters as escapes.

    >>> shown(" a\n"), shown("a\u202eb\x1b[31m")
    ('·a\\n', 'a\\u202eb\\x1b[31m')
    """
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(_visible(character) for character in cut) or "(empty)"


def _visible(character: str) -> str:
    if character == " ":
        return "·"
    if unicodedata.category(character) in _HIDDEN or character.isspace():
        return character.encode("unicode_escape").decode("ascii")
    return character


@dataclass(frozen=True, repr=False, eq=False)
class LensTable:
    """The likeliest tokens of each state under a lens; `il.probes.logit_lens` makes one.

    A state that reads as a word need not be used as that word, and one that reads as nothing may
    carry everything: only an intervention tells (`il.interchange`, `il.probes.amnesic`).

    Attributes:
        kind: "logit lens" or "tuned lens".
        at: the selector that the steps come from.
        token_ids: the likeliest first, (example, step, site, rank); -1 where there is no such step.
        probabilities: of those tokens; nan where there is no such step.
        entropy: of the whole distribution, in bits, (example, step, site).
        mask: which steps each example has.
        watched: the ids of the tokens whose rank and probability are kept wherever they stand.
        ranks: (example, step, site, watched), 0 the likeliest; -1 where there is no such step.
        watched_probabilities: (example, step, site, watched).
        texts: the text of every token id in the table.
        names: other spellings of watched tokens.
        gap: the largest difference between the logit lens of the last layer and the model's own
            logits in the forward that was read: 0 but for rounding.
    """

    kind: str
    at: str
    sites: tuple[str, ...]
    token_ids: Int[np.ndarray, "example step site rank"]
    probabilities: Float[np.ndarray, "example step site rank"]
    entropy: Float[np.ndarray, "example step site"]
    mask: Bool[np.ndarray, "example step"]
    watched: tuple[int, ...]
    ranks: Int[np.ndarray, "example step site watched"]
    watched_probabilities: Float[np.ndarray, "example step site watched"]
    texts: Mapping[int, str]
    names: Mapping[str, int] = field(default_factory=dict)
    gap: float = 0.0

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def tokens(self) -> Shaped[np.ndarray, "example step site rank"]:
        """The texts of `token_ids`; "" where there is no such step."""
        return self._spelled(self.token_ids)

    def rank_of(
        self, token: str | int | Sequence[str | int]
    ) -> Int[np.ndarray, "example step site"]:
        """How many tokens are likelier than this one (0: none); -1 where there is no such step.

        Args:
            token: a watched token, as text or id, or one for each example.

        Raises:
            InputError: it was not watched, or there is not one for each example.
        """
        return self._of(self.ranks, token)

    def probability_of(
        self, token: str | int | Sequence[str | int]
    ) -> Float[np.ndarray, "example step site"]:
        """The probability of a watched token; nan where there is no such step.

        Raises:
            InputError: as `rank_of`.
        """
        return self._of(self.watched_probabilities, token)

    def choice(self, among: Sequence[str | int]) -> Shaped[np.ndarray, "example step site"]:
        """The likeliest of some watched tokens, as given; "" where there is no such step.

        Raises:
            InputError: one of them was not watched, or there are fewer than two.
        """
        if len(set(among)) < 2:
            raise InputError(f"{list(among)} is no choice; give two tokens or more")
        ranks = self.ranks[..., [self._place(token) for token in among]]
        found = np.array([str(token) for token in among], dtype=object)[ranks.argmin(-1)]
        found[~self._there] = ""
        return found

    def share(
        self,
        expected: Sequence[str | None],
        *,
        step: int,
        site: str,
        among: Sequence[str] | None = None,
        chance: float | None = None,
        groups: Sequence[Any] | None = None,
    ) -> Estimate:
        """How often the likeliest token is the expected one, at one step and site.

        Args:
            expected: one text per example, outer spaces aside; None leaves an example out.
            among: only these watched tokens compete.
            chance: the share that means nothing, 1/6 for six equally common words.
            groups: one label per example: those of one image depend on each other.

        Raises:
            InputError: not one text per example, or there is no such step or site.
        """
        if len(expected) != len(self):
            raise InputError(
                f"{len(expected)} expected tokens came for {len(self)} examples; give one each"
            )
        column = self._cell(step, site)
        read = self.choice(among) if among is not None else self.tokens[..., 0]
        hits = [
            float("nan") if want is None or not there else float(one.strip() == want.strip())
            for one, want, there in zip(
                read[:, step, column], expected, self.mask[:, step], strict=True
            )
        ]
        name = f"{site} at step {step} reads as expected"
        return Estimate.share(hits, name=name, chance=chance, groups=groups)

    def to_dataframe(self) -> "pd.DataFrame":
        """One line per example, step, site and rank."""
        import pandas as pd

        where = np.argwhere(np.broadcast_to(self.mask[:, :, None, None], self.token_ids.shape))
        example, step, site, rank = where.T
        ids = self.token_ids[example, step, site, rank]
        return pd.DataFrame(
            {
                "example": example,
                "step": step,
                "site": np.array(self.sites, dtype=object)[site],
                "rank": rank,
                "token": self._spelled(ids),
                "token_id": ids,
                "probability": self.probabilities[example, step, site, rank],
                "entropy": self.entropy[example, step, site],
            }
        )

    def summary(self) -> str:
        """What the states read as in one sentence, which says nothing of what they do."""
        rows = [self._commonest(j) for j in range(len(self.sites))]
        said = "; ".join(
            f"{site} {'reads most often as' if share < 1 else 'always reads as'} {text!r} "
            f"({share:.0%}, {entropy:.1f} bits)"
            for site, (text, share, entropy) in zip(self.sites, rows, strict=True)
        )
        return (
            f"{self.kind} of {len(self)} example{'s' * (len(self) != 1)} at {self.at}: {said}. "
            "What a state reads as is not evidence of what it is used for."
        )

    def plot(self, *, example: int = 0, title: str | None = None) -> Any:
        """What each state of an example reads as, as a figure: sites down, steps across."""
        from imaginelens.view.probing import lens_heatmap

        return lens_heatmap(self, example=example, title=title)

    def __repr__(self) -> str:
        lines = [f"{self.kind} of {len(self)} example{'s' * (len(self) != 1)} at {self.at}"]
        for row in range(min(len(self), _EXAMPLES)):
            steps = np.flatnonzero(self.mask[row]).tolist()
            lines.append(f"example {row}" + ("" if steps else ": no such step"))
            if steps:
                lines += _aligned([["", *(f"step {t}" for t in steps)], *self._lines(row, steps)])
        more = len(self) - _EXAMPLES
        return "\n".join(lines + ([f"... {more} more"] if more > 0 else []))

    def _repr_html_(self) -> str:
        tables = [self._html(row) for row in range(min(len(self), _EXAMPLES))]
        more = len(self) - _EXAMPLES
        rest = f"<p>{more} more in <code>.to_dataframe()</code></p>" if more > 0 else ""
        head = html.escape(f"{self.kind} at {self.at}: what each state reads as")
        return (
            f"<div><p><b>{head}</b>; the fuller the colour, the more probable; reading is not "
            f"using</p>{''.join(tables)}{rest}</div>"
        )

    @property
    def _there(self) -> Bool[np.ndarray, "example step site"]:
        return np.broadcast_to(self.mask[:, :, None], self.entropy.shape)

    def _spelled(self, ids: Int[np.ndarray, "*cell"]) -> Shaped[np.ndarray, "*cell"]:
        found = np.empty(ids.shape, dtype=object)
        for where, number in np.ndenumerate(ids):
            found[where] = self.texts[int(number)] if number >= 0 else ""
        return found

    def _place(self, token: str | int) -> int:
        """Where a watched token stands among those watched."""
        number = token if isinstance(token, int) else self.names.get(token)
        if number is None:
            alike = [i for i in self.watched if self.texts[i].strip() == str(token).strip()]
            number = alike[0] if len(alike) == 1 else None
        if number not in self.watched:
            known = ", ".join(repr(self.texts[i]) for i in self.watched) or "none"
            raise InputError(
                f"the token {token!r} was not watched ({known} were), so that its rank was not "
                f"kept; make the table with watch=[{token!r}]"
            )
        return self.watched.index(number)

    def _of(
        self,
        values: Shaped[np.ndarray, "example step site watched"],
        token: str | int | Sequence[str | int],
    ) -> Shaped[np.ndarray, "example step site"]:
        if isinstance(token, str | int):
            return values[..., self._place(token)]
        if len(token) != len(self):
            raise InputError(f"{len(token)} tokens came for {len(self)} examples; give one each")
        places = [self._place(one) for one in token]
        return values[np.arange(len(self)), :, :, places]

    def _cell(self, step: int, site: str) -> int:
        if site not in self.sites:
            raise InputError(f"there is no site {site!r} in this table; it has {self.sites}")
        if not 0 <= step < self.mask.shape[1]:
            raise InputError(f"there is no step {step} in a table of {self.mask.shape[1]} steps")
        return self.sites.index(site)

    def _commonest(self, site: int) -> tuple[str, float, float]:
        """The token that is likeliest most often at a site, how often, and the mean entropy."""
        ids = self.token_ids[:, :, site, 0][self.mask]
        found, counts = np.unique(ids, return_counts=True)
        best = int(counts.argmax())
        text = shown(self.texts[int(found[best])])
        entropy = float(self.entropy[:, :, site][self.mask].mean())
        return text, float(counts[best] / len(ids)), entropy

    def _lines(self, row: int, steps: Sequence[int]) -> Iterator[list[str]]:
        for j, site in enumerate(self.sites):
            cells = [
                f"{shown(self.texts[int(self.token_ids[row, t, j, 0])], limit=_WIDEST)} "
                f"{self.probabilities[row, t, j, 0]:.2f}"
                for t in steps
            ]
            yield [site, *cells]

    def _html(self, row: int) -> str:
        steps = np.flatnonzero(self.mask[row]).tolist()
        if not steps:
            return f"<p>example {row}: no such step</p>"
        head = "".join(f"<th>step {t}</th>" for t in steps)
        body = "".join(
            f"<tr><th style='text-align:left'>{html.escape(site)}</th>"
            + "".join(self._html_cell(row, t, j) for t in steps)
            + "</tr>"
            for j, site in enumerate(self.sites)
        )
        return (
            f"<table><caption>example {row}</caption><thead><tr><th></th>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table>"
        )

    def _html_cell(self, row: int, step: int, site: int) -> str:
        ids, chances = self.token_ids[row, step, site], self.probabilities[row, step, site]
        texts = [shown(self.texts[int(i)]) for i in ids]
        listed = [f"{text} {p:.3f}" for text, p in zip(texts, chances, strict=True)]
        title = "\n".join([*listed, f"entropy {self.entropy[row, step, site]:.2f} bits"])
        return (
            f"<td style='background:rgba(70,130,220,{0.6 * chances[0]:.2f})' "
            f'title="{html.escape(title)}"><bdi>{html.escape(texts[0])}</bdi> '
            f"<small>{chances[0]:.2f}</small></td>"
        )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells with their columns under each other."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
