"""The page of an audit log: its numbers, what it does with hostile names, and how it looks."""

import itertools
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rondo.errors import ProofError, UserError
from rondo_govern.audit.drawing import columns, round_up, short
from rondo_govern.audit.log import AuditLog
from rondo_govern.audit.page import ALL, OTHERS, run_report
from rondo_govern.audit.reading import read
from rondo_govern.audit.usage import usage
from rondo_govern.settings import AuditReportConfig

START = 1_796_000_000.0  # 2026-11-30 00:53:20 UTC
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPENED = {"server": "rondo-serve 0.1.0", "model": "out/final", "model_sha256": "ab" * 32}
OPENED |= {"policy_sha256": None, "dtype": "float32", "device": "cpu", "currency": "EUR"}


def ended(tenant: str = "acme", depths: dict[int, int] | None = None, **own: Any) -> dict[str, Any]:
    """Return the fields of the end of an answer; the prompt has ten tokens."""
    depths = {4: 5} if depths is None else depths
    record: dict[str, Any] = {"kind": "ended", "id": "a-1", "key": "k", "tenant": tenant}
    record |= {"tier": "pro", "risks": [], "asked": None, "effort": None, "allowed": 4, "floor": 1}
    record |= {"adjusted": [], "reason": "stop", "depths": depths, "iterations": 36}
    record |= {"prompt_tokens": 10, "cached_tokens": 0, "new_tokens": sum(depths.values())}
    return record | {"flops": 2e9, "price": "0.0005"} | own


def refused(tenant: str = "acme", code: str = "quota_exceeded") -> dict[str, Any]:
    return {"kind": "refused", "key": "k", "tenant": tenant, "tier": "pro", "code": code}


def written(folder: Path, *records: dict[str, Any], step: float = 60.0) -> Path:
    """Write a log of records that come at equal steps, after the server's start."""
    path, moments = folder / "audit.jsonl", itertools.count(START, step)
    log = AuditLog.open(path, fsync="off", clock=moments.__next__)
    for record in ({"kind": "opened", **OPENED}, *records):
        log.append(**record)
    log.close()
    return path


def page_of(log: Path, **config: Any) -> str:
    output = log.with_name("page.html")
    run_report(AuditReportConfig(log=str(log), output=str(output), overwrite=True, **config))
    return output.read_text(encoding="utf-8")


class Tables(HTMLParser):
    """Takes the tables out of a page: by title, the head, and cells by the line's first one."""

    def __init__(self, page: str):
        super().__init__()
        self.found: dict[str, list[list[str]]] = {}
        self._lines: list[list[str]] = []
        self._text: list[str] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "table":
            self._lines = []
        elif tag == "tr":
            self._lines.append([])
        elif tag in ("caption", "th", "td"):
            self._text = []

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "caption":
            self.found["".join(self._text or [])] = self._lines
            self._text = None
        elif tag in ("th", "td"):
            self._lines[-1].append("".join(self._text or []))
            self._text = None


def table(page: str, title: str) -> dict[str, dict[str, str]]:
    head, *lines = Tables(page).found[title]
    return {line[0]: dict(zip(head, line, strict=True)) for line in lines}


# ---- the numbers


def test_costs_are_those_of_the_records(tmp_path: Path) -> None:
    log = written(
        tmp_path,
        ended("acme", {4: 5}, iterations=60, flops=3e9, price="0.00012"),
        ended("acme", {2: 1, 4: 1}, iterations=50, flops=1e9, price="0.0001"),
        ended("bell", {1: 2}, iterations=12, flops=4e9, price="0.00066"),
        refused("bell"),
    )
    found = table(page_of(log), "Cost by tenant")
    acme, bell, total = found["acme"], found["bell"], found[ALL]
    assert (acme["answers"], bell["answers"], total["answers"]) == ("2", "1", "3")
    assert (acme["prompt tokens"], acme["generated tokens"], acme["iterations"]) == (
        "20",
        "7",
        "110",
    )
    assert (acme["GFLOPs"], bell["GFLOPs"], total["GFLOPs"]) == ("4.00", "4.00", "8.00")
    assert (acme["price EUR"], bell["price EUR"], total["price EUR"]) == (
        "0.0002",
        "0.0007",
        "0.0009",
    )
    assert (acme["% of price"], bell["% of price"]) == ("25.00", "75.00")


