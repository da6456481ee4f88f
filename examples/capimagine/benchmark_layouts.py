r"""The six benchmarks of the paper, and our own two, as questions: read from their public layouts.

A layout is a folder as it lies on the Hub (or as VLMEvalKit saves it); `read` finds its files,
takes one row after the other, and never holds more than one picture. A row that cannot be asked is
refused with its id and a reason, and the rest goes on.

How far the layouts are known:

- V*: `test_questions.jsonl` beside `direct_attributes/` and `relative_position/`. File names and
  the columns image, text, category, label, question_id are those of the Hub's page and of
  lmms-eval's task; the lines themselves were not seen. Or a VLMEvalKit table with options A to D.
- HR-Bench: `hr_bench_4k.parquet` or `.tsv`, columns as on its card; category is `single` (FSP) or
  `cross` (FCP). Each question is there four times, with its options turned (`cycle_category`).
- MME-RealWorld-Lite: a table as lmms-eval and VLMEvalKit read it, or the authors' JSON. The keys of
  the JSON are from memory and unverified.
- BLINK: one folder for each task with `val-*.parquet`; the `test` split has no public answers.
- TableVQA: `data/{vwtq,vwtq_syn,vtabfact}-*.parquet`. What `gt` holds for VTabFact is unverified;
  true/false, yes/no and 1/0 are understood, anything else is refused. Open answers are scored by
  `matcher.same`, which is ours, not the authors' script.
- VSP: JSON lines in Mirage's layout (text_input, image_input, text_output). The files of the
  paper's 400 test questions are not public under a name we know; the answer is taken from `answer`
  or from the box in `text_output`. Unverified.
- `hunts`: held-out treasure hunts for organisms. `chains`: a chains.jsonl of this recipe.
"""

import ast
import base64
import binascii
import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from examples.capimagine import chains
from examples.capimagine.matcher import LETTERS
from examples.capimagine.refused import Refusal, Refused
from imaginelens.hooks.errors import InputError, brief
from imaginelens.organisms.hunt import SHAPES, sample

MOST = 512  # hunts, if nobody says how many
HELD_OUT = 10**9  # the seed of hunts that no organism was trained on
Source = bytes | Path | Image.Image
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
        id: unique in the benchmark.
        split: the sub-split that its score belongs to.
        text: what is asked, options and all.
        options: what A, B, ... say; none for open questions.
        answer: the letter of the right option, or the words of the right answer.
        pictures: undecoded.
        lettered: whether `text` shows letters.
        group: questions of one group depend on each other; "" if it is alone.
    """

    id: str
    split: str
    text: str
    options: tuple[str, ...]
    answer: str
    pictures: tuple[Source, ...]
    lettered: bool = True
    group: str = ""

    def example(self, suffix: str = "") -> dict[str, Any]:
        """The question as `lens.run` takes it; `suffix` is put behind the text."""
        return {"images": [_opened(p) for p in self.pictures], "text": self.text + suffix}


Layout = Callable[[Path], Iterator[tuple[str, Callable[[], Question]]]]


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lies and how it is scored.

    Attributes:
        title: its name in the paper.
        layout: yields for each row its id and what makes a question of it; None for hunts, which
            are drawn.
        hub: the repository and the files of it to fetch; None if it is not on the Hub.
        overall: `pooled`: all questions alike. `splits`: the unweighted mean of the sub-splits.
        sizes: how many questions each sub-split has, where we know.
        turned: whether questions come several times, with their options turned.
    """

    title: str
    layout: Layout | None
    hub: tuple[str, str] | None = None
    overall: Literal["pooled", "splits"] = "pooled"
    sizes: Mapping[str, int] = field(default_factory=dict)
    turned: bool = False


