"""The command line. `simtrain --help` lists the commands; every command takes `--json`.

Exit codes: 0 fine · 1 the answer is that it does not fit (the prediction is printed all the same) · 2 bad input · 3 well-formed but not
modelled · 4 internal error, please report.
"""
