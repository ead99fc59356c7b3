"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const STORED = "consilience-key";
  const BARS = 8; // answers with a bar of their own
  const COLOURS = 5; // answers with a colour of their own
  const WAVES = 24; // waves in the picture
  const EVERY = 5000; // milliseconds between two looks at the recent requests
  const MARKED = "End your reply with a line of its own: The answer is <answer>.";
  const REASONS = {
    rule: "the policy was satisfied",
    max: "the policy’s limit of draws was reached",
    "no answer": "no draw of the first wave had an answer",
  };
  const server = { keyed: false, house: false, policy: "", models: Promise.resolve([]) };
  let key = "";
  let running = null;
  let shown = new Map();

  /** An element with text children only: nothing that a model or a user wrote is ever read as HTML. */
  function el(name, attributes = {}, ...children) {
    const node = document.createElement(name);
    for (const [attribute, value] of Object.entries(attributes)) {
      if (value !== null && value !== false) node.setAttribute(attribute, value === true ? "" : value);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  }

  const percent = (share) => (share === null ? "–" : `${(100 * share).toFixed(0)}\u202f%`);
  const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
  const weight = (value) => (Number.isInteger(value) ? String(value) : value.toFixed(2));
  const dollars = { style: "currency", currency: "USD", minimumFractionDigits: 0, maximumSignificantDigits: 3 };
  const money = (usd) => (usd === null ? "–" : usd.toLocaleString("en", dollars));
  const sum = (numbers) => numbers.reduce((all, one) => all + one, 0);
  const ranked = (votes) => Object.entries(votes).sort((a, b) => b[1] - a[1]);
  const reason = (why) => REASONS[why] || why;
  function when(seconds) {
    const at = new Date(1000 * seconds);
    const today = at.toDateString() === new Date().toDateString();
    return today ? at.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }) : at.toLocaleDateString();
  }

  function complain(id, text) {
    $(id).textContent = text;
    $(id).hidden = !text;
  }

  /* ---- talking to the server ---- */

  class Refused extends Error {
    constructor(status, message) {
      super(message);
      this.status = status;
    }
  }

  async function call(path, options = {}) {
    const headers = { ...options.headers };
    if (key) headers.Authorization = `Bearer ${key}`;
    const reply = await fetch(path, { ...options, headers });
    if (reply.ok) return reply;
    let message = `the server answered with status ${reply.status}`;
    try {
      message = (await reply.json()).error.message || message;
    } catch { /* not JSON: the status has to do */ }
    throw new Refused(reply.status, message);
  }

  const get = async (path) => (await call(path)).json();

  /** The JSON of the server-sent events of a reply, as they come. */
  async function* events(reply) {
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    let buffer = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      buffer += value;
      const blocks = buffer.split(/\r?\n\r?\n/);
      buffer = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
        if (data === "[DONE]") return;
        if (data) yield JSON.parse(data);
      }
    }
  }

  /* ---- the key ---- */

  function keep(value) {
    key = value;
    try {
      if (value) sessionStorage.setItem(STORED, value);
      else sessionStorage.removeItem(STORED);
    } catch { /* no storage: the key lasts until the page is left */ }
  }

  function lock(message = "") {
    keep("");
    if (running) running.abort();
    for (const id of ["asking", "run", "past", "forget"]) $(id).hidden = true;
    clearRecent();
    $("locked").hidden = false;
    complain("key-error", message);
    $("key").value = "";
    $("key").focus();
  }

  async function unlock() {
    await look();
    $("locked").hidden = true;
    $("asking").hidden = false;
    $("past").hidden = false;
    $("forget").hidden = !server.keyed;
    $("question").focus();
    server.models = listModels();
  }

  /** The upstream's models; none where it gives no list: then the model has to be named. */
  async function listModels() {
    let models = [];
    try {
      models = (await get("/v1/models")).data.map((one) => one.id);
    } catch { /* no list */ }
    $("models").replaceChildren(...models.map((name) => el("option", { value: name })));
    $("model").placeholder = models[0] || "name of the model";
    return models;
  }

  async function enter(event) {
    event.preventDefault();
    keep($("key").value.trim());
    try {
      await unlock();
    } catch (error) {
      lock(error.status === 401 ? "The server does not know this key." : String(error.message || error));
    }
  }

  /* ---- the vote while it forms ---- */

  class Vote {
    constructor() {
      this.names = []; // answers in the order of their first votes: an answer keeps its colour and its place
      $("bars").replaceChildren();
      $("waves").replaceChildren();
      this.spoken = 0;
    }

    colour(name) {
      if (!this.names.includes(name)) this.names.push(name);
      return `p${Math.min(this.names.indexOf(name), COLOURS)}`;
    }

    progress(draws, votes) {
      const order = ranked(votes);
      order.forEach(([name]) => this.colour(name));
      const counted = sum(order.map((one) => one[1]));
      $("drawn-count").textContent = `${plural(draws, "draw")} so far`;
      const [leader, most] = order[0] || [null, 0];
      const standing = leader === null
        ? `${plural(draws, "draw")}, no answer yet.`
        : `${leader} leads with ${weight(most)} of ${plural(draws, "draw")}; drawing on.`;
      $("standing").textContent = standing;
      this.say(standing);
      const places = this.names.filter((name) => name in votes).map((name) => [name, votes[name]]);
      drawBars($("bars"), places, Math.max(0, draws - counted), leader, (name) => this.colour(name));
      this.wave(draws, votes);
    }

    wave(draws, votes) {
      const stack = el("span");
      for (const name of this.names) {
        if (!votes[name]) continue;
        const part = el("i", { class: this.colour(name) });
        part.style.height = `${(100 * votes[name]) / Math.max(draws, 1)}%`;
        stack.append(part);
      }
      $("waves").append(el("div", { class: "wave" }, stack, el("b", {}, String(draws))));
      while ($("waves").children.length > WAVES) $("waves").firstChild.remove();
    }

    /** Tell a screen reader, at most once in two seconds. */
    say(text, now = false) {
      const time = performance.now();
      if (!now && time - this.spoken < 2000) return;
      this.spoken = time;
      $("spoken").textContent = text;
    }
  }

  /** One bar for each answer; bars that are there already grow. */
  function drawBars(list, places, silent, leader, colour) {
    const rows = places.slice(0, BARS).map(([name, votes]) => ({ id: `a:${name}`, name, votes, kind: colour(name) }));
    const rest = places.slice(BARS);
    if (rest.length) {
      const votes = sum(rest.map((one) => one[1]));
      rows.push({ id: "rest", name: plural(rest.length, "other answer"), votes, kind: "rest p5" });
    }
    if (silent > 0) rows.push({ id: "silent", name: "no answer", votes: silent, kind: "silent" });
    const most = Math.max(1, ...rows.map((row) => row.votes));
    const old = new Map([...list.children].map((item) => [item.dataset.id, item]));
    const items = rows.map((row) => {
      const item = old.get(row.id) || el("li", {}, el("bdi", { class: "who" }), el("span", { class: "bar", "aria-hidden": "true" }, el("i")), el("span", { class: "count" }));
      item.dataset.id = row.id;
      item.className = row.kind + (row.id === `a:${leader}` ? " lead" : "");
      const [who, bar, count] = item.children;
      who.textContent = row.name;
      who.title = row.name;
      bar.firstChild.style.width = `${(100 * row.votes) / most}%`;
      count.textContent = weight(row.votes);
      return item;
    });
    if (items.length !== list.children.length || items.some((item, place) => item !== list.children[place])) {
      list.replaceChildren(...items);
    }
  }

  /* ---- asking ---- */

  function chosenPolicy() {
    const value = $("policy").value;
    return value === "other" ? $("other").value.trim() : value;
  }

  async function requestBody() {
    const model = $("model").value.trim() || (await server.models)[0];
    if (!model) throw new Error("Name a model: the upstream gives no list of its models.");
    const policy = chosenPolicy();
    if ($("policy").value === "other" && !policy) throw new Error("Write the policy, or choose one.");
    const messages = [{ role: "user", content: $("question").value.trim() }];
    if ($("marked").checked && !server.house) messages.unshift({ role: "system", content: MARKED });
    const body = { model, messages, stream: true };
    const more = {};
    if (policy) more.policy = policy;
    if ((policy || server.policy) !== "none" && !model.endsWith("@none")) more.progress = true;
    if (Object.keys(more).length) body.consilience = more;
    return body;
  }

  function clearRun(question) {
    $("run").hidden = false;
    $("asked").textContent = question;
    $("drawn-count").textContent = "";
    for (const id of ["result", "reply-box", "draws-box"]) $(id).hidden = true;
    for (const id of ["result", "draws", "reply"]) $(id).replaceChildren();
    $("waves-box").hidden = false;
    $("standing").hidden = false;
    $("standing").textContent = "Drawing …";
    $("standing").classList.add("working");
  }

  async function ask(event) {
    if (event) event.preventDefault();
    if (running || !$("question").value.trim()) return;
    complain("ask-error", "");
    const mine = new AbortController();
    running = mine;
    $("ask").disabled = true;
    $("cancel").hidden = false;
    const vote = new Vote();
    try {
      const body = await requestBody();
      clearRun(body.messages.at(-1).content);
      vote.say("Drawing", true);
      const found = await stream(body, vote, mine.signal);
      finish(found, vote);
      await showDraws(found);
    } catch (error) {
      failed(error, mine.signal.aborted, vote);
    } finally {
      running = null;
      $("ask").disabled = false;
      $("cancel").hidden = true;
      $("standing").classList.remove("working");
      look().catch(() => {});
      if (mine.signal.aborted) setTimeout(() => look().catch(() => {}), 500); // the server has noticed by then
    }
  }

  /** Read the reply to the end; votes are shown as they come. */
  async function stream(body, vote, signal) {
    const reply = await call("/v1/chat/completions", {
      method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
    });
    const found = { id: null, text: "", verdict: null };
    for await (const event of events(reply)) {
      if (event.error) throw new Refused(0, event.error.message);
      found.id = event.id || found.id;
      const said = event.consilience;
      if (said && said.progress) {
        if (said.progress.votes["0"]) vote.progress(said.progress.draws, said.progress.votes["0"]);
      } else if (said) {
        found.verdict = said;
      }
      for (const choice of event.choices || []) {
        if (choice.index === 0 && choice.delta && choice.delta.content) found.text += choice.delta.content;
      }
    }
    if (!found.text && !found.verdict) throw new Error("The stream ended without a reply.");
    return found;
  }

  function failed(error, aborted, vote) {
    const text = aborted ? "Cancelled." : error.message || String(error);
    $("standing").textContent = aborted ? text : "There is no answer.";
    vote.say(text, true);
    if (aborted) return;
    if (error.status === 401 && server.keyed) lock(text);
    else complain("ask-error", text);
  }

  const fact = (name, value) => el("div", {}, el("dt", {}, name), el("dd", {}, value));

  function facts(one) {
    const tokens = (one.prompt_tokens || 0) + (one.completion_tokens || 0);
    return el("dl", { class: "facts" },
      fact("Confidence", percent(one.confidence)),
      fact("Draws", one.saved ? `${one.draws} (${one.saved} saved)` : String(one.draws)),
      tokens ? fact("Tokens", tokens.toLocaleString("en")) : null,
      fact("Cost", one.cost === null ? "not known" : money(one.cost)),
      one.stopped_because ? fact("Stopped because", reason(one.stopped_because)) : null,
      fact("Policy", one.policy));
  }

  /** The end of the vote: the answer first, then what it rests on. */
  function finish(found, vote) {
    const verdict = found.verdict;
    $("reply").textContent = found.text;
    $("reply-box").hidden = false;
    if (!verdict) {
      $("standing").textContent = "Passed through: one reply, no vote.";
      $("waves-box").hidden = true;
      vote.say("The reply is there.", true);
      return;
    }
    const votes = verdict.votes || {};
    const order = ranked(votes);
    order.forEach(([name]) => vote.colour(name));
    const silent = verdict.draws - Math.round(sum(order.map((one) => one[1])));
    drawBars($("bars"), order, order.length ? 0 : silent, verdict.answer, (name) => vote.colour(name));
    $("waves-box").hidden = $("waves").children.length === 0;
    const none = verdict.answer === null;
    const head = el("p", { class: none ? "big none" : "big" }, none ? "no agreed answer; the reply is one draw’s" : verdict.answer);
    $("result").replaceChildren(el("div", { class: "verdict" }, head, facts(verdict)));
    $("result").hidden = false;
    $("standing").hidden = true;
    $("drawn-count").textContent = plural(verdict.draws, "draw");
    const sure = verdict.confidence === null ? "" : `, confidence ${percent(verdict.confidence)}`;
    vote.say(`${none ? "No agreed answer" : `The answer is ${verdict.answer}`}${sure}, ${plural(verdict.draws, "draw")}, stopped because ${reason(verdict.stopped_because)}.`, true);
  }

  /* ---- draws ---- */

  function drawList(one) {
    if (!one.drawn.length) return el("p", { class: "note" }, "The texts of the draws are not kept.");
    const items = one.drawn.map((draw, place) => {
      const took = draw.error !== null ? ["failed", "failed"] : draw.answer === null ? ["no answer", "none"] : [draw.answer, draw.answer === one.answer ? "same" : ""];
      return el("li", {}, el("details", {},
        el("summary", {}, el("span", { class: "index" }, String(place + 1)),
          el("bdi", { class: `took ${took[1]}` }, took[0]),
          el("bdi", { class: "preview" }, (draw.error ?? draw.text).slice(0, 200))),
        el("pre", {}, draw.error ?? draw.text)));
    });
    return el("ol", { class: "drawn" }, ...items);
  }

  /** The draws of the request that was just answered: kept a moment after its stream has ended. */
  async function showDraws(found) {
    if (!found.id || !found.verdict) return;
    for (let tries = 0; tries < 20 && !shown.has(found.id); tries += 1) {
      if (tries) await new Promise((resolve) => { setTimeout(resolve, 50 * tries); });
      await look();
    }
    const kept = shown.has(found.id);
    $("draws").replaceChildren(kept
      ? drawList(await get(`/page/requests/${encodeURIComponent(found.id)}`))
      : el("p", { class: "note" }, "This request is not among those that this process keeps."));
    $("draws-box").hidden = false;
  }

  /* ---- recent requests ---- */

  function clearRecent() {
    shown = new Map();
    $("recent").replaceChildren();
    $("totals").replaceChildren();
  }

  async function look() {
    const asked = key;
    const got = await get("/page/requests");
    if (asked !== key) return; // another key by now: this list is not its
    server.policy = got.policy;
    $("default-policy").textContent = `the server’s own: ${got.policy}`;
    showTotals(got.totals);
    const fresh = new Map(got.requests.map((one) => [one.id, shown.get(one.id) || recentItem(one)]));
    for (const [id, item] of shown) if (!fresh.has(id)) item.remove();
    let before = null;
    for (const item of fresh.values()) { // newest first; items that stay are not moved, so that focus stays
      const next = before ? before.nextSibling : $("recent").firstChild;
      if (next !== item) $("recent").insertBefore(item, next);
      before = item;
    }
    shown = fresh;
    $("nothing").hidden = fresh.size > 0;
    $("past-note").textContent = server.keyed ? "of this key" : "of all clients";
  }

  function showTotals(totals) {
    const card = (label, value, note) => el("li", {}, el("span", { class: "label" }, label), el("strong", {}, value), el("span", { class: "note" }, note));
    const whole = (count) => count.toLocaleString("en");
    const share = totals.saved ? `${percent(totals.saved / (totals.saved + totals.draws))} of the policies’ limits` : "";
    const unknown = totals.unpriced && totals.unpriced === totals.requests - totals.errors;
    $("totals").replaceChildren(
      card("Requests", whole(totals.requests), totals.errors ? plural(totals.errors, "error") : ""),
      card("Draws", whole(totals.draws), ""),
      card("Draws saved", whole(totals.saved), share),
      card("Tokens", whole(totals.tokens), ""),
      card("Cost", unknown ? "–" : money(totals.cost), totals.unpriced ? `${plural(totals.unpriced, "request")} without a price` : ""));
  }

  function recentItem(one) {
    const more = one.choices > 1 ? ` and ${plural(one.choices - 1, "more choice")}` : "";
    const what = one.status >= 400 ? [one.status === 499 ? "left" : `error ${one.status}`, "failed"]
      : one.policy === "none" ? ["no vote", "none"] : one.answer === null ? [`no agreed answer${more}`, "none"] : [one.answer + more, ""];
    const tokens = one.prompt_tokens + one.completion_tokens;
    const amount = one.draws || !tokens ? plural(one.draws, "draw") : plural(tokens, "token");
    const button = el("button", { type: "button", class: "row", "aria-expanded": "false" },
      el("span", { class: "chevron", "aria-hidden": "true" }),
      el("span", { class: "asks" }, one.question || "(no text)"),
      el("span", { class: `what ${what[1]}` }, what[0]),
      el("span", { class: "n sure", title: "confidence" }, percent(one.confidence)),
      el("span", { class: "n" }, amount),
      el("span", { class: "n cost", title: "cost" }, money(one.cost)),
      el("span", { class: "n time" }, when(one.at)));
    const item = el("li", {}, button);
    button.addEventListener("click", () => unfold(one, item, button));
    return item;
  }

  function finalBars(one) {
    const bars = el("ul", { class: "bars" });
    const order = ranked(one.votes);
    drawBars(bars, order, 0, one.answer, (name) => `p${Math.min(order.findIndex((vote) => vote[0] === name), COLOURS)}`);
    return bars;
  }

  /** One of several choices of a request: how it was agreed on, and its draws. */
  function choiceOf(one, place, count) {
    const said = one.answer === null ? "no agreed answer" : `${one.answer}, confidence ${percent(one.confidence)}`;
    return el("section", { class: "choice" },
      el("h4", {}, `Choice ${place + 1} of ${count}: `, el("bdi", {}, said)), finalBars(one), drawList(one));
  }

  async function unfold(one, item, button) {
    if (button.getAttribute("aria-expanded") === "true") {
      fold(item);
      return;
    }
    const detail = el("div", { class: "detail" }, el("p", { class: "asked" }, one.question), facts(one));
    if (one.error) detail.append(el("p", { class: "error" }, one.error));
    if (one.choices === 1) detail.append(finalBars(one));
    item.append(detail);
    button.setAttribute("aria-expanded", "true");
    if (!one.draws) return;
    try {
      const whole = await get(`/page/requests/${encodeURIComponent(one.id)}`);
      if (one.choices === 1) detail.append(drawList(whole));
      else [whole, ...whole.others].forEach((choice, place) => detail.append(choiceOf(choice, place, one.choices)));
    } catch (error) {
      detail.append(el("p", { class: "note" }, error.message || String(error)));
    }
  }

  function fold(item) {
    item.querySelector(".detail").remove();
    item.firstChild.setAttribute("aria-expanded", "false");
  }

  /** Escape closes the innermost thing that is open around the focus, and leaves the focus on what opens it. */
  function escape(event) {
    if (event.key !== "Escape") return;
    const details = event.target.closest("details[open]");
    if (details) {
      details.open = false;
      details.firstChild.focus();
      return;
    }
    const item = event.target.closest(".recent > li");
    if (item && item.querySelector(".detail")) {
      fold(item);
      item.firstChild.focus();
    }
  }

  /* ---- the start ---- */

  function wire() {
    $("key-form").addEventListener("submit", enter);
    $("ask-form").addEventListener("submit", ask);
    $("question").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask(event);
    });
    $("policy").addEventListener("change", () => {
      $("other-field").hidden = $("policy").value !== "other";
      if ($("policy").value === "other") $("other").focus();
    });
    $("cancel").addEventListener("click", () => {
      if (running) running.abort();
      $("question").focus();
    });
    $("forget").addEventListener("click", () => lock());
    document.addEventListener("keydown", escape);
    setInterval(() => {
      if (!document.hidden && !$("past").hidden) look().catch((error) => { if (error.status === 401) lock(error.message); });
    }, EVERY);
  }

  async function start() {
    wire();
    Object.assign(server, await get("/page/server"));
    $("marked-line").hidden = server.house;
    try {
      key = (server.keyed && sessionStorage.getItem(STORED)) || "";
    } catch {
      key = "";
    }
    if (server.keyed && !key) {
      lock();
      return;
    }
    try {
      await unlock();
    } catch (error) {
      if (error.status === 401) lock(error.message);
      else throw error;
    }
  }

  start().catch((error) => {
    $("asking").hidden = false;
    complain("ask-error", `The server cannot be reached: ${error.message || error}`);
  });
})();
