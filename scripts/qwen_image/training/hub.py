"""Copies of a training's files in a repository at the Hugging Face hub, and states fetched from one.

The token comes from the environment (HF_TOKEN) or from where ``hf auth login`` keeps it, never from the settings. An
upload that fails stops no training: its file stands in ``{output_name}.not_uploaded.json`` until it is uploaded, which
is tried again at the end and by every later run of the same command.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import queue
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from qwen_image.bounded import parse_json, read_text
from qwen_image.files import atomic_write
from qwen_image.problems import InputError, Problem
from qwen_image.tokens import hide_tokens

if TYPE_CHECKING:
    from qwen_image.training.arguments import Settings

log = logging.getLogger(__name__)
STATE = re.compile(
    r"(?P<repo>[^/:]+/[^/:]+)/(?P<path>[^/:]+(?:/[^/:]+)*)(?::(?P<revision>[^:]+)(?::(?P<kind>model|dataset))?)?"
)
"""How `resume` names a state at the hub: user/name/path, then :revision and :repo_type if need be."""
TOKEN_HINT = "set HF_TOKEN in the environment to a token that may write there, or run hf auth login"


class Uploader:
    """Copies files and folders below output_dir to the repository; without huggingface_repo_id it does nothing.

    Uploads come one after the other: at once or, with async_upload, in a thread. In every process but the first one it
    does nothing either.
    """

    def __init__(self, settings: Settings) -> None:
        """Make the repository where there is none. Raises InputError when it may not be written to."""
        self._settings = settings
        self._active = settings.huggingface_repo_id is not None and os.environ.get("RANK", "0") == "0"
        self._made = False
        self._folder = Path(settings.output_dir)
        self._waiting: Counter[str] = Counter()
        self._failed: dict[str, str] = {}
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if self._active:
            self._open_repository()
            if left := _read_list(settings):
                there = [name for name in left if (self._folder / name).exists()]
                self._failed = dict.fromkeys(there, "was left by an earlier run")
                self._write_list()

    def file(self, path: Path) -> None:
        """Upload a file, or have it uploaded."""
        self._hand_over(path)

    def folder(self, path: Path) -> None:
        """Upload a folder with all that is in it, or have it uploaded."""
        self._hand_over(path)

    def finish(self) -> None:
        """Wait for what is not uploaded yet, and try once more what failed. Raises InputError with what fails still."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        for name in list(self._failed):
            self._upload(name)
        if self._failed:
            mend = "run the same command again: it tries to upload what is left, and trains no step twice"
            raise InputError([
                Problem(file=str(self._folder / name), found=f"is saved, but not uploaded ({reason})", mend=mend)
                for name, reason in self._failed.items()
            ])  # fmt: skip

    def _open_repository(self) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import disable_progress_bars

        repository = self._settings.huggingface_repo_id
        if problems := _problems_of_access(repository):
            raise InputError(problems)
        disable_progress_bars()
        self._api = HfApi()
        try:
            self._make_repository()
        except Exception as error:
            response = error.response if isinstance(error, HfHubHTTPError) else None
            if response is not None and 400 <= response.status_code < 500:
                found = f"may not be written to ({_first_line(error)})"
                problem = Problem(file=repository, key="huggingface_repo_id", found=found, mend=TOKEN_HINT)
                raise InputError([problem]) from error
            # it may be back by the time there is something to upload
            log.warning("train: %s cannot be reached now (%s)", repository, _first_line(error))

    def _make_repository(self) -> None:
        settings = self._settings
        self._api.create_repo(
            settings.huggingface_repo_id, repo_type=settings.huggingface_repo_type, exist_ok=True,
            private=settings.huggingface_repo_visibility != "public",
        )  # fmt: skip
        self._made = True

    def _hand_over(self, path: Path) -> None:
        if not self._active:
            return
        name = path.relative_to(self._folder).as_posix()
        with self._lock:
            self._waiting[name] += 1
            self._write_list()
        if not self._settings.async_upload:
            self._upload(name)
            return
        if self._thread is None:
            # ends with the program, however that ends: what is left stands in the list
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        self._queue.put(name)

    def _work(self) -> None:
        while (name := self._queue.get()) is not None:
            self._upload(name)

    def _upload(self, name: str) -> None:
        reason = ""
        try:
            self._copy(self._folder / name)
            log.info("train: uploaded %s to %s", name, self._settings.huggingface_repo_id)
        except Exception as error:  # whatever it is, the training goes on
            # an older file that made way for a newer one meanwhile is no loss
            if (self._folder / name).exists():
                reason = _first_line(error)
                log.error("train: %s is not uploaded: %s", self._folder / name, reason)
        with self._lock:
            self._waiting = +(self._waiting - Counter([name]))
            self._failed.pop(name, None)
            if reason:
                self._failed[name] = reason
            self._write_list()

    def _copy(self, path: Path) -> None:
        settings = self._settings
        if not self._made:
            self._make_repository()
        parts = [(settings.huggingface_path_in_repo or "").strip("/"), path.relative_to(self._folder).as_posix()]
        place = {
            "path_in_repo": "/".join(filter(None, parts)),
            "repo_id": settings.huggingface_repo_id,
            "repo_type": settings.huggingface_repo_type,
        }
        if path.is_dir():
            self._api.upload_folder(folder_path=path, **place)
        else:
            self._api.upload_file(path_or_fileobj=path, **place)

    def _write_list(self) -> None:
        names = sorted(self._waiting.keys() | self._failed.keys())
        path = _list_path(self._settings)
        if names:
            atomic_write(path, json.dumps(names, indent=1) + "\n")
        else:
            path.unlink(missing_ok=True)


