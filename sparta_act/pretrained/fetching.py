"""The two files of a set from the Hugging Face Hub, into its client's own cache, within a limited time.

The client waits as long as a server tells it to, and tries a silent one for minutes. So each question to the
Hub is asked in a thread, and each download is a process of its own: ended, it leaves no lock in the cache.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparta_act.errors import WeightsError
from sparta_act.pretrained import download
from sparta_act.pretrained.folder import CONFIG, WEIGHTS

WAIT = 30  # seconds for an answer; a download has one more for each
GUESS = 5  # seconds for the first answer on a name that may be mistyped
RATE = 100_000  # bytes
PAUSES = (1, 2)  # seconds before the next try where the Hub is not reached


def fetch(
    repo_id: str,
    *,
    revision: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
    local_files_only: bool,
    force: bool = False,
    known: bool = True,
) -> Path:
    """Folder in the cache with both files, of one commit; `force` fetches them though they are there.

    A repository that is not `known` to exist may be a typing error: the Hub has few seconds to name it.
    Asks the Hub what the commit is, unless it is known, and takes what is cached if the Hub does not answer.
    Raises what the client raises, `TimeoutError`, or `WeightsError` for what the client says in its process.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    here = None if force else cached(repo_id, cache_dir, revision)
    if here and (local_files_only or re.fullmatch(r"[0-9a-f]{40}", revision or "")):
        return here  # a commit cannot change: no need to ask
    if local_files_only:
        raise WeightsError("it is not in the cache, and local_files_only=True forbids to download it")

    def ask(file: str, most: float = WAIT) -> Any:
        url, seconds = hf_hub_url(repo_id, file, revision=revision), constants.HF_HUB_ETAG_TIMEOUT
        return within(most, lambda: get_hf_file_metadata(url, token=token, timeout=seconds))

    if here:
        try:
            if ask(CONFIG).commit_hash == here.name:
                return here
        except Exception:  # of requests, httpx or httpx2, by the version of huggingface-hub
            return here
    if known:
        _patiently(lambda: ask(CONFIG))
    else:
        ask(CONFIG, GUESS)
    size = ask(WEIGHTS).size or 0
    _download(
        WAIT + size / RATE,
        repo_id=repo_id,
        revision=revision,
        cache_dir=cache_dir and os.fspath(cache_dir),
        token=token,
        force_download=force,
    )
    if found := cached(repo_id, cache_dir, revision):
        return found
    raise WeightsError("it was fetched, but is not in the cache")


def cached(repo_id: str, cache_dir: str | Path | None, revision: str | None) -> Path | None:
    """Folder in the client's cache with both files; None if one is missing."""
    from huggingface_hub import try_to_load_from_cache

    paths = [try_to_load_from_cache(repo_id, file, cache_dir, revision) for file in (CONFIG, WEIGHTS)]
    return Path(str(paths[0])).parent if all(isinstance(path, str) for path in paths) else None


def _patiently(ask: Callable[[], Any]) -> Any:
    for pause in PAUSES:
        try:
            return ask()
        except Exception as error:
            if not _may_pass(error):
                raise
        time.sleep(pause)
    return ask()


def _may_pass(error: Exception) -> bool:
    """Whether the Hub was not reached, or is busy or broken; not where it says no."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None:  # a message of its own has `OfflineModeIsEnabled`, and a wrong name
        return type(error).__module__.partition(".")[0] in ("requests", "httpx", "httpx2")
    return status in (408, 429) or status >= 500


def within(seconds: float, call: Callable[[], Any], late: str = "") -> Any:
    """Result of `call`, which goes on by itself if it takes longer. Raises `TimeoutError`, and its errors."""
    results, errors = list[Any](), list[Exception]()

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(late or f"the Hub did not answer within {seconds:.0f} s")
    return results[0]


def _download(seconds: float, **ask: Any) -> None:
    """Let the client download both files, in a process if this one is a program of Python's."""
    ask |= {"files": [CONFIG, WEIGHTS]}
    late = f"the Hub has not sent the files in {seconds:.0f} s, at {RATE // 1000} kB a second or more"
    if getattr(sys, "frozen", False) or "python" not in Path(sys.executable or "").name.lower():
        within(seconds, lambda: download.download(**ask), late)  # which goes on, with a lock in the cache
        return
    ask["path"] = [entry for entry in sys.path if isinstance(entry, str)]
    try:
        done = subprocess.run(
            [sys.executable, download.__file__],
            input=json.dumps(ask).encode(),  # the token with it, which nobody else sees there
            stdout=subprocess.PIPE,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(late) from None
    if done.returncode:
        raise WeightsError(done.stdout.decode(errors="replace") or f"its download ended by {done.returncode}")
