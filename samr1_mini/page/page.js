"use strict";
// The page is made from one block of JSON. Text becomes text nodes only, so no answer is read as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const { log, steps, summary } = data;
const test = data.test.questions;
const NUMBERS = log.step; // of all steps
const FIRST = NUMBERS[0];
const LAST = NUMBERS[NUMBERS.length - 1];
const NATS = 10000; // log-probabilities are whole ten-thousandths of a nat
const SVG = "http://www.w3.org/2000/svg";

const view = { step: LAST, question: 0, answer: 0, colour: "advantage" };
Object.assign(view, { kind: null, order: "change", shown: 24 }); // of the held-out questions

// ------------------------------------------------------------------------------- helpers

const byId = (id) => document.getElementById(id);

/** Make an element. A value that is a function becomes a listener of the event of that name. */
function make(tag, attributes = {}, ...children) {
  const isSvg = ["svg", "path", "rect", "circle"].includes(tag);
  const node = isSvg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (name === "style") node.style.cssText = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const missing = (value) => value === null || value === undefined;
const present = (values) => values.filter((value) => !missing(value));

/** Write a number with about three digits. */
function short(value) {
  if (missing(value)) return "–";
  const size = Math.abs(value);
  if (value === 0 || (Number.isInteger(value) && size < 1e6)) return String(value);
  if (size >= 100) return value.toFixed(0);
  if (size >= 0.1) return value.toFixed(2);
  if (size >= 0.001) return value.toPrecision(2);
  return value.toExponential(1);
}

const signed = (value) => (value > 0 ? "+" : "") + value.toFixed(2);
const percent = (value) => (Number.isFinite(value) ? `${(100 * value).toFixed(0)} %` : "–");

/** Return a running mean of nine values. A short run is not smoothed. */
function smooth(values) {
  if (values.length < 25) return values;
  return values.map((_, i) => {
    const near = present(values.slice(Math.max(0, i - 4), i + 5));
    return near.length ? mean(near) : null;
  });
}

function hideTip() {
  byId("tip").hidden = true;
  byId("tip").textContent = ""; // a screen reader reads hidden text that describes a node
}

/** Show an explanation while the pointer or the focus is on a node, and after a tap on the node. */
function explained(node, text) {
  const tip = byId("tip");
  const show = () => {
    tip.hidden = false;
    tip.textContent = text();
    const place = node.getClientRects()[0];
    const below = place.bottom + 8 + tip.offsetHeight < innerHeight;
    tip.style.top = `${below ? place.bottom + 8 : place.top - tip.offsetHeight - 8}px`;
    tip.style.left = `${Math.max(8, Math.min(place.left, innerWidth - tip.offsetWidth - 8))}px`;
  };
  for (const event of ["pointerenter", "focus", "click"]) node.addEventListener(event, show);
  for (const event of ["pointerleave", "blur"]) node.addEventListener(event, hideTip);
  node.setAttribute("aria-describedby", "tip");
  return node;
}

/** Make the name of a column that explains itself. */
function columnName(name) {
  const node = make("span", { class: "explained", tabindex: 0 }, name);
  return explained(node, () => data.columns[name]);
}

// -------------------------------------------------------------------------------- curves

const charts = []; // functions that move a chart's cursor to a step

const left = (step) => (100 * (step - FIRST)) / Math.max(1, LAST - FIRST); // percent

/** Return the place of a value in a square of 100 x 100, as text for a path. */
function pathPoint(value, i, low, high) {
  const fromTop = 100 - (100 * (value - low)) / (high - low);
  return `${left(NUMBERS[i]).toFixed(2)} ${fromTop.toFixed(2)}`;
}

/** Return the path of values, one for each step. */
function line(values, low, high) {
  let path = "";
  let pen = "M";
  values.forEach((value, i) => {
    if (value === null) pen = "M";
    else {
      path += pen + pathPoint(value, i, low, high);
      if (pen === "M") path += "h0"; // so that a single value is a dot
      pen = "L";
    }
  });
  return path;
}

/** Return the path of the area between two lists of values. */
function area(lower, upper, low, high) {
  const points = (values) => values.map((value, i) => pathPoint(value, i, low, high));
  return `M${[...points(upper), ...points(lower).reverse()].join("L")}Z`;
}

/** Add the parts of a chart to a figure: heading, curve, cursor, range of steps. */
function addPlot(figure, paths, low, high, name, values) {
  const value = make("b");
  const cursor = make("div", { class: "cursor" });
  const svg = make("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img" }, ...paths);
  const ends = present(values);
  svg.setAttribute("aria-label", `${name}: ${short(ends[0])} first, ${short(ends[ends.length - 1])} last`);
  const plot = make("div", { class: "plot" }, svg, cursor);
  plot.append(make("small", { style: "top: 0" }, short(high)));
  plot.append(make("small", { style: "bottom: 0" }, short(low)));
  const stepAt = (event) => {
    const box = plot.getBoundingClientRect();
    const share = Math.max(0, Math.min(1, (event.clientX - box.left) / box.width));
    return NUMBERS[Math.round(share * (NUMBERS.length - 1))];
  };
  plot.addEventListener("pointermove", (event) => {
    const step = stepAt(event);
    charts.forEach((move) => move(step));
  });
  plot.addEventListener("pointerleave", () => charts.forEach((move) => move(view.step)));
  plot.addEventListener("click", (event) => go({ step: stepAt(event) }));
  charts.push((step) => {
    cursor.style.left = `${left(step)}%`;
    value.textContent = short(present(values.slice(0, NUMBERS.indexOf(step) + 1)).pop());
  });
  figure.append(make("figcaption", {}, columnName(name), value), plot);
  figure.append(make("div", { class: "range" }, make("span", {}, String(FIRST)), make("span", {}, String(LAST))));
}

