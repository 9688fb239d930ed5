"use strict";
// Offers the figures as files. The page reads the same without it.
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
})();
