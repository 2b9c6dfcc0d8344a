// Markdown as models write it, drawn as elements: paragraphs, headings, lists, quotes, code, tables, emphasis, links.
// Text only ever becomes text nodes, so HTML in an answer is shown and not run. Nothing is loaded: a picture is a link.
// All patterns are linear in the length of a line, and nesting is bounded: an answer may be hostile.
import {button, copy, make} from "./client.js";

const DEEPEST = 8;  // lists and quotes within each other
const MOST_OPEN = 16;  // emphases within each other
const LONGEST_LABEL = 300, LONGEST_LINK = 1000;  // characters
const FENCE = /^ {0,3}(`{3,}|~{3,}) *([^`]*)$/, HEADING = /^ {0,3}(#{1,6}) (.*)$/, RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/, ITEM = /^[ \t]*([-*+•]|\d{1,9}[.)])(?:[ \t]+|$)/;

// Bring `parent` up to date with `text`. Blocks whose source is as it was keep their elements: an answer that
// streams costs its last block, and a selection in what stands above stays.
export function show(parent, text) {
  const blocks = split(text.replace(/\r\n?/g, "\n").split("\n")), drawn = parent.blocks || [];
  const same = (one, other) => other !== undefined && one.source === other;
  let i = 0;
  while (i < blocks.length && same(blocks[i], drawn[i])) i++;
  while (parent.childNodes.length > i) parent.lastChild.remove();
  for (const block of blocks.slice(i)) parent.append(block.draw());
  parent.blocks = blocks.map(block => block.source);
}

// --- blocks: {source, draw} ---

function split(lines, depth = 0) {
  const blocks = [];
  for (let at = 0; at < lines.length;) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const [end, draw] = read(lines, at, depth);
    const own = lines.slice(at, end);
    blocks.push({source: own.join("\n"), draw: () => draw(own)});
    at = end;
  }
  return blocks;
}
function read(lines, at, depth) {  // where the block that begins here ends, and what draws its lines
  const line = lines[at], nested = depth < DEEPEST;
  const fence = FENCE.exec(line);
  if (fence) return [endOfCode(lines, at, fence[1]), own => code(own, fence)];
  if (RULE.test(line)) return [at + 1, () => make("hr")];
  if (HEADING.test(line)) return [at + 1, heading];
  if (nested && QUOTE.test(line)) return [endWhere(lines, at, each => !QUOTE.test(each)), own => quote(own, depth)];
  if (nested && ITEM.test(line)) return [endOfList(lines, at), own => list(own, depth)];
  if (isTable(lines, at)) return [endWhere(lines, at, each => !each.includes("|")), table];
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !begins(lines, end, nested)) end++;
  return [end, own => inline(make("p"), own.map(each => each.trim()).join("\n"))];
}
function begins(lines, at, nested) {  // whether a paragraph ends before this line
  const line = lines[at];
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || isTable(lines, at) ||
    (nested && (QUOTE.test(line) || ITEM.test(line)));
}
function endWhere(lines, at, over) {
  while (at < lines.length && !over(lines[at])) at++;
  return at;
}
function endOfCode(lines, at, fence) {
  return Math.min(lines.length, endWhere(lines, at + 1, line => closes(line, fence)) + 1);
}
const closes = (line, fence) => line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], "");
function heading([line]) {
  const [, marks, text] = HEADING.exec(line);
  return inline(make(`h${Math.min(6, marks.length + 2)}`), text.trim());  // h1 and h2 are the page's own
}
function quote(lines, depth) {
  return fill(make("blockquote"), lines.map(line => line.replace(QUOTE, "")), depth + 1);
}
function fill(parent, lines, depth) {
  for (const block of split(lines, depth)) parent.append(block.draw());
  return parent;
}
function code(lines, [opening, fence, language]) {
  const indent = opening.length - opening.trimStart().length;
  const closed = lines.length > 1 && closes(lines.at(-1), fence);
  const text = lines.slice(1, closed ? -1 : undefined).map(line => dedent(line, indent)).join("\n");
  const box = make("div", undefined, "code"), bar = box.appendChild(make("div", undefined, "bar"));
  bar.append(make("span", language.trim().split(/\s/)[0] || "text"), button("Copy", "Copy the code", event => copy(text, event.target)));
  box.appendChild(make("pre")).append(make("code", text));
  return box;
}

// --- lists ---