/** Make the chart of a column. Columns that are shares are drawn from 0 to 1. */
function chart(name) {
  const values = log[name];
  const known = present(values);
  const low = Math.min(0, ...known);
  const share = ["iou", "zero_variance", "unique"].includes(name) || name.endsWith("_format");
  let high = share ? 1 : Math.max(0, ...known);
  if (high === low) high = low + 1;
  const trend = name.startsWith("validation_") ? filled(values) : smooth(values);
  const paths = [
    make("path", { class: "raw", d: line(values, low, high) }),
    make("path", { d: line(trend, low, high) }),
  ];
  const figure = make("figure");
  addPlot(figure, paths, low, high, name, values);
  return figure;
}

/** Fill the steps between two known values, so that rare values are connected. */
function filled(values) {
  const found = values.map(() => null);
  let last = -1;
  values.forEach((value, i) => {
    if (missing(value)) return;
    for (let k = last + 1; last >= 0 && k < i; k++)
      found[k] = values[last] + ((value - values[last]) * (k - last)) / (i - last);
    found[i] = value;
    last = i;
  });
  return found;
}

/** Draw the reward as a stack of its weighted terms. */
function drawReward() {
  const names = Object.keys(data.terms).filter((name) => data.terms[name] !== 0);
  const key = make("p");
  const zero = NUMBERS.map(() => 0);
  let top = zero; // of the positive terms
  let bottom = zero; // of the negative terms, which hang below 0
  const layers = names.map((name, i) => {
    const term = smooth(log[name]).map((value) => (value || 0) * data.terms[name]);
    const negative = mean(term) < 0;
    const from = negative ? bottom : top;
    const upto = from.map((value, k) => value + term[k]);
    if (negative) bottom = upto;
    else top = upto;
    key.append(make("span", { class: "key" }, make("i", { style: `background: var(--area${i % 5})` }), columnName(name)));
    return [from, upto];
  });
  const high = Math.max(...top, ...present(log.reward), 1e-9);
  const low = Math.min(...bottom, ...present(log.reward), 0);
  const paths = layers.map(([under, over], i) =>
    make("path", { class: "area", style: `fill: var(--area${i % 5})`, d: area(under, over, low, high) }),
  );
  paths.push(make("path", { class: "raw", d: line(log.reward, low, high) }));
  addPlot(byId("reward"), paths, low, high, "reward", log.reward);
  byId("reward").append(key);
}

