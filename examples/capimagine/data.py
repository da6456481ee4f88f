r"""Read reasoning data in the layouts it is published in, and write it for other trainers.

    python -m examples.capimagine.data raw --out read
    python -m examples.capimagine.data Monet-SFT-125K --out read
    python -m examples.capimagine.data CapImagine-Data --out read --layout capimagine
    python -m examples.capimagine.data data/chains.jsonl --out for_trl --export trl

A source is a folder or a JSON file in one of these layouts:

monet       folders such as `Visual_CoT/train.json`; records with `metadata` and `data`
messages    records with `messages`, as chat templates, TRL and ms-swift have them
llava       records with `conversations`, as LLaVA and LLaMA-Factory's sharegpt have them
capimagine  one JSON and one zip of pictures (or none, if it is unpacked): CapImagine-Data. Its
            schema is not published where we could read it, so its records may have any of the three
            forms above, and anything else is an error that says which keys were found
chains      what `chains.save` writes

The layout is found by looking; where two fit, that is an error, and `--layout` decides.
A record that cannot be used is refused with its id and a reason, and counted; the rest goes on.
"""

import argparse
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from PIL import Image

from examples.capimagine.chains import OPEN, Chain, Part, Picture, load, save
from examples.capimagine.refused import Refusal, Refused, SourceError, count
from examples.capimagine.unpack import unpack as unpack_zip
from imaginelens.hooks.errors import brief

SUBSETS = (
    *("Visual_CoT", "CogCoM", "ReFocus"),
    *("Zebra_CoT_count", "Zebra_CoT_visual_search", "Zebra_CoT_geometry"),
)
LAYOUTS = ("monet", "messages", "llava", "capimagine", "chains")
PLACEHOLDER = "<abs_vis_token></abs_vis_token>"
SYSTEM = "You are a helpful assistant."  # Monet's loader puts it in place of any other
SUFFIX = "\nPut your final answer within \\boxed{}."
KEEPS_SUFFIX = ("Zebra_CoT_visual_search", "Zebra_CoT_count")
OBSERVATION = re.compile(r"</?observation>")
ROLES = {
    **{role: role for role in ("system", "user", "assistant")},
    **{"human": "user", "gpt": "assistant"},
}

T = TypeVar("T")
# what a turn says: pictures and texts; the pictures are still names that nobody has looked at
Turn = tuple[str, list[Part]]


@dataclass(frozen=True)
class Reading:
    """What was read.

    Attributes:
        chains: the records that can be used.
        refused: the others.
        counts: records seen, chains, refused by kind (`refused: ...`), and what the loader changed
            (`changed: ...`).
        layout: which layout the source has.
    """

    chains: list[Chain]
    refused: list[Refused]
    counts: dict[str, int]
    layout: str


@dataclass
class _Tally:
    """What has been read so far."""

    chains: list[Chain] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    changed: Counter[str] = field(default_factory=Counter)
    ids: set[str] = field(default_factory=set)
    seen: int = 0


@dataclass(frozen=True)
class _Place:
    """Where a record is from: its file, and the folders its pictures may be named from."""

    file: Path
    roots: tuple[Path, ...]


