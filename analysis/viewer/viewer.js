"use strict";
// The page's only script. `index` says what there is; a trace's numbers are unpacked when it is looked at. Whatever a
// model or a file said goes into the page as text (textContent), never as HTML.
(() => {
  const began = performance.now();
  const $ = (id) => document.getElementById(id);
  const index = JSON.parse($("index").textContent);
  const blobs = JSON.parse($("blobs").textContent);
  const { labels, items, traces } = index;
  const text = new Map(); // of each token id
  const ROW = 50; // pixels, as in the style
  const ENTROPY_STEPS = 2047, MOST_NATS = 16, PROB_STEPS = 1023, NOT_IN_LIST = 255; // as they were encoded
  const ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%()*+-;=?@^_{|}~,./:";
  const MODES = ["entropy", "change", "surprise"];

  const state = {
    shown: items.map((_, at) => at), // indices of items that pass the filters, in order
    at: 0, // place in `shown`
    view: null, // what is drawn: {item, columns}
    column: 0, token: -1, // the token that was chosen
    mode: "entropy", delta: 0.5, query: "",
    turn: 0, // counts selections, so that a slow one does not overwrite a later one
  };

  // -- small helpers ------------------------------------------------------------------------------------------------

  // Characters that change how their neighbours are drawn, or draw nothing: text directions (U+202E turns what follows
  // around), zero-width ones, control codes. A token that holds one shows its number, so that nothing hides in it.
  const HIDDEN = /[\u0000-\u0008\u000B\u000C\u000E-\u001F\u007F-\u009F\u00AD\u061C\u180E\u200B-\u200F\u2028-\u202E\u2060-\u206F\uFEFF\uFFF9-\uFFFB]/g;
  const plain = (value) => String(value).replace(
    HIDDEN, (c) => `[U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}]`,
  );

  /** An element with properties (`text`, `class`, or attributes) and children. */
  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (value === undefined || value === null || value === false) continue;
      if (name === "text") element.textContent = plain(value);
      else if (name === "class") element.className = value;
      else element.setAttribute(name, value === true ? "" : plain(value));
    }
    element.append(...children.filter((child) => child !== null).map((child) => (typeof child === "string" ? plain(child) : child)));
    return element;
  }

  /** A token's text with its white space made visible. */
  function visible(id) {
    return (text.get(id) ?? `<${id}>`)
      .replaceAll(" ", "\u2423").replaceAll("\n", "\u23CE").replaceAll("\t", "\u21E5").replaceAll("\r", "\u240D") || "\u2205";
  }

  const number = (value) => value.toLocaleString("en-US");
  const nats = (value) => (value < 0.0005 ? "0" : value.toFixed(value < 0.1 ? 3 : 2)) + " nats";
  const signed = (value) => (Math.abs(value) < 0.005 ? "\u00B10" : (value > 0 ? "+" : "\u2212") + Math.abs(value).toFixed(2));
  function percent(p) {
    if (p >= 0.99995) return "100%";
    if (p >= 0.995) return (100 * p).toFixed(2) + "%";
    if (p >= 0.095) return (100 * p).toFixed(p < 0.905 ? 0 : 1) + "%";
    if (p >= 0.0095) return (100 * p).toFixed(1) + "%";
    if (p >= 0.0001) return (100 * p).toFixed(2) + "%";
    return p > 0 ? "<0.01%" : "0%";
  }

  function step(value, edges) {
    let at = 0;
    while (at < edges.length && value >= edges[at]) at++;
    return at;
  }
  const entropyClass = (value) => "h" + step(value, index.entropyEdges);
  function changeClass(value) {
    const at = step(Math.abs(value), index.changeEdges);
    return "d" + (value < 0 && at ? -at : at);
  }

  const verdict = (c) => (c === null ? ["\u2013", "open", "not graded"] : c ? ["\u2713", "right", "right"] : ["\u2717", "wrong", "wrong"]);
  const say = (line) => { $("say").textContent = line; };
  function trouble(line) {
    $("trouble").textContent = line;
    $("trouble").hidden = false;
  }
  /** localStorage, which a browser may forbid to a file. */
  function remember(key, value) {
    try {
      if (value === undefined) return localStorage.getItem(key);
      localStorage.setItem(key, value);
    } catch { /* then nothing is remembered */ }
    return null;
  }

  // -- unpacking ----------------------------------------------------------------------------------------------------

  const digits = new Uint8Array(128).fill(255);
  [...ALPHABET].forEach((letter, value) => { digits[letter.charCodeAt(0)] = value; });

  /** Five letters for four bytes; of a last group with fewer letters, one byte fewer than letters. */
  function bytesOf(letters) {
    const bytes = new Uint8Array(Math.floor((4 * letters.length) / 5));
    for (let from = 0, to = 0; from < letters.length; from += 5, to += 4) {
      let value = 0;
      for (let at = from; at < from + 5; at++) {
        const digit = at < letters.length ? digits[letters.charCodeAt(at)] : 84;
        if (!(digit < 85)) throw new Error("an unknown letter");
        value = value * 85 + digit;
      }
      for (let at = 0; at < 4 && to + at < bytes.length; at++) bytes[to + at] = value / 2 ** (24 - 8 * at);
    }
    return bytes;
  }

  async function inflate(packed) {
    const bytes = bytesOf(packed);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  /** The numbers of a trace: {token, said: {label: {entropy, prob, first, ids, probs}}}. */
  function decode(bytes, n) {
    let at = 0;
    function take(count, width) {
      const values = new Uint32Array(count);
      for (let plane = 0; plane < width; plane++) {
        for (let i = 0; i < count; i++) values[i] += bytes[at + i] * 2 ** (8 * plane);
        at += count;
      }
      return values;
    }
    const token = take(n, index.width);
    const signed = (value) => (value % 2 ? -(value + 1) / 2 : value / 2);
    let reference = null;
    const said = labels.map(() => {
      const nats = take(n, 2), kept = take(n, 1);
      if (reference) for (let i = 0; i < n; i++) nats[i] = reference.nats[i] + signed(nats[i]);
      const first = new Uint32Array(n + 1);
      for (let i = 0; i < n; i++) first[i + 1] = first[i] + kept[i];
      const place = take(first[n], 1);
      const entry = new Int32Array(n).fill(-1); // of the token that follows
      let spelled = 0, outside = n;
      for (let i = 0; i < n; i++) {
        for (let at = first[i]; at < first[i + 1]; at++) {
          if (place[at] === 0 && entry[i] < 0) {
            entry[i] = at;
            outside--;
          }
          spelled += place[at] === NOT_IN_LIST;
        }
      }
      const floats = new DataView(bytes.buffer, bytes.byteOffset + at, 4 * outside);
      at += 4 * outside;
      const other = take(spelled, index.width), steps = take(first[n], 2);
      const ids = new Uint32Array(first[n]);
      for (let i = 0, next = 0; i < n; i++) {
        for (let at = first[i]; at < first[i + 1]; at++) {
          let same = -1; // the reference's entry of this id
          if (place[at] === NOT_IN_LIST) ids[at] = other[next++];
          else if (place[at] === 0) {
            ids[at] = token[i];
            if (reference) same = reference.entry[i];
          } else {
            same = reference.first[i] + place[at] - 1;
            ids[at] = reference.ids[same];
          }
          if (same >= 0) steps[at] = reference.steps[same] + signed(steps[at]);
        }
      }
      const probs = Float64Array.from(steps, (value) => Math.sin((value / PROB_STEPS) * (Math.PI / 2)) ** 2);
      const prob = new Float64Array(n);
      for (let i = 0, next = 0; i < n; i++) {
        prob[i] = entry[i] < 0 ? floats.getFloat32(4 * next++, true) : probs[entry[i]];
      }
      reference ??= { nats, entry, first, ids, steps };
      const entropy = Float64Array.from(nats, (value) => MOST_NATS * (value / ENTROPY_STEPS) ** 2);
      return { entropy, prob, first, ids, probs };
    });
    return { token, said };
  }

  const unpacked = new Map(); // the last few traces
  async function load(at) {
    let data = unpacked.get(at);
    if (!data) {
      data = decode(await inflate(blobs[at]), traces[at].n);
      if (unpacked.size >= 24) unpacked.delete(unpacked.keys().next().value);
      unpacked.set(at, data);
    }
    return data;
  }

  // -- the list -----------------------------------------------------------------------------------------------------

  let responses = null; // lower-cased, by trace, for the search; a promise, so that they are put together once
  function loadResponses() {
    return responses ??= (async () => {
      const written = JSON.parse(new TextDecoder().decode(await inflate(index.responses)));
      const said = traces.map(({ n }, at) =>
        written[at] ?? inflate(blobs[at]).then((bytes) => spell(bytes, n), () => "")); // a damaged one is not found
      return (await Promise.all(said)).map((response) => response.toLowerCase());
    })();
  }

  /** What the tokens of a trace spell; they come first in its bytes. */
  function spell(bytes, n) {
    let whole = "";
    for (let i = 0; i < n; i++) {
      let id = 0;
      for (let plane = 0; plane < index.width; plane++) id += bytes[plane * n + i] * 2 ** (8 * plane);
      whole += text.get(id);
    }
    return whole;
  }

  function fillSelect(select, everything, values) {
    const counts = new Map();
    for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
    select.append(make("option", { value: "", text: `${everything} (${number(items.length)})` }));
    for (const [value, count] of [...counts].sort((a, b) => (a[0] < b[0] ? -1 : 1))) {
      select.append(make("option", { value: "=" + value, text: `${value} (${number(count)})` }));
    }
  }

  const isCut = (item) => item.t.some((t) => !traces[t].e);
  const longest = (item) => Math.max(...item.t.map((t) => traces[t].n));
  const ORDERS = {
    file: null,
    early: (a, b) => (a.d < 0 ? Infinity : a.d) - (b.d < 0 ? Infinity : b.d) || 0,
    change: (a, b) => b.m - a.m,
    long: (a, b) => longest(b) - longest(a),
  };

  /** Apply filters, search and order; stay on the same problem where it is still shown. */
  async function refilter() {
    const turn = ++state.turn;
    const query = $("search").value.trim().toLowerCase();
    const outcome = $("outcome").value, family = $("family").value;
    const said = query ? await loadResponses() : null;
    if (turn !== state.turn) return;
    const current = items[state.shown[state.at]];
    state.query = query;
    const matches = (item) =>
      (!outcome || "=" + item.o === outcome || (outcome === "cut" && isCut(item))) && (!family || "=" + item.f === family) &&
      (!query || [item.p, item.q, item.a].some((field) => field.toLowerCase().includes(query)) ||
        item.t.some((t) => said[t].includes(query)));
    state.shown = items.map((_, at) => at).filter((at) => matches(items[at]));
    const order = ORDERS[$("sort").value];
    if (order) state.shown.sort((a, b) => order(items[a], items[b]) || a - b);
    const again = state.shown.findIndex((at) => items[at] === current);
    const count = `${number(state.shown.length)} of ${number(items.length)} problems`;
    $("count").textContent = count;
    $("fold").textContent = `Problems and filters (${number(state.shown.length)} of ${number(items.length)})`;
    $("rows").style.height = `${ROW * state.shown.length}px`;
    say(count);
    await select(Math.max(again, 0));
  }

  /** Draw the rows that can be seen, and a few around them. */
  function drawRows() {
    const list = $("list");
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
    const last = Math.min(state.shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 4);
    const rows = document.createDocumentFragment();
    for (let place = first; place < last; place++) {
      const item = items[state.shown[place]];
      const marks = make("span", { class: "verdict" });
      const words = item.t.map((t) => {
        const [sign, look, word] = verdict(traces[t].c);
        marks.append(make("span", { class: look, text: sign, title: `${traces[t].s}: ${word}` }));
        return word;
      });
      const parts = item.d < 0 ? "no divergence" : `\u25C6 ${number(item.d)}`;
      const row = make(
        "div",
        {
          class: "row", role: "option", id: `row-${place}`, "aria-selected": place === state.at ? "true" : "false",
          "aria-setsize": state.shown.length, "aria-posinset": place + 1,
          "aria-label": `${item.q.trim().slice(0, 120)}, seed ${item.s}, ${words.join(", ")}, ` +
            (item.d < 0 ? "no divergence" : `first divergence at token ${item.d}`),
        },
        make("div", { class: "what", text: item.q.trim().replace(/\s+/g, " ") || item.p }),
        make(
          "div", { class: "facts" }, marks, make("span", { text: parts, title: "first divergence" }),
          make("span", { text: `${number(longest(item))} tok` }), make("span", { text: `seed ${item.s}` }),
          make("span", { text: item.f }),
        ),
      );
      row.dataset.place = place;
      row.style.top = `${ROW * place}px`;
      rows.append(row);
    }
    $("rows").replaceChildren(rows);
    if (state.shown.length) list.setAttribute("aria-activedescendant", `row-${state.at}`);
    else list.removeAttribute("aria-activedescendant");
  }

  function showRow() {
    const list = $("list"), top = ROW * state.at;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
    drawRows();
  }

  // -- a problem ----------------------------------------------------------------------------------------------------

  /** Show the problem at a place of the list; `token` of `column` is chosen where given. */
  async function select(place, column = 0, token = -1) {
    const turn = ++state.turn;
    state.at = place;
    showRow();
    const item = items[state.shown[place]];
    if (!item) {
      state.view = null;
      $("problem").replaceChildren(make("p", { class: "none", text: "No problem passes these filters." }));
      inspect(-1, -1);
      return;
    }
    let data;
    try {
      data = await Promise.all(item.t.map(load));
    } catch (error) {
      trouble(`The traces of ${item.p}, seed ${item.s}, cannot be unpacked (${error.message}); write the page again.`);
      return;
    }
    if (turn !== state.turn) return;
    // A lone trace: a column for each precision. Several: a column for each trace.
    const columns = item.t.length === 1
      ? labels.map((name, label) => ({ name, label, trace: traces[item.t[0]], data: data[0] }))
      : item.t.map((t, at) => ({
        name: traces[t].s, label: Math.max(0, labels.indexOf(traces[t].s)), trace: traces[t], data: data[at],
      }));
    state.view = { item, columns, lone: item.t.length === 1 };
    state.column = Math.min(column, columns.length - 1);
    state.token = -1;
    drawProblem();
    if (token >= 0) choose(state.column, Math.min(token, columns[state.column].data.token.length - 1), false);
    else inspect(-1, -1);
    const words = item.t.map((t) => `${traces[t].s} ${verdict(traces[t].c)[2]}`).join(", ");
    say(`Problem ${place + 1} of ${state.shown.length}: ${item.p}, seed ${item.s}; ${words}`);
    link();
  }

  function link() {
    const item = state.view?.item;
    if (!item) return;
    const token = state.token < 0 ? "" : `/${state.column}/${state.token}`;
    try {
      history.replaceState(null, "", `#${encodeURIComponent(item.p)}/${item.s}${token}`);
    } catch { /* some browsers forbid it to a file */ }
  }

  /** Change of entropy at token `i` of a column: the precision's own, or of those compared the largest. */
  function change(column, i) {
    const { said } = column.data;
    const own = said[column.label].entropy[i] - said[0].entropy[i];
    if (state.view.lone ? column.label : own) return own;
    let most = 0;
    for (let label = 1; label < labels.length && !state.view.lone; label++) {
      const value = said[label].entropy[i] - said[0].entropy[i];
      if (Math.abs(value) > Math.abs(most)) most = value;
    }
    return most;
  }

  const best = (said, i) => said.ids[said.first[i]];
  /** Whether the precisions' most probable tokens differ at token `i`. */
  const misses = (column, i) => column.data.said.some((said) => best(said, i) !== best(column.data.said[0], i));
  const jumps = (column, i) =>
    column.data.said.some((said) => Math.abs(said.entropy[i] - column.data.said[0].entropy[i]) >= state.delta);

  function colourClass(column, i) {
    const said = column.data.said[column.label];
    if (state.mode === "change") return changeClass(change(column, i));
    return entropyClass(state.mode === "surprise" ? -Math.log(Math.max(said.prob[i], 1e-12)) : said.entropy[i]);
  }

  function tokenClass(column, i) {
    return "t " + colourClass(column, i) + (misses(column, i) ? " miss" : "") + (jumps(column, i) ? " jump" : "") +
      (column.found[i] ? " found" : "") + (i === state.view.item.d ? " first" : "");
  }

  /** Which tokens of a column hold a part of what is searched for. */
  function findIn(column) {
    const found = new Uint8Array(column.data.token.length);
    if (!state.query) return found;
    const starts = [];
    let whole = "";
    for (const id of column.data.token) {
      starts.push(whole.length);
      whole += (text.get(id) ?? "").toLowerCase();
    }
    for (let hit = whole.indexOf(state.query); hit >= 0; hit = whole.indexOf(state.query, hit + 1)) {
      for (let i = 0; i < found.length; i++) {
        const end = i + 1 < found.length ? starts[i + 1] : whole.length;
        if (starts[i] < hit + state.query.length && end > hit) found[i] = 1;
      }
    }
    return found;
  }

  function drawProblem() {
    const { item, columns, lone } = state.view;
    const facts = [item.p, item.f, `seed ${item.s}`, item.a ? `expected answer: ${item.a}` : "no expected answer"];
    const head = make(
      "div", { class: "head" }, make("h2", { text: `${state.at + 1} / ${state.shown.length}` }),
      make("span", { class: "facts", text: facts.join(" \u00B7 ") }),
      make("span", { class: "facts", text: item.o + (lone ? ` (sampled by ${columns[0].trace.s})` : "") }),
    );
    const prompt = make("div", { class: "prompt", "aria-label": "Prompt" });
    const lower = item.q.toLowerCase();
    let done = 0;
    for (let hit = state.query ? lower.indexOf(state.query) : -1; hit >= 0; hit = lower.indexOf(state.query, done)) {
      prompt.append(plain(item.q.slice(done, hit)), make("mark", { text: item.q.slice(hit, hit + state.query.length) }));
      done = hit + state.query.length;
    }
    prompt.append(plain(item.q.slice(done).replace(/\n+$/, "")));
    const grid = make("div", { class: "columns" });
    columns.forEach((column, at) => grid.append(drawColumn(column, at)));
    $("problem").replaceChildren(head, prompt, grid);
    drawStrips();
    $("main").scrollTop = 0;
    if ($("main").getBoundingClientRect().top < 0) $("main").scrollIntoView({ behavior: "instant" });
  }

  function drawColumn(column, at) {
    const { item, lone } = state.view;
    const { token, said } = column.data;
    column.found = findIn(column);
    const n = token.length;
    const mean = n ? said[column.label].entropy.reduce((sum, value) => sum + value, 0) / n : 0;
    const missed = token.reduce((count, _, i) => count + misses(column, i), 0);
    const [sign, look, word] = verdict(column.trace.c);
    const title = make("h3", { text: column.name, id: `name-${at}` });
    if (!lone) title.append(" ", make("span", { class: "verdict " + look, text: `${sign} ${word}` }));
    const facts = [
      `${number(n)} tokens`, column.trace.e ? "finished" : "cut off by the limit", n ? `mean entropy ${nats(mean)}` : "",
      labels.length > 1 ? `top token differs at ${number(missed)}` : "", `trace ${column.trace.i}`,
    ];
    const header = make(
      "header", {}, title, make("div", { class: "facts" }, ...facts.filter(Boolean).map((fact) => make("span", { text: fact }))),
    );
    column.strip = make("canvas", { class: "strip", "aria-hidden": "true", title: "Entropy along the response" });
    const body = make("div", {
      class: "tokens", role: "listbox", "aria-orientation": "horizontal", "aria-label": `Response, ${column.name}`,
    });
    column.spans = [];
    const pieces = document.createDocumentFragment();
    // A word and what follows it without a space stay on one line, so that none begins with a comma; up to a length.
    let whole = null, long = 0;
    for (let i = 0; i < n; i++) {
      const written = text.get(token[i]) ?? `<${token[i]}>`;
      long += written.length;
      if (!whole || i === item.d || long > 16 || /^\s/.test(written)) {
        long = written.length;
        if (i === item.d) pieces.append(fork());
        whole = make("span", { class: "whole" });
        pieces.append(whole);
      }
      const span = make("span", {
        class: tokenClass(column, i), role: "option", "aria-selected": "false", tabindex: i ? "-1" : "0",
      });
      // A line break shows as a sign and breaks the line after its token; an empty piece would be nowhere to point at.
      const breaks = written.match(/\r\n|\n|\r/g)?.length ?? 0;
      span.textContent = plain(written.replace(/\r\n|\n|\r/g, "\u23CE")) || "\u2205";
      span.dataset.i = i;
      column.spans.push(span);
      whole.append(span);
      for (let line = 0; line < breaks; line++) whole.append(make("br"));
    }
    if (item.d === n && !lone) pieces.append(fork("ends here"));
    if (!n) pieces.append(make("span", { class: "none", text: "no tokens: the model ended at once" }));
    body.append(pieces);
    const section = make(
      "section", { class: "column" + (at === state.column ? " active" : ""), "aria-labelledby": `name-${at}` },
      header, column.strip, body,
    );
    section.dataset.column = at;
    column.section = section;
    return section;
  }

  const fork = (words = "first divergence") => make("span", { class: "fork", role: "note", text: `\u25C6 ${words}` });

  /** Bars of entropy along each response, with a line where they part. */
  function drawStrips() {
    const look = getComputedStyle(document.documentElement);
    for (const column of state.view?.columns ?? []) {
      const canvas = column.strip, scale = window.devicePixelRatio || 1;
      const width = canvas.clientWidth, height = canvas.clientHeight;
      if (!width) continue;
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
      const draw = canvas.getContext("2d");
      draw.scale(scale, scale);
      const n = column.data.token.length, each = width / Math.max(n, 1);
      const { entropy } = column.data.said[column.label];
      for (let i = 0; i < n; i++) {
        // Square root: what lies below half a nat is most of the tokens, and worth seeing.
        const tall = Math.min(1, Math.sqrt(entropy[i] / 3)) * (height - 3);
        draw.fillStyle = look.getPropertyValue("--soft");
        if (tall > 0.4) draw.fillRect(i * each, height - tall, Math.max(each - (each > 3 ? 1 : 0), 0.7), tall);
      }
      const mark = (i, name, thick) => {
        if (i < 0) return;
        draw.fillStyle = look.getPropertyValue(name);
        draw.fillRect(Math.min((i + 0.5) * each, width) - thick / 2, 0, thick, height);
      };
      mark(state.view.item.d, "--fork", 2.5);
      if (state.view.columns[state.column] === column) mark(state.token, "--accent", 2);
    }
  }

  // -- a token ------------------------------------------------------------------------------------------------------

  /** Other columns whose token `i` has the same words before it. */
  function peers(column, i) {
    const { lone, item, columns } = state.view;
    return columns.filter((other, at) => at !== column && other.spans[i] && (lone || item.d < 0 || i <= item.d));
  }

  let marked = [];
  /** Show what each precision says at a token (none: column -1); returns to the chosen token when nothing is pointed at. */
  function inspect(at, i) {
    for (const span of marked) span.classList.remove("peer", "at");
    marked = [];
    const panel = $("inspector");
    const column = state.view?.columns[at];
    if (!column || i < 0 || i >= column.data.token.length) {
      panel.replaceChildren(make("p", { class: "empty", text: "Point at a token, or press \u2192, to see what each precision says there." }));
      return;
    }
    const others = peers(at, i);
    for (const other of others) {
      other.spans[i].classList.add("peer");
      marked.push(other.spans[i]);
    }
    column.spans[i].classList.add("at");
    marked.push(column.spans[i]);
    const taken = column.data.token[i];
    const notes = [`token ${number(i)} of ${number(column.data.token.length)}`, `id ${taken}`];
    if (!state.view.lone) notes.push(`written by ${column.name}`);
    if (i === state.view.item.d) notes.push("first divergence");
    for (const other of others) {
      if (other.data.token[i] !== taken) notes.push(`${other.name} wrote \u201C${visible(other.data.token[i])}\u201D`);
    }
    panel.replaceChildren(
      make("div", { class: "token-head" }, make("span", { class: "piece", text: visible(taken) }),
        make("span", { class: "facts", text: notes.join(" \u00B7 ") })),
      make("div", { class: "said" }, ...labels.map((name, label) => says(name, label, column, i))),
    );
  }

  function says(name, label, column, i) {
    const said = column.data.said[label], taken = column.data.token[i];
    const facts = [`p(token) ${percent(said.prob[i])}`];
    if (label) facts.push(`entropy ${signed(said.entropy[i] - column.data.said[0].entropy[i])} against ${labels[0]}`);
    const table = make("table", { "aria-label": `Most probable tokens, ${name}` });
    let rest = 1;
    for (let place = said.first[i]; place < said.first[i + 1]; place++) {
      rest -= said.probs[place];
      const meter = make("div", { class: "meter" });
      meter.style.width = `${(100 * said.probs[place]).toFixed(1)}%`;
      table.append(make(
        "tr", { class: said.ids[place] === taken ? "taken" : undefined },
        make("td", { text: visible(said.ids[place]) + (said.ids[place] === taken ? " \u25C0" : ""), title: `id ${said.ids[place]}` }),
        make("td", {}, meter), make("td", { text: percent(said.probs[place]) }),
      ));
    }
    table.prepend(make("caption", { text: `all others ${percent(Math.max(rest, 0))}` }));
    const entropy = said.entropy[i];
    return make(
      "section", { "aria-label": name },
      make("h3", {}, make("span", { text: name }), make("small", { class: entropyClass(entropy), text: nats(entropy) })),
      make("div", { class: "facts", text: facts.join(" \u00B7 ") }), table,
    );
  }

  /** Choose a token: it has the focus, and its facts stay. */
  function choose(at, i, focus = true) {
    const { columns } = state.view;
    const column = columns[at];
    if (!column?.spans.length) return;
    const before = columns[state.column].spans[state.token];
    before?.setAttribute("aria-selected", "false");
    for (const other of columns) other.section.classList.toggle("active", other === column);
    for (const span of column.section.querySelectorAll(".t[tabindex='0']")) span.tabIndex = -1;
    state.column = at;
    state.token = i;
    const span = column.spans[i];
    span.tabIndex = 0;
    span.setAttribute("aria-selected", "true");
    span.setAttribute("aria-label", `${visible(column.data.token[i])}, ` +
      labels.map((name, label) => `${name}: ${nats(column.data.said[label].entropy[i])}`).join(", ") +
      (misses(column, i) ? ", most probable tokens differ" : ""));
    inspect(at, i);
    if (focus) span.focus({ preventScroll: true });
    reveal(span);
    drawStrips();
    link();
  }

  /** Scroll a token into what is not covered by the bar above or the panel below. */
  function reveal(span) {
    const box = span.getBoundingClientRect();
    const bar = document.querySelector(".bar").getBoundingClientRect();
    const panel = $("inspector");
    const fixed = getComputedStyle(panel).position === "fixed";
    const bottom = fixed ? panel.getBoundingClientRect().top : $("main").getBoundingClientRect().bottom;
    if (box.top < bar.bottom + 8 || box.bottom > Math.min(bottom, innerHeight) - 8) {
      const scroller = fixed ? window : $("main");
      scroller.scrollBy(0, box.top - (bar.bottom + Math.min(bottom, innerHeight)) / 2);
    }
  }

  function move(by) {
    const column = state.view?.columns[state.column];
    if (!column?.spans.length) return;
    choose(state.column, state.token < 0 ? (by > 0 ? 0 : column.spans.length - 1)
      : Math.min(Math.max(state.token + by, 0), column.spans.length - 1));
  }

  /** Next (+1) or previous (-1) stop: a divergence, or a large change of entropy. */
  function stop(by) {
    const column = state.view?.columns[state.column];
    if (!column) return;
    const n = column.spans.length;
    for (let i = state.token < 0 && by < 0 ? n - 1 : state.token + by; i >= 0 && i < n; i += by) {
      if (i === state.view.item.d || misses(column, i) || jumps(column, i)) {
        choose(state.column, i);
        const why = [
          i === state.view.item.d ? "first divergence" : misses(column, i) ? "most probable tokens differ" : "",
          jumps(column, i) ? `entropy changes by ${signed(change(column, i))} nats` : "",
        ];
        say(`Token ${i}: ${why.filter(Boolean).join(", ")}`);
        return;
      }
    }
    say(by > 0 ? "No further stop in this response; j shows the next problem." : "No stop before this token.");
  }

  /** To the first divergence of the problem, if there is one. */
  function part() {
    const { item, columns } = state.view ?? {};
    if (!item) return;
    if (item.d < 0) say("These traces never part.");
    else choose(state.column, Math.min(item.d, columns[state.column].spans.length - 1));
  }

  function swap() {
    if (!state.view || state.view.columns.length < 2) return;
    const at = (state.column + 1) % state.view.columns.length;
    choose(at, Math.min(Math.max(state.token, 0), state.view.columns[at].spans.length - 1));
  }

  const go = (by) => {
    const place = Math.min(Math.max(state.at + by, 0), state.shown.length - 1);
    if (place !== state.at && place >= 0) select(place);
  };

  /** Colours and marks anew, without building the page anew. */
  function recolour() {
    drawLegend();
    for (const column of state.view?.columns ?? []) {
      column.spans.forEach((span, i) => { span.className = tokenClass(column, i); });
    }
    if (state.view) inspect(state.token < 0 ? -1 : state.column, state.token);
  }

  function drawLegend() {
    const legend = $("legend"), changing = state.mode === "change";
    const edges = changing ? index.changeEdges : index.entropyEdges;
    const steps = [];
    if (changing) {
      for (let at = -edges.length; at <= edges.length; at++) {
        const edge = at > 0 ? "+" + edges[at - 1] : "\u2212" + edges[-at]; // the lower bound of the step
        steps.push(["d" + at, at === -edges.length ? "" : edge]);
      }
    } else for (let at = 0; at <= edges.length; at++) steps.push(["h" + at, String(at ? edges[at - 1] : 0)]);
    const name = { entropy: "entropy, nats", change: `change against ${labels[0]}, nats`, surprise: "\u2212ln p(token), nats" }[state.mode];
    legend.setAttribute("aria-label", `Colour: ${name}, ${steps.length} steps, ` +
      (changing ? "blue is less, orange is more" : "stronger colour is more, from 0 to above " + edges.at(-1)));
    legend.classList.toggle("wide", changing);
    legend.replaceChildren(
      make("span", { class: "name", text: name }),
      make("ol", {}, ...steps.map(([look, word]) => make("li", {}, make("div", { class: "swatch " + look }), make("span", { text: word })))),
    );
  }

  // -- theme --------------------------------------------------------------------------------------------------------

  const THEMES = ["auto", "light", "dark"];
  let theme = THEMES.includes(remember("reqat-theme")) ? remember("reqat-theme") : "auto";
  function dress() {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    $("theme").textContent = `Theme: ${theme}`;
    drawStrips();
  }
  function redress() {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    remember("reqat-theme", theme);
    dress();
    say(`Theme: ${theme}`);
  }

  // -- what the user does -------------------------------------------------------------------------------------------

  const dialog = $("dialog");
  function help() {
    if (dialog.open) dialog.close();
    else dialog.showModal();
  }

  /** Column and position of the token that an event is about. */
  function tokenOf(event) {
    const span = event.target.closest?.("#problem .t");
    return span ? [Number(span.closest(".column").dataset.column), Number(span.dataset.i)] : null;
  }

  function wire() {
    const problem = $("problem");
    problem.addEventListener("mouseover", (event) => {
      const token = tokenOf(event);
      if (token) inspect(...token);
    });
    problem.addEventListener("mouseout", (event) => {
      if (tokenOf(event) && state.view) inspect(state.token < 0 ? -1 : state.column, state.token);
    });
    problem.addEventListener("click", (event) => {
      const token = tokenOf(event);
      if (token) return choose(...token);
      const section = event.target.closest(".column");
      if (section && event.target.classList.contains("strip")) {
        const column = state.view.columns[section.dataset.column];
        const i = Math.floor((event.offsetX / event.target.clientWidth) * column.spans.length);
        choose(Number(section.dataset.column), Math.min(Math.max(i, 0), column.spans.length - 1));
      }
    });
    // Tab may bring the focus to a token that nobody clicked.
    problem.addEventListener("focusin", (event) => {
      const token = tokenOf(event);
      if (token && (token[0] !== state.column || token[1] !== state.token)) choose(...token);
    });

    let waiting = 0;
    $("search").addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(refilter, 120);
    });
    for (const id of ["outcome", "family", "sort"]) $(id).addEventListener("change", refilter);
    $("list").addEventListener("scroll", () => requestAnimationFrame(drawRows), { passive: true });
    $("list").addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (!row) return;
      select(Number(row.dataset.place));
      $("fold").setAttribute("aria-expanded", "false");
    });
    $("fold").addEventListener("click", () => {
      const open = $("fold").getAttribute("aria-expanded") !== "true";
      $("fold").setAttribute("aria-expanded", String(open));
      if (open) showRow();
    });
    $("previous").addEventListener("click", () => go(-1));
    $("next").addEventListener("click", () => go(1));
    $("back").addEventListener("click", () => stop(-1));
    $("forth").addEventListener("click", () => stop(1));
    $("colour").addEventListener("change", () => { state.mode = $("colour").value; recolour(); });
    $("delta").addEventListener("change", () => { state.delta = Number($("delta").value); recolour(); });
    $("theme").addEventListener("click", redress);
    $("help").addEventListener("click", help);
    $("close").addEventListener("click", help);
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
    addEventListener("resize", () => requestAnimationFrame(() => { drawRows(); drawStrips(); }));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawStrips);
    addEventListener("hashchange", () => follow());

    const keys = {
      j: () => go(1), ArrowDown: () => go(1), k: () => go(-1), ArrowUp: () => go(-1),
      ArrowRight: () => move(1), ArrowLeft: () => move(-1), n: () => stop(1), p: () => stop(-1), d: part, s: swap,
      t: redress, "?": help,
      c: () => {
        $("colour").value = state.mode = MODES[(MODES.indexOf(state.mode) + 1) % MODES.length];
        recolour();
      },
      "/": () => {
        $("fold").setAttribute("aria-expanded", "true");
        $("search").focus();
        $("search").select();
      },
      Escape: () => {
        document.activeElement?.blur();
        if (!state.view) return;
        state.token = -1;
        inspect(-1, -1);
        drawStrips();
        link();
      },
    };
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
      if (dialog.open) {
        if (event.key === "?") { event.preventDefault(); help(); }
        return;
      }
      if (event.target.matches?.("input, select, textarea")) {
        if (event.key === "Escape" || (event.key === "Enter" && event.target === $("search"))) event.target.blur();
        return;
      }
      const act = keys[event.key];
      if (!act) return;
      event.preventDefault();
      act();
    });
  }

  /** Go where the address points: #problem/seed/column/token. */
  async function follow() {
    const [problem, seed, column, token] = location.hash.slice(1).split("/");
    let name = problem;
    try { name = decodeURIComponent(problem); } catch { /* not ours: nothing is found */ }
    const place = state.shown.findIndex((at) => items[at].p === name && String(items[at].s) === seed);
    if (place >= 0) await select(place, Number(column) || 0, token === undefined ? -1 : Number(token));
    return place >= 0;
  }

  async function start() {
    if (typeof DecompressionStream === "undefined") {
      trouble("This browser cannot unpack the traces (no DecompressionStream); any of 2023 or later can.");
      return;
    }
    const { steps, texts } = JSON.parse(new TextDecoder().decode(await inflate(index.pieces)));
    let id = 0;
    steps.forEach((step, at) => text.set(id += step, texts[at]));
    dress();
    drawLegend();
    fillSelect($("outcome"), "any", items.map((item) => item.o));
    const cut = items.filter(isCut).length;
    if (cut) $("outcome").append(make("option", { value: "cut", text: `cut off by the limit (${number(cut)})` }));
    fillSelect($("family"), "any", items.map((item) => item.f));
    const about = [["precisions", labels.join(", ") + ` (reference: ${labels[0]})`], ...index.about,
      ["left out of the lists", `tokens less probable than ${index.floor}, but for the first`],
      ...index.leftOut.map((line) => ["damaged, left out", line])];
    $("about").append(...about.map(([key, value]) => make("div", {}, make("dt", { text: key }), make("dd", { text: value }))));
    if (index.leftOut.length) trouble(`${index.leftOut.length} damaged traces were left out; Help lists them.`);
    $("rows").style.height = `${ROW * state.shown.length}px`;
    $("count").textContent = `${number(items.length)} problems`;
    $("fold").textContent = `Problems and filters (${number(items.length)})`;
    wire();
    if (!(location.hash.length > 1 && (await follow()))) await select(0);
    // For whoever measures: milliseconds from navigation, and from the script's start, to the first problem.
    requestAnimationFrame(() => setTimeout(() => {
      document.documentElement.dataset.drawn = `${performance.now().toFixed(0)} ${(performance.now() - began).toFixed(0)}`;
    }));
    loadResponses().catch(() => trouble("The responses cannot be searched: their text cannot be unpacked."));
  }

  start().catch((error) => trouble(`The page cannot be drawn (${error.message}).`));
})();
