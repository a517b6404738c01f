// The drawing of units and bars, shared by the pages of `evoprune serve` and `evoprune ask --show`. Text is always inserted with
// textContent, because questions, answers and file names may come from strangers.

const MEANINGS = {
  read: "one token each",
  reused: "as in an earlier frame",
  merged: "averaged into another; if that is in the same frame pair, a line leads there",
  dropped: "left out",
};
// The color that is drawn over a unit, depending on what happened to the unit.
const TINTS = { read: "rgb(250 250 250 / .2)", reused: "rgb(0 40 140 / .6)", merged: "rgb(168 80 0 / .45)", dropped: "rgb(0 0 0 / .75)" };
const MARK = "#ffd666";
const LINES_FROM = 12;  // merge lines are drawn only if units are at least this many pixels wide, or they would hide the units

const number = (value) => value.toLocaleString("en");
const percent = (share) => (share === null ? "auto" : `${+(100 * share).toFixed(1)}%`);
const duration = (ms) => (Math.abs(ms) < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(Math.abs(ms) < 10000 ? 2 : 1)} s`).replace("-", "−");

function make(tag, text = "", options = {}) {
  return Object.assign(document.createElement(tag), { textContent: text }, options);
}

function clock(seconds) {
  const tenths = Math.round(seconds * 10);
  const whole = Math.floor(tenths / 10);
  const hours = Math.floor(whole / 3600);
  const minutes = Math.floor(whole / 60) % 60;
  const start = hours ? `${hours}:${String(minutes).padStart(2, "0")}` : `${minutes}`;
  return `${start}:${String(whole % 60).padStart(2, "0")}.${tenths % 10}`;
}

// Draws the units of a frame pair over an area of `width` x `height` pixels, and returns a description of them.
// `pair`: `units`, a string with a digit per unit in raster order, each an index into `fates`; and `merged`, a list in which each
// merged unit is followed by the unit it was merged into. `lines`: whether to draw lines between these. `scale`: the number of
// canvas pixels per CSS pixel.
function drawUnits(pen, { fates, units, merged }, [rows, columns], [width, height], lines, scale) {
  const side = width / columns;
  const deep = height / rows;
  const counts = fates.map(() => 0);
  [...units].forEach((fate, unit) => {
    const left = Math.round((unit % columns) * side);
    const top = Math.round(Math.floor(unit / columns) * deep);
    const right = Math.round(((unit % columns) + 1) * side);
    const bottom = Math.round((Math.floor(unit / columns) + 1) * deep);
    pen.fillStyle = TINTS[fates[fate]];
    pen.fillRect(left, top, right - left, bottom - top);
    counts[fate] += 1;
  });
  if (lines && Math.min(side, deep) / scale >= LINES_FROM) drawMerges(pen, merged, columns, side, deep, scale);
  return fates.map((fate, place) => [counts[place], fate]).filter(([count]) => count).map((each) => each.join(" ")).join(", ");
}

function drawMerges(pen, merged, columns, side, deep, scale) {
  const middle = (unit) => [(unit % columns + 0.5) * side, (Math.floor(unit / columns) + 0.5) * deep];
  for (const [colour, wide] of [["rgb(18 18 22 / .5)", 3 * scale], ["rgb(255 214 102 / .75)", scale]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = wide;
    pen.beginPath();
    for (let place = 0; place < merged.length; place += 2) {
      pen.moveTo(...middle(merged[place]));
      pen.lineTo(...middle(merged[place + 1]));
    }
    pen.stroke();
  }
  pen.fillStyle = MARK;
  for (const owner of new Set(merged.filter((_, place) => place % 2))) {
    pen.beginPath();
    pen.arc(...middle(owner), Math.min(side, deep) / 8, 0, 2 * Math.PI);
    pen.fill();
  }
}

// Returns the legend's items: each fate that occurs, its number of units, and its meaning.
function legendItems(fates, counts) {
  return fates.filter((fate) => counts[fate]).map((fate) => {
    const item = make("li");
    const name = fate[0].toUpperCase() + fate.slice(1);
    item.append(make("span", "", { className: `swatch ${fate}` }), make("span", `${name}: ${number(counts[fate])}, ${MEANINGS[fate]}`, { className: "figures" }));
    return item;
  });
}

// Returns a table with a bar per row. A row is a title, a text, and a value, which is 0 or less if there should be no bar. `total`,
// if given, is a last row without a bar. `most` is the value of the longest bar.
function barTable(rows, total = null, most = Math.max(...rows.map((row) => row[2]))) {
  const table = make("table", "", { className: "figures" });
  const content = table.createTBody();
  for (const [title, text, value] of rows) {
    const row = content.insertRow();
    const cell = make("td", "", { className: "bar" });
    if (value > 0) {
      const bar = make("span");
      bar.style.width = `${(100 * value) / most}%`;
      cell.append(bar);
    }
    row.append(make("th", title, { scope: "row" }), make("td", text, { className: "number" }), cell);
  }
  if (total) table.createTFoot().insertRow().append(make("th", total[0], { scope: "row" }), make("td", total[1], { className: "number" }), make("td"));
  return table;
}
