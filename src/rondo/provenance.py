"""What every artifact carries beside it: the command, the versions and the machine that made it."""

import contextlib
import datetime
import errno
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rondo.config import Config, command_line
from rondo.errors import UserError

# A directory that holds one of these was written by a command and may be replaced by one.
MARKS = ("run.json", "report.html")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The lines of a training: its file, and what names a validation loss, before its depth.
METRICS = "metrics.jsonl"
VALIDATION = "val/loss@r"


def record(config: Config, **facts: Any) -> dict[str, Any]:
    """Return the content of a run.json: resolved config, command, versions, hardware, facts."""
    return {
        "command": command_line(config),
        "config": config.model_dump(mode="json"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "hardware": hardware(),
        "git": git_commit(),
        **facts,
    }


def versions() -> dict[str, str]:
    """Return the versions of what decides a result."""
    found = {"python": platform.python_version()}
    for name in ("rondo-lm", "torch", "transformers", "tokenizers", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware(device: str = "auto") -> str:
    """Describe the device in words."""
    if device != "cpu" and torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name()})"
    return f"cpu ({_cpu_name()}, {torch.get_num_threads()} threads)"


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that were in use: on a GPU by tensors, else by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def git_commit() -> str | None:
    """Return the commit of this code, or None where it is not in a checkout."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader finds the old file or the new one, never half of it."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: The file is missing or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"there is no {path.name} in {path.parent}") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Return the lines of a run, steps and events, none where it has not begun.

    Raises:
        UserError: A line other than a last one cut short is damaged.
    """
    path = directory / METRICS
    if not path.is_file():
        return []
    rows, lines = [], path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(
                    f"{path}, line {number} is no JSON ({error}): remove the line"
                ) from error
    return rows


def claim_directory(path: str, overwrite: bool, spare: str = "") -> Path:
    """Return an output directory that may be written, and does not hold what is to be spared.

    Raises:
        UserError: It exists, is not empty and may not be replaced, or cannot be made.
    """
    directory = Path(path)
    for place in (directory, *directory.parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"{place} is a file: name another directory to write")
    source = Path(spare).resolve()
    if spare and source.exists() and directory.resolve() in (source, *source.parents):
        raise UserError(f"writing {path} would delete the source {spare}: write elsewhere")
    if directory.is_dir() and any(directory.iterdir()):
        if not overwrite:
            raise UserError(f"{path} exists already: choose another directory or add --overwrite")
        if not any((directory / mark).is_file() for mark in MARKS):
            raise UserError(f"{path} holds nothing of ours: --overwrite would delete what it holds")
    return directory


@contextlib.contextmanager
def staged(path: str | Path) -> Iterator[Path]:
    """Yield a directory beside `path` that takes its place at the end, or goes without a trace.

    What stood at `path` is replaced only when the new directory is finished.
    """
    directory = Path(path).resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        yield partial
        partial.chmod(0o755)
        if directory.exists():
            old = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}.old."))
            try:
                directory.rename(old / "old")
                partial.rename(directory)
            except BaseException:
                if (old / "old").exists():
                    (old / "old").rename(directory)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            partial.rename(directory)
    except (OSError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in FULL
        if not full and "I/O error" not in str(error):
            raise
        raise UserError(
            f"cannot write {directory}: {error}; nothing was kept, free some space and "
            "run the command again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve "auto" to the faster of bfloat16 and float32 on the device."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _cpu_is_faster_in_bfloat16() else torch.float32


def _cpu_is_faster_in_bfloat16() -> bool:
    # Every CPU takes bfloat16, but without instructions for it far slower, and the names of such
    # instructions differ by maker: so ask the machine. The best of many, taken in turns, is not
    # fooled by other work, which would choose another type the next time.
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    tried = {dtype: torch.ones(1024, 1024, dtype=dtype) for dtype in best}
    for _ in range(12):
        for dtype, weight in tried.items():
            start = time.perf_counter()
            torch.nn.functional.linear(weight[:256], weight)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.bfloat16] < best[torch.float32]


def choose_device(name: str) -> torch.device:
    """Resolve "auto" to cuda where there is one.

    Raises:
        UserError: The device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {error}") from error
    return device
