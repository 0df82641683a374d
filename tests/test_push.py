"""A model goes to the hub whole, or nothing of it does; whatever is refused is said in one message,
and nothing changes here. The hub is a stand-in on this machine."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from stand_in_hub import TOKEN, Hub, Repository, serving
from symphony_moe import pipeline
from symphony_moe.cli import main
from symphony_moe.errors import UploadError
from symphony_moe.files import hash_folder
from symphony_moe.runs.folder import RunFolder

# The client sends files in a way that its HTTP library advises against.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

NAME = "someone/some-moe"
LOSSES = {"a": 2.5, "b": 3.25, "c": 4.125, "other": 5.0}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving(monkeypatch) as hub:
        yield hub


@pytest.fixture
def evaluated(run: RunFolder) -> RunFolder:
    """A build with losses, which nobody measured."""
    sources = {name: {domain: loss + 1 for domain, loss in LOSSES.items()} for name in "abc"}
    run.update_json(run.metrics, {"sources": sources, "built": LOSSES})
    return run


def trained(run: RunFolder) -> RunFolder:
    """A run with a trained model of the same weights."""
    shutil.copytree(run.checkpoint, run.trained)
    manifest = run.read_json(run.manifest)
    files = manifest["files"] | hash_folder(run.trained)
    run.update_json(run.manifest, {"files": files})
    return run


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command says that ends with exit code 2."""
    capsys.readouterr()
    assert main(["push", *map(str, arguments)]) == 2
    _, _, message = capsys.readouterr().err.rpartition("symphony: error: ")
    assert message and len(message) < 500
    return message


def check_arrived(result: dict[str, Any], run: RunFolder, hub: Hub) -> None:
    """Every file, in one commit, the card with the losses."""
    there, own = hub.repositories[NAME], contents(run.checkpoint)
    card = there.files["README.md"].decode()
    assert there.files == own | {"README.md": card.encode()}
    assert there.private and len(there.commits) == 1
    assert (result["url"], result["model"]) == (f"{hub.address}/{NAME}", "checkpoint")
    assert result["files"] == {name: len(content) for name, content in there.files.items()}
    assert "| built | 2.500 | 3.250 | 4.125 | 5.000 |" in card and f'name = "{NAME}"' in card
    assert vars(ModelCard(card).data) == vars(ModelCard(own["README.md"].decode()).data)


def test_what_arrives_is_what_is_in_the_folder(
    evaluated: RunFolder, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(evaluated.root)
    assert main(["push", str(evaluated.root), NAME, "--private", "--json"]) == 0
    shown = capsys.readouterr()
    check_arrived(json.loads(shown.out), evaluated, hub)
    size = len(before["checkpoint/model.safetensors"])
    assert f"model.safetensors ({size / 1e3:.1f} kB)" in shown.err
    assert shown.err.index("sending checkpoint/ to") == 2  # before anything is sent
    assert contents(evaluated.root) == before


@pytest.mark.slow
def test_a_process_finds_the_hub_by_its_environment(
    evaluated: RunFolder, hub: Hub, tmp_path: Path
) -> None:
    """HF_ENDPOINT and HF_TOKEN; stdout holds the result alone, and nobody is asked anything."""
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "symphony_moe", "push", evaluated.root, NAME, "--private", "--json"],
        capture_output=True,
        text=True,
        env=environment | {"HF_HOME": str(tmp_path / "home")},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    check_arrived(json.loads(done.stdout), evaluated, hub)


def test_a_model_that_is_there_already_is_no_new_commit(run: RunFolder, hub: Hub) -> None:
    first, second = pipeline.push(run, NAME), pipeline.push(run, NAME)
    assert first.url == second.url and len(hub.repositories[NAME].commits) == 1


def test_a_trained_model_goes_first_and_a_branch_keeps_to_itself(run: RunFolder, hub: Hub) -> None:
    trained(run)
    hub.repositories[NAME] = Repository(branches={"main": {"notes.md": b"mine"}})
    sent = pipeline.push(run, NAME, revision="v2")
    assert (sent.model, sent.url) == ("trained", f"{hub.address}/{NAME}/tree/v2")
    there = hub.repositories[NAME]
    assert there.files == {"notes.md": b"mine"}
    assert there.branches["v2"].keys() == {*contents(run.trained), "notes.md"}
    assert pipeline.push(run, NAME, what="checkpoint").model == "checkpoint"


def test_what_another_model_left_is_not_read_with_this_one(run: RunFolder, hub: Hub) -> None:
    """transformers takes one file of weights before an index of several, and a template that lies
    beside a tokenizer; what else is in the repository stays."""
    left = {
        "model-00001-of-00002.safetensors": b"old",
        "model.safetensors.index.json": b"{}",
        "chat_template.jinja": b"old",
        "additional_chat_templates/rag.jinja": b"old",
    }
    kept = {"LICENSE.md": b"mine", ".gitattributes": b"", "images/a.png": b"", "config.txt": b""}
    hub.repositories[NAME] = Repository(branches={"main": {**left, **kept}})
    sent = pipeline.push(run, NAME)
    assert set(sent.deleted) == left.keys()
    assert hub.repositories[NAME].files.keys() == {*contents(run.checkpoint), *kept}


