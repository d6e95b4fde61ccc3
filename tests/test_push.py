"""`selfmoa push`: what is listed, what is refused, and what a hub on this machine is sent."""

from __future__ import annotations

import base64
import json
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import save_file

from receipts import receipt
from selfmoa.console.release import pushed, size
from selfmoa.errors import MissingFile, Quarantined
from selfmoa.release.export import sign
from selfmoa.release.hub import push
from selfmoa.release.refusals import HubRefused, NotForRelease
from selfmoa.rundir import digest_file
from selfmoa.training.policy import QUARANTINE_MARK

REPO = "somebody/vale"
NAMES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "selfmoa.json"]


@pytest.fixture
def folder(tmp_path):
    """A small adapter as an export writes it."""
    path = tmp_path / "adapter"
    path.mkdir()
    save_file({"lora_A": np.ones((2, 3), np.float32)}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    sign(path, receipt())
    return path


@pytest.fixture
def pairs(tmp_path):
    """A file of pairs as an export writes it."""
    path = tmp_path / "pairs"
    path.mkdir()
    (path / "pairs.jsonl").write_text('{"id": "1"}\n')
    sign(path, receipt(kind="pairs"))
    return path


# --- what is listed and refused ------------------------------------------------------------------


def test_a_push_that_is_not_really_meant_lists_all_and_asks_nobody(folder, hub):
    plan = push(folder, REPO)
    assert [f["name"] for f in plan["files"]] == NAMES
    assert plan["files"][2]["digest"] == digest_file(folder / NAMES[2])
    assert plan["files"][2]["bytes"] == (folder / NAMES[2]).stat().st_size
    assert (plan["target"], plan["kind"], plan["private"]) == (REPO, "model", True)
    assert (plan["refused"], plan["commit"]) == ([], None)
    assert hub.asked == []
    assert "Nothing was sent: --really does it." in pushed(plan)


def link(folder):
    (folder / "more.json").symlink_to("/etc/hostname")


def linked_folder(folder):
    (folder / "more").symlink_to("/etc")


def pickled(folder):
    (folder / "adapter_model.bin").write_bytes(pickle.dumps([1]))


def disguised(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps([1]))


def code(folder):
    (folder / "modeling.py").write_text("")


def code_below(folder):
    (folder / "more").mkdir()
    (folder / "more" / "modeling.py").write_text("")


def named_code(folder):
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "modeling.Mine"}}')


def hidden(folder):
    (folder / ".env").write_text("secret")


def extra(folder):
    (folder / "notes.txt").write_text("not exported")


def below(folder):
    (folder / "more").mkdir()
    (folder / "more" / "notes.txt").write_text("not exported")


def swapped(folder):
    save_file({"lora_A": np.zeros((2, 3), np.float32)}, folder / NAMES[2])


def lost(folder):
    (folder / NAMES[2]).unlink()


def no_card(folder):
    (folder / NAMES[0]).unlink()


def no_receipt(folder):
    (folder / NAMES[3]).unlink()


def other_receipt(folder):
    (folder / NAMES[3]).write_text('{"made_by": "selfmoa", "start_digest": "sha256:1"}')


