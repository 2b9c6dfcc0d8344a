// The conversations that this browser keeps. Each is an entry of its own in the storage, and tabs that
// write the same one add up its turns.
import {fresh, recall, remember} from "./client.js";

export const STORE = "smart.chat";  // the only entry of older pages; later ones have an id behind it

// id: the entry's name; from: the time of the first turn that the model still sees. A turn's times: `at` of its
// question, `changed` of its last words. A turn without a question was taken back.
export const begin = () => ({id: `${STORE}.${fresh()}`, turns: [], from: 0});
export const asked = ({turns}) => turns.filter(({question}) => question);
export const title = chat => [...asked(chat)[0].question.slice(0, 240).replace(/\s+/g, " ")].slice(0, 60).join("");

export function read(id) {
  try {
    const {turns, messages, from} = JSON.parse(recall("localStorage", id));
    return {id, turns: (turns || paired(messages)).map(checked), from: Number(from) || 0};
  } catch {  // nothing is kept, or nothing of ours
    return {id, turns: [], from: 0};
  }
}
function paired(messages) {  // of older pages
  const turn = i => ({...messages[i + 1], at: i, changed: i, question: messages[i].content, answer: messages[i + 1].content});
  return messages.flatMap((_, i) => i % 2 ? [] : [turn(i)]);
}
function checked({at, changed, question, answer, thought = "", note = ""}) {
  const texts = {question, answer, thought, note};
  if (Object.values(texts).some(text => typeof text !== "string")) throw new TypeError("not a turn");
  return {at: Number(at) || 0, changed: Number(changed) || 0, ...texts};
}
export function all() {  // the last used one first
  let names = [];
  try { names = Object.keys(localStorage); } catch { /* forbidden */ }
  const used = ({turns}) => Math.max(...turns.map(({changed}) => changed));
  return names.filter(name => name.startsWith(STORE)).map(read).filter(chat => asked(chat).length).sort((a, b) => used(b) - used(a));
}

export function merge(chat) {  // of each turn, what this tab or another one wrote last
  const stored = read(chat.id), turns = new Map();
  for (const turn of [...chat.turns, ...stored.turns])
    if (!(turns.get(turn.at)?.changed >= turn.changed)) turns.set(turn.at, turn);
  chat.turns = [...turns.values()].sort((a, b) => a.at - b.at);
  chat.from = Math.max(chat.from, stored.from);
}
export function keep(chat) {  // returns what the reader must be told
  merge(chat);
  if (!asked(chat).length) return forget(chat.id);
  const write = ({id, turns, from}) => remember("localStorage", id, JSON.stringify({turns, from}));
  const dropped = [];
  for (let others; !write(chat);) {
    others ??= all().filter(({id}) => id !== chat.id);
    if (!others.length) {
      dropped.forEach(write);  // this chat would not fit even without them
      return "This browser does not keep what is new here: its storage is full or forbidden.";
    }
    dropped.push(others.pop());
    forget(dropped.at(-1).id);
  }
  return dropped.length ? `The browser's storage was full, and ${dropped.length > 1 ? `the ${dropped.length} oldest chats` : "the oldest chat"} had to go.` : "";
}
export function forget(id) {
  try { localStorage.removeItem(id); } catch { /* forbidden */ }
  return "";
}
