"""The Hugging Face hub: whether it gives a repository, asked once and in seconds, and why it does not."""

import functools
import sys
from pathlib import Path

import datasets
import huggingface_hub
from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils._http import default_client_factory

from preftune.config.errors import UserError, brief

SECONDS = 5  # that a question waits
STALLED = max(10, constants.HF_HUB_DOWNLOAD_TIMEOUT)  # each call that reads a file
UPLOADING = 120  # each one that writes: the hub answers when it has stored what was sent


class HubError(UserError):
    """Why the hub does not give a repository, and how to go on."""


def patient_client():
    """huggingface_hub's own client, which would wait for minutes or for ever, and then try again.

    After two calls in a row without an answer, this process goes on with the local cache.
    """
    client = default_client_factory()
    send, stalls = client.send, 0

    def patient(request, **options):
        nonlocal stalls
        longest = UPLOADING
        if request.method in ("GET", "HEAD"):
            longest = STALLED if request.method == "GET" and "/resolve/" in request.url.path else SECONDS
        limits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {name: min(limit or longest, longest) for name, limit in limits.items()}
        try:
            response = send(request, **options)
        except Exception as error:
            if any(kind.__name__ == "TimeoutException" for kind in type(error).__mro__):
                stalls += 1
                if stalls == 2:
                    go_offline(error)
            raise
        stalls = 0
        return response

    client.send = patient
    return client


def go_offline(error: BaseException) -> None:
    """Let this process read the local cache alone, as after HF_HUB_OFFLINE=1, and print why."""
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    print(f"hub: no answer ({brief(error)}); going on with the local cache", file=sys.stderr, flush=True)


set_client_factory(patient_client)


@functools.cache
def require(repo: str, key: str, revision: str | None, kind: str = "model") -> None:
    """Raise HubError where the hub refuses `repo`. Where it does not answer, this process goes on with the local cache.

    `key` is what the user typed it for (model.path, data.path), `kind` model or dataset.
    """
    if constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=SECONDS)
    except Exception as error:
        if refused(error):
            raise HubError(why(error, repo, key, revision, kind)) from None
        # whichever HTTP library the client stands on: no network, a proxy, a hub that stalls
        go_offline(error)


def why(error: BaseException, repo: str, key: str, revision: str | None, kind: str = "model") -> str:
    """What kept a repository from being read, and what to do, in one line."""
    chain = causes(error)
    named = f"{key}={repo}" + (f" (revision {revision})" if revision else "")
    download = f"hf download {'--repo-type dataset ' * (kind == 'dataset')}{repo} --local-dir FOLDER"
    if any(isinstance(each, GatedRepoError) for each in chain) or "gated dataset" in str(error):  # datasets cuts causes
        return f"{named}: a gated repository. Accept its terms on its page at the hub, then `hf auth login`"
    if any(isinstance(each, RevisionNotFoundError) for each in chain):
        return f"{named}: the repository has no such branch, tag or commit"
    if any(refused(each) for each in chain):
        return (
            f"{named}: not a folder or file here, and the hub has no such repository, or a private one: check the "
            "name, or `hf auth login` with a token that may read it"
        )
    if constants.HF_HUB_OFFLINE or any(isinstance(each, OfflineModeIsEnabled) for each in chain):
        return (
            f"{named}: not a folder or file here, and not in the local hub cache, which alone is read (HF_HUB_OFFLINE, "
            f"or a hub that does not answer). Where there is a network: `{download}`, then "
            + ("`model=path model.path=FOLDER`" if kind == "model" else "`data=file data.path=FOLDER`")
        )
    if any(isinstance(each, RemoteEntryNotFoundError) for each in chain):
        return f"{named}: the repository lacks a file that is needed ({brief(error)})"
    return f"{named}: the hub did not give all of it ({brief(error)}). The same command goes on where it broke off"


def cached_commit(repo: str, revision: str, kind: str) -> str:
    """The commit that a branch or tag had when it was last read from the hub; a commit is its own."""
    folder = repo_folder_name(repo_id=repo, repo_type=kind)
    known = Path(constants.HF_HUB_CACHE) / folder / "refs" / revision
    return known.read_text() if known.is_file() else revision


def refused(error: BaseException) -> bool:
    """Whether the hub answered, and said no: no such repository or revision, or no access."""
    if isinstance(error, HfHubHTTPError) and not isinstance(error, RemoteEntryNotFoundError):
        return getattr(error.response, "status_code", None) in (401, 403, 404)
    return isinstance(error, HFValidationError)


def causes(error: BaseException) -> list[BaseException]:
    """The error and those that it came from."""
    chain = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None and below not in chain:
        chain.append(below)
    return chain


def push(folder: str, repo: str, private: bool) -> str:
    """Upload a folder as a model repository, made where there is none; returns its address. Raises HubError."""
    try:
        huggingface_hub.repo_exists(repo)  # in seconds, where the hub does not answer
        huggingface_hub.create_repo(repo, private=private, exist_ok=True)
        return str(huggingface_hub.upload_folder(folder_path=folder, repo_id=repo, commit_message="preftune export"))
    except Exception as error:
        raise HubError(
            f"push={repo}: {brief(error)}. The export stays in {folder}; `hf auth login`, then "
            f"`hf upload {repo} {folder}`"
        ) from None
