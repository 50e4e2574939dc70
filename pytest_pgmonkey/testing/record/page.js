"use strict";

// All that comes from a run is text: nodes are made one by one, and markup is never parsed.

const data = JSON.parse(document.getElementById("data").textContent);
const [AT, TOOK, UNTIL, LANE, MARK, TIMES, KIND, SQL, PARAMS, ORIGIN, ROWS, ERROR] = [...Array(12).keys()];
const SIGNS = { failed: "✗", passed: "✓", skipped: "–", xfailed: "✗", xpassed: "✓" };
const LANE_COLORS = 6;
const GROUPED = new Intl.NumberFormat("en");
const LEAST_BETWEEN_LABELS = window.innerWidth < 700 ? 0.25 : 0.1;

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== "") made.textContent = text;
  return made;
}

function byId(id) {
  return document.getElementById(id);
}

function milliseconds(ms) {
  if (ms >= 10000) return `${(ms / 1000).toFixed(1)} s`;
  if (ms >= 100) return `${Math.round(ms)} ms`;
  return `${ms.toFixed(ms >= 10 ? 1 : 2)} ms`;
}

function number(count, one, many) {
  return `${GROUPED.format(count)} ${count === 1 ? one : many}`;
}

function onOneLine(sql) {
  return sql.length > 400 ? `${sql.slice(0, 400).replace(/\s+/g, " ")}…` : sql.replace(/\s+/g, " ");
}

function button(className) {
  const made = element("button", className);
  made.type = "button";
  return made;
}

// --- a row that opens ---

function openable(row, content) {
  row.setAttribute("aria-expanded", "false");
  let opened = null;
  row.addEventListener("click", () => {
    const opens = row.getAttribute("aria-expanded") !== "true";
    row.setAttribute("aria-expanded", String(opens));
    if (opens && !opened) row.after((opened = content()));
    if (opened) opened.hidden = !opens;
  });
}

function definitions(pairs) {
  const list = element("dl", "more");
  for (const [name, value, className] of pairs) {
    if (value === "" || value === null) continue;
    list.append(element("dt", "", name));
    const cell = element("dd", className || "");
    if (value instanceof Node) cell.append(value);
    else cell.textContent = value;
    list.append(cell);
  }
  return list;
}

// --- one test ---

function testName(id) {
  const name = element("span", "name");
  const cut = id.indexOf("::");
  if (cut > 0) name.append(element("span", "file", id.slice(0, cut + 2)));
  name.append(element("span", "function", cut > 0 ? id.slice(cut + 2) : id));
  return name;
}

function testElement(test, longest) {
  const details = element("details", `test ${test.outcome}`);
  const summary = element("summary");
  const sign = element("span", "sign", SIGNS[test.outcome] || "·");
  sign.title = test.outcome;
  sign.setAttribute("role", "img");
  sign.setAttribute("aria-label", test.outcome);
  const share = element("span", "share");
  const bar = element("span");
  bar.style.width = `${longest ? (100 * test.ms) / longest : 0}%`;
  share.append(bar);
  const count = element("span", "count", number(test.count, "statement", "statements"));
  if (test.errors) count.append(element("span", "errors", ` · ${number(test.errors, "error", "errors")}`));
  summary.append(sign, testName(test.id), count, share, element("span", "ms", milliseconds(test.ms)));
  details.append(summary);
  details.addEventListener("toggle", () => {
    if (!details.open || details.querySelector(".body")) return;
    details.append(testBody(test));
    const failure = details.querySelector(".failure");
    if (failure) failure.scrollTop = failure.scrollHeight; // its reason is there
  });
  return details;
}

function testBody(test) {
  const body = element("div", "body");
  if (test.failure) {
    const failure = element("pre", "failure", test.failure);
    failure.tabIndex = 0;
    failure.setAttribute("aria-label", "Failure");
    body.append(failure);
  }
  for (const note of test.notes) body.append(element("p", "note", note));
  if (test.missing) {
    const earlier = number(test.missing, "earlier statement is", "earlier statements are");
    body.append(element("p", "quiet", `${earlier} no longer known, and in no sum of times.`));
  }
  if (test.isCut) {
    body.append(element("p", "quiet", "Its statements are left out: the run has too many for one page."));
  } else if (!test.runs.length) {
    body.append(element("p", "quiet", "It has run no statement."));
  } else {
    const rows = test.runs.map((run) => runRow(test, run));
    body.append(chart(test, rows), legend(test), list(rows));
  }
  return body;
}