def read(
    name: str, data: Path | None = None, *, limit: int | None = None, hops: int = 2
) -> Iterator[Question | Refused]:
    """Read a benchmark, row by row.

    Args:
        data: its folder; None fetches it from the Hub. For `hunts` nothing is read.
        limit: stop after so many rows. Of hunts there are MOST, if it says nothing.
        hops: of hunts.

    Raises:
        InputError: there is no such benchmark, or no file of it.
    """
    if name not in BENCHMARKS:
        raise InputError(f"there is no benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    if benchmark.layout is None:
        yield from _hunts(MOST if limit is None else limit, hops)
        return
    folder = data or _fetched(name, benchmark)
    if not folder.exists():
        raise InputError(f"{folder} does not exist; give the folder that {benchmark.title} is in")
    seen: set[str] = set()
    for id, make in islice(benchmark.layout(folder), limit):
        try:
            question = make()
            _check(question)
            if question.id in seen:
                raise Refusal("id", "another row has the same id")
        except Refusal as refusal:
            yield refusal.of(id)
        except KeyError as error:
            yield Refused(id, f"it has no column {brief(error)}", "column")
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
            why = f"{type(error).__name__}: {brief(error)}"  # the last two: of what is too deep
            yield Refused(id, f"it cannot be read ({why})", "unreadable")
        else:
            seen.add(question.id)
            yield question


def _check(question: Question) -> None:
    """Refuse what cannot be asked or scored."""
    options = question.options
    if len(options) == 1 or len(options) > len(LETTERS):
        raise Refusal("options", f"it has {len(options)} options, which is no choice")
    if len({o.casefold().strip() for o in options}) < len(options) or not all(options):
        raise Refusal("options", "two of its options are the same, or one is empty")
    if options and question.answer not in LETTERS[: len(options)]:
        raise Refusal(
            "answer", f"its answer {question.answer!r} is none of its {len(options)} options"
        )
    if not question.answer.strip() or not question.text.strip():
        raise Refusal("empty", "it has no question or no answer")
    "".join([question.text, *options, question.answer]).encode()  # UTF-8, or an error
    if not question.pictures:
        raise Refusal("picture", "it shows no picture")
    for picture in question.pictures:
        _looked_at(picture)


# ---- layouts -----------------------------------------------------------------------------------


def _vstar(folder: Path) -> Iterator[tuple[str, Callable[[], Question]]]:
    splits = {"direct_attributes": "attribute", "relative_position": "spatial"}
    path = _found(folder, "test_questions.jsonl", "VStarBench.tsv", "data/test-*.parquet")
    for number, row in _rows(path):
        id = str(row.get("question_id", row.get("index", number)))

        def make(row: Row = row, id: str = id) -> Question:
            split = _one_of(splits, row["category"])
            # ids count within a category
            if "A" in row:
                return _lettered(row, f"{split}/{id}", split, folder)
            question, options = _split_options(row["text"])
            return Question(
                id=f"{split}/{id}",
                split=split,
                text=_asked(question, options),
                options=options,
                answer=_letter(row["label"]),
                pictures=(_picture(row["image"], folder),),
            )

        yield id, make


def _hrbench(size: str) -> Layout:
    def layout(folder: Path) -> Iterator[tuple[str, Callable[[], Question]]]:
        path = _found(
            folder,
            f"hr_bench_{size}.parquet",
            f"data/hrbench_{size}-*.parquet",
            f"hr_bench_{size}.tsv",
            f"HRBench{size.upper()}.tsv",
        )
        for number, row in _rows(path):
            id = str(row.get("index", number))

            def make(row: Row = row, id: str = id) -> Question:
                split = _one_of({"single": "FSP", "cross": "FCP"}, row["category"])
                made = hashlib.blake2b(digest_size=8)
                made.update(str(row["question"]).encode())
                made.update(str(row["image"]).encode())
                return _lettered(row, id, split, folder, group=made.hexdigest())

            yield id, make

    return layout


def _mme(folder: Path) -> Iterator[tuple[str, Callable[[], Question]]]:
    path = _found(
        folder,
        "mme_realworld_lite.tsv",
        "MME-RealWorld-Lite.tsv",
        "data/*.parquet",
        "MME_RealWorld_Lite.json",
        "*.json",
    )
    for number, row in _rows(path):
        id = str(row.get("index", row.get("Question_id", number)))

        def make(row: Row = row, id: str = id) -> Question:
            if "Text" in row:  # the authors' own
                question, given, answer = row["Text"], row["Answer choices"], row["Ground truth"]
                split = f"{row['Task']}/{row['Subtask']}"
                shown = row["Image"]
            else:
                question, given = row["question"], row["multi-choice options"]
                answer, split = row["answer"], row["category"]
                shown = row["bytes"] if row.get("bytes") else row["image"]
            listed = ast.literal_eval(given) if isinstance(given, str) else list(given)
            options = tuple(re.sub(r"^\s*\(?[A-J][).]\s*", "", str(o)).strip() for o in listed)
            return Question(
                id=id,
                split=str(split),
                text=_asked(str(question), options),
                options=options,
                answer=_letter(answer),
                pictures=(_picture(shown, folder),),
            )

        yield id, make


def _blink(*tasks: str) -> Layout:
    def layout(folder: Path) -> Iterator[tuple[str, Callable[[], Question]]]:
        for task in tasks:
            for number, row in _rows(_found(folder, f"{task}/val-*.parquet")):
                id = str(row.get("idx", f"{task}/{number}"))

                def make(row: Row = row, id: str = id, task: str = task) -> Question:
                    if "hidden" in str(row["answer"]):
                        raise Refusal("answer", "its answer is hidden, as in all of the test split")
                    options = tuple(str(choice) for choice in row["choices"])
                    shown = [row.get(f"image_{i}") for i in range(1, 5)]
                    return Question(
                        id=id,
                        split=task,
                        text=str(row.get("prompt") or _asked(row["question"], options)),
                        options=options,
                        answer=_letter(row["answer"]),
                        pictures=tuple(_picture(p, folder) for p in shown if p is not None),
                    )

                yield id, make

    return layout


def _tablevqa(folder: Path) -> Iterator[tuple[str, Callable[[], Question]]]:
    truth = {"true": "A", "yes": "A", "1": "A", "false": "B", "no": "B", "0": "B"}
    names = {"vwtq": "VWTQ", "vwtq_syn": "VWTQ-syn", "vtabfact": "VTabFact"}
    for stem, split in names.items():
        for number, row in _rows(_found(folder, f"data/{stem}-*.parquet", f"{stem}-*.parquet")):
            id = f"{split}/{row.get('qa_id', number)}"

            def make(row: Row = row, id: str = id, split: str = split) -> Question:
                pictures = (_picture(row["image"], folder),)
                answer, question = str(row["gt"]), str(row["question"])
                if split != "VTabFact":
                    return Question(id, split, question, (), answer, pictures)
                answer = _one_of(truth, answer.strip().casefold())
                text = f"{question}\nIs this statement true or false?"
                return Question(id, split, text, ("true", "false"), answer, pictures, False)

            yield id, make


def _vsp(folder: Path) -> Iterator[tuple[str, Callable[[], Question]]]:
    for number, row in _rows(_found(folder, "test*.jsonl", "*test*.jsonl", "*.jsonl")):
        id = str(row.get("id", number))

        def make(row: Row = row, id: str = id) -> Question:
            text = str(row["text_input"])
            shown = row["image_input"]
            shown = [shown] if isinstance(shown, str) else shown
            answer = row.get("answer")
            if answer is None:
                boxes = re.findall(r"\\boxed\{([^{}]*)\}", str(row["text_output"]))
                if not boxes:
                    raise Refusal("answer", "it has neither `answer` nor a box in `text_output`")
                answer = boxes[-1]
            lines = re.findall(r"^\s*\(?([A-J])[).:]\s*(\S.*?)\s*$", text, re.MULTILINE)
            found = [words for letter, words in lines]
            lettered = "".join(letter for letter, _ in lines) == LETTERS[: len(lines)]
            options = tuple(found) if lettered and len(found) > 1 else ()
            return Question(
                id=id,
                split=str(row.get("task", row.get("level", "VSP"))),
                text=text.replace("<image>", "").strip(),
                options=options,
                answer=_letter(answer) if options else str(answer),
                pictures=tuple(_picture(p, folder) for p in shown),
            )

        yield id, make


def _hunts(n: int, hops: int) -> Iterator[Question]:
    for number, game in enumerate(sample(n, hops=hops, seed=HELD_OUT)):
        yield Question(
            id=str(number),
            split=f"{hops} hops",
            text=game.question,
            options=SHAPES,
            answer=LETTERS[SHAPES.index(game.answer)],
            pictures=(game.image(),),
            lettered=False,
        )


def _chains(folder: Path) -> Iterator[tuple[str, Callable[[], Question]]]:
    path = folder if folder.is_file() else _found(folder, "chains.jsonl")[0]
    try:
        loaded = chains.load(path)
    except ValueError as error:
        raise InputError(str(error)) from error
    for chain in loaded:
        shape = chain.answer in SHAPES

        def make(chain: chains.Chain = chain, shape: bool = shape) -> Question:
            return Question(
                id=chain.id,
                split=chain.subset,
                text=chain.question,
                options=SHAPES if shape else (),
                answer=LETTERS[SHAPES.index(chain.answer)] if shape else chain.answer,
                pictures=tuple(chain.pictures(chain.prompt)),
                lettered=False,
            )

        yield chain.id, make


BENCHMARKS: dict[str, Benchmark] = {
    "vstar": Benchmark(
        "V*", _vstar, ("craigwu/vstar_bench", "*"), sizes={"attribute": 115, "spatial": 76}
    ),
    "hrbench4k": Benchmark(
        "HR-Bench 4K",
        _hrbench("4k"),
        ("DreamMr/HR-Bench", "hr_bench_4k.parquet"),
        sizes={"FSP": 400, "FCP": 400},
        turned=True,
    ),
    "hrbench8k": Benchmark(
        "HR-Bench 8K",
        _hrbench("8k"),
        ("DreamMr/HR-Bench", "hr_bench_8k.parquet"),
        sizes={"FSP": 400, "FCP": 400},
        turned=True,
    ),
    "mme-realworld-lite": Benchmark(
        "MME-RealWorld-Lite", _mme, ("yifanzhang114/MME-RealWorld-lite-lmms-eval", "data/*")
    ),
    "blink": Benchmark(
        "BLINK",
        _blink("Jigsaw", "Multi-view_Reasoning"),
        ("BLINK-Benchmark/BLINK", "[JM]*/val-*"),
    ),
    "tablevqa": Benchmark(
        "TableVQA",
        _tablevqa,
        ("terryoo/TableVQA-Bench", "data/v*"),
        overall="splits",
        sizes={"VWTQ": 750, "VWTQ-syn": 250, "VTabFact": 250},
    ),
    "vsp": Benchmark("VSP", _vsp),
    "hunts": Benchmark("held-out treasure hunts", None),
    "chains": Benchmark("chains", _chains),
}


# ---- rows and files ----------------------------------------------------------------------------


def _fetched(name: str, benchmark: Benchmark) -> Path:
    """The folder of a benchmark, fetched from the Hub, or from its cache."""
    if benchmark.hub is None:
        raise InputError(f"{benchmark.title} is not on the Hub under a name we know; give --data")
    from huggingface_hub import snapshot_download

    repo, files = benchmark.hub
    try:
        return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=files))
    except Exception as error:  # of requests, of the Hub, of the disk: there are dozens
        raise InputError(
            f"{repo} could not be fetched from the Hub ({type(error).__name__}); download it where "
            f"there is a network, and give its folder with --data"
        ) from error


