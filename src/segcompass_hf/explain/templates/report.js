// The page: one mask and at most one concept are chosen; everything shown follows from them.

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { width, height } = data.image;
  const byId = (id) => document.getElementById(id);
  const state = { mask: 0, concept: null, search: "", all: false, layers: { masks: true, heat: false, patches: true, without: true } };
  const FIRST = 15; // concepts listed before one asks for all
  const paths = data.pool.map(() => null);
  const path = (number) => (paths[number] ??= maskPath(data.pool[number], width, height));
  const words = new Map([...data.words.question, ...data.words.reasoning].map(([, at, word]) => [at, word]));
  const images = new Set(data.imageTokens);
  const current = () => data.masks[state.mask];
  const chosen = () => current()?.concepts.find((concept) => concept.id === state.concept) ?? null;
  const maskName = (index) => (data.masks[index].kept ? `Mask ${index + 1}` : "Strongest slot");
  const conceptName = (concept) => concept.label ?? `Concept ${concept.id}`;

  // Distinct words a concept fired on, strongest activation first, signs after the words.
  function firedWords(concept) {
    const ordered = concept.tokens.filter(([at]) => words.get(at)).sort((a, b) => b[1] - a[1]);
    const distinct = [...new Set(ordered.map(([at]) => words.get(at)))];
    const isSign = (word) => !/[\p{L}\p{N}]/u.test(word);
    return [...distinct.filter((word) => !isSign(word)), ...distinct.filter(isSign)];
  }

  function strengths(concept) {
    const top = Math.max(...concept.tokens.map(([, activation]) => activation), 1e-9);
    return new Map(concept.tokens.map(([at, activation, part]) => [at, { level: activation / top, activation, part }]));
  }

  const numFired = (concept) => ({
    words: concept.tokens.filter(([at]) => words.has(at)).length,
    patches: concept.tokens.filter(([at]) => images.has(at)).length,
    others: concept.tokens.filter(([at]) => !words.has(at) && !images.has(at)).length,
  });

  // ---- picture

  function drawPicture() {
    const concept = chosen();
    const mask = current();
    const layers = state.layers;
    const box = byId("picture");
    box.querySelectorAll("svg, .heat").forEach((old) => old.remove());
    if (!mask) return;
    if (layers.heat) box.append(element("img", { class: "heat", src: data.slots[mask.slot].heat, alt: "" }));
    const svg = drawing("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    const lit = concept && layers.patches ? litPatches(concept) : [];
    if (lit.length) svg.append(...lamp(lit, mask.colour));
    const plain = !lit.length && !layers.heat;
    if (layers.masks) {
      if (plain && mask.area) {
        const all = data.masks.filter((one) => one.kept).map((one) => path(one.mask)).join("");
        svg.append(drawing("path", { class: "dim", "fill-rule": "evenodd", d: `M0 0H${width}V${height}H0Z${all}` }));
      }
      data.masks.forEach((one, index) => svg.append(...outlined(one, index, plain)));
    }
    const without = layers.without ? concept?.without : null;
    if (without) svg.append(...edge(path(without.masks[state.mask]), "ghost"));
    box.append(svg);
  }

  function outlined(mask, index, plain) {
    const role = (index === state.mask ? "edge now" : "edge other") + (mask.kept ? "" : " unkept");
    const shape = drawing("g", { class: "shape", "--accent": mask.colour, on: { click: () => chooseMask(index) } },
      plain ? drawing("path", { class: "tint", "fill-rule": "evenodd", d: path(mask.mask) }) : null,
      ...edge(path(mask.mask), role));
    return [shape];
  }

  const edge = (d, role) => [drawing("path", { class: "casing", d }), drawing("path", { class: role, d })];

  function litPatches(concept) {
    const level = strengths(concept);
    return [...level].filter(([at]) => data.patches[at]).map(([at, { level }]) => ({ box: data.patches[at], level }));
  }

  // A dark veil with holes where the concept was active: the stronger, the clearer.
  function lamp(lit, colour) {
    const rect = ([x0, y0, x1, y1], rest) => drawing("rect", { x: x0, y: y0, width: x1 - x0, height: y1 - y0, ...rest });
    const whole = [0, 0, width, height];
    return [
      drawing("mask", { id: "lamp" }, rect(whole, { fill: "white" }),
        ...lit.map(({ box, level }) => rect(box, { fill: "black", "fill-opacity": 0.3 + 0.7 * level }))),
      rect(whole, { class: "veil", mask: "url(#lamp)" }),
      ...lit.map(({ box, level }) => rect(box, { class: "lit", "--accent": colour, "--level": level.toFixed(3) })),
    ];
  }

  function drawLayers() {
    const concept = chosen();
    const offered = [
      ["masks", "Masks", data.masks.length > 0],
      ["heat", "Heatmap", data.masks.length > 0],
      ["patches", "Lit patches", Boolean(concept && litPatches(concept).length)],
      ["without", "Without it", Boolean(concept?.without)],
    ];
    byId("layers").replaceChildren(...offered.map(([name, text, possible]) =>
      element("button", {
        type: "button", "data-layer": name, disabled: !possible, "aria-pressed": String(state.layers[name] && possible),
        on: { click: () => {
          state.layers[name] = !state.layers[name];
          update();
          byId("layers").querySelector(`[data-layer=${name}]`).focus();
        } },
      }, text)));
    const legend = byId("legend");
    legend.replaceChildren();
    if (!data.masks.length) return;
    const key = (kind, text) => element("span", {}, element("i", { class: `key ${kind}`, "--accent": current().colour }), text);
    if (state.layers.masks) legend.append(key("line", current().kept ? maskName(state.mask) : "where the strongest slot looks (not kept)"));
    if (concept?.without && state.layers.without) legend.append(key("dashed", `without ${conceptName(concept)}`));
    if (concept && state.layers.patches && litPatches(concept).length) legend.append(key("block", "patches it fired on"));
    if (concept && data.placesNote && numFired(concept).patches) legend.append(element("span", {}, `${many(numFired(concept).patches, "patch", "patches")}: ${data.placesNote}`));
  }

  // ---- masks to choose from

  function drawTabs() {
    const tabs = data.masks.map((mask, index) => element("button", {
      type: "button", role: "tab", id: `mask-${index}`, "aria-controls": "concepts", "--accent": mask.colour,
      on: { click: () => chooseMask(index) },
    }, element("i", { class: "dot" }), element("b", {}, maskName(index)),
      element("span", {}, `slot ${mask.slot}`), element("span", { class: "figure" }, score(mask.score))));
    byId("tabs").replaceChildren(...tabs);
    byId("tabs").hidden = !tabs.length;
  }

  function markTabs() {
    [...byId("tabs").children].forEach((tab, index) => {
      tab.setAttribute("aria-selected", String(index === state.mask));
      tab.tabIndex = index === state.mask ? 0 : -1;
    });
  }

  function chooseMask(index) {
    if (index === state.mask) return;
    const kept = data.masks[index].concepts.some((concept) => concept.id === state.concept);
    Object.assign(state, { mask: index, concept: kept ? state.concept : null, search: "", all: state.all || kept });
    drawConcepts();
    update();
    tell(`${maskName(index)}, confidence ${score(current().score)}.`);
  }

  // ---- words

  function drawWords() {
    const concept = chosen();
    const level = concept ? strengths(concept) : new Map();
    const token = ([gap, at, word]) => {
      const here = level.get(at);
      if (!here) return [gap, element("span", { "data-token": at }, word)];
      const title = `activation ${fixed(here.activation)}, contribution ${signed(here.part, 3)}`;
      return [gap, element("mark", { "data-token": at, title, "--level": here.level.toFixed(3) }, word)];
    };
    const passage = (name, title, tokens, extra = []) => element("div", { class: `passage ${name}` },
      element("h3", {}, title),
      tokens.length ? element("p", { dir: "auto" }, ...tokens.flatMap(token), ...extra) : element("p", { class: "hint" }, "(nothing written)"));
    const references = data.words.reference.flatMap((at, index) => token([" ", at, `REF ${index + 1}`]));
    byId("words").replaceChildren(
      passage("question", "Instruction", data.words.question),
      passage("reasoning", "Reasoning", data.words.reasoning, references.length ? [element("span", { class: "references" }, ...references)] : []));
    if (current()) byId("words").style.setProperty("--accent", current().colour);
    byId("words-hint").textContent = !concept ? "Choose a concept to see the words it fired on." : firedText(concept);
  }

  function firedText(concept) {
    const fired = numFired(concept);
    const parts = [many(fired.words, "word"), many(fired.patches, "patch", "patches")];
    if (fired.others) parts.push(`${many(fired.others, "token")} of the frame`);
    const left = concept.numTokens - concept.tokens.length;
    return `${conceptName(concept)} fired on ${parts.join(", ")}${left > 0 ? ` and ${left} weaker ones` : ""}.`;
  }

  // ---- concepts

  function drawConcepts() {
    const mask = current();
    const panel = byId("concepts");
    const title = (text) => element("h2", { id: "concepts-title" }, text);
    if (!mask) {
      panel.replaceChildren(title("No concepts to show"), element("p", {}, "No slot of this answer was explained."));
      return;
    }
    const list = element("ol", { id: "list", "--accent": mask.colour });
    const empty = element("p", { class: "hint", id: "empty", hidden: true }, "No concept matches.");
    const search = element("input", {
      type: "search", id: "search", placeholder: "Label, number or word", autocomplete: "off", "aria-label": "Filter the concepts",
      on: { input: (event) => { state.search = event.target.value; filterConcepts(); } },
    });
    panel.replaceChildren(
      element("div", { class: "heading" },
        title(mask.kept ? `Concepts behind mask ${state.mask + 1}` : "Why no object: the strongest slot"),
        mask.concepts.length > 6 ? search : null),
      element("p", { class: "account" }, account(mask)), list, empty,
      element("button", { type: "button", id: "more", on: { click: showAll } }, `Show all ${mask.concepts.length}`));
    const sizes = mask.concepts.map((concept) => concept.contribution ?? 0);
    const [low, high] = [Math.min(0, ...sizes), Math.max(0, ...sizes)];
    const span = high - low || 1;
    list.style.setProperty("--zero", (-low / span).toFixed(4));
    list.append(...mask.concepts.map((concept, index) => conceptItem(concept, index, span)));
    roving(list, "li:not([hidden]) > button", { previous: "ArrowUp", next: "ArrowDown" }, (button) => choose(+button.dataset.concept));
    filterConcepts();
  }

  function showAll() {
    state.all = true;
    filterConcepts();
    byId("list").children[FIRST].firstChild.focus();
  }

  const part = (concept) => (current().inShares ? share(concept.share) : signed(concept.contribution));

  function account(mask) {
    const what = mask.target === "slot_logit" ? "confidence (as a logit)" : "mean mask logit";
    const field = mask.inShares ? "share" : "contribution";
    const sum = mask.concepts.reduce((total, concept) => total + (concept[field] ?? 0), 0);
    const listed = mask.inShares ? `shares add up to ${Math.round(100 * sum)} %` : `contributions add up to ${signed(sum)}`;
    const parts = [`Without any concept the ${what} would be ${fixed(mask.baseline)}; it is ${fixed(mask.value)}.`];
    parts.push(mask.numConcepts > mask.concepts.length
      ? `${mask.concepts.length} of ${mask.numConcepts} active concepts are listed; their ${listed}.`
      : `${many(mask.numConcepts, "active concept")} made that change.`);
    if (!mask.inShares && mask.concepts.length) parts.push(mask.value > mask.baseline
      ? "What concepts bring and take all but cancels out: contributions are in logits, not in shares."
      : "Together the concepts lower it: contributions are in logits, not in shares.");
    if (mask.error !== null) parts.push(`Completeness error ${percent(mask.error)}.`);
    if (mask.concepts.length) parts.push(measuredText(mask));
    if (mask.truth !== null) parts.push(`IoU with the truth ${fixed(mask.truth)}.`);
    return parts.join(" ");
  }

  // What was read of single concepts; the rest is known of the others together and shared out among them.
  function measuredText(mask) {
    const alone = mask.concepts.filter((concept) => concept.measured).length;
    const size = percent(mask.sharedOut);
    if (!alone) return `Contributions are estimated: of the change ${size} was not found by gradients and is spread over the concepts.`;
    return `${many(alone, "listed concept was", "listed concepts were")} measured alone; the others were measured together and share that out by gradients, in size ${size} of the change.`;
  }

  function howText(concept) {
    if (concept.measured) return "measured: this concept alone came and went";
    return current().concepts.some((one) => one.measured) ? "a part, by gradients, of what was measured of many concepts together" : "estimated by gradients";
  }

  function conceptItem(concept, index, span) {
    const against = concept.direction === "against";
    const fired = firedWords(concept);
    const clue = concept.label ? `#${concept.id}` : fired.length ? `fired on ${fired.slice(0, 4).join(" · ")}` : "fired on patches only";
    const button = element("button", {
      type: "button", "data-concept": concept.id, "aria-expanded": "false", "aria-controls": `about-${index}`,
      on: { click: () => choose(state.concept === concept.id ? null : concept.id) },
    },
      element("span", { class: "rank" }, String(index + 1)),
      element("span", { class: "name", dir: "auto" }, element("bdi", {}, conceptName(concept)), element("small", { title: howText(concept) }, concept.measured ? clue : `${clue} · shared out`)),
      concept.without ? element("span", { class: "tested", title: "taken away as a test" }, "tested") : null,
      element("span", { class: "share" }, part(concept), element("span", { class: "unseen" }, against ? " against" : " for")),
      element("span", { class: against ? "bar against" : "bar", "aria-hidden": "true", "--size": (Math.abs(concept.contribution ?? 0) / span).toFixed(4) }, element("i")));
    return element("li", {}, button, element("div", { class: "about", id: `about-${index}`, hidden: true }));
  }

  function about(concept) {
    const mask = current();
    const fired = firedWords(concept);
    const facts = element("dl", {});
    const fact = (name, ...value) => facts.append(element("div", {}, element("dt", {}, name), element("dd", {}, ...value)));
    fact("Fired on", fired.length ? fired.slice(0, 8).map((word) => `“${word}”`).join(", ") : "no word", ` · ${many(numFired(concept).patches, "patch", "patches")}`);
    fact("Contribution", `${signed(concept.contribution, 3)} to the ${mask.target === "slot_logit" ? "slot logit" : "mask logit"}`);
    fact("How it is known", howText(concept));
    if (concept.purity !== null) fact("Purity of the label", fixed(concept.purity));
    const without = concept.without;
    if (!without) return [facts, element("p", { class: "hint" }, "Not taken away as a test; only the first concepts are.")];
    const [before, after] = [path(mask.mask), path(without.masks[state.mask])];
    const changed = `${area(mask.area)} → ${area(without.areas[state.mask])} pixels`;
    fact("Without it", element("strong", {}, `IoU ${fixed(without.iou[state.mask])}`), ` to the mask as it is, ${changed}`);
    fact("Confidence", `${score(mask.score)} → ${score(mask.score + (without.scoreChange[state.mask] ?? 0))}`);
    if (without.truth) fact("IoU with the truth", fixed(without.truth[state.mask]));
    const others = data.masks.map((_, index) => index).filter((index) => index !== state.mask);
    if (others.length) fact("Other masks keep", others.map((index) => `${maskName(index)}: IoU ${fixed(without.iou[index])}`).join(" · "));
    if (without.reasoning !== null) fact("It would then think", element("bdi", {}, without.reasoning || "(nothing)"));
    const gone = without.areas[state.mask] === 0 ? "without it: nothing left" : "without it";
    return [facts, element("div", { class: "pair" },
      miniature(data, [before], "as it is", mask.colour), miniature(data, [after, before], gone, mask.colour))];
  }

  const area = (pixels) => pixels.toLocaleString("en").replaceAll(",", " ");

  function filterConcepts() {
    const wanted = state.search.trim().toLowerCase();
    let shown = 0;
    byId("list").querySelectorAll("li").forEach((item, index) => {
      const concept = current().concepts[index];
      const text = [conceptName(concept), `#${concept.id}`, ...firedWords(concept)].join("\n").toLowerCase();
      item.hidden = !text.includes(wanted) || (!state.all && !wanted && index >= FIRST);
      shown += !item.hidden;
    });
    byId("empty").hidden = shown > 0;
    byId("more").hidden = state.all || wanted !== "" || current().concepts.length <= FIRST;
    mark();
    if (wanted) tell(many(shown, "concept"));
  }

  function choose(id) {
    state.concept = id;
    update();
    const concept = chosen();
    if (!concept) return tell("No concept chosen.");
    const without = concept.without ? ` Without it: IoU ${fixed(concept.without.iou[state.mask])}.` : "";
    tell(`${firedText(concept)} ${current().inShares ? "Share" : "Contribution"} ${part(concept)}.${without}`);
  }

  // The list shows which concept is chosen; the Tab key reaches that one, or the first.
  function mark() {
    const buttons = [...byId("concepts").querySelectorAll("li > button")];
    const visible = buttons.filter((button) => !button.parentElement.hidden);
    const reached = visible.find((button) => +button.dataset.concept === state.concept) ?? visible[0];
    for (const button of buttons) {
      const open = +button.dataset.concept === state.concept;
      const panel = button.nextElementSibling;
      button.tabIndex = button === reached ? 0 : -1;
      button.setAttribute("aria-expanded", String(open));
      if (open === panel.hidden) panel.replaceChildren(...(open ? about(chosen()) : []));
      panel.hidden = !open;
    }
  }

  // ---- slots

  function drawSlots() {
    const kept = data.slots.filter((slot) => slot.kept).length;
    byId("slots-hint").textContent = kept
      ? `Heatmap and confidence of each; ${kept} of ${data.slots.length} passed the model's threshold and became ${kept === 1 ? "a mask" : "masks"}.`
      : "No slot's confidence passed the model's threshold, so the answer is: no such object.";
    byId("slots").replaceChildren(...data.slots.map((slot, index) => element("li", { "--accent": slot.colour, class: slot.kept ? "kept" : "" },
      element("div", { class: "frame" }, element("img", { src: data.image.src, alt: "" }),
        element("img", { class: "heat", src: slot.heat, alt: `Heatmap of slot ${index}` })),
      element("p", {}, element("i", { class: "dot" }), `slot ${index}`, element("span", { class: "unseen" }, slot.kept ? "kept" : "not kept"),
        element("span", { class: "figure" }, score(slot.score))),
      element("span", { class: "meter", "aria-hidden": "true", "--size": String(slot.score ?? 0) }, element("i")))));
  }

  const tell = (text) => { byId("status").textContent = text; };

  function update() {
    markTabs();
    drawPicture();
    drawLayers();
    drawWords();
    mark();
  }

  roving(byId("tabs"), "[role=tab]", { previous: "ArrowLeft", next: "ArrowRight" }, (tab) => tab.click());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && state.concept !== null && event.target.id !== "search") choose(null);
  });
  byId("picture").style.setProperty("--ratio", width / height);
  drawTabs();
  drawSlots();
  drawConcepts();
  update();
})();
