// The explorer: two settings, their maps and difference, the numbers of a cell, the read-out of every loop.

const byId = (id) => document.getElementById(id);
const SIDES = ["a", "b", "d"];
const state = { input: DATA.inputs[0], cell: [0, 0], values: {}, view: {} };
const maps = Object.fromEntries(SIDES.map((side) => [side, new HeatMap(byId(`${side}-map`))]));
const panels = { a: new Panel("a", redraw), b: new Panel("b", redraw) };

function open(index) {
  const input = (state.input = DATA.inputs[index]);
  const run = input.runs[0];
  const layer = run.places.find(([each]) => run.segments[each] === "loop")?.[0] ?? run.places[0][0];
  const last = Math.min(run.s_max, run.n_loops);
  for (const [side, loop] of [["a", 0], ["b", last - 1]]) {
    panels[side].open(input, { run: 0, layer, loop, nLoops: last, head: run.best_head });
  }
  const hidden = input.masked.indexOf(true);
  state.cell = [Math.max(hidden, 0), Math.max(input.masked.indexOf(true, hidden + 1), 0)];
  for (const side of SIDES) chips(byId(`${side}-tokens`));
  redraw();
}

// All three maps on common scales; also after a change of width.
function redraw() {
  const { input } = state;
  const n = input.tokens.length;
  const order = orderOf(input, byId("order").value);
  const root = byId("shade").value === "root";
  for (const side of ["a", "b"]) state.values[side] = weightsOf(panels[side].run, panels[side].setting, n);
  state.values.d = state.values.b.map((value, i) => value - state.values.a[i]);
  const most = (values) => values.reduce((top, value) => Math.max(top, Math.abs(value)), 1e-9);
  const top = Math.max(most(state.values.a), most(state.values.b));
  const titles = { a: "attention weight of A", b: "attention weight of B", d: "weight of B − weight of A (dotted: below 0)" };
  for (const side of SIDES) {
    const change = side === "d";
    const scale = change ? Math.max(most(state.values.d), 1e-4) : top;
    const view = { n, order, input, root, values: state.values[side], kind: change ? "change" : "weight" };
    maps[side].cell = state.cell;
    maps[side].draw((state.view[side] = { ...view, top: scale, title: titles[side] }));
    const what = change ? "Difference, B minus A" : `Map ${side.toUpperCase()}: ${panels[side].name}`;
    byId(`${side}-map`).setAttribute("aria-label", `${what}. Arrow keys move the cell.`);
  }
  const runs = [panels.a.run, panels.b.run];
  const error = Math.max(...runs.map((run) => (run.high - run.low) / (2 * DATA.levels)));
  byId("precision").textContent = error.toFixed(6);
  readout();
  show();
}

function select(cell) {
  if (!cell || (cell[0] === state.cell[0] && cell[1] === state.cell[1])) return;
  state.cell = cell;
  for (const side of SIDES) maps[side].mark(cell);
  show();
}

// The numbers of the cell, in words for everyone and as a table.
function show() {
  const { input, cell, values } = state;
  const [query, key] = cell;
  const n = input.tokens.length;
  const at = (side) => values[side][query * n + key];
  byId("numbers").textContent =
    `Query ${described(input, query)} → key ${described(input, key)}: ` +
    `A\u00a0${fixed(at("a"))}, B\u00a0${fixed(at("b"))}, B\u00a0−\u00a0A\u00a0${signed(at("d"))}`;
  for (const side of SIDES) {
    const mass = massesOf(values[side], n, query, input.masked);
    const form = side === "d" ? signed : fixed;
    const cells = [at(side), mass.masked, mass.clean, mass.self].map(form);
    byId(`${side}-row`).querySelectorAll("td").forEach((td, i) => (td.textContent = cells[i]));
    shade(byId(`${side}-tokens`), state.view[side]);
  }
  for (const row of byId("readout").tBodies[0].rows) {
    row.classList.toggle("current", Number(row.dataset.position) === query);
  }
}

// The sequence as chips (a board as a board); they show what the current query attends to.
function chips(box) {
  const { input } = state;
  box.replaceChildren(
    ...input.tokens.map((token, position) => {
      const chip = document.createElement("span");
      chip.textContent = input.masked[position] ? "■" : token.replace(/\n/g, "⏎");
      chip.title = described(input, position);
      chip.className = input.masked[position] ? "chip masked" : "chip";
      chip.addEventListener("click", () => select([position, state.cell[1]]));
      chip.addEventListener("mouseenter", () => select([state.cell[0], position]));
      if (input.board) {
        const [size, rows, columns] = input.board;
        chip.classList.toggle("box-top", Math.floor(position / size) % rows === 0);
        chip.classList.toggle("box-left", (position % size) % columns === 0);
      }
      return chip;
    })
  );
  box.classList.toggle("board", Boolean(input.board));
  box.style.gridTemplateColumns = input.board ? `repeat(${input.board[0]}, 1.9em)` : "";
}