def _found(folder: Path, *patterns: str) -> list[Path]:
    """The files of the first pattern that has any."""
    for pattern in patterns:
        if paths := sorted(folder.glob(pattern)):
            return paths
    there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "no"
    raise InputError(f"{folder} has no {' or '.join(patterns)}; there is {there or 'nothing'}")


def _rows(paths: list[Path] | Path) -> Iterator[tuple[str, Row]]:
    """The rows of some files, with their numbers, which count on from file to file."""
    number = 0
    for path in [paths] if isinstance(paths, Path) else paths:
        try:
            for row in _READERS[path.suffix](path):
                yield str(number), row
                number += 1
        except (ValueError, TypeError, OSError, RecursionError, csv.Error) as error:
            raise InputError(  # Arrow's are ValueErrors
                f"{path} breaks off behind row {number} ({type(error).__name__}: {brief(error)}); "
                "fetch it again"
            ) from error


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # not JSON, or not UTF-8
                row = {}
            if line.strip():
                yield row if isinstance(row, dict) else {}


def _json(path: Path) -> Iterator[Row]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    yield from (row if isinstance(row, dict) else {} for row in rows)


def _tsv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # pictures are fields
    # what is not UTF-8 is refused where it stands, see `_check`
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
        yield from csv.DictReader(lines, delimiter="\t")


