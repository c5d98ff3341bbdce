"use strict";
// Held-out problems: before and after side by side, and every answer in between.
(function () {
  const all = vpd.data("histories"), by = vpd.by, make = vpd.make;
  const PAGE = 6;
  const steps = Array.from(new Set(all.flatMap(function (h) { return h.answers.map(function (a) { return a.step; }); })));
  steps.sort(function (a, b) { return a - b; });
  const CHANGES = ["gained", "lost", "still wrong", "kept right"];
  const browser = by("answer-browser");

  function at(history, step) { return history.answers.find(function (a) { return a.step === step; }); }
  function change(history) {
    const before = at(history, Number(by("from").value)), after = at(history, Number(by("to").value));
    if (!before || !after) return "";
    return before.right ? (after.right ? "kept right" : "lost") : (after.right ? "gained" : "still wrong");
  }
  function mark(answer) { return (answer.right ? "✓ right" : "✗ wrong") + (answer.cut ? ", cut off" : ""); }
  function stepName(step) { return step === 0 ? "before training" : "after step " + step; }
  function answer(found) {
    const box = make("div", found.right ? "right" : "wrong"), head = make("header");
    head.append(make("span", "soft", stepName(found.step)), make("span", "badge", mark(found)));
    box.append(head, vpd.text(found.text));
    if (found.verdict) {
      const words = make("p", "soft", "verdict: ");
      words.append(make("bdi", "", found.verdict));
      box.append(words);
    }
    return box;
  }
  function trail(history) {
    const list = make("ol", "trail");
    list.setAttribute("aria-label", "right or wrong at each evaluation");
    history.answers.forEach(function (a) {
      const item = make("li", a.right ? "right" : "wrong");
      item.append(make("span", "unseen", a.step === 0 ? "before: " : "step "), make("span", "soft", String(a.step)), make("span", "badge", a.right ? "✓" : "✗"));
      item.append(make("span", "unseen", a.right ? " right" : " wrong"));
      list.append(item);
    });
    return list;
  }
  function card(history) {
    const box = make("article", "card rollout answered"), head = make("header"), both = make("div", "both");
    const name = make("span", "", "problem ");
    name.append(make("bdi", "", history.problem));
    head.append(make("b", "", change(history)), name, trail(history));
    box.append(head);
    vpd.part(box, "prompt", vpd.text(history.prompt));
    if (history.expected) vpd.part(box, "expected", vpd.text(history.expected));
    both.append(answer(at(history, Number(by("from").value))), answer(at(history, Number(by("to").value))));
    box.append(both);
    if (history.answers.length > 2) {
      const list = make("div", "run");
      history.answers.forEach(function (a) { list.append(answer(a)); });
      box.append(vpd.details("its answers at all " + history.answers.length + " evaluations", list));
    }
    history.taught.forEach(function (t) {
      box.append(vpd.details("what the teacher read " + stepName(t.step) + " (feedback on a sampled answer: " + t.kind + ")", vpd.text(t.text)));
    });
    return box;
  }
  const show = vpd.pager(by("answer-list"), by("answer-more"), PAGE, card, function (shown, of) {
    by("answer-count").textContent = of ? "Showing " + shown + " of " + vpd.count(of, "problem", "problems") + "." : "No problem like that: choose another kind, or clear the search.";
  });
  function filter() {
    const word = by("answer-word").value.toLowerCase();
    const chosen = browser.querySelector("input[name=change]:checked").value;
    const counts = {};
    const kept = all.filter(function (h) {
      const kind = change(h);
      if (!kind) return false;
      const texts = [h.problem, h.prompt, h.expected].concat(h.answers.map(function (a) { return a.text + "\n" + a.verdict; }));
      if (word && !texts.join("\n").toLowerCase().includes(word)) return false;
      counts[kind] = (counts[kind] || 0) + 1;
      return !chosen || kind === chosen;
    });
    browser.querySelectorAll("input[name=change]").forEach(function (input) {
      const n = input.value ? counts[input.value] || 0 : CHANGES.reduce(function (sum, c) { return sum + (counts[c] || 0); }, 0);
      input.nextElementSibling.textContent = String(n);
    });
    show(kept);
  }

  if (steps.length < 2) return; // nothing to compare yet
  steps.forEach(function (s) {
    vpd.option(by("from"), String(s), s === 0 ? "step 0, untrained" : "step " + s);
    vpd.option(by("to"), String(s), "step " + s);
  });
  by("from").value = String(steps[0]);
  by("to").value = browser.dataset.step;
  if (by("to").selectedIndex < 0) by("to").value = String(steps[steps.length - 1]);
  by("answer-static").hidden = true;
  browser.hidden = false;
  browser.querySelectorAll("input[name=change], select").forEach(function (node) { node.addEventListener("change", filter); });
  by("answer-word").addEventListener("input", filter);
  filter();
})();
