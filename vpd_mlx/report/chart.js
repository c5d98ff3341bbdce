"use strict";
// Values under the pointer or the keys, and zoom. The plots themselves are static SVG, which stands without this.
(function () {
  const SPACE = "http://www.w3.org/2000/svg", NEAR = 8, PAD = 0.06, GRIDS = 6; // units of the SVG; share of a range; lines
  function svgNode(tag, values) {
    const node = document.createElementNS(SPACE, tag);
    Object.keys(values).forEach(function (k) { node.setAttribute(k, values[k]); });
    return node;
  }
  function figures(value) {
    const size = Math.abs(value);
    return size !== 0 && (size < 0.001 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  }
  function nice(low, high, whole) { // round values within a range
    const raw = (high - low) / GRIDS, power = Math.pow(10, Math.floor(Math.log10(raw)));
    let step = [1, 2, 5, 10].find(function (m) { return m * power >= raw; }) * power;
    if (whole) step = Math.max(1, Math.round(step));
    const found = [];
    for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) found.push(Number(v.toPrecision(12)));
    return found;
  }

  function plot(figure) {
    const svg = figure.querySelector("svg"), axes = JSON.parse(figure.dataset.chart).axes;
    if (!axes.length) return;
    const xs = Array.from(new Set(axes.flatMap(function (a) { return a.tracks.flatMap(function (t) { return t.x; }); })));
    xs.sort(function (a, b) { return a - b; });
    const groups = Array.from(svg.querySelectorAll("g[id*='-axes_']")), whole = axes[0].x.slice();
    const tip = vpd.make("div", "tip"), reset = vpd.make("button", "reset", "whole run"), overlay = svgNode("g", { class: "overlay" });
    let range = whole.slice(), at = -1, from = null;
    tip.setAttribute("role", "status");
    tip.hidden = true;
    reset.type = "button";
    reset.hidden = true;
    figure.append(tip, reset);
    svg.append(overlay);
    svg.tabIndex = 0;
    axes.forEach(function (a, i) { a.group = groups[i]; a.shown = a.y.slice(); });

    function scale(a, value) { return a.log ? Math.log10(Math.max(value, 1e-300)) : value; }
    function toX(a, x) { return a.box[0] + (x - range[0]) / (range[1] - range[0]) * (a.box[2] - a.box[0]); }
    function toY(a, y) {
      const low = scale(a, a.shown[0]), high = scale(a, a.shown[1]);
      return a.box[3] - (scale(a, y) - low) / (high - low) * (a.box[3] - a.box[1]);
    }
    function place(event) {
      const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()), box = axes[0].box;
      return Math.min(box[2], Math.max(box[0], point.x));
    }
    function toStep(x) { const box = axes[0].box; return range[0] + (x - box[0]) / (box[2] - box[0]) * (range[1] - range[0]); }
    function within() { return xs.filter(function (x) { return x >= range[0] && x <= range[1]; }); }
    function nearest(step) {
      return within().reduce(function (best, x) { return Math.abs(x - step) < Math.abs(best - step) ? x : best; }, Infinity);
    }

    function point(x) {
      overlay.replaceChildren();
      tip.hidden = !isFinite(x);
      if (tip.hidden) { at = -1; return; }
      at = xs.indexOf(x);
      tip.replaceChildren(vpd.make("b", "", "step " + figures(x)));
      axes.forEach(function (a) {
        overlay.append(svgNode("line", { x1: toX(a, x), x2: toX(a, x), y1: a.box[1], y2: a.box[3], class: "cursor" }));
        const there = a.tracks.some(function (t) { return t.x.includes(x); });
        if (axes.length > 1 && there) tip.append(vpd.make("div", "soft", a.name));
        a.tracks.forEach(function (t) {
          const i = t.x.indexOf(x);
          if (i < 0) return;
          const row = vpd.make("div"), dot = vpd.make("span", "dot"), y = toY(a, t.y[i]);
          dot.style.background = "var(--" + t.color + ")";
          const bounds = t.low && t.low[i] !== t.high[i] ? " (" + figures(t.low[i]) + " to " + figures(t.high[i]) + ")" : "";
          row.append(dot, document.createTextNode(t.name + " "), vpd.make("b", "", figures(t.y[i])), document.createTextNode(bounds));
          tip.append(row);
          if (!a.fixed && y >= a.box[1] - 1 && y <= a.box[3] + 1) {
            overlay.append(svgNode("circle", { cx: toX(a, x), cy: y, r: 3, fill: "var(--" + t.color + ")" }));
          }
        });
      });
      const box = svg.getBoundingClientRect(), around = figure.getBoundingClientRect(), unit = box.width / svg.viewBox.baseVal.width;
      const left = box.left - around.left + unit * toX(axes[0], x), room = around.width - tip.offsetWidth - 4;
      tip.style.left = Math.max(4, left + 12 <= room ? left + 12 : Math.min(room, left - tip.offsetWidth - 12)) + "px";
      const top = box.top - around.top, narrow = tip.offsetWidth > box.width / 2; // then it would hide the curves
      tip.style.top = (narrow ? Math.max(2, top - tip.offsetHeight) : top + unit * axes[0].box[1]) + "px";
    }

    // Every point of what is drawn inside the axes is moved; ticks and grid are made anew.
    function move(a, before) {
      const old = { box: a.box, log: a.log, shown: before.y };
      function mapX(x) { const s = before.x[0] + (x - a.box[0]) / (a.box[2] - a.box[0]) * (before.x[1] - before.x[0]); return toX(a, s); }
      function mapY(y) {
        const low = scale(old, old.shown[0]), high = scale(old, old.shown[1]);
        const value = low + (a.box[3] - y) / (a.box[3] - a.box[1]) * (high - low);
        return toY(a, a.log ? Math.pow(10, value) : value);
      }
      function path(node, dx, dy) {
        if (node.dataset.whole === undefined) node.dataset.whole = node.getAttribute("d");
        let even = false;
        node.setAttribute("d", node.dataset.whole.replace(/-?\d+(\.\d+)?(e-?\d+)?/g, function (text) {
          even = !even;
          const n = Number(text);
          return (even ? mapX(n + dx) - dx : mapY(n + dy) - dy).toFixed(3);
        }));
      }
      a.group.querySelectorAll("path[clip-path]").forEach(function (node) { if (!node.closest("[id*='matplotlib.axis']")) path(node, 0, 0); });
      a.group.querySelectorAll("g[clip-path] > use").forEach(function (node) {
        if (node.dataset.x === undefined) { node.dataset.x = node.getAttribute("x"); node.dataset.y = node.getAttribute("y"); }
        const x = Number(node.dataset.x), y = Number(node.dataset.y);
        if (x === 0) path(svg.querySelector(node.getAttribute("href") || node.getAttribute("xlink:href")), 0, y); // an area
        else { node.setAttribute("x", mapX(x)); node.setAttribute("y", mapY(y)); }
      });
      a.group.querySelectorAll("[id*='matplotlib.axis'] > g[id*='tick']").forEach(function (node) { node.style.display = zoomed() ? "none" : ""; });
      if (a.ticks) a.ticks.remove();
      a.ticks = svgNode("g", { class: "ticks" });
      a.group.prepend(a.ticks);
      if (!zoomed()) return;
      nice(range[0], range[1], true).forEach(function (x) {
        a.ticks.append(svgNode("line", { x1: toX(a, x), x2: toX(a, x), y1: a.box[1], y2: a.box[3] }));
        if (a !== axes[axes.length - 1]) return;
        const label = svgNode("text", { x: toX(a, x), y: a.box[3] + 12, "text-anchor": "middle" });
        label.textContent = figures(x);
        a.ticks.append(label);
      });
      nice(a.shown[0], a.shown[1], false).forEach(function (y) {
        const label = svgNode("text", { x: a.box[0] - 5, y: toY(a, y) + 3, "text-anchor": "end" });
        label.textContent = figures(y);
        a.ticks.append(svgNode("line", { x1: a.box[0], x2: a.box[2], y1: toY(a, y), y2: toY(a, y) }), label);
      });
    }
    function zoomed() { return range[0] !== whole[0] || range[1] !== whole[1]; }
    function fit(a) { // the values within the range, and some room
      if (a.fixed || !zoomed()) return a.y.slice();
      let low = Infinity, high = -Infinity;
      a.tracks.forEach(function (t) {
        t.x.forEach(function (x, i) {
          if (x < range[0] || x > range[1]) return;
          low = Math.min(low, t.low ? t.low[i] : t.y[i]);
          high = Math.max(high, t.high ? t.high[i] : t.y[i]);
        });
      });
      if (!(low < high)) return a.y.slice();
      const room = a.log ? 0 : PAD * (high - low);
      return [low - room, high + room];
    }
    function zoom(low, high) {
      low = Math.max(whole[0], low);
      high = Math.min(whole[1], high);
      const found = xs.filter(function (x) { return x >= low && x <= high; });
      if (found.length < 2) return;
      range = [low, high];
      axes.forEach(function (a) { a.shown = fit(a); move(a, { x: whole, y: a.y }); });
      reset.hidden = !zoomed();
      point(at >= 0 && xs[at] >= low && xs[at] <= high ? xs[at] : Infinity);
    }
    function all() { zoom(whole[0], whole[1]); }

    svg.addEventListener("pointermove", function (event) {
      if (from === null) { point(nearest(toStep(place(event)))); return; }
      const x = place(event);
      tip.hidden = true;
      overlay.replaceChildren();
      axes.forEach(function (a) {
        overlay.append(svgNode("rect", { x: Math.min(x, from), width: Math.abs(x - from), y: a.box[1], height: a.box[3] - a.box[1], class: "chosen" }));
      });
    });
    svg.addEventListener("pointerdown", function (event) {
      if (event.button !== 0) return;
      from = place(event);
      svg.setPointerCapture(event.pointerId);
    });
    svg.addEventListener("pointerup", function (event) {
      const x = place(event), start = from;
      from = null;
      overlay.replaceChildren();
      if (start !== null && Math.abs(x - start) > NEAR) zoom(toStep(Math.min(x, start)), toStep(Math.max(x, start)));
      else point(nearest(toStep(x)));
    });
    svg.addEventListener("pointercancel", function () { from = null; overlay.replaceChildren(); });
    svg.addEventListener("pointerleave", function () { if (from === null && document.activeElement !== svg) point(Infinity); });
    svg.addEventListener("blur", function () { point(Infinity); });
    svg.addEventListener("dblclick", all);
    svg.addEventListener("keydown", function (event) {
      const seen = within(), i = seen.indexOf(xs[at]), half = (range[1] - range[0]) / 4, middle = i < 0 ? (range[0] + range[1]) / 2 : xs[at];
      const wide = event.key === "-" ? 8 * half : 2 * half; // at an end of the run the part is shifted, not cut
      const start = Math.max(whole[0], Math.min(whole[1] - wide, middle - wide / 2));
      if (event.key === "ArrowRight") point(seen[Math.min(seen.length - 1, i + 1)]);
      else if (event.key === "ArrowLeft") point(seen[i < 0 ? seen.length - 1 : Math.max(0, i - 1)]);
      else if (event.key === "Home") point(seen[0]);
      else if (event.key === "End") point(seen[seen.length - 1]);
      else if (event.key === "+" || event.key === "=" || event.key === "-") zoom(start, start + wide);
      else if (event.key === "Escape" || event.key === "0") all();
      else return;
      event.preventDefault();
    });
    reset.addEventListener("click", function () { all(); svg.focus(); });
  }
  document.querySelectorAll("figure[data-chart]").forEach(plot);
})();
