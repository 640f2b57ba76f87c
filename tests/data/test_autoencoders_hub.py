"""Autoencoders by hub id: from the cache alone where it holds them, and what is said where they cannot be had."""

import json
import shutil
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from madformer.data.codec import build_codec
from tests.data.vaes import complaint


@pytest.mark.parametrize("location", ["./missing", "/missing/vae", "missing", "a b/c", "../owner/name"])
def test_no_folder_and_no_hub_id(location):
    assert complaint(f"vae:{location}") == "no such folder, and no hub id, which is owner/name or owner/name/subfolder"


def fill(cache, folder, subfolder):
    """What the hub's library leaves of the repository owner/name."""
    repository = cache / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40) / subfolder)


@pytest.mark.parametrize(
    ("subfolder", "location"), [("", "owner/name"), ("vae", "owner/name"), ("vae", "owner/name/vae"), ("a/b", "owner/name/a/b")]
)
def test_cached_files_need_no_network(vae, tmp_path, cache, subfolder, location):
    fill(cache, tmp_path / "vae", subfolder)
    codec = build_codec(f"vae:{location}")
    assert codec.sha256 == build_codec(f"vae:{tmp_path / 'vae'}").sha256 and codec.name == f"vae:{location}"


def test_without_network_it_fails_at_once(vae, tmp_path, cache):
    start = time.monotonic()
    message = complaint("vae:owner/name")
    assert message.startswith("cannot be had: ") and message.endswith("; name a folder that exists, or take data.codec=pixels")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    fill(cache, tmp_path / "vae", "")  # a download that was cut off
    assert complaint("vae:owner/name") == message
    assert time.monotonic() - start < 5


class Hub(BaseHTTPRequestHandler):
    """A hub that has no repository but owner/name, which holds no weights."""

    def do_GET(self):
        body = json.dumps({"id": "owner/name", "sha": "0" * 40, "siblings": [{"rfilename": "README.md"}]}).encode()
        found = self.path == "/api/models/owner/name"
        self.send_response(200 if found else 403 if "gated" in self.path else 401)
        if not found:
            self.send_header("X-Error-Code", "GatedRepo" if "gated" in self.path else "RepoNotFound")
            body = b"{}"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("owner/nmae", "the hub has no such repository, or it is private (`hf auth login`)"),
        ("owner/gated", "its owner must grant access first (accept the terms on its page, then `hf auth login`)"),
        ("owner/name", "owner/name holds no vae/config.json"),
        ("owner/name/other", "owner/name holds no other/config.json"),
    ],
)
def test_what_the_hub_says(cache, monkeypatch, location, reason):
    from huggingface_hub import constants

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        try:
            message = complaint(f"vae:{location}")
        finally:
            server.shutdown()
    assert message == f"cannot be had: {reason}; name a folder that exists, or take data.codec=pixels"
