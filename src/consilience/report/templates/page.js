"use strict";
(() => {
  const PER_STEP = 100;
  const $ = (id) => document.getElementById(id);

  /** An element with text children only: nothing from the data is ever read as HTML. */
  function el(name, attributes = {}, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      node.setAttribute(key, value === true ? "" : value);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  }

  const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)}\u202f%`;
  const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
  const weight = (value) => (Number.isInteger(value) ? String(value) : value.toFixed(2));

  /* ---- tooltips of the charts ---- */

  function tooltips() {
    const tip = $("tip");
    let owner = null;
    function place(x, y) {
      const box = tip.getBoundingClientRect();
      const left = Math.min(Math.max(8, x - box.width / 2), document.documentElement.clientWidth - box.width - 8);
      const above = y - box.height - 14;
      tip.style.left = `${left}px`;
      tip.style.top = `${above < 8 ? y + 18 : above}px`;
    }
    function show(target, x, y) {
      owner = target;
      tip.textContent = target.dataset.tip;
      tip.hidden = false;
      place(x, y);
    }
    function hide() {
      owner = null;
      tip.hidden = true;
    }
    document.addEventListener("pointermove", (event) => {
      const target = event.target.closest ? event.target.closest("[data-tip]") : null;
      if (target) show(target, event.clientX, event.clientY);
      else if (owner && owner !== document.activeElement) hide();
    });
    function showFocused() {
      const target = document.activeElement;
      if (!target.dataset || !target.dataset.tip) return hide();
      const box = target.getBoundingClientRect();
      return show(target, box.left + box.width / 2, box.top);
    }
    document.addEventListener("focusin", showFocused);
    document.addEventListener("focusout", hide);
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
    document.addEventListener("scroll", () => { if (owner) showFocused(); }, { passive: true });
  }

  /* ---- the table of questions ---- */

  const MARKS = {
    right: ["✓", "right"],
    wrong: ["✗", "wrong"],
    unknown: ["?", "unknown"],
  };
  const state = (row) => (row.right === true ? "right" : row.right === false ? "wrong" : "unknown");
  const open = new Set();
  const view = { text: "", show: "all", sort: null, down: false, limit: PER_STEP };

  const COLUMNS = [
    { key: "question", name: "Question", value: (row) => row.question.toLowerCase() },
    { key: "gold", name: "Gold", value: (row) => (row.gold === null ? null : row.gold.toLowerCase()) },
    { key: "answer", name: "Answer", value: (row) => `${state(row)} ${(row.answer || "").toLowerCase()}` },
    { key: "confidence", name: "Confidence", value: (row) => row.confidence, number: true },
    { key: "draws", name: "Draws", value: (row) => row.draws, number: true },
    { key: "votes", name: "Votes", value: (row) => share(row), number: true },
  ];
  const FILTERS = [
    ["all", "All", () => true],
    ["right", "✓ Right", (row) => row.right === true],
    ["wrong", "✗ Wrong", (row) => row.right === false],
    ["unknown", "? Unknown", (row) => row.right === null],
    ["undecided", "Undecided", (row) => !row.decided],
    ["none", "No answer", (row) => row.answer === null],
  ];
  const total = (row) => row.votes.reduce((sum, vote) => sum + vote[1], row.rest ? row.rest[1] : 0);
  const share = (row) => (total(row) > 0 ? Math.max(...row.votes.map((vote) => vote[1])) / total(row) : 0);
  const order = new Intl.Collator("en", { numeric: true }).compare;

  function matching(rows) {
    const words = view.text.toLowerCase().split(/\s+/).filter(Boolean);
    const keep = FILTERS.find((filter) => filter[0] === view.show)[2];
    const found = rows.filter((row) => keep(row) && words.every((word) => row.haystack.includes(word)));
    const column = COLUMNS.find((one) => one.key === view.sort);
    if (!column) return found;
    return found.sort((a, b) => {
      const [x, y] = [column.value(a), column.value(b)];
      if (x === null || y === null) return x === y ? a.place - b.place : x === null ? 1 : -1;
      const step = column.number ? x - y : order(x, y);
      return (view.down ? -step : step) || a.place - b.place;
    });
  }

  function mark(row) {
    const [sign, word] = MARKS[state(row)];
    return el("span", { class: `mark ${state(row)}`, title: word },
      el("span", { "aria-hidden": "true" }, sign), el("span", { class: "hidden" }, `${word}: `));
  }

  function answer(text) {
    return text === null ? el("em", { class: "none" }, "no answer") : el("bdi", { class: "answer" }, text);
  }

  function stack(row) {
    const bar = el("span", { class: "stack", "aria-hidden": "true" });
    const sum = total(row);
    row.votes.forEach(([name, votes], place) => {
      if (!sum || place > 5) return;
      const part = el("i", { class: name === row.answer ? "lead" : "other" });
      part.style.width = `${(100 * votes) / sum}%`;
      bar.append(part);
    });
    return [bar, el("span", { class: "hidden" }, `${percent(share(row))} for the leader`)];
  }

  function line(row) {
    const button = el("button", {
      type: "button", class: "fold", "aria-expanded": String(open.has(row.place)),
      "aria-controls": `detail-${row.place}`,
    }, el("span", { class: "chevron", "aria-hidden": "true" }), el("span", { class: "text" },
      el("small", {}, el("bdi", {}, row.id)), el("bdi", { class: "clamp" }, row.question)));
    const meter = el("span", { class: "meter", "aria-hidden": "true" }, el("i"));
    meter.firstChild.style.width = `${100 * Math.min(1, Math.max(0, row.confidence))}%`;
    const tr = el("tr", { class: "row" },
      el("th", { scope: "row" }, button),
      el("td", { class: "col-gold" }, row.gold === null ? "–" : el("bdi", { class: "answer" }, row.gold)),
      el("td", { class: "verdict" }, mark(row), answer(row.answer),
        row.decided ? null : el("span", { class: "flag" }, "undecided")),
      el("td", { class: "n sure" }, percent(row.confidence), meter),
      el("td", { class: "n spent" }, String(row.draws)),
      el("td", { class: "col-votes" }, ...stack(row)));
    button.addEventListener("click", () => {
      const opened = !open.has(row.place);
      if (opened) open.add(row.place); else open.delete(row.place);
      button.setAttribute("aria-expanded", String(opened));
      if (opened) tr.after(detail(row)); else tr.nextElementSibling.remove();
    });
    return tr;
  }

  function detail(row) {
    const facts = el("dl", { class: "verdict-facts" });
    const fact = (name, value) => { if (value) facts.append(el("div", {}, el("dt", {}, name), el("dd", {}, value))); };
    fact("Verdict", el("span", {}, mark(row), answer(row.answer)));
    fact("Gold", row.gold === null ? "none" : el("bdi", { class: "answer" }, row.gold));
    fact("Confidence", percent(row.confidence, 1));
    fact("Draws used", String(row.draws));
    fact("Stopped", row.why ? el("bdi", {}, row.why) : null);
    const inside = el("div", { class: "detail" },
      el("div", { class: "side" }, el("h3", {}, "Question"), el("p", { class: "asked" }, row.question),
        facts, el("h3", {}, "Votes"), votes(row)),
      el("div", { class: "replies" }, ...replies(row)));
    return el("tr", { class: "unfolded", id: `detail-${row.place}` }, el("td", { colspan: COLUMNS.length }, inside));
  }

  function votes(row) {
    if (!row.votes.length) return el("p", { class: "none" }, "No draw had an answer.");
    const list = el("ul", { class: "bars" });
    const most = Math.max(...row.votes.map((vote) => vote[1]), 1e-9);
    const add = (name, count, css) => {
      const bar = el("span", { class: "bar", "aria-hidden": "true" }, el("i"));
      bar.firstChild.style.width = `${(100 * count) / most}%`;
      list.append(el("li", { class: css }, name, bar, el("span", { class: "count" }, weight(count))));
    };
    for (const [name, count] of row.votes) {
      const won = name === row.answer;
      add(el("span", { class: "who" }, el("bdi", { class: "answer" }, name),
        won ? el("small", {}, " verdict") : null), count, won ? "won" : "");
    }
    if (row.rest) add(el("span", { class: "who" }, plural(row.rest[0], "further answer")), row.rest[1], "");
    return list;
  }

  function replies(row) {
    if (!row.replies.length) return [el("h3", {}, "Draws"), el("p", { class: "none" }, "No draw is shown.")];
    const toggle = el("button", { type: "button", class: "quiet" }, "Unfold all texts");
    const list = el("ol", { class: "drawn" }, ...row.replies.map((draw, place) => reply(row, draw, place)));
    toggle.addEventListener("click", () => {
      const folds = [...list.querySelectorAll("details")];
      const opened = folds.some((fold) => !fold.open);
      for (const fold of folds) fold.open = opened;
      toggle.textContent = opened ? "Fold all texts" : "Unfold all texts";
    });
    const head = el("div", { class: "head" }, el("h3", {}, plural(row.replies.length, "draw")), toggle);
    const hidden = row.hidden ? el("p", { class: "aside" }, `${plural(row.hidden, "further draw")} in the record.`) : null;
    return [head, list, hidden].filter(Boolean);
  }

  function reply(row, [text, found, error, judged], place) {
    const tags = [];
    if (error !== null) tags.push(el("span", { class: "flag failed" }, "failed"));
    else tags.push(el("span", { class: `took${found !== null && found === row.answer ? " same" : ""}` }, answer(found)));
    if (!judged) tags.push(el("span", { class: "flag", title: "Made ahead of need; past the stopping point, so it had no vote" }, "not judged"));
    const preview = (error !== null ? error : text).slice(0, 400).replace(/\s+/g, " ");
    const body = [];
    if (error !== null) body.push(el("p", { class: "reason" }, el("bdi", {}, error)));
    if (text) body.push(el("pre", { dir: "auto" }, text));
    if (!body.length) body.push(el("p", { class: "none" }, "An empty reply."));
    return el("li", { class: judged ? "" : "ahead" }, el("details", {},
      el("summary", {}, el("span", { class: "index" }, String(place + 1)), ...tags,
        el("bdi", { class: "preview" }, preview)), ...body));
  }

  function headings(draw) {
    const cells = COLUMNS.map((column) => {
      const button = el("button", { type: "button", class: "sort" }, column.name,
        el("span", { class: "arrow", "aria-hidden": "true" }));
      const th = el("th", { scope: "col", class: `col-${column.key}${column.number ? " n" : ""}` }, button);
      button.addEventListener("click", () => {
        const first = Boolean(column.number);
        if (view.sort !== column.key) [view.sort, view.down] = [column.key, first];
        else if (view.down === first) view.down = !first;
        else view.sort = null;
        for (const other of cells) other.removeAttribute("aria-sort");
        if (view.sort) th.setAttribute("aria-sort", view.down ? "descending" : "ascending");
        draw();
      });
      return th;
    });
    return cells;
  }

  function states(rows, draw) {
    return FILTERS.map(([key, name, keep]) => [key, name, rows.filter(keep).length])
      .filter(([key, , count]) => key === "all" || count > 0)
      .map(([key, name, count]) => {
        const button = el("button", { type: "button", "aria-pressed": String(key === view.show), "data-show": key },
          name, el("span", { class: "badge" }, count.toLocaleString("en")));
        button.addEventListener("click", () => {
          view.show = key;
          for (const other of $("states").children) other.setAttribute("aria-pressed", String(other === button));
          view.limit = PER_STEP;
          draw();
        });
        return button;
      });
  }

  function table() {
    const rows = JSON.parse($("data").textContent);
    if (!rows.length || !$("table")) return;
    rows.forEach((row, place) => {
      row.place = place;
      row.haystack = [row.id, row.question, row.gold, row.answer].filter((part) => part !== null).join("\n").toLowerCase();
    });
    const body = $("table").tBodies[0];
    function draw() {
      const found = matching(rows);
      const shown = found.slice(0, view.limit);
      body.replaceChildren(...shown.flatMap((row) => (open.has(row.place) ? [line(row), detail(row)] : [line(row)])));
      if (!found.length) body.append(el("tr", {}, el("td", { colspan: COLUMNS.length, class: "empty" }, "No question matches.")));
      $("count").textContent = `${found.length.toLocaleString("en")} of ${plural(rows.length, "question")}`;
      $("more").hidden = found.length <= shown.length;
      $("more").textContent = `Show ${Math.min(PER_STEP, found.length - shown.length)} more of ${(found.length - shown.length).toLocaleString("en")}`;
    }
    $("table").tHead.rows[0].append(...headings(draw));
    $("states").append(...states(rows, draw));
    $("find").addEventListener("input", (event) => {
      view.text = event.target.value;
      view.limit = PER_STEP;
      draw();
    });
    $("more").addEventListener("click", () => {
      const seen = body.querySelectorAll("tr.row").length;
      view.limit += PER_STEP;
      draw();
      const next = body.querySelectorAll("tr.row button.fold")[seen];
      if (next) next.focus();
    });
    draw();
  }

  tooltips();
  table();
})();
