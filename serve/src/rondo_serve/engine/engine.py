"""The engine: one tick takes everything in flight one iteration further.

A tick runs the prelude for tokens that enter the loop, ONE iteration of the core for every token in
it, whatever its own iteration, and the coda for tokens that are done. So a request of depth 2 gets
a token every second tick, whoever else is in flight (continuous depth-wise batching, proposed in
arXiv:2410.20672).
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch

from rondo.flops import costs_of
from rondo_serve.engine import exits, sampling, schedule
from rondo_serve.engine.arena import Arena, shape_of
from rondo_serve.engine.bounds import EngineSettings, check, longest_context
from rondo_serve.engine.passes import Passes
from rondo_serve.engine.places import Places
from rondo_serve.engine.rows import Flight, Row
from rondo_serve.policy import Allowed, Policy
from rondo_serve.requests import (
    Ask,
    Busy,
    Closed,
    Deliver,
    Event,
    Finished,
    Load,
    Reason,
    Refused,
    Token,
)
from rondo_serve.text import Writer

log = logging.getLogger(__name__)
# Failures in a row after which the engine gives up.
MOST_FAILURES = 3


class Engine:
    """Continues texts, each at its own depth, as many at once as memory allows.

    `submit`, `cancel` and `load` may be called from any thread and never wait for the model.

    Args:
        model: A `RecurrentForCausalLM`, which from now on is the engine's alone.
        tokenizer: Its tokenizer.
        policy: Says what a request may spend; may be replaced before the start.
        settings: What the engine may use.
        ends: Tokens that end a text.

    Raises:
        Refused: The model cannot be served, or the memory is too little.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        policy: Policy,
        settings: EngineSettings,
        ends: Collection[int] = (),
    ):
        self.settings = settings
        self._model, self._tokenizer, self.policy = model, tokenizer, policy
        self._ends = frozenset(ends)
        self.costs = costs_of(model)
        self._gate = model.model.exit_gate
        self.shape = shape_of(model, self.costs)
        if settings.max_context > (most := longest_context(model.config)):
            raise Refused(f"max_context {settings.max_context} is beyond the model's {most}")
        total = settings.kv_bytes // self.shape.page_bytes - 1
        if total < self.shape.pages_for(1, 1):
            raise Refused(
                f"{settings.kv_bytes} bytes hold no keys and values: a page alone takes "
                f"{self.shape.page_bytes}"
            )
        self.arena = Arena(self.shape, total, model.device)
        self.passes = Passes(model, self.arena)
        self._places = Places(
            self.arena, settings.prefix_cache, model.config.state_init == "normal"
        )
        self._lock = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._rows: list[Row] = []
        self._cancelled: set[str] = set()
        self._closing: float | None = None
        self._thread: threading.Thread | None = None
        self._failures = 0
        self._interval = 1.0
        self._finished_at: float | None = None
        self._left_over = 0
        self.failure: str | None = None
        self.ticks = 0
        self._phase = 0

    # ---- from any thread

    def start(self) -> None:
        """Start the thread that ticks."""
        self._thread = threading.Thread(target=self._run, name="rondo-engine", daemon=True)
        self._thread.start()

    def submit(self, ask: Ask, deliver: Deliver) -> Allowed:
        """Take one request into the queue; see `submit_all`."""
        return self.submit_all([ask], [deliver])[0]

    def submit_all(self, asks: Sequence[Ask], delivers: Sequence[Deliver]) -> list[Allowed]:
        """Take the answers of a request into the queue, all or none, and return what each is given.

        Args:
            asks: What is asked for.
            delivers: Called on the engine's thread with each event of theirs; the last is a
                `Finished`. They must not wait.

        Raises:
            Refused: One of them can never be served.
            Denied: The policy does not allow it.
            Busy: The queue is full.
            Closed: The engine shuts down or has failed.
        """
        allowed = self.policy.allow(asks, self.load())
        try:
            self._enqueue([self._row(*one) for one in zip(asks, delivers, allowed, strict=True)])
        except BaseException:  # whatever it is, what was allowed is given back
            for ask, given in zip(asks, allowed, strict=True):
                self.policy.spent(ask, "untaken", given.untaken(ask))
            raise
        return allowed

    def _row(self, ask: Ask, deliver: Deliver, allowed: Allowed) -> Row:
        check(ask, allowed, self._model.config, self.settings, self.arena)
        return Row(
            ask=ask,
            deliver=deliver,
            allowed=allowed,
            picker=sampling.picker_of(ask.sampling),
            generator=sampling.generator_of(ask.sampling, self.passes.device),
            writer=Writer(self._tokenizer, ask.stop),
            asked_at=time.monotonic(),
            tokens=list(ask.prompt),
        )

    def _enqueue(self, rows: Sequence[Row]) -> None:
        with self._lock:
            if self._closing is not None or self.failure is not None:
                raise Closed(self.failure or "the server is shutting down")
            if len(self._waiting) + len(rows) > self.settings.max_queue + self._vacant:
                wait = self._interval * (len(self._waiting) + 1)
                raise Busy(min(max(1.0, wait), self.settings.max_seconds))
            self._waiting.extend(rows)
            self._lock.notify()

    def cancel(self, id: str) -> None:
        """Stop a request at the next iteration; it still gets its `Finished`."""
        with self._lock:
            if any(row.ask.id == id for row in (*self._waiting, *self._rows)):
                self._cancelled.add(id)

    def close(self, grace: float) -> None:
        """Take nothing more, wait `grace` seconds for what runs, cut the rest off, and stop."""
        with self._lock:
            until = time.monotonic() + grace
            self._closing = until if self._closing is None else min(self._closing, until)
            self._lock.notify()
        if self._thread is not None:
            self._thread.join()
        else:
            self._give_up("shutdown")

    def load(self) -> Load:
        """Return how busy the engine is."""
        pages = self.arena.pages
        with self._lock:
            return Load(
                waiting=len(self._waiting),
                left_over=min(self._left_over, len(self._waiting)),
                running=len(self._rows),
                pages=pages.total - pages.free,
                cached_pages=pages.spare,
                total_pages=pages.total,
                ticks=self.ticks,
                core_tokens=self.passes.core_tokens,
            )

    @property
    def _vacant(self) -> int:
        return max(0, self.settings.max_running - len(self._rows))

    # ---- on the engine's thread

    def _run(self) -> None:
        try:
            while self._wait():
                self._tick_safely()
        except Exception as error:  # the thread's end, which nobody else would tell of
            self._fail(error)

    def _wait(self) -> bool:
        """Wait for something to do; return whether there is anything more to come."""
        with self._lock:
            while not (self._waiting or self._rows or self._closing is not None):
                self._lock.wait()
                self._finished_at = None  # or idle time would count as slowness
            return self.failure is None and bool(self._waiting or self._rows)

    def _tick_safely(self) -> None:
        try:
            if not self.tick():
                time.sleep(0.001)  # what waits does not fit yet, which no row can change
        except Exception as error:  # the process's boundary: one failure must not end the server
            log.exception("a tick failed")
            self._failures += 1
            for row in list(self._rows):
                self._end(row, "error")
            self._places.forget_prefixes()
            if self._failures >= MOST_FAILURES:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        log.error("the engine gives up")
        with self._lock:
            self.failure = f"the engine failed: {' '.join(str(error).split())}"
        self._give_up("error")

    def _give_up(self, reason: Reason) -> None:
        """End whatever waits or is in flight."""
        with self._lock:
            rows = [*self._waiting, *self._rows]
            self._waiting.clear()
        for row in rows:
            self._end(row, reason)

    @torch.inference_mode()
    def tick(self) -> bool:
        """Take everything in flight one iteration further; return whether there was anything."""
        self._stop_some()
        self._admit()
        self._left_over = len(self._waiting)
        self._enter_loop()
        flights = [row.flight for row in self._rows if row.flight is not None]
        if not flights:
            return False
        settings = self.settings
        chosen = schedule.choose(flights, settings.tick_tokens, settings.favour)
        left_out = {id(one) for one in flights} - {id(one) for one in chosen}
        for one in flights:
            one.waited = one.waited + 1 if id(one) in left_out else 0
        self.passes.iterate(chosen)
        self.ticks += 1
        self._phase += 1
        self._leave_loop(chosen)
        return True

    def _stop_some(self) -> None:
        """End rows that are cancelled, or whose time is up."""
        now, limit = time.monotonic(), self.settings.max_seconds
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
            shut = self._closing is not None and now >= self._closing
            rows: list[tuple[Row, Reason]] = []
            for row in (*self._waiting, *self._rows):
                if row.ask.id in cancelled:
                    rows.append((row, "cancelled"))
                elif shut:
                    rows.append((row, "shutdown"))
                elif now - row.asked_at > limit:
                    rows.append((row, "time"))
            ended = {id(row) for row, _ in rows}
            self._waiting = deque(row for row in self._waiting if id(row) not in ended)
        for row, reason in rows:
            self._end(row, reason)

    def _admit(self) -> None:
        """Take rows out of the queue while there is room."""
        while self._vacant:
            with self._lock:
                waiting = list(self._waiting)
            row = schedule.next_admitted(
                waiting, self.settings.favour, time.monotonic(), self._waits_for_twin
            )
            if row is None or not self._is_placed(row):
                return
            with self._lock:
                self._waiting.remove(row)
                self._rows.append(row)

    def _is_placed(self, row: Row) -> bool:
        """Give a row its memory if there is so much; a row for which that fails is ended."""
        try:
            placed = self._places.give(row)
        except Exception:  # what is wrong with one row must not end the others
            log.exception("a request could not be placed")
            with self._lock:
                self._waiting.remove(row)
            self._end(row, "error")
            return False
        row.admitted_at = time.monotonic()
        return placed

    def _waits_for_twin(self, row: Row) -> bool:
        return self._places.has_twin(row, self._rows)

    def _enter_loop(self) -> None:
        """Start the tokens that may enter the loop in this tick."""
        reading = [row for row in self._rows if row.read < len(row.ask.prompt)]
        decoding = [row for row in self._rows if row.read >= len(row.ask.prompt)]
        if all(row.flight is None for row in self._rows):
            self._phase = 0
        starting = schedule.ready(decoding, self._phase, self.settings.lockstep)
        entering = [(row, 1) for row in starting]
        prompts = [row.flight for row in reading if row.flight is not None]
        idle = [row for row in reading if row.flight is None]
        room = self.settings.tick_tokens - len(decoding)
        entering += schedule.chunks(idle, prompts, room, self.settings.prompt_chunk)
        for row, count in entering:
            row.flight = Flight(row, row.read, row.read + count)
        if entering:
            self.passes.enter([row.flight for row, _ in entering if row.flight is not None])

    def _leave_loop(self, flights: list[Flight]) -> None:
        """Check who may leave, run the coda for who has, and give them their tokens."""
        checked = [one for one in flights if exits.is_checked(one)]
        readouts = [one for one in checked if not one.row.shares]
        exits.check_states([one for one in checked if one.row.shares], self._gate, self.arena)
        done = [one for one in flights if one.done]
        logits = self._read_out(readouts, done)
        for one in readouts:
            exits.check_logits(one, logits[id(one)], self.arena)
        left = [one for one in readouts if one.done]
        # Several tokens are answered together, once all of them have left; a single one was.
        logits |= self._read_out([], [one for one in left if not one.answers])
        for one in (*done, *left):
            self._land(one, logits.get(id(one)))

    def _read_out(self, checked: list[Flight], done: list[Flight]) -> dict[int, torch.Tensor]:
        """Run the coda, and return logits (n, V) by flight, where anyone wants them.

        Args:
            checked: Flights of which those tokens are read out that still loop.
            done: Flights of which all tokens pass the coda, and the last one of a row is read out.
        """
        if not checked and not done:
            return {}
        parts = [(one, True) for one in checked] + [(one, False) for one in done]
        wanted: dict[int, torch.Tensor] = {}
        for (one, is_check), hidden in zip(parts, self.passes.finish(parts), strict=True):
            if is_check:
                wanted[id(one)] = hidden
            elif one.is_last:
                wanted[id(one)] = hidden[-1:]
        if not wanted:
            return {}
        return dict(zip(wanted, self.passes.logits(list(wanted.values())), strict=True))

    def _land(self, flight: Flight, logits: torch.Tensor | None) -> None:
        """Take a flight's tokens as read, and if they are all there are, choose the next one."""
        row = flight.row
        took = flight.iterations
        self._bill(flight, took)
        row.flight, row.read = None, flight.stop
        if flight.is_prompt:
            self._places.keep(row)
        if logits is None or not flight.is_last:
            return
        try:
            reason = self._append(row, took[-1], logits[-1])
        except Exception:  # what is wrong with one row must not end the others
            log.exception("a token could not be chosen")
            reason = "error"
        if reason is not None:
            self._end(row, reason)

    def _bill(self, flight: Flight, took: list[int]) -> None:
        """Count what a flight took; its tokens attend to all of the row so far."""
        row, costs, length, count = flight.row, self.costs, flight.stop, len(took)
        finish = costs.finish_flops(length)
        row.iterations += sum(took)
        row.flops += sum(took) * costs.iteration_flops(length)
        row.flops += count * (costs.forward_flops(0, length) - finish) + flight.num_checks * finish
        if not flight.done:
            return  # it was cut off, and its coda did not run
        # A single token's last check was its answer, unless it went all the way.
        answered = flight.answers and flight.remaining > 0
        headless = (count - flight.is_last) * 2 * costs.head_matmul
        row.flops += (count - answered) * finish - headless

    def _append(self, row: Row, recurrences: int, logits_V: torch.Tensor) -> Reason | None:
        """Choose the next token of a row and tell it; return why it ends, None if it does not."""
        token = sampling.pick(row.picker, row.generator, row.tokens, logits_V)
        row.tokens.append(token)
        row.depths[recurrences] += 1
        row.first_at = row.first_at or time.monotonic()
        ends = token in self._ends
        event = Token(token, "" if ends else row.writer.push(token), recurrences)
        if (wanted := row.ask.sampling.logprobs) is not None:
            logprob, top = sampling.logprobs(logits_V, token, wanted)
            event = replace(event, logprob=logprob, top=top)
        self._tell(row, event)
        if ends or row.writer.stopped:
            return "stop"
        full = len(row.tokens) - len(row.ask.prompt) == row.ask.max_new_tokens
        return "length" if full else None

    def _tell(self, row: Row, event: Event) -> None:
        """Deliver an event; whoever cannot take it does not want the rest."""
        try:
            row.deliver(event)
        except Exception:  # foreign code, which must not end the others' tick
            log.exception("an event could not be delivered")
            self.cancel(row.ask.id)

    def _end(self, row: Row, reason: Reason) -> None:
        """End a row, and give back what it holds."""
        with self._lock:
            self._cancelled.discard(row.ask.id)
            if row in self._rows:
                self._rows.remove(row)
        if row.flight is not None:
            self._bill(row.flight, row.flight.iterations)
        if row.tables and reason in ("stop", "length"):
            self._places.keep(row)
        self._places.take_back(row)
        now = time.monotonic()
        if self._finished_at is not None:
            self._interval += 0.1 * (now - self._finished_at - self._interval)
        self._finished_at = now
        if reason in ("stop", "length"):
            self._failures = 0
        receipt = row.receipt(now)
        # Before the end is told: what was spent is known once it is.
        try:
            self.policy.spent(row.ask, reason, receipt)
        except Exception:  # foreign code, which must not end the others' tick
            log.exception("the policy could not take note of a request")
        self._tell(row, Finished(reason, row.writer.finish(), receipt))