def wrong_uploads(values: Mapping[str, object]) -> Iterator[tuple[str, str, str]]:
    """Yield key, what was found and how to mend it, of settings that do not go together."""
    if values["resume_from_huggingface"] and not STATE.fullmatch(values["resume"]):
        found = f"{values['resume']!r} names no state at the hub, which resume_from_huggingface wants"
        yield "resume", found, "name it as user/name/path/of/the-state, and :revision or :revision:repo_type if need be"
    if values["huggingface_repo_id"] is None:
        return
    if not values["save_state_on_train_end"]:
        found = "false, while an upload that fails makes the workflow do the last step again, which needs that state"
        yield "save_state_on_train_end", found, "remove it, or huggingface_repo_id"


def upload_what_is_left(settings: Settings) -> None:
    """Upload what an earlier run could not. Raises InputError with what still fails."""
    if settings.huggingface_repo_id is not None and _read_list(settings):
        Uploader(settings).finish()


def fetch_state(settings: Settings) -> Path | None:
    """Download the state that `resume` names at the hub and return its folder, or None when none is asked for.

    Raises InputError when there is none, or when it cannot be had.
    """
    if not settings.resume_from_huggingface:
        return None
    from huggingface_hub import HfApi

    named = STATE.fullmatch(settings.resume)
    assert named is not None, "checked with the settings"
    log.info("train: downloading the state %s", settings.resume)
    try:
        root = HfApi().snapshot_download(
            named["repo"], repo_type=named["kind"], revision=named["revision"],
            allow_patterns=f"{glob.escape(named['path'])}/*",
        )  # fmt: skip
    except Exception as error:
        found = f"cannot be downloaded ({_first_line(error)})"
        mend = "check the name, and HF_TOKEN in the environment where the repository is private"
        raise InputError([Problem(file=settings.resume, key="resume", found=found, mend=mend)]) from error
    folder = Path(root) / named["path"]
    if not folder.is_dir():
        mend = "name it as user/name/path/of/the-state, and :revision behind that if need be"
        raise InputError([Problem(file=settings.resume, key="resume", found="is not in the repository", mend=mend)])
    return folder


def _problems_of_access(repository: str) -> list[Problem]:
    """What shows without asking the hub."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        found, mend = "cannot be reached while HF_HUB_OFFLINE is set", "unset it, or remove huggingface_repo_id"
    elif get_token() is None:
        found, mend = "has no token to be written with", TOKEN_HINT
    else:
        return []
    return [Problem(file=repository, key="huggingface_repo_id", found=found, mend=mend)]


def _list_path(settings: Settings) -> Path:
    return Path(settings.output_dir) / f"{settings.output_name}.not_uploaded.json"


def _read_list(settings: Settings) -> list[str]:
    path = _list_path(settings)
    try:
        names = parse_json(read_text(path))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        names, reason = None, f"cannot be read ({error})"
    else:
        reason = "is no list of files below output_dir"
    # nothing from elsewhere is uploaded, whoever wrote the list
    if isinstance(names, list) and all(isinstance(name, str) and _is_below(name) for name in names):
        return names
    mend = "remove it; what it named is then not uploaded again"
    raise InputError([Problem(file=str(path), found=reason, mend=mend)])


def _is_below(name: str) -> bool:
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts and "\0" not in name


def _first_line(error: Exception) -> str:
    return hide_tokens(str(error)).strip().splitlines()[0] if str(error).strip() else type(error).__name__
