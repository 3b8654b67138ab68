"use strict";

// ---- Another size: the slider, and the pointer over the plot, choose a point of the curve ----

function showSizes(content) {
  const panel = document.getElementById("sizes"), slider = document.getElementById("size");
  const area = document.getElementById("losses"), cells = [...panel.querySelectorAll("tbody tr")];
  const cursor = area.appendChild(document.createElement("div"));
  cursor.className = "cursor";
  const dot = cursor.appendChild(document.createElement("b"));

  function show() {
    const size = content.sizes[slider.value];
    const share = (100 * size.bytes / content.before).toFixed(1);
    const words = `${size.made ? "this model: " : ""}${size.size}, ${share} % of the size before: ${size.lossWords}`;
    panel.querySelector("output").textContent = words;
    slider.setAttribute("aria-valuetext", words);
    cells.forEach((row, kind) => {
      [row.cells[2].textContent, row.cells[3].textContent] = size.kinds[kind];
    });
    panel.querySelector("code.whole").textContent = size.command;
    cursor.style.left = `${size.x}%`;
    dot.style.bottom = `${size.y}%`;
  }

  function point(event) {
    const box = area.getBoundingClientRect();
    const x = 100 * (event.clientX - box.left) / box.width;
    const distance = size => Math.abs(size.x - x);
    slider.value = content.sizes.reduce((best, size, place) => distance(size) < distance(content.sizes[best]) ? place : best, 0);
    show();
  }

  area.addEventListener("pointermove", point);
  area.addEventListener("pointerdown", point);
  slider.addEventListener("input", show);
  panel.hidden = false;
  show();
}

// ---- The layers: grouped, folded, sorted, and searched ----

function showLayers() {
  const table = document.getElementById("layers"), by = document.getElementById("by");
  const search = document.getElementById("search"), fold = document.getElementById("fold");
  const rows = [...table.querySelectorAll(".layer")];
  const groups = {
    block: [...table.querySelectorAll(".group")],
    kind: [...document.getElementById("kinds").content.querySelectorAll(".group")],
    none: [],
  };
  const natural = new Intl.Collator("en", {numeric: true});
  let column = 0, direction = 1;

  const words = (row, place) => row.cells[place].dataset.v ?? row.cells[place].textContent.trim();

  // Numbers before words, and words as people sort them: 2 before 10.
  function compare(first, second) {
    const [a, b] = [first, second].map(row => words(row, column));
    const [x, y] = [a, b].map(text => column ? parseFloat(text.replace(/[,<]/g, "")) : NaN);
    const order = Number.isNaN(x) - Number.isNaN(y) || x - y || natural.compare(a, b);
    return direction * order;
  }

  function arrange() {
    const heads = groups[by.value], place = by.value === "kind" ? "k" : "b";
    // What was enlarged goes with the old bodies of the table.
    for (const button of table.querySelectorAll("[aria-expanded=true]")) button.setAttribute("aria-expanded", false);
    const bodies = (heads.length ? heads : [null]).map((head, number) => {
      const body = document.createElement("tbody");
      if (head) body.append(head);
      body.append(...rows.filter(row => !head || +row.dataset[place] === number).sort(compare));
      return body;
    });
    if (heads.length) bodies.sort((a, b) => compare(a.rows[0], b.rows[0]));
    table.querySelectorAll("tbody").forEach(body => body.remove());
    table.append(...bodies);
    fold.hidden = !heads.length;
    find();
  }

  function find() {
    const wanted = search.value.trim().toLowerCase();
    rows.forEach(row => { row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted); });
    for (const body of table.tBodies) body.hidden = !body.querySelector(".layer:not([hidden])");
    table.classList.toggle("searching", wanted !== "");
    const found = rows.filter(row => !row.hidden).length;
    document.getElementById("found").textContent = wanted ? `${found} of ${rows.length} layers` : `${rows.length} layers`;
    nameFold();
  }

  const boxes = () => [...table.querySelectorAll(".group input")];
  const nameFold = () => { fold.textContent = boxes().some(box => box.checked) ? "Fold all" : "Unfold all"; };

  table.tHead.querySelectorAll("th").forEach((head, place) => {
    if (head.textContent === "singular values") return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      direction = column === place && head.hasAttribute("aria-sort") ? -direction : 1;
      column = place;
      table.querySelectorAll("[aria-sort]").forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      arrange();
    });
  });
  by.addEventListener("change", arrange);
  search.addEventListener("input", find);
  table.addEventListener("change", nameFold);
  fold.addEventListener("click", () => {
    const open = !boxes().some(box => box.checked);
    boxes().forEach(box => { box.checked = open; });
    nameFold();
  });
  if (!groups.block.length) by.querySelector("[value=block]").remove();
  document.getElementById("controls").hidden = false;
  arrange();
}

