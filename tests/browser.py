"""Pages in a headless Chromium without network: what it makes of them, at some width, light or dark."""

from __future__ import annotations

import html
import importlib.util
import json
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

_MADE_WITH = Path(__file__).parent.parent / "docs" / "making" / "chromium.py"
_SPEC = importlib.util.spec_from_file_location("chromium", _MADE_WITH)
chromium = importlib.util.module_from_spec(_SPEC)  # as the pictures of the docs are taken
_SPEC.loader.exec_module(chromium)
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
    found = chromium.program()
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(chromium.BROWSERS)} is installed")
    return found


def opened(path, width=1280, height=900, dark=False, query=""):
    """The page as the browser has it after its script, as HTML. The query is that of its address."""
    with tempfile.TemporaryDirectory() as home:
        command = chromium.command(program(), home, (width, height), dark)
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
