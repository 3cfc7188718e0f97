"""What a policy's overload steps are worth: twice the load that can be borne, with and without.

    OMP_NUM_THREADS=1 python benchmarks/serve_overload.py --output-dir results/...

`rondo serve` of random weights under one policy, once as it is and once without its overload steps.
How many requests a second it bears is measured first, without them: what it answers with all places
taken. Then requests come at random moments (a Poisson process), twice as many, whether others have
been answered or not, as real ones do. Each has a deadline: a multiple of the time that an answer
takes at half the load that can be borne. A request that is refused, or late, is not answered. Some
are of a risk class, whose floor must hold whatever happens: each of their tokens is looked at.
Settings take turns, every second round backwards.
"""

import argparse
import asyncio
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml
from loopback import server, tiny_checkpoint
from tqdm import tqdm
from traffic import percentile, ranged, record, spread, table

POLICY: dict[str, Any] = {
    "version": 1,
    "tiers": {"all": {"default": 8, "cap": 16, "price": 1}},
    "risks": {"high": {"floor": 6}},
    "overload": [
        {"waiting": 4, "keep": 0.5},
        {"waiting": 8, "keep": 0.25},
        {"waiting": 16, "keep": 0.125},
    ],
}
FLOOR = POLICY["risks"]["high"]["floor"]
SETTINGS = ("with", "without")


@dataclass
class Outcome:
    """What became of a request.

    Attributes:
        is_high: Whether it is of the risk class.
        status: Of the answer.
        seconds: From asking to the answer.
        recurrence: What the answer says it took.
    """

    is_high: bool
    status: int = 0
    seconds: float = 0.0
    recurrence: dict[str, Any] = field(default_factory=dict)

    @property
    def shallowest(self) -> int:
        """The fewest iterations that a token took."""
        return min(map(int, self.recurrence["by_depth"]))


async def ask(client: httpx.AsyncClient, draw: random.Random, flags: Any) -> Outcome:
    """Ask for a text."""
    outcome = Outcome(draw.random() < flags.high)
    prompt = "".join(chr(draw.randint(65, 90)) for _ in range(flags.prompt_tokens))
    body = {"prompt": prompt, "max_tokens": flags.new_tokens, "temperature": 0}
    headers = {"x-rondo-risk": "high"} if outcome.is_high else {}
    start = time.perf_counter()
    response = await client.post("/v1/completions", json=body, headers=headers)
    outcome.seconds, outcome.status = time.perf_counter() - start, response.status_code
    if outcome.status == 200:
        outcome.recurrence = response.json()["recurrence"]
    return outcome


def client_of(url: str) -> httpx.AsyncClient:
    """Return a client that takes as many connections as it likes."""
    return httpx.AsyncClient(
        base_url=url, trust_env=False, timeout=600, limits=httpx.Limits(max_connections=None)
    )


async def open_loop(url: str, rate: float, seconds: float, seed: int, flags: Any) -> list[Outcome]:
    """Let requests come at a rate, whether others have been answered or not."""
    draw, coming = random.Random(seed), []
    async with client_of(url) as client:
        start = now = time.perf_counter()
        while (now := now + draw.expovariate(rate)) < start + seconds:
            await asyncio.sleep(max(0.0, now - time.perf_counter()))
            own = random.Random(draw.random())
            coming.append(asyncio.create_task(ask(client, own, flags)))
        return await asyncio.gather(*coming)


async def closed_loop(url: str, seconds: float, seed: int, flags: Any) -> float:
    """Return the requests a second that are answered with all places taken."""
    done = 0
    async with client_of(url) as client:
        until = time.perf_counter() + seconds

        async def one(number: int) -> None:
            nonlocal done
            draw = random.Random(f"{seed} {number}")
            while time.perf_counter() < until:
                await ask(client, draw, flags)
                done += time.perf_counter() < until

        await asyncio.gather(*(one(number) for number in range(flags.max_running)))
    return done / seconds


def summary(outcomes: list[Outcome], deadline: float) -> dict[str, Any]:
    """Return the figures of one round."""
    answered = [one for one in outcomes if one.status == 200]
    high = [one for one in answered if one.is_high]
    return {
        "requests": len(outcomes),
        "in time": sum(one.seconds <= deadline for one in answered),
        "late": sum(one.seconds > deadline for one in answered),
        "refused": sum(one.status == 429 for one in outcomes),
        "failed": sum(one.status not in (200, 429) for one in outcomes),
        "median seconds": statistics.median(one.seconds for one in answered),
        "p95 seconds": percentile([one.seconds for one in answered], 0.95),
        "mean depth": statistics.mean(one.recurrence["mean"] for one in answered),
        "lowered": sum("overload" in one.recurrence["adjusted"] for one in answered),
        "high answered": len(high),
        "high below floor": sum(one.shallowest < FLOOR for one in high),
        "high asked": sum(one.is_high for one in outcomes),
    }


