(function () {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const base = { font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: "#1f2933" },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hoverlabel: { align: "left", font: { size: 12 } } };

  // A legend of HTML wraps at any width; a click hides a name and shows it again.
  function legend(plot, traces) {
    const list = document.createElement("div");
    list.className = "legend";
    traces.forEach((trace, index) => {
      const button = document.createElement("button"), swatch = document.createElement("span");
      const colour = trace.fillcolor || (trace.marker && trace.marker.color) || (trace.line && trace.line.color);
      swatch.style.background = colour;
      swatch.className = trace.mode === "lines" && !trace.fillcolor ? "line" : (trace.marker && trace.marker.symbol) || "area";
      button.type = "button";
      button.append(swatch, trace.name);
      button.setAttribute("aria-pressed", "true");
      button.addEventListener("click", () => {
        const shown = button.getAttribute("aria-pressed") === "true";
        button.setAttribute("aria-pressed", String(!shown));
        Plotly.restyle(plot, { visible: !shown }, [index]);
      });
      list.append(button);
    });
    return list;
  }

  function draw(id) {
    const figure = figures[id];
    const layout = Object.assign({}, base, figure.layout);
    const plot = document.getElementById(id);
    if (figure.layout.showlegend !== false) plot.before(legend(plot, figure.data));
    layout.showlegend = false;
    Plotly.newPlot(plot, figure.data, layout, { responsive: true, displayModeBar: false });
  }

  // Folded figures have no width until they are opened.
  const closed = (id) => document.getElementById(id).closest("details:not([open])");
  Object.keys(figures).filter((id) => !closed(id)).forEach(draw);
  document.querySelectorAll("details").forEach((details) => details.addEventListener("toggle", () => {
    details.querySelectorAll(".plot:empty").forEach((plot) => draw(plot.id));
  }));

  function sort(header) {
    const table = header.closest("table"), column = header.cellIndex, body = table.tBodies[0];
    const descending = header.getAttribute("aria-sort") === "ascending";
    const value = (row) => {
      const cell = row.cells[column];
      return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
    };
    const order = (a, b) => {
      const x = value(a), y = value(b);
      if (x === null && y === null) return a.cells[column].textContent.localeCompare(b.cells[column].textContent);
      if (x === null || y === null) return descending ? (x === null ? -1 : 1) : (x === null ? 1 : -1);
      return x - y;
    };
    const rows = Array.from(body.rows).sort(order);
    if (descending) rows.reverse();
    rows.forEach((row) => body.appendChild(row));
    table.querySelectorAll("th").forEach((other) => other.setAttribute("aria-sort", "none"));
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  }
  document.querySelectorAll("table.sortable").forEach((table) => {
    if (table.tBodies[0].rows.length > 15) table.parentElement.classList.add("long");
    table.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => sort(button.parentElement)));
  });

  document.querySelectorAll("[data-copy]").forEach((button) => button.addEventListener("click", () => {
    const text = document.getElementById(button.dataset.copy).textContent;
    if (navigator.clipboard) navigator.clipboard.writeText(text).then(() => { button.textContent = "Copied"; });
  }));
  document.body.dataset.ready = "true";
})();
