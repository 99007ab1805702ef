"""The page: one file, nothing from outside, readable words, figures that a browser draws, tables that sort."""

import dataclasses
import json
import re
import shutil
import subprocess

import pytest

import simtrain as st
from simtrain.core.errors import InputError
from simtrain.core.result import TraceEvent
from simtrain.planner.evidence import Nearby
from simtrain.planner.found import Failure, Plan
from simtrain.planner.why import Why, Worth
from simtrain.report import page_html, write_page
from simtrain.report.page import plan_page
from simtrain.report.page_figures import MOST_BARS, memory_over_time, timelines
from simtrain.report.page_tables import alternatives, front, in_common
from simtrain.report.page_words import moment_in_words, strategy_in_words
from tests.report.conftest import GIB, make_result

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HEADLESS = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=8000")


def make_plan(**changes):
    slower = [make_result(samples_per_s=400.0 - i, mfu=0.3 - i / 100, strategy=f"data=4,micro_batch={i + 1}") for i in range(11)]
    best = make_result(samples_per_s=500.0)
    given = {
        "workload": "gpt2-small",
        "cluster": "4x rtx-3090",
        "global_batch": 64,
        "objective": "throughput",
        "objectives": ("throughput",),
        "considered": 30,
        "ranked": (best, *slower),
        "failed": (Failure("data=4,micro_batch=64", "out of memory", 2.0 * GIB, "logits", "data=4,micro_batch=4", 500.0),),
        "why": Why(
            best.strategy, "bound by compute: compute 90%", (Worth("10 % more compute peak", 0.1, 0.08),), (Worth("zero=1", 0.1, -0.01),)
        ),
        "evidence": (Nearby("a run", "a paper", 1.5, ("devices 8 instead of 4",), 1.0, 1.1, None),),
    }
    return Plan(**(given | changes))


