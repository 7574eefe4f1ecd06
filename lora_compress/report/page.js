"use strict";
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
