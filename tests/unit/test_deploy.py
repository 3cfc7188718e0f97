"""What ships for operators, held against the command line, the routes and the metrics there are."""

import configparser
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi import FastAPI
from prometheus_client.metrics_core import Metric

from rondo import config
from rondo.cli import commands
from rondo_serve.api.app import route_operation
from rondo_serve.api.metrics import Metrics
from rondo_serve.governed import Governance
from rondo_serve.policy import Limits
from rondo_serve.requests import Load
from rondo_serve.serve import LAST_SECONDS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
SERVICES: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))[
    "services"
]
# Those that run the image of ours.
OURS = [name for name, service in SERVICES.items() if service.get("image") == "rondo:0.1.0"]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, each with the rest of its line."""
    whole = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    lines = [line.split(maxsplit=1) for line in whole.splitlines() if line.strip()]
    return [(name, rest) for name, rest in lines]


def last(name: str) -> str:
    """The rest of the last instruction of a name."""
    return [rest for one, rest in instructions() if one == name][-1]


def settings_of(words: list[str]) -> Any:
    """The settings that a command line amounts to; a flag that does not exist ends the test."""
    program, verb, *flags = words
    assert program.rpartition("/")[2] == "rondo"
    return config.parse(commands()[verb][0], flags, prog=f"rondo {verb}")


def ended(settings: Any) -> float:
    """Seconds until a server has ended by itself: its answers, readers, uvicorn's own patience."""
    return settings.grace_seconds + 2 * LAST_SECONDS


def filled(text: str) -> str:
    """A text of the compose file with its variables at their defaults."""
    return re.sub(r"\$\{\w+:\?[^}]*\}", "/srv/model", re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))


def command_of(name: str) -> list[str]:
    service = SERVICES[name]
    words = service.get("entrypoint", json.loads(last("ENTRYPOINT"))) + service.get("command", [])
    return [filled(word) for word in words]


def mounts_of(name: str) -> dict[str, str]:
    """Source by target, `:ro` kept with the source."""
    found = {}
    for volume in SERVICES[name]["volumes"]:
        source, target, *mode = filled(volume).split(":")
        found[target] = ":".join([source, *mode])
    return found


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    parser.optionxform = str
    text = (DEPLOY / "rondo.service").read_text(encoding="utf-8")
    parser.read_string(re.sub(r"\\\n\s*", "", text))
    return parser


def test_the_image_is_run_by_a_number_that_is_not_root() -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last("USER"))


def test_the_image_starts_rondo_without_a_shell_and_listens_for_others() -> None:
    settings = settings_of(json.loads(last("ENTRYPOINT")))
    assert (settings.model, settings.host) == ("/model", "0.0.0.0")
    assert last("EXPOSE") == str(settings.port)


def test_the_health_check_asks_what_the_server_answers() -> None:
    *_, code = json.loads(last("HEALTHCHECK").partition("CMD ")[2])
    compile(code, "healthcheck", "exec")
    port, path = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", code)[0]
    app: Any = FastAPI()
    route_operation(app, None)
    assert path in {route.path for route in app.routes}
    assert port == last("EXPOSE")


def test_the_image_fetches_nothing_while_it_runs() -> None:
    assert "HF_HUB_OFFLINE=1" in last("ENV").split()


def test_what_the_image_copies_is_there() -> None:
    copied = [rest.split()[:-1] for one, rest in instructions() if one == "COPY"]
    own = [name for names in copied for name in names if not names[0].startswith("--from")]
    assert own
    assert [name for name in own if not (ROOT / name).exists()] == []


def test_the_image_builds_every_distribution_that_the_server_stands_on() -> None:
    wheel = next(rest for one, rest in instructions() if "pip wheel" in rest)
    built = [word for word in wheel.partition("&&")[0].split() if word.startswith(".")]
    projects = [
        tomllib.loads((ROOT / name / "pyproject.toml").read_text())["project"] for name in built
    ]
    needed = {name for one in projects for name in one["dependencies"] if name.startswith("rondo")}
    assert needed <= {one["name"] for one in projects}
    assert "rondo-serve" in {one["name"] for one in projects}


@pytest.mark.parametrize("name", OURS)
def test_a_service_is_locked_in(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"mem_limit", "cpus", "pids_limit"} <= set(service)
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


