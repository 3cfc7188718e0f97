"""A day of three tenants on one small machine: the governance is real, the model is not.

    python examples/governance/simulate.py --out out/governance

Policy, quotas and audit log are those of `rondo serve`, on a clock that runs ahead. There is no
model and there are no texts: machine.py takes the time that answers would take. README.md tells
what is assumed.
"""

import argparse
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import MIDNIGHT, SLOTS, Clock, Machine, Outcome, Request, bound, work

from rondo_govern.governor import FileRules, Governor, Rules, Want
from rondo_govern.policy import Policy, Quota, Tier, read_policy
from rondo_govern.quotas import Ledger
from rondo_govern.reopening import open_log
from rondo_govern.rules import Case, Decision, Seat, asked_of, floors_of, seat_of
from rondo_govern.watch import Watched

POLICY = Path(__file__).with_name("policy.yaml")
# Nobody asks in the last minutes, so that all is answered on the same day.
DAY = 24 * 3600 - 180
PEAK = range(19, 22)
# Of a text, the chance that an iteration leaves a token in doubt.
MOST_DOUBT = 0.9
# What the machine gives without a policy.
PLAIN = Tier(default=4, cap=16)


@dataclass(frozen=True)
class Caller:
    """What the requests of a key are like.

    Attributes:
        key: Its name.
        hourly: Requests in each hour of the day.
        asks: Depths that are asked for, a number, an effort or None, with their weights.
        patience: Seconds after which an answer is of no use.
        risks: Classes that requests name, with the share of those that do.
        prompt: Fewest and most tokens of a prompt.
        answer: Fewest and most tokens of an answer.
    """

    key: str
    hourly: Sequence[int]
    asks: Mapping[Any, int]
    patience: float
    risks: Mapping[str, float] = field(default_factory=dict)
    prompt: tuple[int, int] = (60, 180)
    answer: tuple[int, int] = (30, 90)


CALLERS = (
    Caller(
        "hospital-ward",
        [20] * 6 + [45] * 3 + [60] * 8 + [45] * 4 + [30] * 3,
        {None: 6, "low": 2, 2: 2},
        patience=90,
    ),
    Caller(
        "hospital-office",
        [2] * 7 + [40] * 10 + [5] * 7,
        {None: 7, "high": 3},
        patience=60,
    ),
    Caller(
        "bank",
        [3] * 8 + [90] * 4 + [60] + [90] * 4 + [25] * 4 + [8] * 3,
        {None: 5, 2: 3, "high": 2},
        patience=60,
        risks={"credit": 0.4},
    ),
    Caller(
        "forum",
        [90, 40, 20, 10, 10, 15] + [40] * 6 + [90] * 4 + [180, 320, 500, 900, 980, 800, 460, 200],
        {16: 5, "max": 2, None: 3},
        patience=45,
        prompt=(40, 160),
        answer=(40, 100),
    ),
)


# ---- the traffic


def traffic(seed: int) -> list[Request]:
    """Return the requests of the day, in order."""
    arrivals = sorted(
        (at, number) for number, caller in enumerate(CALLERS) for at in moments(caller, seed)
    )
    return [drawn(index, at, CALLERS[number], seed) for index, (at, number) in enumerate(arrivals)]