/** Questions to ask when the reward stays flat, with the answer at a step. */
const CHECKS = [
  ["Do the answers have the format?", (at) => percent(at("segmentation_format"))],
  ["Are answers cut off?", (at) => percent(at("truncated"))],
  ["Are the masks right?", (at) => `IoU ${short(at("iou"))}`],
  ["Do rewards differ within a group?", (at) => `in ${percent(1 - at("zero_variance"))} of the groups`],
  ["Does the policy explore?", (at) => `${percent(at("unique"))} different`],
  ["Is there a gradient?", (at) => `norm ${short(at("grad_norm"))}`],
  ["Is the clip active?", (at) => `${short(100 * ((at("clip_low") || 0) + (at("clip_high") || 0)))} % of tokens`],
  ["How far is the base model?", (at) => (log.kl ? `KL ${short(at("kl"))}` : "no KL")],
  ["Do sampling and training agree?", (at) => `gap ${short(at("sampling_gap"))}`],
];

function drawChecks() {
  const outputs = CHECKS.map(([question]) => {
    const output = make("b");
    byId("checks").append(make("p", {}, question, output));
    return output;
  });
  charts.push((step) => {
    const i = NUMBERS.indexOf(step);
    const at = (name) => (log[name] || [])[i];
    CHECKS.forEach(([, answer], k) => (outputs[k].textContent = answer(at)));
  });
}

const MAIN = ["iou", "validation_gIoU", "segmentation_format", "zero_variance", "length", "entropy", "kl", "grad_norm"];

function drawCurves() {
  byId("checks").append(make("h3", {}, "When the reward stays flat"));
  drawReward();
  drawChecks();
  for (const name of MAIN) if (log[name]) byId("curves").append(chart(name));
  for (const name of Object.keys(log))
    if (![...MAIN, "step", "reward"].includes(name)) byId("others").append(chart(name));
}

// ------------------------------------------------------------------------------ pictures

const CROSS = "M-1-3h2v2h2v2h-2v2h-2v-2h-2v-2h2z"; // a plus, which is turned by 45 degrees

/** Make a picture with mask, boxes and points. `group.side` is the range of the coordinates. */
function picture(group, answer) {
  const [width, height] = group.size;
  const [sx, sy] = [width / group.side, height / group.side];
  const radius = Math.max(width, height) / 45;
  const shapes = [];
  for (const { box, points } of answer.objects) {
    const [x1, y1, x2, y2] = box;
    const sides = { width: (x2 - x1) * sx, height: (y2 - y1) * sy };
    shapes.push(make("rect", { x: x1 * sx, y: y1 * sy, ...sides }));
    for (const [x, y, label] of points) {
      const transform = `translate(${x * sx} ${y * sy}) rotate(45) scale(${radius / 3})`;
      if (label) shapes.push(make("circle", { transform, r: 3, fill: "#1aa96b" }));
      else shapes.push(make("path", { transform, d: CROSS, fill: "#e0559f" }));
    }
  }
  const style = `aspect-ratio: ${width} / ${height}; max-width: ${(60 * width) / height}vh`;
  return make(
    "div",
    { class: "picture", style },
    make("img", { src: `data:image/webp;base64,${group.picture}`, alt: group.question }),
    make("img", { src: `data:image/png;base64,${answer.overlay}`, alt: "" }),
    make("svg", { viewBox: `0 0 ${width} ${height}` }, ...shapes),
  );
}

function keyOfPicture() {
  const parts = { mask: "SAM's mask", truth: "true mask", box: "box" };
  Object.assign(parts, { on: "point on", off: "point off" });
  const keys = Object.entries(parts).map(([part, name]) =>
    make("span", { class: "key" }, make("i", { class: part }), name),
  );
  return make("p", {}, ...keys);
}

// -------------------------------------------------------------------------------- tokens

/** Return what is known of a token: probabilities, ratio, KL of eq. (3), entropy, clip. */
function token(answer, i) {
  const nats = (name) => (answer[name] ? answer[name][i] / NATS : null);
  const [old, now, after, reference] = ["old", "new", "after", "reference"].map(nats);
  const ratio = Math.exp(after - old);
  const atUpdate = now === null ? null : Math.exp(now - old);
  let kl = null;
  if (reference !== null) kl = Math.expm1(reference - after) - (reference - after);
  const { eps_low, eps_high } = data.settings;
  const above = answer.advantage > 0 && atUpdate > 1 + eps_high;
  const below = answer.advantage < 0 && atUpdate !== null && atUpdate < 1 - eps_low;
  return { old, ratio, atUpdate, kl, entropy: nats("entropy"), clipped: above || below };
}

