"""Hundreds of streams at once against `rondo serve`: no wrong token, nothing left behind.

    python benchmarks/serve_load.py                                 (starts a server of its own)
    python benchmarks/serve_load.py --url http://127.0.0.1:8000 --pid 4711

Streams of mixed depth, length and exit read as fast as they can, read slowly, do not stream at all,
or vanish: before the first token or in the middle. Each kind of request is asked alone first, and
under load every answer, or as much as was read of it, must be that text at those depths. Two best
tokens may lie so close together that the company of a batch decides: an answer that takes the
second best where it is within `--tie` (in nats) is counted as a tie, not as wrong. Afterwards the
server must run nothing, hold no page but those of cached prefixes, and have grown by little.

Latencies are those of the clients, which share the machine with the server. A server of its own
has random weights, float32, and one character for each token, so that text tells tokens apart.
"""

import argparse
import asyncio
import json
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
from loopback import SPECIAL, gauges, resident, server, tiny_checkpoint
from traffic import SHARES, percentile, record

Manner = Literal["reads", "slow", "whole", "vanishes", "gone"]
# Of every twenty clients.
MANNERS: dict[Manner, int] = {"reads": 9, "slow": 3, "whole": 3, "vanishes": 4, "gone": 1}
PAUSE = 0.05
SETTLE_SECONDS, ANSWER_SECONDS = 30.0, 60.0


@dataclass(frozen=True)
class Kind:
    """A request that many clients make."""

    prompt: tuple[int, ...]
    depth: int
    new_tokens: int
    exit: dict[str, Any] | None = None
    temperature: float = 0.0
    seed: int = 0

    @property
    def body(self) -> dict[str, Any]:
        """The request, without what differs between clients."""
        return {
            "prompt": list(self.prompt),
            "num_recurrences": self.depth,
            "max_tokens": self.new_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "logprobs": 2,
            **({"exit": self.exit} if self.exit else {}),
        }


@dataclass
class Answer:
    """What a client saw.

    Attributes:
        tokens: Text of each token.
        recurrences: Iterations that each took.
        runners_up: The second best token at each place and how far it lay behind, in nats.
        stamps: When each chunk with tokens came, since the request was sent.
        seconds: Until the end.
        refused: How often the queue was full.
        error: What went wrong, if anything did.
    """

    tokens: list[str] = field(default_factory=list)
    recurrences: list[int] = field(default_factory=list)
    runners_up: list[tuple[str, float]] = field(default_factory=list)
    stamps: list[float] = field(default_factory=list)
    seconds: float = 0.0
    refused: int = 0
    error: str | None = None

    def take(self, choice: dict[str, Any], depths: list[int]) -> None:
        """Add the tokens of a choice, or of a piece of one."""
        told = choice.get("logprobs") or {"tokens": []}
        self.tokens += told["tokens"]
        self.recurrences += depths
        for token, top in zip(told["tokens"], told.get("top_logprobs", []), strict=True):
            best = max(top.values())
            others = [(one, best - value) for one, value in top.items() if one != token]
            self.runners_up.append(min(others, key=lambda one: one[1], default=("", 1e9)))


# ---- clients


