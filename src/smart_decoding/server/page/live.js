// The live view: what the server and its controller do. Events are read only while somebody can see them.
import {by, liveEvents, ownHeader, recall, remember, server, whenKeyIsKnown} from "./client.js";
import * as race from "./race.js";
import {draw, newestAt, showTrees} from "./trees.js";

const SPAN = 60;  // seconds that the pictures show
const GAP = 1.5;  // seconds without an event that break a line
const past = [];  // {at: seconds, tps, plain, real, expected, drafting}, null where nothing ran
const trail = [];  // the last rounds' [rows, milliseconds]
let lastEvent = 0, control = null, paused = false, wake = () => {};

const number = (value, digits) => value === null || value === undefined ? "–" : value.toFixed(digits);
const set = (id, text) => { if (by(id).textContent !== text) by(id).textContent = text; };

// --- pictures over time ---

const ceiling = value => {  // the next round number, so that the axis keeps still
  const unit = 10 ** Math.floor(Math.log10(value));
  return unit * [1, 1.5, 2, 3, 4, 6, 8, 10].find(step => step * unit >= value);
};
const LEFT = 40, TOP = 8;
function axes(svg, bottom, low, high, marks) {  // returns the plot's right end; it begins at x = LEFT
  svg.replaceChildren();
  const right = svg.clientWidth - 4;
  for (const value of marks) {
    const y = bottom - (bottom - TOP) * (value - low) / (high - low);
    draw(svg, "line", {x1: LEFT, x2: right, y1: y, y2: y, stroke: "var(--line)"});
    draw(svg, "text", {x: LEFT - 6, y: y + 4, "text-anchor": "end"}, String(+value.toFixed(2)));
  }
  return right;
}
function ends(svg, right, y, first, last) {
  draw(svg, "text", {x: LEFT, y}, first);
  draw(svg, "text", {x: right, y, "text-anchor": "end"}, last);
}
const path = points => points.map(point => point.map(value => value.toFixed(1)).join()).join(" ");
function line(svg, points, colour, more = {}) {
  if (points.length > 1)
    draw(svg, "polyline", {points: path(points), fill: "none", stroke: colour, "stroke-width": 2, "stroke-linejoin": "round", ...more});
}
function stretches(field) {  // the times in which there is a value, without the gaps
  const found = [];
  let last = null;
  for (const each of past) {
    if (each[field] !== null) {
      if (!last || each.at - last.at > GAP) found.push([]);
      found.at(-1).push(each);
    }
    last = each[field] === null ? null : each;
  }
  return found;
}
function drawPast() {
  if (!by("speed").clientWidth) return;  // another view is open
  const now = past.at(-1).at, most = (...fields) => Math.max(1, ...past.flatMap(each => fields.map(field => each[field] || 0)));
  const plot = (id, height, low, high, fields) => {
    const svg = by(id), bottom = height - TOP, right = axes(svg, bottom, low, high, [low, (low + high) / 2, high]);
    const x = at => right - (right - LEFT) * (now - at) / SPAN, y = value => bottom - (bottom - TOP) * (value - low) / (high - low);
    const points = (stretch, field) => stretch.map(each => [x(each.at), y(Math.max(low, each[field]))]);
    if (id === "speed")
      for (const stretch of stretches("plain"))
        draw(svg, "polygon", {points: path([...points(stretch, "tps"), ...points(stretch, "plain").reverse()]), fill: "var(--gain)"});
    for (const [field, colour, more] of fields) for (const stretch of stretches(field)) line(svg, points(stretch, field), colour, more);
  };
  plot("speed", 120, 0, ceiling(most("tps", "plain")), [["plain", "var(--plain)"], ["tps", "var(--smart)"]]);
  plot("round", 100, 1, Math.max(2, ceiling(most("real", "expected"))),
    [["expected", "var(--soft)", {"stroke-dasharray": "5 4"}], ["real", "var(--smart)"]]);
  drawModes(now);
}
function drawModes(now) {  // a band: how many of the passes of that moment had guesses
  const svg = by("modes"), right = axes(svg, 26, 0, 1, []);
  const x = at => right - (right - LEFT) * (now - at) / SPAN;
  draw(svg, "rect", {x: LEFT, y: TOP, width: right - LEFT, height: 18, fill: "var(--node)"});
  svg.setAttribute("shape-rendering", "crispEdges");  // no seams between the moments
  for (const stretch of stretches("drafting")) stretch.slice(1).forEach((each, i) => {
    const left = x(stretch[i].at), width = x(each.at) - left + .5, height = 18 * each.drafting;
    draw(svg, "rect", {x: left, y: TOP, width, height: 18 - height, fill: "var(--plain)"});
    draw(svg, "rect", {x: left, y: TOP + 18 - height, width, height, fill: "var(--smart)", class: "drafting"});
  });
  ends(svg, right, 42, `${SPAN} s ago`, "now");
}
function words(e) {  // the pictures in a sentence
  if (!e.drafts) return "This server was started without speculation: every pass of the model gives one token.";
  if (e.idle === null) return "Nothing has run yet. Ask in the chat, and watch.";
  if (e.idle >= 1) return e.running ? "Only answers that ask for plain decoding run." : `Quiet for ${Math.round(e.idle)} s. The figures are those of the last passes.`;
  if (e.drafting === null) return "A prompt is being read.";
  const speed = e.speedup === null ? "" : ` That is ${e.speedup.toFixed(1)} times the speed of plain decoding, as estimated.`;
  const expected = e.expected === null ? "" : ` (${e.expected.toFixed(1)} expected)`;
  if (e.drafting < .1) return "SMART decodes plainly: guesses would cost more time now than they save.";
  const often = e.drafting > .9 ? "in every pass" : `in ${Math.round(100 * e.drafting)} % of the passes`;
  return `SMART guesses ahead ${often}: a pass gives an answer ${e.yield.toFixed(1)} tokens${expected}.${speed}`;
}

