"""`rondo policy check` and `rondo policy explain`: what a policy gives whom, and why."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pydantic

from rondo.config import explain
from rondo.errors import UserError
from rondo_govern.efforts import EFFORTS
from rondo_govern.policy import Escalation, Policy, Quota, read_policy
from rondo_govern.rules import (
    Case,
    Decision,
    Denied,
    Seat,
    asked_of,
    decide,
    floors_of,
    keep_of,
    seat_of,
    tier_of,
)
from rondo_govern.settings import PolicyCheckConfig, PolicyExplainConfig
from rondo_govern.tables import aligned


class Shape(pydantic.BaseModel):
    """What a checkpoint's config.json says of depth."""

    model_type: Literal["rondo"]
    max_recurrences: int
    exit_rules: dict[str, dict[str, Any]] | None = None
    exit_gate: bool = False


def run_check(config: PolicyCheckConfig) -> None:
    """Tell whether a policy holds, and what it gives whom.

    Raises:
        UserError: It does not hold, or not for the model.
    """
    policy, sha256 = read_policy(Path(config.policy))
    if config.model is not None:
        shape = read_shape(Path(config.model))
        check_model(policy, shape.max_recurrences, shape.exit_rules or {}, shape.exit_gate)
    against = "" if config.model is None else f" for {config.model}"
    print(f"{config.policy} holds{against}\nSHA-256 {sha256}")
    for title, rows in tables(policy).items():
        if len(rows) > 1:
            print("\n".join(["", title, *aligned(rows)]))
    for warning in warnings(policy):
        print(f"\nwarning: {warning}")


def read_shape(model: Path) -> Shape:
    """Read a checkpoint's config.json.

    Raises:
        UserError: It cannot be read, or is not that of a recurrent model.
    """
    try:
        return Shape.model_validate_json((model / "config.json").read_bytes())
    except OSError as error:
        raise UserError(f"cannot read config.json of {model}: {error.strerror}") from error
    except pydantic.ValidationError as error:
        raise UserError(f"{model} is no recurrent model: {explain(error)}") from error


def check_model(
    policy: Policy,
    max_recurrences: int,
    exit_rules: Mapping[str, Mapping[str, Any]],
    exit_gate: bool,
) -> None:
    """Hold a policy against the model that is to keep it.

    Args:
        policy: The policy.
        max_recurrences: Deepest that the model goes.
        exit_rules: Its calibrated exits: by criterion, then by tolerance.
        exit_gate: Whether it has a gate among its exits.

    Raises:
        UserError: A tier gives more, or a class escalates by what the model does not have.
    """
    for name, tier in policy.tiers.items():
        if tier.cap > max_recurrences:
            raise UserError(
                f"tier {name} goes up to {tier.cap} iterations, beyond the cap of "
                f"{max_recurrences}: lower the tier's"
            )
    for name, risk in policy.risks.items():
        if (one := risk.escalation) is None:
            continue
        if one.rule == "gate" and not exit_gate:
            raise UserError(
                f"risk {name} escalates by the gate, and the model has none: name another rule"
            )
        there = list(exit_rules.get(one.rule, {}))
        found = there if one.tolerance is None else [it for it in there if it == one.tolerance]
        if one.threshold is None and len(found) != 1:
            raise UserError(
                f"risk {name} escalates by {one.rule} calibrated to {one.tolerance or 'one loss'}, "
                f"and the model's is calibrated to {', '.join(there) or 'none'}: name another "
                "tolerance or a threshold, or run rondo calibrate"
            )


def tables(policy: Policy) -> dict[str, list[Sequence[object]]]:
    """Return what a policy gives whom: by title, rows that begin with their header."""
    tiers, unit = policy.tiers, f" {policy.currency}".rstrip()
    return {
        f"Tiers, price{unit} per million iterations": [
            ("tier", "floor", "default", "cap", "price", *EFFORTS),
            *((name, one.floor, one.default, one.cap, one.price,
               *(one.depths[effort] for effort in EFFORTS))
              for name, one in tiers.items()),
        ],
        "Quotas of each key": [
            ("tier", "window", "at most"),
            *((name, one.window, bounds_of(one)) for name in tiers for one in tiers[name].quotas),
        ],
        "Risk classes, and the iterations that tiers give them": [
            ("risk", *tiers, "escalates"),
            *((name, *(span(policy, name, tier) for tier in tiers), bar_of(risk.escalation))
              for name, risk in policy.risks.items()),
        ],
        "Keys": [
            ("key", "tenant", "tier", "risks"),
            *((key, seat.tenant, seat.tier, ", ".join(sorted(seat.risks)) or "-")
              for key in policy.keys for seat in [seat_of(policy, key)]),
        ],
        "Overload, and what becomes of the default depths": [
            ("waiting", "keep", *tiers),
            *((step.waiting, step.keep,
               *(decide(policy, Case(tier, waiting=step.waiting)).depth for tier in tiers))
              for step in policy.overload),
        ],
    }  # fmt: skip


def span(policy: Policy, risk: str, tier: str) -> str:
    """Return from where to where a tier serves a risk class."""
    least, most = (Case(tier, frozenset({risk}), depth) for depth in (1, policy.tiers[tier].cap))
    try:
        return f"{decide(policy, least).floor} to {decide(policy, most).depth}"
    except Denied:
        return f"refused, gives {policy.tiers[tier].cap}"


def bounds_of(quota: Quota) -> str:
    """Return what a quota bounds."""
    flops = [] if quota.flops is None else [f"{quota.flops:g} FLOPs".replace("e+", "e")]
    tokens = [] if quota.tokens is None else [f"{quota.tokens:,} tokens"]
    return " and ".join(flops + tokens)


