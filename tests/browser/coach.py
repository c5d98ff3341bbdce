"""The page of `feedback.human: page` in a real browser, beside a run that trains: comments, a reload, a second tab, intruders.

    python tests/browser/coach.py [--shots FOLDER] [--out FOLDER] [--steps N]

It needs Chromium as `check.py` does, and the extra `page`.
"""

from __future__ import annotations

import argparse
import http.server
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from check import HOSTILE, ROOT, Browser

from vpd_mlx.feedback.page.board import Board
from vpd_mlx.feedback.page.server import Server
from vpd_mlx.types import Problem, Rollout, Verdict

COMMENTS = 20
CARDS = "[...document.querySelectorAll('.card')]"
OPEN = f"{CARDS}.filter(c => !c.hidden && !c.classList.contains('given'))"
COUNT = r"Number(document.getElementById('state')?.textContent.match(/(\d+) comments? given/)?.[1] ?? -1)"
FOCUS = f"(() => {{ const card = {OPEN}[0]; card?.querySelector('textarea').focus(); return card !== undefined; }})()"
GIVE = """(() => {
  const card = document.activeElement.closest('.card');
  card.querySelector('select').value = '%s';
  card.querySelector('button').click();
})()"""
ATTACK = """<!doctype html><iframe src="{address}"></iframe><script>
const out = [];
const tries = {{
  read: () => fetch("{address}cards"),
  write: () => fetch("{address}comment", {{method: "POST", headers: {{"Content-Type": "application/json"}},
                     body: JSON.stringify({{card: {card}, text: "intruder", scope: "task"}})}}),
  simple: () => fetch("{address}comment", {{method: "POST", mode: "no-cors",
                     body: JSON.stringify({{card: {card}, text: "intruder", scope: "task"}})}}),
}};
(async () => {{
  for (const [name, attempt] of Object.entries(tries)) {{
    try {{ const r = await attempt(); out.push(`${{name}}: ${{r.type}} ${{r.status}}`); }}
    catch (e) {{ out.push(`${{name}}: ${{e.name}}`); }}
  }}
  let framed = "blocked";
  try {{ framed = document.querySelector("iframe").contentDocument === null ? "blocked" : "seen"; }} catch {{}}
  window.done = out.concat(`frame: ${{framed}}`);
}})();
</script>"""


class Tabs(Browser):
    """A browser with several tabs, one of which is spoken to."""

    def tab(self, url: str) -> str:
        """Open one and speak to it; returns its session."""
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.events.clear()
        self.call("Page.navigate", url=url)
        return self._session

    def turn_to(self, session: str) -> None:
        """Speak to this tab from now on."""
        self._session = session

    def until(self, script: str, seconds: float = 120) -> Any:
        """The script's value, once it is true."""
        end = time.monotonic() + seconds
        while not (value := self.eval(script)):
            if time.monotonic() > end:
                raise SystemExit(
                    f"FAILED: waited {seconds:.0f} s for {script}: {self.eval('document.body.innerText')[:500]}"
                )
            time.sleep(0.2)
        return value

    def type(self, text: str) -> None:
        """Type into what has the focus, as a keyboard does."""
        self.call("Input.insertText", text=text)


class Check:
    """Counts what was seen to hold."""

    done = 0

    def that(self, truth: Any, what: str) -> None:
        """Fail with these words unless it is true."""
        if not truth:
            raise SystemExit(f"FAILED: {what}")
        self.done += 1


