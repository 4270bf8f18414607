"""Loading from the Hub and sending to it: the real client, in its own process, against a small local Hub."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import sparta_act
from sparta_act.activations import Sparta
from sparta_act.pretrained import SpartaSet
from tests.helpers.hub_server import GATED, OWNER, TOKEN, Hub

pytestmark = pytest.mark.slow

CLIENT = """
import json, os, sys, time, traceback
from sparta_act import Sparta, SpartaSet
from sparta_act.pretrained import fetching
from sparta_act.pretrained.hub import SHIPPED
if "WAIT" in os.environ:
    fetching.WAIT, fetching.PAUSES = float(os.environ["WAIT"]), (0.1, 0.1)
for line in sys.stdin:
    ask = json.loads(line)
    SHIPPED.update(ask.pop("ours", {}))
    sys.frozen = ask.pop("frozen", False)  # as a program that has Python inside
    start = time.monotonic()
    try:
        loaded = SpartaSet.from_pretrained(ask.pop("folder")) if "folder" in ask else None
        answer = loaded.push_to_hub(**ask) if loaded else Sparta.from_pretrained(**ask)
        if isinstance(answer, SpartaSet):
            assert not any(p.requires_grad for a in answer.values() for p in a.parameters())
            answer = {f"{s}.{k}": v.tolist() for s, a in answer.items() for k, v in a.state_dict().items()}
        shown = ""
    except Exception as error:
        answer, shown = f"{type(error).__name__}: {error}", traceback.format_exc()
    print(json.dumps([answer, time.monotonic() - start, shown]), flush=True)