function indentOf(line) {
  let columns = 0;
  for (const letter of line) {
    if (letter === " ") columns++;
    else if (letter === "\t") columns += 4;
    else break;
  }
  return columns;
}
function dedent(line, columns) {
  let at = 0;
  for (let left = columns; left > 0 && (line[at] === " " || line[at] === "\t"); at++) left -= line[at] === "\t" ? 4 : 1;
  return line.slice(at);
}
const ordered = mark => mark.length > 1;
function endOfList(lines, at) {
  const indent = indentOf(lines[at]), kind = ordered(ITEM.exec(lines[at])[1]);
  let end = at + 1;
  for (let i = end; i < lines.length; i++) {
    const line = lines[i], blank = !line.trim();
    if (blank) continue;
    const inner = indentOf(line) > indent + 1, item = ITEM.exec(line);
    const goesOn = inner || (item ? ordered(item[1]) === kind && !RULE.test(line) : i === end && !begins(lines, i, true));
    if (!goesOn) break;
    end = i + 1;
  }
  return end;
}
function list(lines, depth) {
  const indent = indentOf(lines[0]), first = ITEM.exec(lines[0])[1], items = [];
  for (const line of lines) {
    const item = indentOf(line) > indent + 1 ? null : ITEM.exec(line);
    if (item) items.push({width: indentOf(line) + item[1].length + 1, lines: [line.slice(item[0].length)]});
    else items.at(-1).lines.push(dedent(line, items.at(-1).width));
  }
  const box = make(ordered(first) ? "ol" : "ul");
  if (ordered(first)) box.start = parseInt(first);
  for (const item of items) {
    const row = fill(box.appendChild(make("li")), item.lines, depth + 1), top = row.firstChild;
    if (top && top.tagName === "P") top.replaceWith(...top.childNodes);  // its text stands beside the mark
  }
  return box;
}

// --- tables ---

function cells(line) {
  const found = [""];
  for (let i = 0; i < line.length; i++) {
    if (line[i] === "\\" && line[i + 1] === "|") found[found.length - 1] += line[++i];
    else if (line[i] === "|") found.push("");
    else found[found.length - 1] += line[i];
  }
  const texts = found.map(cell => cell.trim());
  if (texts.length > 1 && !texts[0]) texts.shift();
  if (texts.length > 1 && !texts.at(-1)) texts.pop();
  return texts;
}
function isTable(lines, at) {
  const below = lines[at + 1] || "";
  return lines[at].includes("|") && below.includes("-") && below.includes("|") && cells(below).every(cell => /^:?-+:?$/.test(cell));
}
function table(lines) {
  const [head, rule, ...rows] = lines.map(cells), box = make("div", undefined, "table"), grid = box.appendChild(make("table"));
  const sides = rule.map(cell => cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "");
  const row = (parent, name, texts) => {
    const line = parent.appendChild(make("tr"));
    head.forEach((_, i) => inline(line.appendChild(make(name, undefined, sides[i])), texts[i] || ""));
  };
  row(grid.appendChild(make("thead")), "th", head);
  const body = grid.appendChild(make("tbody"));
  for (const texts of rows) row(body, "td", texts);
  return box;
}

// --- within a line: text, code, links, and emphasis by CommonMark's list of delimiters ---

function inline(parent, text, links = true) {
  const pieces = [];
  let from = 0, at = 0;
  const flush = () => {
    if (at > from) pieces.push(document.createTextNode(text.slice(from, at)));
  };
  const take = (node, length) => {
    flush();
    if (node) pieces.push(node);
    from = at += length;
  };
  while (at < text.length) {
    const letter = text[at];
    if (letter === "\\" && "\\`*_~#|<>".includes(text[at + 1] || " ")) {
      take(null, 1);
      at++;
    } else if (letter === "\n") take(make("br"), 1);
    else if (letter === "`") {
      const size = run(text, at), end = closing(text, at + size, size);
      if (end < 0) at += size;
      else take(make("code", unpadded(text.slice(at + size, end).replaceAll("\n", " "))), end + size - at);
    } else if ("*_~".includes(letter)) {
      const size = run(text, at);
      take(delimiter(text, at, size), size);
    } else {
      const [node, length] = (links && link(text, at)) || lineBreak(text, at) || [null, 0];
      if (node) take(node, length);
      else at++;
    }
  }
  flush();
  return assemble(parent, matched(pieces));
}
function run(text, at) {
  let end = at;
  while (text[end] === text[at]) end++;
  return end - at;
}
const unpadded = words => words.startsWith(" ") && words.endsWith(" ") && words.trim() ? words.slice(1, -1) : words;
function closing(text, at, size) {
  while ((at = text.indexOf("`", at)) >= 0) {
    const length = run(text, at);
    if (length === size) return at;
    at += length;
  }
  return -1;
}
function lineBreak(text, at) {
  const tag = text[at] === "<" && /^<br ?\/?>/i.exec(text.slice(at, at + 6));
  return tag ? [make("br"), tag[0].length] : null;
}

