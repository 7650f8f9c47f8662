"""The Hugging Face hub as a source: a published name becomes files of one commit on this disk, checked by their hash.

Only files of tensors and what describes them are fetched, by `huggingface_hub` and into its cache. What the environment
says (HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME, HF_HUB_CACHE) counts as it is when something is loaded.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from saccade import published
from saccade.errors import SaccadeError, nearest, say

WEIGHTS, SHARDS, PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_COMMIT = re.compile(r"\w+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]*")
_FILES = (".safetensors", ".pth", ".pt", ".bin", ".pkl", ".ckpt", ".tar", ".npz", ".onnx", ".json")
_TRUE = {"1", "ON", "YES", "TRUE"}
UNREACHABLE = 1
"""The exit code of a hub that does not answer, and of a download that breaks off: nobody's mistake."""


class Fetched(NamedTuple):
    """A published model on this disk: repository, commit, folder, and the SHA-256 of its files of tensors."""

    name: str
    revision: str
    folder: Path
    sha256: dict[str, str]


def cache() -> Path:
    """Where `huggingface_hub` keeps what it fetched, by the environment as it is now."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    place = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(os.path.expanduser(place)))


def cached(name: str) -> bool:
    """Whether the cache has the tensors of a repository, of any revision, so that it loads without a network."""
    snapshots = cache() / f"models--{name.replace('/', '--')}" / "snapshots"
    return snapshots.is_dir() and any(_complete(folder) for folder in snapshots.iterdir())


def _complete(folder: Path) -> list[str]:
    """The files of tensors in a snapshot: all of them, or none."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / SHARDS).is_file():
        names = shards(folder / SHARDS)
        return names if all((folder / name).is_file() for name in names) else []
    return [PICKLE] if (folder / PICKLE).is_file() else []


def shards(index: Path) -> list[str]:
    """The files that an index of shards names; none where it is no such index."""
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return names if all(Path(name).name == name and name.endswith(".safetensors") for name in names) else []


@functools.cache
def _known() -> dict[str, str | None]:
    """Every published name and the repository that it means; none where only the authors' own server has it."""
    names: dict[str, str | None] = {}
    sizes = [size for family in published.families().values() for size in family.sizes.values()]
    for size in sizes:
        repositories = [name for name in size.names if "/" in name]
        theirs = [name for name in repositories if not name.startswith("timm/")]
        names |= {name: name for name in repositories}
        names |= {name.rpartition("/")[2]: name for name in repositories if name.rpartition("/")[2] not in names}
        files = [name for name in size.names if "/" not in name]
        names |= dict.fromkeys(files, theirs[0] if len(theirs) == 1 else None)
    return names


def repository(name: str) -> str | None:
    """The repository that a published name means: itself, timm's or the authors' own name of it. None if unknown."""
    known, (architecture, dot, _) = _known(), name.partition(".")
    if known.get(name):
        return known[name]
    timms = {one.partition("/")[2].partition(".")[0] for one in known if one.startswith("timm/")}
    return f"timm/{name}" if dot and architecture in timms else None


def elsewhere() -> set[str]:
    """What `saccade models` calls the sizes that no hub has: they lie on their authors' own servers."""
    return {str(row["name"]) for row in published.listing() if not row["hub"]}


def similar(name: str) -> str:
    """The hint for a name that nobody published: the nearest that somebody did."""
    if name in _known() or name in elsewhere():
        return "its authors publish it on their own server alone: download the file there and name it"
    hint = nearest(name, [one for one in _known() if ("/" in one) == ("/" in name)])
    return hint if hint.startswith("did you mean") else "`saccade models` lists the published names"


def find(backbone: str | Path, revision: str | None = None, token: str | None = None) -> Fetched | None:
    """The published model that a name means, fetched unless it is cached; None for what can only lie on this disk.

    `name@revision` pins a branch, a tag or a commit, as `revision` does. Raises `SaccadeError` for whatever hinders it
    to be whole on this disk.
    """
    if Path(backbone).expanduser().exists():
        if revision is not None:
            raise SaccadeError(f"{backbone} lies on this disk, where it has no revision", path="revision")
        return None
    name, _, pinned = str(backbone).partition("@")
    place = None if isinstance(backbone, Path) else _place(name)
    if place is None:
        return None
    if pinned and revision not in (None, pinned):
        raise SaccadeError(f"{backbone} names one revision, and revision={revision!r} another", path="revision")
    revision = revision or pinned or "main"
    if not _REVISION.fullmatch(revision):
        raise SaccadeError(f"{revision!r} is no revision", path="revision", hint="a branch, a tag or a commit hash")
    return _Source(place, revision, token, _library(place)).fetch()


def _place(name: str) -> str | None:
    """The repository that a name can mean; none where it rather is a path, and a misspelt one."""
    known = repository(name)
    if known is not None or not _REPOSITORY.fullmatch(name):
        return known
    return None if Path(name).parent.is_dir() or name.endswith(_FILES) else name


def _offline() -> bool:
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in _TRUE


