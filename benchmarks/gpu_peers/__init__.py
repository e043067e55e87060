"One training on a GPU by each program; modules run as `python -m gpu_peers.NAME JOB`, the job in JSON."
