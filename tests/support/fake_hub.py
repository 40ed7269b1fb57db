"""A server that answers what huggingface_hub asks of a repository: its commits, its files, and what they are made of.

Every file is kept as git keeps small ones; how large ones travel (LFS, Xet) is the library's own business.
"""

import base64
import hashlib
import http.server
import json
import threading
from contextlib import contextmanager
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = "owner/repo"


class Hub:
    """One repository. `token` is what it wants; `meanwhile` are files that somebody else commits before the next commit."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.commits = 0
        self.corrupt = False
        self.token = "token"
        self.meanwhile: dict[str, bytes] | None = None

    @property
    def head(self):
        return f"{self.commits:040x}"

    def commit(self, lines):
        header = lines[0]["value"]
        if self.meanwhile:
            self.files, self.meanwhile = self.files | self.meanwhile, None
            self.commits += 1
        if header.get("parentCommit") not in (None, self.head):
            return 412, {"error": "A commit has happened since. Please refresh and try again."}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                self.files[value["path"]] = content[:-1] + b"?" if self.corrupt else content
            else:
                del self.files[value["path"]]
        self.commits += 1
        return 200, {
            "success": True,
            "commitOid": self.head,
            "commitUrl": f"https://huggingface.co/{REPOSITORY}/commit/{self.head}",
        }

    def facts(self, path):
        content = self.files[path]
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"type": "file", "path": path, "size": len(content), "oid": oid}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self):
        self.answer(b"")

    do_HEAD = do_GET

    def do_POST(self):
        if self.headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.answer(body)

    def answer(self, body):
        url = urlsplit(self.path)
        path = unquote(url.path)
        api = f"/api/models/{REPOSITORY}/"
        if self.headers.get("authorization") != f"Bearer {self.hub.token}":
            return self.send(401, {"error": "Invalid credentials"})
        if path.startswith(f"/{REPOSITORY}/resolve/main/"):
            return self.send_file(path.split("/resolve/main/")[1])
        if not path.startswith(api):
            return self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        what = path.removeprefix(api)
        if what == "revision/main":
            return self.send(200, {"id": REPOSITORY, "sha": self.hub.head, "siblings": []})
        if what.startswith("paths-info/"):
            asked = parse_qs(body.decode()).get("paths", [])
            if self.headers["content-type"].startswith("application/json"):
                asked = json.loads(body)["paths"]
            return self.send(200, [self.hub.facts(one) for one in asked if one in self.hub.files])
        if what.startswith("tree/main"):
            folder = what.removeprefix("tree/main").strip("/")
            below = [one for one in self.hub.files if not folder or one.startswith(folder + "/")]
            if folder and not below:
                return self.send(404, {"error": "no folder"}, {"X-Error-Code": "EntryNotFound"})
            folders = [
                {"type": "directory", "path": one, "oid": "0" * 40} for one in {b.rpartition("/")[0] for b in below}
            ]
            return self.send(200, [*folders, *(self.hub.facts(one) for one in below)])
        if what.startswith("preupload/"):
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self.send(200, {"files": files})
        if what.startswith("commit/"):
            return self.send(*self.hub.commit([json.loads(line) for line in body.splitlines() if line]))
        return self.send(404, {"error": f"no {what}"})

    def send_file(self, path):
        content = self.hub.files.get(path)
        if content is None:
            return self.send(404, {"error": "no file"}, {"X-Error-Code": "EntryNotFound"})
        begin = int((self.headers.get("range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        return self.send_bytes(206 if begin else 200, content[begin:], {})

    def send(self, status, plain, headers=None):
        return self.send_bytes(status, json.dumps(plain).encode(), headers or {})

    def send_bytes(self, status, content, headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        return


@contextmanager
def fake_hub():
    """The repository, and the address of its server."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
