"""XLA flags of the tests and, printed, of `make notebooks`: equal flags, so they share compiled programs."""

import importlib.metadata

JAXLIB = importlib.metadata.version("jaxlib")
XLA_FLAGS = " ".join(
    (
        # Most of the time of the tests is that of the compiler.
        "--xla_backend_optimization_level=0",
        *(["--xla_cpu_use_fusion_emitters=false"] if JAXLIB < "0.11" else []),  # later: unknown, which aborts
        "--xla_cpu_parallel_codegen_split_count=1",
        # Eight devices share what cores there are: one may wait long for the others.
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    )
)

if __name__ == "__main__":
    print(XLA_FLAGS)