def load(checkpoint: Path, scratch: Path, flags: Any) -> dict[str, Any]:
    """Measure both settings in turns."""
    rounds: list[dict[str, Any]] = []
    rate = deadline = 0.0
    for number, name in tqdm(list(turns(flags.rounds)), desc="rounds"):
        policy, log = scratch / f"{name}.yaml", scratch / f"{name}-{number}.jsonl"
        steps = POLICY if name == "with" else {**POLICY, "overload": []}
        policy.write_text(yaml.safe_dump(steps), encoding="utf-8")
        queue = flags.max_queue if name == "with" else flags.queue_without or flags.max_queue
        size = [f"--max-running={flags.max_running}", f"--max-queue={queue}"]
        files = [f"--policy={policy}", f"--audit={log}"]
        with server(checkpoint, scratch / "log", *size, *files) as (url, _):
            if not rate:
                asyncio.run(closed_loop(url, flags.seconds / 4, 0, flags))
                rate = asyncio.run(closed_loop(url, flags.seconds, 1, flags))
                calm = asyncio.run(open_loop(url, rate / 2, flags.seconds / 2, 2, flags))
                deadline = flags.patience * statistics.median(one.seconds for one in calm)
            seed = flags.seed + number
            outcomes = asyncio.run(
                open_loop(url, flags.overload * rate, flags.seconds, seed, flags)
            )
        verdict = subprocess.run([sys.executable, "-m", "rondo", "audit", "verify", str(log)])
        found = {"setting": name, "log holds": verdict.returncode == 0}
        rounds.append(found | summary(outcomes, deadline))
    return {"sustained a second": rate, "deadline seconds": deadline, "rounds": rounds}


def turns(rounds: int) -> Iterator[tuple[int, str]]:
    """Yield rounds and settings in turns. The first finds out what can be borne, without steps."""
    for number in range(rounds):
        for name in SETTINGS if number % 2 else SETTINGS[::-1]:
            yield number, name


def page(facts: dict[str, Any], found: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    by_setting = {
        name: [one for one in found["rounds"] if one["setting"] == name] for name in SETTINGS
    }
    ratios = spread(
        [
            on["in time"] / max(1, off["in time"])
            for on, off in zip(*(by_setting[name] for name in SETTINGS), strict=True)
        ]
    )
    rows = {
        name: {
            key: ranged(spread([float(one[key]) for one in rounds]))
            for key in by_setting["with"][0]
            if key not in ("setting", "log holds")
        }
        for name, rounds in by_setting.items()
    }
    whole = all(one["log holds"] for one in found["rounds"])
    lines = [
        "# Overload",
        f"`{facts['command']}`",
        "",
        f"{facts['hardware']}, {facts['date']}, commit {facts['git']}.",
        "",
        f"Borne without overload steps: {found['sustained a second']:.2f} requests a second; asked "
        f"{facts['arguments']['overload']:g} times as many. Deadline "
        f"{found['deadline seconds']:.2f} s.",
        "",
        f"**Answered in time, with steps against without: {ranged(ratios)} times.** Audit logs "
        f"{'all whole' if whole else 'NOT whole'}.",
        "",
        *table(rows, "overload steps"),
        "",
    ]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the flags."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--sizes", type=int, nargs=3, default=(2, 4, 2), help="of a random model")
    made.add_argument("--width", type=int, default=384)
    made.add_argument("--overload", type=float, default=2.0, help="times what can be borne")
    made.add_argument("--patience", type=float, default=3.0, help="times an answer's usual time")
    made.add_argument("--high", type=float, default=0.2, help="share of the risk class")
    made.add_argument("--prompt-tokens", type=int, default=24)
    made.add_argument("--new-tokens", type=int, default=16)
    made.add_argument("--max-running", type=int, default=16)
    made.add_argument("--max-queue", type=int, default=64)
    made.add_argument("--queue-without", type=int, help="without steps, where it is another")
    made.add_argument("--seconds", type=float, default=40.0, help="of a round")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--output-dir", help="directory for the figures, JSON and Markdown")
    return made


def main() -> None:
    """Measure, print, write, and fail where a floor was broken."""
    flags = parser().parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "random"
        tiny_checkpoint(checkpoint, flags.seed, tuple(flags.sizes), flags.width)
        found = load(checkpoint, Path(scratch), flags)
    record("serve_overload", flags, "cpu", found, page)
    if broken := sum(one["high below floor"] for one in found["rounds"]):
        sys.exit(f"{broken} answers of the risk class were below its floor")


if __name__ == "__main__":
    main()