function list(rows) {
  const made = element("ol", "runs");
  for (const row of rows) {
    const item = element("li");
    item.append(row);
    made.append(item);
  }
  return made;
}

function laneClass(lane) {
  return `lane-${lane % LANE_COLORS}`;
}

function runRow(test, run) {
  const row = button(`run ${laneClass(run[LANE])}${run[ERROR] ? " error" : ""}`);
  const bracket = element("span", `bracket ${{ "┌": "begins", "│": "goes-on", "└": "ends" }[run[MARK]] || ""}`);
  bracket.setAttribute("aria-hidden", "true");
  const sql = element("span", "sql");
  if (run[TIMES] > 1) sql.append(element("b", "", `× ${run[TIMES]} `));
  sql.append(onOneLine(data.texts[run[SQL]]));
  row.append(
    element("span", "at", run[AT].toFixed(1)),
    element("span", "took", run[TOOK] ? run[TOOK].toFixed(2) : ""),
    element("span", "connection", test.lanes[run[LANE]].split(" ", 1)[0]),
    bracket,
    sql,
    element("span", "rows", run[ROWS] === null ? "" : number(run[ROWS], "row", "rows")),
  );
  if (run[ERROR]) row.append(element("span", "message", `! ${run[ERROR]}`));
  openable(row, () => runDetails(test, run));
  return row;
}

function runDetails(test, run) {
  const times = run[TIMES] > 1 ? ` in all, ${milliseconds(run[TOOK] / run[TIMES])} each` : "";
  return definitions([
    ["Statement", element("pre", "", data.texts[run[SQL]])],
    ["Parameters", run[PARAMS] && run[TIMES] > 1 ? `${run[PARAMS]} (of the first)` : run[PARAMS], "code"],
    ["Error", run[ERROR], "code message"],
    ["Repeated", run[TIMES] > 1 ? `${run[TIMES]} times` : ""],
    ["Rows", run[ROWS] === null ? "" : `${GROUPED.format(run[ROWS])}${run[TIMES] > 1 ? " (of the last)" : ""}`],
    ["Place", run[ORIGIN], "code"],
    ["Connection", test.lanes[run[LANE]]],
    ["Time", `${milliseconds(run[TOOK])}${times}, from ${milliseconds(run[AT])} after the test began`],
  ]);
}

// --- a test's lanes ---

function chart(test, rows) {
  const scale = timeScale(test.runs);
  const made = element("div", "chart");
  made.setAttribute("aria-hidden", "true"); // the list below says it all
  const tracks = test.lanes.map((name, lane) => {
    const track = element("div", "track");
    for (const gap of scale.gaps) track.append(placed(element("span", "gap"), gap.from, gap.until, scale));
    made.append(element("span", `label ${laneClass(lane)}`, name), track);
    return track;
  });
  for (const each of transactions(test.runs)) {
    tracks[each.lane].append(placed(element("span", `transaction ${each.how}`), each.from, each.until, scale));
  }
  test.runs.forEach((run, index) => {
    const kind = run[ERROR] ? "error" : run[KIND];
    const bar = placed(button(`bar ${kind}${run[TIMES] > 1 ? " repeated" : ""}`), run[AT], run[UNTIL], scale);
    bar.tabIndex = -1;
    bar.title = `${onOneLine(data.texts[run[SQL]]).slice(0, 120)} (${milliseconds(run[TOOK])})`;
    bar.addEventListener("click", () => {
      if (rows[index].getAttribute("aria-expanded") !== "true") rows[index].click();
      rows[index].focus();
      rows[index].scrollIntoView({ block: "center" });
    });
    tracks[run[LANE]].append(bar);
  });
  made.append(element("span"), axis(scale));
  return made;
}

function placed(node, from, until, scale) {
  node.style.left = `min(${100 * scale.at(from)}%, 100% - 4px)`; // one at the very end is seen, too
  node.style.width = `${100 * (scale.at(until) - scale.at(from))}%`;
  return node;
}

