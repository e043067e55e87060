"One training on a graphics card by each program; modules run as `python -m gpu_peers.NAME JOB`, the job in JSON."