def served(page: str) -> tuple[http.server.ThreadingHTTPServer, str]:
    """Another site: one page at an address of its own."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://localhost:{server.server_address[1]}/"


def comment(browser: Tabs, text: str, scope: str) -> None:
    """Comment on the first open card as a person would."""
    before = browser.eval(COUNT)
    browser.until(FOCUS)
    browser.type(text)
    browser.eval(GIVE % scope)
    browser.until(f"{COUNT} > {before}")


def steps_of(run: Path) -> int:
    """Steps that a run has logged."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def beside_a_run(check: Check, browser: Tabs, run: Path, address: str, shots: Path | None) -> None:
    """Comments, a reload, a second tab, a wrong token and another site, while the run goes on."""
    first = browser.tab(address)
    browser.until(f"{OPEN}.length > 3", 600)
    began = steps_of(run)
    for n in range(COMMENTS - 1):
        comment(browser, "ones right, tens too low", "problem" if n % 4 else "answer")
    at_once = steps_of(run)
    check.that(browser.eval(COUNT) == COMMENTS - 1, "the page counts its comments")

    browser.until(FOCUS)
    browser.type("half a comm")
    browser.call("Page.reload")
    browser.until(f"{COUNT} === {COMMENTS - 1}")
    kept = browser.until("[...document.querySelectorAll('textarea')].map(t => t.value).find(t => t === 'half a comm')")
    check.that(kept, "half a comment outlasts a reload")

    second = browser.tab(address)
    browser.until(f"{COUNT} === {COMMENTS - 1}")
    comment(browser, "ones right, tens too low", "task")
    browser.turn_to(first)
    browser.until(f"{COUNT} === {COMMENTS}")
    check.that(True, "what the second tab gives, the first one shows")
    browser.eval("document.getElementById('only-open').click()")
    browser.until(f"{CARDS}.filter(c => !c.hidden && c.classList.contains('given')).length > 0")
    for width, scheme in ((1280, "light"), (390, "dark")):
        browser.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        check.that(browser.eval("document.documentElement.scrollWidth") <= width, f"no overflow at {width} px")
        if shots:
            browser.screenshot(shots / f"coach-{width}-{scheme}.png")
    check.that(not (e := [x for x in browser.errors() if not x.startswith("request: " + address)]), f"errors: {e[:3]}")

    origin, _ = address.rstrip("/").rsplit("/", 1)
    browser.tab(f"{origin}/wrong/")
    said = browser.until("document.body?.innerText")
    check.that(
        "wrong token" in said and "wrong" not in json.dumps(browser.eval(f"{CARDS}.length")), f"wrong token: {said}"
    )
    card = httpx.get(f"{address}cards").json()["cards"][0]["number"]
    site, place = served(ATTACK.format(address=address, card=card))
    browser.tab(place)
    tries = browser.until("window.done")
    site.shutdown()
    check.that(
        tries == ["read: TypeError", "write: TypeError", "simple: TypeError", "frame: blocked"],
        f"another site: {tries}",
    )
    rows = [json.loads(line) for line in (run / "human.jsonl").read_text().splitlines()]
    check.that(
        len(rows) == COMMENTS and not any("intruder" in r["feedback"] for r in rows), "no intruder's comment is kept"
    )
    got = httpx.get(f"{address}cards", headers={"Host": "evil.example"})
    check.that(got.status_code == 421, f"a foreign name: {got.status_code}")
    end = time.monotonic() + 600
    while (now := steps_of(run)) <= at_once and time.monotonic() < end:
        time.sleep(0.5)
    check.that(now > at_once, f"the run waits for somebody: {at_once} steps done, then {now}")
    print(f"steps done: {began} at the first comment, {at_once} after {COMMENTS - 1}, {now} at the end of the visit")
    browser.turn_to(second)


def hostile(check: Check, browser: Tabs) -> None:
    """What a model or a data set wrote is text, and nothing but text."""
    board = Board()
    board.wait(
        Problem(HOSTILE, ({"role": "user", "content": HOSTILE},), HOSTILE),
        Rollout((), (), HOSTILE, "stop").graded(Verdict(0.0, HOSTILE), 1.0),
    )
    server = Server(board)
    browser.tab(server.address)
    browser.until(f"{CARDS}.length === 1")
    check.that(browser.eval("window.hacked") is None, "hostile text ran")
    check.that(browser.eval("document.querySelectorAll('.card b').length") == 1, "hostile text became markup")
    shown = browser.eval("document.querySelector('.completion').textContent")
    check.that(shown == HOSTILE, f"hostile text is not whole: {shown!r}")
    server.close()
    browser.until("document.getElementById('state')?.textContent.startsWith('The run does not answer')")
    check.that(True, "the page says when the run has ended")


def main() -> None:
    """Train the toy, and visit it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shots", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp()) / "run"
    sets = ["feedback.sources=[human, sibling]", "feedback.human=page", "on_no_gap=warn", *args.set]
    command = [
        sys.executable,
        "-u",
        "-m",
        "vpd_mlx",
        "train",
        "quickstart",
        "--steps",
        str(args.steps),
        "--out",
        str(out),
        "--overwrite",
    ]
    for item in sets:
        command += ["--set", item]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert run.stdout is not None
    address = next(line.split()[-1] for line in run.stdout if line.startswith("comment on failures"))
    lines: list[str] = []
    threading.Thread(target=lambda: lines.extend(run.stdout or ()), daemon=True).start()
    check, browser = Check(), Tabs()
    try:
        beside_a_run(check, browser, out, address, args.shots)
        hostile(check, browser)
        check.that(run.wait(3600) == 0, "the run ended in an error")
    finally:
        browser.close()
        run.kill()
    print(*(line for line in lines if line.startswith(("evaluation", "feedback"))), sep="", end="")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    check.that(sum(r["human/comments"] for r in rows) + 0 <= COMMENTS, "comments are counted")
    check.that(
        rows[-1]["human/comments_in_all"] == COMMENTS, f"the log counts {rows[-1]['human/comments_in_all']} comments"
    )
    read = sum(r["contexts"].get("human", 0) for r in rows)
    check.that(read > 0, "the teacher read none of them")
    print(f"{check.done} checks passed; {COMMENTS} comments became the context of {read} completions")


if __name__ == "__main__":
    main()
