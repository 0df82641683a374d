"""Does a build that is cut short at any moment go on to the same bytes?

    python scripts/kill_study.py recipe.yaml --out kills --times 200
    python scripts/kill_study.py recipe.yaml --out /mnt/small/kills --times 200 --by full-disk

Builds once without a break. Then builds again and again, ends each process at a random moment
(SIGKILL, or by filling the disk until it stops), resumes it until it is done, and compares every
file. What was found stands in `OUT/found.jsonl`: a study that was stopped goes on. What the builds
say stands in `kill-study-PID.log` in the folder for temporary files. Exits 1 where a build did not
come to the same bytes, or ended otherwise than it should.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from symphony_moe.files import hash_folder, sha256_of

LARGEST_DISK = 16 * 1024**3
"""A disk larger than this (bytes) is not filled: it is not one that was made for this."""

LOG = Path(tempfile.gettempdir()) / f"kill-study-{os.getpid()}.log"
"""What the builds say: not on the disk that is filled, where it would be lost."""

REFUSED = 2
"""How a build ends that finds no room."""


def build(recipe: Path, run: Path) -> subprocess.Popen[bytes]:
    """Begin a build, or go on with it, in a process of its own."""
    words = [sys.executable, "-m", "symphony_moe", "build", str(recipe), "--out", str(run)]
    run.parent.mkdir(parents=True, exist_ok=True)
    with LOG.open("ab") as log:
        return subprocess.Popen([*words, "--resume"], stdout=log, stderr=log)


def hashes(run: Path) -> dict[str, str]:
    """Every file of the result."""
    alignment = run / "alignment.safetensors"
    return hash_folder(run / "checkpoint") | {alignment.name: sha256_of(alignment)}


def fill(folder: Path) -> Path:
    """A file that takes all the room of the disk under a folder."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        size = shutil.disk_usage(folder).free
        while size > 0:  # what is free is not all to be had
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size)
            except OSError:
                size //= 2
    return filler


def cut_short(process: subprocess.Popen[bytes], seconds: float, by: str, folder: Path) -> str:
    """End a build after some seconds; `done`, `cut`, or what went wrong."""
    try:
        code = process.wait(timeout=seconds)
        return "done" if code == 0 else f"exit code {code} by itself"
    except subprocess.TimeoutExpired:
        pass
    if by == "kill":
        process.send_signal(signal.SIGKILL)
        # It may have come to its end in this moment.
        return {0: "done", -signal.SIGKILL: "cut"}.get(process.wait(), "another end")
    filler = fill(folder)
    code = process.wait()
    filler.unlink()
    return {0: "done", REFUSED: "cut"}.get(code, f"exit code {code} on a full disk")


def study(recipe: Path, out: Path, times: int, by: str) -> int:
    """Cut builds short `times` times; the number of things that went wrong."""
    found, whole = out / "found.jsonl", out / "whole" / "run"
    out.mkdir(parents=True, exist_ok=True)
    if by == "full-disk" and shutil.disk_usage(out).total > LARGEST_DISK:
        raise SystemExit(f"{out}: a disk of more than {LARGEST_DISK >> 30} GiB is not filled")
    print(f"what the builds say: {LOG}", flush=True)
    began = time.monotonic()
    if build(recipe, whole).wait() != 0:
        raise SystemExit(f"{recipe}: does not build; see {LOG}")
    lengths = out / "seconds.txt"
    if not lengths.is_file():
        lengths.write_text(str(time.monotonic() - began))
    seconds, expected = float(lengths.read_text()), hashes(whole)
    lines = found.read_text().splitlines() if found.is_file() else []
    records = [json.loads(line) for line in lines]
    while sum(record["cuts"] for record in records) < times:
        number = len(records)
        moments = random.Random(number)
        run = out / "cut" / "run"
        shutil.rmtree(run, ignore_errors=True)
        cuts, end = 0, "cut"
        while end == "cut":
            # Beyond the length of a whole build, so that some come to their end.
            moment = moments.uniform(0, 1.3 * seconds)
            end = cut_short(build(recipe, run), moment, by, out)
            cuts += end == "cut"
        same = end == "done" and hashes(run) == expected
        records.append({"build": number, "cuts": cuts, "end": end, "same": same})
        with found.open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")
        print(records[-1], flush=True)
    wrong = [record for record in records if not record["same"]]
    total = sum(record["cuts"] for record in records)
    print(f"{len(records)} builds, cut short {total} times ({by}): {len(wrong)} went wrong")
    return len(wrong)


def main(words: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--by", choices=("kill", "full-disk"), default="kill")
    asked = parser.parse_args(words)
    return 1 if study(asked.recipe, asked.out, asked.times, asked.by) else 0


if __name__ == "__main__":
    sys.exit(main())
