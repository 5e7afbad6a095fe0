"use strict";
(() => {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const touch = window.matchMedia("(pointer: coarse)").matches;
  const config = { responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover",
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]], showSendToCloud: false };
  const drawn = [];
  for (const { key, figure } of page.figures) {
    if (touch) figure.layout.dragmode = false;  // a finger on a figure scrolls the page
    const div = document.getElementById(`figure-${key}`);
    const timed = figure.data.flatMap((trace, i) => trace.meta ? [i] : []);
    const steps = timed.map((i) => figure.data[i].x);
    const clocks = timed.map((i) => page.clocks[figure.data[i].meta.clock]);
    const title = figure.layout.xaxis.title.text;
    Plotly.newPlot(div, figure.data, figure.layout, config);
    drawn.push({ div, timed, steps, clocks, title });
  }

  // Wall time at which a step was reached, linear between the clock's two nearest points.
  function timeOf(clock, step) {
    let low = 0, high = clock.step.length - 1;
    if (high < 0) return null;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (clock.step[middle] <= step) low = middle; else high = middle;
    }
    const span = clock.step[high] - clock.step[low];
    const share = span ? Math.min((step - clock.step[low]) / span, 1) : 1;
    return clock.wall[low] + share * (clock.wall[high] - clock.wall[low]);
  }

  const longest = Math.max(0, ...page.clocks.flatMap((clock) => clock.wall.slice(-1)));
  const [unit, seconds] =
    longest > 7200 ? ["h", 3600] : longest > 300 ? ["min", 60] : ["s", 1];

  function showAgainst(axis) {
    for (const { div, timed, steps, clocks, title } of drawn) {
      if (!timed.length) continue;
      const wall = axis === "wall";
      const x = wall
        ? steps.map((list, i) => list.map((step) => {
            const time = timeOf(clocks[i], step);
            return time === null ? null : time / seconds;
          }))
        : steps;
      Plotly.update(div, { x },
        { "xaxis.title.text": wall ? `wall time (${unit})` : title, "xaxis.autorange": true },
        timed);
    }
  }
  for (const input of document.querySelectorAll("input[name=axis]"))
    input.addEventListener("change", () => showAgainst(input.value));

  // Plotly draws in pixels: paper has its own width.
  window.addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
    for (const { div } of drawn) Plotly.relayout(div, { width: 660, autosize: false });
  });
  window.addEventListener("afterprint", () => {
    for (const { div } of drawn) Plotly.relayout(div, { width: null, autosize: true });
  });
})();
