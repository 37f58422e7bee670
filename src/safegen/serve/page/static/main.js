// The playground: the form, one run at a time, and the earlier runs.

import { generate, getConfig, hasToken, setToken } from "./api.js";
import { el, emptyState, finishedRun, pendingRun, stackPath, summarize } from "./view.js";

const KEEP = 40; // earlier runs, and so images, in memory
const FIELDS = ["prompt", "n", "seed", "width", "height", "steps", "guidance", "negative"];
const NUMBERS = new Set(["n", "seed", "width", "height", "steps", "guidance"]);

const $ = (id) => document.getElementById(id);
const fields = Object.fromEntries(FIELDS.map((name) => [name, $(name)]));

let config = null;
let current = null; // the finished run that the page shows as the answer
let running = null; // {controller} of the run in progress
let waiting = null; // what to do once there is a token
const earlier = [];

const stackByName = (name) => config.stacks.find((stack) => stack.name === name);
const say = (text) => ($("status").textContent = text);

async function start() {
  const { status, body } = await getConfig();
  if (status === 401) return askForToken(start, hasToken() ? "The server refused this token." : "");
  if (status === 503) {
    showNotice(body?.error?.message ?? "The server is not ready.");
    return setTimeout(start, 2000);
  }
  if (status !== 200) return showNotice("The server does not answer.", start);
  config = body;
  fillForm();
  showEmpty();
}

function fillForm() {
  const { stacks, limits, defaults, concept } = config;
  $("stack").replaceChildren(...stacks.map(({ name }) => el("option", { value: name }, name)));
  for (const [name, limit] of [["n", limits.images], ["width", limits.side], ["height", limits.side], ["steps", limits.steps]])
    fields[name].max = limit;
  for (const name of ["prompt", "negative"]) fields[name].maxLength = limits.prompt_chars;
  fields.steps.value = defaults.steps;
  fields.guidance.value = defaults.guidance;
  [fields.width.value, fields.height.value] = stacks[0].size;
  if (concept) $("about").textContent = `Images from the stacks of this server, and what each guard did. Concept: ${concept}.`;
  if (hasToken()) $("about").append(" ", forgetButton());
  showStack();
}

function showStack() {
  const stack = stackByName($("stack").value);
  $("path").replaceChildren(...stackPath(stack));
  $("compare-field").hidden = !stack.base;
}

// --- runs -----------------------------------------------------------------------------------------

function readForm() {
  const read = (name) => (NUMBERS.has(name) ? Number(fields[name].value) : fields[name].value);
  const request = Object.fromEntries(FIELDS.map((name) => [name, read(name)]));
  if (fields.seed.value === "") request.seed = crypto.getRandomValues(new Uint32Array(1))[0];
  request.stack = $("stack").value;
  request.compare = $("compare").checked && Boolean(stackByName(request.stack).base);
  return request;
}

function writeForm(request) {
  for (const name of FIELDS) fields[name].value = request[name];
  $("stack").value = request.stack;
  showStack();
  $("compare").checked = request.compare;
  $("settings").open = true;
  fields.prompt.focus();
  say("The form has these settings.");
}

async function run(request) {
  if (running) return;
  const stack = stackByName(request.stack);
  const stacks = request.compare ? [stack, stackByName(stack.base)] : [stack];
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
    const message = known ? "You cancelled this request. No image of it is displayed." : "This page failed.";
    return { stack, seconds: 0, tiles: [], error: { status: null, code: known ? "cancelled" : "page", message } };
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
  for (const { tiles } of old.results) for (const { url } of tiles) if (url) URL.revokeObjectURL(url);
  node.remove();
}

function startClock(node) {
  const from = performance.now();
  const timer = setInterval(() => (node.textContent = `${((performance.now() - from) / 1000).toFixed(1)} s`), 100);
  return () => clearInterval(timer);
}

function bringIntoView() {
  const { top } = $("current").getBoundingClientRect();
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (top > innerHeight * 0.6 || top < 0)
    $("current").scrollIntoView({ block: "start", behavior: calm ? "auto" : "smooth" });
}

// --- other states -----------------------------------------------------------------------------------

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

// --- events -----------------------------------------------------------------------------------------

$("stack").addEventListener("change", () => {
  showStack();
  [fields.width.value, fields.height.value] = stackByName($("stack").value).size;
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
  fields.prompt.focus();
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
addEventListener("beforeunload", () => running?.abort());

$("settings").open = matchMedia("(min-width: 900px)").matches;
start();
