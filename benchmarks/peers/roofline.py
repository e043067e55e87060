"The fastest matrix products torch makes on this machine, in bf16 and in fp32: the roof over all training"
import json
import statistics
import sys
import time

# rows, inner, columns: squares, and the layers of the model
SHAPES = ((2048, 2048, 2048), (4096, 4096, 4096), (512, 896, 896), (512, 896, 4864), (1024, 896, 4864), (1024, 4864, 896))


def speeds(dtype, seconds=1.):
    """TFLOP/s of each shape, held for a second: the median of all products after its first quarter,
    in which CPUs may run ahead of themselves"""
    import torch
    found = {}
    for rows, inner, columns in SHAPES:
        one, weight, times, began = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype), [], time.perf_counter()
        while time.perf_counter() < began + seconds or len(times) < 4:
            before = time.perf_counter()
            torch.nn.functional.linear(one, weight)
            times.append(time.perf_counter() - before)
        found[f"{rows} x {inner} x {columns}"] = 2 * rows * inner * columns / statistics.median(times[len(times) // 4:]) / 1e12
    return found


def main():
    import torch
    torch.set_num_threads(int(sys.argv[1]))
    found = dict(bf16=speeds(torch.bfloat16), fp32=speeds(torch.float32))
    print("RESULT " + json.dumps({name: max(of_shapes.values()) for name, of_shapes in found.items()} | dict(shapes=found)))


if __name__ == "__main__": main()