def bar_of(escalation: Escalation | None) -> str:
    """Return until when a token goes on, and how far."""
    if escalation is None:
        return "-"
    bar = f"below {escalation.threshold:g}" if escalation.threshold is not None else "as calibrated"
    if escalation.tolerance is not None:
        bar += f" to {escalation.tolerance}"
    return f"until {escalation.rule} is {bar}, up to {escalation.up_to or 'the cap'}"


def warnings(policy: Policy) -> Iterator[str]:
    """Yield what is allowed, and surely not meant."""
    default = policy.tier_of_all
    used = {default, *(seat_of(policy, key).tier for key in policy.keys)}
    for name in policy.tiers:
        if name not in used:
            yield f"tier {name} is nobody's: no key names it, and it is not the default"
    if default is None:
        yield "there is no default_tier: keys that are not named here are refused"
    shallowest = min(tier.floor for tier in policy.tiers.values())
    for name, risk in policy.risks.items():
        if risk.escalation is None and risk.floor <= shallowest:
            yield f"risk {name} changes nothing: every tier's floor is as deep"
    for step in policy.overload:
        if not any(gives_way(policy, tier, step.waiting) for tier in policy.tiers):
            yield f"overload from {step.waiting} waiting on changes nothing, whatever is asked"


def gives_way(policy: Policy, tier: str, waiting: int) -> bool:
    """Return whether any depth of a tier falls when so many wait, and not when one fewer does."""
    cases = [
        Case(tier, num_recurrences=depth, waiting=waiting)
        for depth in range(policy.tiers[tier].cap, 0, -1)
    ]
    return any(
        decide(policy, case).depth < decide(policy, replace(case, waiting=waiting - 1)).depth
        for case in cases
    )


def run_explain(config: PolicyExplainConfig) -> None:
    """Tell what a policy gives a request, and why.

    Raises:
        UserError: The policy does not hold, or gives the request nothing.
    """
    policy, sha256 = read_policy(Path(config.policy))
    try:
        told = explained(policy, config)
    except Denied as error:
        raise UserError(f"refused, status {error.status} {error.code}: {error}") from error
    if config.json_output:
        print(json.dumps(told | {"policy_sha256": sha256}, indent=1))
    else:
        print("\n".join(told["steps"]))


def explained(policy: Policy, config: PolicyExplainConfig) -> dict[str, Any]:
    """Return what a policy gives a request, as JSON takes it.

    Raises:
        Denied: It gives nothing.
    """
    # A tier that is named does for a key that has none.
    tierless = config.tier is not None and config.key not in policy.keys
    seat = Seat(config.key, config.key) if tierless else seat_of(policy, config.key)
    tier, risks = config.tier or seat.tier, seat.risks | set(config.risk)
    case = Case(tier, risks, config.num_recurrences, config.effort, config.waiting)
    decision = decide(policy, case)
    escalation = decision.escalation
    return {
        "key": seat.key,
        "tenant": seat.tenant,
        "tier": decision.tier,
        "risks": list(decision.risks),
        "asked": case.num_recurrences,
        "effort": case.effort,
        "waiting": case.waiting,
        "allowed": decision.depth,
        "floor": decision.floor,
        "adjusted": list(decision.adjusted),
        "escalation": None if escalation is None else escalation.model_dump(),
        "own_exit": decision.own_exit,
        "price": format(decision.price, "f"),
        "currency": policy.currency,
        "steps": [*steps_of(policy, seat, case), *given_of(policy, decision)],
    }


def steps_of(policy: Policy, seat: Seat, case: Case) -> Iterator[str]:
    """Yield what bears on a request, in the order in which it is weighed."""
    tier = tier_of(policy, case.tier)
    if seat.key:
        unnamed = "" if seat.key in policy.keys else ", not named in the policy"
        yield f"key {seat.key}: tenant {seat.tenant}{unnamed}"
    how = "nothing, so the default"
    if case.num_recurrences is not None:
        how = "num_recurrences"
    elif case.effort is not None:
        how = f"effort {case.effort}"
    yield f"asked: {asked_of(tier, case)} ({how})"
    for name, floor in floors_of(policy, case).items():
        by = ", by the key" if name in seat.risks else ""
        yield f"risk {name}{by}: at least {floor}"
        if (escalation := policy.risks[name].escalation) is not None:
            yield f"risk {name}: deeper than asked {bar_of(escalation)}"
    yield f"tier {case.tier}: {tier.floor} to {tier.cap}"
    if case.waiting:
        alone, here = decide(policy, replace(case, waiting=0)), decide(policy, case)
        becomes = f"{alone.depth} becomes {here.depth}" if here != alone else "nothing changes"
        yield f"queue of {case.waiting}: keeps {keep_of(policy, case.waiting)}, {becomes}"


def given_of(policy: Policy, decision: Decision) -> Iterator[str]:
    """Yield what a request is given."""
    price = f"{decision.price:f} {policy.currency}".rstrip()
    yield (
        f"given: depth {decision.depth}, floor {decision.floor}, price {price} per million "
        "iterations"
    )
    if decision.escalation is not None:
        yield "exit: the risk class's, from the floor on; the request's own is not taken"
    elif decision.own_exit:
        yield "exit: the request's own, from the floor on"
    else:
        yield "exit: none, every token takes the whole depth"
    if decision.adjusted:
        yield f"adjusted: {', '.join(decision.adjusted)}"
