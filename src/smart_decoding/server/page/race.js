// The race: one question, answered with SMART and then plainly, by two ordinary requests. Their pieces are kept with
// their times, and then both run side by side.
import {answer, button, by, make, say} from "./client.js";
import {showTrees} from "./trees.js";

const SAMPLES = ["Count from 1 to 20.", "List the months of the year.", "Write a Python function is_even(n) with a docstring."];
const MOST = 160;  // tokens of an answer
const NAMES = ["smart", "plain"];
const lanes = {smart: null, plain: null};  // {start, pieces: [[ms after the first, text, tokens so far, guesses so far]], ended, shown, trees}
const ask = by("ask"), go = ask.querySelector("button"), laneOf = name => by(`lane-${name}`);
let race = null, clock = 0, frame = 0, lastFrame = 0, held = false;

function rewind() {  // both from their first tokens on
  clock = 0;
  for (const name of NAMES) {
    if (lanes[name]) lanes[name].shown = 0;
    laneOf(name).querySelector("pre").replaceChildren();
  }
}
function drawLane(name) {
  const it = lanes[name], box = laneOf(name), pre = box.querySelector("pre");
  while (it.shown < it.pieces.length && it.pieces[it.shown][0] <= clock) {
    pre.append(make("span", it.pieces[it.shown++][1]));
    pre.scrollTop = pre.scrollHeight;
  }
  const last = it.pieces[it.shown - 1], first = it.pieces[0], over = it.ended && it.shown === it.pieces.length;
  const spent = last ? (over ? last[0] : clock) / 1000 : 0;
  const whole = Object.values(lanes).find(each => each.ended && each.pieces.length);
  box.querySelector("i").style.width = `${last ? 100 * Math.min(1, last[2] / (whole ? whole.pieces.at(-1)[2] : MOST)) : 0}%`;
  const speed = last && spent > 0 && last !== first ? (last[2] - first[2]) / spent : null;
  box.querySelector("b").firstChild.textContent = speed === null ? "–" : speed.toFixed(0);
  box.querySelector(":scope > small").textContent =
    last ? `${last[2]} tokens in ${it.shown} passes, ${spent.toFixed(2)} s${last[3]}` : "waiting for its turn …";
  return over;
}
function tick(now) {
  frame = 0;
  clock += Math.min(250, now - lastFrame);
  lastFrame = now;
  const over = NAMES.map(drawLane).every(Boolean);
  const latest = lanes.smart.trees.findLast(([at]) => at <= clock);
  if (latest) showTrees(latest[1]);
  if (!over) return roll();
  if (race.over) judge();
}
function roll() {
  if (frame || held) return;
  lastFrame = performance.now();
  frame = requestAnimationFrame(tick);
}
function judge() {
  const speed = it => (it.pieces.at(-1)[2] - it.pieces[0][2]) / it.pieces.at(-1)[0], text = it => it.pieces.map(p => p[1]).join("");
  const {smart, plain} = lanes, times = speed(smart) / speed(plain);
  const same = text(smart) === text(plain) ? "The two answers are the same, letter by letter."
    : "The answers differ: on this device two tokens may be equally likely to the last digit.";
  const name = laneOf("smart").querySelector("h3").textContent;
  conclude(Number.isFinite(times) && times > 0 ? `${name} was ${times.toFixed(1)} times as fast. ${same}`
    : `The answer is too short to time. ${same}`);
  by("replay").hidden = false;
}
function conclude(text) {
  by("verdict").textContent = text;
  say(text);
}
async function record(name, prompt, signal) {
  const it = lanes[name];
  const options = {max_tokens: MOST, temperature: 0, speculate: name === "smart",
    stream_options: {include_usage: true, continuous_usage_stats: true}};
  for await (const {text, thought, usage, reason} of answer([{role: "user", content: prompt}], options, signal)) {
    if (!text && !thought && !reason) continue;
    const now = performance.now();
    if (!it.pieces.length) {
      it.start = now;
      rewind();
      roll();
    }
    const {accepted_prediction_tokens: right, rejected_prediction_tokens: wrong} = usage.completion_tokens_details || {};
    const guesses = right + wrong ? `; ${right} of ${right + wrong} guesses right` : "";
    it.pieces.push([now - it.start, text || thought, usage.completion_tokens, guesses]);
  }
  if (!it.pieces.length) throw new Error("the answer is empty: ask something else");
  it.ended = true;
}
async function run(prompt) {
  const mine = race = {over: false, ended: false, control: new AbortController()};
  go.textContent = "Stop";
  by("lanes").hidden = false;
  by("replay").hidden = by("crowd").hidden = true;
  by("verdict").textContent = "";
  for (const name of NAMES) lanes[name] = {start: 0, pieces: [], ended: false, shown: 0, trees: []};
  rewind();
  NAMES.forEach(drawLane);
  try {
    for (const name of NAMES) await record(name, prompt, mine.control.signal);
    mine.over = true;
    roll();
  } catch (error) {
    conclude(error.name === "AbortError" ? "Stopped." : `No race: ${error.message}`);
    for (const name of NAMES) lanes[name].ended = true;
  }
  go.textContent = "Race";
  mine.ended = true;
}
const unpause = () => { if (held) by("pause").click(); };

// --- what the page tells ---

export function hold(paused) {
  held = paused;
  cancelAnimationFrame(frame);
  frame = 0;
  if (!held && lanes.smart) roll();
}
export const isShowing = () => frame > 0 && lanes.smart.ended;  // so that its trees are shown, and no newer ones
export function note(event) {
  laneOf("smart").querySelector("h3").textContent = event.policy === "smart" ? "SMART" : `Drafts, policy ${event.policy}`;
  by("no-drafts").hidden = event.drafts;
  if (!race || race.ended) return;
  const {start, ended, trees} = lanes.smart;
  if (start && !ended && event.trees.some(tree => tree.nodes.length)) trees.push([performance.now() - start, event]);
  if (event.running + event.waiting > 1) by("crowd").hidden = false;
}

// --- what a reader does ---

ask.addEventListener("submit", event => {
  event.preventDefault();
  const prompt = ask.querySelector("textarea").value.trim();
  if (race && !race.ended) return race.control.abort();
  unpause();
  if (prompt) run(prompt);
});
ask.querySelector("textarea").addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!race || race.ended) ask.requestSubmit();
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && race) race.control.abort();
});
by("replay").addEventListener("click", () => {
  by("replay").hidden = true;
  by("verdict").textContent = "";
  unpause();
  rewind();
  roll();
});
for (const sample of SAMPLES) by("samples").append(button(sample, "", () => { ask.querySelector("textarea").value = sample; }));
