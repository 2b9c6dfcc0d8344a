// What all parts of the page share: requests to the server, and small help with the page itself.
export const by = id => document.getElementById(id);
export const server = {};  // the last event of /events

export function make(name, text, className) {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}
export function button(text, label, press) {
  const node = make("button", text);
  node.type = "button";
  if (label) node.setAttribute("aria-label", label);
  node.addEventListener("click", press);
  return node;
}

// --- the browser's storage, which a user may have forbidden ---

export function recall(area, name) {
  try { return window[area].getItem(name) || ""; } catch { return ""; }
}
export function remember(area, name, value) {  // returns whether the browser will
  try { window[area].setItem(name, value); } catch { return false; }
  return true;
}

// --- requests ---

const CONTINUED = 400;  // tokens of a plain text; OpenAI's default is 16
export const fresh = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), byte => byte.toString(16).padStart(2, "0")).join("");
// Without API keys, the trees of requests with this token are shown here, and nowhere else.
const viewer = recall("sessionStorage", "viewer") || fresh();
remember("sessionStorage", "viewer", viewer);
let key = recall("sessionStorage", "key"), known = () => {};

export const ownHeader = () => key ? "-H 'Authorization: Bearer KEY'" : `-H 'X-Viewer: ${viewer}'`;  // for curl
export const whenKeyIsKnown = () => new Promise(resolve => known = resolve);
by("key").addEventListener("submit", event => {
  event.preventDefault();
  key = by("key").querySelector("input").value.trim();
  remember("sessionStorage", "key", key);
  by("key").hidden = true;
  known();
});

export class ServerError extends Error {
  constructor(message, code) {
    super(message);
    this.code = code;
  }
}
async function request(path, options) {
  const headers = {...options.headers, "X-Viewer": viewer, ...(key ? {Authorization: `Bearer ${key}`} : {})};
  let response;
  try {
    response = await fetch(path, {...options, headers});
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError("The server cannot be reached.", "away");
  }
  if (response.ok) return response;
  if (response.status === 401) by("key").hidden = false;
  const {error} = await response.json().catch(() => ({}));
  throw new ServerError(error ? error.message : `The server answered with HTTP ${response.status}.`, response.status === 401 ? "key" : error?.code);
}
async function* eventsOf(response) {  // fetch rather than EventSource: it can send the key
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let rest = "";;) {
      const {value, done} = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) if (event.startsWith("data: ") && event !== "data: [DONE]") yield JSON.parse(event.slice(6));
    }
  } finally {
    reader.cancel().catch(() => {});  // who stops reading leaves
  }
}
export async function* liveEvents(signal) {
  yield* eventsOf(await request("events", {signal}));
}
// The stream of an answer: {text, thought, usage, timings, reason} a piece. `messages` are continued as
// plain text, the last one only, where the model has no chat template.
export async function* answer(messages, options, signal) {
  const chat = server.chat !== false;
  const body = {...(chat ? {messages} : {prompt: messages.at(-1).content, max_tokens: CONTINUED}), ...options, stream: true};
  const response = await request(chat ? "v1/chat/completions" : "v1/completions",
    {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body), signal});
  for await (const event of eventsOf(response)) {
    if (event.error) throw new ServerError(event.error.message, event.error.code);
    const choice = event.choices[0] || {}, delta = choice.delta || {};
    yield {text: (choice.delta ? delta.content : choice.text) || "", thought: delta.reasoning_content || "",
      usage: event.usage, timings: event.timings, reason: choice.finish_reason};
  }
}

// --- what a screen reader is told ---

export function say(text) {
  by("said").textContent = text;
}
export async function copy(text, pressed) {
  pressed.dataset.label ??= pressed.textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // there is no clipboard on an address that is neither https nor this machine
    const area = document.body.appendChild(make("textarea", text));
    area.select();
    document.execCommand("copy");
    area.remove();
    pressed.focus();
  }
  pressed.textContent = "Copied";
  say("Copied");
  setTimeout(() => pressed.textContent = pressed.dataset.label, 1500);
}