function transactions(runs) {
  const open = new Map();
  const found = [];
  const close = (lane, how) => {
    found.push({ ...open.get(lane), how });
    open.delete(lane);
  };
  for (const run of runs) {
    const [lane, mark] = [run[LANE], run[MARK]];
    if (mark === "┌") open.set(lane, { lane, from: run[AT], until: run[UNTIL] });
    else if (open.has(lane) && mark !== " ") open.get(lane).until = run[UNTIL];
    else if (open.has(lane)) close(lane, "open");
    if (mark === "└" && open.has(lane)) {
      close(lane, /^\s*(rollback|abort)/i.test(data.texts[run[SQL]]) ? "undone" : "committed");
    }
  }
  for (const lane of [...open.keys()]) close(lane, "open");
  return found;
}

function axis(scale) {
  const made = element("div", "axis");
  const taken = [];
  const add = (at, text, className) => {
    if (taken.some((each) => Math.abs(each - at) < LEAST_BETWEEN_LABELS)) return;
    taken.push(at);
    const label = element("span", className || (at > 0.9 ? "last" : ""), text);
    label.style.left = `${100 * at}%`;
    made.append(label);
  };
  for (const gap of scale.gaps) {
    add((scale.at(gap.from) + scale.at(gap.until)) / 2, `⋯ ${milliseconds(gap.until - gap.from)}`, "idle");
  }
  for (const from of [0, ...scale.gaps.map((gap) => gap.until)]) {
    if (!scale.gaps.some((gap) => gap.from === from)) add(scale.at(from), `${Number(from.toPrecision(3))} ms`);
  }
  const power = 10 ** Math.floor(Math.log10(scale.length / 4));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= scale.length / 4);
  for (let count = 0; count * step <= scale.end; count++) {
    const gap = scale.gaps.find((each) => each.from <= count * step && count * step < each.until);
    if (gap) count = Math.max(count, Math.floor(gap.until / step));
    else add(scale.at(count * step), `${Number((count * step).toPrecision(6))} ms`);
  }
  return made;
}

// Where nothing runs for long, time is drawn short: what there is to see would have no room.
function timeScale(runs) {
  const gaps = [];
  let end = 0;
  let busy = 0;
  for (const run of [...runs].sort((one, other) => one[AT] - other[AT])) {
    if (run[AT] > end) gaps.push({ from: end, until: run[AT] });
    busy += Math.max(0, run[UNTIL] - Math.max(end, run[AT]));
    end = Math.max(end, run[UNTIL]);
  }
  const longest = Math.max(0.12 * busy, 0.001);
  const long = gaps.filter((gap) => gap.until - gap.from > 2 * longest);
  const drawn = (time) =>
    long.reduce((at, gap) => {
      const inside = Math.min(Math.max(time - gap.from, 0), gap.until - gap.from);
      return at - inside * (1 - longest / (gap.until - gap.from));
    }, time);
  const length = Math.max(drawn(end), 0.001);
  return { gaps: long, end, length, at: (time) => drawn(time) / length };
}

function legend(test) {
  const made = element("p", "legend");
  made.setAttribute("aria-hidden", "true");
  const add = (className, name) => {
    const item = element("span");
    item.append(element("span", `key ${className}`), name);
    made.append(item);
  };
  const kinds = new Set(test.runs.map((run) => (run[ERROR] ? "error" : run[KIND])));
  const names = { read: "reads", write: "writes", schema: "schema", control: "BEGIN, SET and the like", error: "error" };
  for (const kind of Object.keys(names)) {
    if (kinds.has(kind)) add(`bar ${kind}`, names[kind]);
  }
  const ends = new Set(transactions(test.runs).map((each) => each.how));
  const hows = { committed: "committed", undone: "rolled back", open: "left to the connection's end" };
  for (const how of Object.keys(hows)) {
    if (ends.has(how)) add(`transaction ${how}`, hows[how]);
  }
  return made;
}

// --- views ---

function statementView(section, title, column) {
  const most = [...data.statements].sort((one, other) => other[column] - one[column]);
  if (!most.length) {
    section.append(element("p", "quiet", "No statement has run."));
    return;
  }
  const rows = most.slice(0, 50).map(([text, count, ms, test]) => {
    const row = button("statement");
    row.append(
      element("span", "ms", milliseconds(ms)),
      element("span", "times", `× ${GROUPED.format(count)}`),
      element("span", "sql", onOneLine(data.texts[text])),
    );
    openable(row, () => {
      const link = button("link");
      link.textContent = data.tests[test].id;
      link.addEventListener("click", () => openTest(test));
      return definitions([
        ["Statement", element("pre", "", data.texts[text])],
        ["Time", `${milliseconds(ms)} in all, ${milliseconds(ms / count)} each`],
        ["Most of it in", link],
      ]);
    });
    return row;
  });
  section.append(element("p", "quiet", title), list(rows));
}

