"use strict";
// Without this script the page is complete: tables keep their order, and browsers show what the pointer is told.

// A column is sorted by the numbers in it; what is no number goes by its letters, what is missing stays last.
const UNITS = { MB: 1e6, GB: 1e9, ms: 1e-3 };
function key(cell) {
  const text = cell.textContent.trim();
  if (text === "" || text === "—") return null;
  if (text === "∞") return Infinity;
  const found = /^([−+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?)(?:\s*([^\d\s].*))?$/u.exec(text);
  if (!found) return text;
  return Number(found[1].replaceAll(",", "").replace("−", "-")) * (UNITS[found[2]] ?? 1);
}
function compare(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a === typeof b) return sign * (typeof a === "number" ? (a > b) - (a < b) : a.localeCompare(b));
  return typeof a === "number" ? -1 : 1;
}
function sort(table, column) {
  const head = table.tHead.rows[0].cells, body = table.tBodies[0];
  const sign = head[column].getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const cell of head) cell.removeAttribute("aria-sort");
  head[column].setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const rows = [...body.rows].map((row) => [key(row.cells[column]), row]);
  body.append(...rows.sort((a, b) => compare(a[0], b[0], sign)).map((row) => row[1]));
}
for (const table of document.querySelectorAll("table")) {
  if (table.tBodies[0].rows.length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    const button = document.createElement("button");
    button.append(...cell.childNodes);
    if (!button.textContent.trim()) button.setAttribute("aria-label", "name");
    button.addEventListener("click", () => sort(table, column));
    cell.append(button);
  });
}

// What the pointer or a finger is on, told at once.
const tip = document.createElement("div");
tip.className = "told";
tip.hidden = true;
document.body.append(tip);
for (const part of document.querySelectorAll(".tip")) {
  const title = part.querySelector("title");
  part.dataset.told = title.textContent;
  title.remove();
}
function tell(event) {
  const part = event.target.closest ? event.target.closest(".tip") : null;
  tip.hidden = part === null;
  if (part === null) return;
  tip.textContent = part.dataset.told;
  const { clientWidth, clientHeight } = document.documentElement, gap = 14;
  const left = event.clientX + gap + tip.offsetWidth > clientWidth ? event.clientX - gap - tip.offsetWidth : event.clientX + gap;
  const top = event.clientY + gap + tip.offsetHeight > clientHeight ? event.clientY - gap - tip.offsetHeight : event.clientY + gap;
  tip.style.left = `${Math.max(4, Math.min(left, clientWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}
document.addEventListener("pointermove", tell);
document.addEventListener("pointerdown", tell);
document.documentElement.addEventListener("pointerleave", () => { tip.hidden = true; });
document.addEventListener("scroll", () => { tip.hidden = true; }, true);