@pytest.mark.parametrize("name", OURS)
def test_a_service_is_waited_for_and_has_descriptors_enough(name: str) -> None:
    settings = settings_of(command_of(name))
    assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) > ended(settings)
    assert SERVICES[name]["ulimits"]["nofile"] > settings.max_connections


@pytest.mark.parametrize("name", OURS)
def test_a_service_listens_where_it_is_asked(name: str) -> None:
    settings = settings_of(command_of(name))
    assert (settings.host, str(settings.port)) == ("0.0.0.0", last("EXPOSE"))
    assert [port.split(":")[-1] for port in SERVICES[name]["ports"]] == [str(settings.port)]


@pytest.mark.parametrize("name", OURS)
def test_a_service_finds_its_files_where_they_are_mounted(name: str) -> None:
    settings, mounts = settings_of(command_of(name)), mounts_of(name)
    assert mounts[settings.model].endswith(":ro")
    for path in (settings.policy, settings.keys):
        # The folder: a mount of the file would not show its successor.
        assert mounts[str(Path(path).parent)] == "./etc:ro"
        assert path not in mounts
    volume = mounts[str(Path(settings.audit).parent)]
    assert not volume.endswith(":ro")
    assert str(Path(settings.audit).parent) == last("VOLUME")


def test_no_two_services_write_one_log() -> None:
    volumes = [mounts_of(name)["/var/lib/rondo"] for name in OURS]
    assert len(set(volumes)) == len(volumes) == 2


def test_vllm_is_reached_through_the_gateway_only() -> None:
    assert "ports" not in SERVICES["vllm"]
    assert SERVICES["vllm"]["networks"] == ["inside"]
    assert settings_of(command_of("gateway")).upstream == "http://vllm:8000"


def test_the_unit_runs_a_command_that_there_is() -> None:
    service = unit()["Service"]
    settings = settings_of(shlex.split(service["ExecStart"]))
    assert Path(settings.audit).parent == Path("/var/lib") / service["StateDirectory"]
    assert Path(settings.policy).parent == Path("/etc") / service["ConfigurationDirectory"]
    assert Path(settings.keys).parent == Path("/etc") / service["ConfigurationDirectory"]


def test_the_unit_drains_before_it_is_killed_and_does_not_retry_a_mistake() -> None:
    service = unit()["Service"]
    settings = settings_of(shlex.split(service["ExecStart"]))
    assert int(service["TimeoutStopSec"]) > ended(settings)
    assert (service["KillMode"], service["KillSignal"]) == ("mixed", "SIGTERM")
    assert (service["Restart"], service["RestartPreventExitStatus"]) == ("on-failure", "2")
    assert int(service["LimitNOFILE"]) > settings.max_connections


def test_the_unit_is_locked_in() -> None:
    service = unit()["Service"]
    assert service["User"] not in ("root", "0")
    assert service["CapabilityBoundingSet"] == ""
    assert {service[name] for name in ("NoNewPrivileges", "ProtectHome", "PrivateTmp")} == {"yes"}
    assert service["ProtectSystem"] == "strict"
    # oneDNN could not write its code, and the free memory could not be read.
    assert not {"MemoryDenyWriteExecute", "ProcSubset"} & set(service)


def names_of(metric: Metric) -> set[str]:
    """What Prometheus calls the series of a metric."""
    ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    return {metric.name + end for end in ends.get(metric.type, [""])}


class Idle:
    """An engine as metrics see it."""

    def load(self) -> Load:
        return Load(total_pages=1)


def test_alerts_and_tables_name_metrics_that_there_are() -> None:
    page = (ROOT / "docs" / "guides" / "operations.md").read_text(encoding="utf-8")
    rules = yaml.safe_load(re.findall(r"```yaml\n(groups:.*?)```", page, re.DOTALL)[0])
    expressions = [rule["expr"] for rule in rules["groups"][0]["rules"]]
    expressions += re.findall(r"```promql\n(.*?)```", page, re.DOTALL)
    expressions += re.findall(r"`([^`\n]*rate\([^`\n]*)`", page)
    named = {name for one in expressions for name in re.findall(r"\brondo_\w+", one)}
    metrics: Any = Metrics(Idle(), Governance.plain(Limits(4, 16)))
    there = {name for metric in metrics.registry.collect() for name in names_of(metric)}
    assert len(named) > 8
    assert named <= there
