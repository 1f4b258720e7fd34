
"use strict";
// A click on a column's title sorts the table by it; a second click turns the order round.
function sortBy(button) {
  const header = button.closest("th");
  const body = header.closest("table").tBodies[0];
  const order = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
  const numeric = header.classList.contains("number");
  const key = (row) => row.cells[header.cellIndex].dataset.key;
  const compare = (a, b) => (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
  const rows = [...body.rows].sort((one, other) => {
    const [a, b] = [key(one), key(other)];
    // What has no value comes last in either order.
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    return order * compare(a, b);
  });
  body.append(...rows);
}
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sortBy(button));
}
