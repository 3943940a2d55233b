// Elements of a page. Whatever text comes in is set as text, never read as HTML.
"use strict";

const byId = (id) => document.getElementById(id);

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** An HTML element with attributes and children; text among the children stays text. */
const html = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);

/** The same for SVG. */
const svg = (tag, attributes = {}, ...children) =>
  filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const percent = (share, digits = 1) => (share === null ? "-" : `${(100 * share).toFixed(digits)}\u00a0%`);

/** A table from names of columns and rows of cells, each text or an element. */
function table(columns, rows, attributes = {}) {
  const cells = (tag, row) => row.map((cell) => html(tag, {}, cell));
  const head = html("thead", {}, html("tr", {}, ...cells("th", columns)));
  return html("table", attributes, head, html("tbody", {}, ...rows.map((row) => html("tr", {}, ...cells("td", row)))));
}

/** Horizontal bars, one a row: `{ name, share, text, chosen }`, shares in [0, 1]. */
function bars(rows, title) {
  const height = 26;
  const marks = rows.flatMap(({ name, share, text, chosen }, index) => [
    svg("text", { x: 118, y: index * height + 17, "text-anchor": "end" }, name.length > 16 ? `${name.slice(0, 15)}…` : name),
    svg("rect", { x: 126, y: index * height + 4, width: 290, height: 18, rx: 3, fill: "#edf0f3" }),
    svg("rect", { x: 126, y: index * height + 4, width: Math.max(0, 290 * share), height: 18, rx: 3, fill: chosen ? "#c25700" : "#0b62a8" }),
    svg("text", { x: 424, y: index * height + 17 }, text),
  ]);
  const box = { viewBox: `0 0 520 ${Math.max(1, rows.length) * height}`, role: "img", "aria-label": title };
  return svg("svg", box, ...marks);
}
