"""The Hub as a folder: what `huggingface_hub` would do at its border, without a network.

Every call is held against the real signature, so that an argument which the installed
huggingface_hub does not have fails here as it would there.
"""

import fnmatch
import hashlib
import inspect
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

REAL = {
    "HfApi": huggingface_hub.HfApi,
    "snapshot_download": huggingface_hub.snapshot_download,
}
PREFIX = {"model": "", "dataset": "datasets/"}


def signed(real: Any, *given: Any, **named: Any) -> None:
    """Refuse arguments that the real function does not take."""
    inspect.signature(real).bind(*given, **named)


def http_error(kind: type[Exception], words: str) -> Exception:
    """An error of the Hub, without the response that it would come with."""
    error = kind.__new__(kind)
    Exception.__init__(error, words)
    return error


class LocalHub:
    """A folder of repositories, each with its commits.

    Attributes:
        calls: what was asked, with all arguments.
        offline: every call fails as without a network.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.calls, self.offline = root, [], False
        self.private: dict[tuple[str, str], bool] = {}
        monkeypatch.setattr(huggingface_hub, "HfApi", self.api)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def api(self, **given: Any) -> Any:
        signed(REAL["HfApi"], **given)
        self.calls.append(("HfApi", given))
        return SimpleNamespace(create_repo=self.create_repo, upload_folder=self.upload_folder)

    def create_repo(self, repo_id: str, **given: Any) -> str:
        signed(REAL["HfApi"].create_repo, None, repo_id, **given)
        self._asked("create_repo", repo_id, given)
        kind = given.get("repo_type") or "model"
        assert given.get("exist_ok"), "a repository that is there must not be an error"
        self._home(repo_id, kind).mkdir(parents=True, exist_ok=True)
        self.private.setdefault((kind, repo_id), bool(given.get("private")))
        return f"https://huggingface.co/{PREFIX[kind]}{repo_id}"

    def upload_folder(self, **given: Any) -> Any:
        signed(REAL["HfApi"].upload_folder, None, **given)
        self._asked("upload_folder", given["repo_id"], given)
        home = self._home(given["repo_id"], given.get("repo_type") or "model")
        if not home.is_dir():
            raise http_error(RepositoryNotFoundError, "404: no such repository")
        commits = self._commits(home)
        oid = hashlib.sha1(f"{given['repo_id']}{len(commits)}".encode()).hexdigest()
        new = home / oid
        if commits:
            shutil.copytree(commits[-1], new)
        shutil.copytree(given["folder_path"], new, dirs_exist_ok=True)
        with (home / "log").open("a") as log:
            log.write(oid + "\n")
        return SimpleNamespace(oid=oid, commit_message=given["commit_message"])

    def snapshot_download(self, repo_id: str, **given: Any) -> str:
        signed(REAL["snapshot_download"], repo_id, **given)
        self._asked("snapshot_download", repo_id, given)
        home = self._home(repo_id, given.get("repo_type") or "model")
        commits = self._commits(home)
        if not commits:
            raise http_error(RepositoryNotFoundError, "404: no such repository")
        revision = given.get("revision") or "main"
        found = [each for each in commits if each.name == revision] or commits[-1:]
        if revision not in ("main", found[-1].name):
            raise http_error(RevisionNotFoundError, "404: no such revision")
        folder = self.root / "cache" / repo_id / "snapshots" / found[-1].name
        for path in found[-1].rglob("*"):
            wanted = given.get("allow_patterns") or ["*"]
            name = path.relative_to(found[-1]).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, each) for each in wanted):
                link = folder / name
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists():
                    link.symlink_to(path)  # as the real cache does
        return str(folder)

    def files(self, repo_id: str, kind: str = "model") -> set[str]:
        """What the newest commit of a repository holds."""
        newest = self._commits(self._home(repo_id, kind))[-1]
        return {p.relative_to(newest).as_posix() for p in newest.rglob("*") if p.is_file()}

    def text(self, repo_id: str, name: str, kind: str = "model") -> str:
        """A file of the newest commit."""
        return (self._commits(self._home(repo_id, kind))[-1] / name).read_text(encoding="utf-8")

    def _asked(self, what: str, repo_id: str, given: dict[str, Any]) -> None:
        validate_repo_id(repo_id)
        self.calls.append((what, {"repo_id": repo_id, **given}))
        if self.offline:
            raise OfflineModeIsEnabled("Cannot reach the Hub: offline mode is enabled.")

    def _home(self, repo_id: str, kind: str) -> Path:
        return self.root / kind / repo_id

    def _commits(self, home: Path) -> list[Path]:
        log = home / "log"
        return [home / oid for oid in log.read_text().split()] if log.is_file() else []
