"""Where the files of a set are: in a folder, in this package, or on the Hugging Face Hub."""

import hashlib
import json
import os
import re
from pathlib import Path

from sparta_act.errors import WeightsError
from sparta_act.pretrained.files import CARD, CONFIG, WEIGHTS

ORGANIZATION = "sparta-act"
SETS = Path(__file__).parents[1] / "sets"
# Our sets: name -> file -> its sha256. All of them are in a checkout, in SETS; pyproject.toml lists those in
# the wheel, the others are on the Hub. A set does not change: a better one gets another name.
SHIPPED: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("shipped.json").read_bytes())


def locate(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Path:
    """Folder with the files of a set: an existing folder, else a set of ours, else a download from the Hub.

    Raises `WeightsError` where there is none, or where a set of ours was changed.
    """
    known = f"a folder with {CONFIG} and {WEIGHTS}, 'organization/name' on the Hub, or one of {list(SHIPPED)}"
    if not isinstance(name_or_path, str | os.PathLike) or not os.fspath(name_or_path):
        raise WeightsError(f"a set is loaded by its name, not by {name_or_path!r}: name {known}")
    name, folder = os.fspath(name_or_path), Path(name_or_path)
    if folder.is_dir() or name in SHIPPED:
        if revision is not None:
            raise WeightsError(
                f"{name!r} is not loaded from a repository and has no revisions: omit revision={revision!r}, "
                f"or name 'organization/name' on the Hub"
            )
        if folder.is_dir():
            return folder
        if (SETS / name).is_dir():
            advice = "Install sparta-act again, or restore the files"
            return _unchanged(name, SETS / name, (CARD, CONFIG, WEIGHTS), advice)
    is_path = isinstance(name_or_path, os.PathLike) or folder.exists()
    if is_path or not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name):
        raise WeightsError(f"{name!r} is neither a folder nor a name on the Hub: name {known}")
    repo_id = name if "/" in name else f"{ORGANIZATION}/{name}"
    try:
        found = _download(repo_id, revision, cache_dir, token, local_files_only)
    except Exception as error:  # of requests, httpx or httpx2, by the version of huggingface-hub
        raise WeightsError(
            f"cannot load {name!r}: there is no such folder, our sets are {list(SHIPPED)}, and {repo_id} at "
            f"revision {revision or 'main'} cannot be fetched: {reason(error)}. Check the name and the "
            f"revision, and `token` if the set is private or gated; offline, only folders, sets in the "
            f"package and sets downloaded before can be loaded"
        ) from error
    ours = name.removeprefix(f"{ORGANIZATION}/").lower()  # the Hub ignores case
    if ours not in SHIPPED or revision is not None:
        return found
    cache = found.parents[1]  # holds the files, to which the commits link
    advice = f"A newer sparta-act may know them, or the cache is broken: delete {cache} and try again"
    return _unchanged(ours, found, (CONFIG, WEIGHTS), advice)


def reason(error: Exception) -> str:
    """One line on what went wrong, with the kind of error."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _unchanged(name: str, folder: Path, files: tuple[str, ...], advice: str) -> Path:
    """The folder, if it holds these files of a set of ours, with the sha256 that is listed."""
    wrong = [
        file
        for file in files
        if not (folder / file).is_file()
        or hashlib.sha256((folder / file).read_bytes()).hexdigest() != SHIPPED[name][file]
    ]
    if wrong:
        raise WeightsError(
            f"{folder} does not hold {name!r} as sparta-act made it: {', '.join(wrong)} missing or changed "
            f"(sha256); nothing was loaded. {advice}"
        )
    return folder


def _download(
    repo_id: str,
    revision: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Path:
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    cached = [try_to_load_from_cache(repo_id, file, cache_dir, revision) for file in (CONFIG, WEIGHTS)]
    pinned = re.fullmatch(r"[0-9a-f]{40}", revision or "")  # a commit cannot change: no need to ask
    if (pinned or local_files_only) and all(isinstance(path, str) for path in cached):
        return Path(str(cached[0])).parent
    if local_files_only:
        raise WeightsError("it is not in the cache, and local_files_only=True forbids to download it")
    # file by file, since `snapshot_download` waits forever for a Hub that accepts connections and is silent
    for file in (CONFIG, WEIGHTS):
        path = hf_hub_download(
            repo_id,
            file,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            etag_timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
        revision = Path(path).parent.name  # the commit: both files are of the same one
    return Path(path).parent