def _no_token(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_TOKEN", "hf_bad")


def _no_right(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.owners.clear()


def _hangs_up(where: str) -> Callable[[Hub, pytest.MonkeyPatch], None]:
    def hang_up(hub: Hub, patch: pytest.MonkeyPatch) -> None:
        hub.fails = where

    return hang_up


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        (_no_token, "does not accept the token (401)"),
        (_no_right, "the token may not write there (403). Is someone you"),
        (_hangs_up("/create"), "cut short: "),
        (_hangs_up("/preupload/"), "cut short: "),
        (_hangs_up("/storage/"), "cut short: Error while uploading 'model.safetensors'"),
        (_hangs_up("/commit/"), "the same command again sends what is missing"),
    ],
    ids=["401", "403", "create", "preupload", "store", "commit"],
)
def test_a_refusal_of_the_hub_is_one_message_and_the_next_try_goes_through(
    breaks: Callable[[Hub, pytest.MonkeyPatch], None],
    says: str,
    run: RunFolder,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is to be seen of the model there, and nothing has changed here."""
    before = contents(run.root)
    with monkeypatch.context() as patch:
        breaks(hub, patch)
        message = refused(capsys, run.root, NAME)
    assert says in message and NAME in message
    assert not any(one.files for one in hub.repositories.values())
    assert contents(run.root) == before
    hub.fails, hub.owners = "", {"someone"}
    assert main(["push", str(run.root), NAME]) == 0
    assert hub.repositories[NAME].files.keys() == contents(run.checkpoint).keys()


def test_a_public_repository_is_not_taken_for_a_private_one(
    run: RunFolder, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories[NAME] = Repository(private=False)
    assert "there already and public" in refused(capsys, run.root, NAME, "--private")
    assert hub.repositories[NAME] == Repository(private=False)
    hub.repositories[NAME].private = True
    assert main(["push", str(run.root), NAME, "--private"]) == 0


def _changed(run: RunFolder, patch: pytest.MonkeyPatch) -> None:
    with (run.checkpoint / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")


def _stray(run: RunFolder, patch: pytest.MonkeyPatch) -> None:
    (run.checkpoint / "notes.txt").write_text("mine")


def _unfinished(run: RunFolder, patch: pytest.MonkeyPatch) -> None:
    run.checkpoint.rename(run.root / "work")


def _no_manifest(run: RunFolder, patch: pytest.MonkeyPatch) -> None:
    run.manifest.unlink()


def _logged_out(run: RunFolder, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("HF_TOKEN")
    patch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(run.root / "none"))


def _logged_out_and_unfinished(run: RunFolder, patch: pytest.MonkeyPatch) -> None:
    """What is wrong here is said first: it is there to mend whoever is asked for the token."""
    _logged_out(run, patch)
    _unfinished(run, patch)


def _offline(run: RunFolder, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def _nothing(run: RunFolder, patch: pytest.MonkeyPatch) -> None:
    """Leave it as it is."""


@pytest.mark.parametrize(
    ("breaks", "arguments", "says"),
    [
        (_changed, [NAME], "model.safetensors (changed); nothing is sent"),
        (_stray, [NAME], "notes.txt (not in the manifest)"),
        (_unfinished, [NAME], "no finished checkpoint/"),
        (_no_manifest, [NAME], "manifest.json: not there"),
        (_nothing, [NAME, "--what", "trained"], "no finished trained/; run `symphony train"),
        (_logged_out, [NAME], "no token for http://127.0.0.1"),
        (_logged_out_and_unfinished, [NAME], "no finished checkpoint/"),
        (_offline, [NAME], "HF_HUB_OFFLINE is set"),
        (_nothing, ["some-moe"], "'some-moe' is no repository of the hub"),
        (_nothing, ["a/b/c"], "expected OWNER/NAME"),
        (_nothing, ["some one/moe"], "'some one/moe' is no repository of the hub"),
        (_nothing, ["../moe"], "'../moe' is no repository of the hub"),
        (_nothing, ["x" * 200 + "/moe"], "no repository of the hub"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_the_hub_is_asked(
    breaks: Callable[[RunFolder, pytest.MonkeyPatch], None],
    arguments: list[str],
    says: str,
    run: RunFolder,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    breaks(run, monkeypatch)
    before = contents(run.root)
    assert says in refused(capsys, run.root, *arguments)
    assert hub.asked == [] and contents(run.root) == before


def test_a_dry_run_shows_what_would_be_sent_and_asks_nobody(
    evaluated: RunFolder,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without a token and without a network too."""
    _logged_out(evaluated, monkeypatch)
    _offline(evaluated, monkeypatch)
    assert main(["push", str(evaluated.root), NAME, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "would send checkpoint/ to someone/some-moe, branch main: 6 files" in shown.err
    assert "| built | 2.500 |" in shown.out
    planned: Any = pipeline.push(evaluated, NAME, dry_run=True).to_json()
    assert (
        planned["url"] is None and planned["files"].keys() == contents(evaluated.checkpoint).keys()
    )
    assert hub.asked == []


def test_a_program_gets_an_error_of_its_own_kind(run: RunFolder, hub: Hub) -> None:
    hub.fails = "/commit/"
    with pytest.raises(UploadError, match="cut short"):
        pipeline.push(run, NAME)