def _parquet(path: Path) -> Iterator[Row]:
    from pyarrow.parquet import ParquetFile

    for batch in ParquetFile(path).iter_batches(batch_size=8):
        yield from batch.to_pylist()


_READERS = {".jsonl": _jsonl, ".json": _json, ".tsv": _tsv, ".parquet": _parquet}


def _picture(given: Any, folder: Path) -> Source:
    """A picture as it comes: bytes, what the Hub makes of them, base64, or a path in the folder."""
    if isinstance(given, Mapping):
        given = given.get("bytes") or given.get("path")
    if isinstance(given, bytes):
        return given
    if not isinstance(given, str) or not given:
        raise Refusal(
            "picture", f"its picture is {type(given).__name__}, not bytes, base64 or a path"
        )
    if len(given) < 1024 and re.search(r"\.(?:jpe?g|png|webp|bmp)$", given, re.IGNORECASE):
        path = (folder / given).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise Refusal("picture", f"its picture {given!r} lies outside of the folder")
        if not os.path.isfile(path):  # which Path.is_file raises for names that are too long
            raise Refusal("picture", f"its picture {given!r} is not there")
        return path
    try:
        return base64.b64decode(given, validate=True)
    except binascii.Error as error:
        raise Refusal("picture", f"its picture is no base64 ({error})") from error


