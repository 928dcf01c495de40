"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const color = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const number = (value, digits = 4) => value === null || value === undefined ? "–"
  : Math.abs(value) >= 10000 ? Math.round(value).toLocaleString("en")
  : value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(digits)));
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 4 });
// All ticks of an axis alike: 5e-4 and 1e-3, not 5e-4 and 0.001.
const ticked = ticks => ticks.map(tick => tick === null ? "" : tick === 0 ? "0"
  : Math.max(...ticks) < 0.01 ? tick.toExponential().replace(/\.?0*e/, "e")
  : Math.abs(tick) >= 10000 ? compact.format(tick) : String(Number(tick.toPrecision(6))));

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  Object.assign(element, attributes);
  element.append(...children);
  return element;
}

const smooth = "smoothed" in data.columns;
const plots = [
  { title: "loss", wide: true, curves: [
    { label: smooth ? "training" : "training loss", name: "loss", stroke: smooth ? "first-faint" : "first" },
    { label: "smoothed", name: "smoothed", stroke: "first", width: 2 },
    { label: smooth ? "held out" : "held-out loss", name: "eval_loss", stroke: "second", width: 2, points: true }] },
  { title: "learning rate", curves: [{ label: "learning rate", name: "learning_rate", stroke: "first" }] },
  { title: "gradient norm", curves: [{ label: "gradient norm", name: "grad_norm", stroke: "first" }] },
  { title: "speed", fromZero: true, curves: [{ label: "tokens/s", name: "tokens_per_second", stroke: "first" }] },
].map(plot => ({ ...plot, curves: plot.curves.filter(curve => curve.name in data.columns) })).filter(plot => plot.curves.length);

const linked = uPlot.sync("run");
const drawn = [];
let logarithmic = false;

// Steps after which the run went on, and steps that were not finite: lines across the whole height.
function marks(u) {
  const { ctx, bbox } = u, ratio = devicePixelRatio;
  const line = (step, stroke, dash) => {
    const x = Math.round(u.valToPos(step, "x", true)) + 0.5;
    if (x < bbox.left || x > bbox.left + bbox.width + 1) return;
    ctx.strokeStyle = color(stroke);
    ctx.setLineDash(dash.map(length => length * ratio));
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
  };
  ctx.save();
  ctx.lineWidth = ratio;
  data.resumed.forEach(step => line(step, "soft", [4, 4]));
  data.nonfinite.forEach(step => line(step, "bad", []));
  ctx.restore();
}

// The value at a point or the last before it: not every step is evaluated.
function latest(values, at) {
  while (at > 0 && values[at] === null) at--;
  return values[at];
}

function draw(plot, holder) {
  const head = make("h3", {}), box = make("div", { role: "img", ariaLabel: `${plot.title} by step` });
  const values = plot.curves.map(curve => {
    const swatch = make("span", { className: "swatch" }), value = make("b", {});
    swatch.style.borderColor = `var(--${curve.stroke})`;
    head.append(make("span", {}, swatch, curve.label + " ", value));
    return value;
  });
  const step = make("span", { className: "step" });
  head.append(step);
  if (plot.wide) head.append(make("label", { className: "toggle" },
    make("input", { type: "checkbox", checked: logarithmic, onchange: event => { logarithmic = event.target.checked; redo(); } }), "log"));
  holder.replaceChildren(head, box);

  const columns = plot.curves.map(curve => data.columns[curve.name]);
  const log = plot.wide && logarithmic;
  const axis = { stroke: () => color("soft"), font: "12px system-ui, sans-serif", grid: { stroke: () => color("line"), width: 1 },
    ticks: { show: false } };
  const u = new uPlot({
    width: holder.clientWidth, height: plot.wide ? 300 : 170, padding: [8, 8, 0, 0],
    cursor: { sync: { key: linked.key, scales: ["x", null] }, y: false, points: { size: 7 },
      dataIdx: (u, series, closest) => closest },
    legend: { show: false },
    scales: { x: { time: false }, y: log ? { distr: 3 } : { range: (u, low, high) => {
      if (low === null) return [0, 1];
      const margin = (high - low || Math.abs(high) || 1) * 0.06;
      return [plot.fromZero || (low >= 0 && low < high * 0.5) ? 0 : low - margin, high + margin];
    } } },
    axes: [{ ...axis, size: 28, gap: 4, values: (u, ticks) => ticked(ticks).map((text, at) => Number.isInteger(ticks[at]) ? text : "") },
      { ...axis, size: 58, gap: 6, values: (u, ticks) => ticked(ticks) }],
    series: [{}, ...plot.curves.map(curve => ({ label: curve.label, stroke: () => color(curve.stroke), width: curve.width ?? (data.steps.length > 1000 ? 1 : 1.5),
      spanGaps: true, points: { show: curve.points ?? data.steps.length < 3, size: 6, fill: () => color(curve.stroke) } }))],
    hooks: { drawAxes: [marks], setCursor: [u => {
      const at = u.cursor.idx;
      columns.forEach((column, index) => { values[index].textContent = number(latest(column, at ?? column.length - 1)); });
      const epoch = at === null || at === undefined ? null : data.columns.epoch?.[at];
      step.textContent = at === null || at === undefined ? ""
        : `step ${data.steps[at].toLocaleString("en")}` + (plot.wide && epoch !== null && epoch !== undefined ? `, epoch ${epoch}` : "");
    }] },
  }, [data.steps, ...columns], box);
  linked.sub(u);
  u.setCursor({ left: -10, top: -10 });
  return u;
}

function redo() {
  drawn.splice(0).forEach(({ u }) => { linked.unsub(u); u.destroy(); });
  plots.forEach(plot => drawn.push({ plot, u: draw(plot, plot.holder) }));
}

if (data.total) {
  const charts = document.getElementById("charts");
  for (const plot of plots) {
    plot.holder = make("div", { className: "chart" + (plot.wide ? " wide" : "") });
    charts.append(plot.holder);
  }
  redo();
  const fit = () => drawn.forEach(({ plot, u }) => {
    if (plot.holder.clientWidth !== u.width) u.setSize({ width: plot.holder.clientWidth, height: u.height });
  });
  new ResizeObserver(fit).observe(charts);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(({ u }) => u.redraw()));
  const printing = on => { document.documentElement.classList.toggle("print", on); fit(); drawn.forEach(({ u }) => u.redraw()); };
  addEventListener("beforeprint", () => printing(true));
  addEventListener("afterprint", () => printing(false));
}