/** For each choice of colour: a text, and the strength from -1 to 1 for a token. */
const COLOURS = {
  advantage: ["The advantage of the answer: blue is positive, orange is negative.", (t, answer) => answer.advantage / 2],
  ratio: ["The probability after the step, divided by the probability when sampled: blue is above 1, orange is below 1.", (t) => Math.log(t.ratio) / 0.3],
  KL: ["The KL to the base model after the step: the stronger the orange, the larger.", (t) => -Math.sqrt(t.kl || 0)],
  entropy: ["The entropy of the next token in the last update: the stronger the blue, the larger.", (t) => (t.entropy || 0) / 1.5],
  clipped: ["A frame marks tokens that the clip of eq. (4) has cut off in their update.", (t) => (t.clipped ? -0.4 : 0)],
};
if (!log.kl) delete COLOURS.KL;

function describe(text, t) {
  const parts = [`${JSON.stringify(text)}: probability ${short(Math.exp(t.old))} when sampled`];
  if (t.atUpdate !== null) parts.push(`ratio ${t.atUpdate.toFixed(3)} in its update`);
  parts.push(`ratio ${t.ratio.toFixed(3)} after the step`);
  if (t.kl !== null) parts.push(`KL ${short(t.kl)}`);
  if (t.entropy !== null) parts.push(`entropy ${short(t.entropy)}`);
  if (t.clipped) parts.push("clipped");
  return parts.join(", ");
}

function tokens(answer) {
  const strength = COLOURS[view.colour][1];
  const spans = answer.tokens.map((text, i) => {
    const t = token(answer, i);
    const value = Math.max(-1, Math.min(1, strength(t, answer)));
    const colour = `rgba(var(--${value > 0 ? "plus" : "minus"}), ${(0.75 * Math.abs(value)).toFixed(2)})`;
    const span = make("span", { style: `background: ${colour}` }, text);
    if (view.colour === "clipped" && t.clipped) span.className = "clipped";
    return explained(span, () => describe(text, t));
  });
  return make("div", { class: "tokens" }, ...spans);
}

// ------------------------------------------------------------------------- inside a step

/** Return the logged step nearest to a step. */
const nearest = (step) =>
  steps.reduce((best, one) => (Math.abs(one.step - step) < Math.abs(best.step - step) ? one : best));

const REASONS = {
  interval: "it is logged at the interval --trace-every",
  gradient: "its gradient norm was the largest so far",
  clip: "its share of clipped tokens was the largest so far",
};

/** Draw the rewards of all groups: a column for each group, the best answer on top. */
function drawMap(step) {
  const most = Math.max(1e-9, ...step.questions.flatMap((one) => one.rewards));
  const places = step.groups.map((group) => group.place);
  const columns = step.questions.map(({ question, rewards }, i) => {
    const sorted = [...rewards].sort((a, b) => b - a);
    const cells = sorted.map((reward) =>
      make("b", { style: `background: rgba(var(--plus), ${(0.08 + (0.92 * Math.max(0, reward)) / most).toFixed(2)})` }),
    );
    const shown = places.includes(i) ? "shown" : "";
    const label = { role: "img", "aria-label": `group ${i + 1}` };
    const column = make("i", { class: shown, tabindex: 0, ...label }, ...cells);
    return explained(column, () => `${question}: rewards ${sorted.map(short).join(", ")}`);
  });
  const flat = step.questions.filter(({ rewards }) => Math.max(...rewards) === Math.min(...rewards)).length;
  byId("map").style.setProperty("--groups", columns.length);
  byId("map").replaceChildren(...columns);
  const text = `The rewards of ${columns.length} groups, ${flat} of them without differences`;
  byId("map").setAttribute("aria-label", text);
  const part = columns.length < data.settings.questions; // each process has a part of the questions
  byId("mapped").textContent = part ? `${text} (the groups of the first process)` : text;
}