def moments(caller: Caller, seed: int) -> Iterator[float]:
    """Yield when a caller asks, independently of when it asked before."""
    draw = random.Random(f"{seed}/{caller.key}")
    at = 0.0
    while (at := at + draw.expovariate(caller.hourly[int(at // 3600)] / 3600)) < DAY:
        yield at


def drawn(index: int, at: float, caller: Caller, seed: int) -> Request:
    """Return one request; it is the same whatever becomes of the others."""
    draw = random.Random(f"{seed}/{index}")
    doubt = draw.uniform(0, MOST_DOUBT)
    return Request(
        id=f"chatcmpl-{index:05d}",
        key=caller.key,
        at=at,
        patience=caller.patience,
        prompt_tokens=draw.randint(*caller.prompt),
        ask=draw.choices([*caller.asks], [*caller.asks.values()])[0],
        risks=frozenset(risk for risk, share in caller.risks.items() if draw.random() < share),
        sure_after=[sure(draw, doubt) for _ in range(draw.randint(*caller.answer))],
    )


def sure(draw: random.Random, doubt: float) -> int:
    """Return after how many iterations a token is sure, if each leaves it in doubt by chance."""
    iterations = 1
    while draw.random() < doubt:
        iterations += 1
    return iterations


# ---- the three days


class Plain:
    """No policy: whoever asks for a depth is given it."""

    sha256 = None

    def give(self, want: Want) -> tuple[Seat, Decision, Sequence[Quota]]:
        """Return whose a request is, what it is given, and no quotas."""
        asked = asked_of(PLAIN, Case("", frozenset(), want.num_recurrences, want.effort))
        return Seat(want.key, want.key), Decision(min(asked, PLAIN.cap), 1), ()


def without_overload(path: Path) -> tuple[Policy, str]:
    """Read a policy, and leave out what gives way when requests wait."""
    policy, sha256 = read_policy(path)
    return policy.model_copy(update={"overload": ()}), sha256


def watched(load: Callable[[Path], tuple[Policy, str]]) -> Rules:
    """Return the rules of the policy file."""
    return FileRules(Watched(POLICY, load, print))


def day(requests: Sequence[Request], rules: Rules, log: Path | None = None) -> list[Outcome]:
    """Let the day pass under some rules, and record it in a log, if one is named."""
    clock = Clock()
    ledger = Ledger(clock)
    opened = {
        "format": 1,
        "server": "simulate.py",
        "model": "SmolLM2-135M, 12-6-12, simulated",
        "model_sha256": "0" * 64,
        "policy_sha256": rules.sha256,
        "dtype": "no weights",
        "device": "a simulated machine",
        "currency": "EUR",
    }
    how: dict[str, Any] = {"fsync": "off", "clock": clock}
    audit = None if log is None else open_log(log, ledger, MIDNIGHT, opened, **how)
    governor = Governor(rules, bound, ledger, audit, opened["model_sha256"])
    outcomes = Machine(governor, clock).run(requests)
    governor.close()
    return outcomes


# ---- what the policy changed


def summary(
    policy: Policy, requests: Sequence[Request], days: Mapping[str, Sequence[Outcome]]
) -> Iterator[str]:
    """Yield lines that hold the days against each other."""
    tenant_of = {caller.key: seat_of(policy, caller.key).tenant for caller in CALLERS}
    groups: dict[str, Callable[[Request], bool]] = {
        tenant: lambda request, own=tenant: tenant_of[request.key] == own
        for tenant in dict.fromkeys(tenant_of.values())
    }
    groups |= {"all": lambda request: True, "all, 19 to 22 h": at_peak}
    yield line("answered in time", days)
    for name, chosen in groups.items():
        found = ([one for one in ends if chosen(one.request)] for ends in days.values())
        yield line(f"  {name}", map(answered_of, found))
    broken = [sum(below_floor(policy, one) for one in ends) for ends in days.values()]
    yield line("answers below their class's floor", [f"{count:,}" for count in broken])
    asked = sum(seconds_of(request) for request in requests if at_peak(request))
    share = asked / (SLOTS * 3600 * len(PEAK))
    yield f"at the depths asked for, 19 to 22 h is {share:.2f} of what the machine can compute"


def at_peak(request: Request) -> bool:
    """Return whether a request comes in the busiest hours."""
    return request.at // 3600 in PEAK


def seconds_of(request: Request) -> float:
    """Return how long a slot takes for the depth that is asked for."""
    _, decision, _ = Plain().give(request.want(0))
    return work(request, decision, math.inf)[0]


def line(name: str, cells: Iterable[str]) -> str:
    """Return a line of the table."""
    return f"{name:<34}" + "".join(f"{cell:>26}" for cell in cells)


def answered_of(outcomes: Sequence[Outcome]) -> str:
    """Return how many were answered to the end."""
    answered = sum(one.reason == "length" for one in outcomes)
    return f"{answered:,} of {len(outcomes):,} ({answered / len(outcomes):.1%})"


def below_floor(policy: Policy, outcome: Outcome) -> bool:
    """Return whether a token took fewer iterations than a risk class needs."""
    risks = seat_of(policy, outcome.request.key).risks | outcome.request.risks
    floors = floors_of(policy, Case("", risks))
    return any(depth < max(floors.values(), default=1) for depth in outcome.depths)


def main() -> None:
    """Let the day pass three times, the last time with the policy and its log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the log, made")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    log = flags.out / "audit.jsonl"
    if log.exists():
        parser.error(f"{log} is there already: name another folder")
    requests = traffic(flags.seed)
    days = {
        "no policy": day(requests, Plain()),
        "policy without overload": day(requests, watched(without_overload)),
        "policy": day(requests, watched(read_policy), log),
    }
    print(*summary(read_policy(POLICY)[0], requests, days), sep="\n")


if __name__ == "__main__":
    main()
