"One training of the same rows by each program; every module runs as `python -m peers.NAME` in a process of its own."