def read(
    source: Path,
    layout: str | None = None,
    *,
    unpack: Path | None = None,
    allow_no_observation: bool = False,
) -> Reading:
    """Read a source in any of the `LAYOUTS`.

    Records in Monet's layout pass the filters of Monet's loader: a chain is refused if a picture in
    the reply follows a text without `<abs_vis_token></abs_vis_token>`, if there are not as many
    pictures as such placeholders, or if no `<observation>` follows a picture. Observation tags
    before any picture are removed, the system prompt becomes "You are a helpful assistant.", and
    the question loses "Put your final answer within \\boxed{}." except in two Zebra subsets.
    (By a reading of Monet's code: a picture that follows another picture is not checked.)
    Chains of CapImagine-Data have no picture in the reply, so there these filters do not apply.

    Args:
        source: a folder or a file.
        layout: one of `LAYOUTS`; found by looking if not given.
        unpack: the folder to unpack a zip of pictures to.
        allow_no_observation: leave out the filter that wants an observation, as Monet's flag of
            this name does.

    Raises:
        SourceError: there is nothing to read, or the layout is unknown or could be two.
    """
    if layout not in (None, *LAYOUTS):
        raise SourceError(f"the layout {layout!r} is none of {', '.join(LAYOUTS)}")
    if not source.exists():
        raise SourceError(f"{source} does not exist; give a folder or a JSON file")
    layout, files = _find(source, layout)
    tally = _Tally()
    if layout == "chains":
        _read_chains(files[0], tally)
        return _reading(tally, layout)
    folder = source if source.is_dir() else source.parent
    if layout == "capimagine":
        folder = _unpacked(folder, files, tally, unpack)
        files = [file for file in files if file.suffix != ".zip"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for file in files:
            roots = (folder, file.parent) if layout != "monet" else _monet_roots(source, file)
            roots = (*roots, folder.parent) if folder != source and unpack else roots
            _read_file(_Place(file, roots), layout, tally, allow_no_observation)
    return _reading(tally, layout)


def _reading(tally: _Tally, layout: str) -> Reading:
    counts = {"records": tally.seen, "chains": len(tally.chains)}
    counts |= {f"refused: {kind}": n for kind, n in count(tally.refused).items()}
    counts |= {f"changed: {what}": n for what, n in tally.changed.most_common()}
    return Reading(tally.chains, tally.refused, counts, layout)


# -- which layout ----------------------------------------------------------------------------------


def _find(source: Path, layout: str | None) -> tuple[str, list[Path]]:
    """The layout of a source, and the files to read."""
    found = _candidates(source)
    if layout:
        # records in any layout may lie in one file, or in a folder with nothing else
        kinds = (layout, "records") if layout != "chains" else (layout,)
        files = next((found[kind] for kind in kinds if kind in found), None)
        if not files:
            raise SourceError(
                f"{source} has nothing in the layout {layout}; there is: {_listed(source)}"
            )
        return layout, files
    if len(found) > 1:
        shown = " and ".join(
            f"{kind} ({', '.join(f.name for f in files[:3])})" for kind, files in found.items()
        )
        raise SourceError(f"{source} could be {shown}; say which with --layout")
    if not found:
        raise SourceError(
            f"{source} holds no subset/train.json, no JSON with a zip, and not exactly one JSON "
            f"file; there is: {_listed(source)}"
        )
    ((kind, files),) = found.items()
    return (kind if kind != "records" else _looked_at(files[0])), files


def _candidates(source: Path) -> dict[str, list[Path]]:
    """The layouts that the names of the files allow; `records` is any with records in one file."""
    if source.is_file():
        return {"chains" if source.name == "chains.jsonl" else "records": [source]}
    found: dict[str, list[Path]] = {}
    if subsets := sorted(source.glob("*/train.json")):
        found["monet"] = subsets
    if (source / "chains.jsonl").is_file():
        found["chains"] = [source / "chains.jsonl"]
    jsons = [
        file
        for file in sorted(source.glob("*.json*"))
        if file.suffix in (".json", ".jsonl") and file.name not in _BESIDE
    ]
    zips = sorted(source.glob("*.zip"))
    if len(jsons) == 1:
        kind = "capimagine" if zips else "records"
        found[kind] = [*jsons, *zips]
    return found


# what this recipe and LLaMA-Factory put beside records
_BESIDE = {
    *("chains.jsonl", "refused.jsonl", "verdicts.jsonl", "ledger.jsonl"),
    *("card.json", "planted.json", "dataset_info.json"),
}


def _listed(source: Path) -> str:
    names = sorted(p.name for p in source.iterdir()) if source.is_dir() else [source.name]
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "nothing"


_KEYS = {"data": "monet", "messages": "messages", "conversations": "llava"}


def _looked_at(file: Path) -> str:
    """The one layout that the records of a file have."""
    kinds: set[str] = set()
    keys: Counter[str] = Counter()
    fault = ""
    for _, record in _records(file):
        if isinstance(record, Refusal):
            fault = fault or f"; {record.reason}"
        if isinstance(record, dict):
            keys.update(str(key) for key in record)
            kinds |= {kind for key, kind in _KEYS.items() if key in record}
    if len(kinds) > 1:
        raise SourceError(
            f"{file.name} could be {' and '.join(sorted(kinds))}: its records have the keys "
            f"{_shown(keys)}; say which with --layout"
        )
    if not kinds:
        raise SourceError(
            f"{file.name} has no records with `data`, `messages` or `conversations`; the keys "
            f"found are: {_shown(keys)}{fault}"
        )
    return kinds.pop()


def _shown(keys: Counter[str]) -> str:
    return ", ".join(brief(f"{key!a}", 60) for key, _ in keys.most_common(12)) or "none"


def _monet_roots(source: Path, file: Path) -> tuple[Path, ...]:
    """Monet names pictures from the folder of all subsets; then from the subset's own."""
    return (source, file.parent) if source.is_dir() else (file.parent.parent, file.parent)


def _unpacked(folder: Path, files: list[Path], tally: _Tally, target: Path | None) -> Path:
    """The folder of CapImagine-Data's pictures, which are unpacked if they are still packed."""
    zips = [file for file in files if file.suffix == ".zip"]
    if not zips:
        return folder
    if target is None:
        raise SourceError(f"{zips[0].name} has to be unpacked; say where to, with `unpack`")
    for file in zips:
        tally.refused += unpack_zip(file, target)
    inside = list(target.iterdir()) if target.is_dir() else []
    return target if len(inside) != 1 or inside[0].is_file() else inside[0]


# -- files to records ------------------------------------------------------------------------------


def _records(file: Path) -> Iterator[tuple[int, Any]]:
    """The records of a JSON list or of JSON lines, numbered; what is no JSON comes as a Refusal."""
    # bytes that are no UTF-8 become surrogates: so the record that holds them can be told
    text = file.read_bytes().decode("utf-8-sig", "surrogateescape")
    return _lines(text) if file.suffix == ".jsonl" else _items(text)


def _lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, Refusal("no JSON", f"the line is no JSON: {error}")


def _items(text: str) -> Iterator[tuple[int, Any]]:
    """The items of a list, one by one, so that those before a fault are not lost."""
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")

    def after(at: int) -> int:
        return blank.match(text, at).end()  # type: ignore[union-attr]

    at, number = after(0), 0
    if text[at : at + 1] == "{":
        yield from _lines(text.replace("\n", " "))  # a single record, or no record at all
        return
    if text[at : at + 1] != "[":
        yield 1, Refusal("no list", f"the file begins with {text[at : at + 1]!a}, not with a list")
        return
    at = after(at + 1)
    while text[at : at + 1] != "]":
        number += 1
        try:
            record, at = decoder.raw_decode(text, at)
            at = after(at)
            if text[at : at + 1] not in (",", "]") or not text[at : at + 1]:
                raise ValueError("no comma and no end of the list follows")
        except (ValueError, RecursionError) as error:
            yield (
                number,
                Refusal("truncated JSON", f"the JSON breaks off or is wrong from here: {error}"),
            )
            return
        yield number, record
        if text[at] == ",":
            at = after(at + 1)


def _read_file(place: _Place, layout: str, tally: _Tally, allow_no_observation: bool) -> None:
    seen = 0
    inner = layout
    if layout == "capimagine":
        inner = _looked_at(place.file)
    for number, record in _records(place.file):
        tally.seen, seen = tally.seen + 1, seen + 1
        name = f"{place.file.parent.name}/{place.file.name}#{number}"
        try:
            if isinstance(record, Refusal):
                raise record
            if not isinstance(record, dict):
                raise Refusal("wrong type", f"the record is {_kind(record)}, not an object")
            chain = _READERS[inner](record, place, name)
            name = chain.id
            if layout == "monet":
                chain = _as_monet_loads(chain, tally.changed, allow_no_observation)
            _look_at_pictures(chain)
            if chain.id in tally.ids:
                raise Refusal("duplicate id", "a record before it has the same id")
        except Refusal as refusal:
            tally.refused.append(refusal.of(_printable(name)))
            continue
        tally.ids.add(chain.id)
        tally.chains.append(chain)
    if not seen:
        tally.refused.append(Refused(place.file.name, "the file has no records", "empty file"))


def _read_chains(file: Path, tally: _Tally) -> None:
    try:
        tally.chains = load(file) if file.stat().st_size else []
    except ValueError as error:
        raise SourceError(str(error)) from error
    tally.seen = len(tally.chains)


# -- records to chains -----------------------------------------------------------------------------


def _monet(record: dict[str, Any], place: _Place, name: str) -> Chain:
    meta = _typed(record.get("metadata", {}), dict, "metadata")
    folder = place.file.parent.name
    subset = folder if folder in SUBSETS else str(meta.get("dataset_name", folder))
    id = f"{subset}/{_id(meta['sample_id'])}" if "sample_id" in meta else name
    with _named(id):
        turns = [_structured(turn, iter(())) for turn in _typed(record.get("data"), list, "data")]
        return _chain(id, subset, turns, record, place)


def _messages(record: dict[str, Any], place: _Place, name: str) -> Chain:
    id = _id(record["id"]) if "id" in record else name
    with _named(id):
        shown = _names(record)
        unused = iter(shown)
        turns = [
            _structured(turn, unused) for turn in _typed(record.get("messages"), list, "messages")
        ]
        _all_used(turns, shown)
        return _chain(id, str(record.get("subset", place.file.stem)), turns, record, place)


def _llava(record: dict[str, Any], place: _Place, name: str) -> Chain:
    id = _id(record["id"]) if "id" in record else name
    with _named(id):
        shown = _names(record)
        unused = iter(shown)
        turns: list[Turn] = []
        if record.get("system"):
            turns.append(("system", [_words(record["system"], "system")]))
        for turn in _typed(record.get("conversations"), list, "conversations"):
            said = _typed(turn, dict, "a turn")
            turns.append((_role(said.get("from")), _split(_words(said.get("value")), unused)))
        _all_used(turns, shown)
        return _chain(id, str(record.get("subset", place.file.stem)), turns, record, place)


_READERS: dict[str, Callable[[dict[str, Any], _Place, str], Chain]] = {
    "monet": _monet,
    "messages": _messages,
    "llava": _llava,
}


class _named:
    """Gives a refusal raised inside the id of its record."""

    def __init__(self, id: str) -> None:
        self.id = id

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Refusal):
            error.id = self.id


