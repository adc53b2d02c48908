// Heat maps on canvas: a square of cells, strips that tell masked from clean, labels, and a colour bar with numbers.

const KEY = getComputedStyle(document.documentElement);
const STRIP = { masked: KEY.getPropertyValue("--masked").trim(), clean: KEY.getPropertyValue("--clean").trim() };
const INK = "#222222";
const STOPS = [[5, 48, 97], [67, 147, 195], [247, 247, 247], [214, 96, 77], [103, 0, 31]];
const FONT = "system-ui, 'DejaVu Sans', sans-serif";
const MOST_CELL = 26;
const LEAST_LABEL = 9; // CSS pixels a cell must have for a label of its own

// Share of the scale, 0..1 (weights) or -1..1 (changes), after the chosen shade.
function shareOf(value, view) {
  const share = Math.min(1, Math.abs(value) / view.top);
  return Math.sign(value) * (view.root ? Math.sqrt(share) : share);
}

function colourOf(share, kind) {
  if (kind === "weight") {
    const grey = Math.round(255 * (1 - Math.max(0, share)));
    return [grey, grey, grey];
  }
  const at = (share + 1) * 2;
  const left = Math.min(3, Math.floor(at));
  return STOPS[left].map((value, i) => Math.round(value + (STOPS[left + 1][i] - value) * (at - left)));
}

function css(colour) {
  return `rgb(${colour.join(",")})`;
}

function readable(colour) {
  return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 118 ? "#ffffff" : "#000000"; // 4.5 : 1 at least
}

class HeatMap {
  constructor(canvas) {
    this.canvas = canvas;
    this.base = document.createElement("canvas");
  }

  // view: n, values, order, input, kind "weight" | "change", top, root, title
  draw(view) {
    this.view = view;
    this.measure();
    const context = this.base.getContext("2d");
    context.scale(this.ratio, this.ratio);
    context.fillStyle = "#ffffff";
    context.fillRect(0, 0, this.width, this.height);
    this.cells(context);
    this.strips(context);
    this.labels(context);
    this.bar(context);
    this.mark(this.cell);
  }

  measure() {
    const { n, order, input } = this.view;
    this.ratio = window.devicePixelRatio || 1;
    const context = this.canvas.getContext("2d");
    context.font = `10px ${FONT}`;
    const longest = Math.max(...order.map((i) => context.measureText(shortLabel(input, i)).width));
    const room = this.canvas.parentElement.clientWidth - 6; // its padding
    const fit = (margin) => Math.floor(((room - margin - 2) * this.ratio) / n);
    this.margin = 26 + longest;
    this.named = fit(this.margin) >= LEAST_LABEL * this.ratio;
    if (!this.named) this.margin = 40;
    const cell = Math.max(1, Math.min(fit(this.margin), Math.round(MOST_CELL * this.ratio)));
    this.step = cell / this.ratio;
    this.side = this.step * n;
    this.width = this.margin + this.side + 2;
    this.height = this.margin + this.side + 52;
    for (const each of [this.canvas, this.base]) {
      each.width = Math.ceil(this.width * this.ratio);
      each.height = Math.ceil(this.height * this.ratio);
    }
    this.canvas.style.width = `${this.canvas.width / this.ratio}px`;
    this.canvas.style.height = `${this.canvas.height / this.ratio}px`;
  }

  // One rectangle of device pixels a cell; cells below 0 carry a white dot, so that the sign survives greyscale.
  cells(context) {
    const { n, values, order, kind } = this.view;
    const cell = Math.round(this.step * this.ratio);
    const image = new ImageData(n * cell, n * cell);
    const pixels = new Uint32Array(image.data.buffer);
    const dot = cell >= 4 ? Math.max(1, Math.round(cell / 4)) : 0;
    const from = Math.floor((cell - dot) / 2);
    for (let row = 0; row < n; row++) {
      for (let column = 0; column < n; column++) {
        const share = shareOf(values[order[row] * n + order[column]], this.view);
        const [r, g, b] = colourOf(share, kind);
        const packed = (255 << 24) | (b << 16) | (g << 8) | r;
        const corner = row * cell * n * cell + column * cell;
        for (let y = 0; y < cell; y++) pixels.fill(packed, corner + y * n * cell, corner + y * n * cell + cell);
        if (share < -0.08 && dot && kind === "change") {
          for (let y = from; y < from + dot; y++) {
            pixels.fill(0xffffffff, corner + y * n * cell + from, corner + y * n * cell + from + dot);
          }
        }
      }
    }
    context.putImageData(image, Math.round(this.margin * this.ratio), Math.round(this.margin * this.ratio));
    context.strokeStyle = "#999999";
    context.lineWidth = 1;
    context.strokeRect(this.margin - 0.5, this.margin - 0.5, this.side + 1, this.side + 1);
  }