// --- what a pass costs ---

function drawCost(curve, point) {
  by("costs").hidden = !curve;
  if (!curve || !by("cost").clientWidth) return;
  const svg = by("cost"), bottom = 145;
  trail.push([point.rows, point.ms]);
  while (trail.length > 12) trail.shift();
  const top = ceiling(Math.max(...trail.map(each => each[1]), ...curve.ms)), low = curve.rows[0], high = curve.rows.at(-1);
  const right = axes(svg, bottom, 0, top, [0, top / 2, top]);
  ends(svg, right, 164, `${low} ${low === 1 ? "token" : "tokens"} at once`, `${high}`);
  const at = (rows, ms) => [LEFT + (right - LEFT) * (rows - low) / (high - low), bottom - (bottom - TOP) * ms / top];
  line(svg, curve.rows.map((rows, i) => at(rows, curve.ms[i])), "var(--soft)");
  const dot = (place, r, fill, more) => draw(svg, "circle", {cx: place[0], cy: place[1], r, fill, ...more});
  trail.forEach(([rows, ms], i) => { if (rows >= low && rows <= high) dot(at(rows, ms), 3, "var(--smart)", {opacity: .04 * i}); });
  dot(at(low, curve.ms[0]), 4, "var(--plain)");
  dot(at(point.rows, point.ms), 6, "var(--smart)", {id: "point"});
  set("cost-smart", `${point.rows} ${point.rows === 1 ? "token" : "tokens"} in ${point.ms.toFixed(1)} ms`);
  set("cost-plain", `${curve.ms[0].toFixed(1)} ms`);
}

const KINDS = {plain: "without guesses", ngrams: "with guesses from the text", model: "with the drafter's guesses"};

function predicted(ratios) {
  const known = Object.entries(KINDS).filter(([kind]) => kind in ratios);
  const parts = known.map(([kind, name]) => `${ratios[kind].toFixed(2)} ${name}`);
  return parts.length ? `Predicted over real time of a pass: ${parts.join(", ")}.` : "";
}

// --- events ---