def _structured(turn: Any, unused: Iterator[str]) -> Turn:
    """A turn whose content is a list of parts, or one text with `<image>` for each picture."""
    turn = _typed(turn, dict, "a turn")
    role, content = _role(turn.get("role")), turn.get("content")
    if isinstance(content, str):
        return role, _split(_words(content), unused)
    parts: list[Part] = []
    for part in _typed(content, list, "content"):
        part = _typed(part, dict, "a part of the content")
        if part.get("type") == "text":
            parts.append(_words(part.get("text")))
        elif part.get("type") == "image":
            name = part.get("image", part.get("path"))
            parts.append(Picture(_words(_next(unused) if name is None else name, "image")))
        else:
            raise Refusal(
                "wrong type", f"a part of the content is of type {part.get('type')!a}, not text"
            )
    return role, parts


def _split(text: str, unused: Iterator[str]) -> list[Part]:
    """The parts of a text in which `<image>` stands for the next picture."""
    first, *rest = text.split("<image>")
    parts: list[Part] = [first] if first else []
    for piece in rest:
        parts.append(Picture(_next(unused)))
        if said := piece.removeprefix("\n"):
            parts.append(said)
    return parts


def _next(unused: Iterator[str]) -> str:
    name = next(unused, None)
    if name is None:
        raise Refusal("wrong count", "more places for pictures than pictures")
    return name


