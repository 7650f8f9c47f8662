"""The hub as a source: a server on this machine speaks its file protocol, and each thing that can go wrong says so.

The server is the hub as far as files go: HEAD and GET of /REPOSITORY/resolve/REVISION/FILE with the headers that
announce commit, length and hash, redirects of large files to another place, ranges, and refusals with their codes.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import saccade
from saccade import errors, hub, published, vit, weights
from saccade.cli import main
from saccade.errors import SaccadeError

huggingface_hub = pytest.importorskip("huggingface_hub")
transformers = pytest.importorskip("transformers")

NAME = "facebook/dinov2-small"
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
FIRST, SECOND = "1" * 40, "2" * 40


class Hub:
    """Repositories by name, commit and file; `main` is the newest. What it is to do wrong is said by attributes."""

    def __init__(self, url: str):
        self.url = url
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches = {"main": FIRST}
        self.tokens: set[str] | None = None
        self.gated = False
        self.lies = False
        self.cuts: list[int] = []
        self.asked: list[tuple[str, str]] = []

    def publish(self, folder: Path, name: str = NAME, commit: str = FIRST) -> None:
        """A folder as one commit."""
        content = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.files.setdefault(name, {})[commit] = content

    def count(self, method: str, end: str = "") -> int:
        return sum(asked == method and path.endswith(end) for asked, path in self.asked)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *arguments: object) -> None:
        """Nothing on the screen."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        state: Hub = self.server.state
        state.asked.append((self.command, self.path))
        if self.path.startswith("/elsewhere/"):  # as large files lie on another server
            return self._send(self.server.blobs[self.path.rpartition("/")[2]], {}, body)
        name, _, rest = self.path.strip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and state.tokens is not None and token not in state.tokens:
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if name not in state.files:
            return self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        if state.gated and token not in (state.tokens or ()):
            return self._refuse(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted")
        commit = state.branches.get(revision, revision)
        if commit not in state.files[name]:
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        if file not in state.files[name][commit]:
            return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        return self._file(state, file, commit, state.files[name][commit][file], body)

    def _file(self, state: Hub, file: str, commit: str, content: bytes, body: bool) -> None:
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if not file.endswith((".safetensors", ".bin")):
            return self._send(content, headers, body)
        digest = hashlib.sha256(content + b"!" * state.lies).hexdigest()
        self.server.blobs[digest] = content
        headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        return self._refuse(
            302, "", "", headers | {"Location": f"{state.url.replace('127.0.0.1', 'localhost')}/elsewhere/{digest}"}
        )

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        said = {"X-Error-Code": code, "X-Error-Message": message} if code or message else {}
        self._head(status, {**said, **(headers or {}), "Content-Length": "0"})

    def _send(self, content: bytes, headers: dict[str, str], body: bool) -> None:
        start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        rest = content[start:]
        size = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self._head(206 if start else 200, {**headers, **size, "Content-Length": str(len(rest))})
        if body and self.path.startswith("/elsewhere/") and self.server.state.cuts:
            rest, self.close_connection = rest[: self.server.state.cuts.pop(0)], True
        if body:
            self.wfile.write(rest)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Hub(f"http://127.0.0.1:{http.server_address[1]}")
    http.state, http.blobs = state, {}  # type: ignore[attr-defined]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", state.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(huggingface_hub.file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.utils.disable_progress_bars()
    errors.say.cache_clear()
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def _model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return transformers.Dinov2Model(transformers.Dinov2Config(**TINY, mlp_ratio=3)).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny DINOv2 as transformers saves it."""
    _model().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def published_once(server: Hub, folder: Path) -> Hub:
    server.publish(folder)
    return server


def refusal(name: str = NAME, **where: Any) -> SaccadeError:
    with pytest.raises(SaccadeError) as caught:
        weights.load(name, **where)
    assert "\n" not in str(caught.value)
    return caught.value


def kept(commit: str = FIRST) -> Path:
    return hub.cache() / "models--facebook--dinov2-small" / "snapshots" / commit


def test_a_first_load_and_a_second(published_once: Hub, folder: Path) -> None:
    assert not hub.cached(NAME)
    first = weights.load(NAME)
    content = (folder / "model.safetensors").read_bytes()
    assert (first.record["name"], first.record["revision"]) == (NAME, FIRST)
    assert first.record["sha256"] == {"model.safetensors": hashlib.sha256(content).hexdigest()}
    assert first.record["hash"] == weights.load(folder).record["hash"] and first.record["family"] == "dinov2"
    pixels = torch.rand(1, 3, 28, 28)
    theirs = _model()(first.backbone.normalise(pixels)).last_hidden_state
    torch.testing.assert_close(first(pixels).patches, theirs[:, 1:], atol=1e-5, rtol=0)
    assert published_once.count("GET", "model.safetensors") + published_once.count("GET", "config.json") <= 2
    assert not [path for method, path in published_once.asked if method == "GET" and "pytorch_model" in path]
    assert hub.cached(NAME)

    published_once.asked.clear()
    assert torch.equal(weights.load(NAME)(pixels).patches, first(pixels).patches)
    assert published_once.count("GET") == 0 and published_once.count("HEAD") == 1  # has `main` moved?
    published_once.asked.clear()
    assert weights.load(first.record["path"]).record["path"] == f"{NAME}@{FIRST}"
    assert not published_once.asked  # a commit cannot move


def test_offline(published_once: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "not in the cache" in str(refusal()) and "HF_HUB_OFFLINE" in str(refusal())
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # as if it had been imported then
    weights.load(NAME)
    published_once.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert weights.load(NAME).record["revision"] == FIRST
    assert f"offline, as HF_HUB_OFFLINE says: {NAME} from the cache, revision {FIRST}" in capsys.readouterr().err
    assert "not in the cache" in str(refusal(revision=SECOND)) and not published_once.asked


def test_no_network(published_once: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    weights.load(NAME)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert weights.load(NAME).record["revision"] == FIRST
    said = capsys.readouterr().err
    assert "cannot be reached" in said and f"from the cache, revision {FIRST}" in said
    (kept() / "config.json").unlink()
    assert "config.json of" in str(refusal()) and "not in the cache" in str(refusal())
    error = refusal("facebook/dinov2-base")
    assert "cannot be reached" in str(error) and "not in the cache either" in str(error) and error.code == 1


def test_tokens(published_once: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    published_once.tokens = {"good"}
    error = refusal(token="wrong")
    assert "does not know this token (401)" in str(error) and "HF_TOKEN" in str(error)
    assert not hub.cached(NAME)
    monkeypatch.setenv("HF_TOKEN", "wrong too")
    assert "does not know this token (401)" in str(refusal())
    assert weights.load(NAME, token="good").record["revision"] == FIRST


def test_gated(published_once: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    published_once.gated, published_once.tokens = True, {"good"}
    for token in (None, "wrong"):
        published_once.tokens = {"good"} if token is None else None
        text = str(refusal(token=token))
        assert "is gated" in text and f"accept its terms at {published_once.url}/{NAME}" in text and "HF_TOKEN" in text
    published_once.tokens = {"good"}
    monkeypatch.setenv("HF_TOKEN", "good")
    assert weights.load(NAME).record["name"] == NAME


def test_names_that_nobody_published(published_once: Hub) -> None:
    text = str(refusal("facebook/dinov2-smal"))
    assert "neither here nor on the hub" in text and f"did you mean {NAME!r}?" in text
    assert "did you mean 'dinov2-small'" in str(refusal("dinov2-smal"))
    assert "did you mean 'dinov3_vits16_pretrain_lvd1689m'" in str(refusal("dinov3_vits16_pretrain_lvd168m"))
    assert "their own server alone" in str(refusal("dinov3_vitl16plus_pretrain_lvd1689m"))
    assert "the hub has no facebook/dinov2-base" in str(refusal("facebook/dinov2-base"))
    text = str(refusal(f"{NAME}@v9"))
    assert f"{NAME} has no revision 'v9'" in text and "a branch, a tag or a commit" in text
    assert "is no revision" in str(refusal(NAME, revision="../../etc"))
    assert "another" in str(refusal(f"{NAME}@main", revision=FIRST))


def test_what_lies_here_comes_first(
    published_once: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facebook").mkdir()
    folder.rename(tmp_path / "facebook" / "dinov2-small")
    assert "revision" not in weights.load(NAME).record
    assert "lies on this disk" in str(refusal(NAME, revision="main"))
    assert "did you mean 'dinov2-small'" in str(refusal("facebook/my-dinov2-small"))  # the folder is here: a path
    assert "there is no backbone" in str(refusal("nowhere/model.pth")) and not published_once.asked


def test_a_download_that_breaks_off(published_once: Hub, folder: Path) -> None:
    published_once.cuts = [500, 0, 0, 0, 0, 0, 0, 0]
    error = refusal()
    assert "the download of model.safetensors" in str(error) and "broke off" in str(error) and error.code == 1
    assert not hub.cached(NAME) and not list(hub.cache().rglob("*.incomplete"))
    published_once.cuts = [500, 700]  # and goes on where it was
    assert weights.load(NAME).record["hash"] == weights.load(folder).record["hash"]
    ranged = [path for method, path in published_once.asked if method == "GET" and "elsewhere" in path]
    assert len(ranged) >= 3


def test_a_hash_that_was_not_announced(published_once: Hub) -> None:
    published_once.lies = True
    text = str(refusal())
    assert "is not what the hub announced" in text and "SHA-256" in text and "fetches it again" in text
    assert not hub.cached(NAME) and not (kept() / "model.safetensors").is_symlink()
    assert not (kept().parents[1] / "refs" / "main").exists()
    published_once.lies = False
    assert weights.load(NAME).record["revision"] == FIRST

    blob = (kept() / "model.safetensors").resolve()  # a disk that rots, later
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    assert "is not what the hub announced" in str(refusal())
    assert weights.load(NAME).record["revision"] == FIRST


def test_a_revision_is_pinned(published_once: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _model(1).save_pretrained(folder)
    published_once.publish(folder, commit=SECOND)
    published_once.branches = {"main": SECOND, "v1": FIRST}
    first, pinned, newest = weights.load(f"{NAME}@v1"), weights.load(NAME, revision=FIRST), weights.load(NAME)
    assert first.record["revision"] == pinned.record["revision"] == FIRST and newest.record["revision"] == SECOND
    assert first.record["hash"] == pinned.record["hash"] != newest.record["hash"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert weights.load(f"{NAME}@v1").record["revision"] == FIRST and weights.load(NAME).record["revision"] == SECOND
    assert hub.cached(NAME)


def test_shards(server: Hub, tmp_path: Path, folder: Path) -> None:
    _model().save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    assert (tmp_path / "cut" / "model.safetensors.index.json").is_file()
    server.publish(tmp_path / "cut")
    record = weights.load(NAME).record
    assert len(record["sha256"]) > 1 and all(name.endswith(".safetensors") for name in record["sha256"])
    assert record["matched"] == weights.load(folder).record["matched"] and hub.cached(NAME)
    next(kept().glob("model-*.safetensors")).unlink()
    assert not hub.cached(NAME)

    content = server.files[NAME][FIRST]
    content["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": "../../a.safetensors"}}).encode()
    server.branches["main"] = SECOND
    server.files[NAME][SECOND] = content
    assert "names no files of tensors" in str(refusal())


def test_a_pickle_only_where_there_is_nothing_else(server: Hub, tmp_path: Path, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    server.publish(folder)
    assert list(weights.load(NAME).record["sha256"]) == ["model.safetensors"]
    assert server.count("GET", ".bin") == 0
    (folder / "model.safetensors").unlink()
    server.publish(folder, "facebook/dinov2-base")
    assert list(weights.load("facebook/dinov2-base").record["sha256"]) == ["pytorch_model.bin"]

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"x": Trap()}, folder / "pytorch_model.bin")
    server.publish(folder, "facebook/dinov2-large")
    assert refusal("facebook/dinov2-large") and not (tmp_path / "sprung").exists()
    (folder / "pytorch_model.bin").unlink()
    server.publish(folder, "facebook/dinov2-giant")
    assert "has no weights that can be read" in str(refusal("facebook/dinov2-giant"))


def test_timms_repositories_and_short_names(server: Hub, tmp_path: Path, folder: Path) -> None:
    """timm's config.json says who trained it; a name without a repository means the one that is known."""
    network = weights.load(folder).backbone
    naming = published.families()["dinov2"].namings["timm"]
    (tmp_path / "timm").mkdir()
    tensors = published.to_theirs(naming, {k: v for k, v in network.state_dict().items() if k != "mask_token"})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "timm" / "model.safetensors")
    config = {
        "architecture": "vit_small_patch14_dinov2",
        "num_attention_heads": 2,
        "pretrained_cfg": {"tag": "lvd142m"},
    }
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    server.publish(tmp_path / "timm", "timm/vit_small_patch14_dinov2.lvd142m")
    record = weights.load("vit_small_patch14_dinov2.lvd142m").record
    assert record["name"] == "timm/vit_small_patch14_dinov2.lvd142m" and record["family"] == "dinov2"
    server.publish(folder)
    assert weights.load("dinov2_vits14_pretrain").record["name"] == NAME
    assert hub.repository("vit_small_patch16_224.augreg_in21k") == "timm/vit_small_patch16_224.augreg_in21k"
    assert hub.repository("IN22K-vit.h.14-900e.pth.tar") is None  # one of several on the hub: not guessed


