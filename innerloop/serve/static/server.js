// The server's API. Whatever goes wrong is a Problem: a sentence for a person.

export class Problem extends Error {
  constructor(sentence, status = 0) {
    super(sentence);
    this.status = status;
  }
}

export const info = () => call("api/info");

/**
 * @param {[string, string[]][]} classes names, each with data: URLs
 * @param {"classes" | "images" | null} weighing what counts the same; null for the server's default
 */
export const adapt = (classes, weighing) =>
  call(`api/adapt${weighing ? `?weighing=${weighing}` : ""}`, post({ classes: Object.fromEntries(classes) }));

export const predict = (id, url, signal) => call(`api/predict/${id}`, { ...post({ images: [url] }), signal });

/** Nobody waits for this one, nor minds if it fails. */
export function forget(id) {
  fetch(`api/classifiers/${id}`, { method: "DELETE", keepalive: true }).catch(() => {});
}

function post(body) {
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
}

async function call(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not answer. Is innerloop serve still running?");
  }
  let answer;
  try {
    answer = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(`The server's answer (status ${response.status}) makes no sense; try again.`, response.status);
  }
  if (!response.ok) throw new Problem(answer.error ?? `The server refused (status ${response.status}).`, response.status);
  return answer;
}