def _all_used(turns: list[Turn], shown: list[str]) -> None:
    """Pictures that no placeholder stands for come before the question, as TRL puts them."""
    used = sum(isinstance(part, Picture) for _, parts in turns for part in parts)
    if shown and not used:
        for role, parts in turns:
            if role == "user":
                parts[:0] = map(Picture, shown)
                return
    if shown and used != len(shown):
        raise Refusal("wrong count", f"{used} places for pictures, but {len(shown)} pictures")


def _names(record: dict[str, Any]) -> list[str]:
    shown = record.get("images", record.get("image", []))
    shown = [shown] if isinstance(shown, str) else _typed(shown, list, "images")
    return [
        _words(one.get("path") if isinstance(one, dict) else one, "a picture's name")
        for one in shown
    ]


def _chain(id: str, subset: str, turns: list[Turn], record: dict[str, Any], place: _Place) -> Chain:
    """Put the turns of one question and one reply together."""
    roles = [role for role, _ in turns]
    asked = roles.count("user")
    if asked != 1 or "assistant" not in roles:
        raise Refusal("turns", f"a chain has one question and a reply; the turns are {roles}")
    if roles.index("user") > roles.index("assistant") or "system" in roles[1:]:
        raise Refusal("turns", f"the turns are out of order: {roles}")
    said = {role: [p for r, parts in turns if r == role for p in parts] for role in set(roles)}
    reply = tuple(said["assistant"])
    prompt = said["user"]
    pictures = [p.path for p in (*prompt, *reply) if isinstance(p, Picture)]
    folder = _folder(pictures, place.roots)
    return Chain(
        id=id,
        subset=subset,
        folder=folder,
        prompt=tuple(prompt),
        reply=reply,
        answer=_answer(reply, record),
        system="".join(p for p in said.get("system", []) if isinstance(p, str)),
    )


