// Puts the parts into their places.

function flagTable(rows) {
  return element("table", { class: "list" },
    element("thead", {}, element("tr", {}, ...["flag", "value", "origin"].map((title) => element("th", { scope: "col" }, title)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((cell) => element("td", {}, cell))))));
}

function fill(section, ...nodes) {
  if (!nodes.length) return;
  document.querySelector(`#${section}`).hidden = false;
  document.querySelector(`.${{ samples: "comparisons" }[section] || section}`).append(...nodes);
}

const data = JSON.parse(document.querySelector("#data").textContent);
const tip = new Tip(document.querySelector("#tip"));
const last = Math.max(...data.charts.flatMap((chart) => chart.series.flatMap((one) => one.points.map(([place]) => place))));
document.querySelector(".charts").append(...data.charts.map((chart) => new LineChart(chart, tip, Math.ceil(last)).node));
fill("samples", ...data.comparisons.map((comparison) => new Comparison(comparison).node));
if (data.rollouts.length) fill("rollouts", new RolloutBrowser(data.rollouts).node);
if (data.flags.length) {
  const given = data.flags.filter(([, , origin]) => origin !== "default");
  fill("flags", flagTable(given),
    element("details", {}, element("summary", {}, `All ${data.flags.length} flags`), flagTable(data.flags)));
}
describeTokens(tip);