function show(e) {
  lastEvent = Date.now();
  Object.assign(server, e);
  by("state").className = "live";
  set("state", e.ready ? "live" : "loading the model …");
  if (!e.ready) return;
  set("what", e.name === e.model ? e.name : `${e.name} · ${e.model}`);
  set("how", `${e.policy} · ${e.speculation}`);
  by("no-template").hidden = e.chat;
  race.note(e);
  const quiet = e.idle === null || e.idle >= 1;
  const value = each => quiet || each === undefined ? null : each;
  past.push({at: Date.now() / 1000, tps: value(e.tps), plain: value(e.plain_tps), real: value(e.yield),
    expected: value(e.expected), drafting: value(e.drafting)});
  while (past[0].at < past.at(-1).at - SPAN) past.shift();
  if (!visible()) return;
  set("words", words(e));
  set("tps", number(e.tps, 1));
  set("plain", number(e.plain_tps, 1));
  set("yield", number(e.yield, 2));
  set("expected", number(e.expected, 2));
  set("load", `${e.running} of at most ${e.slots} answers run${e.waiting ? `, ${e.waiting} wait` : ""}. ` +
    `They use ${(100 * e.kv).toFixed(0)} % of the memory for contexts.`);
  drawPast();
  drawCost(e.curve, e.point);
  set("predicted", predicted(e.predicted));
  if (!race.isShowing()) showTrees(e);
  hint(e);
}
function hint(e) {
  const seconds = Math.round((Date.now() - newestAt) / 1000);
  set("age", !newestAt || seconds < 2 ? "" : `${seconds} s ago`);
  by("hint").hidden = newestAt > 0;
  if (!by("curl").textContent) set("curl", `curl ${location.origin}/v1/completions -H 'Content-Type: application/json' ` +
    `${ownHeader()} -d '{"model": "${e.name}", "prompt": "Tides are", "max_tokens": 400}'`);
}
const visible = () => !paused && !document.hidden && document.body.dataset.view !== "chat";
const wanted = () => visible() || (!server.ready && !document.hidden);
async function watch() {
  control = new AbortController();
  for await (const event of liveEvents(control.signal)) {
    show(event);
    if (!wanted()) return;
  }
}
setInterval(() => { if (lastEvent && Date.now() - lastEvent > 5000 && control) control.abort(); }, 1000);  // a dead line
async function keepWatching() {
  for (let pause = 250;; pause = Math.min(2 * pause, 5000)) {
    while (!wanted()) {
      lastEvent = 0;
      set("state", paused ? "paused" : "ready");
      await new Promise(resolve => wake = resolve);
    }
    const started = Date.now();
    try {
      await watch();
      if (!wanted()) continue;
    } catch (error) {
      if (error.code === "key") {
        set("state", "this server wants an API key");
        await whenKeyIsKnown();
      } else set("state", error.code === "too_many_watchers" ? "too many pages watch" : "connection lost, trying again …");
      by("state").className = "lost";
    }
    if (lastEvent >= started) pause = 250;
    lastEvent = 0;
    await new Promise(resolve => setTimeout(resolve, pause));
  }
}

// --- what a reader does ---

by("pause").addEventListener("click", () => {
  paused = !paused;
  by("pause").textContent = paused ? "Go on" : "Pause";
  by("pause").setAttribute("aria-pressed", paused);
  race.hold(paused);
  wake();
});
document.addEventListener("visibilitychange", () => wake());
function look(view) {
  document.body.dataset.view = view;
  for (const each of by("views").querySelectorAll("button")) each.setAttribute("aria-pressed", each.dataset.view === view);
  remember("localStorage", "smart.view", view);
  wake();
}
by("views").addEventListener("click", event => { if (event.target.dataset.view) look(event.target.dataset.view); });
const views = [...by("views").children].map(each => each.dataset.view), last = recall("localStorage", "smart.view");
look(views.includes(last) ? last : matchMedia("(min-width: 64rem)").matches ? "live" : "chat");
keepWatching();