const views = ["tests", "slowest", "repeated"];

function show(view) {
  for (const each of views) {
    const tab = byId(`tab-${each}`);
    tab.setAttribute("aria-selected", String(each === view));
    tab.tabIndex = each === view ? 0 : -1;
    byId(each).hidden = each !== view;
  }
}

const elements = [];
let outcome = "all";

function openTest(index) {
  show("tests");
  if (elements[index].hidden) {
    byId("filter").value = "";
    choose("all");
  }
  elements[index].open = true;
  elements[index].firstChild.focus();
  elements[index].scrollIntoView({ block: "start" });
}

function filter() {
  const wanted = byId("filter").value.trim().toLowerCase();
  const hits = new Set();
  if (wanted) {
    data.texts.forEach((text, index) => text.toLowerCase().includes(wanted) && hits.add(index));
  }
  let shown = 0;
  data.tests.forEach((test, index) => {
    const fits =
      (outcome === "all" || test.outcome === outcome) &&
      (!wanted || test.id.toLowerCase().includes(wanted) || (hits.size && test.runs.some((run) => hits.has(run[SQL]))));
    elements[index].hidden = !fits;
    shown += fits ? 1 : 0;
  });
  byId("nothing").hidden = shown > 0;
  byId("nothing").textContent = data.tests.length ? "No test has that." : "No test has used the database.";
}

function choose(chosen) {
  outcome = chosen;
  for (const each of byId("outcomes").children) {
    each.setAttribute("aria-pressed", String(each.value === chosen));
  }
  filter();
}

function outcomeButtons() {
  const counts = new Map([["all", data.tests.length]]);
  for (const test of data.tests) counts.set(test.outcome, (counts.get(test.outcome) || 0) + 1);
  if (counts.size < 3) return;
  for (const [name, count] of counts) {
    const made = button(name);
    made.value = name;
    made.textContent = `${name} ${GROUPED.format(count)}`;
    made.addEventListener("click", () => choose(name));
    byId("outcomes").append(made);
  }
}

// --- the keyboard: arrows go from row to row, and between the views ---

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const target = event.target;
  const down = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const right = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (right && target.role === "tab") {
    const next = (views.indexOf(target.id.slice(4)) + right + views.length) % views.length;
    show(views[next]);
    byId(`tab-${views[next]}`).focus();
  } else if (down && target.matches("summary, .run, .statement")) {
    const rows = [...document.querySelectorAll("summary, .run, .statement")].filter((row) => row.offsetParent);
    const next = rows[rows.indexOf(target) + down];
    if (!next) return;
    next.focus();
    event.preventDefault();
  } else if (event.key === "/" && !target.matches("input")) {
    show("tests");
    byId("filter").focus();
    event.preventDefault();
  }
});

// --- the page ---

function build() {
  const sum = (name) => data.tests.reduce((total, test) => total + test[name], 0);
  const failed = data.tests.filter((test) => test.outcome === "failed").length;
  byId("project").textContent = data.project;
  document.title = `${data.project} – pgmonkey report`;
  const parts = [number(data.tests.length, "test", "tests")];
  if (failed) parts.push(`${GROUPED.format(failed)} failed`);
  parts.push(number(sum("count"), "statement", "statements"));
  parts.push(`${milliseconds(sum("ms"))} in the database`, data.written);
  for (const part of parts) byId("summary").append(element("span", / failed$/.test(part) ? "failed" : "", part));

  const longest = data.tests.reduce((most, test) => Math.max(most, test.ms), 0);
  for (const test of data.tests) elements.push(testElement(test, longest));
  byId("list").append(...elements);
  if (failed === 1) elements[0].open = true;
  outcomeButtons();
  byId("filter").addEventListener("input", filter);
  choose("all");
  statementView(byId("slowest"), "By the time that a statement took in all tests.", 2);
  statementView(byId("repeated"), "By how often a statement ran in all tests.", 1);
  for (const view of views) byId(`tab-${view}`).addEventListener("click", () => show(view));
  show("tests");
}

build();
