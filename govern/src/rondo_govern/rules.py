"""What a policy gives a request: one pure function.

For every policy and every case: never below the floor, never above the cap, never less for who asks
for more, and the same answer for the same case.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from rondo_govern.efforts import Effort
from rondo_govern.policy import Escalation, Holder, Policy, Tier

Adjustment = Literal["cap", "floor", "risk", "escalation", "overload"]


class Denied(Exception):
    """What policy, keys or quotas do not allow: one sentence, and how HTTP tells it.

    Attributes:
        status: HTTP status.
        code: One word for it.
        param: The field of the request that it is about.
        retry_after: Seconds after which asking again makes sense.
    """

    def __init__(
        self,
        message: str,
        status: int = 403,
        code: str = "denied",
        param: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after


@dataclass(frozen=True)
class Seat:
    """Whose a request is.

    Attributes:
        key: Name of the key, empty where none is asked for.
        tenant: Who pays.
        tier: Whose depths and quotas hold.
        risks: Risk classes of everything that the key asks.
    """

    key: str = ""
    tenant: str = ""
    tier: str = ""
    risks: frozenset[str] = frozenset()


def seat_of(policy: Policy, key: str) -> Seat:
    """Return whose a request is.

    Args:
        policy: The policy.
        key: Name of the key, empty where none is asked for.

    Raises:
        Denied: The key is of no tier.
    """
    holder = policy.keys.get(key, Holder())
    tier = holder.tier or policy.tier_of_all
    if tier is None:
        who = f"key {key!r}" if key else "a request without a key"
        raise Denied(f"{who} is of no tier: the operator must name one", code="no_tier")
    return Seat(key, holder.tenant or key, tier, frozenset(holder.risks))


@dataclass(frozen=True)
class Case:
    """What is known of a request.

    Attributes:
        tier: Its tier.
        risks: Risk classes that apply, by key, header or metadata.
        num_recurrences: Depth asked for.
        effort: Depth asked for in OpenAI's words, where no number is given.
        waiting: Requests that found no room.
    """

    tier: str
    risks: frozenset[str] = frozenset()
    num_recurrences: int | None = None
    effort: Effort | None = None
    waiting: int = 0


@dataclass(frozen=True)
class Decision:
    """What a request is given.

    Attributes:
        depth: r: no token takes more.
        floor: No token takes less: what tier and risk classes demand; where a class escalates, all
            that was asked for.
        tier: Its tier.
        risks: Risk classes that applied, by name.
        price: Price of a million iterations.
        escalation: What lets a token stop between floor and depth.
        own_exit: Whether the request's own exit may do so instead.
        adjusted: What made the depth another than the one asked for, in order.
    """

    depth: int
    floor: int
    tier: str = ""
    risks: tuple[str, ...] = ()
    price: Decimal = Decimal(0)
    escalation: Escalation | None = None
    own_exit: bool = True
    adjusted: tuple[Adjustment, ...] = ()


def decide(policy: Policy, case: Case) -> Decision:
    """Return what a request is given.

    Raises:
        Denied: There is no such tier or risk class, or the tier is too shallow for the class.
    """
    tier = tier_of(policy, case.tier)
    floors = floors_of(policy, case)
    name, least = max(floors.items(), key=lambda item: item[1], default=("", 1))
    if least > tier.cap:
        raise Denied(
            f"risk class {name} needs {least} iterations, and tier {case.tier} gives {tier.cap} at "
            "most: ask for a deeper tier",
            code="risk_beyond_tier",
        )
    demanded = max(tier.floor, least)
    asked, escalations = asked_of(tier, case), escalations_of(policy, case)
    wanted = max([asked, *(min(one.up_to or tier.cap, tier.cap) for one in escalations)])
    keep = keep_of(policy, case.waiting)

    def bounded(depth: int) -> int:
        return min(max(depth, demanded), tier.cap)

    def kept(depth: int) -> int:
        return max(demanded, math.ceil(keep * bounded(depth)))

    depth = kept(wanted)
    # An escalation adds to an answer: no class makes tokens stop where they would go on without it.
    floor = kept(asked) if escalations else demanded
    found: Mapping[Adjustment, bool] = {
        "escalation": wanted > asked,
        "cap": wanted > tier.cap,
        "floor": wanted < tier.floor,
        "risk": max(wanted, tier.floor) < least,
        "overload": depth < bounded(wanted),
    }
    return Decision(
        depth=depth,
        floor=floor,
        tier=case.tier,
        risks=tuple(sorted(case.risks)),
        price=tier.price,
        # Two bars cannot both be read: then no token stops before the depth.
        escalation=escalations[0] if len(escalations) == 1 and floor < depth else None,
        own_exit=not escalations,
        adjusted=tuple(one for one, holds in found.items() if holds),
    )


def tier_of(policy: Policy, name: str) -> Tier:
    """Return a tier.

    Raises:
        Denied: There is none of that name.
    """
    if name not in policy.tiers:
        raise Denied(f"there is no tier {name!r}: the operator must name one", code="unknown_tier")
    return policy.tiers[name]


def asked_of(tier: Tier, case: Case) -> int:
    """Return the depth that a request stands for, before anything bounds it."""
    if case.num_recurrences is not None:
        return case.num_recurrences
    return tier.depths[case.effort] if case.effort else tier.default


def floors_of(policy: Policy, case: Case) -> dict[str, int]:
    """Return the floors of the risk classes that apply, in the order of their names.

    Raises:
        Denied: A class is not known.
    """
    for name in sorted(case.risks):
        if name not in policy.risks:
            there = ", ".join(policy.risks) or "none"
            raise Denied(
                f"there is no risk class {name[:100]!r}: there are {there}",
                status=400,
                code="unknown_risk",
                param="risk",
            )
    return {name: policy.risks[name].floor for name in sorted(case.risks)}


def escalations_of(policy: Policy, case: Case) -> list[Escalation]:
    """Return the different escalations of the risk classes that apply."""
    found: list[Escalation] = []
    for name in sorted(case.risks):
        one = policy.risks[name].escalation
        if one is not None and one not in found:
            found.append(one)
    return found


def keep_of(policy: Policy, waiting: int) -> Decimal:
    """Return the share of its depth that a request keeps while so many wait."""
    held = (step.keep for step in policy.overload if waiting >= step.waiting)
    return min(held, default=Decimal(1))
