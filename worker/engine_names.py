"""Names of the engines, in the order of a trial. Imports nothing, so that settings and `--help` start fast."""

FLOAT32_TORCH = "torch-float32"  # runs everywhere; every other engine is compared with it
CPU_ENGINES = ("openvino-int8", "openvino-bfloat16", "openvino-float32", FLOAT32_TORCH)
PACKED = ("compiled", "varlen", "packed")  # kinds that take several tweets in a row, for encoders of the kind BERT
HALF = ("float16", "bfloat16")
CUDA_ENGINES = (*(f"{kind}-{precision}" for kind in (*PACKED, "torch") for precision in HALF), FLOAT32_TORCH)
ENGINES = tuple(dict.fromkeys((*CPU_ENGINES, *CUDA_ENGINES)))