  strips(context) {
    const { order, input } = this.view;
    order.forEach((position, i) => {
      context.fillStyle = input.masked[position] ? STRIP.masked : STRIP.clean;
      const at = this.margin + i * this.step;
      context.fillRect(this.margin - 6, at, 4, this.step + 0.2);
      context.fillRect(at, this.margin - 6, this.step + 0.2, 4);
    });
  }

  labels(context) {
    const { order, input } = this.view;
    const size = this.named ? Math.min(11, Math.max(8, this.step - 1)) : 10;
    const every = this.named ? 1 : Math.max(1, Math.ceil(order.length / 8 / 4) * 4);
    context.textBaseline = "middle";
    order.forEach((position, i) => {
      if (i % every) return;
      const text = this.named ? shortLabel(input, position) : positionName(input, position);
      const at = this.margin + (i + 0.5) * this.step;
      context.font = `${size}px ${FONT}`;
      context.fillStyle = input.masked[position] ? STRIP.masked : INK;
      context.textAlign = "right";
      context.fillText(text, this.margin - 9, at);
      context.save();
      context.translate(at, this.margin - 9);
      context.rotate(-Math.PI / 2);
      context.textAlign = "left";
      context.fillText(text, 0, 0);
      context.restore();
    });
    context.fillStyle = "#555555";
    context.font = `italic 10px ${FONT}`;
    context.textAlign = "left";
    context.fillText("key →", this.margin, 6);
    context.save();
    context.translate(7, this.margin + 30);
    context.rotate(-Math.PI / 2);
    context.fillText("← query", -6, 0);
    context.restore();
  }

  // The colour bar: equal steps of weight are equal steps along it, whatever the shade.
  bar(context) {
    const { kind, top } = this.view;
    const [x, y, width] = [this.margin, this.margin + this.side + 10, Math.max(this.side, 120)];
    const from = kind === "weight" ? 0 : -top;
    for (let i = 0; i < width; i++) {
      const share = shareOf(from + ((top - from) * i) / (width - 1), this.view);
      context.fillStyle = css(colourOf(share, kind));
      context.fillRect(x + i, y, 1.5, 10);
      if (kind === "change" && share < -0.08 && i % 6 === 3) {
        context.fillStyle = "#ffffff";
        context.fillRect(x + i, y + 4, 2, 2);
      }
    }
    context.strokeStyle = "#999999";
    context.strokeRect(x - 0.5, y - 0.5, width + 1, 11);
    context.fillStyle = INK;
    context.font = `10px ${FONT}`;
    context.textBaseline = "top";
    const ticks = kind === "weight" ? [0, top / 2, top] : [-top, 0, top];
    ticks.forEach((value, i) => {
      context.textAlign = ["left", "center", "right"][i];
      const text = kind === "change" && value ? signed(value).replace(/(\.\d{3}).*/, "$1") : value.toFixed(value ? 3 : 0);
      context.fillText(text, x + (width * i) / 2, y + 14);
    });
    context.textAlign = "left";
    context.fillStyle = "#555555";
    context.fillText(this.view.title, x, y + 28);
  }

  // The base picture with row, column and cell of `cell` [query, key] outlined.
  mark(cell) {
    this.cell = cell;
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.drawImage(this.base, 0, 0);
    if (!cell || !this.view) return;
    context.scale(this.ratio, this.ratio);
    const [y, x] = cell.map((position) => this.margin + this.view.order.indexOf(position) * this.step);
    context.lineWidth = 1;
    context.strokeStyle = "rgba(27,79,143,0.75)";
    context.strokeRect(this.margin - 0.5, y - 0.5, this.side + 1, this.step + 1);
    context.strokeRect(x - 0.5, this.margin - 0.5, this.step + 1, this.side + 1);
    context.lineWidth = 2;
    context.strokeStyle = "#d95f02";
    context.strokeRect(x - 1, y - 1, this.step + 2, this.step + 2);
  }

  // [query, key] under a pointer event, or null.
  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const { order } = this.view;
    const place = (offset) => order[Math.floor((offset - this.margin) / this.step)];
    const [query, key] = [place(event.clientY - box.top), place(event.clientX - box.left)];
    return query === undefined || key === undefined ? null : [query, key];
  }
}
