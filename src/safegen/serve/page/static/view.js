// What the page shows: the way of a request, runs and images.
// A run is one request to one or two stacks.

import { counted, el, icon, shorten } from "./elements.js";
import { canRetry, describeRefusal, errorTitle, refusalCard } from "./refusal.js";

const ACTIONS = {
  none: "let it pass",
  edit: "steered the generation",
  block: "blocked the prompt",
  refuse: "withheld the image",
  black: "covered the image",
  blur: "covered the image",
  mosaic: "covered the image",
  withhold: "could not decide",
};

/** Return the steps between a prompt and its image, as list items. */
export function stackPath(stack) {
  const step = (text, kind, note) =>
    el("li", { className: kind }, text, note ? el("small", {}, note) : null);
  const changes = [
    counted(stack.patches, "patch", "patches"),
    counted(stack.loras.length, "LoRA", "LoRAs"),
  ];
  const edits = changes.filter(Boolean).join(", ") || (stack.is_base ? "as published" : "no edits");
  const reads = (test) => stack.guards.filter(test);
  const steering = reads((g) => !g.reads_prompts && !g.reads_images);
  const names = steering.map((g) => g.name).join(", ");
  return [
    step("prompt", "end"),
    ...reads((g) => g.reads_prompts).map((g) => step(g.name, "guard", "reads the prompt")),
    step(stack.model, "model", steering.length ? `${edits}; steered by ${names}` : edits),
    ...reads((g) => g.reads_images).map((g) =>
      step(g.name, "guard", `reads the image${g.judge ? ` with ${shorten(g.judge)}` : ""}`),
    ),
    step("image", "end"),
    stack.guards.some((g) => g.reads_prompts || g.reads_images)
      ? null
      : el("li", { className: "warning" }, "No guard reads prompts or images here."),
  ].filter(Boolean);
}

/** Return what the page shows before the first run. */
export function emptyState(examples, onTry) {
  const buttons = examples.map(({ prompt, note }) => {
    const button = el("button", { type: "button", className: "example" }, el("b", {}, prompt));
    if (note) button.append(" ", el("small", {}, note));
    button.addEventListener("click", () => onTry(prompt));
    return el("li", {}, button);
  });
  return el(
    "div",
    { className: "empty" },
    icon("image"),
    el("h2", {}, "No images yet"),
    el("p", { className: "soft" }, "Write a prompt, or try one of these:"),
    el("ul", {}, buttons),
  );
}

export function pendingRun(run, onCancel) {
  const clock = el("span", { className: "clock", "aria-hidden": "true" }, "0.0 s");
  const cancel = el("button", { type: "button", id: "cancel" }, "Cancel");
  cancel.addEventListener("click", onCancel);
  const { n, width, height } = run.request;
  const places = run.stacks.map((stack) => {
    const tiles = Array.from({ length: n }, () => {
      const place = el("div", { className: "place" });
      place.style.aspectRatio = width && height ? `${width} / ${height}` : "1";
      return place;
    });
    return column(stack, tiles, { named: run.stacks.length > 1, level: 3 });
  });
  return el(
    "article",
    { className: "run pending", "aria-busy": "true" },
    el("div", { className: "bar" }, el("h2", {}, run.request.prompt), cancel),
    el("p", { className: "soft meta" }, "Generating and checking ", clock),
    layout(places, run.request),
  );
}

/** Return a finished run: large as the answer, or small among the earlier ones. */
export function finishedRun(run, { small = false, onReuse, onRetry }) {
  const level = small ? 3 : 2;
  const tile = small ? smallTile : largeTile;
  const compare = run.results.length > 1;
  const columns = run.results.map((result) => {
    const { stack, seconds } = result;
    const own = { level: level + 1 + Number(compare), onReuse };
    return column(stack, tiles(run, result, tile, own), {
      named: compare,
      level: level + 1,
      seconds,
    });
  });
  const again = el("button", { type: "button" }, "Use again");
  again.addEventListener("click", () => onReuse(run.request));
  const retry = run.results.some((result) => canRetry(result.error))
    ? el("button", { type: "button" }, "Try again")
    : null;
  retry?.addEventListener("click", () => onRetry(run.request));
  return el(
    "article",
    { className: small ? "run small" : "run" },
    el(
      "div",
      { className: "bar" },
      el(`h${level}`, {}, run.request.prompt),
      el("div", { className: "row" }, small ? null : retry, again),
    ),
    el("p", { className: "soft meta" }, meta(run)),
    layout(columns, run.request),
  );
}

/** Return one sentence about a run, for the live region. */
export function summarize(run) {
  return run.results
    .map((result) => {
      const of = (status) => result.tiles.filter((tile) => tile.status === status).length;
      const [released, blocked, failed] = [of("released"), of("blocked"), of("fault")];
      const parts = [
        counted(released, "image", "images"),
        blocked && `${blocked} blocked`,
        failed && `${failed} failed`,
      ];
      const known = parts.filter(Boolean).join(", ");
      const text = known || `${errorTitle(result.error)}: ${result.error.message}`;
      return run.results.length > 1 ? `${result.stack.name}: ${text}` : text;
    })
    .join(". ");
}

