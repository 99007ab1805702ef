import numpy as np
import pytest
from matplotlib.figure import Figure

from simtrain.core.catalog import device
from simtrain.core.errors import InputError
from simtrain.report import plot_roofline


def test_each_line_is_the_smaller_of_peak_and_traffic():
    gpu = device("a100-sxm-80g")
    ax = plot_roofline(gpu, Figure().subplots())
    lines = [line for line in ax.get_lines() if len(line.get_xdata()) > 1]
    assert {line.get_label().split(":")[0] for line in lines} == {f"{gpu.name} {path}" for path in ("bf16", "tf32", "fp32")}
    for line, peak in zip(lines, (312e12, 156e12, 19.5e12), strict=True):
        intensity, attainable = np.asarray(line.get_xdata()), np.asarray(line.get_ydata()) * 1e12
        assert attainable == pytest.approx(np.minimum(peak, intensity * 2.039e12))
        assert attainable.max() == pytest.approx(peak), "the plot reaches beyond the ridge"


def test_many_devices_show_one_path_each():
    chips = [device(f"tpu-{v}") for v in ("v2", "v3", "v4", "v5e", "v5p", "v6e")] + [device("v100"), device("u280")]
    ax = plot_roofline(chips, Figure().subplots())
    assert len(ax.get_legend_handles_labels()[1]) == len(chips)


def test_no_devices_are_refused():
    with pytest.raises(InputError, match="at least one device"):
        plot_roofline([])
