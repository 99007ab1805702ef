"""The proposal's table: what is predicted, the readers of its data sets, and the whole table run on tiny files of their formats."""

import json
import pickle

import numpy as np
import pytest

from simtrain.core.errors import InputError, UnknownNameError
from validation import proposal
from validation.proposal import COMPONENTS, JOBS, Predictor, predict_job
from validation.proposal_data import IMAGE_BYTES, read_cifar10, read_wikitext2
from validation.proposal_report import make_report, plot_ablation
from validation.proposal_runs import VARIANTS, Plan, run_job


@pytest.fixture(scope="module")
def table():
    return predict_job("resnet50-cifar10", boards=("4x rtx-3090 x16",))


def test_every_combination_is_predicted_and_the_law_holds_between_them(table):
    assert len(table.variants) == 16
    base = table.find()
    assert table.saved(base) == 0
    # without a dynamic batch the rate of the first batch is the best one
    assert table.find("learning rate").time_h == base.time_h
    # recomputation costs time and saves memory, half precision saves both
    assert table.find("checkpointing").time_h > base.time_h
    assert table.find("checkpointing").memory_bytes < base.memory_bytes
    assert table.find("precision").time_h < base.time_h
    # a batch that may follow with its rate is never worse than one whose rate is kept, and that one may always stay
    assert table.find("dynamic batch", "learning rate").time_h <= table.find("dynamic batch").time_h < base.time_h * 1.001
    low, high = table.ranges[COMPONENTS]
    assert low <= table.saved(table.find(*COMPONENTS)) <= high
    # wider lanes never scale worse
    assert table.scaling["4x rtx-3090 x16"][0] > base.scaling
    time = {frozenset(v.components): v.time_h for v in table.variants}
    pair = frozenset(("precision", "checkpointing"))
    product = time[frozenset(("precision",))] * time[frozenset(("checkpointing",))] / base.time_h
    assert table.interactions["precision", "checkpointing"] == pytest.approx(time[pair] / product - 1)


def test_the_report_says_each_claim_beside_what_was_measured(table):
    from matplotlib.figure import Figure

    report = make_report([table], "4x rtx-3090")
    text = str(report)
    assert all(claim in text for claim in proposal.CLAIMS.values())
    assert "measured small (digits)" in text
    assert json.loads(json.dumps(report.to_dict()))["jobs"][0]["job"] == "resnet50-cifar10"
    ax = plot_ablation(report, Figure().subplots())
    assert len(ax.patches) >= 2 * len(COMPONENTS) + 1


def test_the_noise_scale_of_text_grows_down_to_the_target():
    least, noise, _ = JOBS["gpt2-wikitext2"].noise()
    assert least > 0
    assert noise(0.0) < noise(0.5) < noise(1.0)
    assert noise(1.0) * 1024 == pytest.approx(2.1e8 / 3.4 ** (1 / 0.21), rel=0.01)


def test_what_is_not_known_is_named():
    with pytest.raises(UnknownNameError, match="gpt2-wikitext2"):
        predict_job("gpt2-wikitext")
    with pytest.raises(UnknownNameError, match="precision"):
        Predictor(JOBS["resnet50-cifar10"]).variant(["precison"])
    with pytest.raises(InputError, match="has 1"):
        predict_job("resnet50-cifar10", "1x rtx-3090")
    with pytest.raises(InputError, match="three or more"):
        Plan(seeds=2)


def tiny_cifar(folder, *, pickled=False, images=40):
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        classes = rng.integers(0, 10, images)
        pixels = np.clip(rng.normal(25 * classes[:, None], 10, (images, IMAGE_BYTES)), 0, 255).astype(np.uint8)
        if pickled:
            (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": classes.tolist()}, protocol=2))
        else:
            (folder / f"{name}.bin").write_bytes(np.hstack([classes[:, None].astype(np.uint8), pixels]).tobytes())
    return folder


def tiny_wikitext(folder):
    rng = np.random.default_rng(0)
    for part, lines in (("train", 20), ("valid", 4)):
        rows = [" " + " ".join(f"w{int(n)}" for n in rng.integers(0, 20, 12)) for _ in range(lines)]
        (folder / f"wiki.{part}.tokens").write_text("\n".join([" = Title = ", *rows]), encoding="utf-8")
    return folder


def test_both_versions_of_cifar_10_are_the_same(tmp_path):
    for kind in ("bin", "py"):
        (tmp_path / kind).mkdir()
    binary, python = read_cifar10(tiny_cifar(tmp_path / "bin")), read_cifar10(tiny_cifar(tmp_path / "py", pickled=True))
    assert binary.train[0].shape == (200, 3, 32, 32)
    assert np.array_equal(binary.train[0], python.train[0])
    assert np.array_equal(binary.test[1], python.test[1])
    assert abs(float(binary.train[0].mean())) < 3


def test_bad_data_is_named_and_a_pickle_cannot_run_anything(tmp_path):
    with pytest.raises(InputError, match="no CIFAR-10"):
        read_cifar10(tmp_path)
    tiny_cifar(tmp_path)
    (tmp_path / "data_batch_3.bin").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match=r"data_batch_3\.bin is not"):
        read_cifar10(tmp_path)
    (tmp_path / "py").mkdir()
    tiny_cifar(tmp_path / "py", pickled=True)
    (tmp_path / "py" / "data_batch_1").write_bytes(pickle.dumps(print))
    with pytest.raises(InputError, match="it asks for"):
        read_cifar10(tmp_path / "py")
    with pytest.raises(InputError, match=r"wiki\.train\.tokens"):
        read_wikitext2(tmp_path)


def test_words_of_the_training_text_are_the_vocabulary(tmp_path):
    tiny_wikitext(tmp_path)
    (tmp_path / "wiki.valid.tokens").write_text("w1 never-seen\nw1", encoding="utf-8")
    words = read_wikitext2(tmp_path)
    assert words.train.max() < words.vocabulary
    assert len(words.valid) == 5  # two words, an end, a word, an end
    assert words.valid[0] == words.valid[3]
    assert words.valid[2] == words.valid[4]


@pytest.mark.parametrize("job", JOBS)
def test_the_whole_table_runs_on_tiny_files(job, tmp_path, monkeypatch):
    """In this process: the launcher is one line of its own, and torch takes seconds to import in each of thirty processes."""
    torch = pytest.importorskip("torch")
    from validation import proposal_runs, proposal_worker

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(proposal_runs, "_train", lambda request, processes: proposal_worker.train(request))
    monkeypatch.setattr(proposal_worker, "EVALUATIONS", 1)
    if job == "resnet50-cifar10":
        folder, options = tiny_cifar(tmp_path, images=3), {"depth": 18, "width": 4}
    else:
        folder, options = tiny_wikitext(tmp_path), {"layers": 2, "hidden": 16, "heads": 2, "max_positions": 16}
    plan = Plan(seeds=3, epochs=1, processes=1, options=options, micro_batch=4, max_batch=8)
    measured = run_job(job, folder, plan)
    torch.set_num_threads(threads)
    assert [v.components for v in measured.variants] == list(VARIANTS)
    assert measured.variants[0].time_saved == 0
    assert measured.variants[0].verdict == "equivalent"
    assert all(run["curve"][-1][1] >= run["samples"] > 0 for run in measured.runs)
    assert "baseline" in str(measured)
    assert json.dumps(measured.to_dict())
