"""Policy, keys and audit log on disk, and the engines and apps that they govern."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines import make_engine, small
from fake_engine import FakeEngine, Script
from fake_server import OWN, POLICY, shape_of_a_model
from starlette.testclient import TestClient

from conftest import byte_tokenizer
from rondo.flops import Costs, costs_of
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo_govern.audit.log import AuditError
from rondo_govern.audit.reading import verify
from rondo_govern.keys import Keys, add_secret, revoke, text_of
from rondo_serve.api.app import make_app
from rondo_serve.config import ServeConfig
from rondo_serve.engine.engine import Engine
from rondo_serve.governed import Governance, Governed, govern, ruling_of, sheets_of
from rondo_serve.policy import Limits

SHEET: dict[str, Any] = {
    "version": 1,
    "default_tier": "bronze",
    "currency": "EUR",
    "tiers": {
        "bronze": {"default": 2, "cap": 4, "price": 0.1},
        "gold": {"floor": 2, "default": 4, "cap": 8, "price": 0.25},
    },
    "risks": {"casual": {}, "high": {"floor": 3}, "medical": {"floor": 6}},
    "keys": {
        "acme": {"tenant": "acme-corp", "tier": "gold"},
        "press": {"tenant": "acme-corp"},
        "clinic": {"tier": "gold", "risks": ["high"]},
    },
}
TODAY = "2026-11-30"


@dataclass
class Site:
    """A directory with what a server is governed by.

    Attributes:
        folder: Where the files lie.
        keys: What the file of keys holds.
    """

    folder: Path
    keys: Keys = field(default_factory=lambda: Keys({}))

    def __post_init__(self) -> None:
        (self.folder / "tiny").mkdir()
        (self.folder / "tiny" / "config.json").write_text("{}")
        self.rule()

    @property
    def log(self) -> Path:
        return self.folder / "audit.jsonl"

    def rule(self, **changes: Any) -> None:
        """Change the policy."""
        self._write("policy.yaml", json.dumps(SHEET | changes))

    def key(self, name: str, *scopes: Any, expires: str | None = None) -> str:
        """Make a secret of a key."""
        noise = f"noise{len(self.keys.root)}-{name}"
        self.keys, secret = add_secret(
            self.keys, name, noise, scopes or ("generate",), TODAY, expires
        )
        self._write("keys.yaml", text_of(self.keys))
        return secret

    def revoke(self, name: str, number: int | None = None) -> None:
        self.keys = revoke(self.keys, name, number)
        self._write("keys.yaml", text_of(self.keys))

    def records(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Records of the log, whose chain must hold."""
        assert verify(self.log).findings == []
        found = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [record for record in found if kind in (None, record["kind"])]

    def config(self, **settings: Any) -> ServeConfig:
        plain = {
            "model": str(self.folder / "tiny"),
            "policy": str(self.folder / "policy.yaml"),
            "audit": str(self.log),
            "keys": str(self.folder / "keys.yaml") if self.keys.root else None,
        }
        return ServeConfig(**plain | settings)

    def _write(self, name: str, text: str) -> None:
        # Another file in its place: the time of the last change alone may be the same.
        new = self.folder / f"{name}.new"
        new.write_text(text)
        new.replace(self.folder / name)


def governed(
    config: ServeConfig, shape: RecurrentConfig, limits: Limits, costs: Costs
) -> Governance:
    """What `rondo serve` puts together, with files that are looked at whenever they are asked."""
    sheets = sheets_of(config, limits, shape)
    for watched in (sheets[1], sheets[0] and sheets[0].watched):
        if watched is not None:
            watched._every, watched._next, watched._waits = 0.0, 0.0, True
    about = {"dtype": "float64", "device": "cpu"}
    return govern(config, limits, costs, sheets, about)


def engine_of(
    site: Site, model: RecurrentForCausalLM | None = None, texts: bool = False, **settings: Any
) -> tuple[Engine, Governance]:
    """An engine of a tiny model that a site's files govern; its log is left to be closed."""
    model = model or small()
    limits = Limits(default=4, cap=16)
    engine = make_engine(model, limits, **settings)
    governance = governed(site.config(), model.config, limits, engine.costs)
    engine.policy = Governed(governance.governor, ruling_of(model.config), texts)
    return engine, governance


@dataclass
class Served:
    """An app over a fake engine that a site's files govern."""

    site: Site
    app: Any
    governance: Governance
    client: TestClient
    engine: FakeEngine


@contextmanager
def served_of(site: Site, script: Script | None = None, **settings: Any) -> Iterator[Served]:
    config, shape = site.config(**settings), shape_of_a_model()
    governance = governed(config, shape, POLICY, costs_of(small()))
    governor = governance.governor
    policy = Governed(governor, ruling_of(shape), config.audit_texts)
    engine = FakeEngine(policy, script or Script())
    app = make_app(engine, byte_tokenizer(), shape, governance, config)
    try:
        with TestClient(app, base_url=OWN, raise_server_exceptions=False) as client:
            yield Served(site, app, governance, client, engine)
    finally:
        engine.close(0.0)
        if governor.log is not None:
            # A disk that failed is told of here, too.
            with suppress(AuditError):
                governor.log.close()


@contextmanager
def heard_of(logger: str) -> Iterator[list[str]]:
    """What a logger says."""
    told: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    handler = Handler()
    logging.getLogger(logger).addHandler(handler)
    try:
        yield told
    finally:
        logging.getLogger(logger).removeHandler(handler)


def bearer(secret: str, **more: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"} | more
