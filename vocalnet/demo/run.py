"""`vocalnet demo`: the real-time server with the voice-chat page on it."""

from __future__ import annotations

import sys
from urllib.parse import quote

from starlette.applications import Starlette

from vocalnet.demo.page import PageSettings, mount_page
from vocalnet.model import VocalNet
from vocalnet.serving.run import serve
from vocalnet.serving.settings import ServeSettings


def page_address(address: str, key: str | None) -> str:
    """The page at HOST:PORT; a key travels in the fragment, which browsers do not send to anybody."""
    place = address.replace("0.0.0.0", "127.0.0.1")
    return f"http://{place}/" + (f"#key={quote(key, safe='')}" if key else "")


def demo(model: VocalNet, settings: ServeSettings) -> None:
    """Serves the page and the conversations that it holds, until SIGTERM or SIGINT."""

    def add_page(app: Starlette, address: str) -> None:
        mount_page(app, PageSettings.of(model, settings.mtp, settings.decoding))
        print(f"open {page_address(address, settings.api_key)} in a browser (Ctrl-C ends)", file=sys.stderr, flush=True)

    serve(model, settings, add_page)
