"""Models of the Hugging Face hub, through huggingface_hub, whose environment variables hold (HF_HOME, HF_TOKEN, …).

Only what serving reads is downloaded. huggingface_hub throws a file away when its download breaks off; so large files
are fetched here, by its own function, into a part beside its blobs, which the next run continues.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils._headers import build_hf_headers

from ..errors import GatedModel, HubUnreachable, IncompleteDownload, ModelError, ModelNotFound
from .cache import Cache, file_sha256, guard_disk, require_disk
from .folder import INDEX, SETTINGS, choose_weights, folder_files, index_shards, require_settings
from .progress import Progress, silent
from .source import HubSource

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

LOOKUP_S = 3.0
"""How long the hub may take to answer where there is something else to serve."""
_PATIENT_LOOKUP_S = 30.0
_RESUMABLE_BYTES = 1 << 24
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_SHA256 = re.compile(r"[0-9a-f]{64}")

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Listing:
    """What the hub has under a revision."""

    commit: str
    sizes: Mapping[str, int]
    """Bytes by file name."""


def cached_snapshot(source: HubSource) -> Path | None:
    """The folder of a complete snapshot in huggingface_hub's cache; asks no network."""
    found = try_to_load_from_cache(source.repo_id, "config.json", revision=source.revision)
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    with contextlib.suppress(ModelError):
        folder_files(folder, source=str(source), name=source.repo_id)
        return folder
    return None


def find_snapshot(source: HubSource, cache: Cache, progress: Progress) -> Path:
    """The folder of the revision's newest snapshot, downloaded as far as it is not there.

    Where a snapshot is cached and the hub does not answer within LOOKUP_S, that one, with a warning in the log.
    Raises ModelNotFound, GatedModel, HubUnreachable, IncompleteDownload, UnsafeWeights, NotEnoughDisk.
    """
    cached = cached_snapshot(source)
    if cached is not None and source.revision and _COMMIT.fullmatch(source.revision):
        return cached
    try:
        listing = look_up(source, _PATIENT_LOOKUP_S if cached is None else LOOKUP_S)
    except HubUnreachable as error:
        if cached is None:
            raise
        _log.warning("%s Serving the cached snapshot %s.", error, cached.name)
        return cached
    return fetch(source, listing, cache, progress)


def look_up(source: HubSource, timeout_s: float) -> Listing:
    """What the hub has; raises HubUnreachable after timeout_s, whatever the network does."""

    def ask() -> Listing:
        info = HfApi().model_info(
            source.repo_id, revision=source.revision, files_metadata=True, timeout=timeout_s
        )
        if info.sha is None:
            raise HubUnreachable(f"{constants.ENDPOINT} gave no commit for {source}; try again.")
        return Listing(info.sha, {file.rfilename: file.size or 0 for file in info.siblings or ()})

    with _translated(source, HubUnreachable, f"cannot be looked up at {constants.ENDPOINT}"):
        return _within(timeout_s, ask)


def fetch(source: HubSource, listing: Listing, cache: Cache, progress: Progress) -> Path:
    """Download what is missing of a snapshot and return its folder; small files first, weights last."""
    names = listing.sizes
    require_settings(names, str(source))
    weights = choose_weights(names, str(source))
    with guard_disk(Path(constants.HF_HUB_CACHE)):
        folder = _fetch_small(source, listing, "config.json").parent
        for name in SETTINGS[1:]:
            if name in names:
                _fetch_small(source, listing, name)
        if INDEX in weights:
            weights = index_shards(_fetch_small(source, listing, INDEX))
            for name in weights:
                if name not in names:
                    raise ModelNotFound(f"{source} has no {name}, which its index lists.")
        _fetch_weights(source, listing, weights, folder, cache, progress)
        ref = folder.parent.parent / "refs" / (source.revision or constants.DEFAULT_REVISION)
        if ref.name != listing.commit:
            # Written last: it names this snapshot as the one to serve when the hub does not answer.
            with cache.new_file(ref) as new:
                new.write_text(listing.commit)
    return folder


def _fetch_small(source: HubSource, listing: Listing, name: str) -> Path:
    with _translated(source, IncompleteDownload, f"broke off at {name}"):
        path = hf_hub_download(source.repo_id, name, revision=listing.commit, tqdm_class=_Silent)
    return Path(path)


