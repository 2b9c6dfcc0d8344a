// The pictures of trees: what was guessed in one round, and what of it was right.
import {by, make} from "./client.js";

const SVG = "http://www.w3.org/2000/svg";
export let newestAt = 0;  // when the trees shown were new, in milliseconds
let drawn = null;

export function draw(parent, name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return parent.appendChild(node);
}
const oneLine = text => text.replace(/\n/g, "⏎"), visible = text => oneLine(text).replace(/ /g, "␣") || "∅";
const pen = document.createElement("canvas").getContext("2d");
function labelWidth(text) {
  pen.font = getComputedStyle(document.documentElement).getPropertyValue("--label");
  return pen.measureText(text).width;
}
function cut(text, width) {  // by width, not by characters: some are twice as wide as others
  if (labelWidth(text) <= width) return text;
  const characters = [...text];
  while (characters.length && labelWidth(characters.join("") + "…") > width) characters.pop();
  return characters.join("") + "…";
}

export function drawTree(tree) {
  const box = make("div", undefined, "tree"), p = box.appendChild(make("p"));
  p.append(make("i", `answer ${tree.id}, ${tree.tokens} tokens:  …`), oneLine(tree.before),
    make("b", oneLine(tree.nodes.filter(node => node[3]).map(node => node[1]).join("") + tree.own), "smart"));
  if (!tree.nodes.length) {
    box.append(make("small", "no guesses in this pass: decoded plainly"));
    return box;
  }
  const children = new Map(), places = [];
  tree.nodes.forEach((node, i) => children.set(node[0], [...(children.get(node[0]) || []), i]));
  let row = 0, deepest = 0;
  const place = (i, depth) => {
    const below = (children.get(i) || []).sort((a, b) => tree.nodes[b][2] - tree.nodes[a][2]);
    const y = row;
    below.forEach(child => place(child, depth + 1));
    if (!below.length) row++;
    deepest = Math.max(deepest, depth);
    if (i >= 0) places[i] = [depth, y];
  };
  place(-1, 0);
  const W = 118, H = 26, width = W * deepest + 24, height = H * row + 4;
  const right = tree.nodes.filter(node => node[3]).length;
  const svg = draw(box, "svg", {width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${tree.nodes.length} guesses, ${right} of them right`});
  const centre = i => i < 0 ? [10, 14] : [W * (places[i][0] - 1) + 24, H * places[i][1] + 14];
  draw(svg, "circle", {cx: 8, cy: 14, r: 4, fill: "var(--smart)"});
  tree.nodes.forEach(([parent, text, prob, accepted], i) => {
    const [x, y] = centre(i), [px, py] = centre(parent), from = parent < 0 ? px + 2 : px + W - 20;
    const colour = accepted ? "var(--smart)" : "var(--line)";
    draw(svg, "path", {d: `M${from} ${py} C${from + 10} ${py} ${x - 10} ${y} ${x} ${y}`, fill: "none", stroke: colour,
      "stroke-width": accepted ? 2.5 : 1.5});
    draw(svg, "rect", {x, y: y - 11, width: W - 20, height: 22, rx: 5, fill: accepted ? "var(--hit)" : "var(--node)", stroke: colour,
      "stroke-width": accepted ? 2 : 1, class: accepted ? "accepted" : "rejected"});
    const chance = prob.toFixed(2).replace(/^0/, "");
    draw(svg, "text", {x: x + 6, y: y + 4}, cut(visible(text), W - 36 - labelWidth(chance)));
    draw(svg, "text", {x: x + W - 26, y: y + 4, "text-anchor": "end", opacity: .6}, chance);
  });
  return box;
}

export function showTrees(event) {
  if (event === drawn) return;
  const drafted = event.trees.some(tree => tree.nodes.length);
  if (drafted || (event.trees.length && !newestAt)) {  // rounds without drafts leave the last drafts as they are
    by("trees").replaceChildren(...event.trees.map(drawTree));
    newestAt = Date.now() - 1000 * event.trees_idle;
    drawn = event;
  }
}
