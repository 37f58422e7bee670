// Elements and texts that the parts of the page share. All text goes in as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

/** Return an element with properties, attributes (with a dash) and children. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.includes("-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

export function counted(number, one, many) {
  return number ? `${number} ${number === 1 ? one : many}` : null;
}

export function format(number) {
  return Number(number.toPrecision(3)).toString();
}

export function sentence(text) {
  const start = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(start) ? start : `${start}.`;
}

/** Shorten the hash at the end of a judge's id. */
export function shorten(id) {
  return id.replace(/([0-9a-f]{8})[0-9a-f]{8,}/g, "$1…");
}
