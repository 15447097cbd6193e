"""Models from a local server that answers as huggingface.co does."""

import hashlib
import json
import threading
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from keras import ops
from models.small_bert import SIZES
from models.torch_file import write_torch

from keras_ext.models import (
    build_transformer_model,
    download_model,
    load_checkpoint,
    save_transformer_model,
)
from keras_ext.models.hub import FILES, NAMES, TORCH_FILES, is_repository

constants = pytest.importorskip("huggingface_hub.constants")
load_file = pytest.importorskip("safetensors.numpy").load_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        self.server.seen.append(self.path)
        path = self.path.split("?")[0]
        content, headers = None, {}
        if path.startswith("/api/models/owner/model/tree/"):
            files = [
                {"type": "file", "path": name, "size": len(data), "oid": COMMIT}
                for name, data in self.server.files.items()
            ]
            content = json.dumps(files).encode()
            headers["Content-Type"] = "application/json"
        elif path.startswith("/api/models/owner/model"):
            files = [{"rfilename": name} for name in self.server.files]
            information = {"id": "owner/model", "sha": COMMIT, "siblings": files}
            content = json.dumps(information).encode()
            headers["Content-Type"] = "application/json"
        elif path.startswith("/owner/model/resolve/"):
            content = self.server.files.get(path.rsplit("/", 1)[1])
        if content is None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            return
        self.send_response(200)
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        headers |= {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A mirror with owner/model; its files can be changed."""
    config = {**SIZES, "num_hidden_layers": 1}
    save_transformer_model(build_transformer_model(config), tmp_path / "files")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.files = {path.name: path.read_bytes() for path in (tmp_path / "files").iterdir()}
    server.files |= {"vocab.txt": b"[PAD]\n", "pytorch_model.bin": b"pickle", "run.py": b"1/0"}
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def test_a_repository_is_a_model(server):
    model = build_transformer_model("owner/model")
    report = model.checkpoint_report
    assert not report.fresh
    assert not report.ignored
    directory = download_model("owner/model")
    names = sorted(path.name for path in directory.iterdir())
    assert names == ["config.json", "model.safetensors", "vocab.txt"]  # once, and no code
    other = build_transformer_model(directory, None)
    load_checkpoint(other, "owner/model")
    for one, two in zip(model.weights, other.weights, strict=True):
        np.testing.assert_array_equal(*map(ops.convert_to_numpy, (one, two)))
    assert not any(path.endswith((".bin", ".py")) for path in server.seen)


def test_pytorch_files_where_there_are_no_others(server, tmp_path, monkeypatch):
    model = build_transformer_model("owner/model")
    tensors = load_file(tmp_path / "files" / "model.safetensors")
    del server.files["model.safetensors"]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    write_torch(tmp_path / "pytorch_model.bin", tensors)
    server.files["pytorch_model.bin"] = (tmp_path / "pytorch_model.bin").read_bytes()
    other = build_transformer_model("owner/model")
    assert not other.checkpoint_report.fresh
    for one, two in zip(model.weights, other.weights, strict=True):
        np.testing.assert_array_equal(*map(ops.convert_to_numpy, (one, two)))
    names = sorted(path.name for path in download_model("owner/model").iterdir())
    assert names == ["config.json", "pytorch_model.bin", "vocab.txt"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(list(download_model("owner/model").iterdir())) == 3


def test_a_known_name_is_a_repository(server, monkeypatch):
    assert NAMES["bert-base-chinese"] == "google-bert/bert-base-chinese"
    assert is_repository("bert-base-chinese")
    monkeypatch.setitem(NAMES, "model-without-owner", "owner/model")
    assert not build_transformer_model("model-without-owner").checkpoint_report.fresh


def test_files_are_fetched_once(server):
    download_model("owner/model")
    before = [path for path in server.seen if path.endswith(".safetensors")]
    download_model("owner/model")
    after = [path for path in server.seen if path.endswith(".safetensors")]
    assert len(after) - len(before) <= 1  # at most the question whether it is the same


def test_what_cannot_be_fetched(server, monkeypatch):
    with pytest.raises(
        OSError, match=r"owner/other cannot be fetched from http://127\.0\.0\.1"
    ):
        build_transformer_model("owner/other")
    del server.files["model.safetensors"], server.files["pytorch_model.bin"]
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        build_transformer_model("owner/model")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "elsewhere")
    with pytest.raises(OSError, match="set HF_ENDPOINT to a mirror, or give a directory"):
        build_transformer_model("owner/model")
    with pytest.raises(
        ValueError, match=r"repository must be an id such as 'hfl/rbt3', .*, got 'x'"
    ):
        download_model("x")


def test_paths_are_no_repositories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert is_repository("owner/model")
    for name in ("model", "folder", "folder/bert_model.ckpt", "/a/b", "a/b/c", "../x", ""):
        assert not is_repository(name)
    assert not is_repository(tmp_path)
    assert not is_repository("absent/bert_config.json")
    with pytest.raises(FileNotFoundError, match="neither a file nor a directory"):
        build_transformer_model("absent/config.json")


def test_only_what_is_read_is_fetched():
    names = [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert all(any(fnmatch(name, pattern) for pattern in FILES) for name in names)
    torch_names = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "pytorch_model-00001-of-00002.bin",
    ]
    assert all(any(fnmatch(name, pattern) for pattern in TORCH_FILES) for name in torch_names)
    others = ["modeling.py", "tf_model.h5", "flax_model.msgpack", "optimizer.bin"]
    for name in (*torch_names, *others):
        assert not any(fnmatch(name, pattern) for pattern in FILES)
    for name in (*names, *others):
        assert not any(fnmatch(name, pattern) for pattern in TORCH_FILES)
