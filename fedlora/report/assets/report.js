(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const off = { strategy: new Set(), rest: new Set() };
  const chosen = {};
  const narrow = () => window.innerWidth <= 640;
  const PRINT_WIDTH = 680; // px: an A4 page between its margins

  // Whether a trace is shown: its strategy and other settings are on, and it is the one chosen where one is.
  function visible(trace, key) {
    const meta = trace.meta || {};
    if ("choice" in meta && meta.choice !== (chosen[key] || 0)) return false;
    if (!("strategy" in meta) || on(meta)) return true;
    return trace.showlegend !== false && trace.type === "scatter" ? "legendonly" : false;
  }

  const on = meta => !off.strategy.has(meta.strategy) && !off.rest.has(meta.rest);

  // A heat map with a column per setting keeps those that are on.
  function columns(trace) {
    if (!trace.meta || !trace.meta.columns) return {};
    const kept = index => on(trace.meta.columns[index]);
    const z = trace.z.map(row => row.filter((_, i) => kept(i)));
    return { x: trace.x.filter((_, i) => kept(i)), z, zmax: Math.max(0, ...z.flat()) || 1 };
  }

  const entries = key => figures[key].data.filter(t => t.type === "scatter" && t.showlegend !== false).length;
  const MOST_ENTRIES = 14; // a longer legend would be larger than the plot: the bar above serves instead

  function layoutOf(key, width) {
    const layout = structuredClone(figures[key].layout);
    const few = entries(key) <= MOST_ENTRIES;
    const room = Math.max(1, Math.floor(width / 190));
    layout.legend = { orientation: "h", x: 0, yref: "container", y: 0, yanchor: "bottom", font: { size: 11 }, tracegroupgap: 0 };
    if (!few || !layout.showlegend) layout.showlegend = false;
    else layout.height += 20 * Math.ceil(entries(key) / room);
    return layout;
  }

  // Turned labels in several lines need columns wider than a phone's: there each is one line, and the figure higher.
  function unwrap(figure) {
    if (figure.layout.xaxis.tickangle !== -90) return;
    const length = label => Math.max(...label.split("<br>").map(line => line.length));
    for (const trace of figure.data) {
      const lines = trace.x.map(label => label.replaceAll("<br>", " "));
      figure.layout.height += 7 * (Math.max(...lines.map(length)) - Math.max(...trace.x.map(length)));
      trace.x = lines;
    }
  }
  if (narrow()) Object.values(figures).forEach(unwrap);

  async function draw(div) {
    const key = div.dataset.key;
    const data = figures[key].data.map(trace => ({ ...trace, ...columns(trace), visible: visible(trace, key) }));
    const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };
    if (narrow()) config.displayModeBar = false;
    const layout = layoutOf(key, div.clientWidth);
    if (narrow()) {
      layout.dragmode = false; // a finger that scrolls the page must not zoom a plot
      if (layout.yaxis.type === "category") layout.yaxis.tickfont = { size: 9 };
    }
    div.dataset.height = layout.height;
    await Plotly.newPlot(div, data, layout, config);
    div.style.minHeight = "";
    div.on("plotly_legendclick", event => { clicked(event.curveNumber, key); return false; });
  }

  // One click switches, two leave it alone. Plotly's own event for two is lost when the first redraws the legend.
  let waiting = null;
  function clicked(curve, key) {
    const again = waiting && waiting.curve === curve && waiting.key === key;
    if (waiting) clearTimeout(waiting.timer);
    waiting = null;
    if (again) { toggle(curve, key, true); return; }
    const timer = setTimeout(() => { waiting = null; toggle(curve, key, false); }, 280);
    waiting = { curve, key, timer };
  }

  function toggle(curve, key, alone) {
    const meta = figures[key].data[curve].meta || {};
    const by = document.querySelector('fieldset[data-by="strategy"]') || !("rest" in meta) ? "strategy" : "rest";
    const boxes = [...document.querySelectorAll(`fieldset[data-by="${by}"] input`)];
    const mine = box => box.dataset.value === meta[by];
    const isolated = boxes.every(box => box.checked === mine(box));
    for (const box of boxes) {
      if (alone) box.checked = isolated || mine(box);
      else if (mine(box)) box.checked = !box.checked;
    }
    update();
  }

  function update() {
    for (const by of ["strategy", "rest"]) {
      const boxes = [...document.querySelectorAll(`fieldset[data-by="${by}"] input`)];
      off[by] = new Set(boxes.filter(box => !box.checked).map(box => box.dataset.value));
    }
    plots.forEach(show);
  }

  function show(div) {
    const key = div.dataset.key;
    if (!div.data) return;
    const traces = figures[key].data;
    const changes = { visible: traces.map(trace => visible(trace, key)) };
    const kept = traces.map(columns);
    if (kept.some(change => change.z)) for (const name of ["x", "z", "zmax"]) changes[name] = kept.map(c => c[name]);
    Plotly.restyle(div, changes);
  }

  for (const fieldset of document.querySelectorAll("fieldset[data-by]")) {
    const set = state => { for (const box of fieldset.querySelectorAll("input")) box.checked = state; update(); };
    fieldset.addEventListener("change", update);
    fieldset.querySelector(".all").addEventListener("click", () => set(true));
    fieldset.querySelector(".none").addEventListener("click", () => set(false));
  }
  for (const select of document.querySelectorAll("select[data-for]")) {
    const key = select.dataset.for;
    select.addEventListener("change", () => {
      chosen[key] = Number(select.value);
      select.parentElement.dataset.chosen = select.selectedOptions[0].textContent;
      show(document.getElementById(`plot-${key}`));
    });
  }

  // Tables: a title sorts, once more turns round. Numbers by value, words by alphabet.
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    table.querySelectorAll("thead th").forEach((title, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = title.textContent;
      title.replaceChildren(button);
      button.addEventListener("click", () => {
        const before = title.getAttribute("aria-sort");
        const numbers = [...body.rows].some(row => "order" in row.cells[column].dataset);
        const up = before ? before === "descending" : !numbers;  // the highest number first, but words from A
        table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
        title.setAttribute("aria-sort", up ? "ascending" : "descending");
        const value = row => {
          const cell = row.cells[column];
          return "order" in cell.dataset ? Number(cell.dataset.order.replace("inf", "Infinity")) : cell.textContent;
        };
        const compare = (a, b) => typeof a === "number" && typeof b === "number" ? (a < b ? -1 : a > b ? 1 : 0) : String(a).localeCompare(String(b));
        const rows = [...body.rows].sort((a, b) => compare(value(a), value(b)) * (up ? 1 : -1));
        body.append(...rows);
      });
    });
  }

  // Paper has its own width, and knows no mouse.
  window.addEventListener("beforeprint", () => {
    for (const div of plots) {
      if (div.data) Plotly.relayout(div, { width: PRINT_WIDTH, height: 0.8 * div.dataset.height, autosize: false });
    }
  });
  window.addEventListener("afterprint", () => {
    for (const div of plots) {
      if (div.data) Plotly.relayout(div, { width: null, height: Number(div.dataset.height), autosize: true });
    }
  });

  (async () => {
    for (const div of plots) {
      await draw(div);
      await new Promise(done => setTimeout(done)); // let the reader scroll meanwhile
    }
    document.documentElement.dataset.ready = "true";
  })();
})();
