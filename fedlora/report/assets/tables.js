(() => {
  "use strict";
  const tables = [...document.querySelectorAll("table")];
  const titles = table => [...table.querySelectorAll("thead th")];

  // A title sorts, once more turns round. Numbers by value, words by alphabet.
  function sortable(table) {
    const body = table.tBodies[0];
    titles(table).forEach((title, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = title.textContent;
      title.replaceChildren(button);
      button.addEventListener("click", () => {
        const before = title.getAttribute("aria-sort");
        const numbers = [...body.rows].some(row => "order" in row.cells[column].dataset);
        const up = before ? before === "descending" : !numbers;  // the highest number first, but words from A
        titles(table).forEach(other => other.removeAttribute("aria-sort"));
        title.setAttribute("aria-sort", up ? "ascending" : "descending");
        const value = row => {
          const cell = row.cells[column];
          return "order" in cell.dataset ? Number(cell.dataset.order.replace("inf", "Infinity")) : cell.textContent;
        };
        const compare = (a, b) => typeof a === "number" && typeof b === "number" ? (a < b ? -1 : a > b ? 1 : 0) : String(a).localeCompare(String(b));
        body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b)) * (up ? 1 : -1)));
      });
    });
  }

  // Columns are hidden and shown in all tables of a kind at once. The browser keeps what was asked for, where it may.
  const KEPT = "fedlora.report.columns";
  let asked = {}; // "kind/title" to whether it is shown
  try { asked = JSON.parse(localStorage.getItem(KEPT)) || {}; } catch { /* a browser that keeps nothing */ }
  const keep = () => { try { localStorage.setItem(KEPT, JSON.stringify(asked)); } catch { /* as above */ } };

  function apply(table) {
    titles(table).forEach((title, column) => {
      const shown = asked[`${table.dataset.kind}/${title.textContent}`];
      for (const row of table.rows) {
        const cell = row.cells[column];
        cell.classList.toggle("asked", shown === true);
        cell.classList.toggle("unasked", shown === false);
      }
    });
  }

  const shown = title => getComputedStyle(title).display !== "none";

  function menu(table) {
    const details = document.createElement("details");
    const summary = document.createElement("summary");
    const list = document.createElement("div");
    details.className = "columns";
    details.append(summary, list);
    const say = () => {
      const away = titles(table).filter(title => !shown(title)).length;
      summary.textContent = away ? `columns (${away} hidden)` : "columns";
    };
    titles(table).slice(1).forEach(title => {
      const label = document.createElement("label");
      const box = document.createElement("input");
      box.type = "checkbox";
      label.className = "chip";
      label.append(box, title.textContent);
      list.append(label);
      box.addEventListener("change", () => {
        asked[`${table.dataset.kind}/${title.textContent}`] = box.checked;
        keep();
        refresh();
      });
    });
    table.closest(".scroll").before(details);
    return () => {
      say();
      list.querySelectorAll("input").forEach((box, i) => { box.checked = shown(titles(table)[i + 1]); });
    };
  }

  const choosable = tables.filter(table => table.dataset.kind && titles(table).length > 3);
  tables.filter(table => table.classList.contains("sortable")).forEach(sortable);
  const menus = choosable.map(menu);
  function refresh() {
    choosable.forEach(apply);
    menus.forEach(tell => tell());
  }
  refresh();
  window.matchMedia("(max-width: 640px)").addEventListener("change", refresh);
})();
