"""Fetching from a model hub, by its own client, from a server that answers as the hub does."""

import hashlib
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

from flowtilt.checkpoints import CheckpointError
from flowtilt.domains.images.experiment import ImageExperiment
from flowtilt.domains.images.fetching import LISTING, fetch
from flowtilt.domains.images.sections import ImageModelConfig, ImageRewardConfig
from flowtilt.pipeline.configuration import ConfigError

pytest.importorskip("huggingface_hub", reason="the extra 'images' is not installed")

REPOSITORY, REVISION = "someone/painter", "0123456789abcdef0123456789abcdef01234567"
UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
LARGE = bytes(range(256)) * 8192  # 2 MiB


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


FILES = {
    "README.md": b"A painter.\n",
    "model_index.json": b'{"_class_name": "StableDiffusionPipeline"}\n',
    "unet/config.json": b"{}\n",
    UNET: LARGE,
    "unet/diffusion_pytorch_model.bin": pickle.dumps(Bomb()),
    VAE: LARGE[:-1],
}
PATTERNS = ["*.json", "unet/", "vae/*.safetensors"]
ASKED_FOR = ["model_index.json", "unet/config.json", UNET, VAE]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Hub:
    """What the server has, what it does, and what it was asked for.

    Attributes:
        files: of its one repository, by name.
        refusals: status and error code of everything below some path.
        cut: bytes after which the connection breaks, for the first so many requests of a file.
        stalls: files of which half is sent, and then nothing.
        log: method, file and range of the requests for files.
    """

    files: dict[str, bytes]
    url: str = ""
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    cut: dict[str, list[int]] = field(default_factory=dict)
    stalls: set[str] = field(default_factory=set)
    stalled: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    log: list[tuple[str, str, str | None]] = field(default_factory=list)
    stop: Callable[[], None] = lambda: None

    def fetched(self) -> list[str]:
        return sorted(name for method, name, _ in self.log if method == "GET")


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            for prefix, (status, code) in hub.refusals.items():
                if path.startswith(prefix):
                    return self.answer(status, b"{}", X_Error_Code=code, X_Error_Message=code)
            api, files = f"/api/models/{REPOSITORY}", f"/{REPOSITORY}/resolve/{REVISION}/"
            if path == f"{api}/tree/{REVISION}":
                tree = [entry(name, data) for name, data in hub.files.items()]
                return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            if path == f"{api}/revision/{REVISION}":  # what earlier clients ask for
                siblings = [{"rfilename": name} for name in hub.files]
                about = {"id": REPOSITORY, "sha": REVISION, "siblings": siblings}
                return self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
            if path.startswith(files) and path.removeprefix(files) in hub.files:
                return self.file(path.removeprefix(files))
            known = REVISION in path
            return self.answer(404, b"{}", X_Error_Code="EntryNotFound" if known else "RevisionNotFound")

        def file(self, name: str) -> None:
            data, wanted = hub.files[name], self.headers.get("Range")
            hub.log.append((self.command, name, wanted))
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            self.send_response(206 if wanted else 200)
            self.send_header("X-Repo-Commit", REVISION)
            self.send_header("ETag", f'"{etag(name, data)}"')
            self.send_header("Content-Length", str(len(data) - start))
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if self.command == "HEAD":
                return
            if name in hub.stalls:
                self.wfile.write(data[: len(data) // 2])
                hub.stalled.set()
                hub.released.wait(60)
                self.close_connection = True
            elif hub.cut.get(name):
                self.wfile.write(data[start : start + hub.cut[name].pop()])
                self.close_connection = True
            else:
                self.wfile.write(data[start:])

    return Handler


def etag(name: str, data: bytes) -> str:
    """Of large files the hub says the SHA-256, of others git's name."""
    return sha256(data) if len(data) > 1000 else hashlib.sha1(data).hexdigest()


def entry(name: str, data: bytes) -> dict[str, object]:
    own: dict[str, object] = {"type": "file", "path": name, "size": len(data)}
    own["oid"] = hashlib.sha1(data).hexdigest()
    if len(data) > 1000:
        own["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
    return own


def client_module(name: str) -> ModuleType:
    return importlib.import_module(f"huggingface_hub.{name}")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A hub that the client in this process asks, with a cache of its own."""
    found = Hub(dict(FILES))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(found))
    server.daemon_threads = True
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()

    def stop() -> None:
        monkeypatch.setattr(time, "sleep", lambda _: None)  # the client tries again, at growing intervals
        server.shutdown()
        server.server_close()

    found.stop = stop
    constants = client_module("constants")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(client_module("hf_api").api, "endpoint", found.url)
    yield found
    found.released.set()
    if thread.is_alive():
        stop()


def experiment(folder: Path, files=PATTERNS, path="painter", sha256=None, revision=REVISION, **parts):
    """An experiment whose pipeline comes from the hub."""
    source = {
        "path": str(folder / path),
        "sha256": sha256 or {},
        "hub": {"repository": REPOSITORY, "revision": revision, "files": files},
    }
    data = {"name": "painter", "pipeline": source, "alignment": {"path": str(folder / "clip")}, **parts}
    model = ImageModelConfig.model_validate(data)
    return ImageExperiment.model_construct(name="drawn", model=model, reward=ImageRewardConfig())


def contents(folder: Path) -> dict[str, bytes]:
    return {
        f.relative_to(folder).as_posix(): f.read_bytes()
        for f in folder.rglob("*")
        if f.is_file() and ".cache" not in f.parts and f.name != LISTING
    }


WANTED = {name: FILES[name] for name in ASKED_FOR}


def test_what_the_patterns_ask_for_is_fetched_and_a_pickle_never(hub, tmp_path):
    output = tmp_path / "fetched.json"
    fetch(experiment(tmp_path, sha256={UNET: sha256(LARGE)}), output)
    assert contents(tmp_path / "painter") == WANTED
    assert hub.fetched() == ASKED_FOR
    assert json.loads(output.read_text()) == {
        "model": "painter",
        "sources": {
            "pipeline": {
                "path": str(tmp_path / "painter"),
                "repository": REPOSITORY,
                "revision": REVISION,
                "fetched": ASKED_FOR,
                "sha256": {UNET: sha256(LARGE), VAE: sha256(LARGE[:-1])},
            }
        },
    }


def test_what_is_complete_needs_no_hub(hub, tmp_path):
    fetch(experiment(tmp_path), tmp_path / "first.json")
    hub.stop()
    fetch(experiment(tmp_path), tmp_path / "second.json")
    first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("first", "second"))
    assert second["sources"]["pipeline"].pop("fetched") == []
    del first["sources"]["pipeline"]["fetched"]
    assert first == second


def test_what_was_placed_by_hand_stays_and_counts(hub, tmp_path):
    """Files of another content than the hub's among them: they may be meant, and the key sha256 says."""
    folder = tmp_path / "painter"
    (folder / "unet").mkdir(parents=True)
    (folder / UNET).write_bytes(b"my own")
    (folder / "unet" / "config.json").write_bytes(b"mine")
    fetch(experiment(tmp_path), tmp_path / "fetched.json")
    assert contents(folder) == WANTED | {UNET: b"my own", "unet/config.json": b"mine"}
    assert hub.fetched() == ["model_index.json", VAE]


def test_a_folder_filled_by_hand_needs_no_hub(hub, tmp_path):
    hub.stop()
    for name in ASKED_FOR:
        (tmp_path / "painter" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "painter" / name).write_bytes(FILES[name])
    fetch(experiment(tmp_path), tmp_path / "fetched.json")
    assert contents(tmp_path / "painter") == WANTED


def test_a_deleted_file_is_fetched_again(hub, tmp_path):
    """Though the pattern ``unet/`` still has one."""
    fetch(experiment(tmp_path), tmp_path / "fetched.json")
    (tmp_path / "painter" / UNET).unlink()
    hub.log.clear()
    fetch(experiment(tmp_path), tmp_path / "fetched.json")
    assert hub.fetched() == [UNET]
    assert contents(tmp_path / "painter") == WANTED


def test_a_broken_connection_is_gone_on_from(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(client_module("constants"), "DOWNLOAD_CHUNK_SIZE", 65536)
    hub.cut[UNET] = [10 * 65536 + 5]
    with suppress(CheckpointError):  # early clients go on only when they are called again
        fetch(experiment(tmp_path), tmp_path / "fetched.json")
    fetch(experiment(tmp_path), tmp_path / "fetched.json")
    assert contents(tmp_path / "painter") == WANTED
    ranges = [at for method, name, at in hub.log if (method, name) == ("GET", UNET)]
    assert ranges == [None, f"bytes={10 * 65536}-"]


CHILD = """
import importlib.util, sys
from pathlib import Path
from flowtilt.domains.images.fetching import fetch
spec = importlib.util.spec_from_file_location("test_fetching", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
sys.modules["test_fetching"] = tests
spec.loader.exec_module(tests)
folder = Path(sys.argv[2])
fetch(tests.experiment(folder), folder / "fetched.json")
"""


@pytest.mark.slow
def test_a_killed_fetch_leaves_no_part_of_a_file_and_the_next_goes_on(hub, tmp_path):
    """The process is as a user's: the hub's address and the cache are in its environment."""
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    hub.stalls = {UNET}
    process = subprocess.Popen([sys.executable, "-c", CHILD, __file__, str(tmp_path)], env=os.environ | own)
    assert hub.stalled.wait(120)
    process.kill()
    process.wait()
    hub.released.set()
    hub.stalls.clear()
    before = contents(tmp_path / "painter")
    assert UNET not in before
    assert before.items() <= WANTED.items()  # the small ones may have been there
    assert not (tmp_path / "fetched.json").exists()
    hub.log.clear()
    fetch(experiment(tmp_path), tmp_path / "fetched.json")
    assert contents(tmp_path / "painter") == WANTED
    assert hub.fetched() == sorted(WANTED.keys() - before.keys())


def test_an_unfinished_folder_is_not_taken_for_a_whole_one(hub, tmp_path):
    """Its patterns all have a file, and there should be more."""
    shutil.copytree(fetched_folder(hub, tmp_path), tmp_path / "other")
    (tmp_path / "other" / "unet" / "config.json").unlink()
    hub.stop()
    with pytest.raises(CheckpointError, match=r"place unet/config.json of it by hand in the folder .*other:"):
        fetch(experiment(tmp_path, path="other"), tmp_path / "fetched.json")
    (tmp_path / "other" / "unet" / "config.json").write_bytes(b"{}")
    fetch(experiment(tmp_path, path="other"), tmp_path / "fetched.json")


def fetched_folder(hub: Hub, tmp_path: Path) -> Path:
    fetch(experiment(tmp_path), tmp_path / "fetched.json")
    hub.log.clear()
    return tmp_path / "painter"


def offline(monkeypatch) -> None:
    monkeypatch.setattr(client_module("constants"), "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("error", ["ConnectError", "OfflineModeIsEnabled"])
def test_without_a_network_it_says_what_to_place_where(hub, tmp_path, monkeypatch, error):
    if error == "ConnectError":
        hub.stop()
    else:
        offline(monkeypatch)
    message = (
        rf"model painter: key pipeline.hub: {REPOSITORY} could not be fetched at revision {REVISION} "
        rf"\({error}: .*\); run again with a network, or place \*.json, unet/, vae/\*.safetensors of it by "
        rf"hand in the folder {tmp_path / 'painter'}: a later run goes on from what is there$"
    )
    with pytest.raises(CheckpointError, match=message):
        fetch(experiment(tmp_path), tmp_path / "fetched.json")
    assert not (tmp_path / "fetched.json").exists()
    assert hub.log == []


def test_without_a_network_the_clients_cache_will_do(hub, tmp_path, monkeypatch):
    """On a node without one, after ``hf download`` on another; links of the cache become files."""
    importlib.import_module("huggingface_hub").snapshot_download(
        REPOSITORY, revision=REVISION, ignore_patterns=["*.bin"]
    )
    offline(monkeypatch)
    fetch(experiment(tmp_path), tmp_path / "fetched.json")
    assert contents(tmp_path / "painter") == WANTED
    assert not (tmp_path / "painter" / UNET).is_symlink()
    report = json.loads((tmp_path / "fetched.json").read_text())
    assert report["sources"]["pipeline"]["fetched"] == ASKED_FOR


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", r"hub: someone/painter has terms of use; accept them on its page, log in by"),
        (404, "RevisionNotFound", rf"hub.revision: someone/painter has no revision {REVISION}; correct"),
        (401, "RepoNotFound", r"hub.repository: there is no someone/painter; correct the key, or if it is"),
    ],
)
def test_refusals_of_the_hub_are_explained(hub, tmp_path, status, code, message):
    hub.refusals["/"] = (status, code)
    with pytest.raises(CheckpointError, match=rf"^model painter: key pipeline\.{message}"):
        fetch(experiment(tmp_path), tmp_path / "fetched.json")


def test_a_hub_that_fails_is_no_refusal(hub, tmp_path):
    hub.refusals[f"/{REPOSITORY}/resolve"] = (404, "EntryNotFound")
    with pytest.raises(CheckpointError, match=r"\(RemoteEntryNotFoundError: .*\); run again with a network"):
        fetch(experiment(tmp_path), tmp_path / "fetched.json")
    hub.refusals.clear()
    fetch(experiment(tmp_path), tmp_path / "fetched.json")
    assert contents(tmp_path / "painter") == WANTED


def test_another_file_than_the_one_that_is_meant_is_named_and_kept(hub, tmp_path):
    hub.files[UNET] = LARGE + b"more"
    meant = experiment(tmp_path, sha256={VAE: sha256(FILES[VAE]), UNET: sha256(LARGE)})
    message = (
        rf"key pipeline.sha256: {tmp_path / 'painter' / UNET} has the SHA-256 {sha256(LARGE + b'more')}, "
        rf"not {sha256(LARGE)}; delete the file, and the rule fetch_checkpoint fetches it again, or correct"
    )
    for _ in range(2):
        with pytest.raises(CheckpointError, match=message):
            fetch(meant, tmp_path / "fetched.json")
        assert (tmp_path / "painter" / UNET).read_bytes() == LARGE + b"more"
    assert not (tmp_path / "fetched.json").exists()
    hub.files[UNET] = LARGE
    (tmp_path / "painter" / UNET).unlink()
    hub.log.clear()
    fetch(meant, tmp_path / "fetched.json")
    assert hub.fetched() == [UNET]


def test_a_checksum_of_a_file_that_is_not_fetched_is_explained(hub, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"pipeline.sha256: .*painter/README.md: no such file; restore it"
    ):
        fetch(experiment(tmp_path, sha256={"README.md": sha256(b"")}), tmp_path / "fetched.json")


def test_a_folder_of_another_revision_is_not_mixed_with(hub, tmp_path):
    folder, other = fetched_folder(hub, tmp_path), 40 * "f"
    message = (
        rf"{folder} holds files of {REPOSITORY} at revision {REVISION}, not of {REPOSITORY} at {other}; "
    )
    with pytest.raises(CheckpointError, match=message):
        fetch(experiment(tmp_path, revision=other), tmp_path / "fetched.json")
    assert contents(folder) == WANTED


def test_what_a_wrong_key_asked_for_stands_in_nobodys_way(hub, tmp_path):
    with pytest.raises(
        ConfigError, match=r"pipeline.hub.files: someone/painter has no file 'unets/', pickles"
    ):
        fetch(experiment(tmp_path, files=["*.json", "unets/"]), tmp_path / "fetched.json")
    assert hub.log == []
    listing = tmp_path / "painter" / LISTING
    listing.write_text(listing.read_text().replace(REVISION, 40 * "f"))
    fetch(experiment(tmp_path), tmp_path / "fetched.json")
    assert contents(tmp_path / "painter") == WANTED


@pytest.mark.parametrize("pattern", ["unet/*.bin", "model.ckpt", "*.PT", "weights.pth", "a.pkl"])
def test_pickles_are_refused(hub, tmp_path, pattern):
    with pytest.raises(
        ConfigError, match=r"key pipeline.hub.files: '.*' asks for a pickle, which can run code"
    ):
        fetch(experiment(tmp_path, files=["*.json", pattern]), tmp_path / "fetched.json")
    assert not (tmp_path / "painter").exists()


def test_a_pattern_that_only_pickles_are_of_has_no_file(hub, tmp_path):
    with pytest.raises(ConfigError, match=r"has no file 'unet/\*.b\*', pickles aside"):
        fetch(experiment(tmp_path, files=["unet/*.b*"]), tmp_path / "fetched.json")


# A single file.


def test_a_single_file_is_placed_at_its_path(hub, tmp_path):
    path = "weights/clip.safetensors"
    own = experiment(tmp_path, [VAE], path, {"clip.safetensors": sha256(FILES[VAE])})
    fetch(own, tmp_path / "fetched.json")
    assert contents(tmp_path / "weights") == {"clip.safetensors": FILES[VAE]}
    assert [f.name for f in (tmp_path / "weights").iterdir()] == ["clip.safetensors"]
    assert hub.fetched() == [VAE]
    report = json.loads((tmp_path / "fetched.json").read_text())["sources"]["pipeline"]
    assert report["fetched"] == [VAE]
    assert report["sha256"] == {"clip.safetensors": sha256(FILES[VAE])}
    hub.stop()
    fetch(own, tmp_path / "fetched.json")
    assert json.loads((tmp_path / "fetched.json").read_text())["sources"]["pipeline"]["fetched"] == []


def test_without_a_network_a_single_file_is_to_be_placed_at_its_path(hub, tmp_path):
    hub.stop()
    path = tmp_path / "clip.safetensors"
    with pytest.raises(CheckpointError, match=rf"place {VAE} of it by hand as {path}: a later run"):
        fetch(experiment(tmp_path, [VAE], "clip.safetensors"), tmp_path / "fetched.json")
    path.write_bytes(b"mine")
    fetch(experiment(tmp_path, [VAE], "clip.safetensors"), tmp_path / "fetched.json")
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("files", [[VAE, UNET], ["vae/*.safetensors"], ["unet/config.json"]])
def test_a_single_file_has_one_name(hub, tmp_path, files):
    with pytest.raises(
        ConfigError, match=r"clip.safetensors is a single file; name the one file that ends in"
    ):
        fetch(experiment(tmp_path, files, "clip.safetensors"), tmp_path / "fetched.json")


# Which sources.


def test_all_sources_with_a_hub_are_fetched(hub, tmp_path):
    def source(path: str, name: str) -> dict[str, object]:
        own = {"repository": REPOSITORY, "revision": REVISION, "files": [name]}
        return {"path": str(tmp_path / path), "hub": own}

    weights = {"kind": "image_reward", "weights": source("reward.safetensors", UNET)}
    reward = ImageRewardConfig.model_validate(weights)
    own = experiment(tmp_path, alignment=source("clip.safetensors", VAE)).model_copy(
        update={"reward": reward}
    )
    fetch(own, tmp_path / "fetched.json")
    sources = json.loads((tmp_path / "fetched.json").read_text())["sources"]
    assert {part: entry["fetched"] for part, entry in sources.items()} == {
        "pipeline": ASKED_FOR,
        "alignment": [VAE],
        "reward.weights": [UNET],
    }


def test_without_a_hub_there_is_nothing_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    own = experiment(tmp_path, pipeline={"path": str(tmp_path / "nowhere")})
    fetch(own, tmp_path / "fetched.json")
    assert json.loads((tmp_path / "fetched.json").read_text()) == {"model": "painter", "sources": {}}


def test_without_the_client_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ConfigError, match=r"huggingface_hub is not installed; pip install 'flowtilt\[images\]'"
    ):
        fetch(experiment(tmp_path), tmp_path / "fetched.json")


def test_errors_of_the_disk_are_not_taken_for_those_of_the_network(hub, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NotADirectoryError):
        fetch(experiment(tmp_path, path="file/painter"), tmp_path / "fetched.json")
