"use strict";

// A table that is wider than its place says so.
const watcher = new ResizeObserver((entries) => {
  for (const { target } of entries) target.classList.toggle("wider", target.scrollWidth > target.clientWidth);
});
document.querySelectorAll(".scroll").forEach((table) => watcher.observe(table));

// The browser of completions. Everything that it shows comes from the JSON beside it and is untrusted:
// text goes into the page as text nodes alone.
(() => {
  const root = document.getElementById("rollouts");
  if (!root) return;
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const [slider, number, promptSelect, earlierSelect] = ["slider", "number", "prompt", "earlier"].map(byId);
  const filterButtons = [...byId("filters").children];
  const sourceButtons = [...byId("sources").children];
  const label = (button) => (button.dataset.label ??= button.textContent);

  const matches = {
    all: () => true,
    correct: (completion) => completion.correct === true,
    wrong: (completion) => completion.correct === false,
    truncated: (completion) => completion.truncated,
    reflective: (completion) => completion.reflective,
  };
  // Of the three selects: value -> [what it is called, what it takes]. Names come from the run: in maps they are harmless.
  const anything = ["", ["all", () => true]];
  const rewardOf = (completion, name) => completion.rewards[source().rewards.indexOf(name)] ?? NaN;
  const embedded = Object.values(data.sources).flatMap(({ steps }) => steps.flatMap((step) => step.groups.flatMap((group) => group.completions)));
  const selects = {
    judgement: new Map([
      anything,
      ...embedded.filter(({ judgement }) => judgement).map(({ judgement }) => [judgement, [judgement, (completion) => completion.judgement === judgement]]),
    ]),
    advantage: new Map([
      anything,
      ["positive", ["positive", (completion) => completion.advantage > 0]],
      ["negative", ["negative", (completion) => completion.advantage < 0]],
      ["zero", ["zero", (completion) => completion.advantage === 0]],
    ]),
    reward: new Map([
      anything,
      ...Object.values(data.sources).flatMap(({ rewards }) => rewards).flatMap((name) => [
        [`${name} above 0`, [`${name.replace(/_reward$/, "")} above 0`, (completion) => rewardOf(completion, name) > 0]],
        [`${name} at most 0`, [`${name.replace(/_reward$/, "")} at most 0`, (completion) => rewardOf(completion, name) <= 0]],
      ]),
    ]),
  };
  const fits = (completion, filter) =>
    matches[filter](completion) && Object.entries(selects).every(([name, options]) => options.get(state[name])[1](completion));
  const count = (completions, filter) => completions.filter((completion) => fits(completion, filter)).length;
  const ofStep = (step) => step.groups.flatMap((group) => group.completions);
  const isEmpty = (name) => data.sources[name].steps.length === 0;

  // What is shown: positions in the data, but for `earlier`, a step's number ("" for none).
  const state = { source: isEmpty("train") ? "eval" : "train", step: 0, group: 0, filter: "all", judgement: "", advantage: "", reward: "", earlier: null, target: null };
  const source = () => data.sources[state.source];
  const step = () => source().steps[state.step];
  const group = () => step().groups[state.group];

  // --- making elements

  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name === "class") element.className = value;
      else element.setAttribute(name, value);
    }
    element.append(...children.map((child) => (child instanceof Node ? child : document.createTextNode(String(child)))));
    return element;
  }

  const segmentTags = { tag: "span", cut: "span", reflection: "mark", text: "span" };
  const makeSegments = (segments) => segments.map(([kind, text]) => make(segmentTags[kind] ?? "span", { class: kind === "text" ? "" : kind }, text));
  const plain = (segments) => segments.map(([, text]) => text).join("");
  const shorten = (text, length) => (text.length > length ? text.slice(0, length) + "…" : text);

  function makePicture(index) {
    const image = data.images[index];
    if (!image.source) return make("figure", {}, make("div", { class: "placeholder" }, `${image.name}: ${image.missing}`));
    const picture = make("img", { alt: `Picture of the question (${image.name})`, src: image.source });
    return make("figure", {}, picture, make("figcaption", {}, image.name));
  }

  function makeScore(name, value, kind = "") {
    return make("div", {}, make("dt", {}, name), make("dd", { class: kind }, value));
  }

  function makeAdvantage(value) {
    if (value === null) return makeScore("advantage", "–");
    if (value > 0) return makeScore("advantage", `▲ +${value}`, "good");
    return value < 0 ? makeScore("advantage", `▼ −${-value}`, "bad") : makeScore("advantage", "0");
  }

  function makeCompletion(completion, position, prompt) {
    const top = make("div", { class: "top" }, make("h4", {}, `Completion ${position + 1}`));
    if (completion.correct !== null) {
      top.append(make("span", { class: completion.correct ? "badge good" : "badge bad" }, completion.correct ? "✓ correct" : "✗ wrong"));
    }
    if (completion.judgement && completion.judgement !== "right") top.append(make("span", { class: "badge" }, completion.judgement));
    if (completion.truncated) top.append(make("span", { class: "badge" }, "truncated"));
    if (completion.reflective) top.append(make("span", { class: "badge" }, "reflective"));
    if (completion.considered !== null) top.append(make("span", { class: "badge" }, `first said ${completion.considered}`));
    const scores = make("dl", { class: "scores" });
    source().rewards.forEach((name, at) => scores.append(makeScore(name.replace(/_reward$/, ""), completion.rewards[at] ?? "–")));
    scores.append(makeAdvantage(completion.advantage), makeScore("tokens", completion.length));
    const text = make("div", { class: "text" });
    if (prompt.opens_think) text.append(make("span", { class: "tag given", title: "The prompt ends with it" }, "<think>"));
    text.append(...makeSegments(completion.text));
    return make("article", { class: "card completion", "aria-label": `Completion ${position + 1}` }, top, scores, text);
  }

  function makeColumn(title, shown, target) {
    const prompt = data.prompts[shown.prompt];
    const cards = shown.completions
      .map((completion, position) => [completion, position])
      .filter(([completion]) => fits(completion, state.filter))
      .map(([completion, position]) => {
        const card = makeCompletion(completion, position, prompt);
        if (position === target) card.classList.add("target");
        return card;
      });
    const list = cards.length ? make("div", { class: "completions" }, ...cards) : make("p", { class: "none" }, "No completion here matches the filters.");
    return make("section", { "aria-label": title }, make("h3", {}, title), list);
  }

  function makeOptions(select, options, chosen) {
    select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
    select.value = String(chosen);
  }

  // --- what is where

  function earlierGroups() {
    const wanted = group().prompt;
    return source()
      .steps.slice(0, state.step)
      .flatMap((earlier) => earlier.groups.filter((other) => other.prompt === wanted).slice(0, 1).map((other) => [earlier.step, other]));
  }

  function tally(completions) {
    const judged = completions.filter((completion) => completion.correct !== null);
    return judged.length ? `${judged.filter(matches.correct).length} of ${judged.length} correct` : `${completions.length} completions`;
  }

  function nextMatch() {
    const steps = source().steps;
    for (let at = state.step; at < steps.length; at++) {
      const from = at === state.step ? state.group + 1 : 0;
      const found = steps[at].groups.findIndex((other, position) => position >= from && count(other.completions, state.filter) > 0);
      if (found >= 0) return [at, found];
    }
    return null;
  }

  // --- showing the state

  function showControls() {
    for (const button of sourceButtons) {
      button.setAttribute("aria-pressed", button.dataset.source === state.source);
      button.disabled = isEmpty(button.dataset.source);
    }
    const { steps, total } = source();
    slider.max = steps.length - 1;
    slider.value = state.step;
    slider.setAttribute("aria-valuetext", `step ${step().step}`);
    number.min = steps[0].step;
    number.max = steps[steps.length - 1].step;
    number.value = step().step;
    byId("previous").disabled = state.step === 0;
    byId("next").disabled = state.step === steps.length - 1;
    const everything = steps.flatMap(ofStep);
    for (const button of filterButtons) {
      const filter = button.dataset.filter;
      const [here, all] = [count(ofStep(step()), filter), count(everything, filter)];
      button.setAttribute("aria-pressed", filter === state.filter);
      button.setAttribute("aria-label", `${label(button)}: ${here} in this step, ${all} embedded`);
      button.replaceChildren(`${label(button)} ${here} / ${all}`);
    }
    for (const [name, options] of Object.entries(selects)) {
      makeOptions(byId(name), [...options].map(([value, [text]]) => [value, text]), state[name]);
      byId(name).disabled = options.size < 2;
    }
    byId("match").disabled = nextMatch() === null;
    const parts = [`${steps.length} of ${total} steps are embedded`];
    if (step().asked > step().groups.length) parts.push(`of this step ${step().groups.length} of ${step().asked} prompts`);
    byId("embedded").textContent = `${parts.join(", ")}; the curves and counts above are over all steps and prompts.`;
    const names = step().groups.map((shown, position) => [
      position,
      `${shown.number}. ${shorten(plain(data.prompts[shown.prompt].question), 90)} (${tally(shown.completions)})`,
    ]);
    makeOptions(promptSelect, names, state.group);
  }

  function showQuestion() {
    const prompt = data.prompts[group().prompt];
    const words = make("div", { class: "words" }, make("div", { class: "text" }, ...makeSegments(prompt.question)));
    if (group().solution !== null) words.append(make("p", { class: "solution" }, "Solution: ", make("strong", {}, group().solution)));
    if (prompt.head.length || prompt.tail.length) {
      const whole = make("div", { class: "text whole" }, ...[prompt.head, prompt.question, prompt.tail].flatMap(makeSegments));
      words.append(make("details", {}, make("summary", {}, "Whole prompt, without image tags"), whole));
    }
    const pictures = make("div", { class: "pictures" }, ...prompt.images.map(makePicture));
    byId("question").replaceChildren(...(prompt.images.length ? [pictures] : []), words);
  }

  function showCompletions() {
    const earlier = earlierGroups();
    if (state.earlier === null || (state.earlier !== "" && !earlier.some(([at]) => String(at) === state.earlier))) {
      state.earlier = earlier.length ? String(earlier[0][0]) : null;
    }
    const options = earlier.map(([at, shown]) => [at, `${at} (${tally(shown.completions)})`]);
    makeOptions(earlierSelect, [["", earlier.length ? "none" : "not asked before"], ...options], state.earlier ?? "");
    earlierSelect.disabled = earlier.length === 0;
    const columns = byId("columns");
    const chosen = earlier.find(([at]) => String(at) === state.earlier);
    columns.replaceChildren();
    if (chosen) columns.append(makeColumn(`Earlier, at step ${chosen[0]}`, chosen[1], null));
    columns.append(makeColumn(`Step ${step().step}`, group(), state.target));
    columns.classList.toggle("two", Boolean(chosen));
    // What scrolls must be reachable without a mouse.
    for (const text of columns.querySelectorAll(".completion .text")) {
      if (text.scrollHeight > text.clientHeight) text.tabIndex = 0;
    }
  }

  function show(keepPlace = true) {
    showControls();
    showQuestion();
    showCompletions();
    const shown = count(group().completions, state.filter);
    byId("status").textContent =
      `Step ${step().step}, prompt ${group().number} of ${step().asked}: ${tally(group().completions)}; ` +
      `showing ${shown} of ${group().completions.length}.`;
    if (!keepPlace) return;
    const place = [state.source, step().step, group().number];
    if (state.target !== null) place.push(state.target + 1);
    history.replaceState(null, "", `#${place.join("/")}`);
  }

  // --- changing it

  function goToStep(position, place = 0) {
    const last = source().steps.length - 1;
    state.step = Math.min(Math.max(position, 0), last);
    state.group = Math.min(place, step().groups.length - 1);
    state.target = null;
    show();
  }

  function nearestStep(wanted) {
    const distances = source().steps.map((candidate) => Math.abs(candidate.step - wanted));
    return distances.indexOf(Math.min(...distances));
  }

  function chooseSource(name) {
    const wanted = step().step;
    state.source = name;
    state.earlier = null;
    goToStep(nearestStep(wanted));
  }

  // #train/12/3 is the third prompt of step 12, #train/12/3/2 its second completion.
  function readHash() {
    const place = /^#(train|eval)\/(\d+)\/(\d+)(?:\/(\d+))?$/.exec(location.hash);
    if (!place || isEmpty(place[1])) return false;
    state.source = place[1];
    state.step = nearestStep(Number(place[2]));
    const found = step().groups.findIndex((candidate) => candidate.number === Number(place[3]));
    state.group = Math.max(found, 0);
    state.target = place[4] && found >= 0 ? Number(place[4]) - 1 : null;
    Object.assign(state, { filter: "all", judgement: "", advantage: "", reward: "", earlier: null });
    show();
    return true;
  }

  function revealTarget() {
    (root.querySelector(".target") ?? root).scrollIntoView({ block: "start" });
  }

  slider.addEventListener("input", () => goToStep(Number(slider.value), state.group));
  number.addEventListener("change", () => {
    const wanted = number.value === "" ? step().step : Number(number.value);
    goToStep(nearestStep(wanted), state.group);
  });
  byId("previous").addEventListener("click", () => goToStep(state.step - 1, state.group));
  byId("next").addEventListener("click", () => goToStep(state.step + 1, state.group));
  promptSelect.addEventListener("change", () => goToStep(state.step, Number(promptSelect.value)));
  earlierSelect.addEventListener("change", () => {
    state.earlier = earlierSelect.value;
    show();
  });
  for (const button of sourceButtons) button.addEventListener("click", () => chooseSource(button.dataset.source));
  for (const button of filterButtons) {
    button.addEventListener("click", () => {
      state.filter = button.dataset.filter;
      show();
    });
  }
  for (const name of Object.keys(selects)) {
    byId(name).addEventListener("change", (event) => {
      state[name] = event.target.value;
      show();
    });
  }
  byId("match").addEventListener("click", () => {
    const found = nextMatch();
    if (found) goToStep(...found);
  });
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    if (event.target.closest("input, select, textarea")) return;
    if (event.key === "ArrowLeft") goToStep(state.step - 1, state.group);
    if (event.key === "ArrowRight") goToStep(state.step + 1, state.group);
  });
  window.addEventListener("hashchange", () => {
    if (readHash()) revealTarget();
  });

  // At first a group that teaches something, where there is one.
  function goToSignal() {
    source().steps.some((candidate, at) => {
      const found = candidate.groups.findIndex((other) => other.completions.some((completion) => completion.advantage));
      if (found >= 0) Object.assign(state, { step: at, group: found });
      return found >= 0;
    });
  }

  goToSignal();
  if (readHash()) revealTarget();
  else show(false); // a link to another section stays what it is
})();
