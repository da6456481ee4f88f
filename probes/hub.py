"""What is saved to a folder, put on the Hub as a repository of models."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def upload(
    save: Callable[[Path], Any], repo_id: str, *, message: str, private: bool, token: str | None
) -> str:
    """Create the repository if it is not there, put in what `save` writes, return its address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    address = api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
    with TemporaryDirectory() as folder:
        save(Path(folder))
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    return str(address)
