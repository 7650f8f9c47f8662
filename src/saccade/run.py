"""A run directory that explains itself: what was asked, on which data, with which code, and what came out.

`config.json` (asked), `record.json` (grows), `metrics.jsonl`, `quarantine.jsonl`, `checkpoints/STEP/` with
`manifest.json`, `backbone/`, `best/`. Whatever is replaced is written beside and renamed, so nobody reads half of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from blake3 import blake3

from saccade.distributed import Ranks
from saccade.errors import SaccadeError

_LIBRARIES = ("saccade", "torch", "numpy", "pydantic", "tyro", "safetensors", "simplejpeg", "pillow", "blake3")


class Run:
    """A run directory. `config` is what was asked, `record` what is known of it, `summary` what came out."""

    def __init__(self, path: Path):
        self.path = path

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {'ended' if self.summary else 'not ended'})"

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run. Raises `SaccadeError` where there is none."""
        run = cls(Path(path).expanduser())
        if not (run.path / "config.json").is_file():
            raise SaccadeError(
                f"{path} is not a run directory", path=path, hint="one has a config.json and checkpoints/"
            )
        return run

    @classmethod
    def claim(cls, path: str | Path, asked: dict[str, Any]) -> Run:
        """A new run, or the one that was begun here with the same request. Nothing is overwritten.

        `asked["machine"]` may change from one session to the next; all the rest is the run. Raises `SaccadeError` for
        the directory of another run or of something else, and for one that a process is at work in; it is this
        process's until `holding` ends.
        """
        run = cls(Path(path).expanduser())
        if (run.path / "config.json").is_file():
            if run._begun():
                run._compare(asked)
            _hold(run.path)
            if not run._begun():  # a mistake in the settings ended it before its first step
                (run.path / "record.json").unlink(missing_ok=True)
                write_json(run.path / "config.json", asked)
            return run
        if run.path.exists() and (not run.path.is_dir() or any(not _half(path) for path in run.path.iterdir())):
            raise SaccadeError(
                f"{path} exists and is not a run directory", path="--out", hint="name an empty or a new one"
            )
        run.path.mkdir(parents=True, exist_ok=True)
        _hold(run.path)
        write_json(run.path / "config.json", asked)
        return run

    def _begun(self) -> bool:
        """Whether there is anything to go on with."""
        return bool(self.metrics()) or any(True for _ in self.steps())

    def _compare(self, asked: dict[str, Any]) -> None:
        before, now = (_flat({**what, "machine": {}}) for what in (self.config, json.loads(json.dumps(asked))))
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise SaccadeError(
                    f"{self.path} holds another run: {name.removeprefix('settings.')} was {_spoken(before.get(name))}, "
                    f"and is {_spoken(now.get(name))} now",
                    path="--out",
                    hint="name a new directory, or ask for the same to go on with that run",
                )

    @property
    def config(self) -> dict[str, Any]:
        """What was asked."""
        return _read_json(self.path / "config.json")

    @property
    def record(self) -> dict[str, Any]:
        """What is known so far: data fingerprint, environment, code, initial weights, sessions, results."""
        path = self.path / "record.json"
        return _read_json(path) if path.exists() else {}

    @property
    def summary(self) -> dict[str, Any]:
        """What came out; empty until the run has ended."""
        return self.record.get("summary", {})

    def note(self, **facts: Any) -> None:
        """Adds facts to the record."""
        write_json(self.path / "record.json", {**self.record, **facts})

    def log(self, entry: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """What was logged. A last line that a crash cut is left out."""
        path = self.path / "metrics.jsonl"
        return (
            [entry for line in path.read_text(encoding="utf-8").splitlines() if (entry := _entry(line))]
            if path.exists()
            else []
        )

    def rewind(self, step: int) -> None:
        """Forgets what was logged after `step`: those steps are done again."""
        kept = [json.dumps(entry) + "\n" for entry in self.metrics() if entry["step"] <= step]
        _replace(self.path / "metrics.jsonl", "".join(kept))

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    def save(
        self,
        step: int,
        facts: dict[str, Any],
        write: Callable[[Path], None],
        ranks: Ranks,
        keep: int = 2,
        best: int | None = None,
    ) -> None:
        """A checkpoint by all ranks: written beside, verified, then named. `best` and the newest `keep` stay."""
        target, beside = self.checkpoints / str(step), self.checkpoints / f".writing-{step}"
        ranks.from_first(lambda: _fresh(beside))
        write(beside)
        mine = {path.name: _hashed(path) for path in sorted(beside.glob(f"__{ranks.rank}_*"))}
        everyone = ranks.gather(mine)
        ranks.from_first(lambda: self._name(target, beside, everyone, {"step": step, "world": ranks.world, **facts}))
        ranks.from_first(lambda: self._prune(step, keep, best))

    def _name(self, target: Path, beside: Path, hashes: list[dict[str, Any]], facts: dict[str, Any]) -> None:
        files = {name: entry for rank in hashes for name, entry in rank.items()}
        files[".metadata"] = _hashed(beside / ".metadata")
        content = {**facts, "files": files}
        write_json(beside / "manifest.json", {**content, "blake3": _digest(content)})
        verify(beside)
        if target.exists():  # a damaged one of the same step, passed over at the start
            shutil.rmtree(target)
        os.rename(beside, target)
        _settle(self.checkpoints)

    def _prune(self, step: int, keep: int, best: int | None) -> None:
        behind = [path for path in self.steps() if int(path.name) <= step]  # those ahead were passed over
        for old in behind[keep:]:
            if old.name != str(best):
                shutil.rmtree(old)

    def steps(self) -> Iterator[Path]:
        """The named checkpoints, newest first."""
        found = (
            [path for path in self.checkpoints.glob("*") if path.name.isdigit()] if self.checkpoints.exists() else []
        )
        yield from sorted(found, key=lambda path: -int(path.name))

    def newest(self, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """The newest good checkpoint and its manifest. `say` names each damaged one that is passed over."""
        for path in self.steps():
            try:
                return path, verify(path)
            except SaccadeError as error:
                say(f"passed over a damaged checkpoint: {error}")
        return None

    def tidy(self) -> None:
        """Removes what an interrupted write left."""
        for path in (*self.path.glob("*"), *self.checkpoints.glob("*")):
            if _half(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


_HELD: dict[Path, int] = {}
"""Directories that this process is at work in, and the handles whose locks say so. A lock ends with its process."""


def _hold(path: Path) -> None:
    """Raises `SaccadeError` when another process, or another call in this one, is at work in the directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise SaccadeError(
            f"another process is training in {path}", path="--out", hint="wait until it ends, or name a new directory"
        ) from None
    except OSError:  # a file system without locks
        os.close(handle)
        return
    _HELD[path.resolve()] = handle


@contextlib.contextmanager
def holding() -> Iterator[None]:
    """At its end the directories that were claimed inside are free again."""
    before = set(_HELD)
    try:
        yield
    finally:
        for path in _HELD.keys() - before:
            os.close(_HELD.pop(path))


def _let_go() -> None:
    """A forked worker may outlive its parent for some seconds, and must not keep the parent's locks."""
    for handle in _HELD.values():
        os.close(handle)
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go)


def verify(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files all have the hashes it names. Raises `SaccadeError` for any other."""
    path = directory / "manifest.json"
    try:
        manifest = _read_json(path)
        files = dict(manifest["files"])
        if manifest.pop("blake3") != _digest(manifest) or int(directory.name.rpartition("-")[2]) != manifest["step"]:
            raise ValueError("it is not the one that was saved")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SaccadeError(f"{directory} has no readable manifest: {error}", path=path) from None
    for name, expected in files.items():
        file = directory / name
        if not file.is_file() or _hashed(file) != expected:
            raise SaccadeError(f"{file} is not the file that was saved", path=file, hint="it was damaged or cut")
    return manifest


def environment() -> dict[str, Any]:
    """Code version and hash, libraries, machine and command of this session."""
    package = Path(__file__).parent
    code = blake3()
    for path in sorted(package.rglob("*.py")):
        code.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    versions = {name: _version(name) for name in _LIBRARIES}
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "code": {"version": versions["saccade"], "blake3": code.hexdigest()},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": versions,
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def memory_gb() -> float:
    """The most memory this process has held: of the GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


@contextlib.contextmanager
def stop_requests() -> Iterator[dict[str, bool]]:
    """SIGINT and SIGTERM become a request that is met at the next step boundary; a second one stops at once."""
    requests = {"stop": False}
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return

    def request(number: int, frame: FrameType | None) -> None:
        if requests["stop"]:
            raise KeyboardInterrupt
        requests["stop"] = True
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"stopping after this step; again to stop at once, without saving\n")

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON beside and renames it into place."""
    _replace(path, json.dumps(content, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".writing-{path.name}")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _entry(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _flat(content: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {name: content}
    return {
        inner: value
        for key, part in content.items()
        for inner, value in _flat(part, f"{name}.{key}" if name else key).items()
    }


def _spoken(value: Any) -> str:
    """A setting's value, in words."""
    return ", ".join(map(str, value)) if isinstance(value, list) else "not set" if value is None else str(value)


def _half(path: Path) -> bool:
    """Whether this was being written, and would have got its name when whole."""
    return path.name.startswith(".writing-")


def _digest(content: dict[str, Any]) -> str:
    return blake3(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _fresh(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _hashed(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "blake3": blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()}


def _settle(directory: Path) -> None:
    """A rename survives a power cut only when its directory has been synced."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