function shade(box, view) {
  const [query, key] = state.cell;
  [...box.children].forEach((chip, position) => {
    const colour = colourOf(shareOf(view.values[query * view.n + position], view), view.kind);
    chip.style.backgroundColor = css(colour);
    chip.style.color = readable(colour);
    chip.classList.toggle("query", position === query);
    chip.classList.toggle("key", position === key && position !== query);
  });
}

// Read-out by the coda lens: masked positions x loops, best token and probability.
function readout() {
  const { input } = state;
  const panel = panels[byId("readout-of").value];
  const answers = panel.run.answers;
  const table = byId("readout");
  const rows = [...input.tokens.keys()].filter((position) => input.masked[position]);
  byId("readout-none").hidden = Boolean(answers && rows.length);
  const scored = Boolean(answers?.p_true);
  byId("readout-number").textContent = scored ? "p(true token)" : "p(best token)";
  byId("readout-model").textContent = panel.run.model;
  const read = loopRead(panel.run, panel.setting);
  const loops = answers ? [...answers.top1.keys()] : [];
  const head = ["position: true", ...loops.map((loop) => `${loop}`)].map((text, i) => {
    const th = document.createElement("th");
    th.scope = "col";
    th.textContent = text;
    if (i > 0 && i - 1 === read) th.className = "current";
    return th;
  });
  table.tHead.rows[0].replaceChildren(...head);
  table.tBodies[0].replaceChildren(...(answers ? rows.map((position, i) => readoutRow(answers, position, i, read)) : []));
}

function readoutRow(answers, position, i, read) {
  const { input } = state;
  const row = document.createElement("tr");
  row.dataset.position = position;
  const th = document.createElement("th");
  th.scope = "row";
  th.textContent = `${positionName(input, position)}: ${input.truth ? quoted(input.truth[position]) : "?"}`;
  row.append(th);
  answers.top1.forEach((tops, loop) => {
    const cell = document.createElement("td");
    const p = (answers.p_true ?? answers.p_top1)[loop][i];
    const word = document.createElement("span");
    word.textContent = quoted(tops[i]).slice(1, -1).trim() || "␣";
    if (answers.correct?.[loop][i]) word.className = "correct";
    const number = document.createElement("small");
    number.textContent = p.toFixed(2);
    const colour = colourOf(p, "weight");
    cell.style.backgroundColor = css(colour);
    cell.style.color = readable(colour);
    cell.title = `p(best) ${answers.p_top1[loop][i].toFixed(4)}, entropy ${answers.entropy[loop][i].toFixed(3)} nats`;
    if (loop > 0 && tops[i] !== answers.top1[loop - 1][i]) cell.classList.add("flipped");
    if (loop === read) cell.classList.add("current");
    cell.append(word, number);
    row.append(cell);
  });
  row.addEventListener("mouseenter", () => select([position, state.cell[1]]));
  return row;
}

const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

function keyed(event, map) {
  const { order, n } = map.view;
  let [row, column] = state.cell.map((position) => order.indexOf(position));
  if (MOVES[event.key]) {
    row = Math.max(0, Math.min(n - 1, row + MOVES[event.key][0]));
    column = Math.max(0, Math.min(n - 1, column + MOVES[event.key][1]));
  } else if (event.key === "Home" || event.key === "End") {
    column = event.key === "Home" ? 0 : n - 1;
  } else if (event.key === "PageUp" || event.key === "PageDown") {
    row = event.key === "PageUp" ? 0 : n - 1;
  } else {
    return;
  }
  event.preventDefault();
  select([order[row], order[column]]);
}

for (const side of SIDES) {
  const canvas = byId(`${side}-map`);
  canvas.addEventListener("mousemove", (event) => select(maps[side].at(event)));
  canvas.addEventListener("keydown", (event) => keyed(event, maps[side]));
}
fill(byId("input"), DATA.inputs.map((input, i) => [i, input.title]), 0);
byId("input").addEventListener("change", (event) => open(Number(event.target.value)));
for (const id of ["order", "shade", "readout-of"]) byId(id).addEventListener("change", redraw);
byId("swap").addEventListener("click", () => {
  const [left, right] = [panels.a.setting, panels.b.setting];
  panels.a.open(state.input, right);
  panels.b.open(state.input, left);
  redraw();
});
let width = 0;
new ResizeObserver(() => {
  if (byId("explorer").clientWidth !== width) redraw();
  width = byId("explorer").clientWidth;
}).observe(byId("explorer"));
open(0);
