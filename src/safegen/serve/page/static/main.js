// The playground: the form, one run at a time, and the earlier runs.

import { generate, getConfig, hasToken, setToken } from "./api.js";
import { el } from "./elements.js";
import { emptyState, finishedRun, pendingRun, stackPath, summarize } from "./view.js";

const KEEP = 40; // earlier runs, and so images, in memory
const TEXTS = ["prompt", "negative"];
const NUMBERS = ["n", "seed", "width", "height", "steps", "guidance", "strength"];
const FIELDS = [...TEXTS, ...NUMBERS];

const $ = (id) => document.getElementById(id);
const fields = Object.fromEntries(FIELDS.map((name) => [name, $(name)]));

let config = null;
let current = null; // the finished run that the page shows as the answer
let running = null; // AbortController of the run in progress
let waiting = null; // what to do once there is a token
const earlier = [];

const stackByName = (name) => config.stacks.find((stack) => stack.name === name);
const say = (text) => ($("status").textContent = text);

async function start() {
  const { status, body } = await getConfig();
  if (status === 401) return askForToken(start, hasToken() ? "The server refused this token." : "");
  if (status === 503) {
    const { code, message } = body?.error ?? {};
    const why = code === "starting" ? "The server is loading its stacks." : message ?? "";
    showNotice(`${why} This page opens by itself when the server is ready.`.trim());
    return setTimeout(start, 2000);
  }
  if (status !== 200)
    return showNotice(body?.error?.message ?? "The server does not answer.", start);
  config = body;
  fillForm();
  showEmpty();
}

function fillForm() {
  const { stacks, limits, defaults, concept } = config;
  $("stack").replaceChildren(...stacks.map(({ name }) => el("option", { value: name }, name)));
  for (const [name, limit] of [
    ["n", limits.images],
    ["width", limits.side],
    ["height", limits.side],
    ["steps", limits.steps],
  ])
    fields[name].max = limit;
  for (const name of TEXTS) fields[name].maxLength = limits.prompt_chars;
  for (const name of ["steps", "guidance"]) fields[name].value = defaults?.[name] ?? "";
  if (concept)
    $("about").textContent =
      `Images from the stacks of this server, and what each guard did. Concept: ${concept}.`;
  if (hasToken()) $("about").append(" ", forgetButton());
  showStack();
  $("form").hidden = false;
  if (waiting) fields.prompt.focus();
}

function showStack() {
  const stack = stackByName($("stack").value);
  $("path").replaceChildren(...stackPath(stack));
  const others = config.stacks.filter((each) => each !== stack && each.model === stack.model);
  const option = ({ name, is_base }) =>
    el("option", { value: name }, is_base ? `${name} (base model)` : name);
  $("compare").replaceChildren(el("option", { value: "" }, "nothing"), ...others.map(option));
  $("compare-field").hidden = others.length === 0;
  for (const [k, name] of ["width", "height"].entries()) fields[name].value = stack.size[k] || "";
}

function showStart() {
  const [image] = $("image").files;
  if ($("preview").src) URL.revokeObjectURL($("preview").src);
  $("preview").removeAttribute("src");
  if (image) $("preview").src = URL.createObjectURL(image);
  $("start").hidden = !image;
  fields.strength.disabled = !image;
}

/** Put a file, or none, into the field of the start image. */
function setStart(image) {
  const files = new DataTransfer();
  if (image) files.items.add(image);
  $("image").files = files.files;
  showStart();
}

// --- runs ------------------------------------------------------------------------------------

function readForm() {
  const text = (name) => fields[name].value;
  const number = (name) => (text(name) === "" ? null : Number(text(name)));
  const read = (name) => (TEXTS.includes(name) ? text(name) : number(name));
  const request = Object.fromEntries(FIELDS.map((name) => [name, read(name)]));
  if (request.seed === null) request.seed = crypto.getRandomValues(new Uint32Array(1))[0];
  request.stack = $("stack").value;
  request.compare = $("compare").value;
  request.image = $("image").files[0] ?? null;
  return request;
}

function writeForm(request) {
  $("stack").value = request.stack;
  showStack();
  for (const name of FIELDS) fields[name].value = request[name] ?? "";
  $("compare").value = request.compare;
  setStart(request.image);
  $("settings").open = true;
  fields.prompt.focus();
  say("The form has these settings.");
}

