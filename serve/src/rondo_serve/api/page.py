"""The page at `/`, with a policy that lets it do nothing but ask its own server."""

import base64
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[1] / "page" / "index.html"
INLINE = r"<{tag}(?:\s[^>]*)?>(.*?)</{tag}\s*>"


@dataclass(frozen=True)
class Page:
    """A page and the headers it is sent with."""

    html: bytes
    headers: dict[str, str]

    @classmethod
    def of(cls, path: Path = PAGE) -> "Page":
        """Read a page; only the scripts and styles that stand in it will run."""
        html = path.read_text(encoding="utf-8")
        policy = {
            "default-src": "'none'",
            "script-src": hashes(html, "script"),
            "style-src": hashes(html, "style"),
            "connect-src": "'self'",
            "img-src": "'self' data:",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        headers = {
            "content-security-policy": "; ".join(f"{k} {v}" for k, v in policy.items()),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        }
        return cls(html.encode(), headers)


def hashes(html: str, tag: str) -> str:
    """Return the sources of a policy that the inline elements of a page need."""
    found = re.findall(INLINE.format(tag=tag), html, re.DOTALL | re.IGNORECASE)
    # A browser reads line ends as one character before it hashes.
    texts = [text.replace("\r\n", "\n").encode() for text in found]
    told = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in texts]
    return " ".join(f"'sha256-{one}'" for one in told) or "'none'"
