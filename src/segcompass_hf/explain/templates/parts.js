// Elements. Text is always set as text, never as markup.

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  return fill(made, attributes, children);
}

function drawing(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  return fill(made, attributes, children);
}

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("--")) made.style.setProperty(name, value);
    else if (name === "on") for (const [type, act] of Object.entries(value)) made.addEventListener(type, act);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const minus = (text) => text.replace("-", "−");
const fixed = (value, digits = 2) => (value === null ? "–" : minus(value.toFixed(digits)));
const signed = (value, digits = 2) => (value === null ? "–" : (value >= 0 ? "+" : "") + fixed(value, digits));
const share = (value) => (value === null ? "–" : `${signed(100 * value, Math.abs(value) < 0.0995 ? 1 : 0)} %`);
const percent = (value) => `${fixed(100 * value, 1)} %`;
const many = (count, one, several = one + "s") => `${count} ${count === 1 ? one : several}`;
const score = (value) => fixed(value === null ? null : Math.round(value * 100) / 100);

// Arrow keys go through a group of buttons of which the Tab key reaches one.
function roving(group, selector, { previous, next }, act) {
  group.addEventListener("keydown", (event) => {
    const buttons = [...group.querySelectorAll(selector)];
    const at = buttons.indexOf(event.target.closest(selector));
    if (at < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    const to = { [previous]: at - 1, [next]: at + 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const chosen = buttons[Math.max(0, Math.min(buttons.length - 1, to))];
    act(chosen);
    chosen.focus();
  });
}

// The picture with one or more outlines over it, small.
function miniature(data, paths, caption, colour) {
  const { src, width, height } = data.image;
  return element("figure", { class: "miniature", "--accent": colour },
    element("div", { class: "frame" },
      element("img", { src, alt: "" }),
      drawing("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" },
        drawing("path", { class: "dim", "fill-rule": "evenodd", d: `M0 0H${width}V${height}H0Z${paths[0]}` }),
        ...paths.flatMap((d, i) => [
          drawing("path", { class: "casing", d }),
          drawing("path", { class: i ? "ghost" : "edge", d }),
        ]))),
    element("figcaption", {}, caption));
}
