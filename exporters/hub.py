"""`l4q-export --push-to-hub`: finished exports to the Hugging Face hub, through huggingface_hub.

The export is complete on disk before the first byte is sent, and stays so whatever the network does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from l4q.errors import L4QError, UsageError

PLACE = "{format}"


class HubError(L4QError):
    """A finished export that could not be pushed to the hub."""

    exit_code = 69  # EX_UNAVAILABLE of sysexits.h


def repositories(repo: str, formats: Sequence[str]) -> dict[str, str]:
    """The repository of every format: `repo` with the format in place of "{format}".

    Raises:
        UsageError: Several formats would land in one repository, or a name is none the hub allows.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if len(formats) > 1 and PLACE not in repo:
        raise UsageError(
            "several formats cannot share one repository",
            where="--push-to-hub",
            got=repo,
            expected=f"a name with {PLACE} in it, such as {repo}-{PLACE}",
        )
    named = {name: repo.replace(PLACE, name) for name in formats}
    for name in named.values():
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise UsageError(
                "not a name of a repository on the hub", where="--push-to-hub", got=error, expected="USER/NAME"
            ) from error
    return named


def push(folder: Path, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload an exported folder in one commit; the repository, and a branch other than main, are made if need be.

    Args:
        folder: The export.
        repo: USER/NAME.
        private: Make a repository that does not exist yet private.
        revision: Branch; main if None.

    Returns:
        The commit's address.

    Raises:
        HubError: The hub refused or could not be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="l4q")
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        message = f"Upload {folder.name} export of l4q"
        commit = api.upload_folder(repo_id=repo, folder_path=folder, revision=revision, commit_message=message)
    except Exception as error:  # whatever the network, the hub or its client came up with
        branch = "" if revision is None else f" --revision {revision}"
        raise HubError(
            "the export is complete, but could not be pushed to the hub",
            where=f"{folder} to {repo}",
            got=f"{type(error).__name__}: {_first_line(error)}",
            expected="a reachable hub, and a token that may write there (hf auth login, or HF_TOKEN)",
            remedy=f"push it again with: hf upload {repo} {folder}{branch}",
        ) from error
    return str(commit.commit_url)


def _first_line(error: BaseException) -> str:
    """What went wrong, in one line; where the client only says what it was doing, that of the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = f" ({_first_line(error.__cause__)})" if isinstance(error, RuntimeError) and error.__cause__ else ""
    return (lines[0] if lines else "no message") + cause
