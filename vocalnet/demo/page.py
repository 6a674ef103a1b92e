"""The voice-chat page: Gradio's layout, theme and settings around scripts that speak to the server by WebSocket.

Gradio's own streaming audio cuts sound into padded AAC segments, which gap. Here the sound is PCM from the WebSocket,
played by an AudioWorklet (`static/player.js`); Python takes no part once the page is loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from vocalnet.decoding import DecodingMode

if TYPE_CHECKING:
    from gradio import Blocks
    from starlette.applications import Starlette

    from vocalnet.model import VocalNet

STATIC = Path(__file__).parent / "static"
STATIC_URL = "/page-files"

HEAD = f'<script type="module" src="{STATIC_URL}/page.js"></script>'
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif"]  # none to be fetched


@dataclass(frozen=True)
class PageSettings:
    """What the page offers.

    Attributes:
        model: its name, as shown.
        max_mtp: MTP modules that the model has.
        mtp: how many are used at first.
        decoding: mode used at first.
        decodings: modes to choose from.
    """

    model: str
    max_mtp: int
    mtp: int
    decoding: str
    decodings: tuple[str, ...] = get_args(DecodingMode)

    @classmethod
    def of(cls, model: VocalNet, mtp: int | None = None, decoding: str | None = None) -> PageSettings:
        """What `model` can do, and what it does unless told otherwise: here, or by the page's user."""
        generation = model.config.generation
        most = model.speech_decoder.config.mtp_modules
        first = generation.mtp if mtp is None else mtp
        return cls(model.config.name, most, first, decoding or generation.decoding)


def build_page(settings: PageSettings) -> Blocks:
    """The page; its events are handled in the browser (`static/page.js`)."""
    import gradio as gr

    at_start = json.dumps({"mtp": settings.mtp, "decoding": settings.decoding})
    title = f"<h1>VocalNet</h1><p>Ask aloud, hear the answer while it is being thought. Model: {settings.model}.</p>"
    with gr.Blocks(title="VocalNet", analytics_enabled=False) as page:
        gr.HTML(f"<div class='vn-title' data-vn-settings='{at_start}'>{title}</div>", padding=False)
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                gr.HTML((STATIC / "conversation.html").read_text(encoding="utf-8"), padding=False)
                text = gr.Textbox(
                    label="Or type a question",
                    placeholder="What is the capital of France?",
                    submit_btn=True,
                    max_lines=3,
                )
            with gr.Column(scale=2, min_width=320):
                gr.HTML((STATIC / "panels.html").read_text(encoding="utf-8"), padding=False)
                mtp, decoding = _generation_settings(settings)
                restart = gr.Button("New conversation")
        text.submit(None, text, text, js="(text) => { window.vocalnet.sendText(text); return ''; }")
        mtp.change(None, mtp, None, js="(mtp) => { window.vocalnet.set({ mtp }); }")
        decoding.change(None, decoding, None, js="(decoding) => { window.vocalnet.set({ decoding }); }")
        restart.click(None, js="() => { window.vocalnet.restart(); }")
    return page


def _generation_settings(settings: PageSettings) -> tuple[Any, Any]:
    import gradio as gr

    with gr.Accordion("How speech is generated", open=True):
        mtp = gr.Slider(
            0,
            max(1, settings.max_mtp),
            value=settings.mtp,
            step=1,
            label="K: MTP modules",
            info="Speech tokens drafted per step beside the first",
            interactive=settings.max_mtp > 0,
        )
        decoding = gr.Radio(
            list(settings.decodings),
            value=settings.decoding,
            label="Decoding",
            info="accept-all: every draft is spoken; verified: only what the decoder itself would have said; "
            "relaxed: also what is nearly as likely, or nearly the same sound",
        )
    return mtp, decoding


def _theme() -> Any:
    import gradio as gr

    readable = {"body_text_color_subdued": "*neutral_600", "block_info_text_color": "*neutral_600"}  # 7:1 on white
    return gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=["monospace"]).set(
        **readable, body_text_color_subdued_dark="*neutral_300", block_info_text_color_dark="*neutral_300"
    )


def mount_page(app: Starlette, settings: PageSettings) -> None:
    """Adds the page at `/` to the server's application; routes that exist already keep their paths."""
    import gradio as gr
    from starlette.staticfiles import StaticFiles

    app.mount(STATIC_URL, StaticFiles(directory=STATIC), name="page-files")
    gr.mount_gradio_app(
        app,  # type: ignore[arg-type]  # Gradio declares FastAPI, and uses what any Starlette has
        build_page(settings),
        path="/",
        css=(STATIC / "page.css").read_text(encoding="utf-8"),
        head=HEAD,
        theme=_theme(),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
    )
