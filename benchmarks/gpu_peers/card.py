"The GPU, its driver and versions, its published peak, and the fastest matrix product torch makes on it"
import json
import re
import shutil
import statistics
import subprocess
import sys
import time

PUBLISHED = (  # name as the driver gives it, dense bf16 TFLOP/s with fp32 sums, source
    (r"\bB200\b", 2250., "NVIDIA HGX B200 datasheet: 4.5 PFLOPS with sparsity, halved"),
    (r"\bH[12]00 NVL\b", 835.5, "NVIDIA H100 NVL and H200 NVL datasheets: 1,671 TFLOPS with sparsity, halved"),
    (r"\bH100 PCIe\b", 756.5, "NVIDIA H100 datasheet, PCIe: 1,513 TFLOPS with sparsity, halved"),
    (r"\b(H200|GH200|H100)\b", 989.5, "NVIDIA H100 and H200 datasheets, SXM: 1,979 TFLOPS with sparsity, halved"),
    (r"\bA100\b", 312., "NVIDIA A100 datasheet"),
    (r"\bL40S\b", 362.05, "NVIDIA L40S datasheet"),
    (r"\bL40\b", 181.05, "NVIDIA L40 datasheet"),
    (r"\bL4\b", 121., "NVIDIA L4 datasheet: 242 TFLOPS with sparsity, halved"),
    (r"\bA10\b", 125., "NVIDIA A10 datasheet"),
    (r"\bRTX 4090\b", 165.2, "NVIDIA Ada GPU architecture whitepaper, table of the GeForce RTX 4090"),
    (r"\bRTX 3090\b(?! Ti)", 71., "NVIDIA GA102 GPU architecture whitepaper, table of the GeForce RTX 3090"))


def published(name):
    "The published bf16 peak of a GPU in TFLOP/s and where it stands, or (None, None) for a GPU that is not in the table"
    return next(((peak, source) for pattern, peak, source in PUBLISHED if re.search(pattern, name)), (None, None))


def driver():
    "The driver's version"
    if not shutil.which("nvidia-smi"): return None
    asked = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    return asked.stdout.splitlines()[0].strip() if asked.returncode == 0 and asked.stdout.strip() else None


def product_speed(device, size, count):
    "TFLOP/s of a bf16 product of two random squares: the median of `count` after three that warm up"
    import torch
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    done, times = torch.cuda.synchronize if device == "cuda" else (lambda: None), []
    for _ in range(count + 3):
        done()
        began = time.perf_counter()
        one @ other
        done()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(times[3:]) / 1e12


def main():
    "All of it, printed as one line"
    import torch
    device = json.loads(sys.argv[1])["device"]
    if device == "cuda" and not torch.cuda.is_available(): return print("RESULT " + json.dumps(dict(card=None, torch=torch.__version__)))
    cuda = device == "cuda"
    name = torch.cuda.get_device_name() if cuda else "CPU"
    peak, source = published(name)
    speeds = {str(size): product_speed(device, size, 20) for size in ((4096, 8192) if cuda else (256, 512))}
    memory = torch.cuda.get_device_properties(0).total_memory / 2**20 if cuda else None
    print("RESULT " + json.dumps(dict(card=name, memory_mib=memory, driver=driver(), cuda=torch.version.cuda, torch=torch.__version__,
                                      published_tflops=peak, published_source=source,
                                      measured_tflops=max(speeds.values()), products=speeds)))


if __name__ == "__main__": main()
