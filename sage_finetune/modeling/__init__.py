"The base model, its adapter, and the arithmetic of both"
import logging

# bitsandbytes says at each import that an optional kernel is missing, and at each product of 8-bit weights how it is made.
for _part in ("backends.cpu.ops", "autograd._functions"): logging.getLogger(f"bitsandbytes.{_part}").setLevel(logging.ERROR)
