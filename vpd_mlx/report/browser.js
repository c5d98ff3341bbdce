"use strict";
(function () {
  const all = JSON.parse(document.getElementById("rollouts").textContent);
  all.sort(function (a, b) { return b.step - a.step; }); // stable: a step's own order stays
  const PAGE = 12, FULL = 4, SHORT = 240; // cards at a time; nats of the strongest colour; prompts shown unfolded
  const by = function (id) { return document.getElementById(id); };
  const list = by("list"), more = by("more"), count = by("count");
  let matching = [], shown = 0;

  function make(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text; // text only: a completion is never read as HTML
    return node;
  }
  function option(select, value, text) {
    const node = make("option", "", text);
    node.value = value;
    select.append(node);
  }
  function unique(key) { return Array.from(new Set(all.map(key))); }
  function visible(text) {
    return text.replace(/\n/g, "⏎\n").replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g, "�");
  }
  function part(card, name, node) {
    const row = make("div", "part");
    row.append(make("span", "soft", name), node);
    card.append(row);
  }
  function tokens(r) {
    const box = make("div", "text tokens");
    if (!r.pieces) { box.textContent = r.completion; return box; }
    r.pieces.forEach(function (piece, i) {
      const span = make("span", "token seam", visible(piece) || "∅");
      const shift = r.shift ? r.shift[i] : undefined;
      if (typeof shift === "number") {
        const strength = Math.min(1, Math.abs(shift) / FULL) * 0.7;
        span.style.background = "rgba(var(--" + (shift > 0 ? "more" : "less") + ")," + strength.toFixed(3) + ")";
        const text = (shift > 0 ? "+" : "") + shift.toFixed(2);
        span.title = "teacher − student: " + text + " nats";
        span.append(make("small", "", text));
      }
      box.append(span);
    });
    return box;
  }
  function card(r) {
    const box = make("article", "rollout card " + (r.right ? "right" : "wrong"));
    const head = make("header");
    head.append(
      make("span", "badge", r.right ? "✓ right" : "✗ wrong"),
      make("span", "", "step " + r.step),
      make("span", "", "problem " + r.problem + (r.sample === null ? "" : ", sample " + (r.sample + 1))),
      make("span", "", "score " + (r.score === null ? "-" : r.score)),
      make("span", "", "feedback: " + r.kind),
      make("span", "", r.tokens + " tokens" + (r.finish === "length" ? ", cut off at the limit" : ""))
    );
    box.append(head);
    part(box, "prompt", make("div", "text", r.prompt));
    part(box, "completion", tokens(r));
    const joined = (r.pieces || []).join("");
    if (r.pieces && joined.indexOf(r.completion.trim()) < 0) part(box, "as text", make("div", "text", r.completion));
    if (r.verdict) part(box, "verdict", make("div", "text", r.verdict));
    if (r.teacher) {
      const details = make("details");
      details.open = r.teacher.length < SHORT;
      details.append(make("summary", "", "what the teacher read, " + r.kind + (r.cut ? ", cut to the limit" : "")), make("div", "text", r.teacher));
      part(box, "teacher prompt", details);
    } else {
      part(box, "teacher prompt", make("span", "soft", "none: no feedback on this completion"));
    }
    return box;
  }
  function add() {
    matching.slice(shown, shown + PAGE).forEach(function (r) { list.append(card(r)); });
    shown = Math.min(matching.length, shown + PAGE);
    count.textContent = matching.length ? "Showing " + shown + " of " + matching.length + " that match." : "None match: widen the filters.";
    more.hidden = shown >= matching.length;
  }
  function filter() {
    const outcome = by("outcome").value, step = by("step").value, kind = by("kind").value;
    const word = by("word").value.toLowerCase();
    matching = all.filter(function (r) {
      return (!outcome || r.right === (outcome === "right")) && (!step || String(r.step) === step) && (!kind || r.kind === kind) &&
        (!word || (r.problem + "\n" + r.prompt + "\n" + r.completion + "\n" + r.verdict).toLowerCase().includes(word));
    });
    list.replaceChildren();
    shown = 0;
    add();
  }

  unique(function (r) { return r.step; }).sort(function (a, b) { return a - b; }).forEach(function (s) { option(by("step"), String(s), "step " + s); });
  unique(function (r) { return r.kind; }).sort().forEach(function (k) { option(by("kind"), k, k); });
  ["outcome", "step", "kind"].forEach(function (id) { by(id).addEventListener("change", filter); });
  by("word").addEventListener("input", filter);
  by("numbers").addEventListener("change", function () { list.classList.toggle("numbers", by("numbers").checked); });
  more.addEventListener("click", add);
  filter();
})();