def kinds(count: int, new_tokens: int, vocabulary: Sequence[int], seed: int) -> list[Kind]:
    """Return requests that differ in depth, length, exit and draws; some begin alike."""
    draw = random.Random(seed)
    common = tuple(draw.choices(vocabulary, k=48))
    exits = (
        {"rule": "state_distance", "threshold": 0.1},
        {"rule": "kl", "threshold": 0.05},
        {"rule": "argmax_stable", "threshold": 0.5},
    )
    found = []
    for number in range(count):
        own = tuple(draw.choices(vocabulary, k=draw.choice((1, 3, 9, 30, 70, 120))))
        depth = draw.choices(list(SHARES), list(SHARES.values()))[0]
        chosen = exits[number % len(exits)] if number % 4 == 1 else None
        kind = Kind(
            # The same beginning at other depths and exits is another prefix.
            prompt=common + own[:20] if number % 3 == 0 else own,
            depth=max(depth, 8) if chosen else depth,
            new_tokens=draw.randint(max(1, new_tokens // 4), new_tokens),
            exit=chosen,
            temperature=0.8 if number % 5 == 2 else 0.0,
            seed=number,
        )
        found.append(kind)
    return found


async def ask(client: httpx.AsyncClient, kind: Kind, manner: Manner, after: int) -> Answer:
    """Make a request, and again while the queue is full.

    Args:
        client: Of the server.
        kind: What is asked.
        manner: How the client reads.
        after: Chunks after which a client vanishes.
    """
    answer = Answer()
    while True:
        answer.stamps.clear()
        start = time.perf_counter()
        try:
            # Who leaves before the first token leaves, as often as not, while it waits its turn.
            async with asyncio.timeout(0.005 * after if manner == "gone" else None):
                wait = await _once(client, kind, manner, after, answer, start)
        except TimeoutError:
            wait = None
        except (httpx.HTTPError, json.JSONDecodeError, KeyError) as error:
            answer.error = f"{type(error).__name__}: {error}"
            wait = None
        answer.seconds = time.perf_counter() - start
        if wait is None:
            return answer
        answer.refused += 1
        await asyncio.sleep(wait)


async def _once(
    client: httpx.AsyncClient, kind: Kind, manner: Manner, after: int, answer: Answer, start: float
) -> float | None:
    """Make a request once; return seconds to wait where the queue is full."""
    streams = manner != "whole"
    body = {**kind.body, "stream": streams, **({} if streams else {"token_recurrences": True})}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code == 429:
            # As it is told, but the test shall end.
            return min(float(response.headers["retry-after"]), 2.0) * random.uniform(0.5, 1.0)
        if response.status_code != 200:
            text = (await response.aread()).decode()
            answer.error = f"{response.status_code}: {text[:300]}"
            return None
        if not streams:
            choice = json.loads(await response.aread())["choices"][0]
            answer.take(choice, [one["recurrences"] for one in choice["tokens"]])
            return None
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                answer.error = str(event["error"])
                return None
            for choice in event["choices"]:
                if choice.get("recurrences"):
                    answer.stamps.append(time.perf_counter() - start)
                    answer.take(choice, choice["recurrences"])
            if manner == "vanishes" and len(answer.stamps) >= after:
                return None
            if manner == "slow":
                await asyncio.sleep(PAUSE)
    return None


async def under_load(
    url: str, wanted: list[tuple[Kind, Manner]], in_flight: int, seed: int
) -> list[Answer]:
    """Let all clients ask, so many at once."""
    draw, gate = random.Random(seed), asyncio.Semaphore(in_flight)
    # A client has a connection of its own: one that idles may be closed just when it is used again.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    # A slow reader has little room for what it has not read.
    narrow = httpx.AsyncHTTPTransport(
        socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)],
        limits=limits,
        trust_env=False,
    )
    wide = httpx.AsyncHTTPTransport(limits=limits, trust_env=False)

    async def one(kind: Kind, manner: Manner, after: int) -> Answer:
        async with gate:
            return await ask(slow if manner == "slow" else fast, kind, manner, after)

    async with (
        httpx.AsyncClient(base_url=url, transport=narrow, timeout=ANSWER_SECONDS) as slow,
        httpx.AsyncClient(base_url=url, transport=wide, timeout=ANSWER_SECONDS) as fast,
    ):
        return await asyncio.gather(
            *(one(kind, manner, draw.randint(1, kind.new_tokens)) for kind, manner in wanted)
        )


async def alone(url: str, asked: list[Kind]) -> list[Answer]:
    """Ask each once, one after another."""
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=ANSWER_SECONDS) as client:
        return [await ask(client, kind, "reads", 0) for kind in asked]


# ---- what was found


