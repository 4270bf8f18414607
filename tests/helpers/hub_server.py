"""A small Hub on 127.0.0.1: what the real client asks of huggingface.co to load and to send a model."""

import base64
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

ANYONE, OWNER, GATED = "anyone", "owner", "gated"  # who may read a repository
TOKEN = "hf_owner"


class Hub:
    """Repositories with commits and branches, kept in memory; `requests` lists what was asked of it."""

    def __init__(self):
        self.repos = {}  # name -> {"readers", "commits": {oid: {path: bytes}}, "branches": {name: oid}}
        self.large = {}  # sha256 -> bytes uploaded through LFS
        self.requests = []  # (method, path, token)
        self.server = None
        self.silent = False  # takes connections and never answers
        self.slow = False  # sends one header after the other, without end
        self.failing = False  # answers 503 to all
        self.files = None  # large ones: "busy" (429, come back in an hour), "dripping", "flipped" (a bit)
        self.start()
        self.port = self.server.server_port

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def store(self):
        """Where large files lie: another host, as on the real Hub, and so one which must not see a token."""
        return f"http://localhost:{self.port}/lfs"

    def start(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", getattr(self, "port", 0)), Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def create(self, name, readers=ANYONE):
        self.repos[name] = {"readers": readers, "commits": {}, "branches": {}}
        self.commit(name, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})

    def commit(self, name, files, branch="main"):
        repo = self.repos[name]
        files = {**repo["commits"].get(repo["branches"].get(branch), {}), **files}
        oid = hashlib.sha1(repr((len(repo["commits"]), sorted(files.items()))).encode()).hexdigest()
        repo["commits"][oid] = files
        repo["branches"][branch] = oid
        return oid


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def handle_any(self):
        hub, self.path = self.server.hub, unquote(self.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        hub.requests.append((self.command, self.path, self.token))
        if hub.silent:
            while hub.silent:
                time.sleep(0.05)
            return  # whoever asked has gone
        if hub.slow:
            self.drip(b"HTTP/1.1 200 OK\r\n", b"X-Wait: 1\r\n", lambda: hub.slow)
            return
        if hub.failing:
            self.reply({"error": "Service Unavailable"}, 503)
            return
        parts = urlsplit(self.path)
        self.query = dict(parse_qsl(parts.query))
        match parts.path.strip("/").split("/"):
            case ["api", "repos", "create"]:
                self.create()
            case ["api", "validate-yaml"]:
                self.reply({"errors": [], "warnings": []})
            case ["api", "models", owner, name, "revision", *revision]:
                self.info(f"{owner}/{name}", "/".join(revision))
            case ["api", "models", owner, name, "tree", *revision]:
                self.tree(f"{owner}/{name}", "/".join(revision))
            case ["api", "models", owner, name, "preupload", *_]:
                self.preupload(f"{owner}/{name}")
            case ["api", "models", owner, name, "commit", *branch]:
                self.commit(f"{owner}/{name}", "/".join(branch))
            case ["api", "models", owner, name, "branch", *branch]:
                self.branch(f"{owner}/{name}", "/".join(branch))
            case ["api", "models", owner, name]:
                self.info(f"{owner}/{name}", "main")
            case [owner, name, "info", "lfs", "objects", "batch"]:
                self.lfs_batch(f"{owner}/{name.removesuffix('.git')}")
            case ["lfs", sha256]:
                self.lfs_file(sha256)
            case [owner, name, "resolve", revision, path]:
                self.resolve(f"{owner}/{name}", revision, path)
            case _:
                self.reply({"error": f"this small Hub does not know {self.command} {self.path}"}, 501)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def reply(self, content, status=200, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(data), **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def drip(self, head, more, still):
        """Send `head`, and then `more` now and then, until `still()` is over or nobody listens."""
        try:
            self.wfile.write(head)
            while still():
                self.wfile.write(more)
                time.sleep(0.2)
        except OSError:
            pass

    def refuse(self, status, code):
        headers = {"X-Error-Code": code, "X-Error-Message": code}
        self.reply({"error": code}, status, headers)

    def may(self, name, write=False):
        """The repository if this token may use it, else None after the answer the real Hub gives."""
        repo = self.server.hub.repos.get(name)
        if self.token not in ("", TOKEN):
            self.refuse(401, "Unauthorized")
        elif repo is None or (repo["readers"] == OWNER and self.token != TOKEN):
            self.refuse(404 if self.token else 401, "RepoNotFound")
        elif repo["readers"] == GATED and self.token != TOKEN:
            self.refuse(403, "GatedRepo")
        elif write and self.token != TOKEN:
            self.refuse(401, "Unauthorized")
        else:
            return repo
        return None

    def at(self, name, revision):
        """(commit, its files), or None after an answer."""
        repo = self.may(name)
        if repo is None:
            return None
        oid = repo["branches"].get(revision, revision)
        if oid not in repo["commits"]:
            self.refuse(404, "RevisionNotFound")
            return None
        return oid, repo["commits"][oid]

    def info(self, name, revision):
        if found := self.at(name, revision):
            oid, files = found
            private = self.server.hub.repos[name]["readers"] == OWNER
            siblings = [{"rfilename": path} for path in files]
            self.reply({"id": name, "modelId": name, "sha": oid, "private": private, "siblings": siblings})

    def tree(self, name, revision):
        if found := self.at(name, revision):
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                | ({"lfs": {"oid": sha(data), "size": len(data), "pointerSize": 130}} if large(path) else {})
                for path, data in found[1].items()
            ]
            self.reply(entries)

    def resolve(self, name, revision, path):
        found = self.at(name, revision)
        if not found:
            return
        oid, files = found
        if path not in files:
            self.refuse(404, "EntryNotFound")
            return
        data, headers = files[path], {"X-Repo-Commit": oid}
        if large(path):
            self.server.hub.large[sha(data)] = data
            headers |= {"X-Linked-Etag": f'"{sha(data)}"', "X-Linked-Size": len(data)}
            self.reply(b"", 302, headers | {"Location": f"{self.server.hub.store}/{sha(data)}"})
        else:
            self.reply(data, headers=headers | {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if self.token != TOKEN:
            self.refuse(401, "Unauthorized")
        elif name in self.server.hub.repos:
            url = f"{self.server.hub.url}/{name}"
            self.reply({"error": "You already created this model repo", "url": url}, 409)
        else:
            private = asked.get("private") or asked.get("visibility") == "private"
            self.server.hub.create(name, OWNER if private else ANYONE)
            self.reply({"url": f"{self.server.hub.url}/{name}", "name": name})

    def branch(self, name, branch):
        if repo := self.may(name, write=True):
            if branch in repo["branches"]:
                self.reply({"error": "Reference already exists"}, 409)
            else:
                repo["branches"][branch] = repo["branches"]["main"]
                self.reply({})

    def preupload(self, name):
        if self.may(name, write=True):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large(file["path"]) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.body)["files"]
            ]
            self.reply({"files": files})

    def lfs_batch(self, name):
        if self.may(name, write=True):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.server.hub.store}/{item['oid']}"}}}
                for item in json.loads(self.body)["objects"]
            ]
            self.reply({"transfer": "basic", "objects": objects})

    def lfs_file(self, sha256):
        large_files = self.server.hub.large
        if self.command == "PUT" and sha(self.body) == sha256:
            large_files[sha256] = self.body
            self.reply(b"")
        elif self.server.hub.files == "busy":
            self.reply({"error": "slow down"}, 429, {"Retry-After": "3600"})
        elif self.server.hub.files == "dripping":
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(large_files[sha256])}\r\n\r\n"
            self.drip(head.encode(), b"x", lambda: self.server.hub.files)
        elif self.server.hub.files == "flipped":
            data = large_files[sha256]
            self.reply(data[:-1] + bytes([data[-1] ^ 1]))
        elif self.command != "PUT" and sha256 in large_files:
            self.reply(large_files[sha256], headers={"ETag": f'"{sha256}"'})
        else:
            self.refuse(404, "EntryNotFound")

    def commit(self, name, branch):
        repo = self.may(name, write=True)
        if repo is None or self.at(name, branch) is None:
            return
        files = {}
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.hub.large[value["oid"]]
        oid = self.server.hub.commit(name, files, branch)
        self.reply(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.server.hub.url}/{name}/commit/{oid}"}
        )


def sha(data):
    return hashlib.sha256(data).hexdigest()


def large(path):
    return path.endswith(".safetensors")
