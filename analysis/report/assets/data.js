// Inputs and runs as they lie in the page; codes of a run are decoded when it is first looked at.

const DATA = JSON.parse(document.getElementById("explorer-data").textContent);
const decoded = new Map();

function codesOf(run) {
  if (!decoded.has(run)) {
    const bytes = atob(run.weights);
    const codes = new Uint16Array(bytes.length / 2);
    for (let i = 0; i < codes.length; i++) {
      codes[i] = bytes.charCodeAt(2 * i) | (bytes.charCodeAt(2 * i + 1) << 8); // little-endian on every machine
    }
    decoded.set(run, codes);
  }
  return decoded.get(run);
}

// Index of the stored map that a setting asks for: loops matter in looped layers, n_loops in the coda.
function placeOf(run, setting) {
  const segment = run.segments[setting.layer];
  return run.places.findIndex(
    ([layer, loop, nLoops]) =>
      layer === setting.layer &&
      (segment !== "loop" || loop === setting.loop) &&
      (segment !== "coda" || nLoops === setting.nLoops)
  );
}

// Weights [query * n + key] of a setting, in order of position; head "mean" averages all heads.
function weightsOf(run, setting, n) {
  const codes = codesOf(run);
  const start = placeOf(run, setting) * run.n_heads;
  const heads = setting.head === "mean" ? [...Array(run.n_heads).keys()] : [setting.head];
  const values = new Float32Array(n * n);
  const scale = (run.high - run.low) / DATA.levels / heads.length;
  for (const head of heads) {
    const offset = (start + head) * n * n;
    for (let i = 0; i < values.length; i++) values[i] += codes[offset + i] * scale;
  }
  if (run.low !== 0) for (let i = 0; i < values.length; i++) values[i] += run.low;
  return values;
}

// The loop after which a setting's state is read, from 0; -1: before the loops.
function loopRead(run, setting) {
  const segment = run.segments[setting.layer];
  return segment === "prelude" ? -1 : segment === "loop" ? setting.loop : setting.nLoops - 1;
}

function hookName(run, setting) {
  const inside = run.segments[setting.layer] === "loop" ? `loop.${setting.loop}.` : "";
  return `${inside}blocks.${setting.layer}.attn.hook_pattern`;
}

// A row's mass on other masked keys, clean keys, and the query itself.
function massesOf(values, n, query, masked) {
  const mass = { masked: 0, clean: 0, self: 0 };
  for (let key = 0; key < n; key++) {
    mass[key === query ? "self" : masked[key] ? "masked" : "clean"] += values[query * n + key];
  }
  return mass;
}

function orderOf(input, how) {
  const positions = [...input.tokens.keys()];
  if (how === "position") return positions;
  return [...positions.filter((i) => input.masked[i]), ...positions.filter((i) => !input.masked[i])];
}

function quoted(token) {
  return JSON.stringify(token);
}

function positionName(input, position) {
  if (!input.board) return `${position}`;
  const size = input.board[0];
  return `r${Math.floor(position / size) + 1}c${(position % size) + 1}`;
}

function shortLabel(input, position) {
  if (input.masked[position]) return "■";
  const text = input.tokens[position].replace(/\n/g, "⏎").trim() || "␣";
  return text.length > 9 ? `${text.slice(0, 8)}…` : text;
}

function described(input, position) {
  const place = positionName(input, position);
  if (!input.masked[position]) return `${place} ${quoted(input.tokens[position])} (clean)`;
  const truth = input.truth ? `true ${quoted(input.truth[position])}, ` : "";
  return `${place} [MASK] (${truth}masked)`;
}

function fixed(value) {
  return value.toFixed(4);
}

function signed(value) {
  const text = Math.abs(value).toFixed(4);
  return Number(text) === 0 ? text : `${value < 0 ? "−" : "+"}${text}`;
}