function drawTerms(group, answer) {
  const rewards = group.answers.map((one) => one.reward);
  const rows = Object.entries(answer.terms).map(([name, value]) => {
    const weight = data.terms[name] ?? 1;
    return make("tr", {}, make("td", {}, name), make("td", {}, weight === 1 ? short(value) : `${weight} x ${short(value)}`));
  });
  const last = (name, value) => make("tr", { class: "sum" }, make("td", {}, name), make("td", {}, value));
  const average = mean(rewards);
  const std = Math.sqrt(mean(rewards.map((value) => (value - average) ** 2)));
  rows.push(last("reward", short(answer.reward)));
  let formula = "advantage";
  if (data.settings.advantage === "std" && std > 0)
    formula = `advantage = (${short(answer.reward)} - ${average.toFixed(2)}) / ${std.toFixed(2)}`;
  rows.push(last(formula, signed(answer.advantage)));
  return make("table", { class: "terms" }, ...rows);
}

function drawAnswer(group, answer, i) {
  const widest = Math.max(1e-9, ...group.answers.map((one) => Math.abs(one.advantage)));
  const width = (50 * Math.abs(answer.advantage)) / widest;
  const start = answer.advantage > 0 ? 50 : 50 - width;
  const sign = answer.advantage > 0 ? "plus" : "minus";
  const style = `left: ${start}%; width: ${width}%; background: rgb(var(--${sign}))`;
  const numbers = make(
    "div",
    {},
    make("div", {}, make("b", {}, `reward ${short(answer.reward)}`), ` IoU ${short(answer.iou)}`),
    make("div", {}, `advantage ${signed(answer.advantage)}`),
    make("div", { class: "bar" }, make("i", { style })),
  );
  const text = make("div", {}, tokens(answer));
  if (answer.why) text.append(make("p", { class: "muted" }, `error in the format: ${answer.why}`));
  if (answer.truncated) text.append(make("p", { class: "muted" }, "cut off at --max-new-tokens"));
  const choose = () => go({ answer: i });
  const label = `answer ${i + 1}, reward ${short(answer.reward)}, advantage ${signed(answer.advantage)}`;
  const attributes = { tabindex: 0, "data-answer": i, click: choose, blur: hideTip };
  Object.assign(attributes, { role: "group", "aria-label": label, "aria-describedby": "tip" });
  attributes.keydown = (event) => {
    if (["Enter", " "].includes(event.key)) choose();
    else if (["ArrowLeft", "ArrowRight"].includes(event.key)) pointAtToken(event.currentTarget, event.key === "ArrowRight" ? 1 : -1);
    else return;
    event.preventDefault();
  };
  return make("div", attributes, picture(group, answer), text, numbers);
}

/** Show the chosen answer. No token is drawn again, so a tapped token keeps its numbers. */
function drawChosen() {
  const group = nearest(view.step).groups[view.question];
  const chosen = group.answers[view.answer];
  const name = make("b", {}, `Answer ${view.answer + 1} of ${group.answers.length}`);
  const title = make("p", {}, name, `, ${chosen.tokens.length} tokens`);
  const parts = [picture(group, chosen), keyOfPicture(), title, drawTerms(group, chosen)];
  byId("picture").replaceChildren(...parts);
  for (const node of byId("answers").children)
    node.setAttribute("aria-current", Number(node.dataset.answer) === view.answer);
}

/** Show the numbers of the next or the last token of an answer. */
function pointAtToken(answer, move) {
  const spans = [...answer.querySelectorAll(".tokens span")];
  const now = spans.findIndex((span) => span.classList.contains("pointed"));
  const next = spans[Math.max(0, Math.min(spans.length - 1, now + move))];
  if (now >= 0) spans[now].classList.remove("pointed");
  next.classList.add("pointed");
  next.dispatchEvent(new PointerEvent("pointerenter"));
}