"""


class Client:
    """A Python process which uses the library against the local Hub and answers with weights or an error."""

    def __init__(self, hub, home, **variables):
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()
        }
        hub_variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            env=kept | hub_variables | {"OMP_NUM_THREADS": "1"} | variables,
            cwd=Path(sparta_act.__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.seconds = None  # the last call took so long
        self.traceback = ""  # and showed this

    def __call__(self, **ask):
        limit = threading.Timer(300, self.process.kill)
        limit.start()
        self.process.stdin.write(json.dumps(ask) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()  # anything else printed fails here
        answer, self.seconds, self.traceback = json.loads(line)
        limit.cancel()
        return answer

    def load(self, name, **arguments):
        return self(name_or_path=name, **arguments)

    def close(self):
        self.process.stdin.close()
        assert self.process.wait(60) == 0


@pytest.fixture(scope="module")
def the_hub():
    hub = Hub()
    yield hub
    hub.stop()


@pytest.fixture
def hub(the_hub):
    the_hub.repos.clear()
    the_hub.large.clear()
    the_hub.requests.clear()
    return the_hub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(the_hub, home):
    client = Client(the_hub, home)
    yield client
    client.close()


@contextlib.contextmanager
def troubled(hub, trouble):
    """The Hub refuses connections ("down"), accepts them and is "silent" or "slow", or answers 503."""
    if trouble == "down":
        hub.stop()
    else:
        setattr(hub, trouble, True)
    try:
        yield
    finally:
        hub.silent = hub.slow = hub.failing = False
        if trouble == "down":
            hub.start()


@pytest.fixture(scope="module")
def impatient(the_hub, home):
    client = Client(the_hub, home, HF_HUB_ETAG_TIMEOUT="1", WAIT="6")
    yield client
    client.close()


def make(seed, **arguments):
    torch.manual_seed(seed)
    activation = Sparta(2, **arguments)
    for value in activation.state_dict().values():  # the gain as well
        value.uniform_(0.1, 1)
    return SpartaSet({"G1.B2": activation}, {"backbone": f"net {seed}"})


def files_of(activations, folder):
    activations.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weights_of(activations):
    return {
        f"{label}.{key}": value.half().float().tolist()
        for label, activation in activations.items()
        for key, value in activation.state_dict().items()
    }


@pytest.fixture
def two_commits(hub, tmp_path):
    """(name, commits, weights): a repository whose branch main went from one set of weights to another."""
    hub.create("org/set")
    sets = [make(seed) for seed in (1, 2)]
    commits = [hub.commit("org/set", files_of(s, tmp_path / str(i))) for i, s in enumerate(sets)]
    weights = [weights_of(s) for s in sets]
    assert weights[0] != weights[1]
    return "org/set", commits, weights


def test_download_gives_the_weights(hub, client, tmp_path):
    hub.create("org/set")
    activations = make(3, hidden=3, identity=True)
    hub.commit("org/set", files_of(activations, tmp_path / "set") | {"pytorch_model.bin": b"never asked for"})
    assert client.load("org/set", cache_dir=str(tmp_path / "cache")) == weights_of(activations)
    resolved = {path.rsplit("/", 1)[-1] for _, path, _ in hub.requests if "/resolve/" in path}
    assert resolved == {"config.json", "model.safetensors"}


def test_a_set_of_ours_that_is_not_in_the_package_comes_from_the_hub_as_it_was_made(hub, client, tmp_path):
    files = files_of(make(8), tmp_path / "made")
    ours = {"of-ours": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}}
    cache = {"cache_dir": str(tmp_path / "cache")}
    hub.create("sparta-act/of-ours")
    hub.commit("sparta-act/of-ours", files)
    assert client.load("of-ours", ours=ours, **cache) == weights_of(make(8))
    hub.requests.clear()
    assert client.load("of-ours", local_files_only=True, **cache) == weights_of(make(8))
    assert hub.requests == []
    assert "no revisions" in client.load("of-ours", revision="main", **cache)
    other = files_of(make(9), tmp_path / "other")
    for changed in ({"model.safetensors": other["model.safetensors"]}, other):  # a file, and a whole set
        hub.commit("sparta-act/of-ours", files | changed)
        answer = client.load("of-ours", **cache)
        assert "does not hold 'of-ours' as sparta-act made it: " in answer
        assert "model.safetensors missing or changed (sha256); nothing was loaded" in answer
        with troubled(hub, "down"):  # nor from the cache
            assert "as sparta-act made it" in client.load("of-ours", **cache)
    hub.commit("sparta-act/of-ours", files)
    assert client.load("of-ours", **cache) == weights_of(make(8))
    assert client.load("sparta-act/of-ours", **cache) == weights_of(make(8))
    hub.create("Sparta-Act/Of-Ours")  # the same repository, on the real Hub
    for name in ("sparta-act/of-ours", "Sparta-Act/Of-Ours"):
        hub.commit(name, other)
        assert "as sparta-act made it" in client.load(name, **cache)
    hub.commit("sparta-act/of-ours", files)
    cached = (tmp_path / "cache").rglob("blobs/*")
    (copy,) = (p for p in cached if p.read_bytes() == files["model.safetensors"])
    copy.write_bytes(other["model.safetensors"])
    answer = client.load("of-ours", local_files_only=True, **cache)
    shutil.rmtree(re.search(r"delete (\S+) and try again", answer)[1])  # as it says
    assert client.load("of-ours", **cache) == weights_of(make(8))


def test_revision_pins_the_weights(hub, client, two_commits, tmp_path):
    name, commits, weights = two_commits
    hub.repos[name]["branches"]["v1"] = commits[0]
    cache = {"cache_dir": str(tmp_path / "cache")}
    assert client.load(name, **cache) == weights[1]
    assert client.load(name, revision="v1", **cache) == weights[0]
    assert client.load(name, revision=commits[0], **cache) == weights[0]
    hub.requests.clear()
    assert client.load(name, revision=commits[1], **cache) == weights[1]
    assert hub.requests == []  # a commit in the cache cannot have changed


@pytest.mark.parametrize("trouble", ["down", "silent", "failing", "slow"])
def test_cache_answers_when_the_hub_does_not(hub, impatient, two_commits, tmp_path, trouble):
    name, commits, weights = two_commits
    cache = {"cache_dir": str(tmp_path / "cache")}
    assert impatient.load(name, **cache) == weights[1]
    with troubled(hub, trouble):
        assert impatient.load(name, **cache) == weights[1]
        for arguments in ({}, {"revision": commits[0]}):  # of what is not there an error, soon
            unknown = "org/other" if not arguments else name
            answer = impatient.load(unknown, **arguments, **cache)
            assert answer.startswith(
                f"WeightsError: cannot load '{unknown}': there is no such folder, our sets are ["
            )
            assert impatient.seconds < 25


def test_a_hub_that_fails_for_a_moment_is_asked_again(hub, client, two_commits, tmp_path):
    name, _, weights = two_commits
    hub.failing = True
    timer = threading.Timer(0.5, lambda: setattr(hub, "failing", False))
    timer.start()
    assert client.load(name, cache_dir=str(tmp_path / "cache")) == weights[1]


@pytest.mark.parametrize(("files", "frozen"), [("busy", False), ("dripping", False), ("dripping", True)])
def test_a_download_is_not_waited_for_without_end(hub, impatient, two_commits, tmp_path, files, frozen):
    name, _, weights = two_commits
    cache = {"cache_dir": str(tmp_path / "cache")}
    hub.files = files
    try:
        answer = impatient.load(name, **cache, frozen=frozen)
    finally:
        hub.files = None
    assert "TimeoutError: the Hub has not sent the files in " in answer
    assert impatient.seconds < 25
    assert impatient.load(name, **cache) == weights[1]  # the same process, at once


def test_a_copy_that_broke_is_fetched_again(hub, client, two_commits, tmp_path):
    name, commits, weights = two_commits
    cache = {"cache_dir": str(tmp_path / "cache")}
    hub.files = "flipped"
    answer = client.load(name, **cache)
    assert "not the file that config.json was written with" in answer
    (broken,) = (tmp_path / "cache").glob("models--*")
    assert answer.endswith(
        f"It may be broken on the Hub, or the cache is broken: delete {broken} and try again"
    )
    hub.files = None
    assert "try again" in client.load(name, local_files_only=True, **cache)
    with troubled(hub, "down"):
        assert "cut off, changed or mixed up" in client.load(name, **cache)
    assert client.load(name, **cache) == weights[1]
    assert client.load(name, local_files_only=True, **cache) == weights[1]
    (copy,) = (tmp_path / "cache").rglob("model.safetensors")
    copy.resolve().write_bytes(b"cut off")
    assert client.load(name, revision=commits[1], **cache) == weights[1]


def test_cache_with_a_file_missing_is_filled_again(hub, client, two_commits, tmp_path):
    name, commits, weights = two_commits
    pinned = {"revision": commits[0], "cache_dir": str(tmp_path / "cache")}
    assert client.load(name, **pinned) == weights[0]
    (lost,) = (tmp_path / "cache").rglob("model.safetensors")
    lost.unlink()
    hub.requests.clear()
    assert "it is not in the cache" in client.load(name, local_files_only=True, **pinned)
    assert hub.requests == []
    assert client.load(name, **pinned) == weights[0]


def test_offline_variable_is_honoured(hub, client, two_commits, home):
    name, _, weights = two_commits
    assert client.load(name) == weights[1]  # into the cache below HF_HOME
    assert any((home / "hub").rglob("model.safetensors"))
    hub.requests.clear()
    offline = Client(hub, home, HF_HUB_OFFLINE="1")
    assert offline.load(name) == weights[1]
    answer = offline.load("nowhere")
    assert offline.seconds < 2
    offline.close()
    assert answer.startswith("WeightsError: cannot load 'nowhere': there is no such folder, our sets are [")
    assert "sparta-act/nowhere" in answer
    assert "HF_HUB_OFFLINE" in answer
    assert hub.requests == []


def test_token_opens_a_private_set_and_stays_at_home(hub, client, home, tmp_path):
    hub.create("org/private", OWNER)
    hub.commit("org/private", files_of(make(5), tmp_path / "set"))
    cache = {"cache_dir": str(tmp_path / "cache")}
    for arguments, error in (({}, "401"), ({"token": "hf_other"}, "401")):
        answer = client.load("org/private", **arguments, **cache)
        assert answer.startswith("WeightsError: cannot load 'org/private'")
        assert error in answer
        assert "hf_other" not in answer
    assert client.load("org/private", token=TOKEN, **cache) == weights_of(make(5))
    assert [token for _, path, token in hub.requests if path.startswith("/lfs/")] == [""]  # another host
    (home / "token").write_text(TOKEN)  # as `hf auth login` leaves it
    try:
        assert client.load("org/private", cache_dir=str(tmp_path / "other")) == weights_of(make(5))
    finally:
        (home / "token").unlink()


def test_refusals_say_what_is_wrong(hub, client, two_commits, tmp_path):
    hub.create("org/gated", GATED)
    hub.create("org/empty")
    cache = {"cache_dir": str(tmp_path / "cache")}
    for name, arguments, words in (
        ("org/gated", {}, ("GatedRepoError", "403", "token")),
        ("org/nothing", {"token": TOKEN}, ("RepositoryNotFoundError", "404", "org/nothing")),
        ("org/set", {"revision": "v9"}, ("RevisionNotFoundError", "404", "v9")),
        ("org/empty", {}, ("EntryNotFoundError", "404", "config.json")),
    ):
        answer = client.load(name, **arguments, **cache)
        assert answer.startswith(f"WeightsError: cannot load '{name}'"), answer
        assert all(word in answer for word in words), answer


@pytest.mark.parametrize("trouble", [None, "down", "silent", "failing", "slow"])
def test_a_mistyped_name_is_answered_soon_and_in_few_words(hub, client, tmp_path, trouble):
    with troubled(hub, trouble) if trouble else contextlib.nullcontext():
        answer = client.load("cifar10-resnet18-w15", cache_dir=str(tmp_path / "cache"))
    assert client.seconds < 8
    assert "(did you mean 'cifar10-resnet18-w16' or 'cifar10-resnet18'?)" in answer
    assert answer.endswith(". list_sets() shows our sets")
    assert len(answer) < 3 * 150
    asked = [path for _, path, _ in hub.requests if "/resolve/" in path]
    assert len(asked) <= 1


def test_no_chain_of_the_client_follows_an_error(hub, client, tmp_path):
    for name in ("cifar10-resnet18-w15", "org/nothing"):
        client.load(name, cache_dir=str(tmp_path / "cache"))
        assert client.traceback.count("Traceback (most recent call last)") == 1
        assert "huggingface_hub" not in client.traceback


def test_push_and_load_again(hub, client, tmp_path):
    files = files_of(make(6, hidden=3, identity=True), tmp_path / "set")
    ask = {"folder": str(tmp_path / "set"), "repo_id": "org/new", "token": TOKEN}
    commit = client(private=True, commit_message="First", **ask)
    repo = hub.repos["org/new"]
    assert repo["readers"] == OWNER
    assert repo["branches"]["main"] == commit
    sent = repo["commits"][commit]
    assert sent.keys() == {".gitattributes", *files}
    assert sent["model.safetensors"] == files["model.safetensors"]
    assert b"library_name: sparta-act" in sent["README.md"]
    assert b'Sparta.from_pretrained("org/new")' in sent["README.md"]
    assert any(method == "PUT" and path.startswith("/lfs/") for method, path, _ in hub.requests)
    arguments = {"token": TOKEN, "cache_dir": str(tmp_path / "cache")}
    assert client.load("org/new", revision=commit, **arguments) == weights_of(
        make(6, hidden=3, identity=True)
    )

    files_of(make(7), tmp_path / "set")
    second = client(revision="better", **ask)
    assert repo["branches"] == {"main": commit, "better": second}
    assert client.load("org/new", revision="better", **arguments) == weights_of(make(7))
    assert client.load("org/new", **arguments) == weights_of(make(6, hidden=3, identity=True))


def test_push_is_refused_clearly(hub, client, impatient, tmp_path):
    files_of(make(8), tmp_path / "set")
    hub.create("org/public")
    before = hub.repos["org/public"]["branches"]["main"]
    ask = {"folder": str(tmp_path / "set"), "repo_id": "org/public"}
    for arguments, words in (
        ({"token": "hf_other"}, ("401", "`token` may write")),
        ({"token": TOKEN, "private": True}, ("exists already with private=False",)),
    ):
        answer = client(**ask, **arguments)
        assert answer.startswith("WeightsError: cannot send the set to 'org/public'"), answer
        assert all(word in answer for word in words), answer
    assert hub.repos["org/public"]["branches"]["main"] == before
    with troubled(hub, "down"):
        assert "refused" in client(**ask, token=TOKEN)
    with troubled(hub, "silent"):
        assert "TimeoutError: the Hub did not answer within 6 s" in impatient(**ask, token=TOKEN)