def test_totals_are_those_of_usage(tmp_path: Path) -> None:
    records = [ended(f"t{number % 3}", {number: 2, 4: 1}, allowed=9) for number in range(1, 9)]
    log = written(tmp_path, *records, refused("t0"), ended("t1", {}, reason="lost", iterations=0))
    found = table(page_of(log), "Cost by tenant")
    for one in usage(read(log), ["tenant"]):
        line = found[one.group["tenant"]]
        told = [line["answers"], line["generated tokens"], line["iterations"], line["price EUR"]]
        assert told == [
            str(one.answers),
            str(one.new_tokens),
            str(one.iterations),
            f"{one.price:.4f}",
        ]


def test_depths_are_means_over_generated_tokens(tmp_path: Path) -> None:
    log = written(
        tmp_path,
        ended(depths={2: 1, 4: 4}, asked=16, allowed=4, adjusted=["cap"]),
        ended(depths={8: 2}, allowed=8, floor=8, risks=["high"], adjusted=["risk"]),
        ended(depths={}, asked=2, reason="cancelled", iterations=0),
    )
    page = page_of(log)
    line = table(page, "Mean depths, and answers by what changed their depth")["acme"]
    assert line["asked for a number"] == "2"
    assert line["asked"] == "16.00"  # one that generated nothing weighs nothing
    assert line["allowed"] == f"{(5 * 4 + 2 * 8) / 7:.2f}"
    assert line["executed"] == f"{(2 + 4 * 4 + 2 * 8) / 7:.2f}"
    assert line["lowered: the tier gives no more"] == "1"
    assert line["raised: the risk class needs more"] == "1"
    counts = table(page, "Generated tokens by iterations")["acme"]
    assert [counts[str(depth)] for depth in range(1, 9)] == ["0", "1", "0", "4", "0", "0", "0", "2"]


def test_what_gave_way_is_counted_by_tenant_and_hour(tmp_path: Path) -> None:
    log = written(
        tmp_path,
        ended("acme", adjusted=["overload"]),
        refused("bell", "queue_full"),
        ended("bell"),
        ended("bell", {}, reason="untaken", iterations=0),
        refused("bell", "queue_full"),
        ended("acme", {}, reason="time", iterations=0),
        step=1800.0,
    )
    page = page_of(log)
    found = table(page, "Requests that were lowered or refused")
    assert [*found["acme"].values()] == ["acme", "2", "1", "50.00", "0", "0.00"]
    assert [*found["bell"].values()] == ["bell", "3", "0", "0.00", "2", "66.67"]
    ends = table(page, "How requests ended")
    assert [*ends["bell"].values()] == ["bell", "1", "0", "2"]
    assert [*ends["acme"]] == ["tenant", "ended: stop", "ended: time", "refused: queue_full"]
    hours = table(page, "Requests by hour")
    assert [*hours["2026-11-30 01"].values()][1:] == ["0", "1", "1"]
    assert [*hours["2026-11-30 02"].values()][1:] == ["1", "0", "0"]
    assert [*hours["2026-11-30 03"].values()][1:] == ["1", "0", "1"]


def test_compliance_is_counted_from_executed_iterations(tmp_path: Path) -> None:
    high = {"risks": ["high"], "floor": 8, "allowed": 8}
    log = written(
        tmp_path,
        ended("acme", {8: 40}, adjusted=["risk"], **high),
        ended("bell", {7: 2, 8: 30, 9: 1}, **high | {"id": "a-bad"}),
        ended("bell", {2: 9}),
    )
    page = page_of(log)
    found = table(page, "Floors by risk class")
    assert [*found["high"].values()][1:] == ["\u2717 broken", "2", "73", "8", "7", "2", "1", "1"]
    assert [*found["no class"].values()][1:] == ["\u2713 kept", "1", "9", "1", "2", "0", "0", "0"]
    breach = table(page, "Answers outside of what was decided")["a-bad"]
    assert [*breach.values()] == ["a-bad", "bell", "high", "8 to 8", "7 to 9", "3"]
    assert "Of 82 generated tokens, some in 1 answers took fewer" in page
    assert "Each of" not in page


def test_a_kept_floor_is_said_in_a_sentence(tmp_path: Path) -> None:
    page = page_of(written(tmp_path, ended(depths={4: 5}, floor=4)))
    assert "Each of 5 generated tokens took the iterations that it had to" in page


