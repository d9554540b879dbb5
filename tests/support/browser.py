"""Pages as a headless Chromium shows them: their elements as text, and pictures of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import pytest

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


def chromium() -> str:
    """The browser; skips the test where there is none, but for CI, which must have one."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None and os.environ.get("CI"):
        pytest.fail("CI must install chromium")
    if found is None:
        pytest.skip("no Chromium is installed")
    return found


def dom(page: Path, *, width: int = 1200, dark: bool = False, script: str = "") -> Dom:
    """The elements of a page after its scripts and `script` have run, once charts are drawn."""
    if script:
        shown = page.read_text(encoding="utf-8")
        page = page.with_suffix(".probed.html")
        page.write_text(shown + _WHEN_DRAWN.replace("SCRIPT", script), encoding="utf-8")
    return Dom(_run(page, "--dump-dom", f"--window-size={width},900", _scheme(dark)))


_WHEN_DRAWN = """<script type="module">
const look = setInterval(() => {
  if (document.body.dataset.drawn) { clearInterval(look); SCRIPT; }
}, 50);
</script>"""


def picture(
    page: Path,
    target: Path,
    *,
    width: int = 1200,
    height: int = 3000,
    dark: bool = False,
) -> None:
    """Take a picture of a page into a PNG file."""
    size = f"--window-size={width},{height}"
    _run(page, f"--screenshot={target}", size, _scheme(dark))


def _scheme(dark: bool) -> str:
    return f"--blink-settings=preferredColorScheme={0 if dark else 1}"


def _run(page: Path, *arguments: str) -> str:
    with tempfile.TemporaryDirectory() as profile:
        command = [
            chromium(),
            *_FLAGS,
            "--virtual-time-budget=20000",
            f"--user-data-dir={profile}",
        ]
        done = subprocess.run(
            [*command, *arguments, page.absolute().as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


class Dom(HTMLParser):
    """What a page shows.

    Attributes:
        texts: Text of each element that has an id, with all that is in it.
        tags: Every element as its name, with how often it occurs.
        labels: Every `aria-label`.
        body: Attributes of the body.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self.tags: dict[str, int] = {}
        self.labels: list[str] = []
        self.body: dict[str, str | None] = {}
        self._open: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags[tag] = self.tags.get(tag, 0) + 1
        if label := given.get("aria-label"):
            self.labels.append(label)
        if tag == "body":
            self.body = given
        if tag not in _VOID:
            self._open.append((tag, given.get("id")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for name in {name for _, name in self._open if name}:
            self.texts[name] = f"{self.texts.get(name, '')}{data} "


_VOID = {"meta", "br", "img", "link", "input", "hr", "col", "source"}
