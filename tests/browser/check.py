"""The report and the comparison in a real browser: every plot drawn, values under the pointer, zoom, filters, the order of the
keyboard, nothing off the screen, no request that leaves the page, no error.

    python tests/browser/check.py [--shots FOLDER] [RUN...]

Without RUN it trains small runs of its own. It needs Chromium (`apt-get install chromium`, or `CHROMIUM=path`), and fails
without. It talks to the browser over its debugging pipe, so it needs no other package.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
HOSTILE = '</script><img src=x onerror="window.hacked=1"><b>bold</b>&amp;\u2028\u202eabc\x1b[31m'
VIEWS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]


class Browser:
    """A headless Chromium, spoken to in the Chrome DevTools protocol over two pipes."""

    def __init__(self) -> None:
        found = os.environ.get("CHROMIUM") or next((p for n in NAMES if (p := shutil.which(n))), None)
        if found is None:
            raise SystemExit("no Chromium here: apt-get install chromium, or set CHROMIUM to its path")
        self._profile = tempfile.mkdtemp()
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        flags = f"--headless --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-pipe --user-data-dir={self._profile}"
        # The browser reads commands on 3 and answers on 4; the pipes' own numbers may be those, hence the detour.
        script = f'exec {{r}}<&{to_read} {{w}}>&{to_write}; exec 3<&$r 4>&$w; exec "$0" {flags} about:blank'
        self._process = subprocess.Popen(
            ["bash", "-c", script, found],
            pass_fds=(to_read, to_write),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._number, self.events = b"", 0, []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise SystemExit(f"{method}: {answer['error']}")
                return answer["result"]

    def _receive(self, seconds: float = 60) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0, end - time.monotonic()))
            chunk = os.read(self._read, 1 << 20) if ready else b""
            if not chunk:
                raise SystemExit("Chromium went silent")
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, path: Path, width: int, scheme: str) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self._receive()

    def eval(self, script: str) -> Any:
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise SystemExit(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def screenshot(self, path: Path, clip: dict[str, float] | None = None) -> None:
        extra = {"clip": {**clip, "scale": 1}} if clip else {}
        data = self.call("Page.captureScreenshot", captureBeyondViewport=clip is not None, **extra)["data"]
        path.write_bytes(base64.b64decode(data))

    def errors(self) -> list[str]:
        """Exceptions, console errors, log entries, and requests other than the file itself."""
        out = []
        for e in self.events:
            p = e["params"]
            if e["method"] == "Runtime.exceptionThrown":
                out.append(f"exception: {p['exceptionDetails']}")
            elif e["method"] == "Runtime.consoleAPICalled" and p["type"] in ("error", "warning", "assert"):
                out.append(f"console: {p['args']}")
            elif e["method"] == "Log.entryAdded" and p["entry"]["level"] in ("error", "warning"):
                out.append(f"log: {p['entry']}")
            elif e["method"] == "Network.requestWillBeSent" and p.get("type") != "Document":
                out.append(f"request: {p['request']['url'][:200]}")
        return out

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        shutil.rmtree(self._profile, ignore_errors=True)


PLOTS = """[...document.querySelectorAll('figure')].map(f => {
  const svg = f.querySelector('svg'), box = svg.getBoundingClientRect();
  const seen = m => { const b = m.getBoundingClientRect(); return b.width + b.height > 0; };
  const marks = [...svg.querySelectorAll('path, use')].filter(seen);
  const ground = getComputedStyle(f).backgroundColor;
  const faint = [...svg.querySelectorAll('text')].filter(t => getComputedStyle(t).fill === ground);
  const out = [...svg.querySelectorAll('text')].filter(t => { const b = t.getBoundingClientRect();
    return b.left < box.left - 3 || b.right > box.right + 3 || b.top < box.top - 3 || b.bottom > box.bottom + 3; });
  return {id: f.id, sentence: f.querySelector('p').textContent, wide: box.width, high: box.height, marks: marks.length,
          labels: svg.querySelectorAll('text').length, faint: faint.length, out: out.map(t => t.textContent)};
})"""


class Check:
    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.done = 0

    def that(self, truth: Any, what: str) -> None:
        if not truth:
            self.browser.close()
            raise SystemExit(f"FAILED: {what}")
        self.done += 1

    def page(self, name: str, path: Path, width: int, scheme: str, plots: set[str]) -> None:
        where = f"{name}, {width} px, {scheme}"
        self.browser.open(path, width, scheme)
        seen = self.browser.eval(PLOTS)
        missing = {f"plot-{p}" for p in plots} - {p["id"] for p in seen}
        self.that(not missing, f"{where}: plots missing: {missing}")
        for plot in seen:
            at = f"{where}: {plot['id']}"
            self.that(plot["wide"] > 250 and plot["high"] > 100, f"{at} is {plot['wide']} x {plot['high']}")
            self.that(plot["marks"] > 5 and plot["labels"] > 3, f"{at} is all but empty: {plot}")
            self.that(not plot["faint"], f"{at}: {plot['faint']} labels in the colour of the ground")
            self.that(not plot["out"], f"{at}: labels cut off: {plot['out']}")
            self.that(len(plot["sentence"]) > 30, f"{at} is not explained")
        wide = self.browser.eval("document.documentElement.scrollWidth")
        self.that(wide <= width, f"{where}: the page is {wide} px wide")
        dark = self.browser.eval("getComputedStyle(document.body).backgroundColor")
        light = sum(int(c) for c in dark[4:-1].split(",")) > 380
        self.that(light == (scheme == "light"), f"{where}: ground is {dark}")
        self.that(not self.browser.errors(), f"{where}: {self.browser.errors()[:3]}")

    def filters(self, name: str) -> None:
        rows = self.browser.eval("JSON.parse(document.getElementById('rollouts').textContent)")
        self.that(rows, f"{name}: rollouts are there")
        groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
        for r in rows:
            groups.setdefault((r["step"], r["problem"]), []).append(r)
        kinds, steps = sorted({r["kind"] for r in rows}), sorted({r["step"] for r in rows})
        shown = self.browser.eval("[...document.querySelectorAll('#kind option')].map(o => o.value)")
        self.that(shown == ["", *kinds], f"{name}: kinds {shown}, not {kinds}")
        shown = self.browser.eval("[...document.querySelectorAll('#step option')].map(o => o.value)")
        self.that(shown == ["", *map(str, steps)], f"{name}: steps {shown}, not {steps}")
        met = Counter(problem for _, problem in groups)
        again = [problem for problem, times in met.items() if times > 1]
        shown = self.browser.eval("[...document.querySelectorAll('#problem option')].map(o => o.value)")
        self.that(shown == ["", *again], f"{name}: problems met again {shown}, not {again}")
        word = rows[0]["prompt"][:5]
        cases = [
            *(({"outcome": v}, lambda r, v=v: r["right"] == (v == "right")) for v in ("right", "wrong")),
            *(({"kind": k}, lambda r, k=k: r["kind"] == k) for k in kinds),
            *(({"step": str(s)}, lambda r, s=s: r["step"] == s) for s in (steps[0], steps[-1])),
            *(({"problem": p}, lambda r, p=p: r["problem"] == p) for p in again[:1]),
            ({"outcome": "wrong", "kind": kinds[0]}, lambda r: not r["right"] and r["kind"] == kinds[0]),
            ({"word": word}, lambda r: word.lower() in json.dumps(r, ensure_ascii=False).lower()),
            ({"word": "no such words anywhere"}, lambda r: False),
            *(({"order": order}, lambda r: True) for order in ("newest", "oldest", "mixed")),
        ]
        for values, keep in cases:
            whole = {**dict.fromkeys(("outcome", "kind", "step", "problem", "word"), ""), "order": "mixed", **values}
            # As a person would: change the control, then press `show more` to the end.
            cards = self.browser.eval(
                f"""(() => {{ const v = {json.dumps(whole)};
                for (const k in v) {{ const e = document.getElementById(k); e.value = v[k];
                  e.dispatchEvent(new Event(k === 'word' ? 'input' : 'change', {{bubbles: true}})); }}
                const more = document.getElementById('more');
                for (let i = 0; i < 1000 && !more.hidden; i++) more.click();
                return [...document.querySelectorAll('#list article')].map(a => [
                  Number(a.querySelector('header b').textContent.slice(5)), a.querySelector('bdi').textContent,
                  [...a.querySelectorAll('.answer')].map(b => [b.classList.contains('right'),
                    Number((b.querySelector('.times') || {{textContent: '× 1'}}).textContent.slice(2))])]); }})()"""
            )
            wanted = self._cards(groups, keep, whole["order"], values.get("problem", ""))
            if "word" in values and wanted:
                self.that(cards, f"{name}: the text filter finds nothing")
            else:
                self.that(cards == wanted, f"{name}: {values} shows {cards[:3]} …, not {wanted[:3]} …")
        if any(r["shift"] for r in rows):
            tinted = "[...document.querySelectorAll('.token')].filter(t => t.style.background).length"
            self.that(self.browser.eval(tinted) > 0, f"{name}: no token is coloured")
            size = "document.querySelector('.token small').getBoundingClientRect().width"
            self.that(self.browser.eval(size) == 0, f"{name}: numbers hidden at first")
            self.browser.eval("document.getElementById('numbers').click()")
            self.that(self.browser.eval(size) > 0, f"{name}: numbers shown on demand")
            self.browser.eval("document.getElementById('numbers').click()")
        if again:
            followed = self.browser.eval(
                """(() => { document.querySelector('#list .follow').click(); const list = document.getElementById('list');
                return [document.getElementById('problem').value, document.activeElement.id,
                  [...list.querySelectorAll('article')].map(a => [a.querySelector('bdi').textContent,
                    Number(a.querySelector('header b').textContent.slice(5))])]; })()"""
            )
            problem, focus, cards = followed
            self.that(problem in again and focus == "problem", f"{name}: {problem} is followed, {focus} has the focus")
            met_at = sorted(step for step, other in groups if other == problem)
            self.that(cards == [[problem, step] for step in met_at], f"{name}: {problem} at {cards}, not {met_at}")
            self.browser.eval(
                """(() => { const all = document.getElementById('problem'), more = document.getElementById('more');
                all.value = ''; all.dispatchEvent(new Event('change'));
                for (let i = 0; i < 1000 && !more.hidden; i++) more.click(); })()"""
            )
        if any(r["teacher"] and r["student"] for r in rows):
            added = self.browser.eval("[...document.querySelectorAll('#list ins')].map(i => i.textContent)")
            self.that(added, f"{name}: what the teacher reads besides is marked")

    @staticmethod
    def _cards(groups: dict[tuple[int, str], list[dict[str, Any]]], keep: Any, order: str, problem: str) -> list[Any]:
        """The cards that should be there: [step, problem, [[right, how often], …]] of each."""

        def mixed(rows: list[dict[str, Any]]) -> bool:
            return 0 < sum(r["right"] for r in rows) < len(rows)

        cards = []
        for (step, name), rows in groups.items():
            same = Counter((r["right"], r["score"], r["completion"], r["verdict"]) for r in rows if keep(r))
            if same:
                cards.append((mixed(rows), [step, name, [[key[0], times] for key, times in same.items()]]))
        oldest = bool(problem) or order == "oldest"
        cards.sort(key=lambda c: c[1][0] if oldest else -c[1][0])
        if order == "mixed" and not problem:
            cards.sort(key=lambda c: not c[0])
        return [card for _, card in cards]

    def answers(self, name: str) -> None:
        """Held-out problems by what became of them, between any two evaluations."""
        found = self.browser.eval("JSON.parse(document.getElementById('histories').textContent)")
        steps = sorted({a["step"] for h in found for a in h["answers"]})
        self.that(len(steps) > 1, f"{name}: answers of several evaluations")
        self.that(
            self.browser.eval("document.getElementById('answer-static').hidden"), f"{name}: no problem stands twice"
        )
        kinds = {
            (False, True): "gained",
            (True, False): "lost",
            (False, False): "still wrong",
            (True, True): "kept right",
        }
        for first, last in ((steps[-1], steps[0]), (steps[0], steps[1]), (steps[0], steps[-1])):
            change = {}
            for h in found:
                by_step = {a["step"]: a["right"] for a in h["answers"]}
                if first in by_step and last in by_step:
                    change[h["problem"]] = kinds[by_step[first], by_step[last]]
            for kind in (*kinds.values(), ""):
                shown = self.browser.eval(
                    f"""(() => {{ document.getElementById('from').value = '{first}';
                    document.getElementById('to').value = '{last}';
                    const input = [...document.querySelectorAll('input[name=change]')].find(i => i.value === '{kind}');
                    input.checked = true; input.dispatchEvent(new Event('change', {{bubbles: true}}));
                    const more = document.getElementById('answer-more');
                    for (let i = 0; i < 1000 && !more.hidden; i++) more.click();
                    const cards = [...document.querySelectorAll('#answer-list article')];
                    return [Number(input.nextElementSibling.textContent), cards.map(a => a.querySelector('bdi').textContent)];
                    }})()"""
                )
                wanted = [p for p, k in change.items() if kind in ("", k)]
                self.that(
                    shown == [len(wanted), wanted], f"{name}: {kind or 'all'} from {first} to {last} shows {shown}"
                )
        marks = self.browser.eval(
            "[...document.querySelectorAll('#answer-list .trail')].map(t => t.querySelectorAll('li').length)"
        )
        self.that(all(marks), f"{name}: every problem has its marks over the run: {marks}")

    def mouse(self, kind: str, x: float, y: float, held: bool = False) -> None:
        button = {"button": "left", "buttons": 1} if held or kind == "mouseReleased" else {}
        self.browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, clickCount=1, **button)

    def key(self, name: str, text: str = "") -> None:
        code = {"Tab": 9, "ArrowRight": 39, "Escape": 27, "End": 35}.get(name, 0)
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.browser.call("Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=code, **more)

    def hover(self, name: str, plot: str) -> None:
        """Values under the pointer and the keys are those of the run; a drag zooms, Escape takes it back."""
        at = f"{name}: plot {plot}"
        data = json.loads(self.browser.eval(f"document.getElementById('plot-{plot}').dataset.chart"))
        axis = data["axes"][0]
        track = axis["tracks"][0]
        self.browser.eval(f"document.getElementById('plot-{plot}').scrollIntoView({{block: 'center'}})")
        left, top, unit = self.browser.eval(
            f"""(() => {{ const s = document.querySelector('#plot-{plot} svg'), b = s.getBoundingClientRect();
            return [b.left, b.top, b.width / s.viewBox.baseVal.width]; }})()"""
        )
        tip, hidden = (f"document.querySelector('#plot-{plot} .tip').{what}" for what in ("textContent", "hidden"))

        def x_of(step: float) -> float:
            share = (step - axis["x"][0]) / (axis["x"][1] - axis["x"][0])
            return left + unit * (axis["box"][0] + share * (axis["box"][2] - axis["box"][0]))

        y = top + unit * (axis["box"][1] + axis["box"][3]) / 2
        self.that(self.browser.eval(hidden), f"{at}: nothing is said before it is pointed at")
        for i in {0, len(track["x"]) // 2, len(track["x"]) - 1}:
            self.mouse("mouseMoved", x_of(track["x"][i]), y)
            said, value = self.browser.eval(tip), track["y"][i]
            shown = float(re.search(rf"{re.escape(track['name'])} (-?[\d.]+)", said)[1])
            self.that(abs(shown - value) <= 1e-3 * abs(value), f"{at}: {said!r} at step {track['x'][i]}, not {value}")
            self.that(said.startswith(f"step {track['x'][i]:.4g}"), f"{at}: {said!r} at step {track['x'][i]}")
            edges = f"const b = document.querySelector('#plot-{plot} .tip').getBoundingClientRect(); return [b.left, b.right];"
            box = self.browser.eval(f"(() => {{ {edges} }})()")
            self.that(box[0] >= 0 and box[1] <= self.browser.eval("innerWidth"), f"{at}: the values are off the screen")
        if len(track["x"]) < 3:
            return
        whole = self.browser.eval(f"document.querySelector('#plot-{plot} svg').innerHTML")
        ends = x_of(track["x"][0]) - 3, x_of((track["x"][-2] + track["x"][-1]) / 2)
        self.mouse("mousePressed", ends[0], y, held=True)
        self.mouse("mouseMoved", sum(ends) / 2, y, held=True)
        self.mouse("mouseMoved", ends[1], y, held=True)
        self.mouse("mouseReleased", ends[1], y)
        reset = f"document.querySelector('#plot-{plot} .reset').hidden"
        self.that(not self.browser.eval(reset), f"{at}: a drag zooms")
        ticks = self.browser.eval(f"document.querySelectorAll('#plot-{plot} .ticks text').length")
        self.that(ticks > 2, f"{at}: {ticks} labels when zoomed")
        broken = self.browser.eval(f"document.querySelector('#plot-{plot} svg').innerHTML.includes('NaN')")
        self.that(not broken, f"{at}: a point is lost in zooming")
        self.key("Escape")
        self.that(self.browser.eval(reset), f"{at}: Escape shows the whole run")
        self.key("End")
        self.that(self.browser.eval(tip).startswith(f"step {track['x'][-1]:.4g}"), f"{at}: End goes to the last step")
        self.key("+", "+")
        self.that(not self.browser.eval(reset), f"{at}: + zooms")
        self.key("Escape")
        self.mouse("mouseMoved", 1, 1)
        self.browser.eval(f"document.querySelector('#plot-{plot} svg').blur()")
        lines = f"[...document.querySelectorAll('#plot-{plot} svg path')].length"
        self.that(self.browser.eval(lines) == whole.count("<path"), f"{at}: the plot is whole again")

    def keyboard(self, name: str) -> None:
        """Tab goes through the page in its order, and through everything that can be used."""
        self.browser.eval("window.scrollTo(0, 0); document.activeElement.blur()")
        wanted = self.browser.eval(
            """(() => {
            window.usable = [...document.querySelectorAll('a[href], button, input, select, summary, svg[tabindex]')]
              .filter(e => e.offsetParent !== null || e.ownerSVGElement === null && e.tagName === 'svg')
              .filter(e => !(e.matches('summary') ? e.parentElement.parentElement : e).closest('details:not([open])'))
              .filter(e => e.type !== 'radio' || e.checked);
            return window.usable.length; })()"""
        )
        seen = []
        for _ in range(wanted + 8):
            self.key("Tab")
            seen.append(self.browser.eval("window.usable.indexOf(document.activeElement)"))
            if seen[-1] == wanted - 1:
                break
        places = [i for i in seen if i >= 0]
        self.that(places == list(range(wanted)), f"{name}: Tab goes {places[:40]} … of {wanted}")

    def in_view(self, name: str, width: int) -> None:
        """No control, figure or cell is cut off at the right, and the difference between runs never needs scrolling."""
        out = self.browser.eval(
            """[...document.querySelectorAll(
              'td.difference, #differences td, #differences th, button, select, input, .card, svg, p')]
            .filter(e => { const b = e.getBoundingClientRect();
              return b.width > 0 && (b.right > innerWidth + 1 || b.left < -1); })
            .map(e => e.outerHTML.slice(0, 120))"""
        )
        self.that(not out, f"{name}, {width} px: off the screen: {out[:3]}")

    def hostile(self, name: str) -> None:
        self.browser.eval("document.querySelectorAll('details').forEach(d => d.open = true)")
        self.that(self.browser.eval("window.hacked === undefined"), f"{name}: a completion ran as a script")
        self.that(self.browser.eval("document.images.length === 0"), f"{name}: a completion became an image")
        text = self.browser.eval("document.getElementById('list').textContent")
        self.that(
            '<img src=x onerror="window.hacked=1"><b>bold</b>&amp;' in text,
            f"{name}: the hostile text is shown as text",
        )
        answers = self.browser.eval("[...document.querySelectorAll('#answer-list .answered')].map(a => a.textContent)")
        self.that(sum(HOSTILE[:60] in a for a in answers) == 1, f"{name}: the hostile answer is shown as text")
        static = self.browser.eval("[...document.querySelectorAll('#answer-static .answered')].map(a => a.textContent)")
        self.that(0 < len(static) <= 5, f"{name}: {len(static)} answers are there without JavaScript")
        self.that(sum(HOSTILE[:60] in a for a in static) == 1, f"{name}: and so is the hostile one, as text")
        self.that(
            self.browser.eval(
                "[...document.querySelectorAll('.answered details')].every(d => d.textContent.length > 60)"
            ),
            f"{name}: what the teacher read is there",
        )


def small_runs(folder: Path) -> dict[str, Path]:
    """A finished VPD run with hostile texts among its rollouts, an SDPO run of one step, and an unfinished GRPO run."""
    from conftest import QUICKSTART, SMALL

    from vpd_mlx.recipe import load_recipe
    from vpd_mlx.run.loop import train

    runs = {"vpd": {"steps": 4, "e_step.every": 1}, "sdpo": {"steps": 1}, "grpo": {"steps": 3}}
    for name, changes in runs.items():
        recipe = load_recipe(QUICKSTART, list({**SMALL, "evaluation.every": 2, "algorithm": name, **changes}.items()))
        train(recipe, folder / name)
    path = folder / "vpd" / "rollouts.jsonl"
    logged = [json.loads(line) for line in path.read_text().splitlines()]
    row = logged[0]
    context = {"kind": HOSTILE, "text": HOSTILE, "cut": False}
    texts = dict.fromkeys(("problem", "prompt", "completion", "verdict", "teacher_prompt"), HOSTILE)
    hostile = {**row, **texts, "context": context, "pieces": [HOSTILE, "<b>"], "shift": ["nan", -9.0], "tokens": 2}
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(hostile) + "\n")
        for again in logged:  # the first problem comes back in the last step
            if again["problem"] == row["problem"]:
                f.write(json.dumps({**again, "step": 4}) + "\n")
    path = folder / "vpd" / "answers.jsonl"
    texts = dict.fromkeys(("prompt", "completion", "verdict", "context", "teacher_prompt", "problem"), HOSTILE)
    answers = "".join(json.dumps({"step": step, "success": step > 0, **texts}) + "\n" for step in (0, 4))
    path.write_text(answers + path.read_text())
    (folder / "grpo" / "summary.json").unlink()
    with (folder / "grpo" / "metrics.jsonl").open("a") as f:
        f.write('{"step": 4, "rew')
    return {name: folder / name for name in runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--shots", type=Path, help="folder for screenshots")
    arguments = parser.parse_args()
    browser = Browser()
    check = Check(browser)
    from vpd_mlx.report.page import comparison_page, run_page, save
    from vpd_mlx.run.folder import load_run, short_names

    with tempfile.TemporaryDirectory() as folder:
        own = not arguments.runs
        paths = small_runs(Path(folder)) if own else dict(zip(short_names(arguments.runs), arguments.runs, strict=True))
        runs = {name: load_run(path) for name, path in paths.items()}
        pages = {}
        for number, (name, run) in enumerate(runs.items()):
            pages[name] = Path(folder) / f"report-{number}.html"
            save(pages[name], run_page(run, 400))
        if len(runs) > 1:
            pages["comparison"] = Path(folder) / "comparison.html"
            save(pages["comparison"], comparison_page(runs))
        shared = {"reward", "length"}
        for number, (name, path) in enumerate(pages.items()):
            plots = shared | {"student", "greedy", "teacher", "entropy"}
            if name != "comparison":
                plots = shared | {"accuracy", "gap", "groups", "entropy", "updates", "seconds", "memory"}
                if runs[name].algorithm != "grpo":
                    plots |= {"divergence", "contexts"}
                    # A batch all of one outcome has no margin.
                    if any(m.get(f"{u}/margin") is not None for m in runs[name].metrics for u in ("e_step", "student")):
                        plots.add("margin")
            for width, scheme in VIEWS:
                check.page(name, path, width, scheme, plots)
                check.in_view(name, width)
                check.keyboard(f"{name}, {width} px")
                check.hover(f"{name}, {width} px, {scheme}", "length")
                check.hover(f"{name}, {width} px, {scheme}", "student" if name == "comparison" else "accuracy")
                if name != "comparison":
                    check.filters(f"{name}, {width} px, {scheme}")
                    if runs[name].answers:
                        check.answers(f"{name}, {width} px, {scheme}")
                    check.in_view(name, width)
                    if own and name == "vpd":
                        check.hostile(name)
                    # Reload the page, so that the screenshot shows it as it opens.
                    browser.open(path, width, scheme)
                check.that(not browser.errors(), f"{name}: {browser.errors()[:3]}")
                if arguments.shots is not None:
                    arguments.shots.mkdir(parents=True, exist_ok=True)
                    size = browser.eval("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
                    clip = {"x": 0, "y": 0, "width": size[0], "height": min(size[1], 9000)}
                    browser.screenshot(
                        arguments.shots / f"{number}-{name.replace('/', '-')}-{width}-{scheme}.png", clip
                    )
    browser.close()
    print(f"{check.done} checks hold on {len(pages)} pages")


if __name__ == "__main__":
    main()