def test_many_breaches_are_counted(tmp_path: Path) -> None:
    bad = [ended(depths={1: 1}, floor=2, id=f"a-{number}") for number in range(30)]
    page = page_of(written(tmp_path, *bad))
    assert len(table(page, "Answers outside of what was decided: the first 20 of 30")) == 20


def test_the_state_of_the_log_is_told(tmp_path: Path) -> None:
    taken = {"kind": "taken", "id": "a-9"}
    log = written(tmp_path, ended(), taken, {"kind": "policy", "policy_sha256": "cd" * 32})
    page = page_of(log)
    last = [*read(log)][-1]
    state = dict(Tables(page).found["State"])
    assert state == {
        "records": "4",
        "last record": "4",
        "its hash": last["hash"],
        "requests in flight": "1",
    }
    events = Tables(page).found["Starts, ends and reloads"]
    assert events[1] == [
        "2026-11-30 00:53:20",
        "the server started",
        "rondo-serve 0.1.0, out/final, model abababababab, policy none, float32 on cpu",
    ]
    assert events[2][1:] == ["other policy took effect", "policy cdcdcdcdcdcd"]


# ---- which records


def test_only_what_ended_in_the_time_counts(tmp_path: Path) -> None:
    log = written(tmp_path, *(ended(f"t{number}") for number in range(4)), step=60.0)
    page = page_of(log, since="2026-11-30T00:55:20Z", until="2026-11-30T00:57:20Z")
    assert [*table(page, "Cost by tenant")] == ["t1", "t2", ALL]
    with pytest.raises(UserError, match="no request"):
        page_of(log, since="2026-12-01")


def test_a_log_without_answers_is_drawn(tmp_path: Path) -> None:
    page = page_of(written(tmp_path, refused("acme"), ended("", {}, reason="lost", iterations=0)))
    assert table(page, "Cost by tenant")[ALL]["answers"] == "0"
    assert table(page, "How requests ended")["no tenant"]["ended: lost"] == "1"
    depths = table(page, "Mean depths, and answers by what changed their depth")
    assert depths["acme"]["executed"] == "\u2013"


def test_days_take_the_place_of_many_hours(tmp_path: Path) -> None:
    log = written(tmp_path, ended("acme", iterations=7), ended("acme"), ended("acme"), step=1.5e5)
    page = page_of(log)
    assert "Iterations by hour" not in page
    days = table(page, "Iterations by day")
    assert [day[5:] for day in days] == [f"12-0{day}" for day in range(1, 6)]
    assert [line["acme"] for line in days.values()] == ["7", "0", "36", "0", "36"]


def test_many_tenants_share_a_colour_and_have_their_lines(tmp_path: Path) -> None:
    records = [ended(f"t{number:02}", iterations=100 - number) for number in range(12)]
    page = page_of(written(tmp_path, *records))
    hours = table(page, "Iterations by hour")
    shown = [f"t{number:02}" for number in range(6)]
    assert [*next(iter(hours.values()))] == ["hour", *shown, OTHERS]
    assert sum(int(line[OTHERS]) for line in hours.values()) == sum(
        100 - one for one in range(6, 12)
    )
    assert len(table(page, "Cost by tenant")) == 13
    assert re.findall(r"<figcaption><h3>(t\d\d)</h3>", page) == shown


# ---- what is refused


def test_a_page_that_is_there_is_kept(tmp_path: Path) -> None:
    log, output = written(tmp_path, ended()), tmp_path / "page.html"
    output.write_text("mine")
    config = AuditReportConfig(log=str(log), output=str(output))
    with pytest.raises(UserError, match="overwrite"):
        run_report(config)
    assert output.read_text() == "mine"
    run_report(config.model_copy(update={"overwrite": True}))
    assert output.read_text().startswith("<!doctype html>")


def test_an_altered_log_gives_no_page(tmp_path: Path) -> None:
    log = written(tmp_path, ended(), ended())
    log.write_bytes(log.read_bytes().replace(b'"price":"0.0005"', b'"price":"0.0004"', 1))
    with pytest.raises(ProofError, match="line 2"):
        page_of(log)
    assert not log.with_name("page.html").exists()


