"use strict";
// Offers the figures as files, and sorts tables by a column. The page reads the same without it.
(function () {
  const rows = JSON.parse(document.getElementById("figures").textContent);
  const cell = function (value) {
    if (value === null) return "";
    if (typeof value === "number") return String(value);
    // A leading = + - @ would be a formula in a spreadsheet.
    const text = /^[=+\-@\t\r]/.test(value) ? "'" + value : value;
    return '"' + text.replace(/"/g, '""') + '"';
  };
  const offer = function (id, type, make) {
    const link = document.getElementById(id);
    link.addEventListener("click", function () {
      link.href = URL.createObjectURL(new Blob([make()], { type: type }));
    });
  };
  offer("as-json", "application/json", function () { return JSON.stringify(rows, null, 1); });
  offer("as-csv", "text/csv", function () {
    const names = Object.keys(rows[0] || {});
    const lines = rows.map(function (row) { return names.map(function (n) { return cell(row[n]); }).join(","); });
    return [names.join(",")].concat(lines).join("\n") + "\n";
  });
  if (rows.length) document.getElementById("files").hidden = false;

  const value = function (row, place) {
    const cell = row.children[place];
    if (place === 0) return cell.textContent.trim();
    return cell.dataset.sort === undefined ? null : Number(cell.dataset.sort);
  };
  const sort = function (table, head, place) {
    const falling = head.getAttribute("aria-sort") === "ascending";
    const body = table.tBodies[0];
    const rows = Array.from(body.rows);
    rows.sort(function (a, b) {
      const x = value(a, place), y = value(b, place);
      if (x === null || y === null) return (x === null) - (y === null); // what is not known goes last
      const order = typeof x === "number" ? x - y : x.localeCompare(y);
      return falling ? -order : order;
    });
    rows.forEach(function (row) { body.appendChild(row); });
    Array.from(head.parentNode.children).forEach(function (other) { other.removeAttribute("aria-sort"); });
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
  };
  document.querySelectorAll("table.sortable").forEach(function (table) {
    Array.from(table.tHead.rows[0].cells).forEach(function (head, place) {
      const known = place === 0 || table.querySelector("td:nth-child(" + (place + 1) + ")[data-sort]");
      if (!known) return;
      const button = document.createElement("button");
      button.type = "button";
      while (head.firstChild) button.appendChild(head.firstChild);
      head.appendChild(button);
      button.addEventListener("click", function () { sort(table, head, place); });
    });
  });
})();
