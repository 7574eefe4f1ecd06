"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

// Tables: a click on a heading sorts, the second one the other way round.
for (const table of document.querySelectorAll("table.modules, table.files")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  [...body.rows].forEach((row, index) => { row.dataset.index = index; });
  headings.forEach((heading, column) => heading.addEventListener("click", () => {
    const falling = heading.getAttribute("aria-sort") === "none" ? heading.className === "n" : heading.getAttribute("aria-sort") === "ascending";
    headings.forEach((other) => other.setAttribute("aria-sort", "none"));
    heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.v === undefined ? row.cells[column].textContent : Number(row.cells[column].dataset.v);
    const rows = [...body.rows].map((row) => [key(row), row]);
    rows.sort(([a], [b]) => (typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true }) : a - b) * (falling ? -1 : 1));
    body.append(...rows.map(([, row]) => row));
  }));
  const filter = table.closest("section").querySelector("input[type=search]");
  if (filter) filter.addEventListener("input", () => {
    const wanted = filter.value.trim().toLowerCase();
    for (const row of body.rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
  });
}

// The spectrum of one module, on a logarithmic axis; filled components were kept.
const figure = document.getElementById("spectrum");
if (figure) {
  const select = figure.querySelector("select");
  data.name.forEach((name, index) => select.add(new Option(name, index)));
  const rows = [...document.querySelectorAll("table.modules tbody tr")];
  const make = (name, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const draw = (index) => {
    const [width, height, left, bottom, top] = [460, 250, 58, 42, 26];
    const sigma = data.sigma[index].filter((value) => value > 0);
    const kept = data.kept[index];
    const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, class: "wide", role: "img", "aria-label": `spectrum of ${data.name[index]}` });
    svg.append(make("text", { x: left, y: 14, class: "lab" }, kept ? `${kept} of ${data.sigma[index].length} components kept` : "module dropped"));
    if (sigma.length) {
      const floor = Math.max(sigma[sigma.length - 1], sigma[0] * 1e-6);
      let [high, low] = [Math.log10(sigma[0]), Math.log10(floor)];
      const margin = Math.max((high - low) * 0.05, 0.02);
      [high, low] = [high + margin, low - margin];
      const x = (i) => left + 6 + i / Math.max(sigma.length - 1, 1) * (width - left - 26);
      const y = (value) => top + (high - Math.log10(Math.max(value, floor))) / (high - low) * (height - top - bottom);
      for (let step = 0; step <= 4; step++) {
        const value = 10 ** (high - (high - low) * step / 4);
        svg.append(make("line", { class: "grid", x1: left, x2: width - 14, y1: y(value), y2: y(value) }));
        svg.append(make("text", { class: "tick", "text-anchor": "end", x: left - 6, y: top + (height - top - bottom) * step / 4 + 4 }, value.toPrecision(2)));
      }
      sigma.forEach((value, i) => {
        const dot = make("circle", { class: i < kept ? "dot" : "off", cx: x(i), cy: y(value), r: sigma.length > 80 ? 2 : 3.2 });
        dot.append(make("title", {}, `σ ${i + 1} = ${value}${i < kept ? "" : ", dropped"}`));
        svg.append(dot);
      });
      for (const i of new Set([0, Math.floor((sigma.length - 1) / 2), sigma.length - 1])) {
        svg.append(make("text", { class: "tick", "text-anchor": "middle", x: x(i), y: height - bottom + 16 }, i + 1));
      }
      svg.append(make("text", { class: "axis", "text-anchor": "middle", x: (left + width) / 2, y: height - 6 }, "component i"));
      svg.append(make("text", { class: "axis", "text-anchor": "middle", transform: `translate(11 ${(top + height - bottom) / 2}) rotate(-90)` }, "σᵢ (logarithmic)"));
    }
    figure.querySelector(".plot").replaceChildren(svg);
    select.value = index;
    rows.forEach((row, i) => row.classList.toggle("on", i === index));
  };
  select.addEventListener("change", () => draw(Number(select.value)));
  rows.forEach((row, index) => row.addEventListener("click", () => draw(index)));
  draw(data.share.indexOf(Math.max(...data.share)) >= 0 ? data.share.indexOf(Math.max(...data.share)) : 0);
}

// Two pictures on top of each other, the second one shown right of the slider.
const compare = document.getElementById("compare");
if (compare) {
  const rows = [...document.querySelectorAll("table.pictures tbody tr")];
  const [before, after] = compare.querySelectorAll("img");
  const slider = compare.querySelector("input");
  const show = (index) => {
    const pictures = [...rows[index].querySelectorAll("img")].slice(-3); // the last one is the difference
    [before, after].forEach((image, side) => { image.src = pictures[side].src; image.alt = pictures[side].alt; });
    rows.forEach((row, i) => row.classList.toggle("on", i === index));
  };
  const cut = () => { after.style.clipPath = `inset(0 0 0 ${slider.value}%)`; };
  slider.addEventListener("input", cut);
  rows.forEach((row, index) => row.addEventListener("click", () => show(index)));
  compare.hidden = false;
  show(0);
  cut();
}
