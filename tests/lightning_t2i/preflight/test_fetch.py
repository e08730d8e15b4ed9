"""What `check --fetch` brings from a hub: a small server that answers as the hub does, and then no network at all."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

from lightning_t2i.cli.configs import merge
from lightning_t2i.errors import UserError
from lightning_t2i.networks import load
from lightning_t2i.paths import ROOT
from lightning_t2i.preflight.fetch import cached, fetch, hub_sources, is_hub_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HERE, GATED = "owner/tiny", "owner/gated"
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


class Hub(BaseHTTPRequestHandler):
    """Serves a folder as the repository HERE, whose branch main is at COMMIT."""

    files: dict[str, bytes] = {}
    asked: list[str] = []

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        if GATED in path:
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path == f"/api/models/{HERE}/revision/main":
            self.reply(200, json.dumps({"id": HERE, "sha": COMMIT}).encode())
        elif path == f"/api/models/{HERE}/tree/{COMMIT}":
            rows = [{"type": "file", "path": p, "size": len(b), "oid": "0" * 40} for p, b in self.files.items()]
            self.reply(200, json.dumps(rows).encode())
        elif path.startswith(f"/{HERE}/resolve/{COMMIT}/"):
            content = self.files[path.removeprefix(f"/{HERE}/resolve/{COMMIT}/")]
            etag = hashlib.sha256(content).hexdigest()
            self.reply(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def reply(self, code: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *unused: object) -> None: ...


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with assets/tiny/sd and files beside it that nobody reads; the cache is empty and the network on."""
    folder = ROOT / "assets" / "tiny" / "sd"
    names = [f for f in folder.rglob("*") if f.is_file() and f.suffix in (".json", ".safetensors", ".txt")]
    files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in names}
    unread = ("everything.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/model.bin", "README.md")
    monkeypatch.setattr(Hub, "files", {**files, **dict.fromkeys(unread, b"large")})
    monkeypatch.setattr(Hub, "asked", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=[0.02])
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    yield sorted(files)
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()


def test_all_that_is_read_comes_and_no_more(hub):
    folder = fetch([(HERE, "main")])[HERE, "main"]
    assert folder is not None and folder.name == COMMIT
    assert sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()) == hub


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument is deprecated")  # diffusers gives it
def test_what_was_fetched_is_enough_without_a_network(hub, monkeypatch):
    """Files that the repository does not have are no error then: one whole pipeline is read as from its folder."""
    assert cached((HERE, "main")) is None
    folder = fetch([(HERE, "main")])[HERE, "main"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    Hub.asked.clear()
    for revision in ("main", COMMIT):
        assert cached((HERE, revision)) == folder
        assert fetch([(HERE, revision)]) == {(HERE, revision): folder}
        assert load.components(HERE, revision) == load.components("assets/tiny/sd")
        assert load.read_json(HERE, "config.json", revision) is None
    network = load.load_backbone(HERE, revision=COMMIT)
    assert load.load_process(HERE)[1] == "eps" and sum(p.numel() for p in network.parameters()) == 1_417_252
    assert Hub.asked == []


def test_a_cache_that_is_not_whole_is_no_cache(hub, monkeypatch):
    folder = fetch([(HERE, "main")])[HERE, "main"]
    assert folder is not None
    (folder / "model_index.json").unlink()
    assert cached((HERE, "main")) is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="check --fetch"):
        load.read_json(HERE, "model_index.json")


@pytest.mark.parametrize(
    ("source", "offline", "message"),
    [
        ((HERE, "main"), True, "cannot be reached"),
        ((GATED, "main"), False, "gated"),
        (("owner/none", "main"), False, "wrong id"),
    ],
)
def test_what_cannot_be_fetched_is_told(hub, monkeypatch, source, offline, message):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(UserError, match=message) as error:
        fetch([source])
    assert source[0] in str(error.value) and "--fetch" in str(error.value)


def test_sources_of_a_config():
    pairs = {"class_path": "datamodules.pairs.Pairs", "init_args": {"teacher": "owner/tiny", "revision": "abc"}}
    model = {"teacher": "owner/tiny", "student_from": "owner/student", "revision": "def", "network": "assets/tiny/sd"}
    config = {"model": {"init_args": model}, "data": {"pairs": pairs, "latents": "owner/vae"}}
    wanted = {("owner/tiny", "abc"), ("owner/tiny", "def"), ("owner/student", "main"), ("owner/vae", "main")}
    assert hub_sources(config) == wanted
    for own in ("ghi", None):
        found = hub_sources({"text": "owner/bert", "revision": "abc", "text_revision": own})
        assert found == {("owner/bert", own or "main")}
    wukong = {"image": "owner/clip", "text": "configs/x.json", "tokenizer": "owner/words", "revision": "abc"}
    assert hub_sources(wukong) == {("owner/clip", "abc"), ("owner/words", "main")}
    for key in ("base", "backbone", "parts"):
        assert hub_sources({key: "owner/sd", "revision": "abc"}) == {("owner/sd", "abc")}
    v2 = {"clip": "owner/clip", "decoder": "owner/taesd", "teacher": "owner/sd", "revision": "abc"}
    assert hub_sources(v2) == {("owner/clip", "main"), ("owner/taesd", "main"), ("owner/sd", "abc")}
    pinned = {("owner/clip", "def"), ("owner/taesd", "main"), ("owner/sd", "abc")}
    assert hub_sources({**v2, "clip_revision": "def", "decoder_revision": None}) == pinned
    assert hub_sources({"eval": {"networks": {"clip": "owner/clip"}}}) == {("owner/clip", "main")}
    cache = {"encoder": "owner/sd", "revision": "abc"}
    assert hub_sources({"main": {"text_cache": cache}}) == {("owner/sd", "abc")}
    ours = ("assets/tiny", "exported/mine", "a/b/c", "./a", "configs/x.json", "weights/x.safetensors", None, 3)
    assert [x for x in ours if is_hub_id(x)] == []


def leaves(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with the nearest key above it."""
    if isinstance(config, dict | list):
        for name, value in config.items() if isinstance(config, dict) else ((key, value) for value in config):
            yield from leaves(value, name)
    else:
        yield key, config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_hub_id_of_a_shipped_config_is_fetched(path):
    config = merge([path]).config
    named = {value for key, value in leaves(config) if is_hub_id(value) and key != "metric"}  # those are val/NAME
    assert {name for name, _ in hub_sources(config)} == named


def test_the_revision_is_asked_for(monkeypatch):
    asked = []

    def download(name, revision, **patterns):
        asked.append((name, revision, patterns["allow_patterns"]))
        return f"/cache/{revision}"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch([("a/b", "v2")]) == {("a/b", "v2"): Path("/cache/v2")}
    assert asked[0][:2] == ("a/b", "v2") and "*.json" in asked[0][2]
