r"""Write treasure hunts as raw interleaved data, in the layout of Monet-SFT-125K.

    python -m examples.capimagine.hunts --n 2000 --hops 2 --seed 0 --out raw
    python -m examples.capimagine.hunts --n 2000 --seed 0 --spoil 0.04 --eval 500 --out raw

A hunt's chain looks at one picture for each card it visits. Three in four do so as `Visual_CoT`
does (zoom: a crop of the card), one in four as `ReFocus` does (edit: the board again, the card
framed), so that both ways of rewriting have something to do. `--spoil` plants hunts whose answer
is wrong, or whose question cannot be answered, and lists them in `planted.json`, which no stage of
the recipe reads: a filter that works finds them. `--eval` writes other hunts, as chains, to
`eval/chains.jsonl`.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from examples.capimagine.chains import Chain, Picture, save
from imaginelens.organisms.hunt import (
    BOARD,
    CARD_PIXELS,
    SHAPES,
    Hunt,
    render,
    sample,
)

ZOOM, EDIT = "Visual_CoT", "ReFocus"
SYSTEM = "You are a helpful assistant."  # what Monet's loader puts in any case
BOXED = "\nPut your final answer within \\boxed{}."  # ends Monet's questions
PLACEHOLDER = "<abs_vis_token></abs_vis_token>"
NOWHERE = "purple"  # the name of no card
FRAME = 2  # pixels; no glyph reaches so far out
EVAL_SEED = 1_000_003  # added to the seed of hunts that are only for evaluation


def crop(board: np.ndarray, hunt: Hunt, name: str) -> np.ndarray:
    """Cut the card called `name` out of the board: 28x28 pixels.

    >>> hunt = sample(1, hops=2, seed=0)[0]
    >>> crop(render([hunt])[0], hunt, hunt.path[-1]).shape
    (28, 28, 3)
    """
    rows, columns = _cell(hunt, name)
    return board[rows, columns]


def mark(board: np.ndarray, hunt: Hunt, name: str) -> np.ndarray:
    """The board again with a black frame on the card called `name`."""
    rows, columns = _cell(hunt, name)
    marked = board.copy()
    card = marked[rows, columns]
    inside = card[FRAME:-FRAME, FRAME:-FRAME].copy()
    card[:] = 0
    card[FRAME:-FRAME, FRAME:-FRAME] = inside
    return marked


def _cell(hunt: Hunt, name: str) -> tuple[slice, slice]:
    row, column = divmod(hunt.names.index(name), BOARD)
    return (
        slice(row * CARD_PIXELS, (row + 1) * CARD_PIXELS),
        slice(column * CARD_PIXELS, (column + 1) * CARD_PIXELS),
    )


def record(hunt: Hunt, number: int, subset: str, *, planted: str = "") -> dict[str, Any]:
    """One record in Monet's layout; `planted` spoils it.

    Pictures are named relative to the folder that holds the subsets' folders, as in Monet's data.
    """
    question, answer = hunt.question, hunt.answer
    if planted == "unanswerable":
        question = question.replace(hunt.start, NOWHERE, 1)
    elif planted == "conflict":
        others = [shape for shape in SHAPES if shape != answer]
        answer = others[number % len(others)]
    elif planted:
        raise ValueError(f"planted is {planted!r}; choose 'conflict' or 'unanswerable'")
    picture = f"{subset}/images/{number:06d}"
    content: list[dict[str, str]] = []
    seen = ""
    for step, (here, to) in enumerate(pairwise(hunt.path), 1):
        look = "mark" if subset == EDIT else "zoom in on"
        content += [
            _text(f"{seen}I {look} the card that {here} points to. {PLACEHOLDER}"),
            {"type": "image", "image": f"{picture}-{step}.png"},
        ]
        points = hunt.follow(to, 1)[-1]
        shape = hunt.shape_of(to)
        seen = f"<observation>It is {to}, points to {points}, shows a {shape}.</observation> "
    content.append(_text(f"{seen}So the answer is \\boxed{{{answer}}}"))
    return {
        "metadata": {"dataset_name": subset, "sample_id": str(number)},
        "data": [
            {"role": "system", "content": [_text(SYSTEM)]},
            {
                "role": "user",
                "content": [{"type": "image", "image": f"{picture}.png"}, _text(question + BOXED)],
            },
            {"role": "assistant", "content": content},
        ],
    }


def _text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def write(
    hunts: Sequence[Hunt], out: Path, *, edit_every: int = 4, spoil: float = 0.0
) -> dict[str, str]:
    """Write hunts below `out`, a folder for each subset; gives which are spoiled, and how.

    Args:
        edit_every: each how-manyth hunt goes to the edit subset; 0 for none.
        spoil: the share to plant, by turns with a wrong answer and an unanswerable question.
    """
    if not 0 <= spoil <= 1:
        raise ValueError(f"spoil is {spoil}; it is a share, from 0 to 1")
    if hunts and min(h.hops for h in hunts) < 1:
        raise ValueError("a chain needs at least one hop, or it has no card to look at")
    every = round(1 / spoil) if spoil else 0
    records: dict[str, list[dict[str, Any]]] = {}
    planted: dict[str, str] = {}
    for number, (hunt, board) in enumerate(_boards(hunts)):
        subset = EDIT if edit_every and number % edit_every == edit_every - 1 else ZOOM
        kind = ""
        if every and number % every == every // 2:
            kind = ("conflict", "unanswerable")[number // every % 2]
            planted[f"{subset}/{number}"] = kind
        made = record(hunt, number, subset, planted=kind)
        if subset not in records:
            (out / subset / "images").mkdir(parents=True, exist_ok=True)
        records.setdefault(subset, []).append(made)
        _draw(board, out / f"{subset}/images/{number:06d}.png")
        look = mark if subset == EDIT else crop
        for step, name in enumerate(hunt.path[1:], 1):
            _draw(look(board, hunt, name), out / f"{subset}/images/{number:06d}-{step}.png")
    for subset, made_records in records.items():
        (out / subset / "train.json").write_text(json.dumps(made_records, indent=1))
    (out / "planted.json").write_text(json.dumps(planted, indent=1) + "\n")
    return planted


def write_evaluation(hunts: Sequence[Hunt], out: Path) -> None:
    """Write hunts as chains that ask and answer, for evaluation only."""
    (out / "images").mkdir(parents=True, exist_ok=True)

    def chains() -> Iterator[Chain]:
        for number, (hunt, board) in enumerate(_boards(hunts)):
            path = f"images/{number:06d}.png"
            _draw(board, out / path)
            yield Chain(
                id=f"eval/{number}",
                subset="eval",
                folder=out,
                prompt=(Picture(path), hunt.question),
                reply=(hunt.answer,),
                answer=hunt.answer,
            )

    save(chains(), out / "chains.jsonl")


def _boards(hunts: Sequence[Hunt]) -> Iterator[tuple[Hunt, np.ndarray]]:
    for begin in range(0, len(hunts), 256):
        some = hunts[begin : begin + 256]
        yield from zip(some, render(some), strict=True)


def _draw(pixels: np.ndarray, path: Path) -> None:
    Image.fromarray(pixels).save(path, compress_level=1)


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=2000, help="how many hunts")
    parser.add_argument("--hops", type=int, default=2, help="pointers to follow, pictures to show")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spoil", type=float, default=0.0, help="share of hunts to plant spoiled")
    parser.add_argument("--eval", type=int, default=0, help="hunts for evaluation, of another seed")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.n < 1 or args.hops < 1 or not 0 <= args.spoil <= 1:
        raise SystemExit("--n and --hops must be at least 1, and --spoil from 0 to 1")
    planted = write(sample(args.n, hops=args.hops, seed=args.seed), args.out, spoil=args.spoil)
    print(f"{args.n} hunts, {len(planted)} of them spoiled, in {args.out}")
    if args.eval:
        hunts = sample(args.eval, hops=args.hops, seed=args.seed + EVAL_SEED)
        write_evaluation(hunts, args.out / "eval")
        print(f"{args.eval} hunts for evaluation in {args.out / 'eval'}")


if __name__ == "__main__":
    main()
