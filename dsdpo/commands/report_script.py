"""The charts of a report: drawn as SVG by a small script in the page, so that it works offline."""

STYLE = """
.tools { position: sticky; top: 0; background: var(--paper); padding: .6rem 0; z-index: 2; display: flex; gap: 1.2rem;
  flex-wrap: wrap; align-items: center; border-bottom: 1px solid var(--line); }
.key { display: inline-flex; align-items: center; gap: .35rem; cursor: pointer; }
.key.off { opacity: .35; } .key i { width: .8rem; height: .8rem; border-radius: 3px; background: var(--own); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1rem; margin-top: .8rem; }
.chart { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .7rem .3rem;
  position: relative; } .chart b { font-weight: 600; } .chart svg { display: block; width: 100%; height: auto; }
.chart text { fill: var(--dim); font: 11px system-ui, sans-serif; } .chart .names { font-size: .78rem; float: right;
  margin-left: .8rem; }
.grid { stroke: var(--line); } .cross { stroke: var(--dim); stroke-dasharray: 3 3; }
.tip { position: fixed; pointer-events: none; background: var(--paper); border: 1px solid var(--line); z-index: 3;
  border-radius: 6px; padding: .3rem .5rem; font-size: .8rem; display: none; box-shadow: 0 2px 8px #0004;
  font-variant-numeric: tabular-nums; white-space: pre; }
.bars { display: grid; grid-template-columns: max-content 1fr; gap: .3rem .8rem; align-items: center; }
.bar { display: flex; height: 1.3rem; border-radius: 4px; overflow: hidden; } .bar i { min-width: 1px; }
"""

SCRIPT = r"""
const data = JSON.parse(document.getElementById('data').textContent);
const hidden = new Set(), tip = document.querySelector('.tip'), W = 380, H = 210, L = 46, R = 8, T = 8, B = 22;
const smooth = document.getElementById('smooth');
const show = v => v === 0 ? '0' : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3 ? v.toExponential(1)
  : String(+v.toPrecision(4));
function ema(ys, w) {
  let total = 0, norm = 0;
  return ys.map(y => { if (y === null) return norm ? total / norm : null;
    total = w * total + (1 - w) * y; norm = w * norm + 1 - w; return total / norm; });
}
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find(m => m * power >= raw) * power, found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step)
    found.push(Math.abs(v) < step / 1e6 ? 0 : v);
  return found;
}
function node(name, given, parent) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const key in given) made.setAttribute(key, given[key]);
  if (parent) parent.appendChild(made);
  return made;
}
function draw(place, panel) {
  place.querySelector('svg')?.remove();
  const svg = node('svg', {viewBox: `0 0 ${W} ${H}`, role: 'img', 'aria-label': panel.title}, place);
  const lines = panel.lines.filter(line => !hidden.has(line.run));
  const weight = panel.noisy ? +smooth.value : 0;
  const flat = (v) => panel.log ? (v > 0 ? Math.log10(v) : null) : v;
  const made = lines.map(line => {
    const raw = line.ys.map(v => v === null ? null : flat(v));
    return {...line, raw, thick: line.points || !weight || raw.length < 3 ? raw : ema(raw, weight)};
  });
  const ys = made.flatMap(line => line.raw).filter(v => v !== null), xs = made.flatMap(line => line.xs);
  if (!ys.length) {
    node('text', {x: W / 2, y: H / 2, 'text-anchor': 'middle'}, svg).textContent = 'no values';
    return;
  }
  let low = Math.min(...ys), high = Math.max(...ys);
  if (high - low < 1e-12) { const pad = Math.abs(high) * .05 || .5; low -= pad; high += pad; }
  const left = Math.min(...xs), right = Math.max(Math.max(...xs), left + 1);
  const X = v => L + (v - left) / (right - left) * (W - L - R), Y = v => H - B - (v - low) / (high - low) * (H - T - B);
  for (const v of ticks(low, high, 4)) {
    node('line', {class: 'grid', x1: L, x2: W - R, y1: Y(v), y2: Y(v)}, svg);
    node('text', {x: L - 5, y: Y(v) + 4, 'text-anchor': 'end'}, svg).textContent = show(panel.log ? 10 ** v : v);
  }
  for (const v of ticks(left, right, 5))
    node('text', {x: X(v), y: H - 6, 'text-anchor': 'middle'}, svg).textContent = show(v);
  const path = (line, ys, width, opacity) => {
    let d = '', pen = 'M';
    ys.forEach((y, i) => {
      if (y === null) { pen = 'M'; return; }
      d += `${pen}${X(line.xs[i]).toFixed(1)} ${Y(y).toFixed(1)}`; pen = 'L';
    });
    node('path', {d, fill: 'none', stroke: `var(--c${line.colour})`, 'stroke-width': width,
      'stroke-opacity': opacity, 'stroke-linejoin': 'round', 'stroke-dasharray': line.dash || 'none'}, svg);
  };
  for (const line of made) {
    if (line.thick !== line.raw) path(line, line.raw, 1, .3);
    path(line, line.thick, line.points ? 1.2 : 1.8, 1);
    if (line.points) line.raw.forEach((y, i) => y === null ||
      node('circle', {cx: X(line.xs[i]), cy: Y(y), r: 2.6, fill: `var(--c${line.colour})`}, svg));
  }
  const cross = node('line', {class: 'cross', y1: T, y2: H - B, visibility: 'hidden'}, svg);
  svg.onmousemove = event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * W - L;
    const x = left + at / (W - L - R) * (right - left);
    const near = xs.reduce((a, b) => Math.abs(b - x) < Math.abs(a - x) ? b : a);
    cross.setAttribute('x1', X(near)); cross.setAttribute('x2', X(near)); cross.setAttribute('visibility', 'visible');
    const rows = made.flatMap(line => { const i = line.xs.indexOf(near); return i < 0 || line.ys[i] === null ? [] :
      [`${line.label}  ${show(line.ys[i])}`]; });
    tip.textContent = [`step ${near}`, ...rows].join('\n'); tip.style.display = 'block';
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + 'px';
    tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + 'px';
  };
  svg.onmouseleave = () => { tip.style.display = 'none'; cross.setAttribute('visibility', 'hidden'); };
}
const places = [...document.querySelectorAll('.chart')];
const all = () => places.forEach((place, index) => draw(place, data[index]));
smooth.oninput = () => { document.getElementById('weight').textContent = (+smooth.value).toFixed(2); all(); };
document.querySelectorAll('.key').forEach(key => key.onclick = () => {
  const run = +key.dataset.run; hidden.has(run) ? hidden.delete(run) : hidden.add(run);
  key.classList.toggle('off'); all();
});
all();
"""