function link(text, at) {
  const letter = text[at];
  if (letter === "[" || (letter === "!" && text[at + 1] === "[")) return named(text, at, letter === "!" ? 2 : 1);
  if (letter === "<") {
    const bare = /^<([a-z]+:[^\s<>]*)>/i.exec(text.slice(at, at + LONGEST_LINK));
    return bare && anchor(bare[1], node => node.textContent = bare[1], bare[0].length);
  }
  if (letter !== "h" || /\w/.test(text[at - 1] || "")) return null;
  const bare = /^https?:\/\/[^\s<>"`|]+/.exec(text.slice(at, at + LONGEST_LINK));
  if (!bare) return null;
  let url = bare[0];
  while (/[.,:;!?'*_~\]]/.test(url.at(-1)) || (url.endsWith(")") && !url.includes("("))) url = url.slice(0, -1);
  return anchor(url, node => node.textContent = url, url.length);
}
function named(text, at, skip) {  // [label](address "title"), and ![label](address)
  const label = balanced(text, at + skip, LONGEST_LABEL, "[", "]");
  if (label < 0 || text[label + 1] !== "(") return null;
  const close = balanced(text, label + 2, LONGEST_LINK, "(", ")");
  if (close < 0) return null;
  const [address] = text.slice(label + 2, close).trim().split(/\s/), words = text.slice(at + skip, label);
  const draw = node => skip === 2 ? node.textContent = words || "picture" : inline(node, words, false);
  return anchor(address.replace(/^<(.*)>$/, "$1"), draw, close + 1 - at);
}
function balanced(text, at, longest, open, close) {
  const end = Math.min(text.length, at + longest);
  for (let depth = 1; at < end; at++) {
    if (text[at] === "\\") at++;
    else if (text[at] === open) depth++;
    else if (text[at] === close && !--depth) return at;
  }
  return -1;
}
function anchor(address, draw, length) {  // only where a browser would leave for elsewhere; else it stays text
  let url;
  try { url = new URL(address); } catch { return null; }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return null;
  const node = make("a");
  node.href = node.title = url.href;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  draw(node);
  return [node, length];
}

function delimiter(text, at, count) {
  const before = text[at - 1] || " ", after = text[at + count] || " ", mark = text[at];
  const space = /\s/, word = /[\p{L}\p{N}]/u, sign = /[\p{P}\p{S}]/u;
  let opens = !space.test(after) && (!sign.test(after) || space.test(before) || sign.test(before));
  let closes = !space.test(before) && (!sign.test(before) || space.test(after) || sign.test(after));
  if (mark === "_") [opens, closes] = [opens && !word.test(before), closes && !word.test(after)];
  return {mark, count, opens, closes, least: mark === "~" ? 2 : 1, begun: [], ended: []};
}
function matched(pieces) {  // let delimiters find each other
  const open = [];
  const none = {};  // by mark: below this place no opener has it, so that none is searched twice
  for (const piece of pieces) {
    if (!piece.mark) continue;
    while (piece.closes && piece.count >= piece.least) {
      let i = open.length - 1;
      while (i >= (none[piece.mark] || 0) && open[i].mark !== piece.mark) i--;
      if (i < (none[piece.mark] || 0)) {
        none[piece.mark] = open.length;
        break;
      }
      const size = open[i].count > 1 && piece.count > 1 ? 2 : 1;
      const name = piece.mark === "~" ? "del" : size === 2 ? "strong" : "em";
      open[i].begun.push(name);
      piece.ended.push(name);
      open[i].count -= size;
      piece.count -= size;
      open.length = open[i].count >= piece.least ? i + 1 : i;  // what stands between the two is text
      for (const mark in none) none[mark] = Math.min(none[mark], open.length);
    }
    if (piece.opens && piece.count >= piece.least) open.push(piece);
  }
  return pieces;
}
function assemble(parent, pieces) {
  const path = [parent];
  let hidden = 0;  // emphases deeper than can be shown
  for (const piece of pieces) {
    if (!piece.mark) {
      path.at(-1).append(piece);
      continue;
    }
    for (const _ of piece.ended) hidden ? hidden-- : path.pop();
    if (piece.count) path.at(-1).append(piece.mark.repeat(piece.count));
    for (const name of piece.begun.reverse()) {
      if (path.length > MOST_OPEN) hidden++;
      else path.push(path.at(-1).appendChild(make(name)));
    }
  }
  return parent;
}
