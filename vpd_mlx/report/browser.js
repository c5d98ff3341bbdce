"use strict";
// Rollouts of training: a card for each group, identical answers folded.
(function () {
  const all = vpd.data("rollouts"), by = vpd.by, make = vpd.make;
  const PAGE = 8, FULL = 4, SHORT = 240; // groups at a time; nats of the strongest colour; prompts shown unfolded
  const groups = new Map();
  all.forEach(function (r) {
    const key = r.step + "\n" + r.problem;
    if (!groups.has(key)) groups.set(key, { step: r.step, problem: r.problem, rows: [], right: 0 });
    const group = groups.get(key);
    group.rows.push(r);
    group.right += r.right ? 1 : 0;
  });
  const times = new Map(); // at how many steps a problem was met
  groups.forEach(function (g) { times.set(g.problem, (times.get(g.problem) || 0) + 1); });

  function mixed(g) { return g.right > 0 && g.right < g.rows.length; }
  function unique(key) { return Array.from(new Set(all.map(key))); }
  function tokens(r) {
    const box = make("div", "text tokens");
    if (!r.pieces) { box.textContent = r.completion; return box; }
    r.pieces.forEach(function (piece, i) {
      const span = make("span", "token seam", vpd.visible(piece) || "∅");
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
  // [[key, rows], ...] in the order in which the keys come.
  function folded(rows, key) {
    const found = new Map();
    rows.forEach(function (r) {
      const k = key(r);
      if (!found.has(k)) found.set(k, []);
      found.get(k).push(r);
    });
    return Array.from(found.values());
  }
  function teacher(box, same) {
    folded(same, function (r) { return r.kind + "\n" + r.teacher; }).forEach(function (rows, i, every) {
      const r = rows[0], often = every.length > 1 ? " (" + rows.length + " of " + same.length + ")" : "";
      if (!r.teacher) {
        vpd.part(box, "teacher prompt", make("span", "soft", "none: no feedback on this completion" + often));
        return;
      }
      const read = r.student ? vpd.differing(r.student, r.teacher) : vpd.text(r.teacher);
      const whole = make("div");
      if (i > 0) whole.append(tokens(r)); // the first one's are above
      whole.append(read);
      if (r.student) whole.append(vpd.details("the whole of it", vpd.text(r.teacher)));
      const what = r.student ? "what the teacher reads besides" : "what the teacher read";
      const open = i === 0 && (r.student ? r.teacher.length - r.student.length : r.teacher.length) < SHORT;
      vpd.part(box, "teacher prompt", vpd.details(what + ", " + r.kind + (r.cut ? ", cut to the limit" : "") + often, whole, open));
    });
  }
  function answer(same) {
    const r = same[0], box = make("div", "answer " + (r.right ? "right" : "wrong")), head = make("header");
    head.append(make("span", "badge", r.right ? "✓ right" : "✗ wrong"));
    if (same.length > 1) head.append(make("b", "times", "× " + same.length));
    const samples = same.map(function (s) { return s.sample; }).filter(function (s) { return s !== null; });
    if (samples.length) head.append(make("span", "", (samples.length > 1 ? "samples " : "sample ") + samples.map(function (s) { return s + 1; }).join(", ")));
    head.append(
      make("span", "", "score " + (r.score === null ? "-" : r.score)),
      make("span", "", vpd.count(r.tokens, "token", "tokens") + (r.finish === "length" ? ", cut off at the limit" : ""))
    );
    box.append(head);
    vpd.part(box, "completion", tokens(r));
    const joined = (r.pieces || []).join("");
    if (r.pieces && joined.indexOf(r.completion.trim()) < 0) vpd.part(box, "as text", vpd.text(r.completion));
    if (r.verdict) vpd.part(box, "verdict", vpd.text(r.verdict));
    teacher(box, same);
    return box;
  }
  function card(found) {
    const g = found.group, box = make("article", "rollout card"), head = make("header"), first = g.rows[0];
    const name = make("span", "", "problem ");
    name.append(make("bdi", "", g.problem));
    head.append(make("b", "", "step " + g.step), name, make("span", mixed(g) ? "mixed" : "", g.right + " of " + g.rows.length + " right" + (mixed(g) ? ", mixed" : "")));
    if (found.rows.length < g.rows.length) head.append(make("span", "", found.rows.length + " shown"));
    if (times.get(g.problem) > 1 && by("problem").value !== g.problem) {
      const follow = make("button", "follow", "follow over " + times.get(g.problem) + " steps");
      follow.type = "button";
      follow.addEventListener("click", function () {
        by("problem").value = g.problem;
        by("step").value = by("kind").value = by("outcome").value = by("word").value = "";
        filter();
        by("problem").focus();
      });
      head.append(follow);
    }
    box.append(head);
    vpd.part(box, "prompt", vpd.text(first.prompt));
    if (first.expected) vpd.part(box, "expected", vpd.text(first.expected));
    folded(found.rows, function (r) { return [r.right, r.score, r.completion, r.verdict].join("\n"); }).forEach(function (same) { box.append(answer(same)); });
    return box;
  }
  let matching = 0;
  const show = vpd.pager(by("list"), by("more"), PAGE, card, function (shown, of) {
    by("count").textContent = of
      ? "Showing " + shown + " of " + vpd.count(of, "group", "groups") + ", with " + vpd.count(matching, "rollout that matches", "rollouts that match") + "."
      : "None match: widen the filters.";
  });
  function filter() {
    const outcome = by("outcome").value, step = by("step").value, kind = by("kind").value, problem = by("problem").value;
    const word = by("word").value.toLowerCase(), order = by("order").value, found = [];
    matching = 0;
    groups.forEach(function (group) {
      if ((step && String(group.step) !== step) || (problem && group.problem !== problem)) return;
      const rows = group.rows.filter(function (r) {
        return (!outcome || r.right === (outcome === "right")) && (!kind || r.kind === kind) &&
          (!word || (r.problem + "\n" + r.prompt + "\n" + r.completion + "\n" + r.verdict + "\n" + r.expected).toLowerCase().includes(word));
      });
      matching += rows.length;
      if (rows.length) found.push({ group: group, rows: rows });
    });
    const oldest = problem || order === "oldest"; // one problem is read in the order in which it was learned
    found.sort(function (a, b) { // stable: a step's own order stays
      const kinds = order === "mixed" && !problem ? mixed(b.group) - mixed(a.group) : 0;
      return kinds || (oldest ? a.group.step - b.group.step : b.group.step - a.group.step);
    });
    show(found);
  }

  unique(function (r) { return r.step; }).sort(function (a, b) { return a - b; }).forEach(function (s) { vpd.option(by("step"), String(s), "step " + s); });
  unique(function (r) { return r.kind; }).sort().forEach(function (k) { vpd.option(by("kind"), k, k); });
  times.forEach(function (n, problem) { if (n > 1) vpd.option(by("problem"), problem, problem + " (" + n + " steps)"); });
  by("problem").parentElement.hidden = by("problem").options.length < 2;
  ["outcome", "step", "kind", "problem", "order"].forEach(function (id) { by(id).addEventListener("change", filter); });
  by("word").addEventListener("input", filter);
  by("numbers").addEventListener("change", function () { by("list").classList.toggle("numbers", by("numbers").checked); });
  filter();
})();
