"""A server that is killed in mid-load: its log is whole, it starts again, no quota has grown."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny import rondo, save_parent

from rondo_govern.audit.reading import read, verify

KILLS, CLIENTS = 20, 6
POLICY = """\
version: 1
tiers:
  all: {default: 3, cap: 8, price: 2, quotas: [{window: 30d, tokens: 100000000, flops: 1.0e+18}]}
"""


class Server:
    """`rondo serve` as a process, and clients that ask without pause."""

    def __init__(self, folder: Path, secret: str):
        self.folder, self.headers = folder, {"authorization": f"Bearer {secret}"}
        self.answers: list[dict[str, Any]] = []
        self.url, self._ending = "", threading.Event()

    def start(self, fsync: str) -> None:
        words = [
            "serve", "model", "--port", "0", "--policy", "policy.yaml", "--keys", "keys.yaml",
            "--audit", "audit.jsonl", "--audit-fsync", fsync, "--audit-rotate", "60kB",
            "--device", "cpu", "--dtype", "float32", "--kv-memory", "50MB",
        ]  # fmt: skip
        log = (self.folder / "log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rondo", *words],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        log.close()
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("serving "):
                self.url = line.rpartition(" at ")[2].strip()
                return
        raise AssertionError((self.folder / "log").read_text())

    def ask(self, draw: random.Random) -> None:
        """Ask until the server is gone, and keep what came whole."""
        with httpx.Client(base_url=self.url, headers=self.headers, timeout=60) as client:
            while not self._ending.is_set():
                body = {"prompt": "abc", "max_tokens": draw.randint(1, 60)}
                body["num_recurrences"] = draw.randint(1, 8)
                try:
                    response = client.post("/v1/completions", json=body)
                except httpx.HTTPError:
                    return
                assert response.status_code == 200, response.text
                self.answers.append(response.json())

    def load_and_kill(self, seconds: float, draw: random.Random) -> None:
        clients = [
            threading.Thread(target=self.ask, args=(random.Random(draw.random()),))
            for _ in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        time.sleep(seconds)
        self.process.send_signal(signal.SIGKILL)
        self.gone(-signal.SIGKILL)
        for client in clients:
            client.join()

    def spent(self) -> dict[str, Any]:
        told = httpx.get(f"{self.url}/v1/usage", headers=self.headers).json()
        return told["quotas"][0]

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.gone(0)

    def gone(self, code: int) -> None:
        assert self.process.wait(60) == code
        assert self.process.stdout is not None
        self.process.stdout.close()


def by_kind(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {"taken": [], "ended": [], "opened": []}
    for record in read(folder / "audit.jsonl"):
        found.setdefault(record["kind"], []).append(record)
    return found


@pytest.mark.slow
def test_twenty_kills_in_mid_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_parent(tmp_path / "parent")
    assert rondo("convert", tmp_path / "parent", tmp_path / "model", "--sizes", "2,2,2") == 0
    (tmp_path / "policy.yaml").write_text(POLICY)
    capsys.readouterr()
    assert rondo("keys", "new", tmp_path / "keys.yaml", "acme") == 0
    server = Server(tmp_path, capsys.readouterr().out.strip())
    moments = random.Random(0)
    for number in range(KILLS):
        server.start(["interval", "each", "off"][number % 3])
        # What every client was told whole is in the log, and counts against the quota.
        kinds = by_kind(tmp_path)
        assert Counter(one["id"] for one in kinds["taken"]) == Counter(
            one["id"] for one in kinds["ended"]
        )
        held = {one["id"]: one for one in kinds["taken"]}
        ended = [one for one in kinds["ended"] if one["reason"] not in ("lost", "untaken")]
        lost = [held[one["id"]] for one in kinds["ended"] if one["reason"] == "lost"]
        tokens = sum(one["prompt_tokens"] + one["new_tokens"] for one in ended if one["iterations"])
        tokens += sum(one["reserved_tokens"] for one in lost)
        assert server.spent()["tokens"]["spent"] == tokens
        recorded = {one["id"].rpartition("-")[0]: one for one in ended}
        for answer in server.answers:
            record = recorded[answer["id"]]
            assert record["new_tokens"] == answer["usage"]["completion_tokens"]
            assert record["price"] == answer["recurrence"]["price"]
        server.load_and_kill(moments.uniform(0.1, 1.5), moments)
        verdict = verify(tmp_path / "audit.jsonl")
        assert verdict.findings == []
    server.start("interval")
    server.end()
    assert verify(tmp_path / "audit.jsonl").findings == []
    kinds = by_kind(tmp_path)
    assert len(kinds["opened"]) == KILLS + 1
    lost = sum(one["reason"] == "lost" for one in kinds["ended"])
    # The kills did come in mid-load.
    assert lost > KILLS
    assert len(server.answers) > KILLS
    assert json.loads((tmp_path / "audit.jsonl.head").read_text())["seq"] == verdict_seq(tmp_path)


def verdict_seq(folder: Path) -> int:
    return verify(folder / "audit.jsonl").head.seq
