"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PIECES = 400, MOST = 200, AT_ONCE = 10;
  const NAMES = { gap: "gap", ratio: "ratio", weight: "gradient weight", logprob: "behaviour log-prob" };
  const LEGENDS = {
    gap: ["teacher minus student, nats", [["d4", "≤ −2"], ["d3", "−1"], ["d2", "−0.3"], ["d1", "−0.1"], ["u1", "0.1"], ["u2", "0.3"], ["u3", "1"], ["u4", "≥ 2"]]],
    ratio: ["student over behaviour", [["d4", "≤ 0.14"], ["d3", "0.37"], ["d2", "0.74"], ["d1", "0.9"], ["u1", "1.1"], ["u2", "1.35"], ["u3", "2.7"], ["u4", "≥ 7.4"]]],
    weight: ["share of the largest", [["d4", "≤ −0.8"], ["d2", "−0.2"], ["u1", "0.05"], ["u2", "0.2"], ["u3", "0.5"], ["u4", "≥ 0.8"]]],
    logprob: ["chance under the behaviour policy", [["d1", "< 90 %"], ["d2", "< 50 %"], ["d3", "< 10 %"], ["d4", "< 1 %"]]],
  };
  const STEPS = { gap: [0.1, 0.3, 1, 2], ratio: [0.1, 0.3, 1, 2], weight: [0.05, 0.2, 0.5, 0.8], logprob: [0.105, 0.693, 2.303, 4.605] };
  const $ = (id) => document.getElementById(id);
  const make = (tag, text, cls) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; if (cls) e.className = cls; return e; };
  const nats = (x) => x === null || x === undefined ? "–" : (x / data.scale).toFixed(2);
  let mode = data.by, here = null;

  // ---- values -------------------------------------------------------------------------------------------------
  const minus = (a, b) => a === null || b === null || a === undefined || b === undefined ? null : (a - b) / data.scale;
  const value = (b, i, by) => {
    if (by === "gap") return b.student ? minus(b.teacher[i], b.student[i]) : null;
    if (by === "ratio") return b.student ? minus(b.student[i], b.behaviour[i]) : null;
    if (by === "weight") return b.weight && b.weight[i] !== null ? b.weight[i] / data.scale : null;
    return b.behaviour[i] === null ? null : b.behaviour[i] / data.scale;
  };
  const shade = (v, by) => {
    if (v === null) return "";
    const size = Math.abs(v), level = STEPS[by].filter((s) => size >= s).length;
    return level ? (v < 0 ? "d" : "u") + level : "";
  };

  // ---- text ---------------------------------------------------------------------------------------------------
  const blocks = [];  // {div, branch, first, last (pieces), token (of first)}
  const filled = new Set();
  const place = (b) => { b.of = new Map(b.at.map((t, i) => [t, i])); b.start = new Int32Array(b.text.length + 1); for (let i = 0; i < b.text.length; i++) b.start[i + 1] = b.start[i] + (b.long[i] || 1); };
  const pieceAt = (b, token) => { let lo = 0, hi = b.text.length; while (lo + 1 < hi) { const mid = (lo + hi) >> 1; if (b.start[mid] <= token) lo = mid; else hi = mid; } return lo; };
  // A piece may be several tokens, as an emoji is; the one that weighs most stands for it.
  const scored = (b, piece) => {
    let best, most = -1;
    for (let t = b.start[piece]; t < b.start[piece + 1]; t++) { const i = b.of.get(t), size = i === undefined ? -1 : Math.abs(value(b, i, mode) ?? 0); if (size > most) [best, most] = [i, size]; }
    return best;
  };

  const fill = (block) => {
    if (filled.has(block)) return;
    filled.add(block);
    const parts = document.createDocumentFragment();
    let quiet = "";
    const flush = () => { if (quiet) parts.append(quiet); quiet = ""; };
    for (let p = block.first; p < block.last; p++) {
      const i = scored(block.branch, p), text = data.words[block.branch.text[p]];
      if (i === undefined) { quiet += text; continue; }
      flush();
      const span = make("span", text, "s");
      span.dataset.p = p;
      parts.append(span);
    }
    flush();
    block.div.replaceChildren(parts);
    paint(block);
  };
  const paint = (block) => { for (const span of block.div.children) { const i = span.dataset.i = scored(block.branch, +span.dataset.p); span.className = "s " + shade(value(block.branch, i, mode), mode) + (block.branch.kind[i] === 1 ? "" : " m"); } };
  const seen = new IntersectionObserver((entries) => { for (const e of entries) if (e.isIntersecting) fill(e.target.block); }, { rootMargin: "1200px" });

  const write = () => {
    const text = $("text"), outline = $("outline");
    for (const b of data.branches) {
      place(b);
      if (data.branches.length > 1) text.append(make("h3", "branch " + b.id + (b.fork ? ": " + b.fork : "")));
      for (const [writer, start, end, turn, versions] of b.segments) {
        const words = [writer, ...(turn === null ? [] : ["turn " + turn, "policy " + [...new Set(versions.map((v) => v[0]))].join(", ")]), (end - start) + " tokens"];
        const head = make("h2", words.join(" · "), writer === "agent" ? "agent" : "");
        head.id = "b" + b.id + "t" + start;
        text.append(head);
        if (turn !== null) {
          const link = make("a", "turn " + turn);
          link.href = "#" + head.id;
          link.append(make("b", mean(b, start, end)));
          link.range = [b, start, end];
          outline.append(link);
        }
        const last = pieceAt(b, end - 1) + 1;
        for (let first = pieceAt(b, start); first < last; first += PIECES) {
          const stop = Math.min(first + PIECES, last), div = make("div", undefined, writer === "agent" ? "block" : "block quiet");
          let plain = "";
          for (let p = first; p < stop; p++) plain += data.words[b.text[p]];
          div.textContent = plain;
          const block = { div, branch: b, first, last: stop };
          div.block = block;
          blocks.push(block);
          text.append(div);
          seen.observe(div);
        }
      }
    }
  };
  const mean = (b, start, end) => {
    let sum = 0, n = 0;
    for (let t = start; t < end; t++) { const i = b.of.get(t), v = i === undefined ? null : value(b, i, mode); if (v !== null) { sum += Math.abs(v); n += 1; } }
    return n ? (sum / n).toFixed(2) : "";
  };

  // ---- one token ----------------------------------------------------------------------------------------------
  const card = (b, i) => {
    const box = $("card"), list = make("dl"), token = b.at[i];
    const row = (name, text) => { list.append(make("dt", name), make("dd", text)); };
    row("token", JSON.stringify(data.words[b.text[pieceAt(b, token)]]) + "  (" + b.ids[i] + ")");
    row("place", "token " + token + (data.branches.length > 1 ? ", branch " + b.id : ""));
    const segment = b.segments.find((s) => s[1] <= token && token < s[2]);
    if (segment && segment[3] !== null) row("turn", segment[3] + ", policy " + (segment[4].filter((v) => v[1] <= token).pop() || ["unknown"])[0]);
    row("kind", { 1: "sampled, in the loss", 3: "forced", 4: "sampled, kept out", 5: "sampled, no log-prob" }[b.kind[i]] || String(b.kind[i]));
    row("behaviour", nats(b.behaviour[i]));
    if (b.student) {
      row("student", nats(b.student[i])); row("teacher", nats(b.teacher[i]));
      const gap = value(b, i, "gap"), ratio = value(b, i, "ratio"), weight = value(b, i, "weight");
      row("gap", gap === null ? "–" : (gap > 0 ? "+" : "") + gap.toFixed(2)); row("ratio", ratio === null ? "–" : Math.exp(ratio).toFixed(3)); row("weight", weight === null ? "–" : weight.toFixed(2));
    }
    box.replaceChildren(list);
    for (const [name, top] of [["student's likeliest", b.student_top], ["teacher's likeliest", b.teacher_top]]) {
      if (!top || !top[i].length) continue;
      const table = make("table"), head = make("tr");
      head.append(make("th", name), make("th", ""));
      table.append(head);
      for (let k = 0; k < top[i].length; k += 2) { const line = make("tr"); line.append(make("td", JSON.stringify(data.words[top[i][k]]).slice(1, -1)), make("td", (100 * Math.exp(top[i][k + 1] / data.scale)).toFixed(1) + " %")); table.append(line); }
      box.append(table);
    }
  };
  const point = (span) => { if (here) here.classList.remove("here"); here = span; span.classList.add("here"); card(span.parentElement.block.branch, +span.dataset.i); };

  // ---- the tokens that matter most ----------------------------------------------------------------------------
  let most = [], at = -1;
  const rank = () => {
    const all = [];
    data.branches.forEach((b, k) => b.at.forEach((token, i) => { const v = value(b, i, mode); if (v !== null && Math.abs(v) >= STEPS[mode][0]) all.push([Math.abs(v), k, token]); }));
    all.sort((x, y) => y[0] - x[0]);
    most = all.slice(0, MOST).sort((x, y) => x[1] - y[1] || x[2] - y[2]);
    at = -1;
  };
  const jump = (by) => {
    if (!most.length) return;
    at = at < 0 && by < 0 ? most.length - 1 : (at + by + most.length) % most.length;
    const [, k, token] = most[at], b = data.branches[k], piece = pieceAt(b, token);
    const block = blocks.find((one) => one.branch === b && one.first <= piece && piece < one.last);
    fill(block);
    const span = [...block.div.children].find((one) => +one.dataset.p === piece);
    if (!span) return;
    span.scrollIntoView({ block: "center" });
    point(span);
  };

  // ---- controls -----------------------------------------------------------------------------------------------
  const choose = (by) => {
    mode = by;
    for (const button of $("modes").children) button.setAttribute("aria-pressed", String(button.dataset.by === by));
    const [title, steps] = LEGENDS[by];
    $("legend").replaceChildren(make("span", title + ":"), ...steps.map(([cls, text]) => make("i", text, cls)));
    for (const block of filled) paint(block);
    if (here) here.classList.add("here");
    for (const link of $("outline").children) link.lastChild.textContent = mean(...link.range);
    rank();
  };
  const about = data.about;
  $("title").textContent = about.task;
  $("about").textContent = [about.env, "episode " + about.episode, about.stop, about.reward === null ? "unscored" : "reward " + about.reward.toPrecision(3), about.model, ...about.criteria.map(([id, score]) => id + " " + (score === null ? "?" : score)), about.note].filter(Boolean).join(" · ");
  if (data.hint) {
    $("hint").append(make("h3", "hint, read by the teacher alone (" + data.hint.source + ", by " + data.hint.author + ")"));
    if (data.hint.text) $("hint").append(make("div", data.hint.text, "hint"));
    for (const [turns, text] of data.hint.turns) $("hint").append(make("h3", turns), make("div", text, "hint"));
  } else $("hint").append(make("p", "No hint is read here.", "quiet"));
  for (const by of data.modes) { const button = make("button", NAMES[by]); button.dataset.by = by; button.addEventListener("click", () => choose(by)); $("modes").append(button); }
  new ResizeObserver(([one]) => document.documentElement.style.setProperty("--head", one.target.offsetHeight + "px")).observe(document.querySelector("header"));
  write();
  blocks.slice(0, AT_ONCE).forEach(fill);
  choose(mode);
  $("text").addEventListener("mouseover", (e) => { if (e.target.classList.contains("s")) point(e.target); });
  document.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    if (e.key === "n") jump(1); else if (e.key === "p") jump(-1);
    else if (data.modes[+e.key - 1]) choose(data.modes[+e.key - 1]);
    else return;
    e.preventDefault();
  });
  document.documentElement.dataset.ready = "yes";
})();
