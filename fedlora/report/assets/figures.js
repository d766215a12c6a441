(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const picker = document.getElementById("condition");
  const off = { strategy: new Set(), rest: new Set() };
  const chosen = {};
  let condition = null; // the panel that is shown alone; null: all
  const narrow = () => window.innerWidth <= 640;
  const PRINT_WIDTH = 680, PRINT_HEIGHT = 860; // px: an A4 page between its margins, and what title and caption leave of it
  let printing = false;
  const MOST_ENTRIES = 14; // a longer legend would be larger than the plot: the bar above serves instead

  const panelsOf = key => (figures[key].layout.meta || {}).panels || [];
  const several = key => panelsOf(key).length > 1 && condition === null;
  const on = meta => !off.strategy.has(meta.strategy) && !off.rest.has(meta.rest) && here(meta);
  const here = meta => condition === null || !("panel" in meta) || meta.panel === condition;

  // Whether a trace is shown: its strategy and other settings are on, and it is the one chosen where one is.
  function visible(trace, key) {
    const meta = trace.meta || {};
    if ("choice" in meta && meta.choice !== (chosen[key] || 0)) return false;
    if (!here(meta)) return false;
    if (!("strategy" in meta) || on(meta)) return true;
    return trace.showlegend !== false && trace.type === "scatter" ? "legendonly" : false;
  }

  // A heat map with a column per setting keeps those that are on.
  function columns(trace) {
    if (!trace.meta || !trace.meta.columns) return {};
    const kept = index => on(trace.meta.columns[index]);
    const z = trace.z.map(row => row.filter((_, i) => kept(i)));
    return { x: trace.x.filter((_, i) => kept(i)), z, zmax: Math.max(0, ...z.flat()) || 1 };
  }

  // The traces as they are drawn now: a choice has one entry in the legend, whatever the number of its panels.
  function tracesOf(key) {
    const many = several(key), named = new Set();
    return figures[key].data.map(source => {
      const trace = { ...source, ...columns(source), visible: visible(source, key) };
      if (source.mode === "markers+text" && many) Object.assign(trace, { mode: "markers", showlegend: true });
      if (!many && panelsOf(key).length) Object.assign(trace, { xaxis: "x", yaxis: "y" });
      if (trace.visible && trace.legendgroup && trace.showlegend !== false) {
        trace.showlegend = !named.has(trace.legendgroup);
        named.add(trace.legendgroup);
      }
      return trace;
    });
  }

  const entries = traces => traces.filter(t => t.type === "scatter" && t.visible && t.showlegend !== false).length;

  // A panel per condition, in rows of as many as there is room for: axes in common, but those of costs.
  function sideBySide(key, layout, width) {
    const { panels, free } = layout.meta;
    const most = Math.max(1, Math.floor((width - 60) / (printing ? 200 : width < 500 ? 150 : 240)));
    const down = Math.ceil(panels.length / most), across = Math.ceil(panels.length / down);
    const gap = { x: 26 / Math.max(200, width - 90), top: 26, below: free ? 26 : 12 };
    const row = printing ? Math.min(layout.meta.row, Math.max(50, PRINT_HEIGHT / down - gap.top - gap.below)) : layout.meta.row;
    const height = row + gap.top + gap.below, inner = down * height;
    layout.margin = { ...layout.margin, t: 4, l: 68, b: 46 };
    layout.height = inner + layout.margin.b + layout.margin.t;
    const { xaxis, yaxis } = layout;
    const text = (words, place) => ({ text: words, xref: "paper", yref: "paper", showarrow: false, ...place });
    layout.annotations = panels.map((label, i) => {
      const column = i % across, line = Math.floor(i / across);
      const left = column * (1 + gap.x) / across, right = left + (1 + gap.x) / across - gap.x;
      const top = 1 - (line * height + gap.top) / inner, bottom = top - row / inner;
      const id = i ? String(i + 1) : "", last = i + across >= panels.length;
      layout[`xaxis${id}`] = { ...xaxis, title: undefined, domain: [left, right], anchor: `y${id}`, showticklabels: free || last,
        ...(i && !free ? { matches: "x" } : {}), nticks: 5, automargin: false };
      layout[`yaxis${id}`] = { ...yaxis, title: undefined, domain: [Math.max(0, bottom), top], anchor: `x${id}`, showticklabels: !column,
        ...(i ? { matches: "y" } : {}), automargin: !column };
      if (free) delete layout[`xaxis${id}`].dtick;
      return text(label, { x: left, y: top, xanchor: "left", yanchor: "bottom", font: { size: 11 } });
    });
    layout.annotations.push(text(xaxis.title.text, { x: .5, y: 0, yanchor: "top", yshift: -22 }));
    if (yaxis.title.text) layout.annotations.push(text(yaxis.title.text, { x: 0, y: .5, xanchor: "right", xshift: -44, textangle: -90 }));
    for (const menu of layout.updatemenus || []) {
      for (const button of menu.buttons) {
        const axes = panels.map((_, i) => `yaxis${i ? i + 1 : ""}`);
        const [change] = button.args, spread = {};
        for (const [name, value] of Object.entries(change)) for (const axis of axes) spread[name.replace(/^yaxis/, axis)] = value;
        button.args = [spread];
      }
      Object.assign(menu, { y: 1, pad: { t: 0, b: 0 } });
      layout.margin.t = 30;
      layout.height += 26;
    }
  }

  function layoutOf(key, width, traces) {
    const layout = structuredClone(figures[key].layout);
    if (several(key)) sideBySide(key, layout, width);
    const count = entries(traces), room = Math.max(1, Math.floor(width / 190));
    layout.uirevision = String(condition);
    layout.legend = { orientation: "h", x: 0, yref: "container", y: 0, yanchor: "bottom", font: { size: 11 }, tracegroupgap: 0 };
    layout.showlegend = Boolean(count) && count <= MOST_ENTRIES;
    if (layout.showlegend) {
      layout.height += 20 * Math.ceil(count / room);
      if (several(key)) layout.margin.b += 20 * Math.ceil(count / room);
    }
    if (narrow()) {
      layout.dragmode = false; // a finger that scrolls the page must not zoom a plot
      for (const axis of Object.keys(layout).filter(name => name.startsWith("yaxis"))) {
        if (layout[axis].type === "category") layout[axis].tickfont = { size: 9 };
      }
    }
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
    const key = div.dataset.key, first = !div.data;
    const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "toImage"] };
    if (narrow()) config.displayModeBar = false;
    const traces = tracesOf(key);
    await Plotly.react(div, traces, layoutOf(key, div.clientWidth, traces), config);
    div.style.minHeight = "";
    if (first) div.on("plotly_legendclick", event => { clicked(event.curveNumber, key); return false; });
  }

  const redraw = () => plots.filter(div => div.data).forEach(draw);

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
    redraw();
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
      draw(document.getElementById(`plot-${key}`));
    });
  }

  // The condition that is picked is the one that tables and figures show.
  function pick() {
    condition = picker.value === "" ? null : Number(picker.value);
    picker.parentElement.dataset.chosen = picker.selectedOptions[0].textContent;
    for (const part of document.querySelectorAll("[data-condition]")) part.hidden = condition !== null && Number(part.dataset.condition) !== condition;
    redraw();
  }
  if (picker) {
    picker.addEventListener("change", pick);
    pick();
  }

  // A picture is what is drawn now, on white, with its title, and with its whole legend.
  for (const button of document.querySelectorAll("button[data-take]")) {
    button.addEventListener("click", async () => {
      const div = button.closest("figure").querySelector(".plot"), key = div.dataset.key, width = Math.max(700, div.clientWidth);
      const traces = tracesOf(key), layout = layoutOf(key, width, traces);
      const legend = entries(traces) > 0;
      if (legend && !layout.showlegend) Object.assign(layout, { showlegend: true, legend: { font: { size: 11 } } });
      delete layout.updatemenus;
      layout.margin = { ...layout.margin, t: layout.margin.t + 34 };
      const where = condition !== null && panelsOf(key).length ? `, ${panelsOf(key)[condition]}` : "";
      const title = { text: div.getAttribute("aria-label") + where, x: 0, xref: "container", xanchor: "left", y: 1, yanchor: "top", pad: { l: 12, t: 10 }, font: { size: 15 } };
      Object.assign(layout, { title, width, height: layout.height + 34, paper_bgcolor: "#fff", plot_bgcolor: "#fff" });
      const format = button.dataset.take;
      await Plotly.downloadImage({ data: traces, layout }, { format, width, height: layout.height, scale: format === "png" ? 2 : 1, filename: key });
    });
  }

  // Paper has its own width, and knows no mouse.
  window.addEventListener("beforeprint", () => {
    printing = true;
    for (const div of plots.filter(each => each.data)) {
      const key = div.dataset.key, traces = tracesOf(key), layout = layoutOf(key, PRINT_WIDTH, traces);
      if (!several(key)) layout.height *= .8;
      Plotly.react(div, traces, { ...layout, width: PRINT_WIDTH, autosize: false });
    }
  });
  window.addEventListener("afterprint", () => { printing = false; redraw(); });

  // Panels find their places anew where there is other room.
  let width = window.innerWidth, timer = null;
  window.addEventListener("resize", () => {
    if (printing || window.innerWidth === width) return;
    width = window.innerWidth;
    clearTimeout(timer);
    timer = setTimeout(redraw, 200);
  });

  (async () => {
    for (const div of plots) {
      await draw(div);
      await new Promise(done => setTimeout(done)); // let the reader scroll meanwhile
    }
    document.documentElement.dataset.ready = "true";
  })();
})();
