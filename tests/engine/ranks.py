"""What one of two ranks does; apart, so that a spawned process can import it."""

import torch

from engine.harness import build, cpu_worker, outputs_are_right, projections


def run_rank(rank, path, rendezvous, truth, arguments, layers):
    """One rank: vLLM gives it its part of the model, and it loads that from the whole checkpoint."""
    torch.set_num_threads(1)
    sizes = arguments.get("tensor_parallel_size", 1), arguments.get("pipeline_parallel_size", 1)
    with cpu_worker(rank, 2, rendezvous, *sizes):
        for switch in ("0", "1"):
            model = build(path, switch, **arguments)
            assert list(projections(model)) == layers[rank]
        outputs_are_right(model, truth)
        torch.distributed.barrier()