def _looked_at(picture: Source) -> None:
    """Refuse what is no picture, or too large to be one; only its head is read."""
    if isinstance(picture, Image.Image):
        return
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture):
            pass
    except Image.DecompressionBombError as error:
        raise Refusal("picture", f"its picture is too large to be one ({error})") from error
    except (OSError, SyntaxError) as error:
        raise Refusal("picture", "its picture cannot be read") from error


def _opened(picture: Source) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
        return image.convert("RGB")


# ---- words -------------------------------------------------------------------------------------


def _lettered(row: Row, id: str, split: str, folder: Path, group: str = "") -> Question:
    """A row of a VLMEvalKit table: options in columns of their own."""
    cells = [row.get(letter) for letter in LETTERS]
    options = tuple(str(cell) for cell in cells if cell not in (None, "", "nan") and cell == cell)
    return Question(
        id=id,
        split=split,
        text=_asked(str(row["question"]), options),
        options=options,
        answer=_letter(row["answer"]),
        pictures=(_picture(row["image"], folder),),
        group=group,
    )


def _asked(question: str, options: Sequence[str]) -> str:
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question.strip(), *lines])


def _split_options(text: str) -> tuple[str, tuple[str, ...]]:
    r"""The question and the options of a text that holds both.

    >>> _split_options("What colour?\n(A) red\n(B) blue\nAnswer with the option's letter.")
    ('What colour?', ('red', 'blue'))
    """
    found = re.findall(r"\(([A-J])\)\s*(.*?)\s*(?=\([A-J]\)|\n|$)", text)
    if "".join(letter for letter, _ in found) != LETTERS[: len(found)] or not found:
        raise Refusal("options", "its text has no options (A), (B), ... in order")
    return text.split("(A)")[0].strip(), tuple(words for _, words in found)


def _letter(given: Any) -> str:
    """A letter as layouts write it: "A", "(A)", "A.".

    >>> _letter("(B)")
    'B'
    """
    return str(given).strip().strip("().").upper()


def _one_of(names: Mapping[str, str], given: Any) -> str:
    if str(given) not in names:
        raise Refusal("value", f"{str(given)!r} is none of {', '.join(names)}")
    return names[str(given)]