function drawInside() {
  hideTip();
  if (!steps.length) {
    byId("inside").hidden = true;
    return;
  }
  const step = nearest(view.step);
  view.question = Math.min(view.question, step.groups.length - 1);
  const group = step.groups[view.question];
  view.answer = Math.min(view.answer, group.answers.length - 1);
  byId("opened").textContent = step.step;
  const other = step.step === view.step ? "" : `Step ${view.step} was not logged. The nearest logged step is ${step.step}. `;
  byId("why").textContent = `${other}Step ${step.step} is here because ${step.reasons.map((why) => REASONS[why]).join(", and ")}.`;
  const buttons = step.groups.map((one, i) =>
    make(
      "button",
      { type: "button", "aria-pressed": String(i === view.question), click: () => go({ question: i, answer: 0 }) },
      make("small", {}, [one.why, one.kind, `update ${one.update} of ${data.settings.updates}`].filter(Boolean).join(", ")),
      make("span", { dir: "auto" }, one.question),
    ),
  );
  byId("questions").replaceChildren(...buttons);
  drawMap(step);
  const choices = Object.keys(COLOURS).map((name) =>
    make("button", { type: "button", "aria-pressed": String(name === view.colour), click: () => go({ colour: name }) }, name),
  );
  byId("colours").replaceChildren(...choices);
  byId("scale").textContent = `${COLOURS[view.colour][0]} Point at a token for its numbers, or choose an answer and press the arrow keys.`;
  const order = group.answers.map((_, i) => i).sort((a, b) => group.answers[b].reward - group.answers[a].reward);
  byId("answers").replaceChildren(...order.map((i) => drawAnswer(group, group.answers[i], i)));
  drawChosen();
}

// -------------------------------------------------------------------- held-out questions

const ORDERS = {
  change: ["largest gain first", (one) => one.before.iou - one.after.iou],
  loss: ["largest loss first", (one) => one.after.iou - one.before.iou],
  best: ["best answer first", (one) => -one.after.iou],
  worst: ["worst answer first", (one) => one.after.iou],
};

const changed = (one) => `IoU ${one.before.iou.toFixed(2)} → ${one.after.iou.toFixed(2)}`;

function openPair(one) {
  const half = (name, answer) =>
    make("div", {}, make("p", {}, make("b", {}, name), ` IoU ${answer.iou.toFixed(2)}`), picture(one, answer), make("p", { class: "tokens" }, answer.text));
  const close = make("button", { type: "button", click: () => byId("pair").close() }, "Close");
  byId("pair").replaceChildren(
    close,
    make("p", {}, make("b", { dir: "auto" }, one.question), one.kind && ` (${one.kind})`),
    make("div", { class: "two" }, half("before training", one.before), half("after training", one.after)),
    keyOfPicture(),
  );
  byId("pair").showModal();
}

function drawTest() {
  if (!test.length) {
    byId("test").hidden = true;
    return;
  }
  const chosen = test.filter((one) => missing(view.kind) || one.kind === view.kind);
  chosen.sort((a, b) => ORDERS[view.order][1](a) - ORDERS[view.order][1](b));
  const cards = chosen.slice(0, view.shown).map((one) =>
    make(
      "button",
      { type: "button", click: () => openPair(one) },
      picture(one, one.after),
      make("p", { dir: "auto" }, one.question),
      make("p", { class: "muted" }, changed(one)),
    ),
  );
  byId("cards").replaceChildren(...cards);
  const scores = data.test.scores.filter(([kind]) => missing(view.kind) || kind === view.kind);
  const before = mean(scores.map(([, iou]) => iou));
  const after = mean(scores.map(([, , iou]) => iou));
  let text = `${scores.length} questions, lenient gIoU ${before.toFixed(2)} → ${after.toFixed(2)}`;
  if (chosen.length < scores.length) text += `; pictures of the ${chosen.length} whose IoU changed most`;
  byId("count").textContent = text;
  byId("more").hidden = chosen.length <= view.shown;
}

function fillMenus() {
  const kinds = [null, ...new Set(test.map((one) => one.kind))]; // null: all
  const names = kinds.map((kind) => (kind === null ? "all kinds" : kind || "no kind"));
  byId("kind").append(...names.map((name) => make("option", {}, name)));
  byId("order").append(...Object.entries(ORDERS).map(([name, [text]]) => make("option", { value: name }, text)));
  const kind = () => kinds[byId("kind").selectedIndex];
  byId("kind").addEventListener("change", () => go({ kind: kind(), shown: 24 }));
  byId("order").addEventListener("change", () => go({ order: byId("order").value, shown: 24 }));
  byId("more").addEventListener("click", () => go({ shown: view.shown + 48 }));
}

// ---------------------------------------------------------------------------- the page