def _library(name: str) -> Any:
    """`huggingface_hub`, on line or not as the environment says now. Raises `SaccadeError` where it is missing."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise SaccadeError(
            f"there is no {name} here, and to fetch it from the Hugging Face hub needs huggingface_hub",
            path=name,
            hint="pip install 'saccade[hub]'",
        ) from None
    huggingface_hub.constants.HF_HUB_OFFLINE = _offline()  # which it reads once, when it is imported
    return huggingface_hub


@dataclass
class _Source:
    """One repository at one revision, and how the hub is asked for it.

    `offline` is why it is not, and `announced` what it said of the files' hashes.
    """

    name: str
    revision: str
    token: str | None
    library: Any
    offline: str = ""
    announced: dict[str, str] = field(default_factory=dict)

    @property
    def endpoint(self) -> str:
        return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")

    @property
    def folder(self) -> Path:
        """Where the cache keeps the repository."""
        return cache() / f"models--{self.name.replace('/', '--')}"

    def fetch(self) -> Fetched:
        """Everything of one commit, tensors last. Raises `SaccadeError`."""
        commit, first = self._commit()
        known = self._in_cache(first, commit)
        self._get(CONFIG, commit)
        if known is None:  # the tensors come last: where they are, this has been asked for
            self._get(PREPROCESSOR, commit)
        names = [first]
        if first == SHARDS:
            index = self._get(SHARDS, commit)
            names = shards(index) if index else []
            if not names:
                raise SaccadeError(f"{SHARDS} of {self.name} names no files of tensors", path=self.name)
        hashes = {name: self._checked(name, self._get(name, commit)) for name in names}
        self._remember(commit)
        return Fetched(self.name, commit, self.folder / "snapshots" / commit, hashes)

    def _commit(self) -> tuple[str, str]:
        """The commit that the revision is now, and its first file of tensors: by the hub, or by the cache."""
        kept = self._kept()
        self.offline = "offline, as HF_HUB_OFFLINE says" if _offline() else ""
        if kept and kept[0] == self.revision:  # a commit never changes: nobody is asked
            return kept
        if self.offline:
            if kept is None:
                raise self._lacking(f"{self.name} (revision {self.revision})")
        else:
            try:
                return self._ask()
            except SaccadeError as error:
                if kept is None or error.code != UNREACHABLE:
                    raise
                self.offline = error.error
        say(f"saccade: {self.offline}: {self.name} from the cache, revision {kept[0]}")
        return kept

    def _lacking(self, what: str) -> SaccadeError:
        hint = "load it once with a network, and without HF_HUB_OFFLINE"
        hint = hint if self.name in _known() else f"{similar(self.name)}; or {hint}"
        return SaccadeError(f"{what} is not in the cache {cache()}; {self.offline}", path=self.name, hint=hint)

    def _in_cache(self, name: str, revision: str) -> str | object | None:
        """The path of a file in the cache, another object for one that is known not to exist, or None."""
        return self.library.try_to_load_from_cache(self.name, name, cache_dir=cache(), revision=revision)

    def _kept(self) -> tuple[str, str] | None:
        """The same, by what the cache holds."""
        for name in (WEIGHTS, SHARDS, PICKLE):
            path = self._in_cache(name, self.revision)
            if isinstance(path, str):
                return Path(path).parent.name, name
        return None

    def _ask(self) -> tuple[str, str]:
        """The same, by the hub, which announces a hash too. Raises `SaccadeError`."""
        errors, absent = self.library.errors, None
        for name in (WEIGHTS, SHARDS, PICKLE):
            url = self.library.hf_hub_url(self.name, name, revision=self.revision, endpoint=self.endpoint)
            try:
                said = self.library.get_hf_file_metadata(url, token=self.token)
            except (errors.HTTPError, OSError, ValueError) as error:
                if not self._absent(error):
                    raise self._refusal(error, name) from None
                absent = error
                continue
            if said.commit_hash is None or not _COMMIT.fullmatch(said.commit_hash):
                raise SaccadeError(f"{self.endpoint} does not answer as a hub: it names no commit", path="HF_ENDPOINT")
            self.announced[name] = said.etag or ""
            return said.commit_hash, name
        if not isinstance(absent, errors.RemoteEntryNotFoundError):  # a mirror that does not say what it is that is not
            raise self._answer(absent, 404)
        raise SaccadeError(
            f"{self.name} has no weights that can be read: no {WEIGHTS} and no {PICKLE}",
            path=f"{self.endpoint}/{self.name}",
            hint="download the file that it has, and name it",
        )

    def _get(self, name: str, commit: str) -> Path | None:
        """A file of the commit in the cache, fetched where it is not there; None where it does not exist."""
        kept = self._in_cache(name, commit)
        if kept is not None:
            return Path(kept) if isinstance(kept, str) else None
        if self.offline:
            raise self._lacking(f"{name} of {self.name} (revision {commit})")
        errors = self.library.errors
        try:
            where = {"cache_dir": cache(), "endpoint": self.endpoint, "token": self.token}
            return Path(self.library.hf_hub_download(self.name, name, revision=commit, **where))
        except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:
            if self._absent(error):
                return None
            raise self._refusal(error, name, commit) from None

    def _absent(self, error: Exception) -> bool:
        """Whether it says that a file does not exist, where the repository may."""
        errors, cause = self.library.errors, self._cause(error)
        if isinstance(cause, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
            return False
        return isinstance(cause, errors.HfHubHTTPError) and cause.response.status_code == 404

    def _cause(self, error: Exception) -> BaseException:
        """What the library met, where it only says that the cache has no such file either."""
        local = isinstance(error, self.library.errors.LocalEntryNotFoundError)
        return error.__cause__ if local and error.__cause__ else error

    def _checked(self, name: str, path: Path | None) -> str:
        """The SHA-256 of a file. Raises `SaccadeError` unless it is the one that the hub announced.

        The cache names a file by what was announced, so that this holds for what was fetched long ago too.
        """
        if path is None:
            raise SaccadeError(f"{self.name} has no {name}, though its index names it", path=self.name)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        announced = Path(os.readlink(path)).name if path.is_symlink() else self.announced.get(name, "")
        if _SHA256.fullmatch(announced) and announced != digest:
            for link in _links(path):
                with contextlib.suppress(OSError):
                    link.unlink()
            raise SaccadeError(
                f"{name} of {self.name} is not what the hub announced: its SHA-256 is {digest[:16]}…, "
                f"not {announced[:16]}…",
                path=self.name,
                hint="it was taken out of the cache; the same command fetches it again",
                code=1,
            )
        return digest

    def _remember(self, commit: str) -> None:
        """Which commit the revision was, for the day without a network: as the library does, but once all is there."""
        place = self.folder / "refs" / self.revision
        if self.revision != commit and not (place.is_file() and place.read_text() == commit):
            with contextlib.suppress(OSError):  # a cache that only others may write
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(commit)

    def _refusal(self, error: Exception, file: str, commit: str | None = None) -> SaccadeError:
        """What kept a file from coming, in our words; `commit` is given once the hub has answered."""
        cause = self._cause(error)
        if isinstance(cause, self.library.errors.HfHubHTTPError):
            return self._answer(cause, cause.response.status_code)
        reason = " ".join(str(cause).split()) or type(cause).__name__
        if commit is not None:
            return SaccadeError(
                f"the download of {file} of {self.name} broke off: {reason}",
                path=self.name,
                hint="nothing of it is kept; the same command fetches it again",
                code=1,
            )
        hint = "it is not in the cache either: look at the network and at HF_ENDPOINT"
        meant = "" if self.name in _known() else similar(self.name)
        return SaccadeError(
            f"the hub {self.endpoint} cannot be reached ({reason})",
            path=self.name,
            hint=f"{hint}; {meant}" if meant.startswith("did you mean") else hint,
            code=UNREACHABLE,
        )

    def _answer(self, error: Any, status: int) -> SaccadeError:
        """What an answer of the hub that is an error means."""
        errors, page = self.library.errors, f"{self.endpoint}/{self.name}"
        if status == 429 or status >= 500:
            said = f"the hub {self.endpoint} answers {status}"
            return SaccadeError(said, path=self.name, hint="try again later", code=UNREACHABLE)
        if isinstance(error, errors.RevisionNotFoundError):
            hint = "a branch, a tag or a commit hash; main is the newest"
            return SaccadeError(f"{self.name} has no revision {self.revision!r}", path="revision", hint=hint)
        missing = status == 404 or error.response.headers.get("X-Error-Code") == "RepoNotFound"
        if missing and self.name not in _known():
            hint = f"{similar(self.name)}; a private one needs HF_TOKEN"
            return SaccadeError(f"there is no {self.name}, neither here nor on the hub", path=page, hint=hint)
        if missing:
            tag = self.name.startswith("timm/") and "." not in self.name
            hint = "timm says behind a dot how it was trained: see https://huggingface.co/timm" if tag else ""
            hint = hint or "is HF_ENDPOINT another hub? a private one needs HF_TOKEN"
            return SaccadeError(f"the hub has no {self.name} ({status})", path=page, hint=hint)
        mine = self.token or self.library.get_token()
        if isinstance(error, errors.GatedRepoError) or status == 403:
            hint = f"accept its terms at {page}, then set HF_TOKEN to a token of that account"
            return SaccadeError(f"{self.name} is gated: the hub refuses it ({status})", path=page, hint=hint)
        if status == 401:
            what = "does not know this token" if mine else "wants a token"
            hint = f"set HF_TOKEN to a token from {self.endpoint}/settings/tokens"
            return SaccadeError(f"{self.name}: the hub {what} (401)", path="HF_TOKEN", hint=hint)
        return SaccadeError(f"{self.name}: the hub answers {status}", path=page)


def _links(path: Path) -> Iterator[Path]:
    """A file of the cache and what it stands for: the links, then the file."""
    while path.is_symlink():
        following = path.parent / os.readlink(path)
        yield path
        path = following
    yield path
