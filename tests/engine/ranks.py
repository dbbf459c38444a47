"""What one of two ranks does; its own module, so that a spawned process can import it."""

import torch

from engine.harness import assert_outputs, build, cpu_worker, model_parallel, projections

SIZES = ({"tensor_parallel_size": 2}, [0, 1], [0, 1]), ({"pipeline_parallel_size": 2}, [0], [1])


def run_rank(rank, path, rendezvous, truth):
    """Loads this rank's part of the model from the whole checkpoint."""
    torch.set_num_threads(1)
    with cpu_worker(rank, 2, rendezvous):
        for sizes, *layers in SIZES:
            with model_parallel(**sizes):
                for switch in ("0", "1"):
                    model = build(path, switch, **sizes, distributed_executor_backend="mp")
                    assert list(projections(model)) == layers[rank]
                    assert hasattr(model, "indexproj") == (switch == "1")
                assert_outputs(model, truth)
                torch.distributed.barrier()
