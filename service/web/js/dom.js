// Elements from plain data. Text is always text: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element. `on…` are listeners, `vars` custom properties, `data` data attributes. */
export function h(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** An SVG element. */
export function s(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

export const find = (selector, root = document) => root.querySelector(selector);

/** A button with text. */
export function button(label, onclick, properties = {}) {
  return h("button", { type: "button", onclick, ...properties }, label);
}

/** A labelled `select`; `choices` are [value, text, disabled reason]. */
export function select(label, choices, value, onchange, properties = {}) {
  const options = choices.map(([choice, text, reason]) =>
    h("option", { value: choice, disabled: Boolean(reason), title: reason || null }, text),
  );
  const list = h("select", { onchange: () => onchange(list.value), ...properties }, ...options);
  list.value = value;
  return h("label", { class: "field" }, h("span", {}, label), list);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "vars") setVariables(element, value);
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function setVariables(element, variables) {
  for (const [name, value] of Object.entries(variables)) element.style.setProperty(name, value);
}
