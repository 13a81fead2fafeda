"""Blind review within the page: both answers as A and B in random order, rated by keys, ratings to download.

The page needs no server. Which answer is whose is drawn by the browser, prompt by prompt; it is shown nowhere while the
review lasts, and the tables that tell are hidden. Ratings are kept by the browser too, where it allows that.
"""

import json

from convert_w4a8.evaluation.results import Evaluation

STYLE = """
#review { display: none; }
body.reviewing > :not(#review) { display: none; }
body.reviewing #review { display: block; }
body.reviewing { max-width: 90rem; }
#review .bar, #begin { display: flex; gap: 0.6rem; flex-wrap: wrap; align-items: center; margin: 0.8rem 0; }
button { font: inherit; padding: 0.35rem 0.9rem; border: 1px solid #b8c0ca; border-radius: 6px; background: #f5f7f9;
  cursor: pointer; }
button:focus-visible { outline: 3px solid #0072B2; }
button.chosen { background: #0072B2; color: #fff; border-color: #0072B2; }
kbd { border: 1px solid #b8c0ca; border-radius: 4px; padding: 0 0.3rem; font-size: 0.85em; background: #fff;
  color: #1c2430; }
"""
_BODY = """
<div id="review" aria-live="polite">
<h2>Which answer is better? <span id="place"></span></h2>
<pre class="text" id="asked"></pre>
<div class="sides"><div><h3>A</h3><pre class="text" id="a"></pre></div>
<div><h3>B</h3><pre class="text" id="b"></pre></div></div>
<div class="bar" id="choices">
<button data-choice="a"><kbd>a</kbd> A is better</button>
<button data-choice="b"><kbd>b</kbd> B is better</button>
<button data-choice="both"><kbd>s</kbd> equally good</button>
<button data-choice="neither"><kbd>n</kbd> equally bad</button></div>
<div class="bar"><button id="back"><kbd>←</kbd> back</button><button id="next"><kbd>→</kbd> next</button>
<button id="save"><kbd>d</kbd> download ratings</button><button id="end"><kbd>Esc</kbd> end the review</button></div>
</div>
"""
_SCRIPT = """
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("review-data").textContent);
  const pairs = data.pairs, $ = (id) => document.getElementById(id), store = "w4a8-review-" + data.answers;
  let at = 0, state = { swapped: [], chosen: {} };
  try { state = JSON.parse(localStorage.getItem(store)) || state; } catch (_) { /* kept in the page alone */ }
  const bits = crypto.getRandomValues(new Uint8Array(pairs.length));
  while (state.swapped.length < pairs.length) state.swapped.push(bits[state.swapped.length] & 1);
  const keep = () => { try { localStorage.setItem(store, JSON.stringify(state)); } catch (_) { /* the same */ } };
  const show = () => {
    const pair = pairs[at], swapped = state.swapped[at], rated = Object.keys(state.chosen).length;
    $("place").textContent = `${at + 1} of ${pairs.length}, ${rated} rated`;
    $("asked").textContent = pair.asked;
    $("a").textContent = swapped ? pair.candidate : pair.baseline;
    $("b").textContent = swapped ? pair.baseline : pair.candidate;
    for (const button of $("choices").children)
      button.classList.toggle("chosen", state.chosen[at] === button.dataset.choice);
  };
  const move = (by) => { at = Math.min(pairs.length - 1, Math.max(0, at + by)); show(); };
  const choose = (choice) => { state.chosen[at] = choice; keep(); show(); move(1); };
  const preferred = (index) => {
    const choice = state.chosen[index];
    if (choice === "both" || choice === "neither") return choice;
    return (choice === "a") === Boolean(state.swapped[index]) ? "candidate" : "baseline";
  };
  const ratings = () => ({ answers: data.answers, ratings: Object.keys(state.chosen).map(Number).sort((x, y) => x - y)
    .map((index) => ({ prompt: pairs[index].prompt, sample: pairs[index].sample, preferred: preferred(index) })) });
  const save = () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(ratings(), null, 1)], { type: "application/json" }));
    link.download = "ratings.json";
    link.click();
  };
  const begin = (on) => { document.body.classList.toggle("reviewing", on); if (on) show(); window.scrollTo(0, 0); };
  const keys = { a: () => choose("a"), b: () => choose("b"), s: () => choose("both"), n: () => choose("neither"),
    d: save, ArrowLeft: () => move(-1), ArrowRight: () => move(1), Escape: () => begin(false) };
  document.addEventListener("keydown", (event) => {
    const act = keys[event.key];
    const other = event.ctrlKey || event.metaKey || event.altKey;
    if (!act || other || !document.body.classList.contains("reviewing")) return;
    event.preventDefault();
    act();
  });
  for (const button of $("choices").children) button.onclick = () => choose(button.dataset.choice);
  $("back").onclick = keys.ArrowLeft; $("next").onclick = keys.ArrowRight; $("save").onclick = save;
  $("end").onclick = keys.Escape; $("start").onclick = () => begin(true);
})();
"""


def pairs(evaluation: Evaluation) -> list[dict[str, object]]:
    """Return what can be rated: answers that differ."""
    return [
        {
            "prompt": one.prompt.id,
            "sample": one.sample,
            "asked": one.prompt.shown,
            "baseline": one.answers["baseline"].shown,
            "candidate": one.answers["candidate"].shown,
        }
        for one in evaluation.compared
        if one.difference is not None
    ]


def begin(evaluation: Evaluation) -> str:
    """Return the button that begins the review, as HTML; nothing where no answers differ."""
    number = len(pairs(evaluation))
    if not number:
        return ""
    return (
        f'<p id="begin"><button id="start">Review blind</button> {number} pairs of answers differ. Give what you'
        " download to --ratings.</p>"
    )


def review(evaluation: Evaluation) -> str:
    """Return the review with its data and program, as HTML; nothing where no answers differ."""
    found = pairs(evaluation)
    if not found:
        return ""
    data = json.dumps({"answers": evaluation.digest, "pairs": found}).replace("<", "\\u003c")
    return f'{_BODY}<script type="application/json" id="review-data">{data}</script>\n<script>{_SCRIPT}</script>'