def test_tokenizers_come_along(server: Hub, tmp_path: Path) -> None:
    from test_published_text import PARITY
    from test_published_text import _model as siglip

    siglip("siglip").save_pretrained(tmp_path / "given")
    (tmp_path / "given" / "spiece.model").write_bytes((PARITY / "spiece.model").read_bytes())
    name = "google/siglip-base-patch16-224"
    files = {path.name: path.read_bytes() for path in (tmp_path / "given").iterdir()}
    server.files[name] = {FIRST: files}
    encoder = weights.load(name)
    assert encoder.record["text"]["tokenizer"]["kind"] == "siglip" and encoder.text(["a cat"]).shape == (1, 32)
    server.asked.clear()
    weights.load(f"{name}@{FIRST}")
    assert not server.asked  # what it lacks is known too


def test_an_answer_that_is_none(published_once: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "_answer", lambda self, body: self._refuse(503, "", ""))
    error = refusal()
    assert "answers 503" in str(error) and "try again later" in str(error)
    monkeypatch.setattr(Handler, "_answer", lambda self, body: self._send(b"<html>", {"ETag": '"x"'}, body))
    assert "names no commit" in str(refusal())


def test_without_the_library(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'saccade[hub]'" in str(refusal())


def test_the_cache_is_where_the_library_says(
    published_once: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, place in (("HF_HOME", tmp_path / "one" / "hub"), ("HF_HUB_CACHE", tmp_path / "two")):
        monkeypatch.setenv(name, str(tmp_path / "one" if name == "HF_HOME" else place))
        assert hub.cache() == place and not hub.cached(NAME)
        weights.load(NAME)
        scanned = {repository.repo_id for repository in huggingface_hub.scan_cache_dir(place).repos}
        listed = {row["name"] for row in published.listing() if row["cached"]}
        assert scanned == listed == {NAME}
        assert not huggingface_hub.scan_cache_dir(place).warnings


def test_an_index_names_the_commit(published_once: Hub, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(6):
        Image.new("RGB", (32, 32), (number * 30, 99, 9)).save(pictures / f"{number}.png")
    saccade.embed(NAME, pictures, out=tmp_path / "index")
    published_once.asked.clear()
    assert len(saccade.Index.open(tmp_path / "index").search(pictures / "0.png", k=3)) == 3
    assert not published_once.asked, "an index knows the commit that made it"


def test_licences_travel(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run from non-commercial weights says so, its record and its backbone do, and a run that goes on from that."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTMAEConfig(**size, image_size=32, patch_size=8, layer_norm_eps=1e-6, mask_ratio=0.0)
    transformers.ViTMAEModel(config).save_pretrained(tmp_path / "mae")
    server.publish(tmp_path / "mae", "facebook/vit-mae-base")
    for number in range(4):
        Image.new("RGB", (32, 32), (number * 60, 9, 99)).save(tmp_path / f"{number}.png")
    monkeypatch.setattr(vit, "SIZES", vit.SIZES | {"ti": {"width": 32, "depth": 2, "heads": 2, "hidden": 64}})
    tiny: dict[str, Any] = {"recipe": "simclr", "arch": "vit-ti/8", "image_size": 32, "steps": 1, "batch": 4}
    tiny |= {"workers": 0, "threads": 1, "seed": 0}
    begin = partial(saccade.pretrain, str(tmp_path), init="facebook/vit-mae-base", out=tmp_path / "first", **tiny)
    first = begin()
    assert "mae weights: CC-BY-NC-4.0, for non-commercial use only; https" in capfd.readouterr().err
    initial = first.record["initial"]
    assert initial["name"] == "facebook/vit-mae-base" and initial["revision"] == FIRST and initial["terms"]

    second = saccade.pretrain(str(tmp_path), init=str(first.path), out=tmp_path / "second", **tiny)
    for run in (first, second):
        (origin,) = run.record["initial"]["derived_from"]
        assert origin["name"] == "facebook/vit-mae-base" and origin["licence"] == "CC-BY-NC-4.0"
        assert origin["terms"] == "for non-commercial use only" and origin["hash"] == initial["hash"]
        said = json.loads((run.path / "backbone" / "config.json").read_text())["record"]
        assert said["derived_from"] == [origin] and said["licence"] == "CC-BY-NC-4.0"
        capfd.readouterr(), errors.say.cache_clear()
        assert weights.load(run.path).record["derived_from"] == [origin]
        said = capfd.readouterr().err
        assert f"{run.path} derives from mae weights: CC-BY-NC-4.0, for non-commercial use only" in said
    server.branches["main"] = SECOND  # and the run goes on from what it began with
    server.asked.clear()
    assert begin().record["initial"]["revision"] == FIRST and not server.asked
    assert "CC-BY-NC-4.0" in (first.path / "report.html").read_text()
    assert "non-commercial use only" in (first.path / "report.html").read_text()


def test_a_plainer_server(published_once: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mirror: no redirects, no codes of errors, the hash as the tag, a commit of its own kind."""

    def plain(handler: Handler, state: Hub, file: str, commit: str, content: bytes, body: bool) -> None:
        digest = hashlib.sha256(content + b"!" * state.lies).hexdigest()
        handler._send(content, {"X-Repo-Commit": commit, "ETag": digest}, body)

    def refuse(handler: Handler, status: int, code: str, message: str, headers: object = None) -> None:
        handler._head(status, {"Content-Length": "0"})

    monkeypatch.setattr(Handler, "_file", plain)
    monkeypatch.setattr(Handler, "_refuse", refuse)
    published_once.files[NAME]["c0ffee"] = published_once.files[NAME].pop(FIRST)
    published_once.branches["main"] = "c0ffee"
    assert weights.load(NAME).record["revision"] == "c0ffee"
    published_once.asked.clear()
    assert weights.load(NAME).record["revision"] == "c0ffee" and published_once.count("GET") == 0
    published_once.tokens = {"good"}
    assert "does not know this token (401)" in str(refusal(token="wrong"))
    assert "the hub wants a token (401)" in str(refusal("facebook/dinov2-base"))
    assert "the hub has no facebook/dinov2-base (404)" in str(refusal("facebook/dinov2-base", token="good"))
    published_once.gated, published_once.tokens = True, None
    assert "is gated" in str(refusal(token="other"))
    published_once.gated, published_once.lies = False, True
    published_once.publish(folder, "facebook/dinov2-base", "c0ffee")
    assert "is not what the hub announced" in str(refusal("facebook/dinov2-base"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    published_once.publish(folder, "facebook/dinov2-large", "c0ffee")
    assert "pytorch_model.bin" in str(refusal("facebook/dinov2-large"))


def test_what_another_tool_left_in_the_cache(published_once: Hub) -> None:
    """timm fetches the tensors alone; what says how to read them is fetched then."""
    huggingface_hub.hf_hub_download(
        NAME, "model.safetensors", cache_dir=hub.cache(), endpoint=published_once.url, revision=FIRST
    )
    published_once.asked.clear()
    assert weights.load(f"{NAME}@{FIRST}").record["family"] == "dinov2"
    assert published_once.count("GET") == 1 and (kept() / "config.json").is_file()


def test_on_the_command_line(
    published_once: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its codes: 2 for what the user can mend, 1 for a hub that does not answer. And the table of models."""

    def says(*words: str) -> tuple[int, dict[str, Any]]:
        code = main([*words, "--json"])
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    (tmp_path / "a").mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), (number * 60, 9, 99)).save(tmp_path / "a" / f"{number}.png")
    code, said = says("embed", f"{NAME}@main", str(tmp_path / "a"), "--out", str(tmp_path / "index"))
    assert code == 0 and said["count"] == 3
    code, said = says("evaluate", "facebook/dinov2-smal", str(tmp_path))
    assert code == 2 and not said["ok"] and NAME in said["hint"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, said = says("evaluate", "facebook/dinov2-base", str(tmp_path))
    assert code == 1 and "cannot be reached" in said["error"]

    code, said = says("models", "dinov2-small")
    (row,) = said["models"]
    assert row["cached"] and row["cached_names"] == [NAME]
    assert (row["figures"]["knn"], row["figures"]["linear"]) == (79.0, 81.1) and "dinov2" in row["figures"]["source"]
    assert main(["models", "dinov*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "size", "parameters", "trained", "on", "licence", "k-NN", "linear", "cached"]
    (line,) = (line for line in lines if line.startswith(f"{NAME} "))
    assert line.split() == f"{NAME} dinov2 vit-s/14 22 M LVD-142M Apache-2.0 79.0 81.1 yes".split()
    assert [line for line in lines if "87.0*" in line] and lines[-1].startswith("DINOv3 License: a custom licence")


def test_figures_are_of_sizes_that_exist() -> None:
    for family in published.families().values():
        assert family.figures.keys() <= family.sizes.keys() and bool(family.figures) == bool(family.figures_source)
