"""The page of an evaluation: what it says, and what a browser makes of it."""

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert_w4a8.evaluation import page, verdict
from convert_w4a8.evaluation.answer import SIDES, Answer
from convert_w4a8.evaluation.differences import marked
from convert_w4a8.evaluation.metrics import Room, as_dict
from convert_w4a8.evaluation.plots import latencies
from convert_w4a8.evaluation.prompts import Prompt
from convert_w4a8.evaluation.ratings import read_ratings
from convert_w4a8.evaluation.results import Compared, Evaluation, Measure, first_difference, measure
from convert_w4a8.evaluation.text import as_markdown

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DIGEST = "0123abcd"


def make(texts: list[tuple[str, str]]) -> Evaluation:
    """Return an evaluation of these answers, baseline's and candidate's."""
    compared = []
    for number, (before, after) in enumerate(texts):
        prompt = Prompt(f"p{number}", f"question {number}", None, None, (), ("tag",), None)
        answers = {
            "baseline": Answer("baseline", prompt.id, 0, before),
            "candidate": Answer("candidate", prompt.id, 0, after),
        }
        scores: Any = {"baseline": (), "candidate": ()}
        compared.append(Compared(prompt, 0, answers, scores, first_difference(before, after)))  # type: ignore[arg-type]
    measure = {
        "baseline": Measure((0.1, 0.2, 0.4), (0.2, 0.4, 0.4)),
        "candidate": Measure((0.05, 0.1), (0.05, 0.1, 0.1)),
    }
    return Evaluation(
        places={"baseline": "http://a", "candidate": "http://b"},
        models={"baseline": "m", "candidate": ""},
        verdict=verdict.decide([], verdict.Tolerance(0.05, 0.05, {})),
        compared=tuple(compared),
        failures=(),
        speed={"ttft": measure, "tpot": measure, "rate": measure},  # type: ignore[dict-item]
        agreement=0.0,
        losses=(),
        room={},
        predicted={},
        missing=("something",),
        tags={one.prompt.id: one.prompt.tags for one in compared},
        rated=0,
        digest=DIGEST,
        length={"baseline": Measure((), None), "candidate": Measure((), None)},
        cut_off={"baseline": None, "candidate": None},
        production={},
    )


def plain(text: str) -> str:
    """Return what a reader sees of HTML."""
    return html.unescape(re.sub(r"</?mark>", "", text))


@given(st.text("ab c.\n", max_size=40), st.text("ab c.\n", max_size=40))
def test_marks_take_nothing_away(before: str, after: str) -> None:
    """Both texts are whole, equal ones have no marks, and what is not marked is the same."""
    left, right = marked(before, after)
    assert (plain(left), plain(right)) == (before, after)
    assert ("<mark>" in left + right) == (before != after)
    kept = [re.sub(r"<mark>.*?</mark>", "", side, flags=re.DOTALL) for side in (left, right)]
    assert kept[0] == kept[1]


def test_long_texts_are_marked_quickly() -> None:
    """From the first difference on."""
    left, right = marked("a b " * 3000, "a b " * 1000 + "c " * 4000)
    assert left.count("<mark>") == right.count("<mark>") == 1
    assert plain(right).startswith("a b " * 1000 + "c ")