def fault(kind: Kind, manner: Manner, right: Answer, seen: Answer, tie: float) -> str | None:
    """Return what is wrong with an answer: None for nothing, `tie` for the second of two alike."""
    if seen.error:
        return seen.error
    cut = manner in ("vanishes", "gone")
    length = len(seen.tokens) if cut else max(len(seen.tokens), len(right.tokens))
    for place in range(length):
        if place >= min(len(seen.tokens), len(right.tokens)):
            return f"{len(seen.tokens)} tokens in place of {len(right.tokens)}"
        if seen.tokens[place] != right.tokens[place]:
            second, behind = right.runners_up[place]
            if not kind.temperature and seen.tokens[place] == second and behind <= tie:
                return "tie"
            return f"token {place} is {seen.tokens[place]!r}, not {right.tokens[place]!r}"
        if seen.recurrences[place] != right.recurrences[place]:
            took, other = seen.recurrences[place], right.recurrences[place]
            return f"token {place} took {took} iterations, not {other}"
    if not kind.exit and set(seen.recurrences) - {kind.depth}:
        return f"depths {sorted(set(seen.recurrences))} where {kind.depth} was asked for"
    return None


def left_behind(url: str) -> dict[str, float]:
    """Return what the server still holds, once it runs nothing or after waiting for that."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        now = gauges(url)
        held = {
            "running": now["rondo_num_requests_running"],
            "waiting": now["rondo_num_requests_waiting"],
            "pages of no prefix": now["rondo_kv_cache_pages"] - now["rondo_kv_cache_prefix_pages"],
        }
        if not any(held.values()) or time.monotonic() > deadline:
            return held
        time.sleep(0.1)


def latencies(wanted: list[tuple[Kind, Manner]], answers: list[Answer]) -> dict[int, Any]:
    """Return percentiles in milliseconds by depth, of those that read all and had no exit."""
    found: dict[int, Any] = {}
    for depth in SHARES:
        read = [
            answer
            for (kind, manner), answer in zip(wanted, answers, strict=True)
            if kind.depth == depth and manner == "reads" and not kind.exit and answer.stamps
        ]
        if not read:
            continue
        values = {
            "first token": [one.stamps[0] for one in read],
            "token": [
                (one.stamps[-1] - one.stamps[0]) / (len(one.stamps) - 1)
                for one in read
                if len(one.stamps) > 1
            ],
            "answer": [one.seconds for one in read],
        }
        found[depth] = {"streams": len(read)} | {
            f"{name} p{share}": 1e3 * percentile(some, share / 100)
            for name, some in values.items()
            for share in (50, 95)
            if some
        }
    return found


def one_round(
    url: str, asked: list[Kind], right: list[Answer], number: int, flags: argparse.Namespace
) -> dict[str, Any]:
    """Let all clients ask once, and return what they saw."""
    draw = random.Random(flags.seed + number)
    manners = [manner for manner, count in MANNERS.items() for _ in range(count)]
    chosen = [(draw.randrange(len(asked)), manners[n % len(manners)]) for n in range(flags.streams)]
    wanted = [(asked[which], manner) for which, manner in chosen]
    start = time.perf_counter()
    answers = asyncio.run(under_load(url, wanted, flags.in_flight, flags.seed + number))
    seconds = time.perf_counter() - start
    verdicts = [
        fault(asked[which], manner, right[which], answer, flags.tie)
        for (which, manner), answer in zip(chosen, answers, strict=True)
    ]
    return {
        "seconds": seconds,
        "streams by manner": dict(Counter(manner for _, manner in wanted)),
        "tokens read": sum(len(one.tokens) for one in answers),
        "refused for a full queue": sum(one.refused for one in answers),
        "ties": sum(verdict == "tie" for verdict in verdicts),
        "faults": [
            f"{kind} {manner}: {verdict}"
            for (kind, manner), verdict in zip(wanted, verdicts, strict=True)
            if verdict not in (None, "tie")
        ],
        "left behind": left_behind(url),
        "milliseconds by depth": latencies(wanted, answers),
    }


def load(url: str, pid: int | None, flags: argparse.Namespace) -> dict[str, Any]:
    """Ask alone, then in rounds under load, and return what was found.

    Raises:
        RuntimeError: A request fails that is alone.
    """
    vocabulary = range(len(SPECIAL), flags.vocabulary)
    asked = kinds(flags.kinds, flags.new_tokens, vocabulary, flags.seed)
    right = asyncio.run(alone(url, asked))
    if broken := [one.error for one in right if one.error]:
        raise RuntimeError(f"a request that is alone fails: {broken[0]}")
    rounds, memory = [], [resident(pid)]
    for number in range(flags.rounds):
        rounds.append(one_round(url, asked, right, number, flags))
        memory.append(resident(pid))
    return {
        "kinds": [asdict(kind) for kind in asked],
        "tokens that took": dict(Counter(depth for one in right for depth in one.recurrences)),
        "rounds": rounds,
        "resident bytes": memory,
    }


def page(facts: dict[str, Any], found: dict[str, Any]) -> str:
    """Write the figures as Markdown."""
    lines = [
        f"`{facts['command']}`, {facts['hardware']}, {facts['date']}.",
        "",
        "| round | seconds | tokens read | queue full | ties | wrong | left behind | resident MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, one in enumerate(found["rounds"], 1):
        size = found["resident bytes"][number]
        held = ", ".join(f"{count:.0f} {what}" for what, count in one["left behind"].items())
        lines.append(
            f"| {number} | {one['seconds']:.1f} | {one['tokens read']} "
            f"| {one['refused for a full queue']} | {one['ties']} | {len(one['faults'])} | {held} "
            f"| {'' if size is None else f'{size / 1e6:.0f}'} |"
        )
    names = ("first token", "token", "answer")
    lines += [
        "",
        "| milliseconds, p50 / p95 | streams | " + " | ".join(names) + " |",
        "|---|---|---|---|---|",
    ]
    for number, one in enumerate(found["rounds"], 1):
        for depth, value in one["milliseconds by depth"].items():
            cells = [f"{value[f'{n} p50']:.0f} / {value[f'{n} p95']:.0f}" for n in names]
            row = f"round {number}, r = {depth} | {value['streams']} | " + " | ".join(cells)
            lines.append(f"| {row} |")
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """Return the flags."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--url", help="a server that runs; one of its own unless given")
    made.add_argument("--pid", type=int, help="its process, whose memory is watched")
    made.add_argument("--vocabulary", type=int, default=98, help="tokens that prompts are made of")
    made.add_argument("--streams", type=int, default=400)
    made.add_argument("--in-flight", type=int, default=400, help="clients at once")
    made.add_argument("--kinds", type=int, default=48, help="requests that differ")
    made.add_argument("--new-tokens", type=int, default=48, help="of the longest answer")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--growth", type=float, default=64.0, help="MB that are no leak")
    made.add_argument("--tie", type=float, default=1e-3, help="nats that are no difference")
    made.add_argument("--max-running", default="64")
    made.add_argument("--max-queue", default="256")
    made.add_argument("--kv-memory", default="32MB", help="so little that prefixes must give way")
    made.add_argument("--log", help="file for what the server says, which goes lost otherwise")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--output-dir", help="directory for the figures, JSON and Markdown")
    return made


