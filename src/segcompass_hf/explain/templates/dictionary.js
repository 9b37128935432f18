"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byFeature = new Map(data.features.map((entry) => [entry.feature, entry]));
const list = document.getElementById("list"), shown = document.getElementById("entry"), search = document.getElementById("search");
const SHOWN_AT_MOST = 300;

// Text is only ever set as text: words of a data set can hold markup.
function make(name, text, attributes = {}) {
  const element = document.createElement(name);
  if (text !== null && text !== undefined) element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
const rounded = (value, digits = 2) => (value === null ? "–" : value.toFixed(digits));
const labelOf = (entry) => make("span", entry.title ?? "no name", { class: entry.title === null ? "label none" : "label" });

function score(entry, wanted) {
  if (!wanted || String(entry.feature) === wanted) return 0;
  const label = (entry.title ?? "").toLowerCase();
  if (label === wanted) return 0;
  if (label.startsWith(wanted)) return 1;
  if (label.includes(wanted)) return 2;
  return entry.words.some(([word, share]) => share >= 0.1 && word.toLowerCase().includes(wanted)) ? 3 : -1;
}

function fill() {
  const wanted = search.value.trim().toLowerCase();
  const found = data.features.map((entry) => [score(entry, wanted), entry]).filter(([rank]) => rank >= 0);
  found.sort((a, b) => a[0] - b[0]);
  const cut = found.length > SHOWN_AT_MOST ? `, the first ${SHOWN_AT_MOST} shown` : "";
  document.getElementById("found").textContent = `${found.length} features${cut}`;
  list.replaceChildren(...found.slice(0, SHOWN_AT_MOST).map(([, entry]) => {
    const button = make("button", null, { type: "button", "data-feature": entry.feature });
    button.append(make("span", entry.feature, { class: "quiet" }), labelOf(entry));
    button.append(make("span", entry.purity === null ? "" : rounded(entry.purity), { class: "quiet", title: "purity" }));
    button.addEventListener("click", () => show(entry.feature));
    const item = make("li");
    item.append(button);
    return item;
  }));
}

function scores(entry) {
  const table = make("table");
  const rows = [
    ["purity (firings on held-out images that are on the label)", rounded(entry.purity)],
    ["F1 on words / on patches, held out", `${rounded(entry.f1_words)} / ${rounded(entry.f1_patches)}`],
    ["fires from activation (words / patches)", `${rounded(entry.threshold_words)} / ${rounded(entry.threshold_patches)}`],
    ["share of words / of patches it fires on", `${rounded(100 * entry.density_words, 3)} % / ${rounded(100 * entry.density_patches, 3)} %`],
    ["activation, mean / largest", `${rounded(entry.mean_activation)} / ${rounded(entry.max_activation)}`],
  ];
  for (const [name, value] of rows.slice(entry.label === null ? 3 : 0)) {
    const row = make("tr");
    row.append(make("th", name, { scope: "row" }), make("td", value));
    table.append(row);
  }
  return table;
}

function names(entry) {
  const list = make("ul", null, { class: "names" });
  for (const [place, name] of entry.names.entries()) {
    const item = make("li"), held = place === 0 && entry.holds ? "" : place === 0 ? ", does not hold" : ", second best";
    item.append(make("b", name.text), ` on ${name.scope} `);
    item.append(make("span", `F1 ${rounded(name.f1)}, purity ${rounded(name.purity)}, by chance ${rounded(name.chance)}${held}`, { class: "quiet" }));
    list.append(item);
  }
  return list;
}

function does(entry) {
  const lines = make("div");
  if (entry.effect !== null) lines.append(make("p", entry.effect));
  if (entry.interpretation !== null) lines.append(make("p", `A language model says: ${entry.interpretation}`));
  return lines;
}

function wordExamples(entry) {
  const examples = make("ul", null, { class: "words" });
  for (const example of entry.top_words) {
    const item = make("li");
    item.append(`${example.before} `, make("mark", example.word), ` ${example.after} `);
    item.append(make("span", rounded(example.activation), { class: "quiet", title: example.sample_id }));
    examples.append(item);
  }
  return examples;
}

function patchExamples(entry) {
  const examples = make("div", null, { class: "patches" });
  for (const example of entry.top_patches) {
    const figure = make("figure");
    if (example.picture >= 0) {
      const frame = make("div", null, { class: "shown" });
      frame.append(make("img", null, { src: data.pictures[example.picture], alt: `image of ${example.sample_id}` }));
      if (example.box !== null) {
        const [x0, y0, x1, y1] = example.box, [width, height] = example.size, spot = make("span");
        Object.assign(spot.style, {
          left: `${100 * x0 / width}%`, top: `${100 * y0 / height}%`,
          width: `${100 * (x1 - x0) / width}%`, height: `${100 * (y1 - y0) / height}%`,
        });
        frame.append(spot);
      }
      figure.append(frame);
    }
    const place = example.box === null ? "padding, or place not known" : `pixels ${example.box.join(", ")}`;
    figure.append(make("figcaption", `${rounded(example.activation)} · ${example.sample_id} · ${place}`));
    examples.append(figure);
  }
  return examples;
}

function others(entry) {
  const chips = make("div");
  for (const other of entry.cofiring) {
    const name = `${other.feature} ${other.label ?? ""} ${rounded(other.jaccard)}`;
    const chip = make("button", name, { type: "button", class: "chip", title: `${rounded(other.information)} bits of information` });
    if (byFeature.has(other.feature)) chip.addEventListener("click", () => show(other.feature, true));
    else chip.disabled = true;
    chips.append(chip);
  }
  return chips;
}

function section(title, content, empty) {
  return [make("h3", title), content.childNodes.length ? content : make("p", empty, { class: "quiet" })];
}

function show(feature, focus = false) {
  const entry = byFeature.get(feature), title = make("h2", `${feature} · `);
  title.append(labelOf(entry));
  const place = entry.label_place === null ? "No word predicts where this feature fires." : `Derived label, on ${entry.label_place}.`;
  const words = make("div");
  for (const [word, share] of entry.words) words.append(make("span", `${word} ${rounded(100 * share, 0)} %`, { class: "chip" }));
  shown.replaceChildren(title, make("p", place, { class: "quiet" }), scores(entry),
    ...section("What tells where it fires, on held-out images", names(entry), "Nothing does."),
    ...section("What it does", does(entry), "Not measured."),
    ...section("Words it fires on", words, "none"),
    ...section("Strongest on words", wordExamples(entry), "Fires on no word."),
    ...section("Strongest on patches", patchExamples(entry), "Fires on no patch."),
    ...section("Fires together with (Jaccard index)", others(entry), "none"));
  for (const button of list.querySelectorAll("button")) button.setAttribute("aria-current", button.dataset.feature === String(feature));
  if (focus) shown.focus();
}

search.addEventListener("input", fill);
fill();
if (data.features.length) show(data.features[0].feature);
