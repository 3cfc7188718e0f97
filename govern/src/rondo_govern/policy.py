"""What a policy file says: tiers, risk classes, quotas, and what gives way under overload."""

from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator, model_validator

from rondo.config.calibrate import spelled
from rondo.config.generate import Criterion
from rondo_govern.efforts import EFFORTS, Effort, efforts_of
from rondo_govern.sheets import Name, Sheet, read_sheet

Depth = Annotated[int, Field(ge=1, le=10_000)]


def _exact(told: object) -> Decimal:
    # pydantic reads decimals out of texts, too, however strict it is.
    if isinstance(told, bool) or not isinstance(told, int | float | Decimal):
        raise ValueError(f"must be a number, got {told!r}")
    return Decimal(str(told))


# A number as it was written: no share or price is off by what binary rounds.
Exact = Annotated[Decimal, BeforeValidator(_exact)]
SECONDS = {"m": 60, "h": 3600, "d": 86_400}
LONGEST_WINDOW = 31 * SECONDS["d"]


class Quota(Sheet):
    """What a key may spend in each window, which all begin together, counted from 1970 in UTC."""

    window: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}[mhd]$")]
    """How long it is, as 15m, 1h or 1d; 31 days at most."""
    flops: Annotated[float, Field(gt=0)] | None = None
    """FLOPs that are executed in it."""
    tokens: Annotated[int, Field(gt=0)] | None = None
    """Tokens of prompts and answers in it."""

    @property
    def seconds(self) -> int:
        """How long a window is."""
        return int(self.window[:-1]) * SECONDS[self.window[-1]]

    @model_validator(mode="after")
    def _bounds_something(self) -> "Quota":
        if self.flops is None and self.tokens is None:
            raise ValueError("flops, tokens or both must be given")
        if self.seconds > LONGEST_WINDOW:
            raise ValueError(f"a window of {self.window} is longer than 31 days")
        return self


class Tier(Sheet):
    """Depths that are sold together, and their price."""

    floor: Depth = 1
    """Shallowest depth that is given."""
    default: Depth
    """Depth of a request that names none."""
    cap: Depth
    """Deepest that is given."""
    price: Annotated[Exact, Field(ge=0)] = Decimal(0)
    """Price of a million iterations: tokens of prompts and answers times the iterations each
    took."""
    efforts: dict[Effort, Depth] = Field(default_factory=dict)
    """What reasoning_effort stands for; halves and doubles of the default for those that are not
    named."""
    quotas: tuple[Quota, ...] = ()
    """What each key of the tier may spend."""

    @property
    def depths(self) -> dict[str, int]:
        """Depth of each effort."""
        return efforts_of(self.default, self.floor, self.cap) | self.efforts

    @model_validator(mode="after")
    def _in_order(self) -> "Tier":
        if not self.floor <= self.default <= self.cap:
            raise ValueError(
                "floor, default and cap must not fall, got "
                f"{self.floor}, {self.default}, {self.cap}"
            )
        for effort, depth in self.efforts.items():
            if not self.floor <= depth <= self.cap:
                message = f"effort {effort} {depth} lies outside {self.floor} to {self.cap}"
                raise ValueError(message)
        for less, more in pairwise(EFFORTS):
            if self.depths[less] > self.depths[more]:
                raise ValueError(
                    f"effort {more} ({self.depths[more]}) is shallower than {less} "
                    f"({self.depths[less]}): give both"
                )
        return self


class Escalation(Sheet):
    """Answer as deep as was asked, and go deeper while the model is not sure, token by token."""

    rule: Criterion
    """What is read of the loop, as entropy or margin."""
    tolerance: str | None = None
    """The bar, as the relative loss that the checkpoint's calibrated threshold tolerates, as
    0.5%."""
    threshold: Annotated[float, Field(ge=0)] | None = None
    """The bar as a number, in place of a calibrated one."""
    up_to: Depth | None = None
    """Deepest that it goes; the tier's cap unless given."""

    @field_validator("tolerance")
    @classmethod
    def _one_spelling(cls, tolerance: str | None) -> str | None:
        return None if tolerance is None else spelled(tolerance)

    @model_validator(mode="after")
    def _one_bar(self) -> "Escalation":
        if self.tolerance is not None and self.threshold is not None:
            raise ValueError("tolerance names a calibrated threshold: leave it or threshold")
        return self


