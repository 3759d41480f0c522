for (const input of document.querySelectorAll(".stage input")) {
  const move = () => input.parentElement.style.setProperty("--cut", input.value + "%");
  input.addEventListener("input", move);
  move();
}
for (const heading of document.querySelectorAll(".scroll thead th")) {
  heading.firstElementChild.addEventListener("click", () => {
    const body = heading.closest("table").tBodies[0], column = heading.cellIndex;
    const down = heading.getAttribute("aria-sort") ? heading.getAttribute("aria-sort") === "ascending" : column > 0;
    const value = row => column ? parseFloat((row.cells[column] || row.cells[0]).dataset.value) : row.cells[0].textContent;
    const compare = (a, b) => column ? a - b : a.localeCompare(b, "en", {numeric: true});
    const absent = a => column > 0 && isNaN(a);
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...[...body.rows].sort((one, other) => {
      const a = value(one), b = value(other);
      return absent(a) || absent(b) ? absent(a) - absent(b) : (down ? -1 : 1) * compare(a, b);
    }));
  });
}
