"""Pages in a headless Chromium without network: what it makes of them, at some width, light or dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--proxy-server=127.0.0.1:9",  # a closed port: nothing leaves this machine
    "--virtual-time-budget=5000",
)
_OWN_SCRIPT = re.compile(r"script-src 'sha256-[^']*'(.*)\n")
# Errors, and whatever is asked of the network, are kept from before the page's own script runs.
_WATCH = """<script>
    window.failed = [];
    addEventListener("error", (event) => failed.push(event.message));
    addEventListener("unhandledrejection", (event) => failed.push(String(event.reason)));
    document.addEventListener("securitypolicyviolation", (event) => failed.push(event.blockedURI));
</script>"""


def program():
    """The browser; the test is skipped where there is none."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(_NAMES)} is installed")
    return found


def opened(path, width=1280, height=900, dark=False, query=""):
    """The page as the browser has it after its script, as HTML. The query is that of its address."""
    with tempfile.TemporaryDirectory() as home:
        command = [program(), *_OPTIONS, f"--user-data-dir={home}", f"--window-size={width},{height}"]
        command += ["--blink-settings=preferredColorScheme=0"] if dark else []
        done = subprocess.run(
            [*command, "--dump-dom", Path(path).resolve().as_uri() + query],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


def asked(page, script, folder, width=1280, height=900, dark=False):
    """What a script returns in a page, given as HTML; it runs when the page is there, and may be async.

    The page's policy lets it run beside the page's own script, and forbids all else. The page is shown in a
    frame: windows of a browser have a least width, which is more than that of a phone.
    """
    ask = f"""<script>addEventListener("load", async () => {{
        const answer = await (async () => {{ {script} }})();
        parent.postMessage({{ answer, failed }}, "*");
    }})</script>"""
    changed, count = _OWN_SCRIPT.subn(lambda found: f"script-src 'unsafe-inline'{found[1]}\n{_WATCH}", page)
    assert count == 1, "a page has a policy"
    path = Path(folder) / "asked.html"
    path.write_text(changed.replace("</body>", ask + "</body>"), encoding="utf-8")
    frame = path.with_name("frame.html")
    frame.write_text(f"""<!doctype html><output id="answer"></output><script>
        addEventListener("message", (event) => {{
            document.getElementById("answer").textContent = JSON.stringify(event.data);
        }})</script>
        <iframe src="asked.html" width="{width}" height="{height}" style="border: 0"></iframe>""")
    shown = opened(frame, width + 40, height + 60, dark)
    found = re.search(r'<output id="answer">(.+?)</output>', shown, re.DOTALL)
    assert found, "the script gave no answer"
    result = json.loads(html.unescape(found[1]))
    assert result["failed"] == [], "no error of a script"
    return result["answer"]