def main() -> None:
    """Load, print, write, and fail where something is wrong."""
    flags = parser().parse_args()
    if flags.url:
        found = load(flags.url, flags.pid, flags)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint, log = Path(scratch) / "tiny", Path(flags.log or f"{scratch}/log")
            tiny_checkpoint(checkpoint)
            names = ("max_running", "max_queue", "kv_memory")
            size = [f"--{name.replace('_', '-')}={getattr(flags, name)}" for name in names]
            with server(checkpoint, log, *size) as (url, pid):
                found = load(url, pid, flags)
    record("serve_load", flags, "cpu", found, page)
    if wrong := complaints(found, flags.growth):
        sys.exit("\n".join(wrong))


def complaints(found: dict[str, Any], growth: float) -> list[str]:
    """Return what is not as it should be."""
    wrong = [fault for one in found["rounds"] for fault in one["faults"]][:10]
    if any(count for one in found["rounds"] for count in one["left behind"].values()):
        wrong.append("the server holds something still")
    # The first round finds libraries and caches cold.
    first, last = found["resident bytes"][1], found["resident bytes"][-1]
    if first and last and last - first > 1e6 * growth:
        wrong.append(f"the server has grown by {(last - first) / 1e6:.0f} MB")
    return wrong


if __name__ == "__main__":
    main()
