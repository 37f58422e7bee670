// Requests to the server, and the bearer token.
// Addresses are relative: the page may be behind a path prefix.

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

/**
 * Return {status, body, requestId, retryAfter}; the status is 0 if there is no answer.
 * Throws AbortError only.
 */
async function send(path, { json, form, signal } = {}) {
  const headers = token ? { authorization: `Bearer ${token}` } : {};
  if (json) headers["content-type"] = "application/json";
  const body = json ? JSON.stringify(json) : form;
  try {
    const method = body ? "POST" : "GET";
    const response = await fetch(path, {
      method,
      headers,
      body,
      signal,
      cache: "no-store",
      redirect: "error",
    });
    const content = await response.json().catch((error) => {
      if (error.name === "AbortError") throw error;
      return null;
    });
    const { status, headers: got } = response;
    return {
      status,
      body: content,
      requestId: got.get("x-request-id"),
      retryAfter: got.get("retry-after"),
    };
  } catch (error) {
    if (error.name === "AbortError") throw error;
    return { status: 0, body: null, requestId: null, retryAfter: null };
  }
}

export function getConfig() {
  return send("playground.json");
}

/** Ask one stack for the images of a request. Returns {seconds, requestId, tiles, error}. */
export async function generate(request, stack, signal) {
  const { prompt, n, width, height, seed, steps, guidance, negative, image, strength } = request;
  const size = width || height ? `${width || height}x${height || width}` : "auto";
  const fields = { prompt, n, size, model: stack, response_format: "b64_json" };
  const settings = {
    seed,
    steps,
    guidance,
    negative_prompt: negative || null,
    strength: image ? strength : null,
  };
  const safegen = Object.fromEntries(
    Object.entries(settings).filter(([, value]) => value !== null),
  );
  const started = performance.now();
  const answer = image
    ? await send("v1/images/edits", { form: toForm(image, fields, safegen), signal })
    : await send("v1/images/generations", { json: { ...fields, safegen }, signal });
  const seconds = (performance.now() - started) / 1000;
  return { seconds, ...(await readAnswer(answer)) };
}

function toForm(image, fields, safegen) {
  const form = new FormData();
  form.append("image", image);
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  form.append("safegen", JSON.stringify(safegen));
  return form;
}

/** Match the images of an answer to the server's account of them. Without an account, no image. */
async function readAnswer({ status, body, requestId, retryAfter }) {
  const safegen = body?.safegen ?? {};
  const entries = Array.isArray(safegen.images) ? safegen.images : [];
  const common = { requestId: safegen.request_id ?? requestId };
  if (status !== 200) {
    const error = body?.error ?? { message: describe(status), code: null };
    const tiles = entries.filter((entry) => entry && entry.status !== "released");
    return { ...common, tiles, error: { ...error, status, retryAfter } };
  }
  const data = Array.isArray(body?.data) ? body.data.map((each) => each?.b64_json) : [];
  const released = entries.filter((entry) => entry?.status === "released");
  const sound = entries.every((entry) => KNOWN.includes(entry?.status));
  if (!sound || released.length === 0 || released.length !== data.length)
    return { ...common, ...malformed() };
  try {
    const images = await Promise.all(data.map(decode));
    const tiles = entries.map((entry) =>
      entry.status === "released" ? { ...entry, ...images.shift() } : entry,
    );
    return { ...common, tiles, error: null };
  } catch {
    return { ...common, ...malformed() };
  }
}

function malformed() {
  const message =
    "the answer does not say what became of each image, or an image is damaged. None is displayed.";
  return { tiles: [], error: { message, status: 200, code: "malformed" } };
}

function describe(status) {
  return status === 0 ? "the server does not answer" : `the server answered with status ${status}`;
}

async function decode(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const type = { 0x89: "png", 0xff: "jpeg", 0x52: "webp" }[bytes[0]];
  const blob = new Blob([bytes], { type: `image/${type}` });
  const bitmap = await createImageBitmap(blob); // fails unless it is an image
  const { width, height } = bitmap;
  bitmap.close();
  return { url: URL.createObjectURL(blob), type, width, height };
}
