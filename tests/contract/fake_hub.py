"""A model hub on 127.0.0.1 that speaks what an upload of small files needs, and keeps them."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeHub:
    """What it was asked, and what it holds.

    Attributes:
        endpoint: Its address.
        files: Content by repository and name.
        created: The bodies of the requests for a repository.
        public: Repositories that are public; one is made so where it is new and asked for.
        tokens: Those that requests came with.
        refuses: Status of every answer, where not 200.
    """

    endpoint: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    created: list[dict[str, Any]] = field(default_factory=list)
    public: set[str] = field(default_factory=set)
    tokens: set[str | None] = field(default_factory=set)
    refuses: int | None = None

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            name = f"{self.created[-1]['organization']}/{self.created[-1]['name']}"
            if name not in self.files and self.created[-1].get("visibility") != "private":
                self.public.add(name)
            self.files.setdefault(name, {})
            return {"url": f"{self.endpoint}/{name}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        repo = "/".join(path.split("/")[3:5])
        if path == f"/api/models/{repo}":
            return {"id": repo, "private": repo not in self.public}
        if "/preupload/" in path:
            asked = json.loads(body)["files"]
            return {
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                    for f in asked
                ]
            }
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[repo][line["value"]["path"]] = content
            return {"commitUrl": f"{self.endpoint}/{repo}/commit/abc", "commitOid": "abc"}
        return {}


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.tokens.add(self.headers.get("Authorization"))
            found = {"error": "no"} if hub.refuses else hub.answer(self.path, body)
            data = json.dumps(found).encode()
            self.send_response(hub.refuses or 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
