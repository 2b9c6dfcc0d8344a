// The chat: a conversation kept in this browser, and its requests, as any client would send them.
import {answer, button, by, copy, make, recall, remember, say} from "./client.js";
import {show} from "./markdown.js";

const STORE = "smart.chat", EVERY = 50;  // milliseconds between drawings of an answer: the model may need these cores
// temperature: "" is the model's own; from: the first message that the model still sees.
const KEPT = {system: "", temperature: "0", messages: [], from: 0};
const state = load();
const box = by("question"), log = by("log");
let control = null;  // of the answer that is coming

function load() {
  try {
    const {system, temperature, messages, from} = {...KEPT, ...JSON.parse(recall("localStorage", STORE) || "{}")};
    const good = Array.isArray(messages) && messages.every(({role, content}) => typeof role === "string" && typeof content === "string");
    return good ? {system: String(system), temperature: String(temperature), messages, from: Number(from) || 0} : {...KEPT, messages: []};
  } catch {
    return {...KEPT, messages: []};
  }
}
const save = () => remember("localStorage", STORE, JSON.stringify(state));

// --- a turn ---

async function send(question, before = []) {  // before: the turn that this one replaces
  const asked = {role: "user", content: question}, given = {role: "assistant", content: "", thought: "", note: ""};
  control = new AbortController();
  state.messages.push(asked, given);
  save();
  const drawn = [draw(asked), draw(given)];
  busy(true);
  log.scrollTop = log.scrollHeight;
  try {
    await receive(given, drawn[1].update);
  } catch (error) {
    given.note = error.name === "AbortError" ? "Stopped." : error.message;
  }
  control = null;
  if (!state.messages.includes(given)) return busy(false);  // a new chat has begun
  const empty = !given.content && !given.thought;
  if (empty) {  // nothing came: the turn before comes back, or the question does, before a draft
    state.messages.splice(-2, 2, ...before);
    drawn.forEach(each => each.remove());
    before.forEach(draw);
    if (!before.length) box.value = [question, box.value].filter(Boolean).join("\n\n");
    fit();
  }
  drawn[1].update(true);
  busy(false);
  tell(empty ? given.note || "The model had nothing to say." : "");
  say(empty ? by("told").textContent : `The answer is complete. ${given.note}`);
  save();
}
async function receive(given, update) {
  for (;;) {
    try {
      for await (const piece of answer(conversation(), options(), control.signal)) {
        given.thought += piece.thought;
        given.content += piece.text;
        if (piece.reason) given.note = noteOf(piece);
        update();
      }
      return;
    } catch (error) {
      if (error.code !== "context_length_exceeded" || state.messages.length - state.from < 4) throw error;
      state.from += 2;  // the model's memory is full: leave out the oldest turn
      mark();
    }
  }
}
function conversation() {
  const turns = state.messages.slice(state.from, -1).map(({role, content}) => ({role, content: split(content).said}));
  return state.system.trim() ? [{role: "system", content: state.system}, ...turns] : turns;
}
function options() {
  const temperature = parseFloat(state.temperature);
  return Number.isFinite(temperature) ? {temperature} : {};
}
function noteOf({timings, reason}) {
  const ends = reason === "length" ? ["cut: no room for more tokens"] : [];
  if (!timings) return ends.join();
  const {predicted_n: tokens, predicted_per_second: speed, draft_n: guesses, draft_n_accepted: right} = timings;
  const counts = [`${tokens} tokens`, ...(speed ? [`${speed.toFixed(0)} tokens/s`] : [])];
  return [...counts, ...(guesses ? [`${right} of ${guesses} guesses right`] : []), ...ends].join(" · ");
}
function split(content) {  // many models think aloud, in text
  if (!content.startsWith("<think>")) return {thought: "", said: content};
  const [thought, ...said] = content.slice(7).split("</think>");
  return {thought: thought.trim(), said: said.join("</think>").trimStart()};
}

// --- what is shown ---

function draw(message) {
  const mine = message.role === "user", turn = make("article", undefined, mine ? "mine" : "given");
  turn.setAttribute("aria-label", mine ? "You" : "Answer");
  if (mine) turn.append(make("p", message.content));
  else turn.update = drawAnswer(turn, message);
  log.append(turn);
  by("welcome").hidden = true;
  return turn;
}
function drawAnswer(turn, message) {
  const thought = make("details"), text = make("div", undefined, "text"), foot = make("footer"), note = make("small");
  thought.append(make("summary", "Thoughts"), make("p"));
  foot.append(note, button("Copy", "Copy the answer", event => copy(split(message.content).said, event.target)),
    button("Try again", "", again));
  turn.append(thought, text, foot);
  let timer = 0;
  const now = () => {
    timer = 0;
    const {scrollTop, scrollHeight, clientHeight} = log, atEnd = scrollHeight - scrollTop - clientHeight < 40;
    const parts = split(message.content), thinking = message.thought || parts.thought;
    thought.hidden = !thinking;
    thought.lastChild.textContent = thinking;
    show(text, parts.said);
    note.textContent = message.note || "";
    if (atEnd) log.scrollTop = log.scrollHeight;  // follow, unless the reader has scrolled up
  };
  now();
  return last => {
    if (!last) timer ||= setTimeout(now, EVERY);
    else {
      clearTimeout(timer);
      now();
    }
  };
}
function mark() {  // where the model's memory begins
  const first = log.querySelectorAll("article")[state.from];
  by("beyond").hidden = !state.from || !first;
  if (first) first.before(by("beyond"));
}
function busy(answering) {
  by("chat").classList.toggle("busy", answering);
  by("send").textContent = answering ? "Stop" : "Send";
  tell("");
  if (answering) say("Answering");
}
function tell(text) {
  by("told").textContent = text;
  by("told").hidden = !text;
}
function fit() {  // as high as its text, within the limits of the style sheet
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

// --- what a reader does ---

function stop() {
  if (control) control.abort();
}
function again() {
  if (control) return;
  const before = state.messages.splice(-2);
  [...log.querySelectorAll("article")].slice(-2).forEach(turn => turn.remove());
  send(before[0].content, before);
}
by("compose").addEventListener("submit", event => {
  event.preventDefault();
  if (control) return stop();
  const question = box.value.trim();
  if (!question) return;
  box.value = "";
  fit();
  send(question);
});
box.addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!control) by("compose").requestSubmit();
});
box.addEventListener("input", fit);
document.addEventListener("keydown", event => {
  if (event.key === "Escape") stop();
});
by("new").addEventListener("click", () => {
  stop();
  state.messages = [];
  state.from = 0;
  save();
  log.querySelectorAll("article").forEach(turn => turn.remove());
  by("welcome").hidden = false;
  by("beyond").hidden = true;
  tell("");
  say("A new chat");
  box.focus();
});
for (const name of ["system", "temperature"]) {
  by(name).value = state[name];
  by(name).addEventListener("input", () => {
    state[name] = by(name).value;
    save();
  });
}
addEventListener("pagehide", () => { if (control) save(); });  // else it is saved, perhaps by a later tab
state.messages.forEach(draw);
mark();
log.scrollTop = log.scrollHeight;
