"""A loopback stand-in for the model hub: ids, configs and files of local folders, and nothing else.

python hub.py PORT org/name=FOLDER ...
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

MODELS = {repo: Path(folder) for repo, _, folder in (given.partition("=") for given in sys.argv[2:])}
_JSON = ("Content-Type", "application/json")
_CHUNK = 2**20


def digest(text):
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def parameters(folder):
    """How many numbers a folder's safetensors hold: their headers say."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        total += sum(math.prod(one["shape"]) for name, one in header.items() if name != "__metadata__")
    return total


def record(repo, folder):
    total = parameters(folder)
    return {
        "id": repo,
        "modelId": repo,
        "sha": digest(repo),
        "private": False,
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": [],
        "safetensors": {"parameters": {"F32": total}, "total": total},
        "siblings": [{"rfilename": file.name} for file in sorted(folder.iterdir())],
    }


def tree(folder):
    return [
        {"type": "file", "path": one.name, "size": one.stat().st_size, "oid": digest(one.name)}
        for one in sorted(folder.iterdir())
    ]


class Hub(BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_given):
        sys.stderr.write(f"{self.command} {self.path}\n")

    def send(self, code, body=b"", *headers):
        self.send_response(code)
        for name, value in (*headers, ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.send_record(parts[2:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self.send_file("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self.send(404)

    do_HEAD = do_GET  # noqa: N815 (the base class's name)

    def send_record(self, parts):
        asked = "/".join(parts[:2]).lower()
        for repo, folder in MODELS.items():
            if repo.lower() == asked:
                found = tree(folder) if parts[2:3] == ["tree"] else record(repo, folder)
                self.send(200, json.dumps(found).encode(), _JSON)
                return
        message = ("X-Error-Message", "Repository not found")
        self.send(404, b'{"error":"Repository not found"}', ("X-Error-Code", "RepoNotFound"), message, _JSON)

    def send_file(self, repo, name):
        file = MODELS[repo] / name if repo in MODELS else None
        if file is None or not file.is_file():
            code = "RepoNotFound" if file is None else "EntryNotFound"
            self.send(404, b"", ("X-Error-Code", code), ("X-Repo-Commit", digest(repo)))
            return
        size, given = file.stat().st_size, self.headers.get("Range", "")
        start = int(given[6:].split("-")[0] or 0) if given.startswith("bytes=") else 0
        self.send_response(206 if given else 200)
        self.send_header("ETag", f'"{digest(str(file))}"')
        self.send_header("X-Repo-Commit", digest(repo))
        self.send_header("Accept-Ranges", "bytes")
        if given:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        if self.command != "HEAD":
            with file.open("rb") as stream:
                stream.seek(start)
                while chunk := stream.read(_CHUNK):
                    self.wfile.write(chunk)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Hub).serve_forever()
