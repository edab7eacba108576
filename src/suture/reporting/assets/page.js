"use strict";
const { charts, texts } = JSON.parse(document.getElementById("data").textContent);
const element = (tag, properties = {}) => Object.assign(document.createElement(tag), properties);

// A chart is drawn when its panel is first shown: only then has it a width. With `ast` expressions are interpreted,
// so that the page's policy can forbid eval.
async function draw(figure) {
  if (figure.drawn || typeof vegaEmbed === "undefined") return;
  figure.drawn = true;
  const chart = charts[figure.dataset.chart];
  const { view } = await vegaEmbed(figure.querySelector(".chart"), chart.spec, { renderer: "svg", actions: false, ast: true });
  figure.view = view;
  const controls = element("div", { className: "controls" });
  for (const [name, label, options] of chart.choices) controls.append(choice(view, name, label, options));
  if (chart.legend.length > 1) controls.append(legend(view, chart.legend));
  if (controls.children.length) figure.querySelector("figcaption").after(controls);
}

function choice(view, name, label, options) {
  const select = element("select", { name });
  for (const option of options) select.append(element("option", { textContent: option }));
  select.onchange = () => view.signal(name, select.value).runAsync();
  const labelled = element("label", { textContent: `${label} ` });
  labelled.append(select);
  return labelled;
}

// A click shows one name strongly and the others faintly, a second click all.
function legend(view, entries) {
  const box = element("div", { className: "legend" });
  for (const [name, colour, dash] of entries) {
    const button = element("button", { type: "button", textContent: name, className: dash });
    button.style.setProperty("--colour", colour === "currentColor" ? "var(--ink)" : colour);
    button.setAttribute("aria-pressed", "false");
    button.onclick = () => {
      const on = button.getAttribute("aria-pressed") === "false";
      for (const other of box.children) other.setAttribute("aria-pressed", String(on && other === button));
      view.signal("picked", on ? name : null).runAsync();
    };
    box.append(button);
  }
  return box;
}

function sort(table, column) {
  const head = table.tHead.rows[0].cells[column];
  const text = table.tBodies[0].rows[0]?.cells[column].dataset.value === undefined;
  const up = text ? head.ariaSort !== "ascending" : head.ariaSort === "descending";
  for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
  head.ariaSort = up ? "ascending" : "descending";
  const key = (row) => (text ? row.cells[column].textContent : Number.parseFloat(row.cells[column].dataset.value));
  const order = (a, b) => (text ? a.localeCompare(b) : a - b);
  const known = (row) => text || !Number.isNaN(key(row));
  const rows = [...table.tBodies[0].rows];
  const sorted = rows.filter(known).sort((a, b) => (up ? order(key(a), key(b)) : order(key(b), key(a))));
  table.tBodies[0].append(...sorted, ...rows.filter((row) => !known(row)));
}

for (const table of document.querySelectorAll("table.sortable"))
  [...table.tHead.rows[0].cells].forEach((cell, i) => (cell.firstChild.onclick = () => sort(table, i)));

for (const select of document.querySelectorAll("select.panels"))
  select.onchange = () => {
    const panels = [...select.closest("section").querySelectorAll(".panel")];
    panels.forEach((panel, i) => (panel.hidden = i !== select.selectedIndex));
    panels[select.selectedIndex].querySelectorAll("[data-chart]").forEach(draw);
  };

// Without a secure context, as in a notebook's frame, there is no clipboard but the selection's.
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = document.body.appendChild(element("textarea", { value: text }));
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

for (const button of document.querySelectorAll("button.copy"))
  button.onclick = async () => {
    const name = button.dataset.text;
    button.textContent = (await copy(texts[name])) ? "copied" : "not allowed here";
    setTimeout(() => (button.textContent = name), 1500);
  };

const intervals = document.getElementById("intervals");
if (intervals) intervals.onchange = () => document.getElementById("accuracy").classList.toggle("intervals", intervals.checked);

// A touch or the keyboard shows what a pointer shows by hovering: the title of a focused word.
for (const word of document.querySelectorAll("dfn[title]")) {
  word.dataset.about = word.title;
  word.removeAttribute("title");
  const place = () => {
    const { left, bottom } = word.getBoundingClientRect();
    word.style.setProperty("--left", `${Math.max(8, Math.min(left, innerWidth - 300))}px`);
    word.style.setProperty("--top", `${bottom + 4}px`);
  };
  word.onmouseenter = word.onfocus = place;
}

document.getElementById("theme").onclick = () => {
  const dark = document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.documentElement.dataset.theme = dark === "dark" ? "light" : "dark";
};

window.drawn = Promise.all([...document.querySelectorAll(".panel:not([hidden]) [data-chart]")].map(draw));
