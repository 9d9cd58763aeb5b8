"""A stand-in for the Hub: as much of its HTTP interface as huggingface_hub's client uses here, all in memory."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

LICENSES = {"mit", "apache-2.0", "cc-by-4.0", "other"}
REPO_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
CARD_NAME = "README.md"


@dataclass(frozen=True)
class Blob:
    """A file of a repository; `lfs` tells whether git holds but a pointer to it."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        held = pointer.encode() if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()

    @property
    def oid(self) -> str:
        """What the client compares with its own file."""
        return self.sha256 if self.lfs else self.git_oid


@dataclass
class Repo:
    """A repository: trees by commit, commits by branch, titles in order."""

    private: bool = False
    trees: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)  # branch, title

    def commit(self, branch: str, tree: dict[str, Blob], title: str) -> str:
        described = [self.branches.get(branch), len(self.log), title, sorted((name, tree[name].oid) for name in tree)]
        oid = hashlib.sha1(json.dumps(described).encode()).hexdigest()
        self.trees[oid], self.branches[branch] = tree, oid
        self.log.append((branch, title))
        return oid

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return {name: blob.content for name, blob in self.trees[self.branches[branch]].items()}


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, **more):
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more


class HubServer:
    """The stand-in, while it is entered as a context.

    Args:
        users: Names by token; a name that starts with "reader" owns its token without the right to write.
    """

    def __init__(self, users: dict[str, str]):
        self.users, self.repos, self.stored = users, {}, {}
        self.requests: list[str] = []  # method and path of each
        self.received: list[bytes] = []  # all that came with each, but for the header where a token belongs
        self._failures: list[tuple[int, str, str]] = []
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.storage = f"http://localhost:{self._server.server_port}/storage"  # another host, as the client sees it

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail_next(self, status: int, count: int = 1, path: str = "", message: str = "Something broke") -> None:
        """Answer the next `count` requests whose method and path match a regular expression with an error."""
        self._failures += [(status, path, message)] * count

    def heal(self) -> None:
        """Forget failures that are still due."""
        self._failures.clear()

    def add(self, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repo:
        """Put a repository there."""
        repo = self.repos[repo_id] = Repo(private)
        tree = {name: Blob(content, _goes_to_lfs(name, content)) for name, content in (files or {}).items()}
        repo.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)} | tree, "initial commit")
        return repo

    def answer(self, method: str, path: str, body: bytes, authorization: str | None):
        """Find what a request asks for; returns status, headers and body."""
        with self._lock:
            self.requests.append(f"{method} {path}")
            for index, (status, pattern, message) in enumerate(self._failures):
                if re.search(pattern, f"{method} {path}"):
                    del self._failures[index]
                    raise Refusal(status, message)
            token = authorization.removeprefix("Bearer ") if authorization else None
            if token is not None and token not in self.users:
                raise Refusal(401, "Invalid credentials in Authorization header")
            user = self.users.get(token)
            for verb, pattern, function in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and verb == method.replace("HEAD", "GET"):
                    return function(self, user, body, *(unquote(part) if part else part for part in match.groups()))
        raise Refusal(404, f"Cannot {method} {path}")

    def readable(self, user: str | None, repo_id: str) -> Repo:
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and user != repo_id.split("/")[0]):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, user: str | None, repo_id: str) -> Repo:
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        repo = self.readable(user, repo_id)
        if user != repo_id.split("/")[0] or user.startswith("reader"):
            raise Refusal(403, "Forbidden: you must have write access to this repository")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> str:
        oid = repo.branches.get(revision, revision)
        if oid not in repo.trees:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


def _goes_to_lfs(name: str, sample: bytes) -> bool:
    return name.endswith((".safetensors", ".bin")) or b"\0" in sample


def _whoami(hub, user, body):
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    return 200, {}, {"type": "user", "name": user, "orgs": []}


def _create(hub, user, body):
    asked = json.loads(body)
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    owner = asked.get("organization") or user
    if owner != user or user.startswith("reader"):
        raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
    repo_id = f"{owner}/{asked['name']}"
    if repo_id in hub.repos:
        raise Refusal(409, "You already created this model repo", url=f"{hub.url}/{repo_id}")
    hub.add(repo_id, private=asked.get("visibility") == "private")
    return 200, {}, {"url": f"{hub.url}/{repo_id}", "name": repo_id}