def _answer(reply: Sequence[Part], record: dict[str, Any]) -> str:
    said = "".join(part for part in reply if isinstance(part, str))
    answer = boxed(said)
    if answer is None and record.get("answer") is not None:
        answer = _words(record["answer"], "answer")
    if not answer or not answer.strip():
        raise Refusal("answer absent", "the reply has no \\boxed{} answer, and no key `answer`")
    return answer.strip()


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{}` of a text holds, its braces balanced; None if there is none.

    >>> boxed(r"so \boxed{a} or rather \boxed{\text{b}}")
    '\\text{b}'
    """
    begin = text.rfind("\\boxed{")
    if begin < 0:
        return None
    begin, depth = begin + len("\\boxed{"), 1
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin:end]
    return None


def _folder(pictures: list[str], roots: tuple[Path, ...]) -> Path:
    """The first folder from which all pictures are named."""
    for name in pictures:
        path = PurePosixPath(name)
        if path.is_absolute() or ":" in name or "\\" in name or "\0" in name:
            raise Refusal("absolute path", f"the picture {name!a} is not named from the folder")
        if ".." in path.parts:
            raise Refusal("path escapes", f"the picture {name!a} leads out of the folder")
    for root in roots:
        if all(_is_file(root / name) for name in pictures):
            return root
    missing = next(name for name in pictures if not _is_file(roots[0] / name))
    raise Refusal("missing picture", f"the picture {missing!a} is not there")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for a file
        return False


# -- what a record may hold ------------------------------------------------------------------------


def _as_monet_loads(chain: Chain, changed: Counter[str], allow_no_observation: bool) -> Chain:
    """The chain as Monet's loader makes it, or a refusal where the loader drops it."""
    reply: list[Part] = []
    pictures = places = 0
    observed = False
    before: Part | None = None
    for part in chain.reply:
        if isinstance(part, Picture):
            if isinstance(before, str) and PLACEHOLDER not in before:
                raise Refusal("no placeholder", f"no {PLACEHOLDER} before the picture {part.path}")
            pictures += 1
        else:
            places += part.count(PLACEHOLDER)
            if "<observation>" in part and not pictures:
                part = OBSERVATION.sub("", part)
                changed["observation tags before any picture removed"] += 1
            observed |= "<observation>" in part
        reply.append(part)
        before = part
    if pictures != places:
        raise Refusal("wrong count", f"{pictures} pictures in the reply for {places} placeholders")
    if not observed and not allow_no_observation:
        raise Refusal("no observation", "no <observation> follows a picture of the reply")
    first = chain.prompt[0] if chain.prompt else ""
    shown = first.path if isinstance(first, Picture) else ""
    prompt = chain.prompt
    if not any(subset in shown for subset in KEEPS_SUFFIX):
        prompt = tuple(p.replace(SUFFIX, "") if isinstance(p, str) else p for p in prompt)
        if prompt != chain.prompt:
            changed["question without its request to box"] += 1
    system = SYSTEM if chain.system else ""
    if system != chain.system:
        changed["system prompt"] += 1
    return replace(chain, prompt=prompt, reply=tuple(reply), system=system)


def _look_at_pictures(chain: Chain) -> None:
    """Refuse pictures that lie elsewhere, are empty, are none, or would fill the memory."""
    inside = chain.folder.resolve()
    for path in chain.pictures((*chain.prompt, *chain.reply)):
        name = path.relative_to(chain.folder)
        if not path.resolve().is_relative_to(inside):
            raise Refusal("path escapes", f"the picture {str(name)!a} is a link out of the folder")
        if not path.stat().st_size:
            raise Refusal("empty picture", f"the picture {str(name)!a} has 0 bytes")
        try:
            with Image.open(path) as picture:
                if picture.format == "PNG":
                    picture.verify()  # its sums; other formats are found damaged when shown
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise Refusal("picture too large", f"the picture {str(name)!a}: {error}") from error
        except (OSError, ValueError, SyntaxError) as error:
            reason = f"the picture {str(name)!a} cannot be read: {error}"
            raise Refusal("damaged picture", reason) from error


def _typed(value: Any, kind: type[T], what: str) -> T:
    if not isinstance(value, kind):
        raise Refusal("wrong type", f"{what} is {_kind(value)}, not {_NOUNS[kind]}")
    return value


_NOUNS: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}


def _words(value: Any, what: str = "a text") -> str:
    text = _typed(value, str, what)
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise Refusal("not UTF-8", f"{what} holds bytes that are no UTF-8") from error
    return text


def _id(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise Refusal("wrong type", f"the id is {_kind(value)}, not a text or a whole number")
    return _words(str(value), "the id")


def _role(value: Any) -> str:
    if not isinstance(value, str) or value not in ROLES:
        raise Refusal("wrong type", f"a turn's role is {value!a}, none of {', '.join(ROLES)}")
    return ROLES[value]


def _kind(value: Any) -> str:
    if value is None:
        return "absent"
    return _NOUNS.get(type(value), type(value).__name__)


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


# -- the command line ------------------------------------------------------------------------------


def write_refused(refused: Sequence[Refused], path: Path) -> None:
    """Write who was refused and why, as JSON lines."""
    lines = [json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in refused]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Read a source; write chains, or another trainer's files."""
    from examples.capimagine.exports import EXPORTS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layout", choices=LAYOUTS)
    parser.add_argument("--export", choices=list(EXPORTS), help="instead of chains.jsonl")
    parser.add_argument("--allow-no-observation", action="store_true", help="Monet's flag")
    parser.add_argument("--system", help="system prompt of the chains written; '' for none")
    args = parser.parse_args()
    try:
        reading = read(
            args.source,
            args.layout,
            unpack=args.out / "pictures",
            allow_no_observation=args.allow_no_observation,
        )
        refused, chains = list(reading.refused), reading.chains
        if args.system is not None:
            chains = [replace(chain, system=args.system) for chain in chains]
        if args.export:
            refused += EXPORTS[args.export](chains, args.out)
        else:
            save(chains, args.out / "chains.jsonl")
    except SourceError as error:
        raise SystemExit(str(error)) from error
    write_refused(refused, args.out / "refused.jsonl")
    print(f"layout {reading.layout}")
    for what, n in reading.counts.items():
        print(f"{n:8d}  {what}")
    for one in refused[:5]:
        print(f"refused {one.id}: {one.reason}")
    imagined = sum(OPEN in str(part) for chain in reading.chains for part in chain.reply)
    print(f"{imagined} texts with {OPEN}; written to {args.out}")


if __name__ == "__main__":
    main()
