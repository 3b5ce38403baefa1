"""The page at `/`: one file of this package, which may load nothing and run nothing but what is in it."""

import base64
import hashlib
import importlib.resources
import re

FILE = "page.html"


def page() -> tuple[bytes, dict[str, str]]:
    """The page, and headers of its response that let a browser run its own script and style alone.

    The policy names them by their SHA-256, so that markup which somehow came into the page could run nothing.
    """
    text = importlib.resources.files(__package__).joinpath(FILE).read_text("utf-8")
    rules = {
        "default-src": "'none'",
        "script-src": _hash_of(text, "script"),
        "style-src": _hash_of(text, "style"),
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    return text.encode(), {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in rules.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }


def _hash_of(text: str, tag: str) -> str:
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
