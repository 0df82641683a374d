"""Models behind the servers of vLLM and llama.cpp, asked over HTTP as their users do."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from environments import alone, python, tool

START_SECONDS = 400


class Refused(Exception):
    """A program does not take the model; what it said."""


@contextmanager
def serving(command: list[str], log: Path, **settings: str) -> Iterator[str]:
    """A server's address, while it runs. Raises Refused where it ends before it is ready."""
    with log.open("w") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=output, env=alone() | settings, start_new_session=True
        )
    address = f"http://127.0.0.1:{command[command.index('--port') + 1]}"
    try:
        _wait_for(address, server, log)
        yield address
    finally:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            raise Refused(last_error(log.read_text(errors="replace")))
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"{address} is not ready after {START_SECONDS} s; see {log}")


def last_error(text: str) -> str:
    """The last line of a log that says what was wrong."""
    lines = [line.strip() for line in text.splitlines() if "rror" in line]
    return (lines or text.strip().splitlines() or ["it said nothing"])[-1][-300:]


def ask(address: str, content: dict[str, Any]) -> Any:
    """POST JSON, get JSON."""
    request = urllib.request.Request(
        address, json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{address}: {error.read().decode()[:500]}") from None


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def ask_vllm(asked: dict[str, Any], log: Path, *more: str) -> dict[str, Any]:
    """What vLLM's OpenAI-compatible server answers. Raises Refused where it does not serve the
    model."""
    command = [
        str(python("vllm")),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        asked["folder"],
        "--served-model-name",
        "moe",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "512",
        "--max-logprobs",
        "50",
        "--port",
        free_port(),
        *more,
    ]
    with serving(command, log, VLLM_CPU_KVCACHE_SPACE="1") as address:
        found = []
        for prompt in asked["prompts"]:
            settings = {"model": "moe", "prompt": prompt, "temperature": 0}
            answer = ask(
                f"{address}/v1/completions",
                settings
                | {"max_tokens": asked["tokens"], "logprobs": asked["best"]}
                | {"return_token_ids": True, "return_tokens_as_token_ids": True},
            )["choices"][0]
            scores = answer["logprobs"]
            best = {k.removeprefix("token_id:"): v for k, v in scores["top_logprobs"][0].items()}
            tokens, steps = answer["token_ids"], scores["token_logprobs"]
            found.append({"best": best, "tokens": tokens, "steps": steps})
        texts = {
            str(special): [
                ask(
                    f"{address}/tokenize",
                    {"model": "moe", "prompt": text, "add_special_tokens": special},
                )["tokens"]
                for text in asked["texts"]
            ]
            for special in (False, True)
        }
        return {"prompts": found, "texts": texts, "spoken": _speak(address, asked)}


def ask_llama_cpp(asked: dict[str, Any], log: Path) -> dict[str, Any]:
    """What llama.cpp's server answers for a GGUF file, `asked["file"]`."""
    command = [
        str(tool("llama-server")),
        "-m",
        asked["file"],
        "-c",
        "512",
        "-np",
        "1",
        "-fa",
        "off",
        "-ctk",
        "f32",
        "-ctv",
        "f32",
        "--no-warmup",
        "--no-webui",
        "-t",
        "2",
        "--port",
        free_port(),
    ]
    with serving(command, log) as address:
        found = []
        for prompt in asked["prompts"]:
            answer = ask(
                f"{address}/completion",
                {
                    "prompt": prompt,
                    "n_predict": asked["tokens"],
                    "temperature": 0,
                    "n_probs": asked["best"],
                    "return_tokens": True,
                    "cache_prompt": False,
                },
            )
            steps = answer["completion_probabilities"]
            found.append(
                {
                    "best": {str(one["id"]): one["logprob"] for one in steps[0]["top_logprobs"]},
                    "tokens": answer["tokens"],
                    "steps": _by_token(answer["tokens"], steps),
                }
            )
        texts = {
            str(special): [
                ask(
                    f"{address}/tokenize",
                    {"content": text, "add_special": special, "parse_special": True},
                )["tokens"]
                for text in asked["texts"]
            ]
            for special in (False, True)
        }
        return {"prompts": found, "texts": texts, "spoken": _speak(address, asked)}


def _by_token(tokens: list[int], steps: list[dict[str, Any]]) -> list[float | None]:
    """The log-probability of each token. llama.cpp leaves out those of tokens whose bytes are no
    whole character yet."""
    found, left = list[float | None](), list(steps)
    for token in tokens:
        said = bool(left) and left[0]["id"] == token
        found.append(left.pop(0)["logprob"] if said else None)
    return found


def _speak(address: str, asked: dict[str, Any]) -> str:
    """What a plain client of OpenAI's protocol gets for a text."""
    answer = ask(
        f"{address}/v1/completions",
        {
            "model": "moe",
            "prompt": asked["speak"],
            "temperature": 0,
            "max_tokens": asked["spoken_tokens"],
        },
    )
    return str(answer["choices"][0]["text"])
