"""Where the files of a set are found: in a folder, inside this package, on the Hugging Face Hub."""

import hashlib
import os
import re
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from sparta_act.errors import WeightsError
from sparta_act.pretrained.files import CARD, CONFIG, WEIGHTS
from sparta_act.pretrained.shipped import SHIPPED

ORGANISATION = "sparta-act"
SETS = Path(__file__).parents[1] / "sets"


def locate(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Path:
    """Folder with the files of a set: an existing folder, else a set of ours, else a download from the Hub.

    Raises `WeightsError` where there is none, or where a set of ours is not as it was made.
    """
    if not isinstance(name_or_path, str | os.PathLike) or not os.fspath(name_or_path):
        raise WeightsError(
            f"asked for {name_or_path!r}; give a folder, 'organisation/name', or one of our sets: "
            f"{list(SHIPPED)}"
        )
    name, folder = os.fspath(name_or_path), Path(name_or_path)
    if folder.is_dir() or name in SHIPPED:
        if revision is not None:
            raise WeightsError(
                f"asked for {name!r} at revision {revision!r}, found a set which has no revisions; leave "
                f"revision out, or give 'organisation/name' for a set on the Hub"
            )
        if folder.is_dir():
            return folder
        if (SETS / name).is_dir():
            return _as_made(
                name, SETS / name, (CARD, CONFIG, WEIGHTS), "Install sparta-act again, or restore the files"
            )
    a_path = isinstance(name_or_path, os.PathLike) or folder.exists()
    if a_path or not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name):
        raise WeightsError(
            f"asked for {name!r}, found no such folder, and it is no name on the Hub; give a folder with "
            f"{CONFIG} and {WEIGHTS}, 'organisation/name', or one of our sets: {list(SHIPPED)}"
        )
    repo_id = name if "/" in name else f"{ORGANISATION}/{name}"
    try:
        found = _download(repo_id, revision, cache_dir, token, local_files_only)
    except Exception as error:  # of requests, httpx or httpx2, by the version of huggingface-hub
        raise WeightsError(
            f"asked for {name!r}, which is no folder and not in this package; our sets are {list(SHIPPED)}; "
            f"looked for {repo_id} at revision {revision or constants.DEFAULT_REVISION} on "
            f"{constants.ENDPOINT}, found {reason(error)}. Check name and revision, and `token` if it is "
            f"private or gated; without a network, only folders, sets in the package and sets downloaded "
            f"before can be loaded"
        ) from error
    ours = name.removeprefix(f"{ORGANISATION}/").lower()  # the Hub takes other cases, too
    if ours not in SHIPPED or revision is not None:
        return found
    cache = found.parents[1]  # the files themselves lie beside the commits that link to them
    advice = f"A newer sparta-act may know them, or the cache is broken: delete {cache} and try again"
    return _as_made(ours, found, (CONFIG, WEIGHTS), advice)


def reason(error: Exception) -> str:
    """One line on what went wrong, with the kind of error."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _as_made(name: str, folder: Path, files: tuple[str, ...], advice: str) -> Path:
    """The folder, if these files of a set of ours are there and are the ones it was made of."""
    wrong = [
        file
        for file in files
        if not (folder / file).is_file()
        or hashlib.sha256((folder / file).read_bytes()).hexdigest() != SHIPPED[name][file]
    ]
    if wrong:
        raise WeightsError(
            f"asked for {name!r}, a set of sparta-act, found in {folder}: {', '.join(wrong)} missing or not "
            f"as made (sha256); nothing was loaded. {advice}"
        )
    return folder


def _download(
    repo_id: str,
    revision: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Path:
    cached = _cached(repo_id, revision, cache_dir)
    pinned = re.fullmatch(r"[0-9a-f]{40}", revision or "")  # a commit cannot change: no need to ask
    if cached and (pinned or local_files_only):
        return cached
    if local_files_only:
        raise WeightsError("nothing in the cache, and local_files_only=True forbids to download")
    try:  # one request without retries: those of the download itself take half a minute
        HfApi().model_info(repo_id, revision=revision, token=token, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:
        answered = isinstance(error, HfHubHTTPError) and error.response.status_code in (400, 401, 403, 404)
        if cached and not answered:
            return cached
        raise
    folder = snapshot_download(
        repo_id, revision=revision, cache_dir=cache_dir, token=token, allow_patterns=[CONFIG, WEIGHTS]
    )
    return Path(folder)


def _cached(repo_id: str, revision: str | None, cache_dir: str | Path | None) -> Path | None:
    found = [try_to_load_from_cache(repo_id, file, cache_dir, revision) for file in (CONFIG, WEIGHTS)]
    return Path(found[0]).parent if isinstance(found[0], str) and isinstance(found[1], str) else None
