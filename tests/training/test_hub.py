"""An adapter goes to the Hub: huggingface_hub talks with a small server that answers as the Hub's interface does."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from commands import assert_refused, call
from huggingface_hub import ModelCard, constants

TOKEN = "hf_of_the_test"


class Hub(ThreadingHTTPServer):
    """Repositories by name, each with its files; ``broken`` paths are answered with a failure."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.broken: str | None = None
        self.hangs_up = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_verb(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        verb, path = self.command, self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.server.broken is not None and self.server.broken in path and self.server.hangs_up:
            self.close_connection = True
        elif self.server.broken is not None and self.server.broken in path:
            self.answer({"error": "out of order"}, 500)
        elif path == "/api/whoami-v2":
            self.answer({"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}})
        elif path == "/api/repos/create":
            asked = json.loads(sent)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            # by version of huggingface_hub
            self.server.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.answer({"url": f"{self.server.address}/{name}", "id": name})
        elif path == "/api/validate-yaml":
            base = ModelCard(json.loads(sent)["content"]).data.get("base_model", "a/b")
            valid = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)
            refusal = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
            self.answer({"errors": [] if valid else [{"message": refusal}], "warnings": []}, 200 if valid else 400)
        elif match := re.fullmatch(r"/api/models/([\w-]+/[\w-]+)/preupload/main", path):
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(sent)["files"]]  # fmt: skip
            self.answer({"files": files})
        elif match := re.fullmatch(r"/api/models/([\w-]+/[\w-]+)/commit/main", path):
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.repositories[match[1]][value["path"]] = base64.b64decode(value["content"])
            oid = "0" * 40
            self.answer({"commitOid": oid, "commitUrl": f"{self.server.address}/{match[1]}/commit/{oid}"})
        else:
            self.answer({"error": f"{verb} {path} is not of this test"}, 404)

    do_GET = do_POST = handle_verb


@pytest.fixture
def hub(monkeypatch):
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
        server.shutdown()


def train(capsys, model, data, folder, *more):
    given = ["--text", "review", "--label", "mood", "--cpu", "--max-length", 16, "--max-steps", 2, "-o", folder]
    return call(capsys, "train", "--model", model, "--data", data, *given, "--push-to-hub", "me/mine", *more)


def test_all_of_the_adapter_arrives_with_a_card_that_says_how_to_load_it(hub, bert, reviews, tmp_path, capsys):
    status, out, err = train(capsys, bert, reviews, tmp_path / "run")
    assert status == 0, err
    assert f"uploaded: {hub.address}/me/mine" in out
    assert hub.private == {"me/mine": True}
    adapter = tmp_path / "run" / "adapter"
    sent = hub.repositories["me/mine"]
    assert sent == {str(p.relative_to(adapter)): p.read_bytes() for p in adapter.rglob("*") if p.is_file()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= sent.keys()
    assert "import loretta" in sent["README.md"].decode()


def test_the_card_of_another_method_names_no_folder_of_this_machine(hub, bert, reviews, tmp_path, capsys):
    """The Hub takes no card whose base model is a folder, and PEFT writes such cards."""
    status, _, err = train(capsys, bert, reviews, tmp_path / "run", "--method", "lora")
    assert status == 0, err
    card = ModelCard(hub.repositories["me/mine"]["README.md"].decode())
    assert card.data.get("base_model") is None
    assert "lora" in card.data.tags
    assert not [tag for tag in card.data.tags if tag.startswith("base_model:")]


@pytest.mark.parametrize("how", ["answers 500", "hangs up"])
def test_a_network_that_fails_after_the_training_costs_nothing(how, hub, bert, reviews, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its five tries
    hub.broken, hub.hangs_up = "/commit/", how == "hangs up"
    status, _, err = train(capsys, bert, reviews, tmp_path / "run")
    adapter = tmp_path / "run" / "adapter"
    said = f"the run is finished, and '{adapter}' cannot be uploaded as 'me/mine'"
    assert_refused(status, err, [said, f"hf upload me/mine {adapter}"])
    assert (tmp_path / "run" / "run.json").is_file()
    assert not (tmp_path / "run" / "error.json").exists()
    hub.broken, sent = None, hub.repositories["me/mine"]
    assert not sent
    again = call(capsys, "train", "--resume", tmp_path / "run")
    assert f"uploaded: {hub.address}/me/mine" in again[1]
    assert sent.keys() >= {"adapter_config.json", "adapter_model.safetensors"}
    again = call(capsys, "train", "--resume", tmp_path / "run", "--push-to-hub", "me/other")
    assert f"uploaded: {hub.address}/me/other" in again[1]


def test_nobody_trains_for_a_hub_that_does_not_know_them(hub, bert, reviews, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
    status, _, err = train(capsys, bert, reviews, tmp_path / "run")
    assert_refused(status, err, ["the Hub does not know who this is"])
    assert not (tmp_path / "run").exists()
