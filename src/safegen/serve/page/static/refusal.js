// Cards of images and requests that are not released: stage, guard, judge, score and request id.

import { el, format, icon, sentence, shorten } from "./elements.js";

export function refusalCard(entry, result, level) {
  const { kind, title, text } = describeRefusal(entry, result);
  const all = entry.all ?? [entry];
  const several = all.length > 1 && all.some((each) => typeof each.score === "number");
  const rows = [
    ["Stage", { input: "before generation", output: "after generation" }[entry.stage]],
    ["Guard", entry.guard],
    ["Judge", entry.judge && shorten(entry.judge)],
    ["Reason", entry.reason],
    ["Categories", entry.categories?.join(", ")],
    ["Seed", all.length > 1 || entry.status === "error" ? null : entry.seed],
    ["Code", entry.status === "error" ? result.error?.code : null],
    ["Try again", result.error?.retryAfter ? `after ${result.error.retryAfter} s` : null],
    ["Request", result.requestId],
  ];
  const pair = ([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)));
  return el(
    "div",
    { className: `tile problem ${kind}${entry.all ? " whole" : ""}` },
    el(`h${level}`, {}, icon(kind), title),
    el("p", {}, text),
    several ? all.map((each) => scoreBar(each, `seed ${each.seed}: `)) : scoreBar(entry, ""),
    el(
      "dl",
      {},
      rows.filter(([, value]) => value !== null && value !== undefined && value !== "").map(pair),
    ),
  );
}

/** Return the kind, the title and the text of an image, or of a request, that is not released. */
export function describeRefusal(entry, { error }) {
  const { status, stage, guard, all } = entry;
  const many = all?.length > 1;
  const by = guard ?? "a guard";
  if (status === "blocked" && stage === "input" && entry.action !== "block")
    return {
      kind: "blocked",
      title: "Start image blocked",
      text: `${by} judged the start image. Nothing was generated.`,
    };
  if (status === "blocked" && stage === "input")
    return {
      kind: "blocked",
      title: "Prompt blocked",
      text: `${by} stopped the request. Nothing was generated.`,
    };
  if (status === "blocked") {
    const title = many ? `${all.length} images blocked` : "Image blocked";
    return {
      kind: "blocked",
      title,
      text: `${by} judged ${many ? "them" : "it"} after generation. Nothing is released.`,
    };
  }
  if (status === "fault") {
    const title = many ? "Images withheld: a check failed" : "Image withheld: a check failed";
    return {
      kind: "failed",
      title,
      text: "No image is released unless every guard has judged it.",
    };
  }
  return { kind: "failed", title: errorTitle(error), text: sentence(error?.message ?? "") };
}

export function errorTitle(error) {
  if (error?.status === 0) return "No answer";
  if (error?.code === "cancelled") return "Cancelled";
  const titles = {
    401: "Token needed",
    403: "Not allowed",
    413: "Request too large",
    429: "Too many requests",
  };
  return (
    titles[error?.status] ??
    (error?.status < 500 && error?.status >= 400 ? "Request refused" : "Failed")
  );
}

export function canRetry(error) {
  return (
    Boolean(error) &&
    (error.status === 0 ||
      error.status === 429 ||
      error.status >= 500 ||
      error.code === "cancelled")
  );
}

function scoreBar({ score, threshold }, name) {
  if (typeof score !== "number") return null;
  const known = typeof threshold === "number";
  const text = `${name}score ${format(score)}${known ? `, blocked from ${format(threshold)}` : ""}`;
  const top = Math.max(1, score, known ? threshold : 0);
  if (score < 0 || (known && threshold < 0)) return el("p", { className: "score" }, text);
  const bar = el(
    "div",
    { className: "track", role: "img", "aria-label": text },
    el("i", { className: "fill" }),
  );
  bar.style.setProperty("--score", `${(100 * score) / top}%`);
  if (known) {
    bar.append(el("i", { className: "tick" }));
    bar.style.setProperty("--threshold", `${(100 * threshold) / top}%`);
  }
  return el("div", { className: "score" }, bar, el("span", { "aria-hidden": "true" }, text));
}
