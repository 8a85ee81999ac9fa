"""The Hugging Face hub: files read from its repositories and committed to them, and the card that they show."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from stepmask.errors import HubError

LOG_IN = "log in with `hf auth login`, or pass a token that may do this"
README = "README.md"


@dataclass(frozen=True)
class Source:
    """Where something saved lies: in a folder, or in a repository on the hub.

    Args:
        place: Path of a folder or of a file in it, or the id of a repository. A path that exists goes first.
        revision: Branch, tag or commit of the repository; `None` = its main branch.
        token: To read it with; `None` = the one that this machine is logged in with, `False` = none.
        cache_dir: Where downloads are kept; `None` = where huggingface_hub keeps all of them.
        local_files_only: Take what was downloaded before, and ask the network for nothing.
    """

    place: str | Path
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def file(self, name: str) -> Path:
        """The path of a file in the folder, or in the cache of what the hub gave.

        Raises:
            HubError: There is no such path, and the hub does not give the file.
        """
        path = Path(self.place)
        if path.exists():
            return path / name if path.is_dir() else path
        from huggingface_hub import hf_hub_download

        refused = f"{self.place}: no such file or folder, and"
        with _translated(refused, f"a folder or a repository with {name}", self.revision):
            return Path(
                hf_hub_download(
                    str(self.place),
                    name,
                    revision=self.revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    local_files_only=self.local_files_only,
                )
            )

    def folder(self, names: Sequence[str]) -> Path:
        """The folder, or that of the cache with what the hub gave: files of these names, in whatever folders they lie.

        Raises:
            HubError: There is no such path, and the hub does not give the repository.
        """
        path = Path(self.place)
        if path.exists():
            return path
        from huggingface_hub import snapshot_download

        refused = f"{self.place}: no such folder, and"
        with _translated(refused, f"a folder or a repository with {' and '.join(names)}", self.revision):
            return Path(
                snapshot_download(
                    str(self.place),
                    revision=self.revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    local_files_only=self.local_files_only,
                    allow_patterns=[pattern for name in names for pattern in (name, f"*/{name}")],
                )
            )

    def beside(self, path: Path, name: str) -> Path:
        """The path of another file of the folder, or of the very commit, that `file` found the first one in.

        Raises:
            HubError: As `file`.
        """
        if Path(self.place).exists():
            return path.with_name(name)
        return replace(self, revision=path.parent.name).file(name)  # the cache has a folder for each commit


@dataclass(frozen=True)
class Card:
    """What a repository's page says beyond what its files say themselves.

    Args:
        base_model: Hub id of the pipeline that they are for; `None` = not told.
        license: Of the files, as the hub abbreviates it, such as "apache-2.0"; `None` = not told.
        tags: By which the hub finds it, besides stepmask's own.
        body: Markdown below the code.
        pictures: PNG files by name, for the body to show.
    """

    base_model: str | None = None
    license: str | None = None
    tags: Sequence[str] = ()
    body: str = ""
    pictures: Mapping[str, bytes] = field(default_factory=dict)

    def markdown(self, title: str, *, tags: Sequence[str], about: str, code: str) -> str:
        """A README.md.

        Args:
            title: Its heading.
            tags: By which the hub finds the files, before the card's own.
            about: Markdown: what the files are.
            code: Python that uses them.
        """
        from huggingface_hub import ModelCardData

        data = ModelCardData(
            base_model=self.base_model, library_name="stepmask", license=self.license, tags=[*tags, *self.tags]
        )
        parts = [
            f"---\n{data.to_yaml()}\n---",
            f"# {title}",
            about,
            "## How to use",
            "```\npip install 'stepmask[diffusers]'\n```",
            f"```python\n{code}\n```",
            self.body,
        ]
        return "\n\n".join(filter(None, parts)) + "\n"


def push(
    repo_id: str,
    files: Mapping[str, str | bytes],
    readme: Callable[[str, Card], str],
    *,
    card: Card | None,
    revision: str | None,
    commit_message: str,
    private: bool | None,
    token: str | bool | None,
    create_pr: bool,
) -> str:
    """Commit files and a README.md to a repository, which is made if there is none, and return the commit's URL.

    Args:
        repo_id: owner/name, or a name of the owner of the token.
        files: Contents by name.
        readme: The text of README.md, given owner/name and the card.
        card: `None` = an empty one, and a README.md that is there already stays as it is.
        revision: Branch to commit to, made if there is none; `None` = main.
        commit_message: Its first line.
        private: Of a repository that is made; `None` = as its owner's default is.
        token: `None` = the one that this machine is logged in with.
        create_pr: Open a pull request instead, and return its URL.

    Raises:
        HubError: The hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    ours = (f"{repo_id} was not written to:", "a repository on the hub that the token may write to", revision)
    with _translated(*ours):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        kept = card is None and api.file_exists(repo_id, README, revision=revision)
    card = card or Card()
    contents = {**files} if kept else {**files, README: readme(repo_id, card), **card.pictures}
    additions = [CommitOperationAdd(name, _bytes(content)) for name, content in contents.items()]
    with _translated(*ours):
        commit = api.create_commit(
            repo_id, additions, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
    return str(commit.pr_url or commit.commit_url)


def _bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


@contextmanager
def _translated(given: str, expected: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into an error of ours."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the HTTP library that it uses

    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # the last is that of uploads
        reason, advice = _explained(error, revision)
        raise HubError(given=f"{given} {reason}", expected=expected, advice=advice) from error


def _explained(error: Exception, revision: str | None) -> tuple[str, str]:
    """Why the hub did not do what it was asked, and what to do about it."""
    from huggingface_hub import errors

    match error:
        case errors.HFValidationError():
            return "it cannot be the id of a hub repository", "Correct the path, or give an id such as owner/name"
        case errors.GatedRepoError():
            return "the repository is gated", f"Ask for access on its page, and {LOG_IN}"
        case errors.RepositoryNotFoundError():
            return "the hub shows no repository of that name", f"Correct the id; if it is private, {LOG_IN}"
        case errors.RevisionNotFoundError():
            return f"the repository has no revision {revision!r}", "Give a branch, a tag or a commit that it has"
        case errors.LocalEntryNotFoundError():
            return "it was not downloaded before and the hub was not reached", "Correct the name, or check the network"
        case errors.EntryNotFoundError():
            return "the repository has no such file", "Give a repository that push_to_hub made"
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"the hub refuses the token ({error.response.status_code})", LOG_IN.capitalize()
        case _:
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            return reason[0].rstrip("."), "Check the network and the arguments, and try again"
