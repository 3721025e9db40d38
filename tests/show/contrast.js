// Contrast of every visible text to the colours that lie behind it, WCAG 2.2. arguments[0]: selector.
const parse = (text) => { const n = (text.match(/[\d.]+/g) || []).map(Number); return n.length < 4 ? [...n, 1] : n; };
const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
const linear = (x) => (x / 255 <= 0.04045 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4);
const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
const ground = (element) => {
  const layers = [];
  for (let at = element; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
  return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255, 1]);
};
const found = {};
for (const e of document.querySelectorAll(arguments[0])) {
  const said = [...e.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join("");
  if (!said || !e.getClientRects().length) continue;
  const style = getComputedStyle(e), colour = parse(e.namespaceURI.endsWith("svg") ? style.fill : style.color);
  const [a, b] = [light(over(colour, ground(e))), light(ground(e))].sort((x, y) => y - x);
  const key = `${e.tagName}.${e.getAttribute("class") || ""} ${said.slice(0, 20)}`;
  found[key] = Math.min((a + 0.05) / (b + 0.05), found[key] ?? 99);
}
return found;
