"""A small Hugging Face Hub on loopback, in memory, for the real `huggingface_hub` client.

It knows repositories of models and data sets with branches and commits, large files, private repositories, tokens,
collections and the validation of cards, and can be told to lose connections. What it leaves out: Xet, pull requests,
gated repositories, multi-part uploads.

In the same process use the fixture `hub`, which points the client at it; other processes get `hub.environment(...)`.
"""

import threading
from http.server import ThreadingHTTPServer

import pytest
from loopback_hub_endpoints import HubHandler

OWNER, TOKEN = "me", "hf_of_me"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # clients that are killed are part of the tests


class LoopbackHub:
    """The server and what it holds.

    Attributes:
        repos (`dict[tuple[str, str], Repo]`): By kind (`models`, `datasets`) and id.
        large_files (`dict[str, bytes]`): By sha256.
        uploads (`list[str]`): sha256 of every large file that arrived whole.
        lose_uploads (`int`): So many uploads from now on lose their connection half-way.
        lose_downloads (`int`): The same for downloads of whole files above a megabyte.
        hold_after (`int`, *optional*): After so many large files the next ones are held up.
        held (`threading.Event`): Set when one is held up.
        release (`threading.Event`): Lets those that are held up go on.
    """

    def __init__(self):
        self.repos, self.large_files, self.collections = {}, {}, {}
        self.uploads, self.requests = [], []
        self.lose_uploads = self.lose_downloads = 0
        self.hold_after, self.started = None, 0
        self.enough, self.held, self.release = threading.Event(), threading.Event(), threading.Event()
        self.tokens = {TOKEN: OWNER}
        self.lock = threading.RLock()
        self.server = _Server(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo_id: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """Path -> content."""
        repo = self.repos[kind, repo_id]
        return {path: content for path, (content, _) in repo.commits[repo.resolve(revision)].items()}

    def environment(self, home, token: str | None = None) -> dict[str, str]:
        """What a process needs so that its client talks to this hub and keeps its caches under `home`."""
        values = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        return values | ({} if token is None else {"HF_TOKEN": token})


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A loopback hub that the client of this process talks to, logged in as `OWNER`."""
    from huggingface_hub import constants, hf_api

    with LoopbackHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        for name, value in server.environment(tmp_path / "hf_home", TOKEN).items():
            monkeypatch.setenv(name, value)
        yield server