def test_nothing_that_a_model_says_is_code() -> None:
    """Tags, the end of the data, controls."""
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u202e\x1b[31m"
    text = page.render(make([(evil, "fine"), ("a", evil)]))
    assert "<script>alert" not in text
    assert "<img" not in text
    assert "\u202e" not in text
    assert "\x1b" not in text
    assert not re.search(r'(?:src|href)="?(?:https?:)?//', text)


PROBE = """
<script>
localStorage.clear();
const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const seen = { shown: [], texts: [] };
seen.hidden_before = getComputedStyle(document.getElementById("review")).display;
press("a");  // before the review begins, keys do nothing
document.getElementById("start").click();
seen.review = getComputedStyle(document.getElementById("review")).display;
seen.told = [...document.querySelectorAll("body > :not(#review)")].filter((e) => e.tagName !== "SCRIPT")
  .map((e) => getComputedStyle(e).display).filter((d) => d !== "none").length;
const sides = () => [document.getElementById("a").textContent, document.getElementById("b").textContent];
const plan = ["better", "better", "s", "n"];
let blob = null;
URL.createObjectURL = (value) => { blob = value; return "blob:"; };
HTMLAnchorElement.prototype.click = function () { seen.name = this.download; };
for (let n = 0; n < 40; n++) {
  const [a, b] = sides();
  seen.texts.push([a, b]);
  const choice = plan[n % 4];
  press(choice === "better" ? (a.startsWith("candidate") ? "a" : "b") : choice);
}
press("ArrowLeft"); seen.place = document.getElementById("place").textContent;
document.querySelector("[data-choice=both]").click();
press("d");
press("Escape");
seen.after = getComputedStyle(document.getElementById("review")).display;
blob.text().then((text) => { const out = document.createElement("pre"); out.id = "probe";
  out.textContent = JSON.stringify({ ...seen, file: text }); document.body.append(out); });
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="BROWSER TEST NOT RUN: there is no chromium")
def test_blind_review_in_a_browser(tmp_path: Path) -> None:
    """Keys rate, the order is drawn for each prompt, nothing tells which is whose, and the file can be read."""
    texts = [(f"baseline says {n}", f"candidate says {n}") for n in range(40)]
    file = tmp_path / "page.html"
    file.write_text(
        page.render(make([*texts, ("same", "same")])).replace("</body>", PROBE + "</body>"), encoding="utf-8"
    )
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=20000", "--dump-dom", file.as_uri()]
    environment = {**os.environ, "HOME": str(tmp_path)}
    dumped = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=environment).stdout
    match = re.search(r'<pre id="probe">(.*?)</pre>', dumped, re.DOTALL)
    assert match, dumped[-2000:]
    seen = json.loads(html.unescape(match[1]))
    assert (seen["hidden_before"], seen["review"], seen["told"], seen["after"]) == ("none", "block", 0, "none")
    first = [a.startswith("candidate") for a, _ in seen["texts"]]
    assert 0 < sum(first) < 40  # once in 2^39 runs by chance
    assert [sorted(pair) for pair in seen["texts"]] == [sorted(pair) for pair in texts]
    assert seen["place"] == "39 of 40, 40 rated"
    assert seen["name"] == "ratings.json"
    ratings_file = tmp_path / "ratings.json"
    ratings_file.write_text(seen["file"], encoding="utf-8")
    ratings = read_ratings(ratings_file, DIGEST, {(f"p{n}", 0) for n in range(41)})
    found = [(ratings[f"p{n}", 0].baseline, ratings[f"p{n}", 0].candidate) for n in range(40)]
    wanted = [(0.0, 1.0), (0.0, 1.0), (1.0, 1.0), (0.0, 0.0)] * 10
    wanted[38] = (1.0, 1.0)  # rated again, by the button
    assert found == wanted


@pytest.mark.parametrize(("hits", "said"), [((0, 0), False), ((80, 83), False), ((90, 10), True)])
def test_unlike_prefix_caches_are_said(hits: tuple[int, int], said: bool) -> None:
    """A side that was asked the same before has a shorter time to the first token."""
    rooms = {side: as_dict(Room(1, 0.0, 0, (), 100, hit)) for side, hit in zip(SIDES, hits, strict=True)}
    found = as_markdown(replace(make([("a", "b")]), room=rooms))
    assert ("prefix caches had 90% of the baseline's prompts and 10% of the candidate's" in found) == said
    assert f"| tokens of prompts that the prefix cache had | {hits[0]}.0% | {hits[1]}.0% |" in found


def test_a_long_answer_does_not_squeeze_the_others() -> None:
    """The axis ends near the 90 % that most take; what took longer is said."""
    few = latencies("t", {"baseline": measure([0.02] * 99 + [0.6]), "candidate": measure([0.03] * 100)})
    assert "the longest: baseline 600, candidate 30" in few
    assert float(re.findall(r'text-anchor="middle">([\d.]+)<', few)[-1]) <= 150
    assert "the longest" not in latencies("t", {"baseline": measure([0.02]), "candidate": measure([0.03])})
    assert latencies("t", {"baseline": measure([]), "candidate": measure([])}) == ""


def test_the_page_needs_nothing_else() -> None:
    """No script, style, font or picture is fetched, whatever the answers are."""
    text = page.render(make([("a", "b"), ("c", "c")]))
    assert re.findall(r"<(?:script|link|img|iframe|object|embed|base|source)\b[^>]*\b(?:src|href|data)=", text) == []
    assert re.findall(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|sendBeacon", text) == []
