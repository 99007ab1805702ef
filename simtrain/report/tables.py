"""Tables of one prediction and of a plan, as rich renderables (they print themselves in terminals and notebooks)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from simtrain.core.errors import StrategyError
from simtrain.core.result import MemoryKind, Result
from simtrain.core.strategy import Strategy
from simtrain.core.units import format_bytes, format_flops, format_time
from simtrain.planner.evidence import in_words
from simtrain.planner.launchers import launchers_of
from simtrain.report.sweeps import advice_list, outlook_table, why_table
from simtrain.report.text import ROUND_OFF, bullets, facts, memory_verdict, part_time, plain_table, share

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from simtrain.planner.found import Failure, Plan


def result_table(result: Result) -> RenderableType:
    """Returns a prediction in full: speed, what the step spends its time on, memory by kind, energy, cost, assumptions and sources."""
    from rich.columns import Columns
    from rich.console import Group

    memory = _memory_table(result)
    side_by_side = Columns([Group(_breakdown_table(result), _busy_table(result)), memory], padding=(0, 6))
    notes = [bullets("Assumed or left out", result.assumptions), bullets("Rests on", result.sources)]
    return Group(_headline(result), "", side_by_side, *[n for n in notes if n])


def _headline(result: Result) -> Table:
    achieved = result.model_flops / result.step_time_s / result.devices if result.step_time_s and result.devices else 0.0
    return facts(
        [
            ("workload", result.workload),
            ("cluster", f"{result.cluster} ({result.devices} devices used)"),
            ("strategy", f"{result.strategy} (global batch {result.global_batch})"),
            ("runtime", f"{result.runtime}, read by {result.reader}"),
            ("step time", f"{format_time(result.step_time_s)}, bound by {result.bound_by}"),
            ("throughput", f"{_number(result.samples_per_s)} samples/s, {_number(result.tokens_per_s)} tokens/s"),
            (
                "MFU",
                f"{result.mfu:.1%} (attention in full, as most papers count), "
                f"{result.mfu_causal:.1%} (causal attention as computed); {format_flops(achieved)} per device",
            ),
            ("memory", f"{memory_verdict(result.memory)}; peak on {result.memory.rank_class} at {result.memory.peak_moment}"),
            ("energy", f"{_number(result.energy_j)} J per step, {_number(result.power_w)} W on average"),
            ("cost", f"{_number(result.cost_usd)} USD per step" if result.cost_usd else "no price known"),
        ]
    )


def _breakdown_table(result: Result) -> Table:
    table = plain_table("Step time on the slowest rank", "part", "time", "share", numeric=("time", "share"))
    for part, time_s in result.breakdown_s.items():
        if part == "offload" and abs(time_s) <= ROUND_OFF * result.step_time_s:
            continue  # a part of those steps alone that move something
        table.add_row(part, part_time(time_s, result.step_time_s), share(abs(time_s), result.step_time_s))
    table.add_section()
    table.add_row("sum = step", format_time(sum(result.breakdown_s.values())), share(sum(result.breakdown_s.values()), result.step_time_s))
    return table


def _busy_table(result: Result) -> Table:
    table = plain_table("Busy, overlapped or not", "stream", "time", "share", numeric=("time", "share"))
    for stream, time_s in result.busy_s.items():
        table.add_row(stream, format_time(time_s), share(time_s, result.step_time_s))
    return table


def _memory_table(result: Result) -> Table:
    memory = result.memory
    table = plain_table("Memory at its peak", "kind", "size", "share", numeric=("size", "share"))
    order = {kind.value: i for i, kind in enumerate(MemoryKind)}
    for kind, size_bytes in sorted(memory.by_kind_bytes.items(), key=lambda item: order.get(item[0], len(order))):
        if size_bytes > 0:
            table.add_row(kind, format_bytes(size_bytes), share(size_bytes, memory.allocated_bytes))
    table.add_section()
    table.add_row("allocated by tensors", format_bytes(memory.allocated_bytes), share(memory.allocated_bytes, memory.allocated_bytes))
    if memory.blocks_bytes:
        table.add_row("in the allocator's blocks", format_bytes(memory.blocks_bytes), "")
    table.add_row("reserved by allocator", format_bytes(memory.reserved_bytes), "")
    table.add_row("on the device", format_bytes(memory.device_bytes), "")
    table.add_row("device capacity", format_bytes(memory.capacity_bytes), "")
    moved = (("host memory", memory.host_bytes, memory.host_capacity_bytes), ("drives", memory.nvme_bytes, memory.nvme_capacity_bytes))
    for place, size_bytes, capacity_bytes in moved:
        if size_bytes:
            table.add_row(f"moved to {place}, a node", format_bytes(size_bytes), f"{share(size_bytes, capacity_bytes)} of it")
    return table


def plan_table(plan: Plan, top: int = 10) -> RenderableType:
    """Returns the best strategies of a plan, and why the others failed, in groups.

    Args:
        plan: What `simtrain.plan` returned.
        top: How many strategies to list.
    """
    from rich.console import Group

    head = facts(
        [
            ("workload", plan.workload),
            ("cluster", plan.cluster),
            ("global batch", str(plan.global_batch)),
            ("objective", ", ".join(plan.objectives) or plan.objective),
            ("runtime", ", ".join(dict.fromkeys(r.runtime for r in plan.ranked)) or "-"),
            ("considered", _counts(plan)),
            ("search", "; ".join(plan.notes)),
        ]
    )
    parts: list[RenderableType] = [head, ""]
    if not plan.complete:
        fix = "give it more time with --patience, or narrow the search with --fixed"
        parts += [f"NOT COMPLETE: {plan.unread:,} of {plan.considered:,} strategies were not looked at; {fix}.", ""]
    if plan.ranked:
        shown = plan.ranked[:top]
        title = f"Best {len(shown)} by {plan.objective}" + (f" (of {len(plan.ranked)})" if len(plan.ranked) > len(shown) else "")
        parts.append(_ranking(shown, title))
        if len(plan.by_runtime) > 1:
            parts.append(_runtimes(plan.by_runtime))
    else:
        parts.append("Nothing fits." if plan.complete else "Nothing fits of what was looked at.")
        parts.append(advice_list(plan.advice))
    if plan.outlooks:
        parts.append(outlook_table(plan.outlooks))
    if len(plan.objectives) > 1 and plan.front:
        parts.append(_ranking(plan.front, f"Pareto front of {', '.join(plan.objectives)}"))
    if plan.why:
        parts.append(why_table(plan.why))
    if plan.best is not None and plan.why:
        parts += [f"How sure: {in_words(plan.evidence)}.", ""]
    if plan.failed:
        parts.append(_failures(plan.failed))
    return Group(*parts)


def _counts(plan: Plan) -> str:
    counts = f"{plan.considered} strategies: {len(plan.ranked)} fit, {len(plan.failed)} do not"
    if plan.unlisted:
        counts += f", {plan.unlisted} more are too large for memory and not listed"
    if plan.passed_over:
        counts += f", {plan.passed_over} are outpaced by a bound or a projection"
    if plan.unlisted:
        counts += f", {plan.unlisted} more do not by far"
    return counts + f" ({format_time(plan.elapsed_s)})"


def _ranking(shown: Sequence[Result], title: str) -> Table:
    numeric = ("", "step time", "samples/s", "MFU", "J/step", "USD/step")
    several = len({r.runtime for r in shown}) > 1
    table = plain_table(title, "", "strategy", "step time", "samples/s", "MFU", "memory", "J/step", "USD/step", "bound by", numeric=numeric)
    for i, r in enumerate(shown, start=1):
        memory = f"{format_bytes(r.memory.device_bytes)} of {format_bytes(r.memory.capacity_bytes)}"
        numbers = (format_time(r.step_time_s), _number(r.samples_per_s), f"{r.mfu:.1%}")
        # The comma breaks a line only where a space follows; long strategies then wrap between choices.
        strategy = r.strategy.replace(",", ", ") + (f" [{r.runtime}]" if several else "")
        table.add_row(str(i), strategy.replace("[", "\\["), *numbers, memory, _number(r.energy_j), _money(r.cost_usd), r.bound_by)
    return table


def _runtimes(found: Mapping[str, Result]) -> Table:
    """The best under each runtime, and what starts it: they are different programs, so that the choice is not free."""
    table = plain_table(
        "Best under each runtime",
        "runtime",
        "written for it by --emit",
        "strategy",
        "samples/s",
        "of the best",
        numeric=("samples/s", "of the best"),
    )
    best = next(iter(found.values()))
    for name, r in found.items():
        row = (name, ", ".join(launchers_of(name)) or "-", r.strategy.replace(",", ", "), _number(r.samples_per_s))
        table.add_row(*row, f"{r.samples_per_s / best.samples_per_s:.0%}")
    return table


def _failures(failed: tuple[Failure, ...]) -> Table:
    """Groups what does not fit by the kind of memory that takes most, and what is refused by its reason."""
    groups: dict[str, list[Failure]] = defaultdict(list)
    for failure in failed:
        groups[f"out of memory, mostly {failure.term}" if failure.over_bytes > 0 else failure.reason].append(failure)
    table = plain_table("Why the others fail", "", "why", "over by", "closest to fitting", "would fit with", numeric=("", "over by"))
    for why, group in sorted(groups.items(), key=lambda item: -len(item[1])):
        closest, furthest = (choose(group, key=lambda f: (f.over_bytes, f.times_limit)) for choose in (min, max))
        over = " to ".join(dict.fromkeys(excess(f) for f in (closest, furthest) if excess(f)))
        table.add_row(str(len(group)), why, over or "-", closest.strategy.replace(",", ", "), smallest_change(closest))
    return table


def excess(failure: Failure) -> str:
    """By how much a limit is broken: bytes of memory, or how many times any other; nothing where that is not the reason."""
    if failure.over_bytes > 0:
        return format_bytes(failure.over_bytes)
    return f"{failure.times_limit:.3g} times" if failure.times_limit else ""


def smallest_change(failure: Failure) -> str:
    """Names the choices of the smallest change, where they differ from what failed."""
    if not failure.smallest_change:
        return "-"
    try:
        before, after = Strategy.parse(failure.strategy), Strategy.parse(failure.smallest_change)
        names = [name for name in Strategy.__dataclass_fields__ if getattr(after, name) != getattr(before, name)]
        change = ", ".join(f"{name}={getattr(after, name)}" for name in names)
    except StrategyError:  # replicas stated in full have no text to read back
        change = failure.smallest_change
    return f"{change} ({_number(failure.smallest_change_samples_per_s)} samples/s)"


def _money(cost_usd: float) -> str:
    return _number(cost_usd) if cost_usd else "-"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
