"""Unpack a zip of pictures that someone else made, trusting nothing in it."""

import lzma
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from examples.capimagine.refused import Refused

CHUNK = 1 << 20
# what `zipfile` raises of bytes that are none; RuntimeError: also of ways to pack that it knows not
_DAMAGED: tuple[type[Exception], ...] = (OSError, EOFError, RuntimeError, ValueError)
_DAMAGED += (zipfile.BadZipFile, zlib.error, lzma.LZMAError)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a zip may hold: ours; pictures hardly compress, so the defaults are wide.

    Attributes:
        ratio: how many times larger than packed a member may be. Members up to `small` bytes are
            not held to it.
        member: bytes of one member.
        total: bytes of all members.
        count: members.
    """

    ratio: float = 100.0
    small: int = 1 << 20
    member: int = 1 << 28
    total: int = 1 << 37
    count: int = 2_000_000


def unpack(source: Path, target: Path, limits: Limits | None = None) -> list[Refused]:
    """Write the members of a zip below `target`; gives those that were refused, and why.

    What is there already in the right size is not unpacked again. A refused member never stops the
    rest; a record that names its picture is refused in turn, as its picture is missing.
    """
    limits = limits or Limits()
    refused: list[Refused] = []
    try:
        with zipfile.ZipFile(source) as packed:
            for member, name in _fit(packed, limits, refused):
                try:
                    _write(packed, member, target / name)
                except _DAMAGED as error:
                    refused.append(_bad(member.filename, "damaged", f"cannot be read: {error}"))
    except _DAMAGED as error:
        refused.append(Refused(f"zip:{source.name}", f"the zip cannot be read: {error}", "zip"))
    return refused


def _fit(
    packed: zipfile.ZipFile, limits: Limits, refused: list[Refused]
) -> Iterator[tuple[zipfile.ZipInfo, str]]:
    """The members to unpack, each with the path to unpack it to."""
    total, seen = 0, set[str]()
    members = packed.infolist()
    for member in members[limits.count :]:
        refused.append(_bad(member.filename, "too many", f"more than {limits.count} members"))
    for member in members[: limits.count]:
        if member.filename and member.is_dir():
            continue
        kind, reason = _wrong(member, limits)
        name = str(PurePosixPath(member.filename))
        if not kind and name.casefold() in seen:
            kind, reason = "duplicate", "another member has this name"
        if not kind and total + member.file_size > limits.total:
            kind, reason = "too large", f"all members together exceed {limits.total} bytes"
        if kind:
            refused.append(_bad(member.filename, kind, reason))
            continue
        seen.add(name.casefold())
        total += member.file_size
        yield member, name


def _wrong(member: zipfile.ZipInfo, limits: Limits) -> tuple[str, str]:
    """What speaks against a member, as (kind, reason); two empty words if nothing does."""
    path = PurePosixPath(member.filename)
    if not path.parts:
        return "no name", "it has no name"
    if path.is_absolute() or "\\" in member.filename or ":" in member.filename:
        return "absolute path", "its path is absolute, or is no path of this kind of system"
    if ".." in path.parts:
        return "escapes", "its path leads out of the folder"
    mode = member.external_attr >> 16
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        return "link", "it is a link or a device, not a file"
    if member.flag_bits & 1:
        return "encrypted", "it is encrypted"
    if member.file_size > limits.member:
        return "too large", f"it unpacks to {member.file_size} bytes, more than {limits.member}"
    packed = max(member.compress_size, 1)
    if member.file_size > limits.small and member.file_size / packed > limits.ratio:
        times = member.file_size / packed
        return "bomb", f"it unpacks to {times:.0f} times its size, more than {limits.ratio:g}"
    return "", ""


def _write(packed: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    if path.is_file() and path.stat().st_size == member.file_size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        # zipfile itself stops at the size that the member declares, and checks its sum
        with packed.open(member) as inside, part.open("wb") as outside:
            shutil.copyfileobj(inside, outside, CHUNK)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _bad(name: str, kind: str, reason: str) -> Refused:
    shown = name.encode("utf-8", "replace").decode("utf-8")
    return Refused(f"zip:{shown}", reason, f"zip: {kind}")
