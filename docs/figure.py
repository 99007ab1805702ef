"""Draws the README's figure: the best plan for GPT-2 on four RTX 3090, what runs when, and what memory holds."""

from pathlib import Path

from matplotlib.figure import Figure

import simtrain as st

best = st.plan("gpt2-small", "4x rtx-3090", 256, runtime="torch-eager").best
if best is None:
    raise SystemExit("nothing fits")
figure = Figure(figsize=(11, 7), layout="constrained")
upper, lower = figure.subplots(2, 1, height_ratios=(2, 3))
st.report.plot_timeline(best, upper)
st.report.plot_memory(best, lower)
lower.set_title("")
figure.savefig(Path(__file__).parent / "plan.png", dpi=90)
