"""Fetching a model from the Hugging Face Hub: only the files that are needed, of one commit."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import (
    HfApi,
    ResolvedRevision,
    constants,
    get_cached_repo_tree,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of the client that it uses
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

from besa.errors import BesaError
from besa.models.downloading import Download
from besa.progress import Progress, silent
from besa.storage.companion_names import is_licence, is_read
from besa.storage.weights import INDEX, STEM, STEMS

OTHERS = ("*.json", "*.txt")  # files that model code of its own may read, whatever they are called
CONFIG, CARD = "config.json", "README.md"  # the card says what licence the model has
ADAPTER = "adapter_config.json"  # of an adapter beside the model: peft would load the adapter and its own base


def fetch(model: str, revision: str | None = None, *, weights: bool = True, progress: Progress = silent) -> Path:
    """The folder of a model's files in the local cache, named by their commit; missing files are downloaded.

    The weights are those that transformers would load: ``model.safetensors``, or else the shards of its index. Weights
    in other formats and files in subfolders are left out. Without a connection, the cache must have all files; of a
    commit that it has, the Hub is not asked for anything.

    Args:
        model: Hugging Face id.
        revision: branch, tag or commit, None for the default branch.
        weights: fetch these too, and not only the files beside them.
        progress: called with (bytes so far, bytes in all) of the download, from any thread, but never from two at once.

    Raises:
        BesaError: there is no such model or revision, no access to it, no connection, no room, or the model has no
            safetensors.
    """
    name = f"{model}@{revision}" if revision else model
    part = f"Only a part of {name} is in the cache"
    with _explained(model, revision, f"{name} is neither a folder here nor in the cache"):
        commit = HfApi().resolve_revision(model, revision=revision)
        listing = _listing(model, commit)
        if folder := _complete(model, commit, listing, weights):
            return folder
        try:  # also where the listing is known: asked for files, huggingface_hub would try to reach the Hub for long
            info = HfApi().model_info(model, revision=commit.resolved, files_metadata=True)
        except (HTTPError, OfflineModeIsEnabled) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            if listing:
                raise BesaError(_out_of_reach(part, error)) from error
            return _cached(name, model, commit, weights, error)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    if CONFIG not in sizes:
        raise BesaError(f"{name} has no config.json: name a model in the format of transformers.")
    with _explained(model, revision, part):
        files = []
        if weights:
            indexes = [f"{stem}{INDEX}" for stem in STEMS if f"{stem}{INDEX}" in sizes]
            folder = _download(model, commit, {each: sizes[each] for each in (CONFIG, *indexes)}, silent)
            if not (files := _weights(sizes, folder)):
                raise BesaError(
                    f"{name} has no {STEM}.safetensors, nor shards with an index: name another model or revision, as "
                    "besa reads no pickled weights."
                )
        wanted = {*_beside(sizes), *files}
        return _download(model, commit, {each: size for each, size in sizes.items() if each in wanted}, progress)


def unreachable(timeout: float) -> str | None:
    """Why the Hub does not answer; None if it does.

    Args:
        timeout: seconds to wait.
    """
    try:
        answer = get_session().get(f"{constants.ENDPOINT}/api/models", params={"limit": 1}, timeout=timeout)
        answer.raise_for_status()
        answer.json()
    except (HTTPError, OfflineModeIsEnabled, ValueError) as error:  # ValueError: something else answers in its place
        return in_brief(error) or type(error).__name__
    return None


def _listing(model: str, commit: ResolvedRevision) -> list[str]:
    """Names of all files of a commit, as the cache keeps them with what it has of it; none if it has nothing."""
    try:
        return [file.path for file in get_cached_repo_tree(model, revision=commit)]
    except CachedRepoTreeNotFoundError:
        return []


def _complete(model: str, commit: ResolvedRevision, names: Collection[str], weights: bool) -> Path | None:
    """The folder of a model in the cache, None if a file is missing there.

    Args:
        model: as of `fetch`.
        commit: of the model.
        names: of all its files.
        weights: as of `fetch`.
    """
    beside = _beside(names)
    if CONFIG not in beside or not all(_has(model, commit, name) for name in beside):
        return None
    folder = Path(str(try_to_load_from_cache(model, CONFIG, revision=commit.resolved))).parent
    files = _weights(names, folder) if weights else []
    lacks = (weights and not files) or not all(name in names and _has(model, commit, name) for name in files)
    return None if lacks else folder


def _has(model: str, commit: ResolvedRevision, name: str) -> bool:
    """Whether the cache has a file of a commit."""
    return isinstance(try_to_load_from_cache(model, name, revision=commit.resolved), str)


def _download(model: str, commit: ResolvedRevision, sizes: Mapping[str, int], progress: Progress) -> Path:
    """The folder of a model, with these files in it.

    Args:
        model: as of `fetch`.
        commit: of the model.
        sizes: of the files by their names, in bytes.
        progress: as of `fetch`.
    """
    lacking = sum(size for name, size in sizes.items() if not _has(model, commit, name))
    download = Download(progress, lacking, f"downloading {model}")
    download.reach(0)
    folder = snapshot_download(model, revision=commit, allow_patterns=list(sizes), tqdm_class=download.bars)
    download.reach(lacking)  # also with files that another commit or process has brought into the cache
    return Path(folder)


def _cached(name: str, model: str, commit: ResolvedRevision, weights: bool, reason: Exception) -> Path:
    """The folder of a model that another program has put into the cache, without the listing of the Hub.

    Args:
        name: for the error message.
        model: as of `fetch`.
        commit: of the model.
        weights: as of `fetch`.
        reason: why the Hub cannot be asked.

    Raises:
        BesaError: configuration or weights are missing.
    """
    try:
        folder = Path(snapshot_download(model, revision=commit, allow_patterns=[CONFIG], local_files_only=True))
    except LocalEntryNotFoundError:
        raise BesaError(_out_of_reach(f"{name} is neither a folder here nor in the cache", reason)) from reason
    names = {path.name for path in folder.iterdir()}
    files = _weights(names, folder)
    if CONFIG not in names or (weights and not (files and names.issuperset(files))):
        raise BesaError(_out_of_reach(f"Only a part of {name} is in the cache", reason)) from reason
    return folder


def _weights(names: Collection[str], folder: Path) -> list[str]:
    """Names of the weight files among those of a model; none if it has no weights that besa reads."""
    for stem in STEMS:
        if f"{stem}.safetensors" in names:
            return [f"{stem}.safetensors"]
        if f"{stem}{INDEX}" in names:
            return _shards(folder / f"{stem}{INDEX}")
    return []


@contextmanager
def _explained(model: str, revision: str | None, lacking: str) -> Iterator[None]:
    """Turn an error of huggingface_hub into one sentence.

    Args:
        model: Hugging Face id.
        revision: as of `fetch`.
        lacking: a clause that says what the cache lacks.
    """
    try:
        yield
    except HFValidationError:
        raise BesaError(
            f"There is no folder {model}, and it cannot be a Hugging Face id either, which is like ORGANISATION/NAME: "
            "check the name."
        ) from None
    except GatedRepoError as error:
        raise BesaError(
            f"{model} is gated: accept its licence at {constants.ENDPOINT}/{model}, and log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise BesaError(
            f"There is no folder {model}, and no model of this name on the Hugging Face Hub that you may read: check "
            "the name, and if it is private, log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise BesaError(f"{model} has no revision {revision}: name one of its branches, tags or commits.") from error
    except (LocalEntryNotFoundError, RevisionResolutionError) as error:
        raise BesaError(_out_of_reach(lacking, error.__cause__)) from error
    except HfHubHTTPError as error:
        status, said = error.response.status_code, error.server_message or "without a reason"
        if status == 401:
            raise BesaError("The Hugging Face Hub does not know your token: log in with `hf auth login`.") from error
        raise BesaError(
            f"The Hugging Face Hub refuses {model} (status {status}, {in_brief(said)}): try again later."
        ) from error
    except (HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:  # RuntimeError: of hf_xet
        raise _broken_off(model, error) from error
    except json.JSONDecodeError as error:
        raise no_hub() from error
    except OSError as error:
        if error.errno is None:  # of huggingface_hub: a file has another size than it should have
            raise _broken_off(model, error) from error
        raise BesaError(
            f"The cache of the Hugging Face Hub in {constants.HF_HUB_CACHE} cannot be written ({error.strerror}): set "
            "HF_HOME to a folder that can be."
        ) from error


def _out_of_reach(lacking: str, cause: BaseException | None) -> str:
    """The sentence about a model that the cache lacks, and that the Hub cannot be asked for because of `cause`."""
    if isinstance(cause, OfflineModeIsEnabled):
        return f"{lacking}, and HF_HUB_OFFLINE forbids to ask the Hugging Face Hub for it: unset that."
    reason = f"status {cause.response.status_code}" if isinstance(cause, HfHubHTTPError) else in_brief(cause)
    return f"{lacking}, and the Hugging Face Hub cannot be reached ({reason}): try again when it can."


def _broken_off(model: str, error: Exception) -> BesaError:
    return BesaError(
        f"The download of {model} broke off ({in_brief(error)}): try again, and it goes on with what is missing."
    )


def no_hub() -> BesaError:
    """What to say of an answer that is no JSON."""
    return BesaError(
        f"{constants.ENDPOINT} does not answer as the Hugging Face Hub does: check HF_ENDPOINT and the proxy."
    )


def in_brief(reason: object) -> str:
    """A reason that somebody else gave, on one line and not too long."""
    return " ".join(str(reason).split()).rstrip(".")[:200]


def _beside(names: Collection[str]) -> list[str]:
    """Names of the files beside the weights that are fetched, of all names."""
    return [name for name in names if belongs(name) or name == CARD]


def belongs(name: str) -> bool:
    """Whether a file may belong to a model beside its weights.

    Args:
        name: of the file, relative to the model's folder.
    """
    other = "/" not in name and any(fnmatchcase(name, pattern) for pattern in OTHERS) and name != ADAPTER
    return other or is_read(name) or is_licence(name)


def _shards(index: Path) -> list[str]:
    """Names of the shards of an index; none for a damaged index, which is refused when the folder is opened."""
    try:
        return sorted({str(file) for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
