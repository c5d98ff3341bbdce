"use strict";
// What the scripts of a page share. All foreign text goes in as text nodes: a completion is never read as HTML.
const vpd = (function () {
  const BIDI = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g;
  const WORD = /\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu;
  const MOST_CELLS = 400000, LONG = 120; // of a table of common words; characters of a common part that are shown whole

  function by(id) { return document.getElementById(id); }
  function make(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }
  function option(select, value, text) {
    const node = make("option", "", text);
    node.value = value;
    select.append(node);
  }
  function visible(text) { return text.replace(/\n/g, "⏎\n").replace(BIDI, "�"); }
  function part(card, name, node) {
    const row = make("div", "part");
    row.append(make("span", "soft", name), node);
    card.append(row);
  }
  function text(words) { return make("div", "text", words); }
  function details(summary, node, open) {
    const box = make("details");
    box.open = Boolean(open);
    box.append(make("summary", "", summary), node);
    return box;
  }
  function count(n, one, more) { return n + " " + (n === 1 ? one : more); }
  function data(id) { return JSON.parse(by(id).textContent); }

  // A list that grows by a page at a time: `draw` makes a node of an item, `say` is told (shown, of all).
  function pager(list, more, size, draw, say) {
    let items = [], shown = 0;
    function add() {
      items.slice(shown, shown + size).forEach(function (item) { list.append(draw(item)); });
      shown = Math.min(items.length, shown + size);
      more.hidden = shown >= items.length;
      say(shown, items.length);
    }
    more.addEventListener("click", function () {
      const next = list.children.length;
      add();
      if (more.hidden && list.children[next]) { // the button that had the focus is gone
        list.children[next].tabIndex = -1;
        list.children[next].focus();
      }
    });
    return function (found) {
      items = found;
      shown = 0;
      list.replaceChildren();
      add();
    };
  }

  // How `b` differs from `a`, word by word: [["same" | "added" | "left out", words], ...].
  function difference(a, b) {
    const old = a.match(WORD) || [], now = b.match(WORD) || [];
    let head = 0, tail = 0;
    while (head < old.length && head < now.length && old[head] === now[head]) head += 1;
    while (tail < old.length - head && tail < now.length - head && old[old.length - 1 - tail] === now[now.length - 1 - tail]) tail += 1;
    const x = old.slice(head, old.length - tail), y = now.slice(head, now.length - tail), out = [];
    function put(kind, words) {
      if (!words.length) return;
      const last = out[out.length - 1];
      if (last && last[0] === kind) last[1] += words.join(""); else out.push([kind, words.join("")]);
    }
    put("same", old.slice(0, head));
    if (!x.length || !y.length || x.length * y.length > MOST_CELLS) {
      put("left out", x);
      put("added", y);
    } else { // longest common subsequence
      const width = y.length + 1, table = new Uint16Array((x.length + 1) * width);
      for (let i = x.length - 1; i >= 0; i -= 1) {
        for (let j = y.length - 1; j >= 0; j -= 1) {
          table[i * width + j] = x[i] === y[j] ? table[(i + 1) * width + j + 1] + 1 : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
        }
      }
      let i = 0, j = 0;
      while (i < x.length && j < y.length) {
        if (x[i] === y[j]) { put("same", [x[i]]); i += 1; j += 1; }
        else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) { put("left out", [x[i]]); i += 1; }
        else { put("added", [y[j]]); j += 1; }
      }
      put("left out", x.slice(i));
      put("added", y.slice(j));
    }
    put("same", now.slice(now.length - tail));
    return out;
  }
  function differing(a, b) {
    const box = make("div", "text difference");
    difference(a, b).forEach(function (piece) {
      const kind = piece[0], words = piece[1];
      if (kind !== "same") {
        const node = make(kind === "added" ? "ins" : "del");
        node.append(make("span", "unseen", kind + ": "), document.createTextNode(words));
        box.append(node);
      } else if (words.length <= LONG) {
        box.append(make("span", "soft", words));
      } else {
        const fold = make("button", "fold", "… " + (words.length - LONG) + " characters as the student reads them …");
        fold.type = "button";
        fold.addEventListener("click", function () { fold.replaceWith(make("span", "soft", words.slice(LONG / 2, -LONG / 2))); });
        box.append(make("span", "soft", words.slice(0, LONG / 2)), fold, make("span", "soft", words.slice(-LONG / 2)));
      }
    });
    return box;
  }
  function copies(button) {
    button.hidden = false;
    button.addEventListener("click", function () {
      const code = by(button.dataset.copies), range = document.createRange(), chosen = window.getSelection();
      range.selectNodeContents(code);
      chosen.removeAllRanges();
      chosen.addRange(range); // where no clipboard is to be had, the text is marked, to be copied by hand
      const done = function () { button.textContent = "copied"; setTimeout(function () { button.textContent = "copy"; }, 2000); };
      if (navigator.clipboard) navigator.clipboard.writeText(code.textContent).then(done, function () {});
      else if (document.execCommand("copy")) done();
    });
  }
  document.querySelectorAll("button[data-copies]").forEach(copies);
  return { by, make, option, visible, part, text, details, count, data, pager, differing };
})();