@pytest.mark.parametrize(
    "wrong", [{"depths": {"x": 1}}, {"price": "cheap"}, {"depths": None}, {"floor": "8"}]
)
def test_a_record_that_lacks_what_it_must_tell_gives_no_page(tmp_path: Path, wrong: Any) -> None:
    log = written(tmp_path, ended() | wrong)
    with pytest.raises(ProofError, match="record 2 does not tell"):
        page_of(log)


def test_an_empty_log_and_a_wrong_path_are_told(tmp_path: Path) -> None:
    log = written(tmp_path)
    with pytest.raises(UserError, match="no request"):
        page_of(log)
    config = AuditReportConfig(
        log=str(written(tmp_path, ended())), output=str(tmp_path / "nowhere" / "page.html")
    )
    with pytest.raises(UserError, match="cannot write"):
        run_report(config)


# ---- the page


def test_names_do_no_harm(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    quoting = '" onload="alert(2)'
    log = written(
        tmp_path,
        ended(evil, {1: 3}, risks=[evil], floor=2, id=evil, reason=evil, adjusted=[evil]),
        ended(quoting),
        refused(evil, evil),
        {"kind": evil},
        {"kind": "opened", **OPENED, "model": evil, "currency": evil},
    )
    page = page_of(log)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    found = Tables(page).found
    assert evil in [line[0] for line in found["Floors by risk class"]]

    class Attributes(HTMLParser):
        names: set[str] = set()  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.names.update(name for name, _ in attrs)

    parser = Attributes()
    parser.feed(page)
    assert not {name for name in parser.names if name.startswith("on")}


def test_the_page_stands_alone(tmp_path: Path) -> None:
    page = page_of(written(tmp_path, ended()))
    assert not re.search(
        r"<(script|link|img|iframe|object|embed)\b|https?:|url\(|@import| src=", page
    )
    assert "default-src 'none'; style-src 'unsafe-inline'" in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")
def test_the_page_fits_a_phone_and_a_desk(tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    long = "a-tenant-with-a-very-long-name-as-some-have-it-in-real-life.example"
    records = [ended(long), *(ended(f"t{number}", adjusted=["overload"]) for number in range(9))]
    page_of(written(tmp_path, *records, refused(long, "quota_exceeded"), step=7000.0))
    complaints: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        shown = browser.new_page()
        shown.on("console", lambda message: complaints.append(message.text))
        shown.goto((tmp_path / "page.html").as_uri())
        for width, scheme in itertools.product((390, 1280), ("light", "dark")):
            shown.set_viewport_size({"width": width, "height": 900})
            shown.emulate_media(color_scheme=scheme)
            # A wide table scrolls in its own box, and the page does not.
            assert shown.evaluate("document.documentElement.scrollWidth") == width
            grounds = shown.evaluate("getComputedStyle(document.body).backgroundColor")
            assert grounds == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
        browser.close()
    assert complaints == []


# ---- columns


@settings(deadline=None)
@given(
    st.integers(1, 60).flatmap(
        lambda count: st.lists(st.tuples(*[st.integers(0, 10**12)] * count), min_size=1, max_size=4)
    )
)
def test_columns_are_as_high_as_their_values(values: list[tuple[int, ...]]) -> None:
    heights = {f"n{number}": own for number, own in enumerate(values)}
    places = [f"{number:02}:00" for number in range(len(values[0]))]
    chart = columns("t", "", places, heights, {name: name for name in heights}, short)
    top = round_up(max(map(sum, zip(*values, strict=True))))
    step = 100 / len(places)
    for at, parts in enumerate(zip(*values, strict=True)):
        own = [bar for bar in chart.bars if at * step <= bar.x < (at + 1) * step]
        assert len(own) == sum(part > 0 for part in parts)
        assert sum(bar.height for bar in own) == pytest.approx(100 * sum(parts) / top)
        for lower, upper in itertools.pairwise(own):
            assert upper.y + upper.height == pytest.approx(lower.y)
    assert all(bar.y >= -1e-9 and bar.y + bar.height <= 100 + 1e-9 for bar in chart.bars)
    assert sum(len(text) for _, text in chart.labels) <= 40


@given(st.integers(1, 10**15))
def test_scales_end_at_a_round_number_just_above(value: int) -> None:
    top = round_up(value)
    assert value <= top <= 1.6 * value
    assert len(f"{top:.0e}".split("e")[0]) == 1
