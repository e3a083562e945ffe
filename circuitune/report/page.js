"use strict";

// Each figure carries its plotly description in the script element right after it.
for (const place of document.querySelectorAll(".plot")) {
  const chart = JSON.parse(document.getElementById(`${place.id}-data`).textContent);
  Plotly.newPlot(place, chart.data, chart.layout, { responsive: true, displayModeBar: false });
}
