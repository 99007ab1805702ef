"""Strategies as arrays: costs of layers looked up in tables, composed in closed form for many strategies at once.

| module | what it holds |
|---|---|
| `layers` | what passes of a layer cost and occupy, one row per distinct combination of the fields that decide it |
| `stages` | what stages exchange, update and hold all the time, one row per division of the devices |
| `paths` | the critical paths of pipeline schedules as counts, so that a step time is the largest of a few sums of products |
| `holding` | how many micro-batches a stage holds when it may be fullest |
| `compose` | step time and memory by kind of many strategies at once |
"""
