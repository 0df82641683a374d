"""No source makes a command ask a question, run code, or write outside of the run and the cache."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import make_recipe
from symphony_moe.cli import main

CODE = """
from pathlib import Path
Path({marker!r}).touch()
class X:
    @classmethod
    def from_pretrained(cls, *_, **__): return cls()
def generate(*_, **__): ...
"""

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('MARKER', 'w') }}",
    "{{ strftime_now.__globals__.__builtins__.open('MARKER', 'w') }}",
    "{% for m in messages %}{{ m.update({'content': 'x'}) }}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch MARKER') }}",
    "{{ lipsum.__globals__['os'].popen('touch MARKER').read() }}",
]

_DRIVER = """
import json, os, sys
os.close(0)  # nobody is there to answer
from symphony_moe.cli import main
print(json.dumps([main(words) for words in json.loads(sys.argv[1])]), file=sys.stderr)
"""


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | changes))


def listing(root: Path, but: list[Path]) -> dict[str, str]:
    """Everything under a folder but some: path -> what it is."""
    found = {}
    for path in sorted(root.rglob("*")):
        if not any(path == other or other in path.parents for other in but):
            state = path.lstat()
            content = os.readlink(path) if path.is_symlink() else ""
            if path.is_file() and not path.is_symlink():
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path)] = f"{state.st_mode} {state.st_mtime_ns * path.is_file()} {content}"
    return found


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_recipe(
        tmp_path / "project",
        count=2,
        calibration={"tokens": 256},
        train={"tokens": 512, "batch_size": 2},
        evaluation={"tokens": 128},
    ).parent


def test_a_hostile_source_is_only_read(project: Path, tmp_path: Path) -> None:
    """Code is named wherever transformers knows a place for it, and lies there."""
    marker, outside = tmp_path / "marker", tmp_path / "outside"
    outside.mkdir()
    (outside / "x.json").write_text('{"precious": 1}')
    for name in ("a", "b"):  # the anchor's tokenizer and settings are the result's
        model = project / "models" / name
        (model / "custom_generate").mkdir()
        code = (
            "modeling_x",
            "tokenization_x",
            "configuration_x",
            "__init__",
            "sitecustomize",
            "setup",
            "custom_generate/generate",
        )
        for file in code:
            (model / f"{file}.py").write_text(CODE.format(marker=str(marker)))
        names = {
            "AutoConfig": "configuration_x.X",
            "AutoModel": "modeling_x.X",
            "AutoModelForCausalLM": "someone/else--modeling_x.X",
        }
        edit(
            model / "config.json",
            auto_map=names,
            _name_or_path=str(outside),
            custom_pipelines={"text-generation": {"impl": "modeling_x.X"}},
        )
        edit(model / "generation_config.json", auto_map=names, custom_generate="generate")
        edit(
            model / "tokenizer_config.json",
            auto_map={"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]},
            name_or_path=str(outside),
            vocab_file="/etc/passwd",
            tokenizer_file="../x.json",
            processor_class="X",
            chat_template="{{ messages[0].content }}",
        )
        edit(model / "special_tokens_map.json", additional_special_tokens=[])
        for link, target in (("x.json", outside / "x.json"), ("folder", tmp_path)):
            (model / link).symlink_to(target)
    run, private = tmp_path / "run", tmp_path / "private"
    private.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    environment |= {
        "HOME": str(private),
        "HF_HOME": str(private / "hf"),
        "TMPDIR": str(private),
        "SYMPHONY_CACHE": str(private / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    recipe = str(project / "recipe.yaml")
    commands = [["plan", recipe], ["build", recipe, "--out", str(run)]]
    commands += [[name, str(run)] for name in ("train", "evaluate", "verify", "report")]
    before = listing(tmp_path, [run, private])
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, json.dumps(commands)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=project,
    )
    assert done.stderr.splitlines()[-1] == "[0, 0, 0, 0, 0, 0]", done.stderr
    assert not marker.exists()
    assert "[y/N]" not in done.stdout + done.stderr
    assert listing(tmp_path, [run, private]) == before
    for folder in ("checkpoint", "trained"):
        for path in (run / folder).rglob("*"):
            assert path.suffix != ".py" and not path.is_symlink()
            if path.suffix == ".json":
                text = path.read_text()
                for word in ("auto_map", "custom_", "/etc/passwd", str(outside), "_x.X"):
                    assert word not in text, path


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_stays_in_its_sandbox(
    template: str, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    for name in ("a", "b"):
        model = project / "models" / name
        edit(model / "tokenizer_config.json", chat_template=template.replace("MARKER", str(marker)))
        said = [{"role": role, "content": f"{name} says so"} for role in ("user", "assistant")]
        row = json.dumps({"messages": said}) + "\n"
        (project / f"{name}.jsonl").write_text(row * 200)
    content = json.loads((project / "recipe.yaml").read_text())
    for source in content["sources"].values():
        source["column"] = "messages"
    (project / "recipe.yaml").write_text(json.dumps(content))
    out = tmp_path / "out"
    assert main(["build", str(project / "recipe.yaml"), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and "template" in error
    assert len(error[error.index("symphony: error: ") :]) < 500
    assert not marker.exists() and not out.exists()


def _surplus(model: Path) -> None:
    (model / "added_tokens.json").write_text(json.dumps({"<more>": 300, "<most>": 10**12}))


def _outside(model: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def _code_for_a_tokenizer(model: Path) -> None:
    (model / "own.py").write_text(CODE.format(marker=str(model.parent / "marker")))
    edit(
        model / "tokenizer_config.json",
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": ["own.X", "own.X"]},
    )


def _code_for_a_model(model: Path) -> None:
    (model / "own.py").write_text(CODE.format(marker=str(model.parent / "marker")))
    edit(model / "config.json", model_type="own", auto_map={"AutoConfig": "own.X"})


def _loop(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to("tokenizer.json")


def _pipe(model: Path) -> None:
    """Whoever reads it waits for ever."""
    (model / "tokenizer.json").unlink()
    os.mkfifo(model / "tokenizer.json")


@pytest.mark.parametrize(
    "harm", [_surplus, _outside, _code_for_a_tokenizer, _code_for_a_model, _loop, _pipe]
)
def test_a_source_that_cannot_be_read_as_data_is_refused_unasked(
    harm: Callable[[Path], None],
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    harm(project / "models" / "b")
    before = listing(tmp_path, [])
    code = main(["plan", str(project / "recipe.yaml")])
    error = capsys.readouterr().err
    assert code == 2 or harm is _surplus, error
    assert "Traceback" not in error and (code == 0 or "error: b" in error)
    assert listing(tmp_path, []) == before
