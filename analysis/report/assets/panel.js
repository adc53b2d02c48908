// The controls of one setting: model, layer, n_loops, loop, head.

function fill(select, options, chosen) {
  select.replaceChildren(
    ...options.map(([value, text]) => {
      const option = document.createElement("option");
      option.value = value;
      option.textContent = text; // a token or a name is text, whatever it holds
      return option;
    })
  );
  select.value = String(chosen);
}

class Panel {
  constructor(letter, changed) {
    this.control = {};
    for (const name of ["model", "layer", "n_loops", "loop", "head"]) {
      this.control[name] = document.getElementById(`${letter}-${name}`);
      this.control[name].addEventListener("change", () => {
        this.read(name);
        changed();
      });
    }
    this.note = document.getElementById(`${letter}-note`);
  }

  // Another input: keep what can be kept of the setting.
  open(input, setting) {
    this.input = input;
    this.setting = setting;
    this.sync();
  }

  get run() {
    return this.input.runs[this.setting.run];
  }

  read(name) {
    const value = this.control[name].value;
    if (name === "model") this.setting.run = Number(value);
    if (name === "layer") this.setting.layer = Number(value);
    if (name === "n_loops") this.setting.nLoops = Number(value);
    if (name === "loop") this.setting.loop = Number(value);
    if (name === "head") this.setting.head = value === "mean" ? value : Number(value);
    this.sync();
  }

  // Bring the setting into what the run holds, and the controls to the setting.
  sync() {
    const { run, setting } = this;
    const layers = [...new Set(run.places.map(([layer]) => layer))];
    if (!layers.includes(setting.layer)) setting.layer = layers[0];
    const segment = run.segments[setting.layer];
    const counts = this.counts(run, segment, setting.layer);
    if (!counts.includes(setting.nLoops)) setting.nLoops = counts.findLast((s) => s <= setting.nLoops) ?? counts[0];
    setting.loop = Math.max(0, Math.min(setting.loop, setting.nLoops - 1));
    if (setting.head !== "mean" && setting.head >= run.n_heads) setting.head = 0;
    const loops = segment === "loop" ? [...Array(setting.nLoops).keys()] : [];
    fill(this.control.model, this.input.runs.map((each, i) => [i, each.model]), setting.run);
    fill(this.control.layer, layers.map((layer) => [layer, `${layer} (${run.segments[layer]})`]), setting.layer);
    fill(this.control.n_loops, counts.map((s) => [s, s === run.s_max ? `${s} = S_max` : `${s}`]), setting.nLoops);
    fill(this.control.loop, loops.length ? loops.map((i) => [i, `${i}`]) : [["", "–"]], loops.length ? setting.loop : "");
    this.control.loop.disabled = segment !== "loop";
    const heads = [...Array(run.n_heads).keys()].map((head) => [head, `${head}`]);
    fill(this.control.head, [...heads, ["mean", "mean"]], setting.head);
    this.control.model.title = run.about;
    this.explain(run, segment);
  }

  // Numbers of loops to choose from: those with a map of this coda layer, elsewhere all that were run.
  counts(run, segment, layer) {
    if (segment === "coda") return run.places.filter((place) => place[0] === layer).map((place) => place[2]);
    return [...Array(run.n_loops).keys()].map((i) => i + 1);
  }

  explain(run, segment) {
    const texts = {
      prelude: "Before the loop: one map, whatever n_loops.",
      loop: "Looped: the map at a loop is the same for every n_loops that reaches it.",
      coda: "After the loop: the map depends on n_loops.",
    };
    this.note.textContent = `${texts[segment]} Hook: ${hookName(run, this.setting)}`;
  }

  // In words, for labels.
  get name() {
    const { run, setting } = this;
    const segment = run.segments[setting.layer];
    const where = segment === "loop" ? `, loop ${setting.loop}` : segment === "coda" ? `, n_loops ${setting.nLoops}` : "";
    return `${run.model}, layer ${setting.layer}${where}, ${setting.head === "mean" ? "mean of heads" : `head ${setting.head}`}`;
  }
}