class Risk(Sheet):
    """A class of decisions, with a minimum depth that no request can lower."""

    floor: Depth = 1
    """Iterations that every token takes at least."""
    escalation: Escalation | None = None
    """When a token goes deeper than was asked; never unless given."""
    about: str = ""
    """What belongs to it, for those who read the file."""


class Overload(Sheet):
    """What gives way when requests wait."""

    waiting: Annotated[int, Field(ge=1)]
    """Requests that found no room, from which on this holds."""
    # pyrefly: ignore[bad-argument-type]
    keep: Annotated[Exact, Field(gt=0, lt=1)]
    """Share of its depth that a request keeps, never below its floor."""


class Holder(Sheet):
    """Who a key is for."""

    tenant: Name | None = None
    """Who pays; the key's own name unless given."""
    tier: Name | None = None
    """The policy's default tier unless given."""
    risks: tuple[Name, ...] = ()
    """Risk classes of everything that is asked with it."""


class Policy(Sheet):
    """A whole policy."""

    version: Annotated[int, Field(ge=1, le=1)]
    """The format's."""
    tiers: Annotated[dict[Name, Tier], Field(min_length=1)]
    """By name."""
    default_tier: Name | None = None
    """Tier of keys that name none, and of everyone where there are no keys; the only one unless
    given."""
    risks: dict[Name, Risk] = Field(default_factory=dict)
    """Risk classes by name."""
    keys: dict[Name, Holder] = Field(default_factory=dict)
    """Keys by name; one that is not named is its own tenant, of the default tier."""
    overload: tuple[Overload, ...] = ()
    """From few waiting requests to many."""
    currency: Annotated[str, Field(max_length=16)] = ""
    """What prices are in, as EUR."""

    @property
    def tier_of_all(self) -> str | None:
        """The tier of who names none, None if there is none."""
        return self.default_tier or (next(iter(self.tiers)) if len(self.tiers) == 1 else None)

    @property
    def cap(self) -> int:
        """The deepest that any tier gives."""
        return max(tier.cap for tier in self.tiers.values())

    @field_validator("overload")
    @classmethod
    def _rising(cls, steps: tuple[Overload, ...]) -> tuple[Overload, ...]:
        for one, next_one in pairwise(steps):
            if not (one.waiting < next_one.waiting and one.keep > next_one.keep):
                raise ValueError("waiting must rise from step to step, and keep must fall")
        return steps

    @model_validator(mode="after")
    def _names_are_known(self) -> "Policy":
        named = {"default_tier": self.default_tier}
        named |= {f"keys.{key}.tier": holder.tier for key, holder in self.keys.items()}
        for where, tier in named.items():
            if tier is not None and tier not in self.tiers:
                there = ", ".join(self.tiers)
                raise ValueError(f"{where} {tier!r} is no tier: there are {there}")
        for key, holder in self.keys.items():
            if unknown := sorted(set(holder.risks) - set(self.risks)):
                there = ", ".join(self.risks) or "none"
                message = f"keys.{key}.risks {unknown[0]!r} is no risk class: there are {there}"
                raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _floors_can_be_kept(self) -> "Policy":
        for name, risk in self.risks.items():
            if risk.floor > self.cap:
                raise ValueError(
                    f"risk {name} needs {risk.floor} iterations, and no tier gives more than "
                    f"{self.cap}"
                )
            deepest = risk.escalation.up_to if risk.escalation else None
            if deepest is not None and deepest < risk.floor:
                raise ValueError(f"risk {name} escalates up to {deepest}, below its own floor")
        for key, holder in self.keys.items():
            tier = holder.tier or self.tier_of_all
            if tier is None:
                raise ValueError(f"keys.{key} names no tier, and there is no default_tier")
            for name in holder.risks:
                if (least := self.risks[name].floor) > (cap := self.tiers[tier].cap):
                    raise ValueError(
                        f"keys.{key} is of risk {name}, which needs {least} iterations, and of "
                        f"tier {tier}, which gives {cap} at most"
                    )
        return self


def read_policy(path: Path) -> tuple[Policy, str]:
    """Read a policy, and return it with the SHA-256 of its bytes.

    Raises:
        UserError: It cannot be read, or does not hold.
    """
    return read_sheet(Policy, path, "policy")