def _fetch_weights(
    source: HubSource,
    listing: Listing,
    names: Sequence[str],
    folder: Path,
    cache: Cache,
    progress: Progress,
) -> None:
    total = sum(listing.sizes[name] for name in names)
    done = sum(listing.sizes[name] for name in names if (folder / name).exists())
    require_disk(folder, total - done)
    progress("download", done, total, "B")
    for name in names:
        if (folder / name).exists():
            continue

        def report(in_file: int, before: int = done) -> None:
            progress("download", before + in_file, total, "B")

        if listing.sizes[name] >= _RESUMABLE_BYTES:
            with cache.lock(f"hub-{source.repo_id.replace('/', '--')}"):
                _fetch_blob(source, listing, name, folder.parent.parent / "blobs", report)
        _fetch_small(source, listing, name)
        done += listing.sizes[name]
        progress("download", done, total, "B")


def _fetch_blob(
    source: HubSource, listing: Listing, name: str, blobs: Path, report: Callable[[int], None]
) -> None:
    """Put a file's bytes where huggingface_hub keeps them; it then only has to link them."""
    with _translated(source, IncompleteDownload, f"broke off at {name}"):
        url = hf_hub_url(source.repo_id, name, revision=listing.commit)
        metadata = get_hf_file_metadata(url)
        if metadata.etag is None or (blobs / metadata.etag).exists():
            return
        part = blobs / f"{metadata.etag}.chipset-part"
        blobs.mkdir(parents=True, exist_ok=True)
        if part.exists() and part.stat().st_size > (metadata.size or 0):
            part.unlink()
        with _Part(part, report) as file:
            resumed = file.tell()
            http_get(
                url,
                file,
                resume_size=resumed,
                headers=build_hf_headers(),
                expected_size=metadata.size,
                tqdm_class=_Silent,
            )
    # A part may be what a crash left; a download in one go is covered by its length.
    checkable = resumed and _SHA256.fullmatch(metadata.etag)
    if checkable and file_sha256(part, silent) != metadata.etag:
        part.unlink()
        raise IncompleteDownload(
            f"{name} of {source} came together wrongly: run again to load it anew."
        )
    part.replace(blobs / metadata.etag)


class _Part(io.BufferedWriter):
    """A file to append to that reports how long it has become."""

    def __init__(self, path: Path, report: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._report = report

    def write(self, data: Buffer, /) -> int:
        written = super().write(data)
        self._report(self.tell())
        return written


class _Silent:
    """huggingface_hub's progress bar, without the bar."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def update(self, n: float | None = 1) -> None:
        """Nothing to show."""

    def close(self) -> None:
        """Nothing to close."""

    def set_postfix_str(self, postfix: str, refresh: bool = False) -> None:
        """Nothing to show."""

    def refresh(self) -> None:
        """Nothing to show."""


def _within(timeout_s: float, ask: Callable[[], _T]) -> _T:
    """The answer, or TimeoutError: a timeout of sockets covers neither name lookup nor a server that trickles."""
    answers: queue.SimpleQueue[_T | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(ask())
        except Exception as error:  # handed to the caller, who knows which ones to expect
            answers.put(error)

    threading.Thread(target=work, name="hub-lookup", daemon=True).start()
    try:
        answer = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError(f"no answer within {timeout_s:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


@contextlib.contextmanager
def _translated(source: HubSource, otherwise: type[ModelError], what: str) -> Iterator[None]:
    """huggingface_hub's errors as ours; what the network did becomes `otherwise`."""
    repo, revision = source.repo_id, source.revision
    try:
        yield
    except ModelError:
        raise
    except GatedRepoError as error:
        raise GatedModel(
            f"{repo} is gated: accept its licence at {constants.ENDPOINT}/{repo}, "
            "then set HF_TOKEN to a token of that account."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFound(
            f"{repo} has no revision {revision!r}; check its branches and tags."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelNotFound(
            f"The hub has no model {repo!r}: check the name, or, if it is private, set HF_TOKEN."
        ) from error
    except RemoteEntryNotFoundError as error:
        raise ModelNotFound(f"{repo} has lost a file that it lists ({_short(error)}).") from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise GatedModel(
                f"The hub refuses access to {repo}: set HF_TOKEN to a token that may read it ({_short(error)})."
            ) from error
        raise otherwise(_network(source, otherwise, what, error)) from error
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise  # guard_disk knows what to say
        raise otherwise(_network(source, otherwise, what, error)) from error
    except (
        Exception
    ) as error:  # the HTTP library under huggingface_hub has changed its classes before
        raise otherwise(_network(source, otherwise, what, error)) from error


def _network(source: HubSource, kind: type[ModelError], what: str, error: Exception) -> str:
    if kind is IncompleteDownload:
        cure = "run again, it resumes where it stopped"
    else:
        cure = "check the network (HF_ENDPOINT, HF_HUB_OFFLINE, proxies), or name a local folder or .gguf file"
    return f"{source} {what} ({_short(error)}): {cure}."


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