function drawHeader() {
  byId("name").textContent = data.name;
  const s = data.settings;
  byId("settings").textContent =
    `policy ${s.policy}, SAM ${s.sam}, data ${s.data}, test data ${s.eval_data || s.data}, seed ${s.seed}. ${LAST} steps of ${s.questions} questions x ${s.group} answers. ` +
    `Learning rate ${s.lr}, beta ${s.beta}, clip ${(1 - s.eps_low).toFixed(2)} to ${(1 + s.eps_high).toFixed(2)}, accuracy ${s.accuracy}.`;
  const few = Math.max(1, Math.min(20, Math.floor(log.reward.length / 2)));
  const totals = {};
  totals[`reward, first and last ${few} steps`] = [mean(log.reward.slice(0, few)), mean(log.reward.slice(-few))];
  if (summary) {
    const { base = {}, trained = {} } = summary;
    totals["gIoU, held-out"] = [base.gIoU, trained.gIoU];
    totals["boxes with IoU above 0.5"] = [base.box_accuracy, trained.box_accuracy];
    totals["answers in the format"] = [base.format, trained.format];
  }
  for (const [name, [before, after]] of Object.entries(totals)) {
    if (!Number.isFinite(before) || !Number.isFinite(after)) continue; // a summary of older code
    const value = make("dd", {}, `${before.toFixed(2)} → `, make("b", {}, after.toFixed(2)));
    byId("totals").append(make("div", {}, make("dt", {}, name), value));
  }
}

function prepareSteps() {
  Object.assign(byId("slider"), { min: FIRST, max: LAST, step: 1 });
  byId("slider").addEventListener("input", () => go({ step: Number(byId("slider").value) }));
  for (const one of steps) {
    const record = one.reasons.includes("interval") ? "" : "record";
    byId("marks").append(make("i", { class: record, style: `left: ${left(one.step)}%` }));
  }
  const logged = steps.map((one) => one.step);
  const before = () => Math.max(...logged.filter((step) => step < view.step));
  const after = () => Math.min(...logged.filter((step) => step > view.step));
  const jump = (step) => Number.isFinite(step) && go({ step });
  byId("back").addEventListener("click", () => jump(before()));
  byId("forward").addEventListener("click", () => jump(after()));
  for (const id of ["back", "forward"]) byId(id).hidden = !logged.length;
}

function drawStep() {
  const i = NUMBERS.indexOf(view.step);
  byId("slider").value = view.step;
  byId("number").textContent = `Step ${view.step}`;
  byId("last").textContent = `of ${LAST}`;
  byId("now").replaceChildren("reward", make("b", {}, short(log.reward[i])), " ", "IoU", make("b", {}, short(log.iou[i])));
  charts.forEach((move) => move(view.step));
}

/** Change the view and draw what depends on it. The address keeps the view. */
function go(change) {
  Object.assign(view, change);
  const focused = focusPlace();
  if (change.step !== undefined) drawStep();
  if (["step", "question", "colour"].some((name) => name in change)) drawInside();
  else if ("answer" in change) drawChosen();
  if (["kind", "order", "shown"].some((name) => name in change)) drawTest();
  if (focused) focused();
  const { step, question, answer, colour } = view;
  try {
    history.replaceState(null, "", `#${new URLSearchParams({ step, question, answer, colour })}`);
  } catch {
    // browsers limit the number of calls while a slider moves
  }
}

/** Return a function that gives the focus back after the focused element was drawn again. */
function focusPlace() {
  for (const id of ["questions", "colours", "answers"]) {
    const place = [...byId(id).children].indexOf(document.activeElement);
    if (place >= 0) return () => byId(id).children[place].focus();
  }
  return null;
}

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const found = {};
  for (const name of ["step", "question", "answer"])
    if (/^\d+$/.test(given.get(name) || "")) found[name] = Number(given.get(name));
  if (!NUMBERS.includes(found.step)) found.step = steps.length ? steps[steps.length - 1].step : LAST;
  if (Object.hasOwn(COLOURS, given.get("colour") || "")) found.colour = given.get("colour");
  return found;
}

const page = document.documentElement;
page.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
byId("theme").addEventListener("click", () => {
  page.dataset.theme = page.dataset.theme === "dark" ? "light" : "dark";
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
});
addEventListener("pointerdown", hideTip, true); // the click that follows shows the next tip
drawHeader();
drawCurves();
prepareSteps();
fillMenus();
drawTest();
go(readAddress());
