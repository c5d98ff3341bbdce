// Fetches the run's cards every second and sends comments. What a model wrote is added as text nodes only.
"use strict";
const list = document.getElementById("cards"), state = document.getElementById("state"), onlyOpen = document.getElementById("only-open");
const shown = new Map(); // card number -> {element, card}
let version = -1, failures = 0;

const draft = (number) => `draft-${number}`; // kept over a reload, until the comment is given

function build(number) {
  const element = document.getElementById("card").content.firstElementChild.cloneNode(true);
  const form = element.querySelector("form"), area = form.querySelector("textarea"), select = form.querySelector("select");
  area.value = sessionStorage.getItem(draft(number)) || "";
  area.addEventListener("input", () => sessionStorage.setItem(draft(number), area.value));
  area.addEventListener("keydown", (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) form.requestSubmit(); });
  form.addEventListener("submit", (e) => { e.preventDefault(); give(number, area.value, select.value); });
  return element;
}

function fill(entry, card) {
  const { element } = entry, put = (name, text) => { element.querySelector(name).textContent = text; };
  put(".count", `${card.right ? "right" : "wrong"}${card.count > 1 ? ` × ${card.count}` : ""}`);
  put(".where", `problem ${card.problem} · step ${card.step}`);
  put(".prompt", card.prompt);
  put(".completion", card.completion + (card.cut_off ? " [cut off]" : ""));
  put(".verdict", card.verdict || `score ${card.score}`);
  for (const e of [element.querySelector(".expected"), element.querySelector(".expected").previousElementSibling]) e.hidden = card.expected === null;
  put(".expected", card.expected ?? "");
  if (card.comment !== null && (entry.card?.comment !== card.comment || entry.card?.scope !== card.scope)) { // given here or in another tab
    const area = element.querySelector("textarea");
    if (!sessionStorage.getItem(draft(card.number))) area.value = card.comment;
    element.querySelector("select").value = card.scope;
    put(".said", "given");
    put("button", "Change");
  }
  element.classList.toggle("given", card.comment !== null);
  entry.card = card;
}

function arrange() {
  for (const { element, card } of shown.values())
    element.hidden = onlyOpen.checked && card.comment !== null && !element.contains(document.activeElement);
}

function show(view) {
  failures = 0;
  version = view.version;
  if (view.cards) {
    const numbers = new Set(view.cards.map((c) => c.number));
    for (const [number, { element }] of shown) if (!numbers.has(number) && !element.contains(document.activeElement)) { element.remove(); shown.delete(number); }
    let before = null;
    for (const card of view.cards) {
      let entry = shown.get(card.number);
      if (!entry) {
        shown.set(card.number, (entry = { element: build(card.number) }));
        before === null ? list.prepend(entry.element) : before.after(entry.element);
      }
      fill(entry, card);
      before = entry.element;
    }
  }
  const waiting = [...shown.values()].filter(({ card }) => card.comment === null).length;
  state.textContent = `step ${view.step} · ${waiting} ${waiting === 1 ? "card waits" : "cards wait"} · ${view.given} ${view.given === 1 ? "comment" : "comments"} given`;
  arrange();
}

async function ask() {
  try {
    const response = await fetch(`cards?version=${version}`);
    if (!response.ok) throw new Error(await response.text());
    show(await response.json());
  } catch {
    failures += 1;
    if (failures > 2) state.textContent = "The run does not answer: it has ended, or goes on under another address. Comments that were given are in its human.jsonl.";
  }
  setTimeout(ask, 1000);
}

async function give(number, text, scope) {
  const said = shown.get(number).element.querySelector(".said");
  said.textContent = "sending …";
  try {
    const response = await fetch("comment", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ card: number, text, scope }) });
    if (!response.ok) throw new Error(await response.text());
    sessionStorage.removeItem(draft(number));
    document.activeElement.blur();
    show(await response.json());
    said.textContent = "given";
  } catch (error) {
    said.textContent = `not given: ${error.message}`;
  }
}

onlyOpen.addEventListener("change", arrange);
ask();