// ---- The singular values of a layer, larger ----

function showSpectra() {
  const table = document.getElementById("layers"), decades = +table.dataset.decades;

  function enlarged(svg, button) {
    const row = button.closest("tr"), full = parseInt(svg.getAttribute("aria-label"), 10);
    const detail = row.parentNode.insertBefore(document.createElement("tr"), row.nextSibling);
    detail.className = "detail";
    const cell = detail.insertCell();
    cell.colSpan = row.cells.length;
    const ticks = Array.from({length: decades + 1}, (_, power) =>
      `<span class="grid" style="bottom:${100 - 100 * power / decades}%"></span>` +
      `<span class="tick y" style="bottom:${100 - 100 * power / decades}%">${+(10 ** -power).toPrecision(1)}</span>`);
    cell.innerHTML = `<div class="plot"><div class="y axis">singular value over the largest (logarithmic)</div>
      <div class="area">${ticks.join("")}<span class="tick x" style="left:0">0</span><span class="tick x" style="left:100%">${full}</span>
      <div class="x axis">index</div></div></div><p class="quiet"></p>`;
    cell.querySelector("p").textContent = svg.getAttribute("aria-label");
    cell.querySelector(".area").append(svg.cloneNode(true));
    return detail;
  }

  for (const svg of table.querySelectorAll(".spectrum")) {
    const button = document.createElement("button");
    let detail = null;
    button.type = "button";
    button.className = "pictured";
    button.setAttribute("aria-expanded", "false");
    svg.replaceWith(button);
    button.append(svg);
    button.addEventListener("click", () => {
      const open = !detail?.isConnected;
      if (open) detail = enlarged(svg, button); else detail.remove();
      button.setAttribute("aria-expanded", open);
    });
  }
}

// ---- Tables that are wider than their place: every row becomes a block, whose cells say what they are ----

function stackWide() {
  const tables = [...document.querySelectorAll("table.wide")];
  for (const table of tables) {
    const heads = [...table.tHead.rows[0].cells].map(head => head.textContent);
    const more = table.parentNode.querySelector("template")?.content.querySelectorAll("tr") ?? [];
    for (const row of [...table.querySelectorAll("tbody tr"), ...more]) {
      [...row.cells].forEach((cell, place) => { if (cell.localName === "td") cell.dataset.label = heads[place]; });
    }
  }

  function stack() {
    for (const table of tables) if (table.scrollWidth > table.parentNode.clientWidth) table.classList.add("stacked");
  }

  // What is unfolded may be wider; what is narrower again stays as it is until the window changes.
  document.getElementById("layers").addEventListener("change", stack);
  document.getElementById("fold").addEventListener("click", stack);
  document.getElementById("by").addEventListener("change", stack);
  window.addEventListener("resize", () => {
    for (const table of tables) table.classList.remove("stacked");
    stack();
  });
  stack();
}

const content = document.getElementById("content");
if (content) showSizes(JSON.parse(content.textContent));
showSpectra();
showLayers();
stackWide();
