"""Starts sessions of `pretrain` by fork from a process that has imported everything: a session costs a second.

It reads one JSON request a line and answers each with a line: exit codes of the ranks, what they said, who was stopped.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOYS = Path(__file__).parent


class Forge:
    """The other end of the pipe, for tests."""

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process

    def session(
        self, out: Path, data: Path, *, world: int = 1, stop: dict[str, Any] | None = None, **settings: Any
    ) -> dict[str, Any]:
        """One session of a run.

        `stop` says when, by one of `delay` (seconds), `saving` (seconds after a save has begun) and `step` (that
        checkpoint is there), and with which `signal` (SIGKILL if not given).
        """
        request = {"out": str(out), "data": str(data), "world": world, "stop": stop}
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({**request, "settings": settings}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextlib.contextmanager
def forge() -> Iterator[Forge]:
    """A process that starts sessions."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    try:
        yield Forge(process)
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def pictures(folder: Path, source: Any) -> Path:
    """The source's pictures as files."""
    from PIL import Image

    for index in range(len(source)):
        Image.fromarray(source[index].pixels[0].permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    return folder


def _become(rank: int, port: int, said: Path, request: dict[str, Any]) -> None:
    """A rank: runs `pretrain` and ends with the exit code that the command line would give."""
    from saccade.errors import SaccadeError
    from saccade.train import pretrain

    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 2)
    faulthandler.dump_traceback_later(290)
    if request["world"] > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(request["world"]), LOCAL_RANK=str(rank),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    code = 0
    try:
        settings = {"workers": 0, "log_every": 1, "save_every": "3", **request["settings"]}
        pretrain(request["data"], out=request["out"], **{"recipe": "growing", **settings})
    except SaccadeError as mistake:
        if not mistake.said_elsewhere:
            print(f"saccade: {mistake}", file=sys.stderr)
        code = mistake.code
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stderr.flush()
    os._exit(code)


def _moment(out: Path, stop: dict[str, Any], began: float) -> bool:
    if "delay" in stop:
        return time.monotonic() - began > stop["delay"]
    checkpoints = out / "checkpoints"
    if "step" in stop:
        return (checkpoints / str(stop["step"])).exists()
    if checkpoints.exists() and any(name.startswith(".writing-") for name in os.listdir(checkpoints)):
        time.sleep(stop["saving"])
        return True
    return False


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    out, stop, said = Path(request["out"]), request["stop"], Path(request["out"] + ".said")
    said.unlink(missing_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(request["world"]):
        child = os.fork()
        if not child:
            _become(rank, port, said, request)
        ranks.append(child)
    began, codes, stopped, half = time.monotonic(), {}, False, False
    while len(codes) < len(ranks):
        for child in set(ranks) - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        hung = time.monotonic() - began > 300
        if hung or (stop and not stopped and _moment(out, stop, began)):
            stopped, number = True, signal.SIGKILL if hung else getattr(signal, (stop or {}).get("signal", "SIGKILL"))
            for child in set(ranks) - codes.keys():
                os.kill(child, number)
            half = (out / "checkpoints").exists() and any((out / "checkpoints").glob(".writing-*"))
        time.sleep(0.0005)
    return {"codes": [codes[child] for child in ranks], "half": half,
            "said": said.read_text() if said.exists() else "", "seconds": time.monotonic() - began}  # fmt: skip


if __name__ == "__main__":
    import saccade.recipes

    saccade.recipes.__path__.append(str(TOYS / "recipes"))
    import saccade.recipes.growing

    import saccade.train
    from saccade import vit

    vit.SIZES["7b"] |= {"width": 48, "depth": 3, "heads": 3, "hidden": 96}  # narrowed, with the same switches
    for line in sys.stdin:
        print(json.dumps(_serve(json.loads(line))), flush=True)
