"Faults on purpose: kills, signals, failing calls, damaged files; see `python -m tests.faults --help`"
