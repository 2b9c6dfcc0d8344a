// The chat: the conversation that is open, and its requests, as any client would send them.
import {answer, button, by, copy, make, recall, remember, say} from "./client.js";
import {all, asked, begin, forget, keep, merge, read, STORE, title} from "./conversations.js";
import {show} from "./markdown.js";

const SETTINGS = "smart.settings", OPEN = "smart.open";
const EVERY = 50;  // milliseconds between drawings of an answer: the model may need these cores
const settings = load();
const box = by("question"), log = by("log");
let chat;
let control = null;  // of the answer that is coming
let stale = false;  // whether another tab wrote this conversation while an answer came
let lost = "";  // what a full storage did since the last question

function load() {  // temperature: "" is the model's own
  let kept = {};
  try { kept = JSON.parse(recall("localStorage", SETTINGS) || recall("localStorage", STORE)); } catch { /* nothing is kept */ }
  return {system: String(kept?.system ?? ""), temperature: String(kept?.temperature ?? "0")};
}
const save = () => remember("localStorage", SETTINGS, JSON.stringify(settings));
function store(written) {
  lost = keep(written) || lost;
  list();
}

// --- a turn ---

function ask(question) {
  const now = Date.now(), turn = {at: now, changed: now, question, answer: "", thought: "", note: ""};
  chat.turns.push(turn);
  lost = "";
  store(chat);
  send(turn);
}
async function send(turn, before) {  // before: the turn that this one replaces
  const mine = chat, update = draw(turn);
  control = new AbortController();
  busy(true);
  log.scrollTop = log.scrollHeight;
  try {
    await receive(mine, turn, update);
  } catch (error) {
    turn.note = error.name === "AbortError" ? "Stopped." : error.message;
  }
  control = null;
  busy(false);
  if (mine.turns.includes(turn)) end(mine, turn, before, update);  // else the conversation was deleted
}
function end(mine, turn, before, update) {
  const empty = !hasWords(turn), shown = mine === chat, {question, note} = turn;
  turn.changed = Date.now();
  if (empty && before) mine.turns[mine.turns.indexOf(turn)] = before;
  else if (empty && shown) {  // the question comes back, before a draft
    turn.question = "";
    box.value = [question, box.value].filter(Boolean).join("\n\n");
    fit();
  }
  store(mine);
  if (!shown) return;
  if (empty || stale) drawAll();
  else update(true);
  tell(empty ? note || "The model had nothing to say." : lost);
  say(empty ? by("told").textContent : `The answer is complete. ${note} ${lost}`);
}
async function receive(mine, turn, update) {
  for (;;) {
    const seen = asked(mine).filter(({at}) => at >= mine.from);
    try {
      for await (const piece of answer(messages(seen), options(), control.signal)) {
        turn.thought += piece.thought;
        turn.answer += piece.text;
        if (piece.reason) turn.note = noteOf(piece);
        update();
      }
      return;
    } catch (error) {
      if (error.code !== "context_length_exceeded" || seen.length < 2) throw error;
      mine.from = seen[1].at;  // the model's memory is full: leave out the oldest turn
      mark();
    }
  }
}
const hasWords = ({answer, thought}) => answer || thought;
function messages(turns) {  // up to the last question
  const said = turns.flatMap(({question, answer}) => [{role: "user", content: question}, {role: "assistant", content: split(answer).said}]);
  return [...(settings.system.trim() ? [{role: "system", content: settings.system}] : []), ...said.slice(0, -1)];
}
function options() {
  const temperature = parseFloat(settings.temperature);
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

function draw(turn) {
  const mine = make("article", undefined, "mine"), given = make("article", undefined, "given");
  mine.setAttribute("aria-label", "You");
  given.setAttribute("aria-label", "Answer");
  mine.append(make("p", turn.question));
  log.append(mine, given);
  by("welcome").hidden = true;
  return drawAnswer(given, turn);
}
function drawAnswer(given, turn) {  // returns what draws its next words
  const thought = make("details"), text = make("div", undefined, "text"), foot = make("footer"), note = make("small");
  thought.append(make("summary", "Thoughts"), make("p"));
  foot.append(note, button("Copy", "Copy the answer", event => copy(split(turn.answer).said, event.target)),
    button("Try again", "", again));
  given.append(thought, text, foot);
  let timer = 0;
  const now = () => {
    timer = 0;
    const {scrollTop, scrollHeight, clientHeight} = log, atEnd = scrollHeight - scrollTop - clientHeight < 40;
    const parts = split(turn.answer), thinking = turn.thought || parts.thought;
    thought.hidden = !thinking;
    thought.lastChild.textContent = thinking;
    show(text, parts.said);
    note.textContent = turn.note;
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
function drawAll() {
  log.querySelectorAll("article").forEach(each => each.remove());
  by("welcome").hidden = false;
  asked(chat).forEach(draw);
  mark();
  log.scrollTop = log.scrollHeight;
  stale = false;
}
function mark() {  // where the model's memory begins
  const first = asked(chat).findIndex(({at}) => at >= chat.from);
  by("beyond").hidden = first < 1;
  if (first > 0) log.querySelectorAll("article")[2 * first]?.before(by("beyond"));
}
function list() {
  const active = document.activeElement, before = active.closest("#list li");
  by("list").replaceChildren(...all().map(listed));
  if (!before) return;  // else the focus stays
  const item = by(before.id) || by("list").firstChild;
  (item?.children[before.lastChild === active ? 1 : 0] || by("new")).focus();
}
function listed(each) {
  const item = make("li"), name = title(each), opens = button(name, "", () => {
    by("chats").hidePopover();  // where it is a drawer
    open(each.id === chat.id ? chat : read(each.id));
    say(`Opened: ${name}`);
  });
  item.id = each.id;
  if (each.id === chat.id) opens.setAttribute("aria-current", "true");
  item.append(opens, button("×", `Delete “${name}”`, () => discard(each.id, name)));
  return item;
}
function busy(answering) {
  by("chat").classList.toggle("busy", answering);
  by("send").textContent = answering ? "Stop" : "Send";
  tell(lost);
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
  const before = asked(chat).at(-1), turn = {...before, answer: "", thought: "", note: ""};
  chat.turns[chat.turns.indexOf(before)] = turn;  // the storage keeps the old answer until this one has words
  [...log.querySelectorAll("article")].slice(-2).forEach(each => each.remove());
  send(turn, before);
}
function open(next) {
  if (next === chat) return;
  stop();
  chat = next;
  lost = "";
  remember("sessionStorage", OPEN, chat.id);
  drawAll();
  list();
  tell("");
}
function discard(id, name) {
  if (!confirm(`Delete “${name}”?`)) return;
  forget(id);
  if (id === chat.id) {
    chat.turns = [];
    open(begin());
  } else list();
  say(`Deleted: ${name}`);
}
by("compose").addEventListener("submit", event => {
  event.preventDefault();
  if (control) return stop();
  const question = box.value.trim();
  if (!question) return;
  box.value = "";
  fit();
  ask(question);
});
box.addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!control) by("compose").requestSubmit();
});
box.addEventListener("input", fit);
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && !by("chats").matches(":popover-open")) stop();
});
by("new").addEventListener("click", () => {
  open(begin());
  say("A new chat");
  box.focus();
});
for (const name of ["system", "temperature"]) {
  by(name).value = settings[name];
  by(name).addEventListener("input", () => {
    settings[name] = by(name).value;
    save();
  });
}
save();  // older pages kept them with the conversation
addEventListener("storage", ({key}) => {  // another tab wrote
  if (key && !key.startsWith(STORE)) return;
  if (key === chat.id && control) stale = true;
  else if (key === chat.id) {
    merge(chat);
    drawAll();
  }
  list();
});
addEventListener("pagehide", () => {
  const turn = control && asked(chat).at(-1);
  if (!turn || !hasWords(turn)) return;
  turn.changed = Date.now();
  keep(chat);
});
const opened = recall("sessionStorage", OPEN);
open(opened ? read(opened) : begin());