def local_base(folder):
    base = receipt()["base"] | {"is_local": True}
    sign(folder, receipt(base=base))


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (link, "more.json is a link"),
        (linked_folder, "more is a link"),
        (pickled, "adapter_model.bin is not of a kind"),
        (disguised, "model.safetensors is damaged or no safetensors"),
        (code, "modeling.py is not of a kind"),
        (code_below, "more/modeling.py is not of a kind"),
        (named_code, "auto_map"),
        (hidden, ".env is not of a kind"),
        (extra, "notes.txt is not what was exported"),
        (below, "more/notes.txt is not what was exported"),
        (swapped, "adapter_model.safetensors is not what was exported"),
        (lost, "no weights in safetensors"),
        (no_card, "there is no README.md"),
        (no_receipt, "there is no selfmoa.json"),
        (other_receipt, "not the receipt of an export"),
        (local_base, "base is a folder of this machine"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_must_not_leave_is_told_and_keeps_all_from_leaving(folder, hub, harm, why):
    harm(folder)
    plan = push(folder, REPO)
    assert any(why in sentence for sentence in plan["refused"]), plan["refused"]
    assert why in pushed(plan)
    assert "--really" not in pushed(plan)
    with pytest.raises(NotForRelease, match=r"not handed out"):
        push(folder, REPO, really=True)
    assert hub.asked == []


@pytest.mark.parametrize("where", [".", "below", ".."])
@pytest.mark.parametrize("really", [False, True])
def test_quarantine_is_respected_wherever_the_mark_is(folder, hub, where, really):
    (folder / where).mkdir(exist_ok=True)
    (folder / where / QUARANTINE_MARK).write_text("unsafe on purpose")
    with pytest.raises(Quarantined):
        push(folder, REPO, really=really)
    assert hub.asked == []


def test_the_card_may_be_edited(folder):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert push(folder, REPO)["refused"] == []


def test_pairs_are_a_dataset_and_never_public(pairs, hub):
    assert push(pairs, REPO)["kind"] == "dataset"
    assert push(pairs, REPO)["refused"] == []
    assert "unsafe answers" in push(pairs, REPO, private=False)["refused"][0]
    with pytest.raises(NotForRelease, match="unsafe answers"):
        push(pairs, REPO, really=True, private=False)
    assert hub.asked == []


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(MissingFile, match="selfmoa export"):
        push(tmp_path / "nothing", REPO)


# --- a hub on this machine -----------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """Answers as the hub's API does, keeps what it is sent, and may say no."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.made, self.files, self.tokens = [], {}, {}, set()
        self.is_private, self.refuses = True, 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.handle_one("")

    def do_POST(self):
        self.handle_one(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())

    def handle_one(self, body):
        hub = self.server
        hub.asked.append(f"{self.command} {self.path}")
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.refuses:
            return self.reply({"error": "no"}, hub.refuses)
        if self.path == "/api/repos/create":
            hub.made = json.loads(body)
            return self.reply({"url": f"{hub.url}/{REPO}"})
        if "/preupload/" in self.path:
            names = [f["path"] for f in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            return self.reply({"files": modes})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    hub.files[value["path"]] = base64.b64decode(value["content"])
            return self.reply({"commitUrl": f"{hub.url}/{REPO}/commit/1", "commitOid": "1" * 40})
        return self.reply({"id": REPO, "private": hub.is_private, "siblings": []})

    def reply(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch):
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
        yield server
        server.shutdown()
        thread.join()


def test_a_push_that_is_meant_sends_exactly_what_was_listed(folder, hub):
    plan = push(folder, REPO, really=True)
    assert sorted(hub.files) == NAMES
    assert all(hub.files[name] == (folder / name).read_bytes() for name in NAMES)
    assert hub.made.get("private") is True or hub.made.get("visibility") == "private"
    assert (hub.made["name"], hub.made["organization"]) == ("vale", "somebody")
    assert hub.tokens == {"Bearer hf_of_nobody"}
    assert plan["commit"].endswith(f"{REPO}/commit/1")
    assert "Pushed: " in pushed(plan)
    assert "hf_of_nobody" not in json.dumps(plan)


def test_pairs_go_to_a_private_dataset(pairs, hub):
    push(pairs, REPO, really=True)
    assert hub.made["type"] == "dataset"
    assert any(f"/api/datasets/{REPO}/commit/" in asked for asked in hub.asked)
    assert sorted(hub.files) == ["README.md", "pairs.jsonl", "selfmoa.json"]


def test_a_repository_that_is_there_and_public_is_not_written_to(folder, hub):
    hub.is_private = False
    with pytest.raises(HubRefused, match="public"):
        push(folder, REPO, really=True)
    assert hub.files == {}
    push(folder, REPO, really=True, private=False)
    assert sorted(hub.files) == NAMES


def test_offline_is_honoured_before_anybody_is_asked(folder, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubRefused, match="HF_HUB_OFFLINE"):
        push(folder, REPO, really=True)
    assert hub.asked == []
    assert push(folder, REPO)["refused"] == []


def test_without_a_login_nothing_is_sent(folder, hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(HubRefused, match="hf auth login"):
        push(folder, REPO, really=True)
    assert hub.asked == []


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_hub_that_says_no_ends_in_a_sentence_without_the_token(folder, hub, status):
    hub.refuses = status
    with pytest.raises(HubRefused, match=str(status)) as caught:
        push(folder, REPO, really=True)
    assert "hf_of_nobody" not in str(caught.value)


def test_a_hub_that_is_not_there_ends_in_a_sentence(folder, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubRefused, match="cannot be reached"):
        push(folder, REPO, really=True)


def test_a_name_that_is_none_ends_in_a_sentence(folder, hub):
    with pytest.raises(HubRefused, match="user/model"):
        push(folder, "a/b/c", really=True)
    assert hub.files == {}


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (999, "999 B"), (41376, "41.4 kB"), (2_470_000_000, "2.47 GB")]
)
def test_sizes_have_three_digits(n, text):
    assert size(n) == text