function column(stack, children, { named, level, seconds = 0 }) {
  const parts = [
    stack.is_base ? "base model" : null,
    counted(stack.patches, "patch", "patches"),
    counted(stack.guards.length, "guard", "guards") ?? "no guards",
    seconds ? `${seconds.toFixed(1)} s` : null,
  ];
  const note = el("small", {}, parts.filter(Boolean).join(" · "));
  const head = named ? el(`h${level}`, { className: "stack" }, stack.name, note) : null;
  return el("div", { className: "column" }, head, children);
}

function layout(columns, request) {
  const compare = columns.length > 1;
  const box = el("div", { className: compare ? "columns compare" : "columns" }, columns);
  box.style.setProperty(
    "--rows",
    String(1 + Math.max(...columns.map((c) => c.children.length - 1))),
  );
  box.dataset.images = String(compare ? 2 : request.n);
  return box;
}

/** Return one tile per image; a single one for a request without any image. */
function tiles(run, result, make, options) {
  const context = { ...options, run, result };
  if (!result.error) return result.tiles.map((entry) => make(entry, context));
  const entry = result.tiles.find((tile) => tile.status === "fault") ??
    result.tiles[0] ?? { status: "error" };
  return [make({ ...entry, all: result.tiles }, context)];
}

function largeTile(entry, { run, result, level, onReuse }) {
  if (entry.status !== "released") return refusalCard(entry, result, level);
  const { request } = run;
  const save = el(
    "a",
    { href: entry.url, download: fileName(request, result.stack, entry) },
    "Download",
  );
  save.setAttribute(
    "aria-label",
    `Download the image with seed ${entry.seed} from ${result.stack.name}`,
  );
  const reuse = el("button", { type: "button", className: "plain" }, "Use this seed");
  reuse.setAttribute("aria-label", `Use seed ${entry.seed}`);
  reuse.addEventListener("click", () => onReuse({ ...request, seed: entry.seed, n: 1 }));
  return el(
    "figure",
    { className: "tile" },
    picture(entry, run, result),
    el(
      "figcaption",
      {},
      el(
        "p",
        {},
        el("b", {}, `seed ${entry.seed}`),
        el("span", { className: "soft" }, ` ${entry.width} × ${entry.height}`),
      ),
      el("ul", { className: "guards" }, guardLines(entry, result.stack)),
      el("p", { className: "links" }, save, " ", reuse),
    ),
  );
}

function smallTile(entry, { run, result }) {
  if (entry.status !== "released") {
    const { kind, title } = describeRefusal(entry, result);
    if (entry.all)
      return el("p", { className: `tile note ${kind}` }, icon(kind), el("span", {}, title));
    const word = entry.status === "blocked" ? "blocked" : "failed";
    const box = el("div", { className: `box ${kind}` }, icon(kind));
    return el(
      "figure",
      { className: "tile" },
      box,
      el("figcaption", {}, `seed ${entry.seed} ${word}`),
    );
  }
  const name = fileName(run.request, result.stack, entry);
  const image = picture(entry, run, result);
  const link = el("a", { href: entry.url, download: name, title: "Download" }, image);
  return el("figure", { className: "tile" }, link, el("figcaption", {}, `seed ${entry.seed}`));
}

function picture(entry, { request }, { stack }) {
  const alt = `${request.prompt}, ${stack.name}, seed ${entry.seed}`;
  const { width, height } = entry;
  return el("img", {
    src: entry.url,
    alt,
    width,
    height,
    className: Math.max(width, height) < 256 ? "tiny" : "",
  });
}

function guardLines(entry, stack) {
  const records = entry.guards ?? stack.guards.map(({ name }) => ({ guard: name, action: "none" }));
  if (records.length === 0) return [el("li", { className: "warning" }, "no guards")];
  return records.map(({ guard, action }) => el("li", {}, `${guard} ${ACTIONS[action] ?? action}`));
}

function meta({ request, results }) {
  const { n, steps, guidance, negative, image, strength } = request;
  const [{ stack, seconds }, second] = results;
  const parts = [
    second ? null : stack.name,
    n > 1 ? `${n} images` : null,
    steps === null ? null : `${steps} steps`,
    guidance === null ? null : `guidance ${guidance}`,
    negative ? `negative prompt “${negative}”` : null,
    image ? `from ${image.name}, strength ${strength}` : null,
    !second && seconds ? `${seconds.toFixed(1)} s` : null,
  ];
  return parts.filter(Boolean).join(" · ");
}

/** Return a name such as `a-castle_calm_seed-7.png`, in letters that every system takes. */
export function fileName(request, stack, entry) {
  const words = slug(request.prompt, 60) || "image";
  return `${words}_${slug(stack.name, 30) || "stack"}_seed-${entry.seed}.${entry.type}`;
}

function slug(text, length) {
  const plain = text.normalize("NFKD").replace(/[\u0300-\u036f]/g, "");
  return plain
    .toLowerCase()
    .replace(/[^a-z0-9.]+/g, "-")
    .replace(/^[-.]+/, "")
    .slice(0, length)
    .replace(/[-.]+$/, "");
}
