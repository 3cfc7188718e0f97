"""A server that answers the page from a script, slowly, under the headers of the real one."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Json = dict[str, Any]
PAGE = Path(__file__).parents[2] / "serve/src/rondo_serve/page/index.html"
MODEL = {
    "id": "smollm2-135m-r",
    "object": "model",
    "recurrence": {
        "default": 4,
        "min": 1,
        "max": 32,
        "calibrated": {"kl": ["0.5%", "2%"]},
        "gate": False,
    },
}
SKY = (
    "The sky looks blue because air scatters short waves of light far more than long ones. Sunlight"
    " holds every colour; its blue part is thrown about by the molecules of the air and reaches us"
    " from all sides.\n\n"
)
SHALLOW = (
    "What is left of the beam is yellow, and at sunset, after a longer way, it is red or orange."
)
DEEP = "At sunset the light has a longer way through the air, so little blue is left and red shows."


def policy(page: str) -> str:
    """The policy that lets the page's own script and style run, and nothing else."""
    hashes = {
        tag: base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        for tag, body in re.findall(r"<(style|script)>(.*?)</\1>", page, re.DOTALL)
    }
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; "
        f"style-src 'sha256-{hashes['style']}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def tokens_of(text: str) -> list[str]:
    """Cut as tokenizers do: a space belongs to the word after it, long words are two tokens."""
    pieces = re.findall(r"\n+| ?\w+| ?[^\w\s]+|\s", text)
    return [
        part for piece in pieces for part in ([piece[:6], piece[6:]] if len(piece) > 9 else [piece])
    ]


@dataclass
class Script:
    """What is answered, and what was asked."""

    text: str | None = None  # one text for every depth; two that part otherwise
    pause: float = 0.004
    refusal: tuple[int, str, int | None] | None = None  # status, message, Retry-After
    breaks_after: int | None = None  # tokens before the stream ends in an error
    drops: bool = False  # the connection goes instead, and nothing is said
    hold_back: bool = False  # the last token comes as text only, as what may become a stop string
    key: str | None = None  # what must be sent with every question
    asked: list[Json] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    at_once: int = 0

    def tokens(self, depth: int) -> list[str]:
        """The answer at a depth."""
        return tokens_of(self.text or SKY + (SHALLOW if depth < 8 else DEEP))

    def depths(self, asked: Json, count: int) -> list[int]:
        """Iterations of each token: all alike without an exit."""
        cap = asked.get("num_recurrences") or MODEL["recurrence"]["default"]
        if not asked.get("exit"):
            return [cap] * count
        wanted = [2, 3, 2, 4, 3, 6, 2, 1, 3, 9, 2, 4, 5, 3, 2, 14, 3, 2, 4, 3]
        return [min(cap, wanted[i % len(wanted)]) for i in range(count)]

    def events(self, asked: Json) -> Iterator[Json]:
        """The answer as chunks."""
        words = self.tokens(asked.get("num_recurrences") or 0)[: asked["max_completion_tokens"]]
        depths = self.depths(asked, len(words))
        for i, (text, depth) in enumerate(zip(words, depths, strict=True)):
            if i == self.breaks_after:
                yield {"error": {"message": "the engine failed: see the server's log"}}
                return
            told = "" if self.hold_back and i == len(words) - 1 else text
            token = {"text": told, "recurrences": depth}
            yield chunk({"content": told}, recurrences=[depth], tokens=[token])
        rest = {"content": words[-1]} if self.hold_back else {}
        whole = len(self.tokens(asked.get("num_recurrences") or 0))
        reason = "length" if whole > len(words) else "stop"
        yield chunk(rest, finish_reason=reason, recurrence=receipt(asked, depths))
        yield {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": len(words)}}


def chunk(delta: Json, finish_reason: str | None = None, **more: Any) -> Json:
    """One chunk of the stream."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, **more}
    return {"object": "chat.completion.chunk", "choices": [choice]}


def receipt(asked: Json, depths: list[int]) -> Json:
    """What the answer took: a fixed part of FLOPs for each token, and one for each iteration."""
    cap = asked.get("num_recurrences") or MODEL["recurrence"]["default"]
    iterations = sum(depths) + 9 * cap
    by_depth = {str(depth): depths.count(depth) for depth in sorted(set(depths))}
    return {
        "asked": cap,
        "allowed": cap,
        "mean": sum(depths) / max(1, len(depths)),
        "max": max(depths, default=0),
        "by_depth": by_depth,
        "iterations": iterations,
        "flops": 1.9e8 * len(depths) + 5.4e7 * iterations,
        "seed": asked.get("seed") or 0,
    }


class Handler(BaseHTTPRequestHandler):
    """The page, the list of models and the chat."""

    script: Script
    page: str

    def do_GET(self) -> None:
        if self.path == "/":
            self.answer(self.page.encode(), "text/html; charset=utf-8", csp=policy(self.page))
        elif not self.may():
            self.answer(b'{"error": {"message": "a key is needed"}}', status=401)
        elif self.path == "/v1/models":
            self.answer(json.dumps({"object": "list", "data": [MODEL]}).encode())
        else:
            self.answer(b'{"error": {"message": "there is nothing here"}}', status=404)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        script = self.script
        with script.lock:
            script.asked.append(asked)
            script.at_once += 1
            script.most_at_once = max(script.at_once, script.most_at_once)
        try:
            if not self.may():
                self.answer(b'{"error": {"message": "a key is needed"}}', status=401)
            elif script.refusal:
                status, message, wait = script.refusal
                body = json.dumps({"error": {"message": message}}).encode()
                self.answer(body, status=status, retry=wait)
            else:
                self.stream(asked)
        except (BrokenPipeError, ConnectionResetError):
            script.left.set()
        finally:
            with script.lock:
                script.at_once -= 1

    def may(self) -> bool:
        """Whether the question comes with the key."""
        wanted = self.script.key
        return wanted is None or self.headers["Authorization"] == f"Bearer {wanted}"

    def stream(self, asked: Json) -> None:
        """Send the chunks, one write each, cut in odd places as networks do."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for i, event in enumerate(self.script.events(asked)):
            if self.script.drops and i == 5:
                return
            data = f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
            for part in (data[:23], data[23:]):
                self.wfile.write(part)
            time.sleep(self.script.pause)
        self.wfile.write(b"data: [DONE]\n\n")

    def answer(
        self,
        body: bytes,
        kind: str = "application/json",
        status: int = 200,
        csp: str | None = None,
        retry: int | None = None,
    ) -> None:
        """Send one body."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        if csp:
            self.send_header("Content-Security-Policy", csp)
        if retry is not None:
            self.send_header("Retry-After", str(retry))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(script: Script) -> Iterator[str]:
    """Serve the page, and yield its address."""
    page = PAGE.read_text(encoding="utf-8")
    handler = type("Scripted", (Handler,), {"script": script, "page": page})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
