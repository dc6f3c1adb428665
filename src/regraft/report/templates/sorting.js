
// Tables of the class "sortable" sort by a click on a column's title: up, down, and as they were. A cell sorts by its
// "data-value" where it has one; what is no number in a column of numbers comes last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], original = [...body.rows], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const isText = head.classList.contains("text"), button = document.createElement("button");
    const first = isText ? "ascending" : "descending", second = isText ? "descending" : "ascending";
    const valueOf = row => {
      const cell = row.cells[column], text = cell.dataset.value ?? cell.textContent.trim();
      return isText ? text : parseFloat(text.replace(/,/g, "").replace("\u2212", "-"));
    };
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const order = before === null ? first : before === first ? second : null;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      if (order !== null) head.setAttribute("aria-sort", order);
      const sign = order === "descending" ? -1 : 1;
      const compare = (a, b) => isText ? a.localeCompare(b, undefined, { numeric: true }) : a - b;
      const rows = order === null ? original : original.slice().sort((one, other) => {
        const a = valueOf(one), b = valueOf(other);
        return Number(Number.isNaN(a)) - Number(Number.isNaN(b)) || sign * compare(a, b);
      });
      body.append(...rows);
    });
  });
}