async function run(request) {
  if (running) return;
  const stacks = [request.stack, request.compare].filter(Boolean).map(stackByName);
  const controller = new AbortController();
  running = controller;
  retire(); // from here on, no earlier image stands where the answer goes
  const pending = pendingRun({ request, stacks }, () => controller.abort());
  $("current").replaceChildren(pending);
  bringIntoView();
  $("generate").setAttribute("aria-disabled", "true");
  say("Generating.");
  const stop = startClock(pending.querySelector(".clock"));
  const results = await Promise.all(stacks.map((each) => ask(request, each, controller.signal)));
  stop();
  running = null;
  $("generate").removeAttribute("aria-disabled");
  finish({ request, results });
}

async function ask(request, stack, signal) {
  try {
    return { ...(await generate(request, stack.name, signal)), stack };
  } catch (error) {
    const known = error.name === "AbortError";
    if (!known) console.error(error);
    const message = known
      ? "You cancelled this request. No image of it is displayed."
      : "This page failed.";
    return {
      stack,
      seconds: 0,
      tiles: [],
      error: { status: null, code: known ? "cancelled" : "page", message },
    };
  }
}

function finish(done) {
  const hadFocus = $("current").contains(document.activeElement);
  current = done;
  $("current").replaceChildren(finishedRun(done, { onReuse: writeForm, onRetry: run }));
  if (hadFocus) $("current").focus();
  say(summarize(done));
  if (done.results.some(({ error }) => error?.status === 401)) {
    const text = hasToken() ? "The server refused this token." : "";
    askForToken(() => run(done.request), text);
  }
}

/** Move the answer to the earlier runs. */
function retire() {
  if (!current) return;
  const node = finishedRun(current, { small: true, onReuse: writeForm });
  earlier.unshift({ run: current, node });
  $("runs").prepend(node);
  $("history").hidden = false;
  current = null;
  for (const old of earlier.splice(KEEP)) forget(old);
}

function forget({ run: old, node }) {
  for (const { tiles } of old.results)
    for (const { url } of tiles) if (url) URL.revokeObjectURL(url);
  node.remove();
}

function startClock(node) {
  const from = performance.now();
  const timer = setInterval(
    () => (node.textContent = `${((performance.now() - from) / 1000).toFixed(1)} s`),
    100,
  );
  return () => clearInterval(timer);
}

function bringIntoView() {
  const { top } = $("current").getBoundingClientRect();
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (top > innerHeight * 0.6 || top < 0)
    $("current").scrollIntoView({ block: "start", behavior: calm ? "auto" : "smooth" });
}

// --- other states ----------------------------------------------------------------------------

function showEmpty() {
  const onTry = (prompt) => {
    fields.prompt.value = prompt;
    $("form").requestSubmit();
  };
  $("current").replaceChildren(emptyState(config.examples, onTry));
}

function showNotice(text, onRetry) {
  const button = onRetry ? el("button", { type: "button" }, "Try again") : null;
  button?.addEventListener("click", onRetry);
  $("current").replaceChildren(el("div", { className: "empty" }, el("p", {}, text), button));
  say(text);
}

function askForToken(then, text) {
  waiting = then;
  $("token-form").hidden = false;
  if (text) $("token-note").textContent = `${text} Give another one.`;
  $("token").value = "";
  $("token").focus();
  say(text || "This server asks for a token.");
}

function forgetButton() {
  const button = el("button", { type: "button", className: "plain" }, "Forget the token");
  button.addEventListener("click", () => {
    setToken("");
    location.reload();
  });
  return button;
}

// --- events ----------------------------------------------------------------------------------

$("stack").addEventListener("change", showStack);
$("image").addEventListener("change", showStart);
$("remove").addEventListener("click", () => {
  setStart(null);
  $("image").focus();
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (config) run(readForm());
});
$("form").addEventListener("invalid", () => ($("settings").open = true), true);
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setToken($("token").value.trim());
  $("token-form").hidden = true;
  if (config) fields.prompt.focus();
  waiting?.();
});
$("clear").addEventListener("click", () => {
  earlier.splice(0).forEach(forget);
  $("history").hidden = true;
  fields.prompt.focus();
  say("Earlier images are cleared.");
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.isComposing) return;
  if ($("token-form").contains(event.target)) return;
  event.preventDefault();
  $("form").requestSubmit();
});

showStart();
$("settings").open = matchMedia("(min-width: 900px)").matches;
start();
