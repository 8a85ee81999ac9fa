"""Files in repositories on the Hugging Face hub, by huggingface_hub, which is imported when it is needed."""

from collections.abc import Mapping
from pathlib import Path

from stepmask.errors import HubError


def fetch(
    repo_id: str, name: str, *, revision: str | None = None, token: str | None = None, local_files_only: bool = False
) -> Path:
    """A file of a repository, in huggingface_hub's cache.

    Args:
        repo_id: "owner/name".
        name: Of the file.
        revision: Branch, tag or commit; `None` = main.
        token: Of the user; `None` = the one that huggingface_hub knows.
        local_files_only: Whether to look into the cache alone.

    Raises:
        HubError: There is no such repository, revision or file, or it cannot be reached or read.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, name, revision=revision, token=token, local_files_only=local_files_only))
    except Exception as error:  # the hub's, the network's and the cache's own, which have no common root
        raise _failed(f"{name} of {repo_id!r}, which could not be read", error) from error


def push(
    repo_id: str,
    files: Mapping[str, bytes],
    *,
    message: str,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool = False,
) -> str:
    """Put files into a repository in one commit, making the repository and the branch where they are not there.

    Args:
        repo_id: "owner/name".
        files: Contents by name.
        message: Of the commit.
        private: Whether a new repository is private; `None` = as the owner's default is.
        token: As in `fetch`.
        branch: To commit to; `None` = main.
        create_pr: Whether to open a pull request instead.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        HubError: The hub refuses, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token, library_name="stepmask")
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if branch is not None:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        added = [CommitOperationAdd(name, content) for name, content in files.items()]
        commit = api.create_commit(repo_id, added, commit_message=message, revision=branch, create_pr=create_pr)
    except Exception as error:  # as in `fetch`
        raise _failed(f"{', '.join(files)} for {repo_id!r}, which could not be pushed", error) from error
    return str(commit.pr_url or commit.commit_url)


def _failed(what: str, error: Exception) -> HubError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return HubError(
        given=f"{what} ({type(error).__name__}: {reason.rstrip('.')})",
        expected="a repository on the Hugging Face hub that this token may use",
        advice="Check the name, the revision, the network and the token (`hf auth login`)",
    )