def test_nothing_comes_from_outside(tmp_path):
    make_plan().report(tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text()
    own = text.replace(re.search(r"<script>/\*\*\s+\* plotly.*?</script>", text, re.S).group(0), "")
    assert not re.search(r'(?:src|href)="(?!#|data:)', own)
    assert "@import" not in own
    assert text.count("plotly.js v") == 1, "inlined once"


def test_what_people_named_cannot_break_out_of_the_page():
    text = page_html(make_plan(workload="</script><script>alert(1)</script>"))
    assert "<script>alert(1)" not in text


def test_words_say_how_it_trains():
    pipelined = (
        "data=2,tensor=4,pipeline=8,micro_batch=2,accumulation=16,precision=bf16-master,checkpoint=full,zero=1,sequence_parallel=true"
    )
    words = " ".join(strategy_in_words(make_result(strategy=pipelined)))
    assert "2 replicas of the model on 64 devices, each divided into 4 ways inside each layer and its sequence, 8 pipeline stages" in words
    assert "16 micro-batches of 2 samples for a step of 64 samples" in words
    assert "Every block is recomputed" in words
    assert "ZeRO 1 divides the optimizer's states" in words
    assert moment_in_words("0/backward, accumulating/head.33/losses") == (
        "in the backward pass of micro-batch 0 (accumulating), at losses of head.33"
    )
    assert moment_in_words("optimizer") == "at optimizer"


def test_what_all_strategies_share_is_said_once():
    rows = make_plan().ranked
    assert in_common(rows) == ["data=4"]
    table = alternatives(rows)
    assert all("data=4" not in row[1].text for row in table.rows)
    assert len(table.rows) == 12


def test_the_front_has_no_point_that_another_beats():
    small, fast = make_result(samples_per_s=10.0), make_result(samples_per_s=20.0)
    small = dataclasses.replace(small, memory=dataclasses.replace(small.memory, device_bytes=1.0 * GIB))
    beaten = dataclasses.replace(small, samples_per_s=9.0, memory=dataclasses.replace(small.memory, device_bytes=2.0 * GIB))
    assert front(make_plan(ranked=(fast, small, beaten))) == [fast, small]


def test_an_incomplete_search_says_so_first():
    assert "not complete" in plan_page(make_plan(unread=7)).warnings[0].lower()


def test_nothing_fits():
    page = plan_page(make_plan(ranked=(), why=None, evidence=(), advice=("it fits 4 times as many machines",)))
    assert page.sentences == ("Nothing fits.", "it fits 4 times as many machines")
    assert "Nothing fits." in page_html(make_plan(ranked=(), why=None, evidence=()))


def test_a_run_far_away_is_a_warning():
    far = (Nearby("a run", "a paper", 9.0, (), 1.0, 1.1, None),)
    assert "No measured run is near" in plan_page(make_plan(evidence=far)).warnings[0]


def test_long_steps_show_their_beginning_and_end():
    events = tuple(TraceEvent("f", "forward" if i % 2 else "backward", "all", "compute", i * 1.0, 0.9, i) for i in range(3 * MOST_BARS))
    drawn = timelines(make_result(events=events))
    assert len(drawn) == 2
    assert sum(len(t["x"]) for _, f in drawn for t in f["data"]) <= MOST_BARS + 4
    assert drawn[0][1]["layout"]["xaxis"]["range"][0] == 0
    assert drawn[1][1]["layout"]["xaxis"]["range"][1] == pytest.approx(3 * MOST_BARS - 0.1)


def test_memory_over_time_keeps_the_peak():
    result = make_result()
    total = next(t for t in memory_over_time(result)["data"] if t["name"] == "allocated")
    assert max(total["y"]) == pytest.approx(result.memory.allocated_bytes / GIB, rel=1e-5)


def test_paths_that_cannot_be(tmp_path):
    with pytest.raises(InputError, match=r"ends in \.html"):
        write_page(make_result(), tmp_path / "page.pdf")
    with pytest.raises(InputError, match="cannot write"):
        write_page(make_result(), tmp_path / "missing" / "page.html")


# What follows needs a browser.


def look(path, *, script=""):
    """What the browser makes of a page after a script ran in it: its document, and what it said on its console."""
    if script:
        path.write_text(path.read_text().replace("</body>", f"<script>{script}</script></body>"))
    command = [CHROMIUM, *HEADLESS, f"--user-data-dir={path.parent / 'browser'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


DRAWN = """
      document.body.dataset.drawn = JSON.stringify([...document.querySelectorAll('.plot')].filter((plot) =>
        plot.querySelector('.main-svg') && plot.querySelector('.trace, .scatterlayer path, .barlayer path')).map((plot) => plot.id).sort());
"""


def told(document, name):
    """What a script left in the page."""
    return json.loads(re.search(rf'data-{name}="(.*?)"', document).group(1).replace("&quot;", '"'))


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")


@needs_browser
def test_a_browser_draws_every_figure_and_sorts_tables(tmp_path):
    path = tmp_path / "plan.html"
    make_plan().report(path)
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', path.read_text(), re.S).group(1))
    click = """
      const table = document.querySelector('#alternatives table'), column = (name) =>
        [...table.querySelectorAll('th')].find((th) => th.textContent.trim() === name);
      const read = () => [...table.tBodies[0].rows].map((row) => row.cells[column('samples/s').cellIndex].textContent);
      const out = [read()];
      column('samples/s').querySelector('button').click(); out.push(read());
      column('samples/s').querySelector('button').click(); out.push(read());
      column('strategy').querySelector('button').click();
      out.push([...table.tBodies[0].rows].map((row) => row.cells[column('strategy').cellIndex].textContent));
      document.body.dataset.sorted = JSON.stringify(out);
    """
    document, console = look(path, script=click + DRAWN)
    assert console == []
    assert 'data-ready="true"' in document
    assert told(document, "drawn") == sorted(figures)
    before, ascending, descending, words = told(document, "sorted")
    assert ascending == sorted(before, key=float)
    assert descending == ascending[::-1]
    assert words == sorted(words)


@needs_browser
def test_a_browser_draws_a_real_prediction_and_a_comparison(tmp_path):
    small = st.workload("gpt", layers=2, hidden=128, heads=4, vocabulary=512, seq_len=128)
    a = st.schedule(small, "4x rtx-3090", "data=4,micro_batch=2,accumulation=2")
    b = st.schedule(small, "4x rtx-3090", "data=2,pipeline=2,micro_batch=2,accumulation=4", runtime="megatron")
    open_timelines = "document.querySelectorAll('details').forEach((details) => { details.open = true; });"
    for name, subject, figures in (("a", a, 4), ("ab", st.compare(a, b), 4)):
        subject.report(tmp_path / f"{name}.html")
        document, console = look(tmp_path / f"{name}.html", script=f"{open_timelines} setTimeout(() => {{ {DRAWN} }}, 500);")
        assert console == []
        assert len(told(document, "drawn")) == figures
