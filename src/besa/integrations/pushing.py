"""Uploading a checkpoint to the Hugging Face Hub: checked, with its card, in one commit.

`HfApi.create_commit` uploads the large files first, each only if the Hub does not have it, and makes the commit at the
end. An interrupted push therefore leaves no half of a model in the repository, and the next one goes on with the files
that are missing; with hf_xet, which is installed with huggingface_hub, with the missing parts of files. Nothing is
written into the folder but the card.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of the client that it uses
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from pydantic import BaseModel

from besa.checkpoint.companions import OWN
from besa.checkpoint.verification import digests_of, verify
from besa.data.arguments import checked
from besa.errors import BesaError, Interrupted
from besa.evaluation.carding import update_card
from besa.models.hub import CARD, in_brief, no_hub
from besa.progress import Progress, silent
from besa.record import RECORD_NAME
from besa.storage.names import path_of
from besa.storage.weights import NAMES
from besa.version import __version__


class Pushed(BaseModel):
    """A checkpoint on the Hub.

    Attributes:
        repo: its repository.
        url: of the repository.
        commit: that holds the files.
        changed: whether the push made that commit; if not, the Hub had all files already.
        files: names of the files.
        left_out: names of files and folders in the folder that do not belong to the checkpoint.
        removed: weight files of an earlier push that the commit removed, because this checkpoint has others.
    """

    repo: str
    url: str
    commit: str
    changed: bool
    files: list[str]
    left_out: list[str]
    removed: list[str]


@dataclass(frozen=True)
class Parcel:
    """A checkpoint that was checked, and where it goes.

    Attributes:
        folder: of the checkpoint.
        repo: its repository on the Hub.
        files: names of the files to upload.
        left_out: names of the other files and folders.
    """

    folder: Path
    repo: str
    files: list[str]
    left_out: list[str]


@checked
def push(folder: str | Path, repo: str, *, private: bool = False, progress: Progress = silent) -> Pushed:
    """Upload a checkpoint with its record, its measurements and its card to the Hugging Face Hub.

    The files are first compared with their digests, and the card is brought up to date. A repository that does not
    exist is created. Files that are not of the checkpoint stay here. huggingface_hub shows the progress of the upload.

    Args:
        folder: that `prune`, `pack`, `unpack` or `shrink` wrote.
        repo: its name on the Hub, with user or organisation.
        private: create the repository so that only its owners see it.
        progress: called with (bytes compared, bytes in all, name of the file).

    Raises:
        BesaError: the name cannot be one of a repository, nobody is logged in, the folder is no checkpoint or has
            changed, or the Hub cannot be reached or refuses.
    """
    return send(prepare(folder, repo, progress), private)


def prepare(folder: str | Path, repo: str, progress: Progress = silent) -> Parcel:
    """Check a checkpoint and where it shall go, before anything is sent; arguments and errors as of `push`."""
    folder = path_of(folder)
    _check_name(repo)
    if constants.is_offline_mode():
        raise BesaError("HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it.")
    if not get_token():
        raise BesaError("Nobody is logged in to the Hugging Face Hub here: run `hf auth login`, or set HF_TOKEN.")
    verify(folder, progress=progress)
    update_card(folder)
    beside = {path.name for path in folder.glob(OWN) if path.is_file()}
    files = {*digests_of(folder / RECORD_NAME), *beside, CARD}
    tops = {name.partition("/")[0] for name in files}
    others = {path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()}
    left_out = {
        name.as_posix() if name.parts[0] in tops or len(name.parts) == 1 else f"{name.parts[0]}/"
        for name in others
        if name.as_posix() not in files
    }
    return Parcel(folder, repo, sorted(files), sorted(left_out))


def send(parcel: Parcel, private: bool) -> Pushed:
    """Upload a checkpoint that was checked; arguments and errors as of `push`."""
    api = HfApi(library_name="besa", library_version=__version__)
    with _explained(parcel.repo):
        url = api.create_repo(parcel.repo, private=private or None, exist_ok=True)
        about = api.model_info(url.repo_id, files_metadata=False)
        if private and not about.private:
            raise BesaError(
                f"{url.repo_id} exists and is public: leave out --private, or make it private in its settings first."
            )
        update_card(parcel.folder, url.repo_id)  # now that there is a repository of this name
        there = [file.rfilename for file in about.siblings or []]
        removed = [name for name in there if NAMES.fullmatch(name) and name not in parcel.files]
        commit = api.create_commit(
            url.repo_id,
            [
                *(CommitOperationAdd(name, parcel.folder / name) for name in parcel.files),
                *(CommitOperationDelete(name, is_folder=False) for name in removed),
            ],
            commit_message=f"Upload {parcel.folder.absolute().name} by besa {__version__}",
        )
    return Pushed(
        repo=url.repo_id,
        url=str(url),
        commit=commit.oid,
        changed=commit.oid != about.sha,
        files=parcel.files,
        left_out=parcel.left_out,
        removed=removed,
    )


def _check_name(repo: str) -> None:
    """Refuse what cannot be the full name of a repository.

    Raises:
        BesaError: it is no such name.
    """
    try:
        validate_repo_id(repo)
        valid = "/" in repo
    except HFValidationError:
        valid = False
    if not valid:
        raise BesaError(f"{repo[:80]!r} cannot be the name of a repository: write USER/NAME or ORGANISATION/NAME.")


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn an error of huggingface_hub, and Ctrl-C, into one sentence, and keep its warnings out of the terminal."""
    again = "push again, and it goes on with what is missing"
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {repo} is as it was: {again}.") from None
    except HfHubHTTPError as error:
        raise _refusal(repo, error) from error
    except json.JSONDecodeError as error:
        raise no_hub() from error
    except OfflineModeIsEnabled as error:
        raise BesaError("HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it.") from error
    except (HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:  # RuntimeError: of one of several files
        if isinstance(cause := error.__cause__, HfHubHTTPError):
            raise _refusal(repo, cause) from error
        raise BesaError(f"The upload to {repo} broke off ({in_brief(cause or error)}): {again}.") from error
    except ValueError as error:
        if not str(error).startswith("Invalid metadata in README.md"):
            raise
        raise BesaError(
            f"The Hugging Face Hub refuses the card ({in_brief(error)}): mend the {CARD} of the folder."
        ) from error
    finally:
        hub_logging.set_verbosity(level)


def _refusal(repo: str, error: HfHubHTTPError) -> BesaError:
    """What a status of the Hub means for who pushes."""
    status, said = error.response.status_code, in_brief(error.server_message or "without a reason")
    if status == 401:
        return BesaError("The Hugging Face Hub does not know your token: log in with `hf auth login`.")
    if status in (403, 404):
        return BesaError(
            f"You may not write to {repo} ({said}): log in with `hf auth login`, with a token that may write there."
        )
    if status >= 500:
        return BesaError(f"The Hugging Face Hub failed on {repo} ({status}, {said}): push again later.")
    return BesaError(f"The Hugging Face Hub refuses {repo} ({status}, {said}).")
