// Requests to the server, and the bearer token. Addresses are relative: the page may be behind a path prefix.

const TOKEN = "safegen-token";
const KNOWN = ["released", "blocked", "fault"];

let token = readToken();

function readToken() {
  try {
    return sessionStorage.getItem(TOKEN) ?? "";
  } catch {
    return ""; // storage is blocked: the token lives as long as the page
  }
}

export function hasToken() {
  return token !== "";
}

export function setToken(value) {
  token = value;
  try {
    if (value) sessionStorage.setItem(TOKEN, value);
    else sessionStorage.removeItem(TOKEN);
  } catch {
    // see readToken
  }
}

/** Return {status, body, requestId, retryAfter}; status 0 if there is no answer. Throws only AbortError. */
async function send(path, { json, signal } = {}) {
  const headers = token ? { authorization: `Bearer ${token}` } : {};
  if (json) headers["content-type"] = "application/json";
  const options = { method: json ? "POST" : "GET", headers, signal, cache: "no-store", redirect: "error" };
  if (json) options.body = JSON.stringify(json);
  try {
    const response = await fetch(path, options);
    const body = await response.json().catch((error) => {
      if (error.name === "AbortError") throw error;
      return null;
    });
    const { status, headers: got } = response;
    return { status, body, requestId: got.get("x-request-id"), retryAfter: got.get("retry-after") };
  } catch (error) {
    if (error.name === "AbortError") throw error;
    return { status: 0, body: null, requestId: null, retryAfter: null };
  }
}

export function getConfig() {
  return send("playground.json");
}

/** Ask one stack for the images of a request. Returns {stack, seconds, requestId, tiles, error}. */
export async function generate(request, stack, signal) {
  const { prompt, n, width, height, seed, steps, guidance, negative } = request;
  const json = {
    prompt,
    n,
    size: `${width}x${height}`,
    model: stack,
    response_format: "b64_json",
    safegen: { seed, steps, guidance, ...(negative ? { negative_prompt: negative } : {}) },
  };
  const started = performance.now();
  const answer = await send("v1/images/generations", { json, signal });
  const seconds = (performance.now() - started) / 1000;
  return { stack, seconds, ...readAnswer(answer) };
}

/** Match the images of an answer to the server's account of them. Without an account, no image. */
function readAnswer({ status, body, requestId, retryAfter }) {
  const safegen = body?.safegen ?? {};
  const entries = Array.isArray(safegen.images) ? safegen.images : [];
  const common = { requestId: safegen.request_id ?? requestId };
  if (status !== 200) {
    const error = body?.error ?? { message: describe(status), code: null };
    return { ...common, tiles: entries, error: { ...error, status, retryAfter } };
  }
  const data = Array.isArray(body?.data) ? body.data : [];
  const released = entries.filter((entry) => entry.status === "released");
  const sound = entries.every((entry) => KNOWN.includes(entry.status));
  if (!sound || released.length === 0 || released.length !== data.length || !data.every((d) => d.b64_json)) {
    const message = "the answer does not say what the guards did with each image. None is displayed.";
    return { ...common, tiles: [], error: { message, status, code: "malformed" } };
  }
  const left = [...data];
  const tiles = entries.map((entry) =>
    entry.status === "released" ? { ...entry, ...decode(left.shift().b64_json) } : entry,
  );
  return { ...common, tiles, error: null };
}

function describe(status) {
  return status === 0 ? "the server does not answer" : `the server answered with status ${status}`;
}

function decode(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const type = { 0x89: "png", 0xff: "jpeg", 0x52: "webp" }[bytes[0]] ?? "png";
  return { url: URL.createObjectURL(new Blob([bytes], { type: `image/${type}` })), type };
}
