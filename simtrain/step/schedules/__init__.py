"""Pipeline schedules: who works on which chunk and micro-batch, and in what order.

| name | module | source |
|---|---|---|
| `gpipe` | `gpipe` | Huang et al. 2019 |
| `1f1b` | `one_f_one_b` | Narayanan et al. 2021 (PipeDream-Flush) |
| `interleaved` | `interleaved` | Narayanan et al. 2021 (Megatron-LM) |
| `breadth-first` | `breadth_first` | Lamy-Poirier 2023 |
| `zb-h1`, `zb-h2` | `zero_bubble` | Qi et al. 2023 |
| `dualpipe` | `dual_pipe` | DeepSeek-V3 technical report |

One of your own takes a few lines:

```python
@dataclass(frozen=True)
class Eager:
    name: str = "eager"
    default_chunks: int = 1

    def placement(self, stages, chunks):
        return looped_placement(stages, chunks)

    def order(self, rank, stages, chunks, micro_batches):
        return [i for m in range(micro_batches) for i in (forward(m), backward(m))]

register(Eager())
```
"""

from simtrain.step.schedules.catalog import find, names, register
from simtrain.step.schedules.evaluate import InFlight, Timeline, in_flight, makespan, period, timeline
from simtrain.step.schedules.language import (
    Action,
    Instruction,
    Placement,
    Schedule,
    actions,
    backward,
    forward,
    input_gradient,
    looped_placement,
    one_forward_one_backward,
    single_placement,
    weight_gradient,
)
from simtrain.step.schedules.schedule_plan import SchedulePlan, plan

__all__ = [
    "Action",
    "InFlight",
    "Instruction",
    "Placement",
    "Schedule",
    "SchedulePlan",
    "Timeline",
    "actions",
    "backward",
    "find",
    "forward",
    "in_flight",
    "input_gradient",
    "looped_placement",
    "makespan",
    "names",
    "one_forward_one_backward",
    "period",
    "plan",
    "register",
    "single_placement",
    "timeline",
    "weight_gradient",
]
