// Samples, token by token.

const FULL_SHADE_NATS = 5; // a token of probability e^-5 or less is shaded fully

function shade(logp) { return Math.min(1, -logp / FULL_SHADE_NATS) * 0.75; }

function visible(text) { return text.replace(/\n/g, "⏎\n").replace(/\t/g, "⇥\t"); }

function tokenNode([text, id, logp, trains], place) {
  const marks = /^<[^>]+>$/.test(text) ? " mark" : "";
  const node = element("span", { class: `token${marks}${trains ? "" : " untrained"}` }, visible(text));
  if (logp !== null && trains) node.style.setProperty("--s", shade(logp).toFixed(3));
  node.about = { text, id, logp, trains, place };
  return node;
}

function tokensNode(sample) {
  const nodes = [], left = sample.length - sample.tokens.length;
  sample.tokens.forEach((token, place) => {
    if (left && place === sample.head) nodes.push(element("span", { class: "gap" }, `${left.toLocaleString("en")} tokens left out`));
    nodes.push(tokenNode(token, left && place >= sample.head ? place + left : place));
  });
  return element("div", { class: "tokens" }, ...nodes);
}

function sampleCard(title, sample) {
  const right = sample.reward !== null && sample.reward >= 1 - 1e-6;
  const verdict = { class: `verdict ${right ? "right" : "wrong"}`, hidden: sample.reward === null };
  return element("article", { class: "card" },
    element("div", { class: "sample-head" },
      title ? element("strong", {}, title) : null,
      element("span", verdict, `${right ? "✓" : "✗"} reward ${format(sample.reward || 0)}`),
      element("span", {}, `${sample.length} tokens`),
      sample.status && sample.status !== "completed" ? element("span", {}, sample.status) : null),
    tokensNode(sample));
}

function promptCard(prompt, label) {
  return element("div", { class: "card prompt-card" },
    element("div", { class: "prompt" }, prompt.trim()),
    label === null || label === undefined || label === "" ? null : element("p", { class: "label" }, "Expected ", element("b", {}, String(label))));
}

function shadingKey(samples) {
  const shaded = samples.some((sample) => sample.tokens.some(([, , logp]) => logp !== null));
  return element("p", { class: "key" },
    element("span", { hidden: !shaded }, "The engine gave the token probability 1", element("span", { class: "ramp" }), "0.007 or less"),
    element("span", {}, element("span", { class: "token untrained" }, " striped "), " not trained on"),
    element("span", {}, "Point at a token for its numbers."));
}

class Comparison {
  constructor(comparison) {
    this.all = comparison;
    this.kind = comparison.pairs[0].kind;
    this.place = 0;
    this.filters = element("div", { class: "bar", role: "group", "aria-label": "Which prompts" });
    this.body = element("div", { "aria-live": "polite" });
    this.node = element("div", {},
      element("p", { class: "lede" }, `${comparison.dataset}: the policy before training (left) and after ${comparison.after} rollouts (right).`),
      this.filters, this.body, shadingKey(comparison.pairs.map((pair) => pair.after)));
    this.draw();
  }

  draw() {
    const pairs = this.all.pairs.filter((pair) => pair.kind === this.kind), pair = pairs[this.place];
    const buttons = Object.entries(this.all.counts).map(([kind, count]) => {
      const button = element("button", { type: "button", "aria-pressed": String(kind === this.kind) }, `${kind} `, element("span", {}, String(count)));
      button.addEventListener("click", () => { this.kind = kind; this.place = 0; this.draw(); });
      return button;
    });
    const step = (title, text, by) => {
      const button = element("button", { type: "button", "aria-label": title, disabled: !pairs[this.place + by] }, text);
      button.addEventListener("click", () => { this.place += by; this.draw(); });
      return button;
    };
    this.filters.replaceChildren(...buttons, element("span", { class: "spacer" }),
      element("span", { class: "count" }, `${this.place + 1} of ${pairs.length} shown`), step("Previous prompt", "←", -1), step("Next prompt", "→", 1));
    this.body.replaceChildren(promptCard(pair.prompt, pair.label),
      element("div", { class: "pair" }, sampleCard("before", pair.before), sampleCard("after", pair.after)));
  }
}

class RolloutBrowser {
  constructor(rollouts) {
    this.rollouts = rollouts;
    this.bar = element("div", { class: "bar", role: "group", "aria-label": "Which rollout" });
    this.body = element("div", {});
    this.node = element("div", {},
      element("p", { class: "lede" }, "The first groups of some rollouts, as the trainer used them."), this.bar, this.body,
      shadingKey(rollouts.flatMap(({ groups }) => groups.flatMap((group) => group.samples))));
    this.show(rollouts.length - 1);
  }

  show(shown) {
    this.bar.replaceChildren("Rollout", ...this.rollouts.map(({ rollout_id }, place) => {
      const button = element("button", { type: "button", "aria-pressed": String(place === shown) }, String(rollout_id));
      button.addEventListener("click", () => this.show(place));
      return button;
    }));
    this.body.replaceChildren(...this.rollouts[shown].groups.flatMap((group) => [
      promptCard(group.prompt, group.label),
      element("div", { class: "group" }, ...group.samples.map((sample) => sampleCard(null, sample)))]));
  }
}

function describeTokens(tip) {
  document.addEventListener("pointerover", (event) => {
    const about = event.target.about;
    if (!about) { if (event.target.closest && !event.target.closest("svg")) tip.hide(); return; }
    const row = (name, value) => element("tr", {}, element("td", {}, name), element("td", {}, value));
    const rows = [row("token", JSON.stringify(about.text)), row("id", String(about.id)), row("place", String(about.place))];
    if (about.logp !== null) rows.push(row("log-probability", about.logp.toFixed(3)), row("probability", format(Math.exp(about.logp), "share")));
    rows.push(row("trained on", about.trains ? "yes" : "no"));
    const box = event.target.getBoundingClientRect();
    tip.show([element("table", {}, ...rows)], box.left, box.bottom + 6);
  });
}