def _validate_yaml(hub, user, body):
    errors = card_errors(json.loads(body)["content"])
    return (400 if errors else 200), {}, {"errors": [{"message": error} for error in errors], "warnings": []}


def card_errors(content: str) -> list[str]:
    """Check a card's metadata by the Hub's rules, as far as they concern what is written here."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    if not isinstance(data, dict):
        return ["There must be metadata"]
    ids = {name: data.get(name, []) for name in ("base_model", "datasets")}
    ids = {name: [value] if isinstance(value, str) else value for name, value in ids.items()}
    errors = [f'"{name}" must be ids' for name, values in ids.items() for v in values if not re.fullmatch(REPO_ID, v)]
    if "license" in data and data["license"] not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    if data.get("pipeline_tag") != "text-generation":
        errors.append('"pipeline_tag" must be a known task')
    for result in [result for model in data.get("model-index", []) for result in model["results"]]:
        if not re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", result["dataset"]["type"]):
            errors.append('"model-index[0].results[0].dataset.type" fails to match the required pattern')
        if not all(isinstance(metric["value"], int | float) for metric in result["metrics"]):
            errors.append('"metrics" need values')
    return errors


def _preupload(hub, user, body, repo_id, revision):
    repo = hub.writable(user, repo_id)
    tree = repo.trees[hub.commit_of(repo, revision)]
    files = []
    for asked in json.loads(body)["files"]:
        lfs = _goes_to_lfs(asked["path"], base64.b64decode(asked["sample"]))
        known = tree.get(asked["path"])
        oid = {"oid": known.oid} if known else {}
        files.append({"path": asked["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False} | oid)
    return 200, {}, {"files": files}


def _batch(hub, user, body, repo_id):
    hub.writable(user, repo_id)
    objects = []
    for asked in json.loads(body)["objects"]:
        upload, verify = f"{hub.storage}/{asked['oid']}", f"{hub.url}/verify/{asked['oid']}"
        actions = {"upload": {"href": upload}, "verify": {"href": verify}}
        actions = {} if asked["oid"] in hub.stored else {"actions": actions}
        objects.append({"oid": asked["oid"], "size": asked["size"]} | actions)
    return 200, {}, {"transfer": "basic", "objects": objects}


def _store(hub, user, body, oid):
    if user is not None:
        raise Refusal(400, "A token was sent to where it does not belong")
    if hashlib.sha256(body).hexdigest() != oid:
        raise Refusal(400, "The content is not what its name says")
    hub.stored[oid] = body
    return 200, {}, {}


def _fetch(hub, user, body, oid):
    if user is not None:
        raise Refusal(400, "A token was sent to where it does not belong")
    return 200, {"ETag": f'"{oid}"'}, hub.stored[oid]


def _verify(hub, user, body, oid):
    if oid not in hub.stored or len(hub.stored[oid]) != json.loads(body)["size"]:
        raise Refusal(404, "Not stored")
    return 200, {}, {}


def _commit(hub, user, body, repo_id, revision):
    repo = hub.writable(user, repo_id)
    tree, title = dict(repo.trees[hub.commit_of(repo, revision)]), None
    for line in body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "header":
            title = value["summary"]
        elif item["key"] == "file":
            content = base64.b64decode(value["content"])
            if _goes_to_lfs(value["path"], content):
                raise Refusal(400, f"{value['path']} must go through LFS")
            tree[value["path"]] = Blob(content, False)
        elif item["key"] == "lfsFile":
            if value["oid"] not in hub.stored:
                raise Refusal(400, f"The object of {value['path']} was not uploaded")
            tree[value["path"]] = Blob(hub.stored[value["oid"]], True)
        else:
            raise Refusal(400, f"Unknown operation {item['key']}")
    if CARD_NAME in tree and card_errors(tree[CARD_NAME].content.decode()):
        raise Refusal(400, "Invalid metadata in README.md")
    oid = repo.commit(revision, tree, title)
    return 200, {}, {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo_id}/commit/{oid}"}


def _branch(hub, user, body, repo_id, branch):
    repo = hub.writable(user, repo_id)
    if branch in repo.branches:
        raise Refusal(409, "Reference already exists")
    repo.branches[branch] = repo.branches["main"]
    return 200, {}, {}


def _info(hub, user, body, repo_id, revision):
    repo = hub.readable(user, repo_id)
    oid = hub.commit_of(repo, revision or "main")
    tree = repo.trees[oid]
    card = re.match(r"---\n(.*?)\n---\n", tree[CARD_NAME].content.decode(), re.DOTALL) if CARD_NAME in tree else None
    about = {"id": repo_id, "modelId": repo_id, "sha": oid, "private": repo.private, "tags": []}
    return (
        200,
        {},
        about
        | {
            "siblings": [{"rfilename": name} for name in sorted(tree)],
            **({"cardData": yaml.safe_load(card[1])} if card else {}),
        },
    )


def _tree(hub, user, body, repo_id, revision, folder):
    repo = hub.readable(user, repo_id)
    tree = repo.trees[hub.commit_of(repo, revision)]
    below = {name: blob for name, blob in tree.items() if not folder or name.startswith(folder + "/")}
    if not below:
        raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
    return (
        200,
        {},
        [
            {"type": "file", "path": name, "size": len(blob.content), "oid": blob.git_oid}
            | ({"lfs": {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}} if blob.lfs else {})
            for name, blob in sorted(below.items())
        ],
    )


def _refs(hub, user, body, repo_id):
    branches = hub.readable(user, repo_id).branches
    rows = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches.items()]
    return 200, {}, {"branches": rows, "tags": [], "converts": []}


def _resolve(hub, user, body, repo_id, revision, name):
    repo = hub.readable(user, repo_id)
    oid = hub.commit_of(repo, revision)
    blob = repo.trees[oid].get(name)
    if blob is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", commit=oid)
    headers = {"X-Repo-Commit": oid, "ETag": f'"{blob.oid}"'}
    if not blob.lfs:
        return 200, headers, blob.content
    hub.stored[blob.sha256] = blob.content
    headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
    return 302, headers | {"Location": f"{hub.storage}/{blob.sha256}"}, b""


_MODEL = rf"/api/models/({REPO_ID})"
_ROUTES = [
    ("GET", "/api/whoami-v2", _whoami),
    ("POST", "/api/repos/create", _create),
    ("POST", "/api/validate-yaml", _validate_yaml),
    ("POST", rf"{_MODEL}/preupload/([^/]+)", _preupload),
    ("POST", rf"/({REPO_ID})\.git/info/lfs/objects/batch", _batch),
    ("PUT", r"/storage/(\w+)", _store),
    ("GET", r"/storage/(\w+)", _fetch),
    ("POST", r"/verify/(\w+)", _verify),
    ("POST", rf"{_MODEL}/commit/([^/]+)", _commit),
    ("POST", rf"{_MODEL}/branch/([^/]+)", _branch),
    ("GET", rf"{_MODEL}(?:/revision/([^/]+))?", _info),
    ("GET", rf"{_MODEL}/tree/([^/]+)(?:/(.+))?", _tree),
    ("GET", rf"{_MODEL}/refs", _refs),
    ("GET", rf"/({REPO_ID})/resolve/([^/]+)/(.+)", _resolve),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: HubServer, *args):
        self.hub = hub
        super().__init__(*args)

    def _handle(self) -> None:
        try:
            path, authorization, body = urlsplit(self.path).path, self.headers.get("Authorization"), self._body()
            del self.headers["Authorization"]
            self.hub.received.append(f"{self.requestline}\n{self.headers}".encode() + body)
            status, headers, content = self.hub.answer(self.command, path, body, authorization)
        except Refusal as refusal:
            status, content = refusal.status, {"error": refusal.message} | refusal.more
            headers = {} if "\n" in refusal.message else {"X-Error-Message": refusal.message}
            headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
            headers |= {"X-Repo-Commit": refusal.more["commit"]} if "commit" in refusal.more else {}
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), headers | {"Content-Type": "application/json"}
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, *_) -> None:
        pass
